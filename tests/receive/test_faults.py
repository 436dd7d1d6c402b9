"""Faults injected for real: death at every step, a disk that fills, empties or turns read-only, a locked database."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydicom import dcmread

from node.archive.files import dataset_offset
from node.archive.store import Archive
from tests.benchmark.ingest import make_images
from tests.benchmark.receivers import CHECKOUT, radnode
from tests.receive.killed import STEPS
from tests.receive.peers import associate
from tests.receive.sending import ct, encode, read_status, release, store_dataset, store_message
from tests.running_node import wait_until

SUCCESS, OUT_OF_RESOURCES = 0x0000, 0xA700


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small CT images."""
    return make_images(tmp_path_factory.mktemp("images") / "ct", 40, rows=128)


def acknowledged(output: str) -> list[Path]:
    """The files that `storescu -v` got Success for."""
    return [
        Path(file)
        for file, answer in re.findall(r"Sending file: (\S+)\n.*?(?:Response \((.*?)\)|\Z)", output, re.DOTALL)
        if answer == "Success"
    ]


def send(port: int, images: Path) -> list[Path]:
    """Send what the node takes until it dies; what it acknowledged."""
    command = ["storescu", "-v", "-aec", "RADNODE", "+sd", "127.0.0.1", str(port), str(images)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return acknowledged(done.stdout + done.stderr)


def archived(archive: Archive, file: Path) -> bool:
    """Whether the archive holds this file's data set, unchanged, with a row that tells its digest."""
    uid = dcmread(file, stop_before_pixels=True).SOPInstanceUID
    found = archive.instance_paths([uid])
    if uid not in found:
        return False
    content = found[uid].read_bytes()[dataset_offset(found[uid]) :]
    (row,) = [one for one in archive.instances(1) if one.sop_instance_uid == uid]
    return hashlib.sha256(content).hexdigest() == row.sha256 and dcmread(found[uid]) == dcmread(file)


@pytest.mark.parametrize(
    ("durability", "step"),
    [("full", step) for step in STEPS] + [("relaxed", step) for step in STEPS if "sync" not in step],
)
def test_death_at_every_step_loses_nothing_that_was_acknowledged(
    durability: str, step: str, images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "node"
    with radnode(folder, durability=durability) as receiver:  # a first life, so that the archive exists
        port = receiver.port
    number, least = (60 if step == "half written" else 12), 8
    if durability == "relaxed" and step == "committed":
        number = least = 1  # one transaction for many
    command = [sys.executable, "-m", "tests.receive.killed", folder / "config.yaml", step, str(number)]
    dying = subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert dying.stdout is not None
    assert dying.stdout.readline() == b"ready\n"
    oracle = send(port, images)
    assert dying.wait(10) == -signal.SIGKILL
    assert least <= len(oracle) < 40
    with radnode(folder, durability=durability) as receiver:
        archive = Archive(folder / "var", f"sqlite:///{folder / 'var' / 'radnode.sqlite'}")
        missing = [file.name for file in oracle if not archived(archive, file)]
        assert missing == []
        # What was not acknowledged comes again, and all of it is there once.
        assert len(send(receiver.port, images)) == 40
        assert all(archived(archive, file) for file in sorted(images.iterdir()))
        rows = {one.path for one in archive.instances(1)}
        archive.close()
    files = {str(path.relative_to(folder / "var")) for path in (folder / "var" / "instances").rglob("*.dcm")}
    assert files == rows
    assert len(rows) == 40
    assert list((folder / "var" / "spool").iterdir()) == []
    assert list((folder / "var" / "quarantine").iterdir()) == []


def test_a_locked_database_is_out_of_resources_and_recovers(tmp_path: Path) -> None:
    folder = tmp_path / "node"
    with radnode(folder) as receiver:
        connection = associate(receiver.port)
        assert store_dataset(connection, ct())[0] == SUCCESS
        other = sqlite3.connect(folder / "var" / "radnode.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        image = ct()
        assert store_dataset(connection, image)[0] == OUT_OF_RESOURCES
        other.execute("ROLLBACK")
        other.close()
        assert store_dataset(connection, image)[0] == SUCCESS
        release(connection)
    assert len(list((folder / "var" / "instances").rglob("*.dcm"))) == 2


def test_a_locked_database_stops_relaxed_receiving_and_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "node"
    with radnode(folder, durability="relaxed") as receiver:
        connection = associate(receiver.port)
        other = sqlite3.connect(folder / "var" / "radnode.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        acknowledged = 0
        deadline = time.monotonic() + 30
        while (status := store_dataset(connection, ct())[0]) == SUCCESS:
            acknowledged += 1
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert status == OUT_OF_RESOURCES
        other.execute("ROLLBACK")
        other.close()
        wait_until(lambda: store_dataset(connection, ct())[0] == SUCCESS, 10, "Success when the database is free")
        release(connection)
        archive = Archive(folder / "var", f"sqlite:///{folder / 'var' / 'radnode.sqlite'}")
        assert sum(study.instances for study in archive.studies()) == acknowledged + 1, "there when the sender releases"
        archive.close()


def test_below_the_watermark_nothing_is_accepted(tmp_path: Path) -> None:
    folder = tmp_path / "node"
    free = shutil.disk_usage(tmp_path).free
    reserve = tmp_path / "reserve"
    with radnode(folder, free_disk=f"{(free + 500_000_000) // 1_000_000}MB") as receiver:
        connection = associate(receiver.port)
        status, comment = store_dataset(connection, ct())
        assert (status, "watermark" in comment) == (OUT_OF_RESOURCES, True)
        release(connection)
    with radnode(folder, free_disk=f"{(free - 500_000_000) // 1_000_000}MB") as receiver:
        connection = associate(receiver.port)
        image = ct()
        assert store_dataset(connection, image)[0] == SUCCESS
        with reserve.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 1_000_000_000)
        time.sleep(0.5)
        assert store_dataset(connection, ct())[0] == OUT_OF_RESOURCES
        reserve.unlink()
        wait_until(lambda: store_dataset(connection, image)[0] == SUCCESS, 10, "Success when there is space again")
        release(connection)


class Mount:
    """A tmpfs of 4 MB, mounted in the namespace of this test's receiver and visible to the test through /proc."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], check=True)

    def remount(self, options: str) -> None:
        """Mount again with other options."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)

    def unmount(self) -> None:
        """Give it back."""
        subprocess.run(["umount", self.folder], check=True)


@pytest.mark.mounts
def test_a_disk_that_fills_and_empties(tmp_path: Path) -> None:
    mount = Mount(tmp_path / "node")
    try:
        with radnode(mount.folder, free_disk="1kB") as receiver:
            connection = associate(receiver.port)
            accepted = []
            for _ in range(100):
                image = ct(PixelData=os.urandom(100_000))
                status, _ = store_dataset(connection, image)
                if status != SUCCESS:
                    break
                accepted.append(image)
            assert 10 < len(accepted) < 40
            assert status == OUT_OF_RESOURCES
            assert [store_dataset(connection, image)[0] for _ in range(5)] == [OUT_OF_RESOURCES] * 5
            mount.remount("size=12m")
            assert store_dataset(connection, image)[0] == SUCCESS, "the same association goes on"
            release(connection)
        archive = Archive(mount.folder / "var", f"sqlite:///{mount.folder / 'var' / 'radnode.sqlite'}")
        found = archive.instance_paths(str(one.SOPInstanceUID) for one in [*accepted, image])
        archive.close()
        for one in [*accepted, image]:
            assert found[one.SOPInstanceUID].read_bytes().endswith(encode(one))
    finally:
        mount.unmount()


@pytest.mark.mounts
def test_a_disk_that_turns_read_only(tmp_path: Path) -> None:
    """As a kernel does it after an error; `-o remount,ro` of ours is refused while files are open for writing."""
    mount = Mount(tmp_path / "node")
    try:
        with radnode(mount.folder, free_disk="1kB") as receiver:
            connection = associate(receiver.port)
            image = ct()
            assert store_dataset(connection, image)[0] == SUCCESS
            release(connection)
            connection = associate(receiver.port)
            wait_until(lambda: not list((mount.folder / "var" / "spool").iterdir()), 5, "no open file")
            bind = ["nsenter", "-t", str(receiver.process.pid), "-m", "mount", "-o", "remount,bind,ro", mount.folder]
            subprocess.run(["mount", "--bind", mount.folder, mount.folder], check=True)
            subprocess.run(bind, check=True)
            assert store_dataset(connection, ct())[0] == OUT_OF_RESOURCES
            subprocess.run(["mount", "-o", "remount,bind,rw", mount.folder], check=True)
            assert store_dataset(connection, ct())[0] == SUCCESS
            release(connection)
    finally:
        subprocess.run(["umount", mount.folder], check=False)
        mount.unmount()


def test_a_stop_lets_a_busy_sender_end(tmp_path: Path) -> None:
    """SIGTERM in the middle of an image: the image is stored and answered, then the association ends."""
    with radnode(tmp_path / "node") as receiver:
        connection = associate(receiver.port)
        image = ct(PixelData=bytes(200_000))
        message = store_message(encode(image), image.SOPClassUID, image.SOPInstanceUID)
        connection.sendall(message[:100_000])
        time.sleep(0.2)
        receiver.process.terminate()
        time.sleep(1.5)
        connection.sendall(message[100_000:])
        assert read_status(connection)[0] == SUCCESS
        receiver.process.wait(10)
        connection.close()
