"""What the disk alone allows: `python -m tests.benchmark.disk_bound contract|files FOLDER IMAGES [--writers N]`.

`contract`: the bytes of the images with the syncs of the receiver's contract (file, folder, database row), one image
after the other, without a network. `files`: each image written and synced and nothing else, by some threads at once,
which says whether the disk groups its commits. Prints images per second. A process of its own, so that a disk with a
slow flush (`slow_flush.c`) can be put under it as under the receivers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def contract(folder: Path, contents: list[bytes]) -> None:
    """File named, synced, its folder synced, a row committed: for one image after the other."""
    (folder / "final").mkdir()
    with contextlib.closing(sqlite3.connect(folder / "rows.sqlite", isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, name TEXT UNIQUE)")
        for number, content in enumerate(contents):
            spooled, final = folder / f"{number}.part", folder / "final" / f"{number}.dcm"
            _write(spooled, content, final)
            os.unlink(spooled)
            parent = os.open(folder / "final", os.O_RDONLY)
            os.fsync(parent)
            os.close(parent)
            database.execute("INSERT INTO rows (name) VALUES (?)", (final.name,))


def files(folder: Path, contents: list[bytes], writers: int) -> None:
    """The images as synced files, shared among `writers` threads."""

    def write(first: int) -> None:
        for number in range(first, len(contents), writers):
            _write(folder / f"{number}.dcm", contents[number])

    threads = [threading.Thread(target=write, args=(first,)) for first in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _write(path: Path, content: bytes, name: Path | None = None) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.write(descriptor, content)
    if name is not None:
        os.link(path, name)
    os.fsync(descriptor)
    os.close(descriptor)


def measure(what: str, folder: Path, images: Path, writers: int = 1) -> float:
    """Images per second, measured in a process of its own; `folder` is made and removed."""
    command = [sys.executable, "-m", "tests.benchmark.disk_bound", what, str(folder), str(images)]
    done = subprocess.run(
        [*command, "--writers", str(writers)], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    return float(done.stdout)


def main() -> None:
    """Measure once and print images per second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("contract", "files"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--writers", type=int, default=1)
    options = parser.parse_args()
    contents = [path.read_bytes() for path in sorted(options.images.iterdir())]
    options.folder.mkdir(parents=True)
    begin = time.perf_counter()
    if options.what == "contract":
        contract(options.folder, contents)
    else:
        files(options.folder, contents, options.writers)
    print(len(contents) / (time.perf_counter() - begin))
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
