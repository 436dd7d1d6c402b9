"""Who runs jobs: a worker process, named so that others can tell whether it lives."""

from __future__ import annotations

import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WorkerId:
    """A worker process, named so that another process on the same host can tell whether it still lives."""

    host: str
    boot_id: str
    pid: int
    started: str  # start time of the process in clock ticks since boot: a recycled pid differs
    nonce: str

    def __str__(self) -> str:
        return "/".join((self.host, self.boot_id, str(self.pid), self.started, self.nonce))

    @staticmethod
    def parse(text: str) -> WorkerId:
        """The worker that `str()` wrote."""
        host, boot_id, pid, started, nonce = text.split("/")
        return WorkerId(host, boot_id, int(pid), started, nonce)

    @staticmethod
    def mine() -> WorkerId:
        """A new name for this process."""
        pid = os.getpid()
        return WorkerId(socket.gethostname(), _boot_id(), pid, _process_start(pid) or "0", secrets.token_hex(4))

    def age_s(self) -> float:
        """How long this process has lived; of a worker of another host or boot that tells nothing."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(self.started) / os.sysconf("SC_CLK_TCK")

    def is_known_dead(self) -> bool:
        """True only when this host can tell that the process is gone; False when it lives or another host runs it."""
        if self.host != socket.gethostname():
            return False
        return self.boot_id != _boot_id() or _process_start(self.pid) != self.started


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _process_start(pid: int) -> str | None:
    """Start time of a process (field 22 of /proc/PID/stat); None when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]  # a zombie holds nothing
