"""What a confined process can still do, tried in one: with all that this kernel has, and with parts of it missing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from node.infer import kernel
from node.infer.sandbox import clean_environment

PRELUDE = """
import ctypes, errno, json, os, signal, socket, subprocess, sys
from node.infer import kernel, sandbox

def attempt(step):
    try:
        step()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

def confine(limits, namespaces):
    protections = sandbox.enter(limits, namespaces)
    return {protection.what: protection.holds for protection in protections}
"""
CHILD = """
scratch, package, outside, port, parent, lacking = json.loads(sys.argv[1])
lacking = set(lacking)
if "root" in lacking:  # Python itself may lie where only root sees it: it is loaded by now
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable, as a process that never was root
refused = {name: "refused" for name in ("net", "pid", "mnt")}
namespaces = refused if "namespaces" in lacking else sandbox.leave_namespaces()
if "landlock" in lacking:
    kernel.landlock_version = lambda: 0
if "seccomp" in lacking:
    def no_filter(signals_to=None):
        raise OSError(errno.EINVAL, "no seccomp")
    kernel.filter_system_calls = no_filter
if "scopes" in lacking:  # a kernel before 6.12
    version = kernel.landlock_version()
    kernel.landlock_version = lambda: min(version, 3)
pid = os.fork()
if pid:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
os.chdir(scratch)
holds = confine(sandbox.Limits(scratch, package, cuda=False), namespaces)
result = {"holds": holds}
"""

NOBODY = 65534
EVERYTHING: tuple[str, ...] = ()
UNIT = ("namespaces",)  # what systemd/radnode.service leaves
OLD_UNIT = ("namespaces", "scopes")


class Place:
    """Folders for a confined process, and what it must not reach."""

    def __init__(self, folder: Path):
        self.scratch, self.package, self.outside = (folder / name for name in ("scratch", "package", "storage"))
        for path in (self.scratch, self.package, self.outside):
            path.mkdir()
        (self.package / "weights").write_text("weights")
        (self.outside / "radnode.sqlite").write_text("secret")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.visitors: list[object] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                self.visitors.append(self.listener.accept())
            except OSError:
                return

    def run(self, code: str, lacking: tuple[str, ...] = EVERYTHING, environment: dict[str, str] | None = None) -> Any:
        """Run this code confined; what it put into `result`."""
        port = self.listener.getsockname()[1]
        paths = [str(self.scratch), str(self.package), str(self.outside)]
        arguments = json.dumps([*paths, port, os.getpid(), list(lacking)])
        script = PRELUDE + CHILD + textwrap.dedent(code) + "\nprint(json.dumps(result))"
        done = subprocess.run(
            [sys.executable, "-P", "-c", script, arguments],
            env=environment or clean_environment(str(self.scratch)),
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to other users
        os.chmod(folder, 0o755)
        made = Place(Path(folder))
        yield made
        made.listener.close()


def test_this_kernel_has_what_the_tests_need() -> None:
    assert kernel.landlock_version() >= 1


CONNECT = """
def connect(family, kind, address):
    with socket.socket(family, kind) as end:
        end.settimeout(2)
        end.connect(address)
result["tcp"] = attempt(lambda: connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", port)))
result["udp"] = attempt(lambda: connect(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", port)))
"""


@pytest.mark.parametrize("lacking", [EVERYTHING, UNIT, OLD_UNIT, ("landlock",), ("seccomp",)])
def test_no_connection_leaves_and_the_listener_sees_nothing(place: Place, lacking: tuple[str, ...]) -> None:
    with socket.create_connection(place.listener.getsockname(), 2):
        pass
    result = place.run(CONNECT, lacking)
    assert result["holds"]["no network"]
    assert "done" not in (result["tcp"], result["udp"])
    assert len(place.visitors) == 1, "ours, and no other"


def test_without_a_namespace_and_without_seccomp_the_network_is_told_to_be_open(place: Place) -> None:
    result = place.run(CONNECT, ("namespaces", "seccomp", "scopes"))
    assert not result["holds"]["no network"]


def test_no_family_of_sockets_but_unix_streams(place: Place) -> None:
    result = place.run(
        """
        names = [name for name in dir(socket) if name.startswith("AF_") and name != "AF_UNSPEC"]
        for name in names:
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
                if attempt(lambda: socket.socket(getattr(socket, name), kind).close()) == "done":
                    result.setdefault("open", []).append([name, int(kind)])
        result["names"] = names
        """,
        UNIT,
    )
    assert {"AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK"} <= set(result["names"])
    assert {name for name, _ in result["open"]} == {"AF_UNIX"}
    assert socket.SOCK_DGRAM not in {kind for _, kind in result["open"]}


@pytest.mark.parametrize("lacking", [EVERYTHING, UNIT])
def test_sockets_of_services_on_this_machine_are_out_of_reach(place: Place, lacking: tuple[str, ...]) -> None:
    path = place.scratch / "service"  # where the file system would let it
    with socket.socket(socket.AF_UNIX) as service:
        service.bind(str(path))
        service.listen()
        result = place.run(
            """
            end = socket.socket(socket.AF_UNIX)
            result["connect"] = attempt(lambda: end.connect(scratch + "/service"))
            """,
            lacking,
        )
    assert result["connect"] == "ECONNREFUSED"


FILES = """
def write(path):
    with open(path, "w") as file:
        file.write("x")
def read(path):
    open(path).close()
for name, step in {
    "scratch": lambda: write(scratch + "/own"),
    "read package": lambda: read(package + "/weights"),
    "write package": lambda: write(package + "/weights"),
    "append to package": lambda: os.close(os.open(package + "/weights", os.O_WRONLY | os.O_APPEND)),
    "new in package": lambda: write(package + "/new"),
    "delete in package": lambda: os.unlink(package + "/weights"),
    "rename in package": lambda: os.rename(package + "/weights", package + "/other"),
    "read storage": lambda: read(outside + "/radnode.sqlite"),
    "list storage": lambda: os.listdir(outside),
    "truncate storage": lambda: os.truncate(outside + "/radnode.sqlite", 0),
    "link storage": lambda: os.link(outside + "/radnode.sqlite", scratch + "/link"),
    "shadow": lambda: read("/etc/shadow"),
    "tmp": lambda: write("/tmp/radnode-escape"),
    "usr": lambda: write("/usr/radnode-escape"),
    "sysctl": lambda: open("/proc/sys/kernel/core_pattern", "a").close(),
}.items():
    result[name] = attempt(step)
"""


@pytest.mark.parametrize("lacking", [EVERYTHING, UNIT, OLD_UNIT, ("landlock",)])
def test_files_are_read_only_and_none_but_its_own(place: Place, lacking: tuple[str, ...]) -> None:
    result = place.run(FILES, lacking)
    assert result.pop("holds")["read-only files, none but its own"]
    allowed = {name for name, outcome in result.items() if outcome == "done"}
    assert allowed == {"scratch", "read package"}
    assert (place.package / "weights").read_text() == "weights"
    assert (place.outside / "radnode.sqlite").read_text() == "secret"


def test_without_landlock_and_namespaces_open_files_are_told(place: Place) -> None:
    result = place.run("", ("landlock", "namespaces"))
    assert not result["holds"]["read-only files, none but its own"]
    assert result["holds"]["no network"]


PROCESSES = """
result["signal"] = attempt(lambda: os.kill(parent, 0))
result["environment"] = attempt(lambda: open(f"/proc/{parent}/environ").close())
result["memory"] = attempt(lambda: open(f"/proc/{parent}/mem", "rb").close())
result["descriptors"] = attempt(lambda: os.readlink(f"/proc/{parent}/fd/0"))
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if libc.syscall(kernel._NUMBERS[name][os.uname().machine == "aarch64"], *arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
result["ptrace"] = attempt(lambda: call("ptrace", 16, parent, 0, 0))
result["vm_readv"] = attempt(lambda: call("process_vm_readv", parent, None, 0, None, 0, 0))
result["io_uring"] = attempt(lambda: call("io_uring_setup", 8, ctypes.create_string_buffer(120)))
result["session"] = attempt(os.setsid)
result["group"] = attempt(lambda: os.setpgid(0, 0))
result["user namespace"] = attempt(lambda: call("unshare", kernel.CLONE_NEWUSER))
result["clone"] = attempt(lambda: call("clone", kernel.CLONE_NEWUSER | 17, 0, 0, 0, 0))
result["mount"] = attempt(lambda: kernel.mount("tmpfs", scratch, "tmpfs", 0))
"""


@pytest.mark.parametrize("lacking", [EVERYTHING, UNIT, OLD_UNIT])
def test_other_processes_are_out_of_reach(place: Place, lacking: tuple[str, ...]) -> None:
    result = place.run(PROCESSES, lacking)
    assert result.pop("holds")["no way to other processes"]
    assert "done" not in result.values(), result


def test_it_may_still_start_threads_and_programs_and_abort(place: Place) -> None:
    for lacking in (EVERYTHING, OLD_UNIT):
        result = place.run(
            """
            import threading
            thread = threading.Thread(target=lambda: result.update(thread=True))
            thread.start(); thread.join()
            result["program"] = subprocess.run(["/bin/echo", "ran"], capture_output=True, text=True).stdout
            child = os.fork()
            if not child:
                os.abort()
            number = os.WTERMSIG(os.waitpid(child, 0)[1])
            result["aborted"] = number in (signal.SIGABRT, signal.SIGSEGV, signal.SIGILL)
            """,
            lacking,
        )
        assert (result["thread"], result["program"], result["aborted"]) == (True, "ran\n", True)


def test_it_has_no_capabilities_and_gains_none(place: Place) -> None:
    result = place.run(
        """
        result["effective"] = kernel.effective_capabilities()
        status = open("/proc/self/status").read()
        result["sets"] = [line.split()[1] for line in status.splitlines() if line.startswith("Cap")]
        result["no_new_privs"] = "NoNewPrivs:\\t1" in status
        result["seccomp"] = "Seccomp:\\t2" in status
        """
    )
    assert result["holds"]["no rights to gain"]
    assert result["effective"] == 0
    assert set(result["sets"]) == {"0" * 16}
    assert result["no_new_privs"]
    assert result["seccomp"]


def test_the_environment_holds_no_secret(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADNODE_DATABASE", "postgresql+psycopg://node:hunter2@db/node")
    monkeypatch.setenv("RADNODE_CONFIG", "/etc/radnode/config.yaml")
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    environment = clean_environment(str(place.scratch))
    assert "hunter2" not in json.dumps(environment)
    assert "RADNODE_CONFIG" not in environment
    assert environment["LC_ALL"] == "C.UTF-8"
    result = place.run("result['sees'] = dict(os.environ)", environment=environment)
    assert "hunter2" not in json.dumps(result["sees"])
    assert result["sees"]["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("lacking", [(), ("landlock",)])
def test_a_link_shows_a_model_nothing_outside_its_package(place: Place, lacking: tuple[str, ...]) -> None:
    """One that was made after the package was looked at, too."""
    (place.package / "secret").symlink_to(place.outside / "radnode.sqlite")
    (place.package / "linked").symlink_to("weights")
    result = place.run(
        "result['linked'] = open(package + '/linked').read()\n"
        "result['secret'] = attempt(lambda: open(package + '/secret'))",
        lacking,
    )
    assert result["linked"] == "weights"
    assert result["secret"] in ("EACCES", "ENOENT")


@pytest.mark.parametrize("lacking", [("root",), ("root", *UNIT), ("root", "landlock")])
def test_a_user_who_is_not_root_is_confined_as_well(place: Place, lacking: tuple[str, ...]) -> None:
    """Namespaces come by way of a user namespace then."""
    for path in (place.scratch, place.package, place.outside):
        os.chown(path, NOBODY, NOBODY)
    os.chown(place.package / "weights", NOBODY, NOBODY)
    result = place.run(CONNECT + FILES, lacking)
    assert all(result.pop("holds").values())
    assert {name for name, outcome in result.items() if outcome == "done"} == {"scratch", "read package"}
