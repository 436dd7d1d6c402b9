"""Bare networks as TorchScript and torch.export archives: networks that threshold, on volumes of every geometry."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from node.dicom.volume import Image, SliceRef, Volume
from node.errors import InputRefused, ManifestError, ModelError, OutputRefused
from node.infer.model import load_model
from node.infer.network import NetworkModel
from node.infer.package import load_package
from node.infer.results import Labelmap, Scores
from tests.infer.phantoms import AXIAL, GEOMETRIES, dice, scan, soft_scan

MANIFEST = """\
title: Marker
adapter: {adapter}
version: 1.2.0
intended_use: Tests.
licence_code: Apache-2.0
licence_weights: none
inputs: {inputs}
{meanings}
network:
  file: models/{file}
"""
SEGMENTS = 'segments: {1: {name: Marker, type: [99TEST, "1", Marker]}}'
CLASSES = (
    'task: classification\nclasses: {0: {name: No, type: [99TEST, "0", No]}, 1: {name: Yes, type: [99TEST, "1", Yes]}}'
)


class Threshold(nn.Module):
    """Two channels of logits whose softmax crosses a half where the values cross 500."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logit = (image[:, :1] - 500) / 250
        return torch.cat([-logit, logit], dim=1)


class One(nn.Module):
    """One channel: the values themselves."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image[:, :1] * 1.0


class Mean(nn.Module):
    """Two logits for the whole image, from its mean."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        mean = image.flatten(1).mean(dim=1, keepdim=True)
        return torch.cat([-mean, mean], dim=1)


Build = Callable[..., NetworkModel]
WINDOW = (48, 40, 32)


@pytest.fixture(params=["torchscript", "torch-export"])
def build(request: pytest.FixtureRequest, tmp_path: Path) -> Build:
    """Writes a package of the network and loads it: TorchScript, and torch.export of one fixed window."""

    def build_package(
        network: nn.Module | None = None,
        settings: str = "",
        *,
        window: tuple[int, ...] | None = WINDOW,
        inputs: str = "{image: {}}",
        channels: int = 1,
        meanings: str = SEGMENTS,
    ) -> NetworkModel:
        folder = tmp_path / "marker"
        (folder / "models").mkdir(parents=True, exist_ok=True)
        name = "net.ts" if request.param == "torchscript" else "net.pt2"
        network = (network or Threshold()).eval()
        if request.param == "torchscript":
            torch.jit.script(network).save(str(folder / "models" / name))
        else:
            shape = window or (WINDOW if "kind: image" not in inputs else WINDOW[:2])
            example = torch.zeros(1, channels, *shape)
            free = None if window else (dict.fromkeys(range(2, example.ndim), torch.export.Dim.AUTO),)
            torch.export.save(torch.export.export(network, (example,), dynamic_shapes=free), folder / "models" / name)
        text = MANIFEST.format(adapter=request.param, file=name, inputs=inputs, meanings=meanings)
        lines = "".join(f"  {line}\n" for line in settings.splitlines())
        (folder / "dicom.yaml").write_text(text + (f"  roi: {list(window)}\n" if window else "") + lines)
        package = load_package(folder)
        assert package.version == "1.2.0"
        model = load_model(package, "cpu")
        assert isinstance(model, NetworkModel)
        return model

    return build_package


def mask(model: NetworkModel, *volumes: Volume) -> NDArray[np.bool_]:
    result = model.predict(dict(zip(model._manifest.inputs, volumes, strict=True)))
    assert isinstance(result, Labelmap)
    assert result.grid is volumes[0].grid
    assert (result.array.dtype, result.array.shape) == (np.uint16, volumes[0].array.shape)
    return result.array == 1


# -- Geometry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("orientation", "window"), [("RAS", WINDOW), ("LPS", None), ("PIR", None), ("SAL", None)])
def test_mask_lies_where_the_marker_lies(build: Build, orientation: str, window: tuple[int, ...] | None) -> None:
    """Nothing is resampled, so every voxel is right, whatever way the network wants the axes."""
    model = build(settings=f"orientation: {orientation}", window=window)
    for name, (directions, spacing_mm) in GEOMETRIES.items():
        volume, truth = scan(directions, spacing_mm)
        assert np.array_equal(mask(model, volume), truth), name


@pytest.mark.parametrize(
    ("spacing", "back"), [("[1.5, 1.5, 1.5]", "linear"), ("[2, 1.2, 1.5]", "linear"), ("[2, 2, 2]", "nearest")]
)
def test_mask_comes_back_from_another_spacing(build: Build, spacing: str, back: str) -> None:
    model = build(settings=f"spacing_mm: {spacing}\nback: {back}", window=None)
    for name, (directions, spacing_mm) in GEOMETRIES.items():
        volume, truth = soft_scan(directions, spacing_mm)
        assert max(dice(truth, np.flip(truth, axis)) for axis in range(3)) < 0.9
        assert dice(mask(model, volume), truth) >= (0.99 if back == "linear" else 0.9), name


def test_deciding_on_the_inputs_grid_is_sharper(build: Build) -> None:
    volume, truth = soft_scan(*GEOMETRIES["oblique"])
    linear = dice(mask(build(settings="spacing_mm: [3, 3, 3]"), volume), truth)
    nearest = dice(mask(build(settings="spacing_mm: [3, 3, 3]\nback: nearest"), volume), truth)
    assert linear > nearest


def test_network_sees_the_orientation_that_it_wants(build: Build) -> None:
    """A way back that undoes the way there hides both: so where the marker lies before the network is looked at."""
    seen: list[torch.Tensor] = []
    for name, (directions, spacing_mm) in GEOMETRIES.items():
        if name in ("oblique", "any rotation"):
            continue  # their axes are near no anatomical one
        volume, _ = scan(directions, spacing_mm)
        for orientation, ends in (("RAS", "RAS"), ("LIA", "LIA")):
            model = build(settings=f"orientation: {orientation}", window=None)
            network = model._network
            assert network is not None
            model._network = replace(network, run=lambda image, run=network.run: (seen.append(image), run(image))[1])
            mask(model, volume)
            image = seen.pop()[0, 0].numpy()
            # The marker's corner, where its bars meet, is its right, anterior, inferior end.
            centre = [np.average(np.arange(size), weights=image.sum(axis=tuple({0, 1, 2} - {axis})))
                      for axis, size in enumerate(image.shape)]  # fmt: skip
            where = [np.flatnonzero(image.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
            for axis, end in enumerate(ends):
                middle = (where[axis][0] + where[axis][-1]) / 2
                assert (centre[axis] > middle) == (end in "RAI"), (name, orientation, axis)


@pytest.mark.parametrize("size", ["[64, 64, 64]", "[100, 90, 120]", "[80, 50, 130]"])
def test_what_was_cut_is_background_and_what_was_padded_is_gone(build: Build, size: str) -> None:
    model = build(settings=f"size: {size}")
    volume, truth = scan(GEOMETRIES["coronal"][0])
    marked = mask(model, volume)
    assert not (marked & ~truth).any()
    assert marked.any()
    if size == "[100, 90, 120]":
        assert np.array_equal(marked, truth)


def test_resizing_is_undone(build: Build) -> None:
    volume, truth = soft_scan(GEOMETRIES["sagittal"][0], GEOMETRIES["sagittal"][1])
    assert dice(mask(build(settings="size: [96, 96, 96]\nfit: resize"), volume), truth) >= 0.99


def test_slice_by_slice(build: Build) -> None:
    model = build(settings="dimensions: 2\norientation: LPS", window=(32, 24))
    for name in ("axial", "coronal", "descending", "anisotropic"):
        volume, truth = scan(*GEOMETRIES[name])
        assert np.array_equal(mask(model, volume), truth), name


# -- Values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("[{clip: [100, 600]}, {scale: [100, 600]}]", lambda x: (np.clip(x, 100, 600) - 100) / 500),
        ("[{scale: [0, 1000], to: [-1, 1]}]", lambda x: x / 500 - 1),
        ("[{normalise: all}]", lambda x: (x - x.mean()) / x.std()),
        ("[{normalise: nonzero}]", lambda x: np.where(x == 0, 0, (x - x[x != 0].mean()) / x[x != 0].std())),
        ("[{mean: [500], standard_deviation: [200]}]", lambda x: (x - 500) / 200),
        ("[{clip_percentiles: [5, 90]}]", lambda x: np.clip(x, *np.percentile(x, [5, 90]))),
        ("[{scale_percentiles: [0, 100]}]", lambda x: (x - x.min()) / (x.max() - x.min())),
        ("[{scale_percentiles: [2, 98]}]", lambda x: (x - np.percentile(x, 2)) / np.ptp(np.percentile(x, [2, 98]))),
    ],
)
def test_intensity_is_what_the_manifest_says(build: Build, steps: str, expected: Callable[[Any], Any]) -> None:
    """The network returns what it sees, and a threshold at a half shows it, voxel by voxel."""
    volume, _ = scan(AXIAL)
    values = np.random.default_rng(4).normal(500, 200, volume.array.shape).astype(np.float32)
    values[:5] = 0
    model = build(One(), f"intensity: {steps}\nactivation: none\ndecision: threshold\nthreshold: 0.5")
    wanted = expected(values.astype(np.float64))
    clear = np.abs(wanted - 0.5) > 1e-3
    assert np.array_equal(mask(model, replace(volume, array=values))[clear], (wanted > 0.5)[clear])


class Labels(nn.Module):
    """Four channels of probabilities, highest by turns as values rise; 0.2 everywhere in the first."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([image * 0 + 0.2] + [(image - 300 * k).abs().neg().add(150) / 150 for k in (1, 2, 3)], dim=1)


@pytest.mark.parametrize(("decision", "shift"), [("argmax", 0), ("threshold", 1)])
@pytest.mark.parametrize("spacing", ["", "\nspacing_mm: [1, 1, 2.5]"])
def test_label_is_the_channel_that_wins(build: Build, decision: str, shift: int, spacing: str) -> None:
    """With an argmax channel 0 is the background; with a threshold channel 0 is label 1."""
    meanings = "segments: {" + ", ".join(f'{k}: {{name: S{k}, type: [99TEST, "{k}", S]}}' for k in range(1, 5)) + "}"
    model = build(Labels(), f"activation: none\ndecision: {decision}\nthreshold: 0.3{spacing}", meanings=meanings)
    volume, _ = scan(AXIAL)
    array = np.zeros_like(volume.array)
    for level in (1, 2, 3):
        array[10 * level : 10 * level + 8, 10:40, 10:40] = 300 * level
    result = model.predict({"image": replace(volume, array=array)})
    assert isinstance(result, Labelmap)
    for level in (1, 2, 3):
        assert (result.array[10 * level + 3, 15:35, 15:35] == level + shift).all()
    assert not result.array[:, 45:].any()


def test_inputs_are_the_channels_in_the_manifests_order(build: Build) -> None:
    volume, truth = scan(AXIAL)
    empty = replace(volume, array=volume.array * 0)
    model = build(inputs="{t1: {}, t2: {}}", channels=2)
    assert np.array_equal(mask(model, volume, empty), truth)
    assert not mask(model, empty, volume).any()
    moved = scan(GEOMETRIES["coronal"][0])[0]
    with pytest.raises(InputRefused, match="different grids: set onto_first"):
        model.predict({"t1": volume, "t2": moved})


# -- Classification and planar images ----------------------------------------------------------------------------------


def picture(array: NDArray[Any]) -> Image:
    frames = tuple(SliceRef("1.2", "1.3", index + 1) for index in range(array.shape[0]))
    return Image(array, frames, "1.4", "1.5", "US")


def test_scores_of_a_volume(build: Build) -> None:
    volume, truth = scan(AXIAL)
    settings = "size: [48, 40, 32]\nfit: resize\nintensity: [{scale: [0, 1000]}]"
    result = build(Mean(), settings, window=None, meanings=CLASSES).predict({"image": volume})
    assert isinstance(result, Scores)
    assert result.exclusive
    ((score,),) = (result.values,)
    assert score[1] == pytest.approx(1 / (1 + np.exp(-2 * truth.mean())), abs=0.01)
    assert score[0] + score[1] == pytest.approx(1)


def test_scores_of_each_frame(build: Build) -> None:
    array = np.stack([np.full((30, 50, 3), value, np.uint8) for value in (0, 51, 255)])
    settings = "dimensions: 2\nsize: [32, 32]\nfit: resize\nrgb: true\nintensity: [{scale: [0, 255]}]"
    model = build(Mean(), settings, window=None, inputs="{image: {kind: image}}", channels=3, meanings=CLASSES)
    result = model.predict({"image": picture(array)})
    assert isinstance(result, Scores)
    expected = [1 / (1 + np.exp(-2 * mean)) for mean in (0, 0.2, 1)]
    assert [scores[1] for scores in result.values] == pytest.approx(expected, abs=1e-4)
    grey = model.predict({"image": picture(array[..., 0])})
    assert isinstance(grey, Scores)
    assert grey.values == result.values


@pytest.mark.parametrize("settings", ["", "\ntranspose: true", "\nsize: [64, 72]", "\nsize: [60, 100]\nfit: resize"])
def test_label_map_of_each_frame(build: Build, settings: str) -> None:
    array = np.zeros((2, 30, 50), np.float32)
    array[0, 5:14, 20:45] = 1000
    array[1, 20:26, 3:9] = 1000
    network = build(settings="dimensions: 2" + settings, window=(16, 24), inputs="{image: {kind: image}}")
    result = network.predict({"image": picture(array)})
    assert isinstance(result, Labelmap)
    assert result.grid is None
    assert result.array.shape == array.shape
    assert dice(result.array == 1, array > 500) >= (1 if "resize" not in settings else 0.97)


def test_colour_where_grey_is_wanted_is_refused(build: Build) -> None:
    model = build(settings="dimensions: 2", window=(16, 24), inputs="{image: {kind: image}}")
    with pytest.raises(InputRefused, match="the image is in colour"):
        model.predict({"image": picture(np.zeros((1, 20, 20, 3), np.uint8))})


class Constant(nn.Module):
    """Whatever is asked, this many logits."""

    def __init__(self, count: int, value: float):
        super().__init__()
        self.count, self.value = count, value

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.flatten(1).mean(dim=1, keepdim=True).repeat(1, self.count) * 0 + self.value


@pytest.mark.parametrize(
    ("network", "activation", "sentence"),
    [
        (Constant(1, 1.0), "softmax", "one channel, of which a softmax is always 1"),
        (Constant(2, float("nan")), "softmax", "not finite"),
        (Constant(2, 1.5), "none", "1.5 as a probability"),
        (One(), "sigmoid", "expected one number for each class"),
    ],
)
def test_scores_that_are_none_are_refused(build: Build, network: nn.Module, activation: str, sentence: str) -> None:
    volume, _ = scan(AXIAL)
    settings = f"activation: {activation}\nsize: [48, 40, 32]"
    model = build(network, settings, window=None, meanings=CLASSES)
    with pytest.raises(OutputRefused, match=sentence):
        model.predict({"image": volume})


def test_one_channel_is_class_1(build: Build) -> None:
    model = build(Constant(1, 0.0), "activation: sigmoid\nsize: [48, 40, 32]", window=None, meanings=CLASSES)
    result = model.predict({"image": scan(AXIAL)[0]})
    assert isinstance(result, Scores)
    assert result.values == ({0: 0.5, 1: 0.5},)
    assert not result.exclusive


# -- What goes wrong ---------------------------------------------------------------------------------------------------


class Cut(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([image, image], dim=1)[:, :, ::2, ::2, ::2]


class NotFinite(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([image, image / 0], dim=1)


class Two(nn.Module):
    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return image + 1, image + 2


@pytest.mark.parametrize(
    ("network", "settings", "error", "sentence"),
    [
        (Cut(), "", OutputRefused, "returned a map of shape (1, 2, 24, 20, 16)"),
        (NotFinite(), "", OutputRefused, "not finite"),
        (One(), "activation: none", OutputRefused, "one channel, which an argmax says nothing of"),
        (One(), "", OutputRefused, "one channel, of which a softmax is always 1"),
        (One(), "activation: sigmoid\ndecision: threshold\nthreshold: 0.4", OutputRefused, "marked every voxel"),
        (Two(), "", (OutputRefused, ModelError), "tuple"),
    ],
)
def test_output_that_is_no_result_is_refused(
    build: Build, network: nn.Module, settings: str, error: Any, sentence: str
) -> None:
    window = None if isinstance(network, Two) else WINDOW
    model = build(network, settings, window=window)
    with pytest.raises(error) as refusal:
        model.predict({"image": scan(GEOMETRIES["coronal"][0])[0]})
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


class Picky(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert image.shape[1] == 2, "two channels are needed"
        return image


def test_network_that_raises_is_a_model_error_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    torch.jit.script(Picky()).save(str(tmp_path / "models" / "net.ts"))
    text = MANIFEST.format(adapter="torchscript", file="net.ts", inputs="{image: {}}", meanings=SEGMENTS)
    (tmp_path / "dicom.yaml").write_text(text)
    model = load_model(load_package(tmp_path), "cpu")
    assert isinstance(model, NetworkModel)
    with pytest.raises(
        ModelError, match="could not run: Error: RuntimeError: AssertionError: two channels are needed"
    ) as failure:
        model.predict({"image": scan(AXIAL)[0]})
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("adapter", ["torchscript", "torch-export"])
def test_file_that_is_no_network(tmp_path: Path, adapter: str) -> None:
    (tmp_path / "models").mkdir()
    text = MANIFEST.format(adapter=adapter, file="net", inputs="{image: {}}", meanings=SEGMENTS)
    (tmp_path / "dicom.yaml").write_text(text)
    with pytest.raises(ModelError, match="models/net is missing"):
        load_package(tmp_path)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "models" / "net")
    with pytest.raises(ModelError, match=r"could not read net as (TorchScript|a torch.export archive)"):
        load_model(load_package(tmp_path), "cpu")
    (tmp_path / "models" / "net").write_bytes(b"rubbish")
    with pytest.raises(ModelError, match=r"could not read net as (TorchScript|a torch.export archive)"):
        load_model(load_package(tmp_path), "cpu")


# -- torch.export archives ---------------------------------------------------------------------------------------------


def exported(
    folder: Path, *, settings: str = "  roi: [48, 40, 32]\n", change: Callable[[str, bytes], bytes] | None = None
) -> NetworkModel:
    """A package of a network of fixed shape, whose archive `change` may rewrite file by file."""
    (folder / "models").mkdir(parents=True)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Threshold().eval(), (torch.zeros(1, 1, *WINDOW),)), buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(folder / "models" / "net.pt2", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(name, content) if change else content)
    text = MANIFEST.format(adapter="torch-export", file="net.pt2", inputs="{image: {}}", meanings=SEGMENTS)
    (folder / "dicom.yaml").write_text(text + settings)
    model = load_model(load_package(folder), "cpu")
    assert isinstance(model, NetworkModel)
    return model


@pytest.mark.parametrize(
    "settings", ["", "  roi: [48, 48, 48]\n", "  size: [48, 40, 40]\n", "  dimensions: 2\n  roi: [48, 40]\n"]
)
def test_window_of_another_shape_than_the_exported_one_is_refused(tmp_path: Path, settings: str) -> None:
    volume, truth = scan(AXIAL)
    assert np.array_equal(mask(exported(tmp_path / "good"), volume), truth)
    with pytest.raises(ModelError) as refusal:
        exported(tmp_path / "other", settings=settings)
    expected = "takes 3 dimensions" if "dimensions" in settings else "[48, 40, 32] only; set network.roi to that"
    assert expected in str(refusal.value)


class RunsOnLoad:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_pickles_in_an_exported_archive_run_nothing(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(((RunsOnLoad(tmp_path / "owned"),), {}), buffer)

    def poison(name: str, content: bytes) -> bytes:
        return buffer.getvalue() if "sample_inputs" in name else content

    with pytest.raises(ModelError, match=r"sample_inputs/model\.pt in the \.pt2 archive holds more than tensors"):
        exported(tmp_path / "poisoned", change=poison)
    assert not (tmp_path / "owned").exists()
    with suppress(Exception):  # once the pickle has run, torch may dislike what it made
        torch.export.load(tmp_path / "poisoned" / "models" / "net.pt2")
    assert (tmp_path / "owned").exists(), "the archive was harmless"


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("torch.ops.aten.div.Tensor", "torch.serialization.os.system", "calls 'torch.serialization.os.system'"),
        ("torch.ops.aten.div.Tensor", "#unknown:thing", "calls '#unknown:thing'"),
        ('"guards_code": []', "\"guards_code\": [\"__import__('os').mkdir('owned')\"]", "which is no arithmetic"),
        ('{"as_int": 48}', '{"as_expr": {"expr_str": "exit()", "hint": null}}', "computes a size by 'exit()'"),
        ('"forward_arg_names": ["image"]', '"forward_arg_names": ["image=exit()"]', "which is no identifier"),
    ],
)
def test_graph_of_an_exported_archive_names_operators_and_arithmetic_only(
    tmp_path: Path, before: str, after: str, sentence: str
) -> None:
    def rewrite(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        text = json.dumps(json.loads(content))
        assert before in text
        return text.replace(before, after).encode()

    with pytest.raises(ModelError) as refusal:
        exported(tmp_path / "changed", change=rewrite)
    assert sentence in str(refusal.value)


def test_pickled_weights_in_an_exported_archive_are_refused(tmp_path: Path) -> None:
    config = {
        "config": {"weight": {"path_name": "weight_0", "is_param": True, "use_pickle": True, "tensor_meta": None}}
    }

    def rewrite(name: str, content: bytes) -> bytes:
        return json.dumps(config).encode() if name.endswith("model_weights_config.json") else content

    with pytest.raises(ModelError, match="holds pickled tensors"):
        exported(tmp_path / "changed", change=rewrite)


# -- The manifest ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("adapter: torchscript", "adapter: torchscripts", "expected 'monai-bundle', 'torchscript', 'torch-export'"),
        ("version: 1.2.0\n", "", "version is missing"),
        ("network:\n  file: models/net.ts\n", "", "network is missing: the adapter torchscript needs it"),
        ("adapter: torchscript", "adapter: nnunet", "network means nothing for the adapter nnunet"),
        ("file: models/net.ts", "file: ../net.ts", "expected a path inside the package"),
        ("file: models/net.ts", "file: /etc/passwd", "expected a path inside the package"),
        ("file: models/net.ts", "file: models/net.ts\n  orientation: RLS", "expected one of L R, A P and I S each"),
        ("file: models/net.ts", "file: models/net.ts\n  roi: [96, 96]", "found roi with 2 numbers; expected 3"),
        ("file: models/net.ts", "file: models/net.ts\n  intensity: [{clip: [5, 1]}]", "the smaller number first"),
        ("file: models/net.ts", "file: models/net.ts\n  intensity: [{clip: [0, 1], normalise: all}]",
         "found clip and normalise; expected one of"),
        ("file: models/net.ts", "file: models/net.ts\n  intensity: [{}]", "found no step; expected one of"),
        ("file: models/net.ts", "file: models/net.ts\n  intensity: [{clip_percentiles: [0, 101]}]", "from 0 to 100"),
        ("file: models/net.ts", "file: models/net.ts\n  intensity: [{mean: [1]}]", "stand together"),
        ("version: 1.2.0", "version: 1.2.0\noverrides: {a: 1}", "overrides: of bundles only"),
        ("{image: {}}", "{image: {kind: image}}", "needs network.dimensions: 2"),
        (SEGMENTS, "task: detection\nclasses: {0: {name: N, type: [99T, '0', N]}}", "has no task detection"),
    ],
)  # fmt: skip
def test_manifest_that_is_wrong_says_where(tmp_path: Path, before: str, after: str, sentence: str) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "net.ts").touch()
    text = MANIFEST.format(adapter="torchscript", file="net.ts", inputs="{image: {}}", meanings=SEGMENTS)
    assert before in text
    (tmp_path / "dicom.yaml").write_text(text)
    load_package(tmp_path)
    (tmp_path / "dicom.yaml").write_text(text.replace(before, after))
    with pytest.raises(ManifestError) as refusal:
        load_package(tmp_path)
    assert sentence in str(refusal.value)
