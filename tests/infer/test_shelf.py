"""The packages that are usable right now: read again when a file changes, never for nothing, never untrusted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from node.errors import ManifestError, ModelError
from node.infer import shelf as shelf_module
from node.infer.package import load_package
from node.infer.shelf import PackageShelf
from tests.infer.test_package import MANIFEST


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "ct_lung"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "metadata.json").write_text(json.dumps({"version": "0.1.0"}))
    (folder / "configs" / "inference.json").write_text("{}")
    (folder / "dicom.yaml").write_text(MANIFEST)
    return folder


def test_package_is_read_once_until_a_file_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    find = shelf_module.find_package
    monkeypatch.setattr(shelf_module, "find_package", lambda name, paths: read.append(name) or find(name, paths))
    shelf = PackageShelf([folder.parent], {})
    first = shelf.get("ct_lung")
    assert first == load_package(folder)
    assert shelf.get("ct_lung") is first
    assert read == ["ct_lung"]
    (folder / "configs" / "inference.json").write_text("[]")
    second = shelf.get("ct_lung")
    assert second.digest != first.digest
    assert second.digest == load_package(folder).digest
    (folder / "added.py").touch()
    assert shelf.get("ct_lung").digest != second.digest
    (folder / "added.py").unlink()
    assert shelf.get("ct_lung").digest == second.digest
    assert len(read) == 4


def test_change_that_keeps_size_and_time_is_seen(folder: Path) -> None:
    """Its ctime tells it, which no one can set."""
    shelf = PackageShelf([folder.parent], {})
    path = folder / "configs" / "inference.json"
    first, status = shelf.get("ct_lung"), path.stat()
    path.write_text("[]")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert shelf.get("ct_lung").digest != first.digest


def test_only_the_pinned_digest_is_used(folder: Path) -> None:
    digest = load_package(folder).digest
    shelf = PackageShelf([folder.parent], {"ct_lung": digest})
    assert shelf.get("ct_lung").digest == digest
    (folder / "scripts.py").write_text("pass")
    with pytest.raises(ModelError, match=r"is not the one that models\.trusted pins"):
        shelf.get("ct_lung")
    (folder / "scripts.py").unlink()
    assert shelf.get("ct_lung").digest == digest


def test_what_is_wrong_is_said_and_forgotten_once_it_is_mended(folder: Path) -> None:
    shelf = PackageShelf([folder.parent], {})
    with pytest.raises(ModelError, match="no model package 'absent'; there are ct_lung in"):
        shelf.get("absent")
    (folder / "dicom.yaml").write_text(MANIFEST.replace("slices_min: 20", "slices_min: 0"))
    with pytest.raises(ManifestError, match="slices_min"):
        shelf.get("ct_lung")
    assert isinstance(shelf.look_up("ct_lung"), ManifestError)
    (folder / "dicom.yaml").write_text(MANIFEST)
    assert shelf.get("ct_lung").name == "ct_lung"
    folder.rename(folder.with_name("mr_lung"))
    with pytest.raises(ModelError, match="no model package 'ct_lung'"):
        shelf.get("ct_lung")
    assert shelf.get("mr_lung").name == "mr_lung"
