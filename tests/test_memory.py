"""Memory that a process keeps for its next study, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import threading
import numpy as np
from node import memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def study():
    array = np.ones(200_000_000, np.uint8)
    del array

def grown(run):
    before = resident()
    run()
    return (resident() - before) // 1_000_000

def in_thread():
    thread = threading.Thread(target=study)
    thread.start()
    thread.join()

study()
plain = grown(study)
assert memory.keep_freed()
kept = grown(study)
again = grown(study), grown(in_thread)
before = resident()
memory.give_back()
print(plain, kept, *again, (before - resident()) // 1_000_000)
"""


def test_freed_memory_is_kept_for_the_next_study_until_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    plain, kept, again, in_thread, given_back = map(int, done.stdout.split())
    assert plain < 10
    assert 190 < kept < 220
    assert (again, in_thread) < (10, 10), "the second study takes the first one's, whatever thread it runs in"
    assert given_back > 190


def test_a_sparse_map_takes_memory_where_it_is_written_and_not_where_it_is_read() -> None:
    program = """
from node.infer.results import filled_slices, sparse_zeros
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
found = sparse_zeros((400, 512, 512))
before = resident()
assert filled_slices(found) == (0, 0)
read = resident() - before
found[100:110] = 7
assert filled_slices(found) == (100, 110)
print(read // 1_000_000, (resident() - before) // 1_000_000)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    read, written = map(int, done.stdout.split())
    assert read < 5
    assert written < 15, "105 MB in all"


def test_a_full_collection_looks_at_new_objects_only() -> None:
    program = "import gc, node.analyse; from node import memory; memory.settle(); print(len(gc.get_objects()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000
