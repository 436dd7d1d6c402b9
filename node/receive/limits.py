"""How much the receiver takes: from one peer, in one object, in one PDU, and how long it waits for it."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from node.config_values import FreeSpace
from node.errors import ArchiveFull

_log = logging.getLogger(__name__)


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


@dataclass
class Watermark:
    """How much of the storage's filesystem stays free; looked at not more often than every `interval_s`, for a look
    costs a system call.
    """

    folder: Path
    free_space: FreeSpace
    interval_s: float = 0.25
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _looked_at: float = float("-inf")
    _missing: bool = False

    def check(self) -> None:
        """Raise `ArchiveFull` while less is free than shall be."""
        now = time.monotonic()
        with self._lock:
            if now - self._looked_at >= self.interval_s:
                self._looked_at = now
                was_missing, self._missing = self._missing, self._is_missing()
                if self._missing != was_missing:
                    what = "is below keep.free_disk: nothing is accepted" if self._missing else "has space again"
                    _log.log(logging.ERROR if self._missing else logging.INFO, "the storage's disk %s", what)
        if self._missing:
            raise ArchiveFull("the storage is below its watermark of free space")

    def _is_missing(self) -> bool:
        state = os.statvfs(self.folder)
        size, free = state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize
        return free < self.free_space.wanted_bytes(size)
