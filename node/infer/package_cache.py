"""Copies of model packages on a machine that has no packages of its own, by their digests and within a size.

A package is written to a folder beside the others and takes its place only when its digest is the one that was asked
for. A slot holds a lock on each package that it uses; what nobody holds goes first when room is needed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath

from node.errors import ModelError, RadnodeError
from node.infer.package import Package, load_package
from node.infer.shelf import PackageShelf

_PARTLY = ".partly-"


def default_cache() -> Path:
    """Below the cache folder of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "radnode" / "packages"


class PackageCache:
    """The copies in one folder, shared by the slots of a machine: `DIGEST/NAME/` and the package's files."""

    def __init__(self, folder: Path, most_bytes: int):
        """`most_bytes` is what all copies may take. The folder is made when there is something to keep."""
        self._folder = folder
        self._most_bytes = most_bytes
        self._held: dict[str, int] = {}  # digest to the descriptor that holds its folder
        self._shelves: dict[tuple[str, str, str], PackageShelf] = {}
        self._partly: tuple[str, Path, int] | None = None  # what is being written: digest, folder, its lock

    def find(self, name: str, digest: str, at: Path) -> Package | None:
        """The package with this digest: in the folder `at`, where the asking machine has it, or a copy; else None."""
        package = self._look(at.parent, name, digest)
        if package is None and self._hold(digest):
            package = self._look(self._folder / digest, name, digest)
            if package is None:
                self._release(digest)
            else:
                os.utime(self._folder / digest)  # what was used last stays longest
        return package

    def begin(self, name: str, digest: str, size_bytes: int) -> None:
        """Make room for a package that is sent in parts; `ModelError` where there can be none."""
        self._forget_partly()
        if size_bytes > self._most_bytes:
            raise ModelError(
                f"model package {name} ({size_bytes / 1e9:.1f} GB) is larger than all copies may be on this machine "
                f"({self._most_bytes / 1e9:.1f} GB): see workers.package_cache_size"
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(self._most_bytes - size_bytes)
            folder = Path(tempfile.mkdtemp(prefix=_PARTLY, dir=self._folder))
            (folder / name).mkdir()
            self._partly = digest, folder, _lock(folder)
        except OSError as error:
            raise self._failed(name, error) from None

    def add(self, name: str, digest: str, path: str, data: bytes | memoryview) -> None:
        """The next part of the file `path` of the package that was begun."""
        partly = self._partly
        relative = PurePosixPath(path)
        if partly is None or partly[0] != digest or relative.is_absolute() or ".." in relative.parts:
            raise ModelError(f"model package {name}: a part of it came that was not begun")
        file = partly[1] / name / relative
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("ab") as opened:
                opened.write(data)
        except OSError as error:
            raise self._failed(name, error) from None

    def finish(self, name: str, digest: str) -> Package:
        """Check what was written and put it in its place; `ModelError` when it is not the package of this digest."""
        if self._partly is None or self._partly[0] != digest:
            raise ModelError(f"model package {name}: it ended before it was begun")
        folder = self._partly[1]
        try:
            if load_package(folder / name).digest != digest:
                raise ModelError(f"model package {name} changed while it was copied to this machine; try again")
            place = self._folder / digest
            if not place.exists():
                folder.rename(place)
        except OSError as error:
            if not (self._folder / digest).is_dir():  # another slot was first, with the same files
                raise self._failed(name, error) from None
        finally:
            self._forget_partly()
        package = self.find(name, digest, self._folder / digest / name)
        if package is None or not self._hold(digest):
            raise ModelError(f"model package {name}: its copy on this machine is gone again; try again")
        return package

    def release_but(self, digests: set[str]) -> None:
        """Other packages than these may be deleted from now on."""
        for digest in set(self._held) - digests:
            self._release(digest)

    def _look(self, parent: Path, name: str, digest: str) -> Package | None:
        """Hashed only when a file changed; a package with another digest is none."""
        if not (parent / name).is_dir():
            return None
        shelf = self._shelves.setdefault((str(parent), name, digest), PackageShelf([parent], {name: digest}))
        found = shelf.look_up(name)
        return None if isinstance(found, RadnodeError) else found

    def _hold(self, digest: str) -> bool:
        """Keep the copy from being deleted; False where there is none."""
        if digest in self._held:
            return True
        place = self._folder / digest
        try:
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not os.path.isdir(place) or not os.path.samestat(os.stat(place), os.fstat(descriptor)):
            os.close(descriptor)  # deleted in this moment
            return False
        self._held[digest] = descriptor
        return True

    def _release(self, digest: str) -> None:
        os.close(self._held.pop(digest))

    def _make_room(self, left_bytes: int) -> None:
        """Delete what was not used for longest and what nobody holds, until the others take no more than this."""
        copies: list[tuple[float, int, Path]] = []
        for place in self._folder.iterdir():
            if place.name.startswith(_PARTLY):
                _delete(place)  # of a slot that ended while it wrote
            elif place.is_dir():
                size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
                copies.append((place.stat().st_mtime, size, place))
        taken = sum(size for _, size, _ in copies)
        for _, size, place in sorted(copies):
            if taken <= left_bytes:
                return
            if _delete(place):
                taken -= size

    def _forget_partly(self) -> None:
        if self._partly is not None:
            _, folder, descriptor = self._partly
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)
            self._partly = None

    def _failed(self, name: str, error: OSError) -> ModelError:
        self._forget_partly()
        return ModelError(
            f"model package {name} cannot be kept in {self._folder} ({error.strerror}): see workers.package_cache"
        )


def _lock(folder: Path) -> int:
    """A descriptor that says that the folder is in use."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _delete(folder: Path) -> bool:
    """Delete a folder that nobody holds; whether it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = folder.with_name(f"{_PARTLY}{os.getpid()}-{folder.name[-16:]}")
        folder.rename(gone)  # at once: a reader finds all of it or nothing
        shutil.rmtree(gone, ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
