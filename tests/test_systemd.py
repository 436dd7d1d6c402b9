"""The unit: what systemd's own tools say of it, and its life under a real systemd in namespaces of its own."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from node.demo.pacs import free_port
from tests.running_node import wait_until

CHECKOUT = Path(__file__).parent.parent
UNIT = CHECKOUT / "systemd" / "radnode.service"
DROP_INS = sorted((CHECKOUT / "systemd" / "radnode.service.d").glob("*.conf.example"))
MOST_EXPOSED = 2.5


def _unit_with(drop_ins: list[Path], folder: Path) -> Path:
    """The unit as an administrator has it, but for the path of a command that is not installed here."""
    unit = folder / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/radnode/bin/radnode ", f"{sys.executable} "))
    for drop_in in drop_ins:
        place = folder / "radnode.service.d" / drop_in.name.removesuffix(".example")
        place.parent.mkdir(exist_ok=True)
        place.write_text(drop_in.read_text())
    return unit


def _names(drop_ins: list[Path]) -> str:
    return "+".join(drop_in.name.split(".")[0] for drop_in in drop_ins) or "plain"


COMBINATIONS = [[], *([drop_in] for drop_in in DROP_INS), DROP_INS]


def test_all_drop_ins_are_looked_at() -> None:
    assert [drop_in.name for drop_in in DROP_INS] == ["gpu.conf.example", "port-104.conf.example", "ray.conf.example"]


@pytest.mark.parametrize("name", ["radnode-ray-head.service", "radnode-ray-worker.service"])
def test_the_units_of_ray_are_right_and_hardened(name: str, tmp_path: Path) -> None:
    unit = tmp_path / name
    text = (CHECKOUT / "systemd" / name).read_text()
    unit.write_text(text.replace("/opt/radnode/bin/ray ", f"{sys.executable} "))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", unit]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(rf"Overall exposure level for {re.escape(name)}: ([0-9.]+)", said)
    assert found, said
    assert float(found[1]) <= MOST_EXPOSED, said


@pytest.mark.parametrize("drop_ins", COMBINATIONS, ids=_names)
def test_systemd_verifies_the_unit_without_a_word(drop_ins: list[Path], tmp_path: Path) -> None:
    unit = _unit_with(drop_ins, tmp_path)
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("drop_ins", COMBINATIONS, ids=_names)
def test_the_unit_is_hardened(drop_ins: list[Path], tmp_path: Path) -> None:
    unit = _unit_with(drop_ins, tmp_path)
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", unit],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Overall exposure level for radnode\.service: ([0-9.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= MOST_EXPOSED, done.stdout


class Machine:
    """A systemd that runs as PID 1 of its own namespaces; the unit is installed in it, and not started."""

    def __init__(self, folder: Path, port: int):
        self.port = port
        config = folder / "config.yaml"
        config.write_text(
            f"""\
node:    {{ae_title: RADNODE, host: 127.0.0.1, port: {port}, storage: /var/lib/radnode}}
peers:
  sender: {{ae_title: ECHOSCU, host: 127.0.0.1}}
receive: {{from: [sender]}}
models:  {{path: /opt/radnode/src/models}}
routes:  []
keep:    {{studies: 7d, free_disk: 10MB}}
"""
        )
        namespaces = ["--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--cgroup", "--mount-proc"]
        places = [CHECKOUT, sys.base_prefix, sysconfig.get_path("purelib"), config]
        self._log = folder / "boot.log"
        with self._log.open("wb") as log:
            self._unshare = subprocess.Popen(
                ["unshare", *namespaces, "bash", CHECKOUT / "tests" / "systemd" / "boot.sh", *places],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(self._is_up, 60, "systemd is up")
        except AssertionError:
            self.halt()
            raise

    def _is_up(self) -> bool:
        assert self._unshare.poll() is None, f"systemd did not boot in namespaces:\n{self._log.read_text()}"
        return self.run("systemctl", "is-system-running").stdout.strip() in {"running", "degraded"}

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """A command inside."""
        init = next((child.pid for child in psutil.Process(self._unshare.pid).children()), 0)
        enter = ["nsenter", "-t", str(init), "-p", "-m", "-u", "-i", "-C"]
        return subprocess.run([*enter, *command], capture_output=True, text=True, check=False)

    def systemctl(self, *words: str) -> None:
        """systemctl; what fails, or never becomes ready, is told with the service's own words."""
        done = self.run("timeout", "100", "systemctl", *words)
        assert done.returncode == 0, done.stdout + done.stderr + self.journal()

    def show(self, name: str) -> str:
        """A property of the unit."""
        return self.run("systemctl", "show", "radnode", "--value", "-p", name).stdout.strip()

    def journal(self, *words: str) -> str:
        """The service's log."""
        return self.run("journalctl", "-u", "radnode", "-o", "cat", "--no-pager", *words).stdout

    def processes(self) -> list[int]:
        """The unit's processes, by their numbers inside."""
        group = self.show("ControlGroup")
        return (
            [int(pid) for pid in self.run("cat", f"/sys/fs/cgroup{group}/cgroup.procs").stdout.split()] if group else []
        )

    def answers(self) -> bool:
        """Does the node answer a C-ECHO?"""
        echo = ["echoscu", "-aec", "RADNODE", "127.0.0.1", str(self.port)]
        return subprocess.run(echo, capture_output=True, check=False).returncode == 0

    def adjust(self, name: str, text: str) -> None:
        """Install a drop-in."""
        folder = "/etc/systemd/system/radnode.service.d"
        done = self.run("sh", "-c", f'mkdir -p {folder} && printf %s "$1" > {folder}/{name}', "sh", text)
        assert done.returncode == 0, done.stderr
        self.systemctl("daemon-reload")

    def halt(self) -> None:
        """End it, and with it every process inside."""
        for init in psutil.Process(self._unshare.pid).children():
            init.kill()
        self._unshare.wait(10)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    for program in ("unshare", "nsenter", "systemctl", "echoscu"):
        assert shutil.which(program), f"{program} is not installed"
    machine = Machine(tmp_path, free_port())
    yield machine
    machine.halt()


@pytest.mark.real_systemd
def test_the_unit_lives_under_systemd(machine: Machine) -> None:
    machine.systemctl("start", "radnode")  # returns when READY=1 came
    assert (machine.show("ActiveState"), machine.show("StatusText")) == ("active", "serving")
    assert machine.answers()
    supervisor = int(machine.show("MainPID"))
    assert machine.run("ps", "-o", "user=", "-p", str(supervisor)).stdout.strip() == "radnode"
    children = set(machine.processes()) - {supervisor}
    assert len(children) >= 4, "receive, schedule, work, deliver"
    assert "ready" in machine.journal("-p", "6..6"), "lines carry their priority"
    assert machine.run("stat", "-c", "%U %a", "/var/lib/radnode").stdout.strip() == "radnode 750"

    # The confinement holds for the processes that do the work, and not on paper only.
    for pid in machine.processes():
        status = machine.run("cat", f"/proc/{pid}/status").stdout
        for line in ("Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"):
            assert line in status, f"{line} is not so for process {pid}:\n{status}"

    # Models are confined further, by what the unit leaves to be used: no namespaces.
    said = machine.journal()
    for sentence in (
        "models run with no network: yes (seccomp)",
        "models run with read-only files, none but its own: yes (Landlock)",
        "models run with no way to other processes: yes (Landlock and seccomp)",
        "models run with no rights to gain: yes",
    ):
        assert sentence in said, said

    # Killed, the whole node starts again.
    machine.run("kill", "-9", str(supervisor))
    wait_until(lambda: machine.show("NRestarts") == "1" and machine.show("ActiveState") == "active", 90, "a restart")
    wait_until(machine.answers, 10, "an answer after the restart")
    again = machine.processes()
    assert not (children | {supervisor}) & set(again), "nothing of the killed node is left"

    # A role killed is the supervisor's affair.
    supervisor = int(machine.show("MainPID"))
    for role in sorted(set(again) - {supervisor}):
        machine.run("kill", "-9", str(role))
    wait_until(lambda: len(machine.processes()) == len(again), 60, "new processes for the killed ones")
    wait_until(machine.answers, 60, "an answer after the roles' restart")
    assert (int(machine.show("MainPID")), machine.show("NRestarts")) == (supervisor, "1")

    # A stop drains: the supervisor ends by itself, with 0.
    machine.systemctl("stop", "radnode")
    last_words = machine.journal("-n", "12")
    assert "stopping: what is held is finished first" in last_words
    assert "radnode.service: Deactivated successfully." in last_words, last_words  # systemd's own: exited, with 0
    assert machine.processes() == []


@pytest.mark.real_systemd
def test_a_node_that_hangs_is_started_again(machine: Machine) -> None:
    machine.adjust("watchdog.conf", "[Service]\nWatchdogSec=15\nRestartSec=1\n")
    machine.systemctl("start", "radnode")
    machine.run("kill", "-STOP", machine.show("MainPID"))
    wait_until(lambda: machine.show("NRestarts") == "1" and machine.show("ActiveState") == "active", 120, "a restart")
    assert machine.answers()


@pytest.mark.real_systemd
def test_the_drop_in_opens_a_port_below_1024(machine: Machine) -> None:
    machine.port = _free_low_port()
    machine.run("sed", "-i", f"s/port: [0-9]*/port: {machine.port}/", "/etc/radnode/config.yaml")
    machine.adjust("port-104.conf", (UNIT.parent / "radnode.service.d" / "port-104.conf.example").read_text())
    machine.systemctl("start", "radnode")
    assert machine.answers()
    machine.systemctl("stop", "radnode")


# As docs/scale-out.md says, in one machine; the wrapper stands for the command of the virtual environment.
INSTALL_RAY = """
set -eu
units=/opt/radnode/src/systemd
sed 's/-m node.cli/-m ray.scripts.scripts/' /opt/radnode/bin/radnode >/opt/radnode/bin/ray
chmod 755 /opt/radnode/bin/ray
printf %064d 7 >/etc/radnode/ray-token
chown root:radnode /etc/radnode/ray-token
chmod 640 /etc/radnode/ray-token
echo 'RAY_NODE_IP=127.0.0.8
RAY_RESOURCES=--num-cpus=1 --num-gpus=0 --object-store-memory=90000000' >/etc/radnode/ray.env
install -m 644 $units/radnode-ray-head.service /etc/systemd/system/
install -D -m 644 $units/radnode.service.d/ray.conf.example /etc/systemd/system/radnode.service.d/ray.conf
echo 'workers: {engine: ray, gpus: 0}' >>/etc/radnode/config.yaml
systemctl daemon-reload
"""


@pytest.mark.real_systemd
def test_ray_lives_under_systemd_and_radnode_reaches_it(machine: Machine) -> None:
    done = machine.run("sh", "-c", INSTALL_RAY)
    assert done.returncode == 0, done.stderr
    machine.systemctl("start", "radnode")  # wants Ray, and is ready whether it is there or not
    try:
        wait_until(lambda: "models on " in machine.journal(), 120, "a slot")
    except AssertionError:
        said = machine.run("journalctl", "-o", "cat", "--no-pager", "-n", "80").stdout
        raise AssertionError(f"no slot: {said}") from None
    said = machine.journal()
    assert "(127.0.0.8): models run on cpu" in said
    for sentence in (
        "(127.0.0.8) run with no network: yes (seccomp)",
        "(127.0.0.8) run with read-only files, none but its own: yes (Landlock)",
        "(127.0.0.8) run with no way to other processes: yes (Landlock and seccomp)",
        "(127.0.0.8) run with no rights to gain: yes",
    ):
        assert sentence in said, said
    machine.systemctl("stop", "radnode-ray-head")
    assert machine.answers(), "reception does not need Ray"
    assert machine.run("find", "/run/radnode-ray", "-mindepth", "1").stdout == ""
    machine.systemctl("start", "radnode-ray-head")
    wait_until(lambda: machine.journal().count("models run on cpu") >= 2, 240, "a slot in the new cluster")
    machine.systemctl("stop", "radnode")


def _free_low_port() -> int:
    for port in (104, *range(600, 1024)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("every port below 1024 is taken")
