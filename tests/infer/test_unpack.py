"""Zip files and folders of bundles, and of those who mean harm."""

from __future__ import annotations

import io
import os
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.errors import FetchError
from node.infer.unpack import Bounds, copy_folder, unpack
from tests.infer.tiny import write, zipped

BUNDLE = {"configs/metadata.json": b"{}", "configs/inference.json": b"{}", "docs/README.md": b"x" * 1000}


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path: Path) -> Callable[[bytes], Path]:
    def write_zip(content: bytes) -> Path:
        (tmp_path / "bundle.zip").write_bytes(content)
        return tmp_path / "bundle.zip"

    return write_zip


@pytest.mark.parametrize("top", ["", "spleen", "configs"])
def test_bundle_with_and_without_a_folder_around_it(place: Callable[[bytes], Path], tmp_path: Path, top: str) -> None:
    unpack(place(zipped(BUNDLE, top)), tmp_path / "out")
    assert files_in(tmp_path / "out") == BUNDLE


def test_leavings_are_left_out(place: Callable[[bytes], Path], tmp_path: Path) -> None:
    leavings = ["__MACOSX/spleen/._a", "spleen/.DS_Store", "spleen/._LICENSE", "spleen/scripts/__pycache__/a.pyc",
                "spleen/.git/config", "spleen/.gitignore"]  # fmt: skip
    named = {f"spleen/{path}": content for path, content in BUNDLE.items()}
    unpack(place(zipped(named | dict.fromkeys(leavings, b"x"))), tmp_path / "out")
    assert files_in(tmp_path / "out") == BUNDLE


OUTSIDE = ["../evil.py", "a/../../evil.py", "/tmp/evil.py", "a//evil.py", "./evil.py", "..\\evil.py", "C:/evil.py",
           "a/..", "scripts/e\x1bvil.py", "scripts/evil\x00.py", "a\nb"]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_are_refused(place: Callable[[bytes], Path], tmp_path: Path, name: str) -> None:
    held = "Q" * len(name)
    content = zipped(BUNDLE | {held: b"x"})
    assert content.count(held.encode()) == 2
    content = content.replace(held.encode(), name.encode())  # zipfile itself would write a tamer name
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(FetchError, match="which a package may not have"):
        unpack(place(content), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path for path in sorted(tmp_path.parent.rglob("*")) if path not in before] == [tmp_path / "bundle.zip"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_links_and_devices_are_refused(place: Callable[[bytes], Path], tmp_path: Path, kind: int) -> None:
    file = io.BytesIO(zipped(BUNDLE))
    with zipfile.ZipFile(file, "a") as opened:
        member = zipfile.ZipInfo("models")
        member.external_attr = (kind | 0o777) << 16
        opened.writestr(member, "/etc")
    with pytest.raises(FetchError, match="holds 'models', a link or a device"):
        unpack(place(file.getvalue()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bomb_is_refused_before_it_is_unpacked(place: Callable[[bytes], Path], tmp_path: Path) -> None:
    bomb = place(zipped(BUNDLE | {"models/model.pt": bytes(100_000_000)}))
    assert bomb.stat().st_size < 200_000
    with pytest.raises(FetchError, match=r"unpacks from \d+,\d+ to 100,001,004 bytes: no package does"):
        unpack(bomb, tmp_path / "out")
    with pytest.raises(FetchError, match=r"more than 10,000,000 are not taken"):
        unpack(bomb, tmp_path / "out", Bounds(size_bytes=10_000_000))
    with pytest.raises(FetchError, match=r"holds 4 files; more than 3 are not taken"):
        unpack(bomb, tmp_path / "out", Bounds(files=3))
    assert not (tmp_path / "out").exists()


def test_bomb_that_lies_about_its_size(place: Callable[[bytes], Path], tmp_path: Path) -> None:
    """It says 1,000 bytes in both of its headers and would give 60,000,000."""
    name, true = b"models/model.pt", 60_000_000
    content = bytearray(zipped(BUNDLE | {name.decode(): bytes(true)}))
    size = struct.pack("<I", true)
    assert content.count(size) == 2
    bomb = place(bytes(content).replace(size, struct.pack("<I", 1000)))
    with pytest.raises(FetchError, match="no zip file, or a damaged one"):
        unpack(bomb, tmp_path / "out")
    assert sum(map(len, files_in(tmp_path / "out").values())) < 2_000_000


def test_files_that_share_their_bytes_count_each(place: Callable[[bytes], Path], tmp_path: Path) -> None:
    """A bomb of another kind: many entries that all point to one compressed file."""
    file = io.BytesIO(zipped(BUNDLE))
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("0", bytes(1_000_000))
        first = opened.getinfo("0")
        for index in range(1, 1000):
            again = zipfile.ZipInfo(str(index))
            for field in ("compress_type", "CRC", "compress_size", "file_size", "header_offset"):
                setattr(again, field, getattr(first, field))
            opened.filelist.append(again)
            opened.NameToInfo[again.filename] = again
    with pytest.raises(FetchError, match=r"to 1,000,001,004 bytes: no package does"):
        unpack(place(file.getvalue()), tmp_path / "out")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_stands_twice_is_refused(place: Callable[[bytes], Path], tmp_path: Path) -> None:
    file = io.BytesIO(zipped(BUNDLE))
    with zipfile.ZipFile(file, "a") as opened:
        opened.writestr("docs/README.md", "another")
    with pytest.raises(FetchError, match=r"holds 'docs/README\.md' twice"):
        unpack(place(file.getvalue()), tmp_path / "out")


def test_file_that_is_also_a_folder(place: Callable[[bytes], Path], tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="cannot be unpacked into"):
        unpack(place(zipped(BUNDLE | {"models": b"", "models/model.pt": b""})), tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", zipped(BUNDLE)[:-30], zipped(BUNDLE)[100:]])
def test_what_is_no_zip_file(place: Callable[[bytes], Path], tmp_path: Path, content: bytes) -> None:
    with pytest.raises(FetchError, match=r"bundle\.zip is (no zip file, or )?a damaged (one|zip file)"):
        unpack(place(content), tmp_path / "out")


def test_damage_inside_is_found(place: Callable[[bytes], Path], tmp_path: Path) -> None:
    content = bytearray(zipped(BUNDLE | {"models/model.pt": os.urandom(10_000)}))
    content[content.index(b"models/model.pt") + 5000] ^= 1
    with pytest.raises(FetchError, match="no zip file, or a damaged one"):
        unpack(place(bytes(content)), tmp_path / "out")


@pytest.mark.parametrize("files", [{"README.md": b""}, {"a/configs/metadata.json": b"", "b/x": b""},
                                   {"a/b/configs/metadata.json": b""}, {}])  # fmt: skip
def test_zip_without_a_bundle(place: Callable[[bytes], Path], tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(FetchError, match=r"holds no MONAI Bundle: expected configs/metadata\.json"):
        unpack(place(zipped(files)), tmp_path / "out")


@given(st.data())
def test_any_damage_is_told_or_does_no_harm(data: st.DataObject) -> None:
    content = bytearray(zipped(BUNDLE, "top"))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bundle.zip").write_bytes(content)
        with suppress(FetchError):
            unpack(Path(folder) / "bundle.zip", Path(folder) / "out")
        assert set(os.listdir(folder)) <= {"bundle.zip", "out"}


def test_encrypted_zip_is_refused(place: Callable[[bytes], Path], tmp_path: Path) -> None:
    content = bytearray(zipped(BUNDLE))
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place_of = content.index(signature)
        content[place_of + flags] |= 1
    with pytest.raises(FetchError, match=r"cannot be unpacked: .*encrypted"):
        unpack(place(bytes(content)), tmp_path / "out")


# -- Folders -----------------------------------------------------------------------------------------------------------


def test_folder_is_copied_without_its_leavings(tmp_path: Path) -> None:
    source = write(tmp_path / "in", BUNDLE | {"scripts/__pycache__/a.pyc": b"", ".git/config": b"", ".DS_Store": b""})
    (source / "models").mkdir()
    (source / "models" / "blob").write_bytes(b"weights")
    (source / "models" / "model.pt").symlink_to("blob")
    copy_folder(source, tmp_path / "out")
    assert files_in(tmp_path / "out") == BUNDLE | {"models/model.pt": b"weights", "models/blob": b"weights"}
    assert not (tmp_path / "out" / "models" / "model.pt").is_symlink()


def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    source = write(tmp_path / "in", BUNDLE)
    (source / "secret").symlink_to(write(tmp_path / "node", {"config.yaml": b"password"}) / "config.yaml")
    with pytest.raises(FetchError, match="secret is a link that leads out of the bundle; copy the file"):
        copy_folder(source, tmp_path / "out")
    assert not (tmp_path / "out" / "secret").exists()


def test_folder_that_cannot_be_a_package(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"holds no MONAI Bundle: it has no configs/metadata\.json"):
        copy_folder(tmp_path, tmp_path / "out")
    source = write(tmp_path / "in", BUNDLE)
    with pytest.raises(FetchError, match="cannot be copied into itself"):
        copy_folder(source, source / "models" / ".adding" / "in")
    (source / "models").symlink_to(tmp_path)
    with pytest.raises(FetchError, match="is a link to a folder"):
        copy_folder(source, tmp_path / "out")
    (source / "models").unlink()
    os.mkfifo(source / "models")
    with pytest.raises(FetchError, match="is a broken link or not a file"):
        copy_folder(source, tmp_path / "out2")
