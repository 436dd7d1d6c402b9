"""The listening sockets and the clock: connections in, each to a thread of its own, and a cut for who is late.

Threads read without a time-out; one clock per process cuts what is past its deadline. A thread that waits costs no CPU
time, whatever the number of associations.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable

from node.receive.association import Association, Services

_log = logging.getLogger(__name__)

BIND_PATIENCE_S = 30.0
DRAIN_S = 30.0
_TICK_S = 0.25
_IDLE_AT_END_S = 1.0  # a sender that is busy begins its next message earlier than that
_BACKLOG = 512


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; a predecessor that is still draining keeps the port for a while."""
    deadline = time.monotonic() + BIND_PATIENCE_S
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        try:
            return socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


class Listener:
    """All connections of a process."""

    def __init__(self, services: Services, doors: list[tuple[socket.socket, ssl.SSLContext | None]]):
        self._services = services
        self._doors = doors
        self._open: dict[Association, float] = {}  # and since when it is idle, while the node stops
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def start(self) -> None:
        """Begin to accept."""
        for number, (door, tls) in enumerate(self._doors):
            self._spawn(lambda door=door, tls=tls: self._accept(door, tls), f"accept-{number}")
        self._spawn(self._watch, "clock")

    def drain(self) -> None:
        """Accept nobody new; let who sends send on, for `DRAIN_S` at most, and end the associations that are idle."""
        self._stopping.set()
        for door, _ in self._doors:
            with contextlib.suppress(OSError):
                door.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept(), which close() alone does not
            door.close()
        deadline = time.monotonic() + DRAIN_S
        while time.monotonic() < deadline and self._cut_idle():
            time.sleep(0.05)
        for association in self._all():
            association.wire.cut("the node stops")
        while self._all() and time.monotonic() < deadline + 2:
            time.sleep(0.05)

    def count(self) -> int:
        """Open connections, those in their handshake among them."""
        return len(self._open)

    def _accept(self, door: socket.socket, tls: ssl.SSLContext | None) -> None:
        while not self._stopping.is_set():
            try:
                connection, address = door.accept()
            except OSError as error:
                if self._stopping.is_set():
                    return
                _log.error("accepting a connection: %s", error.strerror)  # out of descriptors: some will be closed
                time.sleep(0.2)
                continue
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            association = Association(connection, str(address[0]), self._services)
            with self._lock:
                self._open[association] = 0.0
            self._make_room()
            try:
                self._spawn(lambda a=association: self._serve(a, tls), f"association-{address[0]}")
            except RuntimeError:  # no thread to be had
                _log.error("no thread for a connection from %s: it is closed", address[0])
                self._forget(association)
                connection.close()

    def _serve(self, association: Association, tls: ssl.SSLContext | None) -> None:
        try:
            association.serve(tls)
        finally:
            self._forget(association)

    def _forget(self, association: Association) -> None:
        with self._lock:
            self._open.pop(association, None)

    def _all(self) -> list[Association]:
        with self._lock:
            return list(self._open)

    def _make_room(self) -> None:
        """Cut the oldest connections without an association: silent ones must not keep a sender out."""
        waiting = [association for association in self._all() if not association.is_established]
        for association in waiting[: max(0, len(waiting) - self._services.limits.maximum_handshakes)]:
            association.wire.cut("too many connections without an association")

    def _watch(self) -> None:
        while not self._stopping.is_set():
            time.sleep(_TICK_S)
            now = time.monotonic()
            for association in self._all():
                if now > association.wire.deadline:
                    association.wire.cut("nothing came in time")

    def _cut_idle(self) -> bool:
        """End the associations on which nothing has happened for a moment; whether some are left."""
        now = time.monotonic()
        for association in self._all():
            with self._lock:
                if association not in self._open:
                    continue
                if association.is_established and not association.wire.is_idle:
                    self._open[association] = 0.0
                    continue
                since = self._open[association] = self._open[association] or now
            if now - since > _IDLE_AT_END_S or now > association.wire.deadline:
                association.wire.cut("the node stops")
        return bool(self._all())

    @staticmethod
    def _spawn(target: Callable[[], None], name: str) -> None:
        threading.Thread(target=target, name=name, daemon=True).start()
