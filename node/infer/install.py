"""A package into a folder of packages: put together beside its place, looked at, and renamed into it.

Nothing of a package that fails on the way stays, but for what was downloaded: that waits a week for the next attempt.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from node.errors import FetchError, ModelError
from node.infer.fetch import DEFAULT_LIMITS, Checksum, Limits, Progress, download, shown
from node.infer.package import MANIFEST, Package, is_package_name, load_package
from node.infer.zoo import read_large_files

_KEPT_S = 7 * 86400.0  # a download waits so long for the next attempt
_FRESH_S = 86400.0  # a whole one without a checksum counts as current for so long
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD


class Downloads:
    """The files that one package is made from, in `FOLDER/.downloads`."""

    def __init__(
        self,
        folder: Path,
        *,
        limits: Limits = DEFAULT_LIMITS,
        progress: Callable[[str], Progress] = lambda name: lambda done, total: None,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._folder = folder / ".downloads"
        self._limits = limits
        self._progress = progress
        self._sleep = sleep
        self._taken: list[Path] = []
        self._drop(lambda file: time.time() - file.stat().st_mtime > _KEPT_S)

    def get(self, url: str, checksum: Checksum | None, name: str) -> Path:
        """The file at `url`, whole, by that checksum; `name` is what people are told. Raises `FetchError`."""
        file = self._folder / hashlib.sha256(url.encode()).hexdigest()[:32]
        self._taken.append(file)
        if file.is_file():  # of an attempt that failed later
            try:
                if checksum is not None:
                    checksum.check(file, shown(url))
                    return file
                if time.time() - file.stat().st_mtime < _FRESH_S:
                    return file
            except FetchError:
                pass
            file.unlink()
        try:
            download(
                url, file, checksum=checksum, limits=self._limits, progress=self._progress(name), sleep=self._sleep
            )
        finally:
            self._drop(lambda file: False)  # the folder, where nothing is kept
        return file

    def reject(self, file: Path) -> None:
        """A file is not what it should be: it would be no better next time."""
        self._drop(lambda kept: kept == file)

    def forget(self) -> None:
        """The package is in its place: what it was made from is no longer needed."""
        self._drop(lambda file: any(file.name.startswith(taken.name) for taken in self._taken))

    def _drop(self, wanted: Callable[[Path], bool]) -> None:
        try:
            for file in self._folder.iterdir():
                if wanted(file):
                    file.unlink(missing_ok=True)
            self._folder.rmdir()
        except OSError:
            pass  # there is none, or another attempt's files are in it


def install_package(
    name: str,
    models: Path,
    put: Callable[[Path], None],
    *,
    downloads: Downloads,
    manifest: Path | None = None,
    fallback: Path | None = None,
    replace: bool = False,
) -> Package:
    """Make `models/NAME`: `put` writes the bundle into the folder that it is given, the rest is done here.

    The bundle's large files are fetched; `manifest` becomes its `dicom.yaml`, or `fallback` where it has none. The
    package is read as a worker would read it before it takes its place. Raises `ModelError`, `ManifestError` or
    `FetchError`, and then everything is as it was.
    """
    target = check_place(models, name, replace=replace)
    with _beside(models) as temporary:
        folder = temporary / name
        put(folder)
        _fetch_large_files(folder, downloads)
        _add_manifest(folder, manifest, fallback)
        load_package(folder)
        check_place(models, name, replace=replace)
        _settle(folder, target)
    downloads.forget()
    return load_package(target)


def check_place(models: Path, name: str, *, replace: bool) -> Path:
    """Where a package of this name goes; raises `ModelError` when it must not be made there."""
    if not is_package_name(name):
        raise ModelError(
            f"{name[:100]!r} cannot be a package's name: it takes 1 to 64 letters, digits, '_', '-' or '.', a letter "
            "or digit first; --name gives another"
        )
    target = models / name
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ModelError(f"{target} is a link or a file; move it away")
    if target.exists() and not replace:
        raise ModelError(
            f"there is already {target}; --replace puts the new package in its place, --name gives another name"
        )
    return target


def _fetch_large_files(folder: Path, downloads: Downloads) -> None:
    for large in read_large_files(folder):
        path = folder / large.path
        if path.is_file():
            if large.checksum is not None:
                large.checksum.check(path, f"{large.path} of {folder.name}")
            continue
        try:
            file = downloads.get(large.url, large.checksum, large.path.name)
        except FetchError as error:
            raise FetchError(
                f"{error}; it is {large.path} of {folder.name}: where it can be had otherwise, put it into the "
                "bundle's folder and add that"
            ) from None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, path)  # it stays a download too, until the package is in its place
            except OSError:
                shutil.copyfile(file, path)
        except OSError as reason:
            raise FetchError(f"{path} cannot be written ({reason.strerror})") from None


def _add_manifest(folder: Path, manifest: Path | None, fallback: Path | None) -> None:
    source = manifest or (None if (folder / MANIFEST).is_file() else fallback)
    if source is not None:
        try:
            shutil.copyfile(source, folder / MANIFEST)
        except OSError as reason:
            raise ModelError(f"{source} cannot be read as {MANIFEST} ({reason.strerror})") from None
    elif not (folder / MANIFEST).is_file():
        raise ModelError(
            f"{folder.name} comes without a {MANIFEST}, and radnode has none for a bundle of that name: write one "
            "(which series the model takes, what its labels mean, its licences; docs/models.md has an example and "
            "every field) and give it with --dicom-yaml FILE"
        )


@contextmanager
def _beside(models: Path) -> Iterator[Path]:
    """A temporary folder on the same file system, that no one looks into for packages."""
    try:
        models.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".adding-", dir=models))
    except OSError as reason:
        raise ModelError(f"{models} cannot be written to ({reason.strerror})") from None
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _settle(folder: Path, target: Path) -> None:
    """Rename a package to its place; one that is there changes places with it, so that there is always one."""
    for path in (folder, *folder.rglob("*")):
        _sync(path)
    try:
        if target.exists():
            _exchange(folder, target)
        else:
            folder.rename(target)
    except OSError as reason:
        raise ModelError(f"the package cannot be put in its place {target} ({reason.strerror})") from None
    _sync(target.parent)


def _exchange(first: Path, second: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(first), os.fsencode(second)
    if hasattr(libc, "renameat2") and libc.renameat2(_HERE, paths[0], _HERE, paths[1], _EXCHANGE) == 0:
        return
    aside = first.with_name(f"{first.name}.replaced")  # a file system that cannot (NFS): for a moment there is none
    second.rename(aside)
    try:
        first.rename(second)
    except OSError:
        aside.rename(second)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
