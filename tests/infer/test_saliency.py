"""What a score came from: the map points to the disk that a classifier scores, and to nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from node.dicom.regrid import make_regular
from node.dicom.volume import Image, SliceRef, Volume
from node.errors import ModelError, OutputRefused
from node.infer.manifest import Manifest
from node.infer.network import NetworkModel
from node.infer.regular import saliency_as_sent
from node.infer.results import Prediction, Scores
from node.infer.saliency import Explained, Saliency, explain_scores
from tests.infer.phantoms import GEOMETRIES, scan
from tests.infer.test_bundle import manifest
from tests.infer.test_regular import tilted

CLASSES = {
    "task": "classification",
    "segments": {},
    "classes": {0: {"name": "No disk", "type": ["99T", "0", "No"]}, 1: {"name": "Disk", "type": ["99T", "1", "Yes"]}},
}


class BrightDisk(torch.nn.Module):
    """The probability that something as bright as a disk, and as large, is there: the best match of a filter."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found = torch.nn.functional.avg_pool2d(image[:, :1], 9, stride=1, padding=4).flatten(1).amax(dim=1)
        logit = (found - 500) / 100
        return torch.stack([-logit, logit], dim=1)


def disk(rows: int = 96, columns: int = 120, centre: tuple[int, int] = (30, 84), radius: int = 9) -> Image:
    """A bright disk on noise, in one frame."""
    row, column = np.ogrid[:rows, :columns]
    array = np.random.default_rng(2).uniform(0, 100, (1, rows, columns)).astype(np.float32)
    array[0, (row - centre[0]) ** 2 + (column - centre[1]) ** 2 <= radius**2] = 900
    return Image(array, (SliceRef("1.2", "1.3"),), "1.4", "1.5", "DX", (0.2, 0.2))


def about(**parts: Any) -> Manifest:
    return manifest(**(CLASSES | {"inputs": {"image": {"kind": "image"}}} | parts))


def network(folder: Path) -> NetworkModel:
    torch.jit.script(BrightDisk().eval()).save(str(folder / "net.ts"))
    return NetworkModel(
        folder,
        about(adapter="torchscript", version="1", network={"file": "net.ts", "dimensions": 2, "activation": "softmax"}),
        "cpu",
    )


class Counting:
    """A classifier in Python: `judge` gives the probability of class 1 of an array; it counts."""

    def __init__(self, judge: Any, exclusive: bool = True):
        self.judge, self.exclusive, self.runs = judge, exclusive, 0

    def predict(self, inputs: Mapping[str, Volume | Image]) -> Prediction:
        self.runs += 1
        source = inputs["image"]
        values = [self.judge(source.array)] if isinstance(source, Volume) else [self.judge(one) for one in source.array]
        return Scores(tuple({0: 1 - value, 1: value} for value in values), self.exclusive)

    def close(self) -> None:
        """Nothing is held."""


def scored(model: Any, inputs: Mapping[str, Volume | Image]) -> Scores:
    prediction = model.predict(inputs)
    assert isinstance(prediction, Scores)
    return prediction


def centre_of(drops: np.ndarray) -> np.ndarray:
    """The middle of what is above half of the largest drop, in voxels."""
    return np.argwhere(drops > drops.max() / 2).mean(axis=0)


@pytest.mark.parametrize("centre", [(30, 84), (60, 25), (80, 100)])
@pytest.mark.parametrize("fill", ["local mean", "background"])
def test_it_points_to_the_disk_that_a_network_scores(tmp_path: Path, centre: tuple[int, int], fill: str) -> None:
    model, image = network(tmp_path), disk(centre=centre)
    prediction = scored(model, {"image": image})
    assert prediction.values[0][1] > 0.99
    settings = {"patches": 8, "fill": fill}
    saliency = explain_scores(model, {"image": image}, prediction, about(saliency=settings))
    (part,) = saliency.parts
    assert (part.label, part.frame, saliency.patches, saliency.runs) == (1, 0, (8, 8), 64)
    assert part.drops.shape == (1, 96, 120)
    assert part.drops.max() > 0.5
    row, column = centre_of(part.drops[0])
    assert np.hypot(row - centre[0], column - centre[1]) < 9, "within the disk"
    far = np.hypot(*np.ogrid[-centre[0] : 96 - centre[0], -centre[1] : 120 - centre[1]]) > 45
    assert np.abs(part.drops[0][far]).max() < 0.01, "nothing else matters"


def test_it_points_to_the_place_in_a_volume() -> None:
    volume, truth = scan(*GEOMETRIES["oblique"])
    weights = truth / truth.sum()
    model = Counting(lambda array: float(np.clip((array * weights).sum() / 1000, 0, 1)))
    prediction = scored(model, {"image": volume})
    settings = {"patches": 6, "runs_max": 300}
    seen: list[tuple[int, int]] = []
    saliency = explain_scores(
        model,
        {"image": volume},
        prediction,
        manifest(**CLASSES, saliency=settings),
        progress=lambda done, total: seen.append((done, total)),
    )
    (part,) = saliency.parts
    assert saliency.patches == (6, 6, 6)
    assert seen == [(number, 216) for number in range(1, 217)]
    assert model.runs == 217
    assert part.frame is None
    assert part.drops.shape == volume.array.shape
    assert np.linalg.norm(centre_of(part.drops) - np.argwhere(truth).mean(axis=0)) < 6
    assert part.drops[truth].mean() > 5 * abs(part.drops[~truth].mean())


def test_covering_what_speaks_against_a_class_is_below_zero() -> None:
    image = disk(centre=(20, 30))
    model = Counting(lambda array: float(np.clip(0.9 - array[:40, :60].mean() / 1000, 0, 1)))
    (part,) = explain_scores(model, {"image": image}, scored(model, {"image": image}), about()).parts
    assert part.drops.min() < -0.05
    row, column = np.unravel_index(part.drops[0].argmin(), part.drops[0].shape)
    assert np.hypot(row - 20, column - 30) < 12


def test_the_runs_are_bounded_and_what_was_changed_is_put_back() -> None:
    volume, _ = scan(*GEOMETRIES["axial"])
    before = volume.array.copy()
    model = Counting(lambda array: float(array.max() / 2000))
    settings = {"patches": 32, "runs_max": 50}
    saliency = explain_scores(
        model, {"image": volume}, scored(model, {"image": volume}), manifest(**CLASSES, saliency=settings)
    )
    assert model.runs - 1 == saliency.runs <= 50
    assert any("saliency.runs_max" in remark for remark in saliency.remarks)
    assert np.array_equal(volume.array, before)


def test_the_same_twice() -> None:
    image = disk()
    model = Counting(lambda array: float(array[20:40, 70:100].mean() / 1000))
    prediction = scored(model, {"image": image})
    first, second = (explain_scores(model, {"image": image}, prediction, about()) for _ in range(2))
    assert np.array_equal(first.parts[0].drops, second.parts[0].drops)


def test_of_many_frames_the_most_certain_are_explained_each_by_its_own_class() -> None:
    image = disk()
    frames = tuple(SliceRef("1.2", "1.3", number) for number in range(1, 5))
    array = np.concatenate([image.array * scale for scale in (0.1, 0.95, 0.5, 1.0)])
    clip = Image(array, frames, "1.4", "1.5", "US")
    model = Counting(lambda array: float(np.clip(array[25:35, 79:89].mean() / 1000, 0, 1)))
    prediction = scored(model, {"image": clip})  # 0.09, 0.86, 0.45, 0.90 of class 1
    saliency = explain_scores(model, {"image": clip}, prediction, about(saliency={"frames": 3, "patches": 4}))
    assert [(part.frame, part.label) for part in saliency.parts] == [(0, 0), (1, 1), (3, 1)]
    assert [part.drops.shape for part in saliency.parts] == [(1, 96, 120)] * 3
    assert saliency.runs == 3 * 16


def test_channels_are_covered_together_and_other_inputs_left() -> None:
    image, other = disk(), disk(rows=40, columns=40, centre=(20, 20))
    shown: list[Mapping[str, Volume | Image]] = []

    class Both(Counting):
        def predict(self, inputs: Mapping[str, Volume | Image]) -> Prediction:
            shown.append(inputs)
            assert np.array_equal(inputs["other"].array, other.array)
            assert np.array_equal(inputs["image"].array, inputs["twin"].array)
            return super().predict(inputs)

    inputs = {"image": image, "twin": disk(), "other": other}
    model = Both(lambda array: float(array.max() / 1000))
    explain_scores(model, inputs, scored(model, inputs), about(saliency={"patches": 2}))
    assert len(shown) == 5


def test_a_colour_image() -> None:
    grey = disk().array
    array = np.repeat(grey[..., None] / 4, 3, axis=3).astype(np.uint8)
    image = Image(array, (SliceRef("1.2", "1.3"),), "1.4", "1.5", "XC")
    model = Counting(lambda array: float(array[25:35, 79:89].mean() / 255))
    (part,) = explain_scores(model, {"image": image}, scored(model, {"image": image}), about()).parts
    assert part.drops.shape == (1, 96, 120)
    assert np.hypot(*(centre_of(part.drops[0]) - (30, 84))) < 9


def test_when_its_time_is_over_it_says_what_to_do() -> None:
    model = Counting(lambda array: 0.7)
    prediction = scored(model, {"image": disk()})
    with pytest.raises(ModelError, match=r"given up after 1e-09 s, \d of 64 runs: set saliency.patches"):
        explain_scores(model, {"image": disk()}, prediction, about(saliency={"timeout_s": 1e-9}))


def test_another_answer_than_scores_is_refused() -> None:
    class Fickle(Counting):
        def predict(self, inputs: Mapping[str, Volume | Image]) -> Prediction:
            return Scores(({0: 1.0},)) if self.runs else super().predict(inputs)

    model = Fickle(lambda array: 0.7)
    prediction = scored(model, {"image": disk()})
    with pytest.raises(OutputRefused, match="another kind of answer"):
        explain_scores(model, {"image": disk()}, prediction, about())


def test_what_the_caller_raises_ends_it() -> None:
    class Lost(Exception):
        pass

    def lose(done: int, total: int) -> None:
        if done == 3:
            raise Lost

    model = Counting(lambda array: 0.7)
    with pytest.raises(Lost):
        explain_scores(model, {"image": disk()}, scored(model, {"image": disk()}), about(), progress=lose)
    assert model.runs == 4


def test_only_classifiers_have_one() -> None:
    with pytest.raises(ValidationError, match="saliency means nothing for a segmentation"):
        manifest(saliency={})


def test_tilted_slices_get_it_back_where_it_was(shared_data: Path) -> None:
    source = tilted(shared_data)
    seen = make_regular(source)
    drops = np.full(seen.array.shape, -0.25, np.float32)
    saliency = Saliency((Explained(1, 0.9, None, drops),), (2, 2, 2), "local mean", 8)
    (part,) = saliency_as_sent(saliency, seen, source).parts
    assert part.drops.shape == source.array.shape
    assert np.allclose(part.drops[1:-1, 2:-2, 2:-2], -0.25, atol=1e-6)
