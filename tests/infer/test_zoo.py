"""The zoo's index and the lists of large files, as they are and as they may be."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from node.errors import FetchError
from node.infer.fetch import Checksum
from node.infer.zoo import LargeFile, find_bundle, read_large_files

URL = "https://zoo.example/model_info.json"


def entry(name: str, version: str) -> dict[str, str]:
    return {"checksum": "0" * 39 + version[-1], "source": f"https://zoo.example/{name}_v{version}.zip"}


INDEX = {
    f"{name}_v{version}": entry(name, version)
    for name, version in [("spleen_ct_segmentation", "0.5.9"), ("spleen_ct_segmentation", "0.5.10"),
                          ("spleen_ct_segmentation", "0.1.0"), ("lung_nodule_ct_detection", "0.6.8")]
}  # fmt: skip


def find(wanted: str, index: Any = INDEX) -> Any:
    return find_bundle(wanted, URL, lambda url: json.dumps(index))


def test_newest_version_by_number_not_by_text() -> None:
    found = find("spleen_ct_segmentation")
    assert (found.version, found.url) == ("0.5.10", "https://zoo.example/spleen_ct_segmentation_v0.5.10.zip")
    assert found.checksum == Checksum("sha1", "0" * 40)


@pytest.mark.parametrize("wanted", ["spleen_ct_segmentation@0.5.9", "spleen_ct_segmentation@v0.5.9"])
def test_version_that_was_asked_for(wanted: str) -> None:
    assert find(wanted).version == "0.5.9"


UNKNOWN = [
    ("spleen_ct_segmentatoin", "there is no bundle 'spleen_ct_segmentatoin' in the model zoo https://zoo.example/"
     "model_info.json: did you mean spleen_ct_segmentation?"),
    ("xyz", "it has lung_nodule_ct_detection, spleen_ct_segmentation"),
    ("spleen_ct_segmentation@9.9.9", "has no version '9.9.9' of spleen_ct_segmentation; it has 0.1.0, 0.5.9, 0.5.10"),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "sentence"), UNKNOWN)
def test_what_the_zoo_has_not(wanted: str, sentence: str) -> None:
    with pytest.raises(FetchError) as refusal:
        find(wanted)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize("text", ["<html>", "[]", "", "[" * 100_000])
def test_what_is_no_index(text: str) -> None:
    with pytest.raises(FetchError, match=r"is not the index of a model zoo; see models\.zoo"):
        find_bundle("spleen_ct_segmentation", URL, lambda url: text)


@pytest.mark.parametrize("wrong", [{"checksum": "abc", "source": "https://x/y"}, {"source": "https://x/y"},
                                   {"checksum": "0" * 40, "source": 5}])  # fmt: skip
def test_entry_that_cannot_be_checked_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(FetchError, match=r"no source or no checksum|is no checksum"):
        find("spleen", {"spleen_v1.0.0": wrong})


def test_large_files_as_the_zoo_lists_them(tmp_path: Path) -> None:
    (tmp_path / "large_files.yml").write_text(
        """\
large_files:
- path: "models/model.pt"
  url: "https://developer.example/model.pt"
  hash_val: "870e677b782a5184cbc48db1456b78e8"
  hash_type: "md5"
- path: "models/search_code.pt"
  url: "https://drive.google.com/file/d/1rmIW3Cnv_Ss6raAIfB5WDXywJFmU_BKa/view?usp=sharing"
  hash_val: ""
  hash_type: ""
"""
    )
    assert read_large_files(tmp_path) == [
        LargeFile(
            PurePosixPath("models/model.pt"),
            "https://developer.example/model.pt",
            Checksum("md5", "870e677b782a5184cbc48db1456b78e8"),
        ),
        LargeFile(
            PurePosixPath("models/search_code.pt"),
            "https://drive.usercontent.google.com/download"
            "?id=1rmIW3Cnv_Ss6raAIfB5WDXywJFmU_BKa&export=download&confirm=t",
            None,
        ),
    ]


def test_without_large_files(tmp_path: Path) -> None:
    assert read_large_files(tmp_path) == []


WRONG = [
    ("large_files: 5", "has no list large_files"),
    ("- a", "has no list large_files"),
    ("large_files: [{path: a}]", "has an item without path or url"),
    ("large_files: [5]", "has an item without path or url"),
    ("large_files: [{path: ../../etc/cron.d/a, url: 'https://x/'}]", "leads out of the bundle"),
    ("large_files: [{path: /etc/passwd, url: 'https://x/'}]", "leads out of the bundle"),
    ("large_files: [{path: a, url: 'https://x/', hash_val: 12}]", "is no checksum"),
    ("large_files: [!!python/object/apply:os.system ['true']]", "cannot be read as YAML"),
]


@pytest.mark.parametrize(("text", "sentence"), WRONG)
def test_list_of_large_files_that_is_wrong(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "large_files.yml").write_text(text)
    with pytest.raises(FetchError, match=sentence):
        read_large_files(tmp_path)
