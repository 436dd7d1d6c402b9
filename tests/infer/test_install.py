"""A package is in its place whole and checked, or everything is as it was."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from node.errors import FetchError, ManifestError, ModelError, RadnodeError
from node.infer import install
from node.infer.fetch import Limits
from node.infer.install import Downloads, install_package
from node.infer.package import load_package
from tests.infer.site import Site
from tests.infer.tiny import MANIFEST, bundle_files, weights, write

LIMITS = Limits(attempts=2, wait_s=0, silence_s=5)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def downloads_to(models: Path) -> Downloads:
    return Downloads(models, limits=LIMITS, sleep=lambda seconds: None)


def putting(files: dict[str, bytes]) -> Callable[[Path], None]:
    return lambda folder: write(folder, files) and None


WITH_MANIFEST = bundle_files() | {"dicom.yaml": MANIFEST.encode()}


def all_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_package_takes_its_place(models: Path) -> None:
    package = install_package("marker", models, putting(WITH_MANIFEST), downloads=downloads_to(models))
    assert package == load_package(models / "marker")
    assert all_files(models / "marker") == WITH_MANIFEST
    assert os.listdir(models) == ["marker"]


def test_manifest_given_comes_before_its_own_and_that_before_the_shipped(models: Path, tmp_path: Path) -> None:
    given, shipped = tmp_path / "given.yaml", tmp_path / "shipped.yaml"
    given.write_text(MANIFEST.replace("title: Marker", "title: Given"))
    shipped.write_text(MANIFEST.replace("title: Marker", "title: Shipped"))

    def title(files: dict[str, bytes], manifest: Path | None) -> str:
        package = install_package(
            "marker", models, putting(files), downloads=downloads_to(models),
            manifest=manifest, fallback=shipped, replace=True,
        )  # fmt: skip
        return package.manifest.title

    assert title(WITH_MANIFEST, given) == "Given"
    assert title(WITH_MANIFEST, None) == "Marker"
    assert title(bundle_files(), None) == "Shipped"


FAILING = [
    ("no manifest", bundle_files(), ModelError, r"comes without a dicom\.yaml, .* --dicom-yaml FILE"),
    ("wrong manifest", bundle_files() | {"dicom.yaml": b"title: x"}, ManifestError, "intended_use: is missing"),
    ("no configuration", {path: content for path, content in WITH_MANIFEST.items() if "inference" not in path},
     ModelError, "found none"),
    ("odd name", WITH_MANIFEST | {"scripts/a\nb.py": b""}, ModelError, "odd characters"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "files", "kind", "sentence"), FAILING, ids=[case[0] for case in FAILING])
@pytest.mark.parametrize("replace", [False, True])
def test_failure_leaves_everything_as_it_was(
    models: Path, *, what: str, files: dict[str, bytes], kind: type[RadnodeError], sentence: str, replace: bool
) -> None:
    if replace:
        install_package("marker", models, putting(WITH_MANIFEST), downloads=downloads_to(models))
    with pytest.raises(kind, match=sentence):
        install_package("marker", models, putting(files), downloads=downloads_to(models), replace=replace)
    assert os.listdir(models) == (["marker"] if replace else []), what
    if replace:
        assert all_files(models / "marker") == WITH_MANIFEST


def test_package_that_is_there_is_replaced_only_when_asked(models: Path) -> None:
    install_package("marker", models, putting(WITH_MANIFEST), downloads=downloads_to(models))
    newer = bundle_files("0.2.0") | {"dicom.yaml": MANIFEST.encode()}
    with pytest.raises(ModelError, match=r"there is already .*marker; --replace puts"):
        install_package("marker", models, putting(newer), downloads=downloads_to(models))
    assert load_package(models / "marker").version == "0.1.0"
    install_package("marker", models, putting(newer), downloads=downloads_to(models), replace=True)
    assert load_package(models / "marker").version == "0.2.0"
    assert os.listdir(models) == ["marker"]


def test_replacing_where_places_cannot_be_exchanged(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, which has no RENAME_EXCHANGE."""
    monkeypatch.setattr(install.ctypes, "CDLL", lambda *arguments, **named: object())
    install_package("marker", models, putting(WITH_MANIFEST), downloads=downloads_to(models))
    newer = bundle_files("0.2.0") | {"dicom.yaml": MANIFEST.encode()}
    install_package("marker", models, putting(newer), downloads=downloads_to(models), replace=True)
    assert load_package(models / "marker").version == "0.2.0"
    assert os.listdir(models) == ["marker"]
    rename = Path.rename

    def fail_in_the_middle(path: Path, to: Path) -> Path:
        if "replaced" not in path.name and "replaced" not in to.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail_in_the_middle)
    with pytest.raises(ModelError, match="cannot be put in its place"):
        install_package("marker", models, putting(WITH_MANIFEST), downloads=downloads_to(models), replace=True)
    monkeypatch.undo()
    assert load_package(models / "marker").version == "0.2.0"
    assert os.listdir(models) == ["marker"]


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b", "", "x" * 65])
def test_name_that_cannot_be_one(models: Path, name: str) -> None:
    with pytest.raises(ModelError, match="cannot be a package's name"):
        install_package(name, models, putting(WITH_MANIFEST), downloads=downloads_to(models))


def test_place_that_is_a_link_is_left_alone(models: Path, tmp_path: Path) -> None:
    models.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (models / "marker").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="is a link or a file; move it away"):
        install_package("marker", models, putting(WITH_MANIFEST), downloads=downloads_to(models), replace=True)
    assert os.listdir(tmp_path / "elsewhere") == []


# -- Large files -------------------------------------------------------------------------------------------------------


def listing(url: str, content: bytes, path: str = "models/model.pt") -> dict[str, bytes]:
    """A bundle without weights, which names them in place of holding them."""
    digest = hashlib.md5(content).hexdigest()
    text = f"large_files:\n- {{path: {path}, url: '{url}', hash_val: {digest}, hash_type: md5}}\n"
    return bundle_files(limit=None) | {"dicom.yaml": MANIFEST.encode(), "large_files.yml": text.encode()}


def test_large_files_are_fetched(models: Path, site: Site) -> None:
    content = weights()
    files = listing(site.put("/model.pt", content, cuts=[100]), content)
    install_package("marker", models, putting(files), downloads=downloads_to(models))
    assert all_files(models / "marker") == files | {"models/model.pt": content}
    assert (models / "marker" / "models" / "model.pt").stat().st_nlink == 1
    assert os.listdir(models) == ["marker"]


def test_large_file_that_is_there_is_checked_and_not_fetched(models: Path, site: Site) -> None:
    content = weights()
    files = listing(site.put("/model.pt", b"never asked for"), content) | {"models/model.pt": content}
    install_package("marker", models, putting(files), downloads=downloads_to(models))
    assert site.asked == []
    with pytest.raises(FetchError, match=r"models/model\.pt of marker is damaged or another file: its md5 is"):
        install_package(
            "marker",
            models,
            putting(files | {"models/model.pt": b"other"}),
            downloads=downloads_to(models),
            replace=True,
        )


def test_large_file_that_is_another_is_refused(models: Path, site: Site) -> None:
    files = listing(site.put("/model.pt", b"other"), weights())
    with pytest.raises(
        FetchError, match=r"its md5 is .*; it is models/model\.pt of marker: where it can be had otherw"
    ):
        install_package("marker", models, putting(files), downloads=downloads_to(models))
    assert os.listdir(models) == []


def test_what_was_fetched_waits_for_the_next_attempt(models: Path, site: Site) -> None:
    """Of two large files the second one fails: the first is not fetched again."""
    content = weights()
    url, missing = site.put("/model.pt", content), f"{site.url}/second.pt"
    files = listing(url, content)
    second = f"- {{path: models/second.pt, url: '{missing}'}}\n".encode()
    files["large_files.yml"] += second
    with pytest.raises(FetchError, match=r"the server answers 404 Not Found; it is models/second\.pt"):
        install_package("marker", models, putting(files), downloads=downloads_to(models))
    assert os.listdir(models) == [".downloads"]
    site.put("/second.pt", b"second")
    install_package("marker", models, putting(files), downloads=downloads_to(models))
    assert [asked.path for asked in site.asked] == ["/model.pt", "/second.pt", "/second.pt"]
    assert (models / "marker" / "models" / "second.pt").read_bytes() == b"second"
    assert os.listdir(models) == ["marker"]


def test_download_that_was_changed_while_it_waited_is_fetched_again(models: Path, site: Site) -> None:
    content = weights()
    files = listing(site.put("/model.pt", content), content)
    files["large_files.yml"] += f"- {{path: models/second.pt, url: '{site.url}/second.pt'}}\n".encode()
    with pytest.raises(FetchError, match="404"):
        install_package("marker", models, putting(files), downloads=downloads_to(models))
    (kept,) = [path for path in (models / ".downloads").iterdir() if path.stat().st_size == len(content)]
    kept.write_bytes(b"changed")
    site.put("/second.pt", b"second")
    install_package("marker", models, putting(files), downloads=downloads_to(models))
    assert (models / "marker" / "models" / "model.pt").read_bytes() == content


def test_downloads_are_forgotten_after_a_week(models: Path) -> None:
    old, new = models / ".downloads" / "old.part", models / ".downloads" / "new.part"
    write(models / ".downloads", {"old.part": b"", "new.part": b""})
    os.utime(old, (0, 0))
    downloads_to(models)
    assert not old.exists()
    assert new.exists()
