"""Model packages on disk: a packaged model plus our `dicom.yaml`, found, read and pinned without running any of it.

Nothing here imports torch or monai or evaluates a bundle's configuration: what runs models does that, after this module
has said what the package is and that it is the one that an administrator trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from node.errors import ManifestError, ModelError
from node.infer.manifest import Manifest
from node.infer.packagings import Adapter, NnUNet
from node.yamlfile import load_yaml

MANIFEST = "dicom.yaml"
METADATA = "configs/metadata.json"
INFERENCE = ("configs/inference.json", "configs/inference.yaml", "configs/inference.yml")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
_METADATA_MAX = 10_000_000  # bytes
_HASHES_MAX = 100_000_000  # bytes
_CHANGES_TOLD = 10  # files in one sentence


@dataclass(frozen=True)
class Package:
    """A model package as it lies on disk."""

    name: str  # the folder's name, which configurations use
    folder: Path
    version: str  # of configs/metadata.json, or of dicom.yaml where there is none
    manifest: Manifest
    digest: str  # of every file, see `digest_package`


def load_package(folder: Path) -> Package:
    """The package in this folder; reads every file for the digest (about a second per GB).

    Raises `ManifestError` with every mistake of `dicom.yaml`, `ModelError` for anything else that is wrong.
    """
    name = folder.absolute().name
    if not folder.is_dir():
        raise ModelError(f"model package {name}: {folder} is not a folder")
    if not is_package_name(name):
        raise ModelError(
            f"model package {name!r} in {folder.absolute().parent}: rename it to 1 to 64 letters, digits, "
            "'_', '-' or '.', a letter or digit first"
        )
    if not (folder / MANIFEST).is_file():
        raise ModelError(f"model package {name}: {folder / MANIFEST} is missing; docs/models.md describes it")
    manifest = load_yaml(folder / MANIFEST, Manifest, ManifestError)
    version = _check_files(name, folder, manifest)
    return Package(name, folder, version, manifest, digest_package(folder))


def is_package_name(name: str) -> bool:
    """Whether a package may be called so."""
    return _NAME.fullmatch(name) is not None


def digest_package(folder: Path) -> str:
    """SHA-256 over every file's relative path and content, as 64 hexadecimal digits: that of `list_hashes`.

    An administrator can compute it without radnode (docs/models.md). Raises `ModelError` for what would make the digest
    ambiguous or incomplete: linked folders, links out of the package, files that are not regular, odd names.
    """
    return hashlib.sha256(list_hashes(folder).encode()).hexdigest()


def list_hashes(folder: Path) -> str:
    """What `sha256sum` prints for all files of a package, in the order of their paths' UTF-8 bytes.

    Left out is any file or folder called `__pycache__` or beginning with `.git`; whatever runs the package must
    therefore not read `__pycache__` either. Raises as `digest_package`.
    """
    lines = []
    for path in sorted(package_files(folder), key=os.fsencode):
        try:
            with (folder / path).open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as reason:
            raise ModelError(f"model package {folder.name}: {path} cannot be read ({reason.strerror})") from None
        lines.append(f"{content}  {path}\n")
    return "".join(lines)


def package_size(folder: Path) -> int:
    """Bytes of all files that count."""
    return sum((folder / path).stat().st_size for path in package_files(folder))


def discover_packages(paths: Iterable[Path]) -> tuple[list[Package], list[ModelError | ManifestError]]:
    """Every package in these folders by name, and what is wrong with those that cannot be loaded.

    Of two packages with one name the first path's counts, as in `find_package`.
    """
    packages: dict[str, Package] = {}
    errors: list[ModelError | ManifestError] = []
    for path in paths:
        if not path.is_dir():
            errors.append(ModelError(f"there is no folder {path} to look for models in; see models.path"))
            continue
        for folder in _package_folders(path):
            try:
                if folder.name in packages:
                    first = packages[folder.name].folder
                    raise ModelError(f"model package {folder.name}: {folder} is never used, as {first} comes first")
                packages[folder.name] = load_package(folder)
            except (ModelError, ManifestError) as error:
                errors.append(error)
    return [packages[name] for name in sorted(packages)], errors


def find_package(name: str, paths: Sequence[Path]) -> Package:
    """The package of this name in the first of these folders that has it; `ModelError` says what there is instead."""
    if is_package_name(name):  # a name, never a way out of the folders
        for path in paths:
            if (path / name).is_dir():
                return load_package(path / name)
    names = sorted({folder.name for path in paths if path.is_dir() for folder in _package_folders(path)})
    there = f"there are {', '.join(names)}" if names else "there are no packages"
    raise ModelError(f"no model package {name!r}; {there} in {', '.join(str(path) for path in paths) or 'no folder'}")


def check_trusted(package: Package, trusted: Mapping[str, str]) -> None:
    """Raise `ModelError` when an administrator pinned another digest for this package; unpinned ones pass.

    Where the hashes of the pinned files were kept (`keep_hashes`), the error says which files are others now.
    """
    expected = trusted.get(package.name)
    if expected is None or package.digest == expected:
        return
    changes = changes_since(package, expected)
    which = f": {', '.join(changes)}" if changes else ""
    raise ModelError(
        f"model package {package.name} in {package.folder} is not the one that models.trusted pins{which} (expected "
        f"the digest {expected}, found {package.digest}); restore its files, or pin the new digest once you trust it: "
        f"radnode models pin {package.name}"
    )


def hashes_file(folder: Path) -> Path:
    """Where the hashes of the files of a pinned package are kept: beside the packages, not among what they cover."""
    return folder.parent / ".trusted" / f"{folder.name}.sha256"


def keep_hashes(package: Package) -> None:
    """Write the hashes of the package's files as they are now, for `check_trusted`; `sha256sum -c` reads them too.

    The file needs no protection of its own: it counts only while its own SHA-256 is the pinned digest. Raises
    `ModelError` when it cannot be written, or when a file changed since the package was read.
    """
    listed = list_hashes(package.folder).encode()
    if hashlib.sha256(listed).hexdigest() != package.digest:
        raise ModelError(f"model package {package.name} changed while it was read; try again")
    path = hashes_file(package.folder)
    try:
        path.parent.mkdir(exist_ok=True)
        partly = path.with_suffix(f".{os.getpid()}")
        partly.write_bytes(listed)
        partly.replace(path)
    except OSError as reason:
        raise ModelError(
            f"the hashes of {package.name} cannot be kept in {path} ({reason.strerror}): a change of the package would "
            "be noticed, but not which file it was"
        ) from None


def changes_since(package: Package, expected: str) -> list[str]:
    """Which files are not as they were when the digest `expected` was pinned: `changed models/model.pt`.

    Empty when no hashes were kept, or other ones than `expected` stands for.
    """
    try:
        with hashes_file(package.folder).open("rb") as file:
            kept = file.read(_HASHES_MAX)
    except OSError:
        return []
    if hashlib.sha256(kept).hexdigest() != expected:
        return []
    before, now = _by_path(kept.decode()), _by_path(list_hashes(package.folder))
    changes = [
        *(f"changed {path}" for path in now if path in before and before[path] != now[path]),
        *(f"added {path}" for path in now if path not in before),
        *(f"missing {path}" for path in before if path not in now),
    ]
    more = len(changes) - _CHANGES_TOLD
    return changes if more <= 0 else [*changes[:_CHANGES_TOLD], f"and {more} more"]


def _by_path(listed: str) -> dict[str, str]:
    """Path to hash, of what `list_hashes` gives."""
    return {line[66:]: line[:64] for line in listed.splitlines()}


def _package_folders(path: Path) -> Iterator[Path]:
    """The subfolders that are, or mean to be, packages."""
    for folder in sorted(path.iterdir()):
        if (folder / MANIFEST).is_file() or (folder / METADATA).is_file():
            yield folder


def package_files(folder: Path) -> Iterator[str]:
    """The relative paths, with '/', of the files that count; raises as `digest_package`."""

    def fail(reason: OSError) -> None:
        raise ModelError(f"model package {folder.name}: {reason.filename} cannot be read ({reason.strerror})") from None

    root = folder.resolve()
    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not _is_left_out(name)]
        for name in [*folders, *(name for name in files if not _is_left_out(name))]:
            path = Path(place, name)
            relative = path.relative_to(folder).as_posix()
            if not relative.isprintable() or "\\" in relative:
                raise ModelError(
                    f"model package {folder.name}: the name {relative!r} has odd characters; rename the file"
                )
            if path.is_dir():
                if path.is_symlink():
                    raise ModelError(
                        f"model package {folder.name}: {relative} is a link to a folder; copy the folder, so that the "
                        "digest covers its files"
                    )
            elif path.is_file():
                if path.is_symlink() and not path.resolve().is_relative_to(root):
                    raise ModelError(
                        f"model package {folder.name}: {relative} is a link that leads out of the package; copy the "
                        "file in its place, so that the package holds all that its model may read"
                    )
                yield relative
            else:
                raise ModelError(f"model package {folder.name}: {relative} is a broken link or not a file; remove it")


def _is_left_out(name: str) -> bool:
    return name == "__pycache__" or name.startswith(".git")


def _check_files(name: str, folder: Path, manifest: Manifest) -> str:
    """The package's version; `ModelError` where a file is missing that its adapter cannot do without."""
    if manifest.adapter is Adapter.MONAI_BUNDLE:
        inference = [path for path in INFERENCE if (folder / path).is_file()]
        if len(inference) != 1:
            found = " and ".join(inference) or "none"
            raise ModelError(f"model package {name}: expected one of {', '.join(INFERENCE)} in {folder}, found {found}")
        return _read_version(name, folder)
    wanted: list[str] = []
    if manifest.network is not None:
        wanted = [manifest.network.file]
    elif manifest.adapter is Adapter.NNUNET:
        trained = manifest.nnunet or NnUNet()
        files = ["plans.json", "dataset.json", *(f"fold_{fold}/{trained.checkpoint}" for fold in trained.folds)]
        wanted = [(PurePosixPath(trained.folder) / file).as_posix() for file in files]
    missing = [path for path in wanted if not (folder / path).is_file()]
    if missing:
        raise ModelError(f"model package {name}: {', '.join(missing)} is missing in {folder}")
    assert manifest.version is not None  # the manifest's own check
    return manifest.version.strip()


def _read_version(name: str, folder: Path) -> str:
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = json.loads(file.read(_METADATA_MAX))
    except OSError as reason:
        raise ModelError(f"model package {name}: {path} cannot be read ({reason.strerror})") from None
    except (ValueError, RecursionError) as reason:
        raise ModelError(f"model package {name}: {path} is not JSON ({reason})") from None
    version = metadata.get("version") if isinstance(metadata, dict) else None
    if not isinstance(version, str) or not version.strip() or not version.isprintable():
        raise ModelError(
            f"model package {name}: {path} gives no version; expected a text such as \"0.1.0\" as 'version'"
        )
    return version.strip()
