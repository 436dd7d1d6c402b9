"""A bundle's files out of a zip file or a folder, into a folder of our own: no way out of it, no links, no bombs."""

from __future__ import annotations

import errno
import lzma
import os
import shutil
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from node.errors import FetchError

METADATA = PurePosixPath("configs/metadata.json")


@dataclass(frozen=True)
class Bounds:
    """What a package may hold at most."""

    files: int = 20_000
    size_bytes: int = 40 * 10**9  # unpacked, all together
    ratio: int = 100  # unpacked to packed, all together; deflate can do 1000, weights and text do 1 to 20
    ratio_free_bytes: int = 50 * 10**6  # so much is taken at any ratio


DEFAULT_BOUNDS = Bounds()


def unpack(archive: Path, folder: Path, bounds: Bounds = DEFAULT_BOUNDS) -> None:
    """The bundle in a zip file as `folder`, which must not exist; the one folder around it is left away.

    Raises `FetchError` for what is no zip file of a bundle, and before anything is written for names that lead out of
    the folder, links and sizes beyond `bounds`.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = _members(opened, archive, bounds)
            need = sum(member.file_size for member in members.values())
            folder.mkdir(parents=True)
            if need > (free := shutil.disk_usage(folder).free):
                raise FetchError(f"{archive.name} needs {need:,} bytes unpacked, and {folder.parent} has {free:,} free")
            for path, member in members.items():
                _extract(opened, member, folder / path)
    except (NotImplementedError, RuntimeError) as reason:  # a compression or an encryption that zipfile does not know
        raise FetchError(f"{archive.name} cannot be unpacked: {reason}") from None
    except OSError as reason:
        if reason.errno == errno.EINVAL:  # it points to before its beginning
            raise FetchError(f"{archive.name} is a damaged zip file") from None
        raise FetchError(f"{archive.name} cannot be unpacked into {folder} ({reason.strerror})") from None
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError) as reason:
        raise FetchError(f"{archive.name} is no zip file, or a damaged one ({reason})") from None


def copy_folder(source: Path, folder: Path) -> None:
    """The bundle in a folder as `folder`, which must not exist.

    A link to another file of the bundle becomes a file; linked folders and links that lead out of it are refused: what
    lies elsewhere may be anything that this user can read, and the model would be given it.
    """
    if not (source / METADATA).is_file():
        raise FetchError(f"{source} holds no MONAI Bundle: it has no {METADATA}")
    if folder.absolute().is_relative_to(source.absolute()):
        raise FetchError(f"{source} cannot be copied into itself ({folder.parent.parent})")
    try:
        for place, folders, files in os.walk(source, onerror=_stop):
            folders[:] = [name for name in folders if not _is_left_out(name)]
            there = folder / Path(place).relative_to(source)
            there.mkdir(parents=True)
            for name in [*folders, *(name for name in files if not _is_left_out(name))]:
                path = Path(place, name)
                if path.is_dir():
                    if path.is_symlink():
                        raise FetchError(f"{path} is a link to a folder; copy the folder in its place")
                elif path.is_file():
                    if path.is_symlink() and not path.resolve().is_relative_to(source.resolve()):
                        raise FetchError(f"{path} is a link that leads out of the bundle; copy the file in its place")
                    shutil.copyfile(path, there / name)
                else:
                    raise FetchError(f"{path} is a broken link or not a file; remove it")
    except OSError as reason:
        raise FetchError(f"{source} cannot be copied to {folder.parent.parent} ({reason.strerror})") from None


def _stop(reason: OSError) -> None:
    raise reason


def _members(opened: zipfile.ZipFile, archive: Path, bounds: Bounds) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """The files by the path that each gets in the package."""
    listed = opened.infolist()
    if len(listed) > bounds.files:
        raise FetchError(f"{archive.name} holds {len(listed):,} files; more than {bounds.files:,} are not taken")
    size, packed = sum(member.file_size for member in listed), archive.stat().st_size
    if size > bounds.size_bytes:
        raise FetchError(f"{archive.name} unpacks to {size:,} bytes; more than {bounds.size_bytes:,} are not taken")
    if size > max(bounds.ratio_free_bytes, bounds.ratio * packed):
        raise FetchError(f"{archive.name} unpacks from {packed:,} to {size:,} bytes: no package does, nothing is taken")
    members: dict[PurePosixPath, zipfile.ZipInfo] = {}
    for member in listed:
        path = _safe_path(member, archive)
        if any(_is_left_out(part) for part in path.parts) or member.is_dir():
            continue
        if path in members:
            raise FetchError(f"{archive.name} holds {str(path)!r} twice")
        members[path] = member
    if METADATA in members:
        return members
    tops = {path.parts[0] for path in members}
    if len(tops) == 1 and tops.pop() / METADATA in members:
        return {PurePosixPath(*path.parts[1:]): member for path, member in members.items()}
    raise FetchError(
        f"{archive.name} holds no MONAI Bundle: expected {METADATA}, at its top or in the one folder there"
    )


def _safe_path(member: zipfile.ZipInfo, archive: Path) -> PurePosixPath:
    name = member.orig_filename.removesuffix("/")
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or ":" in parts[0] or any(part in ("", ".", "..") for part in parts):
        raise FetchError(
            f"{archive.name} holds the name {name[:200]!r}, which a package may not have; nothing is taken"
        )
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise FetchError(f"{archive.name} holds {name!r}, a link or a device; a package has files and folders only")
    return PurePosixPath(*parts)


def _extract(opened: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # zipfile reads no more than the announced size and compares the CRC at its end.
    with opened.open(member) as source, path.open("xb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())


def _is_left_out(name: str) -> bool:
    """What is no part of a package: compiled Python, version control, the leavings of macOS."""
    return name in ("__pycache__", "__MACOSX", ".DS_Store") or name.startswith((".git", "._"))
