"""Words between processes: who waits is woken, and nothing hangs on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from node.wake import Bell, Room, ring

FOREVER_S = 60.0  # a wait that is not woken would fail the test by its time limit
WAITS = """
import sys, threading
from contextlib import closing
from pathlib import Path
from node.wake import Bell, Room
with closing(Bell(Path(sys.argv[1]), Room.WORK)) as bell:
    print("waits", flush=True)
    bell.wait(threading.Event(), 60)
    print("woken", flush=True)
"""


def waiting(storage: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", WAITS, str(storage)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    return process


def test_all_processes_of_a_room_are_woken_however_long_the_path(tmp_path: Path) -> None:
    storage = tmp_path / ("long" * 40)
    storage.mkdir()
    processes = [waiting(storage), waiting(storage)]
    with closing(Bell(storage, Room.DELIVER)) as other:
        ring(storage, Room.WORK)
        assert [process.communicate(timeout=60)[0] for process in processes] == ["woken\n", "woken\n"]
        began = time.monotonic()
        other.wait(threading.Event(), 0.2)
        assert time.monotonic() - began >= 0.2  # it was not its room
    assert os.listdir(storage / "wake") == []


def test_a_word_before_the_wait_is_heard_once(tmp_path: Path) -> None:
    with closing(Bell(tmp_path, Room.WORK)) as bell:
        for _ in range(1000):  # more than the socket holds
            ring(tmp_path, Room.WORK)
        bell.wait(threading.Event(), FOREVER_S)
        began = time.monotonic()
        bell.wait(threading.Event(), 0.2)
        assert time.monotonic() - began >= 0.2


def test_what_a_killed_process_leaves_is_tidied(tmp_path: Path) -> None:
    process = waiting(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(os.listdir(tmp_path / "wake")) == 1
    ring(tmp_path, Room.WORK)
    assert os.listdir(tmp_path / "wake") == []


def test_a_stop_ends_the_wait_and_nobody_need_wait(tmp_path: Path) -> None:
    ring(tmp_path, Room.WORK)  # no folder yet
    stop = threading.Event()
    stop.set()
    with closing(Bell(tmp_path, Room.WORK)) as bell:
        bell.wait(stop, FOREVER_S)


def test_a_folder_in_which_nothing_can_be_bound_is_polled(tmp_path: Path) -> None:
    (tmp_path / "wake").write_text("in the way")
    with closing(Bell(tmp_path, Room.WORK)) as bell:
        ring(tmp_path, Room.WORK)
        bell.wait(threading.Event(), 0.01)


def test_the_sockets_of_another_machine_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shared storage folder they cannot be reached from here, and look like those of the dead."""
    with monkeypatch.context() as there:
        there.setattr("socket.gethostname", lambda: "another")
        bell = Bell(tmp_path, Room.WORK)
        (socket_file,) = (tmp_path / "wake").iterdir()
        bell._socket.close()  # pyright: ignore[reportOptionalMemberAccess]
    ring(tmp_path, Room.WORK)
    assert socket_file.exists()
    with monkeypatch.context() as there:
        there.setattr("socket.gethostname", lambda: "another")
        ring(tmp_path, Room.WORK)
    assert not socket_file.exists()
