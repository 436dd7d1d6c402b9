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
from pydicom.dataset import Dataset
from sqlalchemy.exc import SQLAlchemyError

from node.archive.files import dataset_offset, file_sha256
from node.archive.records import Study, StudyState
from node.archive.recover import recover
from node.archive.store import Archive
from node.errors import ArchiveError
from tests.benchmark.receivers import Receiver, radnode
from tests.receive.peers import associate
from tests.receive.sending import ct, encode, store_dataset

CUTS = 8
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
    acknowledged: list[Dataset] = field(default_factory=list)
    ending: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """One association."""
        connection = associate(self.port)
        chance = random.Random(id(connection))
        while not self.ending.is_set():
            image = ct(PixelData=chance.randbytes(2 * chance.randrange(100, 10_000)))
            status, comment = store_dataset(connection, image)
            assert status == 0, comment
            self.acknowledged.append(image)
        connection.close()


def cut_power(folder: Path, *, durability: str) -> list[tuple[list[Dataset], Path]]:
    """Images of the disk at random moments, each with what had been acknowledged before."""
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
            found.append(_stopped_copy(receiver, sender, disk, folder / f"cut{number}.img"))
        sender.ending.set()
        for thread in threads:
            thread.join(20)
    return found


def _stopped_copy(receiver: Receiver, sender: Sender, disk: Path, copy: Path) -> tuple[list[Dataset], Path]:
    receiver.process.send_signal(signal.SIGSTOP)
    time.sleep(0.1)  # what was in a system call ends it; answers that are on their way arrive
    acknowledged = list(sender.acknowledged)
    shutil.copyfile(disk, copy)
    receiver.process.send_signal(signal.SIGCONT)
    return acknowledged, copy


def lost(acknowledged: list[Dataset], image: Path) -> int:
    """How many of the acknowledged images a node does not find when it starts on this disk."""
    with mounted(image, image.with_suffix("")) as storage:
        place = storage / "node" / "var"
        try:
            with (
                contextlib.closing(Archive(place, f"sqlite:///{place / 'radnode.sqlite'}")) as archive,
                patch("node.archive.files._boot", return_value="rebooted"),
            ):
                recover(archive)
                paths = archive.instance_paths(str(one.SOPInstanceUID) for one in acknowledged)
                torn = [one for study in archive.studies(limit=10_000) for one in _torn(archive, study)]
                assert torn == [], "an image that was cut is taken for a whole one"
        except (ArchiveError, SQLAlchemyError):  # no database that can be read
            return len(acknowledged)
        return sum(not _is_whole(paths.get(str(one.SOPInstanceUID)), one) for one in acknowledged)


def _torn(archive: Archive, study: Study) -> list[str]:
    """Instances whose file is not what was received, in a study that nothing warns of."""
    if study.state is StudyState.QUARANTINED:
        return []
    return [
        one.path
        for one in archive.instances(study.id)
        if file_sha256(archive.storage / one.path, dataset_offset(archive.storage / one.path)) != one.sha256
    ]


def _is_whole(path: Path | None, image: Dataset) -> bool:
    return path is not None and path.exists() and path.read_bytes().endswith(encode(image))


@pytest.mark.mounts
def test_what_was_acknowledged_survives_a_power_cut(tmp_path: Path) -> None:
    cuts = cut_power(tmp_path, durability="full")
    assert len(cuts[-1][0]) > 50
    assert [lost(acknowledged, image) for acknowledged, image in cuts] == [0] * CUTS


@pytest.mark.mounts
def test_relaxed_durability_loses_images_in_a_power_cut(tmp_path: Path) -> None:
    cuts = cut_power(tmp_path, durability="relaxed")
    assert sum(lost(acknowledged, image) for acknowledged, image in cuts) > 10
