"""A word from one process of a node to another on the same machine: there is something to do.

Who waits has a Unix datagram socket in the storage folder's `wake/`, named by its room and machine; `ring` sends a byte
to each of a room on this machine. Nothing depends on it: a word that is lost, or a process on another machine, costs
the poll that there is anyway.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import secrets
import select
import socket
import threading
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from node.archive.files import make_folder

_log = logging.getLogger(__name__)

_FOLDER = "wake"
_GONE = (errno.ECONNREFUSED, errno.ENOENT)  # whoever bound it has ended


class Room(StrEnum):
    """Who waits for what."""

    WORK = "work"  # jobs, and jobs of whose end the peers are to hear
    DELIVER = "deliver"  # results that are owed to a peer


class Bell:
    """Where one thread waits until its room is rung. What a killed process leaves of it, the next `ring` removes."""

    def __init__(self, storage: Path, room: Room):
        self._path = storage / _FOLDER / f"{_prefix(room)}{os.getpid()}-{secrets.token_hex(4)}"
        self._socket: socket.socket | None = None
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            make_folder(self._path.parent)
            with _folder(self._path.parent) as short:
                channel.bind(f"{short}/{self._path.name}")
            self._socket = channel
        except OSError as error:  # a filesystem without sockets
            channel.close()
            _log.warning("%s looks for work by polling only: %s", room, error.strerror)

    def close(self) -> None:
        """Wait no more."""
        if self._socket is not None:
            self._path.unlink(missing_ok=True)
            self._socket.close()

    def wait(self, stop: threading.Event, timeout_s: float) -> None:
        """Return when the room was rung since the last time, after `timeout_s`, or at once when `stop` is set."""
        if self._socket is None:
            stop.wait(timeout_s)
            return
        if stop.is_set():
            return
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.poll(timeout_s * 1000)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(16)


def ring(storage: Path, room: Room) -> None:
    """Wake all who wait for this room on this machine; after the commit of what they are to find."""
    folder = storage / _FOLDER
    try:
        names = [name for name in os.listdir(folder) if name.startswith(_prefix(room))]
    except OSError:  # nobody has waited here yet
        return
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as channel,
        _folder(folder) as short,
    ):
        for name in names:
            try:
                channel.sendto(b"!", f"{short}/{name}")
            except OSError as error:  # full: it has a word already
                if error.errno in _GONE:
                    (folder / name).unlink(missing_ok=True)


def _prefix(room: Room) -> str:
    """How the names of a room's sockets begin. Those of another machine, in a shared folder, look dead from here."""
    return f"{room}-{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}-"


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[str]:
    """A short name of a folder: a socket's address holds 107 bytes (unix(7)), a storage folder's path may be longer."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
