"""The packages that are usable right now: read again when a file of theirs changed, never hashed twice for nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from node.errors import ModelError, RadnodeError
from node.infer.package import Package, check_trusted, find_package

Signature = tuple[tuple[str, int, int, int], ...]  # path, size, mtime and ctime of every file


class PackageShelf:
    """Packages by name, from the configured folders and checked against the pinned digests."""

    def __init__(self, paths: Sequence[Path], trusted: Mapping[str, str]):
        self._paths = tuple(paths)
        self._trusted = dict(trusted)
        self._known: dict[str, tuple[Signature, Package | RadnodeError]] = {}

    def get(self, name: str) -> Package:
        """The package of that name; raises the `RadnodeError` that says why it cannot be used."""
        package = self.look_up(name)
        if isinstance(package, RadnodeError):
            raise package
        return package

    def look_up(self, name: str) -> Package | RadnodeError:
        """The package, or why there is none to use."""
        folder = next((path / name for path in self._paths if (path / name).is_dir()), None)
        signature = _sign(folder) if folder else ()
        known = self._known.get(name)
        if known is None or known[0] != signature:
            known = (signature, self._read(name))
            self._known[name] = known
        return known[1]

    def _read(self, name: str) -> Package | RadnodeError:
        try:
            package = find_package(name, self._paths)
            check_trusted(package, self._trusted)
        except RadnodeError as error:
            return error
        except OSError as error:
            return ModelError(f"model package {name!r} cannot be read: {error}")
        return package


def _sign(folder: Path) -> Signature:
    files: list[tuple[str, int, int, int]] = []
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            try:
                status = os.stat(path)
            except OSError:
                continue
            files.append((path, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(sorted(files))
