"""Files that survive a power cut: written under a random name, synced, renamed, and their folder synced.

The order is the contract of `Success` (PS3.4 B.2.3 leaves it to the implementation): data on disk before the name,
the name on disk before the row, the row on disk before the answer.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from pathlib import Path
from types import TracebackType

from node.errors import ArchiveError, ArchiveFull

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


class SpoolFile:
    """A new file in the spool folder that becomes a durable file under its final name, or nothing at all.

    As a context manager it removes the file unless `keep` was called. The spool and the final place must lie on one
    filesystem.
    """

    def __init__(self, spool: Path, *, durable: bool = True):
        self.path = spool / f"{secrets.token_hex(16)}.part"
        self.size = 0
        self._durable = durable
        self._digest = hashlib.sha256()
        try:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise _archive_error(error, "open a file in the spool") from error
        self._kept = False

    def __enter__(self) -> SpoolFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if not self._kept:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()

    @property
    def sha256(self) -> str:
        """Digest (hex) of what was written with `hashed` so far."""
        return self._digest.hexdigest()

    def write(self, data: bytes | bytearray | memoryview, *, hashed: bool = True) -> None:
        """Append `data`; `hashed=False` leaves it out of the digest (the file's own header)."""
        if hashed:
            self._digest.update(data)
        view = memoryview(data)
        try:
            while view:
                written = os.write(self._descriptor, view)
                self.size += written
                view = view[written:]
        except OSError as error:
            raise _archive_error(error, "write to the spool") from error

    def keep(self, final: Path) -> None:
        """Make the file durable as `final`; a second call moves it on. Nothing is lost at `final` when this fails.

        A failed fsync is never repeated: the kernel may have dropped the dirty pages and would report success.
        """
        try:
            if self._durable and self._descriptor >= 0:
                os.fsync(self._descriptor)
            self.close()
            make_folder(final.parent, durable=self._durable)
            os.rename(self.path, final)
            self.path = final
            self._kept = True
            if self._durable:
                sync_folder(final.parent)
        except OSError as error:
            raise _archive_error(error, "make a file durable") from error

    def close(self) -> None:
        """Close the descriptor; the file stays until the context ends."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def make_folder(folder: Path, *, durable: bool = True) -> None:
    """Make `folder` and its parents; each new name is synced in its parent."""
    if folder.is_dir():
        return
    make_folder(folder.parent, durable=durable)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o750)
    if durable:
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _archive_error(error: OSError, doing: str) -> ArchiveError:
    text = f"cannot {doing}: {error.strerror}"
    return ArchiveFull(text) if error.errno in _NO_SPACE else ArchiveError(text)
