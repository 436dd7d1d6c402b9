"""`radnode import` and the watched folder: folders, zip files, DICOMDIR, and what is no DICOM at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid

from node.archive.files import dataset_offset
from node.archive.ingest import Outcome
from node.archive.store import Archive
from node.config_values import FreeSpace
from node.errors import InputRefused
from node.receive.importer import REFUSED_FOLDER, WatchedFolder, import_path
from node.receive.limits import Limits, Watermark
from tests.benchmark.ingest import make_images
from tests.running_node import RunningNode, wait_until


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of five images in subfolders, between other files."""
    folder = make_images(tmp_path / "images", 5, rows=32)
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / "00004.dcm").rename(folder / "deep" / "deeper" / "without suffix")
    (folder / "notes.txt").write_text("not DICOM")
    (folder / "empty.dcm").touch()
    os.symlink(folder, folder / "loop")
    return folder


def outcomes(path: Path, archive: Archive) -> dict[str, str]:
    """File name to outcome or refusal."""
    return {one.name: one.outcome or one.why for one in import_path(path, archive)}


def test_a_folder_with_all_kinds_of_files(archive: Archive, images: Path) -> None:
    found = outcomes(images, archive)
    assert [found[f"0000{number}.dcm"] for number in range(4)] == [Outcome.STORED] * 4
    assert found["deep/deeper/without suffix"] == Outcome.STORED
    assert "no DICM prefix" in found["notes.txt"]
    assert "no DICM prefix" in found["empty.dcm"]
    assert len(found) == 7
    again = outcomes(images, archive)
    assert sorted(again.values()).count(Outcome.DUPLICATE) == 5
    source = images / "00002.dcm"
    uid = dcmread(source).SOPInstanceUID
    kept = archive.instance_paths([uid])[uid]
    offset = int.from_bytes(source.read_bytes()[140:144], "little") + 144
    assert kept.read_bytes()[dataset_offset(kept) :] == source.read_bytes()[offset:]


def test_a_zip_file_is_read_without_being_unpacked(archive: Archive, images: Path, tmp_path: Path) -> None:
    packed = tmp_path / "study.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as writer:
        writer.write(images / "00000.dcm", "../../../escaped.dcm")
        writer.write(images / "00001.dcm", "a/b/fine.dcm")
        writer.writestr("readme.txt", "no DICOM")
    found = outcomes(packed, archive)
    assert list(found.values()).count(Outcome.STORED) == 2
    assert any("readme.txt" in name and "DICM" in why for name, why in found.items())
    assert not list(tmp_path.parent.rglob("escaped.dcm"))


def test_a_damaged_zip_file_is_refused(archive: Archive, images: Path, tmp_path: Path) -> None:
    packed = tmp_path / "study.zip"
    with zipfile.ZipFile(packed, "w") as writer:
        writer.write(images / "00000.dcm", "image.dcm")
    content = bytearray(packed.read_bytes())
    content[900] ^= 0xFF
    packed.write_bytes(content)
    ((name, why),) = outcomes(packed, archive).items()
    assert "cannot be unpacked" in why, name


def test_a_dicomdir_says_what_to_import(archive: Archive, images: Path, tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for number in range(3):
        shutil.copy(images / f"0000{number}.dcm", media / f"IM{number}")
    subprocess.run(["dcmmkdir", "+I", "-W", "+id", media, "+D", media / "DICOMDIR", "IM0", "IM1", "IM2"], cwd=media,
                   check=False, capture_output=True)  # fmt: skip
    assert (media / "DICOMDIR").exists()
    found = outcomes(media, archive)
    assert [found[f"IM{number}"] for number in range(3)] == [Outcome.STORED] * 3
    assert "import the folder" in found["DICOMDIR"]


def test_shared_data_in_every_encoding(archive: Archive, shared_data: Path) -> None:
    found = outcomes(shared_data / "compressed", archive)
    refused = {name: why for name, why in found.items() if why not in list(Outcome)}
    assert set(refused) == {"HTJ2KLossless_08_RGB.dcm", "HTJ2K_08_RGB.dcm"}
    assert all("Study Instance UID is missing" in why for why in refused.values())
    assert list(found.values()).count(Outcome.STORED) == 5 + 4
    assert list(found.values()).count(Outcome.DUPLICATE) == 12


def test_a_stale_file_header_does_not_matter(archive: Archive, images: Path) -> None:
    """Anonymisers write new UIDs and forget the File Meta Information."""
    image = dcmread(images / "00000.dcm")
    image.SOPInstanceUID = generate_uid()
    image.save_as(images / "00000.dcm", enforce_file_format=False)
    (one,) = import_path(images / "00000.dcm", archive)
    assert one.outcome is Outcome.STORED
    kept = dcmread(archive.instance_paths([image.SOPInstanceUID])[image.SOPInstanceUID])
    assert kept.file_meta.MediaStorageSOPInstanceUID == image.SOPInstanceUID


def test_a_path_that_is_not_there(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="no such file or folder"):
        list(import_path(tmp_path / "absent", archive))


def test_the_command(tmp_path: Path, images: Path) -> None:
    node = RunningNode(tmp_path, 4242)
    command = [sys.executable, "-m", "node.cli", "import", images, "--config", node.config]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["stored"] == 5
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("0 stored, 5 here already, 0 in conflict (quarantined), 2 refused")
    (listed,) = node.json("studies", "list")
    assert listed["instances"] == 5


def test_the_watched_folder(archive: Archive, images: Path, tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    shutil.copytree(images, watched, symlinks=True)
    old = time.time() - 60
    for path in watched.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path, (old, old))
    shutil.copy(images / "00000.dcm", watched / "still written.dcm")
    os.utime(watched / "still written.dcm")
    stop = threading.Event()
    thread = WatchedFolder(watched, archive, Limits(), Watermark(archive.storage, FreeSpace(size_bytes=1)), stop)
    thread.start()
    try:
        wait_until(lambda: len(archive.studies()) == 1 and archive.studies()[0].instances == 5, 10, "five images")
        wait_until(lambda: len(list((watched / REFUSED_FOLDER).iterdir())) == 2, 5, "what was refused is set aside")
        assert (watched / "still written.dcm").exists()
        assert not (watched / "00001.dcm").exists()
        os.utime(watched / "still written.dcm", (old, old))
        wait_until(lambda: not (watched / "still written.dcm").exists(), 10, "it is taken when it is complete")
    finally:
        stop.set()
        thread.join(10)
