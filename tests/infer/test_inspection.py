"""Packages looked through: what does not fit is said, and nothing of them is run."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from node.errors import ModelError
from node.infer.inspection import Remark, inspect_package
from node.infer.package import load_package
from node.infer.weights import count_weights
from tests.infer.test_bundle import CHECKPOINT, RunsOnLoad, configuration
from tests.infer.tiny import MANIFEST, bundle_files, weights, write

Look = Callable[..., list[Remark]]


@pytest.fixture
def look(tmp_path: Path) -> Look:
    """Writes the tiny bundle with changes and inspects it."""

    def inspect(
        files: dict[str, bytes | None] | None = None,
        *,
        manifest: str = MANIFEST,
        config: dict[str, Any] | None = None,
        read: bool = False,
        **metadata: Any,
    ) -> list[Remark]:
        contents: dict[str, bytes | None] = {**bundle_files(**metadata), "dicom.yaml": manifest.encode()}
        if config is not None:
            contents["configs/inference.json"] = json.dumps(config).encode()
        contents |= files or {}
        folder = write(tmp_path / "marker", {path: text for path, text in contents.items() if text is not None})
        return inspect_package(load_package(folder), weights=read)

    return inspect


def said(remarks: list[Remark]) -> list[tuple[str, str]]:
    return [(remark.verdict, remark.says) for remark in remarks]


def test_package_that_fits(look: Look) -> None:
    assert look() == []
    assert said(look(read=True)) == [("good", "models/model.pt: 1 tensors with 1 values, read as weights only")]


def test_nothing_is_run(look: Look) -> None:
    evil = {"_target_": "os.mkdir", "path": "/nonexistent/made"}
    config = configuration(handlers=[CHECKPOINT], imports=["$1/0"], extra=evil, other="$__import__('os').abort()")
    assert look(config=config) == []


def test_ids_that_are_missing(look: Look) -> None:
    config = configuration()
    del config["inferer"], config["evaluator"]
    assert ("wrong", "the bundle's inference configuration has no inferer, evaluator") in said(look(config=config))


OVERRIDES = [
    ("inferer#overlap: 0.5", None),  # an argument that was not written
    ("preprocessing::transforms::0::keys: image", None),
    ("device: cpu", None),
    ("_meta_#version: x", None),
    ("infererr: 1", ("warning", "overrides.infererr: the bundle has no id 'infererr', so this changes nothing")),
    ("infererr#overlap: 1", ("wrong", "overrides.infererr#overlap: the bundle has no 'infererr' to set 'overlap' in")),
    ("preprocessing#transforms#99#keys: 1", ("wrong", "overrides.preprocessing#transforms#99#keys: the bundle has no "
                                             "'preprocessing#transforms#99' to set 'keys' in")),
    ("bundle_root#x: 1", ("wrong", "overrides.bundle_root#x: the bundle has no 'bundle_root' to set 'x' in")),
]  # fmt: skip


@pytest.mark.parametrize(("override", "remark"), OVERRIDES, ids=[case[0] for case in OVERRIDES])
def test_overrides_that_meet_nothing(look: Look, override: str, remark: tuple[str, str] | None) -> None:
    found = look(manifest=f"{MANIFEST}overrides: {{'{override.partition(': ')[0]}': {override.partition(': ')[2]}}}\n")
    assert said(found) == ([remark] if remark else [])


LOAD_PATHS = [
    ({"load_path": "$@bundle_root + '/models/model.pt'"}, {}),
    ({"load_path": "@ckpt"}, {"ckpt": "$@ckpt_dir + '/model.pt'", "ckpt_dir": "$@bundle_root + '/models'"}),
    ({"load_path": "$os.path.join(@bundle_root, 'models', 'model.pt')"}, {}),
    ({"load_path": "$str(Path(@bundle_root) / 'models' / @names#0)"}, {"names": ["model.pt"]}),
    ({"load_path": "$@bundle_root + '/models/' + @modelname"},
     {"modelname": "$'model.pt' if @display#highres else 'low.pt'", "display": {"highres": True}}),
    ({"load_path": "models/model.pt"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("loader", "config"), LOAD_PATHS, ids=[case[0]["load_path"] for case in LOAD_PATHS])
def test_weights_that_are_missing(look: Look, tmp_path: Path, loader: dict[str, str], config: dict[str, Any]) -> None:
    whole = configuration(handlers=[CHECKPOINT | loader], **config)
    assert look(config=whole) == []
    (tmp_path / "marker" / "models" / "model.pt").unlink()
    assert said(look({"models/model.pt": None}, config=whole)) == [("wrong", "the weights models/model.pt are missing")]


@pytest.mark.parametrize("path", ["$torch.hub.get_dir() + '/x'", "@nothing", "@loop", "$@bundle_root + 5", "$(", "%x"])
def test_weights_that_only_running_would_name(look: Look, path: str) -> None:
    (remark,) = look(config=configuration(handlers=[CHECKPOINT | {"load_path": path}], loop="@loop"))
    assert said([remark]) == [("warning", f"which weights are loaded is not clear before it runs: {path}")]


def test_weights_outside_of_the_package(look: Look, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(weights())
    loader = CHECKPOINT | {"load_path": "$@bundle_root + '/../model.pt'"}
    (remark,) = look(config=configuration(handlers=[loader]))
    assert remark.verdict == "wrong"
    assert "outside of the package" in remark.says


def test_licences(look: Look) -> None:
    none = MANIFEST.replace("licence_weights: Apache-2.0", "licence_weights: none")
    assert said(look(manifest=none)) == [("warning", "licence_weights says none, and there is models/model.pt")]
    unknown = MANIFEST.replace("licence_weights: Apache-2.0", "licence_weights: unknown")
    assert said(look(manifest=unknown)) == [
        ("warning", "licence_weights is 'unknown': find out before the model is used")
    ]
    assert said(look({"LICENSE": b"MIT License\n"})) == [
        ("warning", "licence_code is 'Apache-2.0', and LICENSE holds the 'MIT License'")
    ]


LABELS = [
    ({"0": "background", "1": "Marker"}, []),
    ({"0": "Background", "1": "right markers"}, []),
    ({"0": "background", "1": "Left Makrer"}, []),  # as swin_unetr_btcv_segmentation has a "Left Kideny"
    ({"0": "labels: 0 background, 1 marker"}, []),  # one channel: labels already
    ({"0": "background", "1": "spleen"}, ["segments.1 is 'Marker' here and 'spleen' in the bundle"]),
    ({"0": "background", "1": "marker", "2": "liver"}, ["segments lacks 2, which is 'liver' in the bundle"]),
    ({"0": "background", "2": "marker"}, ["segments lacks 2, which is 'marker' in the bundle",
                                          "segments.1 (Marker) is no channel of the bundle"]),
    ({"0": "tumour core", "1": "whole"}, ["the bundle's first channel is 'tumour core', not background: its channels "
                                          "are no label values, so segments could not be compared with them"]),
    (None, []),
    ("nonsense", []),
]  # fmt: skip


@pytest.mark.parametrize(("channels", "sentences"), LABELS)
def test_labels_against_the_channels_of_the_bundle(look: Look, channels: Any, sentences: list[str]) -> None:
    found = look(network_data_format={"outputs": {"pred": {"channel_def": channels}}})
    assert said(found) == [("warning", sentence) for sentence in sentences]


@pytest.mark.parametrize(("laterality", "theirs", "agree"), [
    ("left", "left marker", True), ("right", "left marker", False), ("left", "marker_right", False),
    ("left", "marker", True),
])  # fmt: skip
def test_left_here_and_right_there(look: Look, laterality: str, theirs: str, agree: bool) -> None:
    manifest = MANIFEST.replace("Marker]}", f"Marker], laterality: {laterality}}}")
    channels = {"pred": {"channel_def": {"0": "background", "1": theirs}}}
    found = look(manifest=manifest, network_data_format={"outputs": channels})
    assert len(found) == (0 if agree else 1)


@pytest.mark.parametrize("text", [b"{", b"[]", b"[" * 100_000])
def test_configuration_that_is_no_configuration(look: Look, text: bytes) -> None:
    (remark,) = look({"configs/inference.json": text})
    assert remark.verdict == "wrong"
    assert remark.says.startswith("inference.json ")


# -- Checkpoints -------------------------------------------------------------------------------------------------------


def saved(state: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, **how)
    return file.getvalue()


def safetensors(shape: list[int], size: int, *, cut: int = 0) -> bytes:
    header = json.dumps({"weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}, "__metadata__": {}})
    return struct.pack("<Q", len(header)) + header.encode() + bytes(size - cut)


@pytest.mark.parametrize("old", [False, True])
def test_weights_are_counted(tmp_path: Path, old: bool) -> None:
    state = {"state_dict": {"a": torch.zeros(3, 4), "b": [torch.zeros(2)]}, "epoch": 5}
    path = write(tmp_path, {"model.pt": saved(state, _use_new_zipfile_serialization=not old)}) / "model.pt"
    assert count_weights(path) == (2, 14)
    assert count_weights(write(tmp_path, {"model.pth": safetensors([2, 5], 40)}) / "model.pth") == (1, 10)


class Program(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image


def bad_checkpoints(tmp_path: Path) -> list[tuple[bytes, str]]:
    script = io.BytesIO()
    torch.jit.save(torch.jit.trace(Program(), torch.zeros(1)), script)
    whole = saved({"a": torch.zeros(1000)})
    return [
        (b"", "cannot be loaded"),
        (b"<html>Google Drive: quota exceeded</html>", "holds more than weights|cannot be loaded"),
        (whole[: len(whole) // 2], "cannot be loaded"),
        (saved({"a": torch.tensor([1.0, float("nan")])}), "has values in a that are not finite"),
        (saved({"epoch": 5}), "holds no tensors"),
        (saved({"a": RunsOnLoad(tmp_path / "owned")}), "holds more than weights, and is not loaded"),
        (script.getvalue(), "is a TorchScript program, not a checkpoint"),
        (safetensors([10], 40, cut=4), "its safetensors header stands for .*: it is damaged"),
    ]


@pytest.mark.parametrize("index", range(8))
def test_checkpoint_that_cannot_be_used(tmp_path: Path, look: Look, index: int) -> None:
    content, sentence = bad_checkpoints(tmp_path)[index]
    path = write(tmp_path, {"model.pt": content}) / "model.pt"
    with pytest.raises(ModelError, match=sentence):
        count_weights(path)
    (remark,) = look({"models/model.pt": content}, read=True)
    assert remark.verdict == "wrong"
    assert remark.says.startswith("models/model.pt: ")
    assert not (tmp_path / "owned").exists()


OTHER = """
title: Another packaging
version: "1.0"
intended_use: Tests.
licence_code: MIT
licence_weights: none
inputs: {image: {}}
"""
SEGMENTS = "segments: {1: {name: Marker, type: [99TEST, '1', Marker]}}\n"


@pytest.mark.parametrize(
    ("section", "files", "expected"),
    [
        (
            "adapter: torchscript\nnetwork: {file: m.ts}\n" + SEGMENTS,
            {"m.ts": b"x"},
            ("warning", "the package has no LICENSE file"),
        ),
        (
            "adapter: command\ntask: objects\ncommand: {run: ['{package}/run.py']}\n",
            {"run.py": b"x"},
            ("wrong", "there is no program {folder}/run.py that may be run"),
        ),
        ("adapter: command\ntask: objects\ncommand: {run: [python3]}\n", {}, ("good", "it runs python3")),
    ],
)
def test_packages_of_other_packagings(
    tmp_path: Path, section: str, files: dict[str, bytes], expected: tuple[str, str]
) -> None:
    folder = write(tmp_path / "other", {"dicom.yaml": (OTHER + section).encode(), **files})
    verdict, sentence = expected
    assert (verdict, sentence.replace("{folder}", str(folder))) in said(inspect_package(load_package(folder)))
