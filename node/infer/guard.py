"""Outlives the worker that started a program, to end that program and remove its folders when the worker was killed.

Run as a script of its own, with standard library only: `guard.py PROCESS_GROUP FOLDER [KILL ...]`. Its standard input
is a pipe that the worker holds open; the pipe ends when the worker does, however it ends. A worker that lives kills its
guard when the run is over.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def start_guard(process_group: int, folder: Path, kill: Sequence[str]) -> subprocess.Popen[bytes]:
    """A guard over this process group; `kill` ends what is not in it."""
    argv = [sys.executable, "-I", "-S", __file__, str(process_group), str(folder), *kill]
    return subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def dismiss_guard(guard: subprocess.Popen[bytes]) -> None:
    """End the guard before it sees that its pipe ends."""
    guard.kill()
    guard.wait()
    if guard.stdin is not None:
        guard.stdin.close()


def _watch(process_group: int, folder: str, kill: Sequence[str]) -> None:
    sys.stdin.buffer.read()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process_group, signal.SIGKILL)
    if kill:
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(kill, capture_output=True, timeout=60, check=False)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
