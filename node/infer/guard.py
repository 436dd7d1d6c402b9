"""Outlives the worker that started a program, to end that program and remove its folders when the worker was killed.

Run as a script of its own, with standard library only: `guard.py PROCESS_GROUP FOLDER [ENGINE NAME]`. Its standard
input is a pipe that the worker holds open; the pipe ends when the worker does, however it ends. A worker that lives
kills its guard when the run is over.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_ENGINE_S = 10.0  # that a container engine may take to answer
_REMOVE_S = 20.0  # that it may take to remove a container
_SETTLE_S = 3.0  # a container that was asked for may be made so long after its client was killed
_PAUSE_S = 0.25


def start_guard(process_group: int, folder: Path, container: Sequence[str]) -> subprocess.Popen[bytes]:
    """A guard over this process group and, where there is one, the container (engine and name) that it started."""
    argv = [sys.executable, "-I", "-S", __file__, str(process_group), str(folder), *container]
    return subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def dismiss_guard(guard: subprocess.Popen[bytes]) -> None:
    """End the guard before it sees that its pipe ends."""
    guard.kill()
    guard.wait()
    if guard.stdin is not None:
        guard.stdin.close()


def remove_container(engine: str, name: str, *, settled: bool) -> None:
    """End and remove the container of a client that is no more, and wait until there is none of this name.

    Where the client ended by itself (`settled`) its container did too, and `--rm` removes it. One that was killed may
    have asked for a container that the engine is only about to make: it is looked for until there was none for
    `_SETTLE_S`.
    """
    start = time.monotonic()
    absent_since: float | None = None
    while time.monotonic() < start + _REMOVE_S:
        try:
            subprocess.run([engine, "rm", "--force", name], capture_output=True, timeout=_ENGINE_S, check=False)
            look = subprocess.run(
                [engine, "container", "inspect", name], capture_output=True, timeout=_ENGINE_S, check=False
            )
        except subprocess.TimeoutExpired:
            absent_since = None
            continue
        except OSError:  # there is no engine any more
            return
        now = time.monotonic()
        absent_since = None if look.returncode == 0 else absent_since or now
        if absent_since is not None and (settled or now >= absent_since + _SETTLE_S):
            return
        time.sleep(_PAUSE_S)


def _watch(process_group: int, folder: str, container: Sequence[str]) -> None:
    sys.stdin.buffer.read()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process_group, signal.SIGKILL)
    if container:
        engine, name = container
        remove_container(engine, name, settled=False)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
