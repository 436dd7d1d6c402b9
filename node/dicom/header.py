"""DICOM files read as far as their pixel data, and folders searched for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydicom import config, dcmread
from pydicom.dataset import FileDataset

from node.errors import InputRefused

# Values are taken as they were sent: a study is not refused for an over-long text, and pydicom's warnings quote the
# values.
config.settings.reading_validation_mode = config.IGNORE


@dataclass(frozen=True)
class FolderScan:
    """What a folder holds."""

    files: tuple[Path, ...]  # DICOM instances
    skipped: tuple[Path, ...]  # everything else, DICOMDIR among it


def read_header(path: Path) -> FileDataset:
    """The data set without its pixel data; `InputRefused` names a file that is none.

    Elements whose values pydicom cannot convert are left out: whoever asks for one finds it absent and no exception.
    A header that lacks none has `pixel_place`: its path, and the byte at which its pixel data begins. With it
    `node.dicom.decode` need not parse the file again, which takes as long as reading a slice.
    """
    try:
        with path.open("rb") as file:
            header = dcmread(file, stop_before_pixels=True, force=True)
            place = path, file.tell()
    except OSError as error:
        raise InputRefused(f"{path.name} cannot be read: {error.strerror or type(error).__name__}") from error
    except Exception as error:  # pydicom raises many kinds over damaged files
        raise InputRefused(f"{path.name} is damaged: {type(error).__name__}") from error
    whole = True
    for tag in list(header.keys()):
        try:
            _ = header[tag]  # pydicom converts on first access: about 0.4 ms for all elements of an image
        except Exception:  # of as many kinds as there are converters
            del header[tag]
            whole = False
    header.pixel_place = place if whole else None
    return header


def scan_folder(path: Path) -> FolderScan:
    """All DICOM instances below a folder (or the one file), in the order of their names."""
    files: list[Path] = []
    skipped: list[Path] = []
    for file in [path] if path.is_file() else _walk(path):
        (files if _is_instance(file) else skipped).append(file)
    return FolderScan(tuple(files), tuple(skipped))


def _walk(path: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(path):  # links to folders are not followed: no loops
        folders.sort()
        for name in sorted(names):
            yield Path(root, name)


def _is_instance(file: Path) -> bool:
    """A DICOM file by its prefix, or (files without a preamble) by a data set that names its class and instance."""
    if file.name.upper() == "DICOMDIR":
        return False
    try:
        with file.open("rb") as stream:
            start = stream.read(132)
        if start[128:] == b"DICM":
            return True
        if len(start) < 132 or start[:2] not in (b"\x02\x00", b"\x08\x00"):
            return False
        header = dcmread(file, force=True, specific_tags=["SOPClassUID", "SOPInstanceUID"], stop_before_pixels=True)
        return "SOPClassUID" in header and "SOPInstanceUID" in header
    except Exception:  # unreadable as DICOM means that it is none
        return False
