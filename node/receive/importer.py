"""Files into the same archive: folders, zip files, what a DICOMDIR lies beside, and a folder that is watched.

A file's data set is kept byte by byte as it lies; only its File Meta Information is written anew.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO

from pydicom.errors import InvalidDicomError
from pydicom.filereader import _read_file_meta_info, read_preamble

from node.archive.files import SpoolFile
from node.archive.ingest import Outcome
from node.archive.store import Archive
from node.dicom.header_scan import TRANSFER_SYNTAXES, HeaderScan
from node.dicom.identity import Identity
from node.errors import InputRefused, InstanceRefused, RadnodeError
from node.receive.limits import Limits, Watermark
from node.receive.storage import file_header

_log = logging.getLogger(__name__)

SOURCE = "import"  # what stands where else the calling AE title stands
_PIECE_BYTES = 1 << 20
_WATCH_EVERY_S = 2.0
_WATCH_AGAIN_S = 30.0  # after the disk or the database said no
_SETTLED_S = 5.0  # a file that has not changed for so long is complete
REFUSED_FOLDER = "refused"


@dataclass(frozen=True)
class Imported:
    """One file, and what became of it."""

    name: str
    outcome: Outcome | None  # None: it was refused
    why: str = ""
    identity: Identity | None = None  # as far as it could be read


def import_path(path: Path, archive: Archive, limits: Limits | None = None) -> Iterator[Imported]:
    """Import a file, a zip file or all of a folder (zip files within it too), in the order of their names.

    What is no DICOM instance is refused with a reason and does not stop the others; `ArchiveError` stops.
    """
    if not path.exists():
        raise InputRefused(f"{path}: there is no such file or folder")
    limits = limits or Limits()
    for file in [path] if path.is_file() else _walk(path):
        name = str(file.relative_to(path)) if file != path else file.name
        yield from _import_file(file, name, archive, limits)


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):  # links to folders are not followed: no loops
        folders.sort()
        for name in sorted(names):
            yield Path(root, name)


def _import_file(file: Path, name: str, archive: Archive, limits: Limits) -> Iterator[Imported]:
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            yield Imported(name, None, "is no regular file")
            return
        if zipfile.is_zipfile(file):
            yield from _import_zip(file, name, archive, limits)
            return
        with file.open("rb") as stream:
            yield import_stream(stream, name, archive, limits)
    except OSError as error:
        yield Imported(name, None, f"cannot be read: {error.strerror}")


def _import_zip(file: Path, name: str, archive: Archive, limits: Limits) -> Iterator[Imported]:
    """Members are read as streams: no name of theirs becomes a path, and what one unpacks to is bounded."""
    try:
        with zipfile.ZipFile(file) as opened:
            for member in sorted(opened.infolist(), key=lambda one: one.filename):
                if member.is_dir():
                    continue
                shown = f"{name}:{member.filename!a}"
                try:
                    with opened.open(member) as stream:
                        yield import_stream(stream, shown, archive, limits)
                except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # damaged, encrypted, unknown
                    yield Imported(shown, None, f"cannot be unpacked: {error}")
    except zipfile.BadZipFile as error:
        yield Imported(name, None, f"is a damaged zip file: {error}")


def import_stream(
    stream: IO[bytes],
    name: str,
    archive: Archive,
    limits: Limits,
    *,
    source: str = SOURCE,
    study_uid: str | None = None,
) -> Imported:
    """One DICOM file (PS3.10), of study `study_uid` where that is given; `source` stands where else the calling AE
    title does. A data set without File Meta Information is refused; `ArchiveError` when it cannot be kept now.
    """
    identity: Identity | None = None
    try:
        transfer_syntax, rest = _open(stream)
        with archive.spool_file() as spooled:
            scan = HeaderScan(transfer_syntax, maximum_inflated_bytes=limits.maximum_inflated_bytes)
            held = _find_identity(stream, rest, scan)
            identity = scan.early_identity()
            if study_uid is not None and identity.study_uid != study_uid:
                raise InstanceRefused("belongs to another study than the request names")
            _spool(stream, held, identity, source, spooled, scan, limits)
            return Imported(name, archive.keep_instance(spooled, scan.identity(), source), identity=identity)
    except InstanceRefused as error:
        return Imported(name, None, str(error), identity)


def _open(stream: IO[bytes]) -> tuple[str, bytes]:
    """The transfer syntax, and what was read of the data set to find it."""
    start = stream.read(132)
    if start[128:] != b"DICM":
        raise InstanceRefused("is no DICOM file (PS3.10: no DICM prefix)")
    head = BytesIO(start + stream.read(_PIECE_BYTES))
    try:
        read_preamble(head, force=False)
        meta = _read_file_meta_info(head)
        transfer_syntax = str(meta.get("TransferSyntaxUID", ""))
        media_class = str(meta.get("MediaStorageSOPClassUID", ""))
    except InvalidDicomError as error:
        raise InstanceRefused("is no DICOM file") from error
    except Exception as error:  # whatever pydicom raises over damaged bytes
        raise InstanceRefused(f"its File Meta Information cannot be read ({type(error).__name__})") from error
    if media_class == "1.2.840.10008.1.3.10":
        raise InstanceRefused("is a DICOMDIR, which holds no image: import the folder that it lies in")
    if transfer_syntax not in TRANSFER_SYNTAXES:
        raise InstanceRefused("names no transfer syntax that DICOM knows")
    return transfer_syntax, head.read()


def _find_identity(stream: IO[bytes], rest: bytes, scan: HeaderScan) -> list[bytes]:
    """Feed the scan until it knows the identity; the pieces that were read for it."""
    held: list[bytes] = []
    piece = rest
    while piece and not scan.knows_identity:
        held.append(piece)
        scan.feed(piece)
        piece = b"" if scan.knows_identity else stream.read(_PIECE_BYTES)
    return held


def _spool(
    stream: IO[bytes],
    held: list[bytes],
    identity: Identity,
    source: str,
    spooled: SpoolFile,
    scan: HeaderScan,
    limits: Limits,
) -> None:
    """Write the file's own header, which names the identity, then the data set as it lies."""
    header = file_header(identity.sop_class_uid, identity.sop_instance_uid, identity.transfer_syntax_uid, source)
    spooled.write(header, hashed=False)
    for piece in held:
        spooled.write(piece)
    while piece := stream.read(_PIECE_BYTES):
        spooled.write(piece)
        if scan.wants_more:
            scan.feed(piece)
        if spooled.size > limits.maximum_object_bytes:
            raise InstanceRefused(f"is larger than {limits.maximum_object_bytes} bytes (receive.maximum_object)")


class WatchedFolder(threading.Thread):
    """Imports what appears in a folder and removes it there; what is refused moves to `refused/` within it."""

    def __init__(self, folder: Path, archive: Archive, limits: Limits, watermark: Watermark, stop: threading.Event):
        super().__init__(name="watch", daemon=True)
        self._folder = folder
        self._archive = archive
        self._limits = limits
        self._watermark = watermark
        self._stop_asked = stop

    def run(self) -> None:
        """Look every few seconds until the node stops."""
        while not self._stop_asked.is_set():
            try:
                self._look()
            except (RadnodeError, OSError) as error:  # a full or absent disk: the files stay and are tried again
                _log.error("watched folder %s: %s", self._folder, error)
                self._stop_asked.wait(_WATCH_AGAIN_S)
            self._stop_asked.wait(_WATCH_EVERY_S)

    def _look(self) -> None:
        settled_before = time.time() - _SETTLED_S
        for file in _walk(self._folder):
            if self._stop_asked.is_set():
                return
            relative = file.relative_to(self._folder)
            if relative.parts[0] == REFUSED_FOLDER or file.is_symlink() or file.stat().st_mtime > settled_before:
                continue
            self._watermark.check()
            taken = list(_import_file(file, str(relative), self._archive, self._limits))
            refused = [one for one in taken if one.outcome is None]
            for one in refused:
                _log.warning("watched folder: %s %s", one.name, one.why)
            if refused or not taken:
                target = self._folder / REFUSED_FOLDER / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                file.rename(target)
            else:
                file.unlink()
