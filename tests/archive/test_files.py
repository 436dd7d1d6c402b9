"""Spool files: their content, their digest, and what is left of them."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.archive.files import Digester, SpoolFile, dataset_offset, file_sha256, make_folder
from node.errors import ArchiveError, ArchiveFull
from node.receive.storage import file_header


@pytest.fixture(params=["in the writer", "in a thread"])
def digester(request: pytest.FixtureRequest) -> Iterator[Digester | None]:
    """Where the digest is made."""
    made = Digester() if request.param == "in a thread" else None
    yield made
    if made is not None:
        made.close()


def pieces(count: int = 50) -> list[bytes]:
    """Pieces of all sizes, the empty one too."""
    chance = random.Random(3)
    return [chance.randbytes(chance.choice((0, 1, 100, 70_000, 300_000))) for _ in range(count)]


def test_content_and_digest(tmp_path: Path, digester: Digester | None) -> None:
    written = pieces()
    with SpoolFile(tmp_path, digester) as spooled:
        spooled.write(b"the file's own header", hashed=False)
        for piece in written:
            spooled.write(memoryview(piece))
        assert spooled.sha256 == hashlib.sha256(b"".join(written)).hexdigest()
        assert spooled.path.read_bytes() == b"the file's own header" + b"".join(written)
        assert spooled.size == spooled.path.stat().st_size
        spooled.write(b"more")
        assert spooled.sha256 == hashlib.sha256(b"".join([*written, b"more"])).hexdigest()
    assert list(tmp_path.iterdir()) == []


def test_kept_or_linked_it_stays(tmp_path: Path, digester: Digester | None) -> None:
    make_folder(tmp_path / "spool")
    with SpoolFile(tmp_path / "spool", digester) as spooled:
        spooled.write(b"kept")
        spooled.keep(tmp_path / "a" / "b" / "kept")
    with SpoolFile(tmp_path / "spool", digester) as spooled:
        spooled.write(b"linked")
        spooled.sync()
        spooled.link(tmp_path / "a" / "linked")
    assert (tmp_path / "a" / "b" / "kept").read_bytes() == b"kept"
    assert (tmp_path / "a" / "linked").read_bytes() == b"linked"
    assert list((tmp_path / "spool").iterdir()) == []


def test_many_files_closed_at_once_leave_no_descriptor(tmp_path: Path, digester: Digester | None) -> None:
    """A descriptor closed too early would be another file's when the digester reads it."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        with SpoolFile(tmp_path, digester) as spooled:
            spooled.write(bytes(1_000_000))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_disk_that_does_not_give_back_is_an_error(tmp_path: Path) -> None:
    digester = Digester()
    with SpoolFile(tmp_path, digester) as spooled:
        spooled.write(b"0123456789")
        digester.wait()
        spooled.size += 5
        digester.follow(spooled, spooled.size)
        with pytest.raises(ArchiveError, match="cannot read from the spool"):
            _ = spooled.sha256
    digester.close()


def test_a_full_disk_has_its_own_error() -> None:
    with SpoolFile(Path("/dev/shm")) as spooled:
        os.dup2(os.open("/dev/full", os.O_RDWR), spooled._descriptor)
        with pytest.raises(ArchiveFull, match="cannot write to the spool: No space left"):
            spooled.write(b"x")


def test_where_a_data_set_begins(tmp_path: Path) -> None:
    header = file_header("1.2.840.10008.5.1.4.1.1.2", "1.2.3", "1.2.840.10008.1.2.1", "CT1")
    path = tmp_path / "file.dcm"
    path.write_bytes(header + b"data set")
    assert dataset_offset(path) == len(header)
    assert file_sha256(path, skip=len(header)) == hashlib.sha256(b"data set").hexdigest()
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="no DICOM file"):
        dataset_offset(path)
