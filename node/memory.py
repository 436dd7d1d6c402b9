"""The memory of a process that works on one study after another: what it lets go is kept for the next, for a while.

A study takes some gigabytes in arrays of hundreds of megabytes. The C library returns each of them to the kernel at
once, and the next study's come page by page again: 0.1 s for 400 slices as float32 on bare metal, 1.1 s on a virtual
machine whose host took the pages back (`tests.benchmark.overhead`: 4 of 6 s were that).
Only ctypes and gc are imported: a model's process uses it while it has one thread.
"""

from __future__ import annotations

import ctypes
import gc

IDLE_S = 60.0  # after which a process that has nothing to do gives back what it kept

_YOUNGEST = 10_000  # new objects between two collections; Python's default of 700 is a tenth of one header
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h of the GNU C library
_libc = ctypes.CDLL(None)


def settle() -> None:
    """All libraries are imported: the garbage collector need not look at what is there already.

    Each full collection would, 0.3 s for a worker's half a million objects, several times while 400 headers are read
    and a report is made. It still finds cycles among what is made from now on.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNGEST)


def keep_freed() -> bool:
    """Keep freed memory in this process from now on, until `give_back`; False where the C library cannot (musl).

    All threads share one heap: one of a thread's own would hold no array of this size (mallopt(3)).
    """
    try:
        mallopt = _libc.mallopt
    except AttributeError:
        return False
    return all([mallopt(_M_ARENA_MAX, 1), mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])


def give_back() -> None:
    """Return all free memory to the kernel (malloc_trim(3))."""
    try:
        _libc.malloc_trim(0)
    except AttributeError:
        return
