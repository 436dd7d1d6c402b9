"""Files that survive a power cut: written under a random name, synced under their own, and the folder synced.

The order is the contract of `Success` (PS3.4 B.2.3 leaves it to the implementation): data and name on disk before the
row, the row on disk before the answer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import queue
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from types import TracebackType

from node.errors import ArchiveError, ArchiveFull

SPOOL_SUFFIX = ".part"
OWED_SUFFIX = ".owed"  # of an acknowledged file that is synced and has no row yet

_PIECE_BYTES = 1 << 18
_CLOSED_LOOK_S = 0.2
_RELAXED = "relaxed"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


class Digester:
    """A thread that digests a spool file behind its writer, from the page cache: hashing then costs the sender no time
    (measured: +18 % images/s on one association).
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[SpoolFile, int] | Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="digest", daemon=True)
        self._thread.start()

    def follow(self, spooled: SpoolFile, end: int) -> None:
        """Bring the digest of `spooled` forward to the offset `end`."""
        self._tasks.put((spooled, end))

    def wait(self) -> None:
        """Return when everything that was asked for is done."""
        done = Event()
        self._tasks.put(done)
        while not done.wait(_CLOSED_LOOK_S):
            if not self._thread.is_alive():  # closed meanwhile
                return

    def close(self) -> None:
        """End the thread, when it has done what was asked for."""
        self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if isinstance(task, Event):
                task.set()
            else:
                spooled, end = task
                spooled.digest_to(end)


class SpoolFile:
    """A new file in the spool folder that becomes a durable file under its final name, or nothing at all.

    As a context manager it removes its name in the spool at the end, unless `keep` moved it or `leave` says that
    recovery shall look at it. The spool and the final place must lie on one filesystem. The open file is locked, so
    that a sweep of the spool by another process tells living files from those of the dead. With a `digester` the digest
    is made in its thread. The name of a `relaxed` one says that it may be acknowledged before it is synced and has a
    row, and between which start and end of the machine.
    """

    def __init__(self, spool: Path, digester: Digester | None = None, *, relaxed: bool = False):
        self.size = 0
        self._digest = hashlib.sha256()
        self._digester = digester
        self._digested = 0  # bytes of the file that are behind the digester
        self._digest_error: OSError | None = None
        try:
            self.token, self.path, self._descriptor = _open_locked(spool, relaxed=relaxed)
        except OSError as error:
            raise archive_error(error, "open a file in the spool") from error
        self._leave = False

    def __enter__(self) -> SpoolFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """The same as the end of the context."""
        self._wait_for_digest()  # which reads from the descriptor
        if not self._leave:
            with contextlib.suppress(OSError):  # recovery sweeps what cannot be removed now
                os.unlink(self.path)
        with contextlib.suppress(OSError):
            os.close(self._descriptor)

    @property
    def sha256(self) -> str:
        """Digest (hex) of what was written with `hashed` so far; `ArchiveError` when the disk does not give it back."""
        self._wait_for_digest()
        if self._digest_error is not None:
            raise archive_error(self._digest_error, "read from the spool") from self._digest_error
        return self._digest.hexdigest()

    def write(self, data: bytes | bytearray | memoryview, *, hashed: bool = True) -> None:
        """Append `data`; `hashed=False` leaves it out of the digest (the file's own header, in front)."""
        if hashed and self._digester is None:
            self._digest.update(data)
        try:
            written = os.write(self._descriptor, data)
            self.size += written
            while written < len(data):  # a short write comes before the error that explains it
                step = os.write(self._descriptor, memoryview(data)[written:])
                self.size += step
                written += step
        except OSError as error:
            raise archive_error(error, "write to the spool") from error
        if self._digester is None:
            return
        if hashed:
            self._digester.follow(self, self.size)
        else:
            self._digested = self.size

    def _wait_for_digest(self) -> None:
        if self._digester is not None and self._digested < self.size:
            self._digester.wait()
            self.digest_to(self.size)  # what a digester that was closed meanwhile left

    def digest_to(self, end: int) -> None:
        """Digest the file's bytes up to the offset `end`; for the digester's thread."""
        try:
            while self._digested < end and self._digest_error is None:
                piece = os.pread(self._descriptor, min(end - self._digested, _PIECE_BYTES), self._digested)
                if not piece:
                    raise OSError(errno.EIO, "the file is shorter than what was written")
                self._digest.update(piece)
                self._digested += len(piece)
        except OSError as error:
            self._digest_error = error

    def sync(self) -> None:
        """Bring the content to the disk.

        A failed fsync is never repeated: the kernel may have dropped the dirty pages and would report success.
        """
        _sync(self._descriptor)

    def link(self, final: Path) -> None:
        """Give the file a second name, its final one; the name in the spool tells recovery until the row is there. The
        folder of `final` is not synced here; its parents are where they are new.
        """
        _link(self.path, final)

    def keep(self, final: Path) -> None:
        """Move the file to `final` and make it durable there. Nothing is lost at `final` when this fails."""
        self.sync()
        try:
            make_folder(final.parent)
            os.rename(self.path, final)
            self.path = final
            self._leave = True
            sync_folder(final.parent)
        except OSError as error:
            raise archive_error(error, "make a file durable") from error

    def leave(self) -> None:
        """Keep the name in the spool: what became of the file is not known, recovery finds out."""
        self._leave = True

    def owe(self) -> None:
        """Keep an acknowledged file, whose row is owed, with both of its names, beyond the machine's end."""
        self.leave()
        self.sync()
        try:
            owed = self.path.with_suffix(OWED_SUFFIX)
            os.rename(self.path, owed)
            self.path = owed
            sync_folder(owed.parent)
        except OSError as error:
            raise archive_error(error, "make a file durable") from error


class LeftFile:
    """A file in the spool that a dead process left there with its final name; `descriptor` is that of the caller, who
    holds it locked.
    """

    def __init__(self, path: Path, descriptor: int):
        self.path = path
        self.token = path.stem
        self.size = os.fstat(descriptor).st_size
        self._descriptor = descriptor

    @property
    def is_relaxed(self) -> bool:
        """Whether its sender may have been told Success, though it is not synced."""
        return self.token.startswith(_RELAXED)

    @property
    def outlived_its_machine(self) -> bool:
        """Of a relaxed one: whether the machine has ended since, and the file was not synced before: any part of it may
        be missing. In other cases it is whole: it got its final name when all of it was written.
        """
        return self.path.suffix != OWED_SUFFIX and not self.token.startswith(f"{_RELAXED}{_boot()}")

    @functools.cached_property
    def sha256(self) -> str:
        """Digest (hex) of its data set; `ArchiveError` when the disk does not give it back."""
        try:
            return file_sha256(self.path, dataset_offset(self.path))
        except OSError as error:
            raise archive_error(error, "read from the spool") from error

    def sync(self) -> None:
        """Bring the content to the disk."""
        _sync(self._descriptor)

    def link(self, final: Path) -> None:
        """Give it one more name."""
        _link(self.path, final)

    def leave(self) -> None:
        """It stays anyway: a later start looks at it again."""


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise archive_error(error, "make a file durable") from error


def _link(path: Path, final: Path) -> None:
    try:
        while True:
            make_folder(final.parent)
            try:
                os.link(path, final)
                return
            except FileNotFoundError:  # retention removed the empty folder in this moment
                if not path.exists():
                    raise
    except OSError as error:
        raise archive_error(error, "name a file") from error


@functools.cache
def _boot() -> str:
    """This machine between its start and its end (random(4): boot_id)."""
    return hashlib.sha256(Path("/proc/sys/kernel/random/boot_id").read_bytes()).hexdigest()[:8]


def _open_locked(spool: Path, *, relaxed: bool) -> tuple[str, Path, int]:
    """A new file of a random name that this process holds: the name's random part, the file, its descriptor."""
    while True:
        token = f"{_RELAXED}{_boot()}{secrets.token_hex(12)}" if relaxed else secrets.token_hex(16)
        path = spool / f"{token}{SPOOL_SUFFIX}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return token, path, descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # another receiver that starts swept it away before it was locked


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents; each new name is synced in its parent."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o750)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """fsync a file and the folder that it lies in."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(path.parent)


def file_sha256(path: Path, skip: int = 0) -> str:
    """Digest (hex) of a file's content behind its first `skip` bytes, in constant memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(skip)
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def dataset_offset(path: Path) -> int:
    """Where the data set begins in a DICOM file that radnode wrote; `ValueError` for another file."""
    with path.open("rb") as file:
        start = file.read(144)
    if len(start) < 144 or start[128:132] != b"DICM":
        raise ValueError("no DICOM file")
    return 144 + int.from_bytes(start[140:144], "little")


def was_unsynced(path: Path) -> bool:
    """Whether an instance's file was received without a sync."""
    return f"-{_RELAXED}" in path.name


def is_intact(path: Path, size: int, sha256: str) -> bool:
    """Whether an instance's file is there as its row tells: of its size, and where the machine has ended since it was
    received without a sync, of its digest. `OSError` when the disk does not say.
    """
    try:
        if path.stat().st_size != size:
            return False
        if not was_unsynced(path) or f"-{_RELAXED}{_boot()}" in path.name:
            return True
        return file_sha256(path, dataset_offset(path)) == sha256
    except (FileNotFoundError, ValueError):
        return False


def remove(paths: Sequence[Path]) -> None:
    """Remove files as far as that is possible; a later start removes the rest."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def archive_error(error: OSError, doing: str) -> ArchiveError:
    """The named error for what the filesystem said."""
    text = f"cannot {doing}: {error.strerror}"
    return ArchiveFull(text) if error.errno in _NO_SPACE else ArchiveError(text)
