"""`radnode serve`: the roles, each a process of its own, and the supervisor that keeps them running.

The supervisor starts one process per role (and per worker), tells systemd when all are ready, restarts what dies, and
on SIGTERM asks all of them to finish what they hold. A child notices the supervisor's end by the pipe that it holds
open, so that even a killed supervisor leaves nothing behind that would keep the port or a lease.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from node import memory
from node.config import Config

_log = logging.getLogger(__name__)

DRAIN_S = 150.0  # below the unit's TimeoutStopSec
HEALTHY_AFTER_S = 30.0  # a child that lived this long starts again without delay
RESTART_DELAYS_S = (0.2, 1.0, 5.0, 15.0)
WATCHDOG_S = 10.0


class Role(StrEnum):
    """What a process of the node does."""

    RECEIVE = "receive"  # C-STORE and C-ECHO
    SCHEDULE = "schedule"  # completion, routes, lost leases, retention
    WORK = "work"  # runs models
    DELIVER = "deliver"  # results to peers
    WEB = "web"  # STOW-RS and health, where web is configured


@dataclass
class _Child:
    role: Role
    name: str
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    failures: int = 0
    start_at: float = 0.0
    ready: bool = False
    buffer: bytes = field(default=b"")


class Supervisor:
    """Starts, watches and stops the processes of one node."""

    def __init__(self, config: Config):
        self._config = config
        self._stopping = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._children = [
            _Child(Role.RECEIVE, "receive"),
            _Child(Role.SCHEDULE, "schedule"),
            *(_Child(Role.WORK, f"work-{index}") for index in range(config.workers.count)),
            _Child(Role.DELIVER, "deliver"),
            *([_Child(Role.WEB, "web")] if config.web is not None else []),
        ]
        self._announced = False

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stopping.set())
        last_ping = 0.0
        while not self._stopping.is_set():
            now = time.monotonic()
            for child in self._children:
                self._tend(child, now)
            if not self._announced and all(child.ready for child in self._children):
                self._announced = True
                _log.info("ready: %s listens on port %d", self._config.node.ae_title, self._config.node.port)
                notify("READY=1\nSTATUS=serving")
            if now - last_ping >= WATCHDOG_S:
                last_ping = now
                notify("WATCHDOG=1")
            self._listen(0.2)
        return self._drain()

    def _tend(self, child: _Child, now: float) -> None:
        if child.process is not None and (code := child.process.poll()) is not None:
            self._forget(child)
            lived = now - child.started_at
            child.failures = 0 if lived > HEALTHY_AFTER_S else child.failures + 1
            delay = RESTART_DELAYS_S[min(child.failures, len(RESTART_DELAYS_S)) - 1] if child.failures else 0.0
            child.start_at = now + delay
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
            _log.error("%s ended with %s after %.0f s; it starts again in %.1f s", child.name, how, lived, delay)
        if child.process is None and now >= child.start_at:
            self._start(child)

    def _start(self, child: _Child) -> None:
        command = [
            sys.executable,
            "-m",
            "node.cli",
            "serve",
            "--config",
            str(self._config.path),
            "--role",
            child.role.value,
        ]
        # stdin: its end tells the child that we are gone. stdout: one line, `ready`.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._selector.register(process.stdout, selectors.EVENT_READ, child)
        child.process, child.started_at, child.ready, child.buffer = process, time.monotonic(), False, b""
        _log.info("%s started, pid %d", child.name, process.pid)

    def _listen(self, timeout_s: float) -> None:
        """Wait for word from the children."""
        for key, _ in self._selector.select(timeout_s):
            child: _Child = key.data
            data = os.read(key.fd, 4096)
            if not data:
                self._selector.unregister(key.fileobj)
                continue
            child.buffer += data
            if b"ready\n" in child.buffer and not child.ready:
                child.ready = True
                _log.info("%s is ready", child.name)

    def _forget(self, child: _Child) -> None:
        process = child.process
        assert process is not None
        assert process.stdout is not None
        assert process.stdin is not None
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(process.stdout)
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        child.process, child.ready = None, False

    def _drain(self) -> int:
        _log.info("stopping: what is held is finished first, for %.0f s at most", DRAIN_S)
        notify("STOPPING=1\nSTATUS=draining")
        running = [child for child in self._children if child.process is not None]
        for child in running:
            assert child.process is not None
            child.process.terminate()
        deadline = time.monotonic() + DRAIN_S
        clean = True
        for child in running:
            assert child.process is not None
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.error("%s did not stop in time and is killed; its work goes on at the next start", child.name)
                child.process.kill()
                child.process.wait()
                clean = False
            self._forget(child)
        _log.info("stopped")
        return 0 if clean else 1


def run_role(config: Config, role: Role) -> int:
    """The life of one role's process: from its imports to its last piece of work."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=_stop_with_parent, args=(stop,), daemon=True, name="parent").start()
    _ROLES[role](config, stop)
    return 0


def notify(message: str) -> None:
    """Tell systemd (sd_notify(3)); nothing happens when it did not start us."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
    ):
        channel.sendto(message.encode(), address)


def _stop_with_parent(stop: threading.Event) -> None:
    """Stop when the supervisor is gone: its end of our stdin closes with it. A terminal or /dev/null says nothing."""
    try:
        if not os.path.exists("/proc/self/fd/0") or not Path("/proc/self/fd/0").is_fifo():
            return
        while os.read(0, 1024):
            pass
    except OSError:
        pass
    _log.warning("the supervisor is gone: stopping")
    stop.set()


def _say_ready() -> None:
    """All that this process needs is imported, and its port is open."""
    memory.settle()
    sys.stdout.write("ready\n")
    sys.stdout.flush()


def _receive(config: Config, stop: threading.Event) -> None:
    from node.archive.open import open_archive
    from node.receive.service import receive_until

    archive = open_archive(config)
    receive_until(stop, archive, config, ready=_say_ready)
    archive.close()


def _schedule(config: Config, stop: threading.Event) -> None:
    from node.archive.open import open_archive
    from node.assemble import schedule_until

    archive = open_archive(config)
    _say_ready()
    schedule_until(stop, archive, config)
    archive.close()


def _work(config: Config, stop: threading.Event) -> None:
    from node.archive.open import open_archive
    from node.work import work_until

    archive = open_archive(config)
    work_until(stop, archive, config, ready=_say_ready)
    archive.close()


def _deliver(config: Config, stop: threading.Event) -> None:
    from node.archive.open import open_archive
    from node.deliver.peers import destinations
    from node.deliver.service import deliver_until

    archive = open_archive(config)
    _say_ready()
    deliver_until(stop, archive, destinations(config))
    archive.close()


def _web(config: Config, stop: threading.Event) -> None:
    from node.archive.open import open_archive
    from node.web.service import serve_until

    archive = open_archive(config)
    serve_until(stop, archive, config, ready=_say_ready)
    archive.close()


_ROLES: dict[Role, Callable[[Config, threading.Event], None]] = {
    Role.RECEIVE: _receive,
    Role.SCHEDULE: _schedule,
    Role.WORK: _work,
    Role.DELIVER: _deliver,
    Role.WEB: _web,
}
