"""A node under test: `radnode serve` as a process of its own, spoken to over sockets and by the command line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from node.demo.pacs import free_port

MODELS = Path(__file__).parent.parent / "models"


class RunningNode:
    """A folder with a configuration, and the processes that serve it."""

    def __init__(
        self,
        folder: Path,
        pacs_port: int,
        *,
        quiet: str = "1s",
        routes: str | None = None,
        models: Path = MODELS,
        port: int | None = None,
        web: str | None = None,
        pacs: str = "",
        peers: str = "",
        results: str | None = None,
        database: str = "sqlite",
        workers: str | None = None,
        storage: Path | None = None,
        host: str = "",
    ):
        """`pacs` is what the PACS takes, such as `, seg: auto`; `peers` are lines of further peers; `storage` is shared
        with another node, `host` the name of the machine that its processes believe to be on.
        """
        self.folder = folder
        self.port = port or free_port()
        self.config = folder / "config.yaml"
        self.log = folder / "node.log"
        self.host = host
        routes = routes or (
            "[{name: chest CT, when: {Modality: CT, ImageType: '!/LOCALIZER/', SliceThickness: '<= 8'}, "
            "run: [ct_lung_reference], send_to: [pacs]}]"
        )
        self.config.write_text(
            f"""\
node:     {{ae_title: RADNODE, host: 127.0.0.1, port: {self.port}, storage: {storage or "./var"}}}
database: {database}
peers:
  pacs:   {{ae_title: PACS, host: 127.0.0.1, port: {pacs_port}{pacs}}}
  sender: {{ae_title: STORESCU, host: 127.0.0.1}}
{peers}
receive:  {{from: [pacs, sender]}}
complete: {{quiet: {quiet}}}
models:   {{path: {models}}}
routes:   {routes}
keep:     {{studies: 7d, free_disk: 10MB}}
{f"web:      {web}" if web else ""}
{f"workers:  {workers}" if workers else ""}
{f"results:  {results}" if results else ""}
"""
        )
        self.process: subprocess.Popen[bytes] | None = None
        self._begin = 0  # of the log since the last start

    def start(self) -> None:
        """Start it and wait until every role is ready."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start it."""
        with self.log.open("ab") as log:
            log.write(b"--- start\n")
            log.flush()
            self._begin = log.tell()
            self.process = subprocess.Popen(
                [*on_host(self.host), sys.executable, "-m", "node.cli", "serve", "--config", str(self.config)],
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=Path(__file__).parent.parent,
            )

    def wait_ready(self) -> None:
        """Wait until every role was ready since the last start."""

        def is_ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            with self.log.open("rb") as text:
                text.seek(self._begin)
                return b" ready: " in text.read()

        wait_until(is_ready, 180, "the node is ready")

    def stop(self, patience_s: float = 60) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(patience_s)
        self.process = None
        return code

    def kill_all(self) -> None:
        """kill -9 of whatever still runs of this node (for the end of a test)."""
        for _, process in self._roles():
            process.kill()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def processes(self) -> dict[str, psutil.Process]:
        """Role name to process (one of them where there are several workers), the supervisor as `supervisor`."""
        return dict(self._roles())

    def family(self) -> dict[int, tuple[str, psutil.Process]]:
        """All processes of this node by pid: the supervisor, the roles, and below its role's name what one started (a
        model's process and its warden).
        """
        found: dict[int, tuple[str, psutil.Process]] = {}
        for role, process in self._roles():
            found[process.pid] = (role, process)
            if role != "supervisor":
                with contextlib.suppress(psutil.NoSuchProcess):
                    for child in process.children(recursive=True):
                        found[child.pid] = (f"{role}'s child", child)
        return found

    def _roles(self) -> list[tuple[str, psutil.Process]]:
        """Every process that serves this node's configuration file."""
        found: list[tuple[str, psutil.Process]] = []
        for process in psutil.process_iter():
            try:
                command = process.cmdline()
                if str(self.config) in command and "serve" in command and process.status() != psutil.STATUS_ZOMBIE:
                    role = command[command.index("--role") + 1] if "--role" in command else "supervisor"
                    found.append((role, process))
            except psutil.Error:
                continue
        return found

    def send(self, *paths: Path, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """DCMTK's storescu sends folders and files to the node; what is not acknowledged fails the test."""
        command = ["storescu", "-v", "-aec", "RADNODE", "--max-pdu", "131072", "-R", *options, "+sd", "+r"]
        done = subprocess.run(
            [*command, "127.0.0.1", str(self.port), *map(str, paths)],
            env=os.environ | {"TCP_NODELAY": "1"}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done

    def command(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """The `radnode` command with this node's configuration."""
        done = subprocess.run(
            [sys.executable, "-m", "node.cli", *arguments, "--config", str(self.config)],
            capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def json(self, *arguments: str) -> Any:
        """What a command prints with `--json`."""
        return json.loads(self.command(*arguments, "--json").stdout)

    def wait_for(self, study_uid: str, *states: str, patience_s: float = 120) -> dict[str, Any]:
        """Wait until the study is in one of `states`; its `studies show`."""
        shown: dict[str, Any] = {}

        def arrived() -> bool:
            nonlocal shown
            done = self.command("studies", "show", study_uid, "--json", check=False)
            if done.returncode:
                return False
            shown = json.loads(done.stdout)
            return shown["state"] in states

        try:
            wait_until(arrived, patience_s, f"{study_uid} is {' or '.join(states)}")
        except AssertionError as error:
            now = f"{shown.get('state')}: {shown.get('reason')}"
            raise AssertionError(f"{error}; it is {now}\n{self.log.read_text()[-4000:]}") from None
        return shown


def on_host(name: str) -> list[str]:
    """What stands before a command that is to run on a machine of this name; nothing for this machine's own."""
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", *user, "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name] if name else []


def wait_until(holds: Callable[[], bool], patience_s: float, what: str) -> None:
    """Poll until `holds()`; fails with `what` when it takes too long."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {patience_s:.0f} s: {what}"
        time.sleep(0.1)
