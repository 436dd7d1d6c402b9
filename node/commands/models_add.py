"""`radnode models add`: a package from a folder, a zip file, the web or the MONAI Model Zoo, checked and pinned."""

from __future__ import annotations

import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from node.commands.models import pin, print_remarks
from node.commands.packages import config_at_hand, shipped_models
from node.config import MODEL_ZOO, Config
from node.errors import FetchError, ModelError
from node.infer.fetch import Checksum, Progress, shown
from node.infer.inspection import inspect_package
from node.infer.install import Downloads, check_place, install_package
from node.infer.package import MANIFEST, Package
from node.infer.unpack import copy_folder, unpack
from node.infer.zoo import find_bundle


@dataclass(frozen=True)
class Source:
    """Where a bundle comes from."""

    name: str  # by which radnode may know what it is
    put: Callable[[Path, Downloads], None]  # writes the bundle into a folder that it makes


def add_model(options: Namespace) -> int:
    """Get the package, look at it, put it in its place, and pin its digest."""
    config = config_at_hand(options.config)
    models: Path = options.into or (config.models.paths[0] if config else Path("models"))
    source = find_source(options.source, config, Checksum.of(options.sha256) if options.sha256 else None)
    name = options.name or source.name
    check_place(models, name, replace=options.replace)  # before anything is downloaded
    listed = config is not None and models.resolve() in [path.resolve() for path in config.models.paths]
    if config is not None and listed:
        _check_shadow(name, models, config)
    if options.dicom_yaml is not None and not options.dicom_yaml.is_file():
        raise ModelError(f"there is no {options.dicom_yaml}")
    with Transfers() as transfers:
        downloads = Downloads(models, progress=transfers.begin)
        package = install_package(
            name,
            models,
            lambda folder: source.put(folder, downloads),
            downloads=downloads,
            manifest=options.dicom_yaml,
            fallback=shipped_manifest(source.name),
            replace=options.replace,
        )
    _tell(package)
    if not options.pin:
        print(f"Not pinned, as asked; later: radnode models pin {package.name}")
        if config is not None and listed and config.models.trusted.get(name) not in (None, package.digest):
            print(f"models.trusted of {config.path} pins another {name}: this one is refused until that is changed")
    elif config is None:
        print(f"There is no configuration to pin it in; the digest is {package.digest}")
    elif not listed:
        print(f"{models} is not on models.path of {config.path}: the package is not found by name there, nor pinned")
    else:
        pin(package, config)
    return 0


def find_source(text: str, config: Config | None, sha256: Checksum | None) -> Source:
    """What a person meant: an address, a folder, a file, else a bundle of the zoo. Raises `FetchError`."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        file = unquote(urlsplit(text).path).rstrip("/").rpartition("/")[2]
        return Source(_name_of(file), lambda folder, downloads: _put_download(folder, downloads, text, sha256, file))
    path = Path(text)
    if path.is_dir():
        if sha256 is not None:
            raise FetchError("--sha256 is the checksum of a zip file; a folder has none")
        return Source(path.absolute().name, lambda folder, downloads: copy_folder(path, folder))
    if path.is_file():
        return Source(_name_of(path.name), lambda folder, downloads: _put_file(folder, path, sha256))
    if "/" in text or text.endswith(".zip"):
        raise FetchError(f"there is no {text}")
    bundle = find_bundle(text, config.models.zoo if config else MODEL_ZOO)
    print(f"{bundle.name} {bundle.version} of the model zoo, {shown(bundle.url)}")

    def put(folder: Path, downloads: Downloads) -> None:
        # The zoo's SHA-1 finds damage. What is trusted is the digest that is pinned after it, or --sha256.
        _put_download(folder, downloads, bundle.url, bundle.checksum, f"{bundle.name}_v{bundle.version}.zip", sha256)

    return Source(bundle.name, put)


def shipped_manifest(name: str) -> Path | None:
    """The `dicom.yaml` that came with radnode for the zoo's bundle of this name."""
    if "/" in name:
        return None
    places = (models / "zoo" / name / MANIFEST for models in shipped_models())
    return next((place for place in places if place.is_file()), None)


def _put_download(
    folder: Path, downloads: Downloads, url: str, checksum: Checksum | None, name: str, sha256: Checksum | None = None
) -> None:
    file = downloads.get(url, checksum, name)
    try:
        if sha256 is not None:
            sha256.check(file, shown(url))
        unpack(file, folder)
    except FetchError as error:
        downloads.reject(file)
        raise FetchError(str(error).replace(file.name, shown(url))) from None


def _put_file(folder: Path, path: Path, sha256: Checksum | None) -> None:
    if sha256 is not None:
        sha256.check(path, str(path))
    unpack(path, folder)


def _name_of(file: str) -> str:
    """`spleen_ct_segmentation` of `spleen_ct_segmentation_v0.5.9.zip`."""
    return re.sub(r"[_-]v?\d+(\.\d+)+$", "", file.removesuffix(".zip"))


def _check_shadow(name: str, models: Path, config: Config) -> None:
    """Of two packages with one name the first path's runs: a second one would never, or would hide the first."""
    for path in config.models.paths:
        if path.resolve() != models.resolve() and (path / name).is_dir():
            raise ModelError(f"there is already {path / name}, and a model's name stands once: see --name")


def _tell(package: Package) -> None:
    manifest = package.manifest
    print(f"\n{package.name} {package.version} is in {package.folder}: {manifest.title}")
    print(f"  intended use:           {' '.join(manifest.intended_use.split())}")
    print(f"  licence of the code:    {manifest.licence_code}")
    print(f"  licence of the weights: {manifest.licence_weights}")
    print_remarks(inspect_package(package))
    print()


class Transfers(AbstractContextManager["Transfers"]):
    """A bar for each file on a terminal, a line now and then elsewhere; on standard error."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
        self._bar = (
            Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Transfers:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *details: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, name: str) -> Progress:
        """What is told the bytes of a file as they come."""
        if self._bar is None:
            return _Lines(name)
        bar, task = self._bar, self._bar.add_task(name, total=None)
        return lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """A line when a file begins, every ten seconds, and when it is whole."""

    def __init__(self, name: str):
        self._name = name
        self._told = 0.0

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self._told >= 10 or done == total:
            self._told = now
            of = f" of {total / 1e6:,.1f}" if total else ""
            print(f"{self._name}: {done / 1e6:,.1f}{of} MB", file=sys.stderr)
