"""How much the receiver takes: from one peer, in one object, in one PDU, and how long it waits for it."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from node.errors import ArchiveFull


@dataclass(frozen=True)
class Limits:
    """The bounds of what a network may do to us; the defaults suit scanners and gateways."""

    maximum_per_address: int | None = None  # associations from one address; None: half of all, at least 8
    maximum_handshakes: int = 128  # connections without an association; the oldest is cut when another one comes
    handshake_s: float = 10.0  # from the connection (with TLS) to the complete A-ASSOCIATE-RQ
    idle_s: float = 300.0  # an association on which nothing happens
    pdu_s: float = 30.0  # from the first byte of a PDU to its last, and to the next PDU inside of a message
    minimum_rate_bytes_s: int = 4096  # mean over a whole message, after the first two minutes
    maximum_pdu_bytes: int = 131072  # announced; a longer P-DATA PDU ends the association
    maximum_object_bytes: int = 16 << 30  # one data set
    maximum_inflated_bytes: int = 1 << 30  # what a deflated data set may become for those who read it


@dataclass(frozen=True)
class FreeSpace:
    """The watermark of the storage's filesystem: below either, senders hear A700."""

    bytes: int = 256 << 20
    percent: float = 0.0

    def missing(self, folder: Path) -> bool:
        """Whether less than that is free."""
        state = os.statvfs(folder)
        free = state.f_bavail * state.f_frsize
        return free < self.bytes or free < state.f_blocks * state.f_frsize * self.percent / 100


@dataclass
class Watermark:
    """`FreeSpace` of one folder, looked at not more often than every `interval_s`: a look costs a system call."""

    folder: Path
    free_space: FreeSpace
    interval_s: float = 0.25
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _looked_at: float = float("-inf")
    _missing: bool = False

    def check(self) -> None:
        """Raise `ArchiveFull` while the filesystem is below its watermark."""
        now = time.monotonic()
        with self._lock:
            if now - self._looked_at >= self.interval_s:
                self._looked_at = now
                self._missing = self.free_space.missing(self.folder)
        if self._missing:
            raise ArchiveFull("the storage is below its watermark of free space")
