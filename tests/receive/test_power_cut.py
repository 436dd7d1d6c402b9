"""The power cut: the disk as it would be found, with nothing on it that was not synced.

The storage lies in an ext4 file system on a loop device. At random moments the receiver is stopped (SIGSTOP) and the
device's image is copied: it holds what the file system has written and no page that is still dirty, which is what a
disk keeps when the machine dies. The copy is mounted (the journal replayed), a node starts on it, and every image that
was acknowledged before the stop must be there, whole, and nothing that is cut may pass for whole. The same with
`durability: relaxed` must lose images: it shows that the test can.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import pytest
from sqlalchemy import text

from node.archive.records import Study, StudyState
from node.archive.recover import recover
from node.archive.store import Archive
from tests.benchmark.receivers import Receiver, radnode
from tests.receive.peers import associate
from tests.receive.sending import ct, encode, store_dataset
from tests.running_node import wait_until

CUTS = 8
SOME = 8  # images between two cuts, at least
DISK_BYTES = 512 << 20


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """The file system in `image`; nothing is written back but what is synced, or is older than ten minutes."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop,commit=600", image, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@dataclass
class Sender:
    """Sends small images over two associations at once until it is told to end; knows what was acknowledged."""

    port: int
    sent: dict[str, bytes] = field(default_factory=dict)  # data sets by SOP Instance UID
    acknowledged: set[str] = field(default_factory=set)
    ending: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """One association."""
        connection = associate(self.port)
        chance = random.Random(id(connection))
        while not self.ending.is_set():
            image = ct(PixelData=chance.randbytes(2 * chance.randrange(100, 10_000)))
            self.sent[str(image.SOPInstanceUID)] = encode(image)
            status, comment = store_dataset(connection, image)
            assert status == 0, comment
            self.acknowledged.add(str(image.SOPInstanceUID))
        connection.close()


@dataclass(frozen=True)
class Cut:
    """The image of a disk at some moment, and what had been sent and acknowledged before."""

    image: Path
    sent: dict[str, bytes]
    acknowledged: set[str]


def cut_power(folder: Path, *, durability: str) -> list[Cut]:
    """The disk at random moments."""
    disk = folder / "disk.img"
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    found = []
    with (
        mounted(disk, folder / "disk") as storage,
        radnode(storage / "node", durability=durability, free_disk="1MB") as receiver,
    ):
        subprocess.run(["sync", "-f", storage], check=True)  # what was there before the first image
        sender = Sender(receiver.port)
        threads = [threading.Thread(target=sender.run) for _ in range(2)]
        for thread in threads:
            thread.start()
        chance = random.Random(7)
        for number in range(CUTS):
            time.sleep(chance.uniform(0.05, 0.3))
            some = (number + 1) * SOME
            wait_until(lambda some=some: len(sender.acknowledged) > some, 60, f"{some} images are acknowledged")
            found.append(_stopped_copy(receiver, sender, disk, folder / f"cut{number}.img"))
        sender.ending.set()
        for thread in threads:
            thread.join(20)
    return found


def _stopped_copy(receiver: Receiver, sender: Sender, disk: Path, copy: Path) -> Cut:
    receiver.process.send_signal(signal.SIGSTOP)
    # What is in a system call ends it first: a commit of the file system must not run beside the copying.
    wait_until(lambda: _is_stopped(receiver.process.pid), 60, "every thread of the receiver stands still")
    time.sleep(0.1)  # answers that are on their way arrive
    cut = Cut(copy, dict(sender.sent), set(sender.acknowledged))
    shutil.copyfile(disk, copy)
    receiver.process.send_signal(signal.SIGCONT)
    return cut


def _is_stopped(pid: int) -> bool:
    states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}


def lost(cut: Cut) -> int:
    """How many of the acknowledged images a node does not find when it starts on this disk. What it finds is whole."""
    with mounted(cut.image, cut.image.with_suffix("")) as storage:
        place = storage / "node" / "var"
        with (
            contextlib.closing(Archive(place, f"sqlite:///{place / 'radnode.sqlite'}")) as archive,
            patch("node.archive.files._boot", return_value="rebooted"),
        ):
            recover(archive)
            with archive.database.read() as connection:
                assert connection.scalar(text("PRAGMA integrity_check")) == "ok"
            found = {uid for study in archive.studies(limit=10_000) for uid in _whole(archive, study, cut.sent)}
    return len(cut.acknowledged - found)


def _whole(archive: Archive, study: Study, sent: dict[str, bytes]) -> list[str]:
    """The instances of a study: those that were sent like that, or all of them if nothing warns of the study."""
    instances = {one.sop_instance_uid: archive.storage / one.path for one in archive.instances(study.id)}
    whole = [uid for uid, path in instances.items() if path.exists() and path.read_bytes().endswith(sent[uid])]
    assert study.state is StudyState.QUARANTINED or len(whole) == len(instances), "a cut image is taken for a whole one"
    return whole


@pytest.mark.mounts
def test_what_was_acknowledged_survives_a_power_cut(tmp_path: Path) -> None:
    cuts = cut_power(tmp_path, durability="full")
    assert [lost(cut) for cut in cuts] == [0] * CUTS


@pytest.mark.mounts
def test_relaxed_durability_loses_images_in_a_power_cut_and_nothing_else(tmp_path: Path) -> None:
    cuts = cut_power(tmp_path, durability="relaxed")
    assert sum(lost(cut) for cut in cuts) > 10
