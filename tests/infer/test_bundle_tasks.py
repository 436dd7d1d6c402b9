"""Bundles of every task: several inputs, turned and resampled ones, planar images, boxes, scores and points."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from node.dicom.volume import Grid, Image, SliceRef, Volume
from node.errors import ModelError, OutputRefused
from node.infer.results import Boxes, Labelmap, Landmarks, Scores
from node.infer.shims import mend_component, mend_expression, mended_libraries
from tests.infer.test_bundle import (
    AXIAL,
    GEOMETRIES,
    Build,
    configuration,
    dice,
    load,  # noqa: F401 - the fixture
    scan,
)

CLASS = {"name": "Marker", "type": ["99TEST", "1", "Marker"]}


def of_classes(task: str, count: int = 1, **parts: Any) -> dict[str, Any]:
    return {"task": task, "segments": {}, "classes": dict.fromkeys(range(count), CLASS), **parts}


def planar(array: np.ndarray, **attributes: str) -> Image:
    frames = tuple(SliceRef("1.2", "1.2.1", number + 1) for number in range(len(array)))
    return Image(array, frames, "1.3", "1.4", "XC", attributes=attributes)


def image_configuration(**parts: Any) -> dict[str, Any]:
    """A bundle that reads pictures with PIL's axes: columns first, channels last."""
    config = configuration(**parts)
    config["preprocessing"]["transforms"] = [
        {"_target_": "LoadImaged", "keys": "image", "reader": "PILReader", "converter": "$lambda image: image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.float32"},
    ]
    return config


# -- Volumes -----------------------------------------------------------------------------------------------------------


def test_inputs_become_channels_in_the_manifests_order(load: Build) -> None:  # noqa: F811
    network = """
import torch


class Threshold(torch.nn.Module):
    def forward(self, image):
        assert image.shape[1] == 2, image.shape
        return ((image[:, :1] > 500) & (image[:, 1:] < 500)).to(torch.float32)
"""
    config = configuration(orient=False)
    config["preprocessing"]["transforms"].pop(1)  # several volumes are channels already, as BraTS' bundle has it
    inputs = {"flair": {}, "t1": {}}
    model = load(config, network=network, inputs=inputs, data={"image": ["t1", "flair"]})
    volume, truth = scan(*GEOMETRIES["oblique"])
    nothing = Volume(volume.array * 0, volume.grid, volume.slices, "1.3", "1.4", "MR")
    found = model.predict({"t1": volume, "flair": nothing})
    assert isinstance(found, Labelmap)
    assert found.input == "flair"
    assert np.array_equal(found.array == 1, truth)
    assert not model.predict({"t1": nothing, "flair": volume}).array.any()
    elsewhere = scan(AXIAL)[0]
    with pytest.raises(ModelError, match="lie on different grids: see onto_first"):
        model.predict({"t1": volume, "flair": elsewhere})


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR"])
def test_a_volume_is_turned_before_the_bundle_and_back_after(
    load: Build,  # noqa: F811
    geometry: str,
    orientation: str,
) -> None:
    """A bundle without a step of its own for orientation: its network sees the axes that the manifest says."""
    network = """
import nibabel
import torch


class Threshold(torch.nn.Module):
    seen = []

    def forward(self, image):
        self.seen.append("".join(nibabel.aff2axcodes(image.affine[0] if image.affine.ndim == 3 else image.affine)))
        return (image > 500).to(torch.float32)
"""
    model = load(
        configuration(orient=False, invert=False), network=network, inputs={"image": {"orientation": orientation}}
    )
    volume, truth = scan(*GEOMETRIES[geometry])
    assert np.array_equal(model.predict({"image": volume}).array == 1, truth)
    assert model._evaluator.network.seen == [orientation]


def test_a_volume_is_resampled_before_the_bundle_and_back_after(load: Build) -> None:  # noqa: F811
    inputs = {"image": {"orientation": "RAS", "spacing_mm": [1.0, 1.0, 1.0]}}
    model = load(configuration(orient=False, invert=False), inputs=inputs)
    for name, (directions, spacing_mm) in GEOMETRIES.items():
        volume, truth = scan(directions, spacing_mm)
        assert dice(model.predict({"image": volume}).array == 1, truth) > 0.9, name


def test_labels_that_lie_elsewhere_are_no_result(load: Build) -> None:  # noqa: F811
    network = """
import torch


class Threshold(torch.nn.Module):
    def forward(self, image):
        labels = (image > 500).to(torch.float32)
        labels.affine = labels.affine + 10000 * torch.tensor([[0, 0, 0, 1.0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
        return labels
"""
    model = load(configuration(orient=False, invert=False), network=network)
    with pytest.raises(OutputRefused, match="lie outside the image"):
        model.predict({"image": scan(AXIAL)[0]})


def test_values_that_mean_background_are_background(load: Build) -> None:  # noqa: F811
    network = """
import torch


class Threshold(torch.nn.Module):
    def forward(self, image):
        return torch.where(image > 500, 1.0, 255.0)
"""
    volume, truth = scan(AXIAL)
    with pytest.raises(OutputRefused, match=r"labels \[255\]"):
        load(configuration(), network=network).predict({"image": volume})
    found = load(configuration(), network=network, background=[255]).predict({"image": volume})
    assert np.array_equal(found.array == 1, truth)


def test_a_kind_of_input_that_the_model_does_not_take(load: Build) -> None:  # noqa: F811
    with pytest.raises(ModelError, match="takes volumes as 'image'"):
        load().predict({"image": planar(np.zeros((1, 8, 8), np.float32))})


# -- Detection ---------------------------------------------------------------------------------------------------------

DETECTOR = """
import torch


class Threshold(torch.nn.Module):
    def forward(self, image):
        return image


class Inferer:
    def __call__(self, inputs, network, *args, **kwargs):
        found = []
        for image in inputs:
            where = torch.nonzero(torch.as_tensor(image)[0] > 500).float()
            box = torch.cat([where.min(0).values, where.max(0).values])
            none = torch.tensor([1.0, 1, 1, 2, 2, 2])
            found.append({"box": torch.stack([none, box]), "label": torch.zeros(2), "label_scores": SCORES})
        return found


SCORES = torch.tensor([0.3, 0.8])
"""


def detection() -> dict[str, Any]:
    """As lung_nodule_ct_detection is written: the boxes are finished in a handler that saves them."""
    config = configuration()
    config["inferer"] = {"_target_": "scripts.net.Inferer"}
    config["postprocessing"] = {"_target_": "Compose", "transforms": [{"_target_": "Lambda", "func": "$lambda x: x"}]}
    config["evaluator"] |= {"postprocessing": None, "decollate": False}
    config["handlers"].append(
        {
            "_target_": "MetricsSaver",
            "save_dir": "@output_dir",
            "output_transform": "$lambda x: [@postprocessing({**x['pred'][0], 'image': x['image'][0]})]",
        }
    )
    return config


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_boxes_stand_where_the_object_stands(load: Build, geometry: str) -> None:  # noqa: F811
    model = load(detection(), network=DETECTOR, **of_classes("detection", boxes={"space": "image", "mode": "xyzxyz"}))
    volume, truth = scan(*GEOMETRIES[geometry])
    boxes = model.predict({"image": volume})
    assert isinstance(boxes, Boxes)
    assert [round(box.score, 6) for box in boxes.boxes] == [0.8]  # the other one is below score_min
    # In an oblique image the box stands oblique too, and the one along the patient's axes encloses it.
    low, high = (np.array(side) for side in (boxes.boxes[0].low_lps, boxes.boxes[0].high_lps))
    indices = np.stack(np.nonzero(truth)[::-1], axis=1)
    corners = np.array(np.meshgrid(*zip(indices.min(0), indices.max(0), strict=True))).reshape(3, 8).T
    expected = volume.grid.to_lps(corners)
    assert np.abs(low - expected.min(0)).max() < 1e-3
    assert np.abs(high - expected.max(0)).max() < 1e-3


def test_boxes_that_are_none(load: Build) -> None:  # noqa: F811
    keys = {"space": "image", "mode": "xyzxyz"}
    volume = scan(AXIAL)[0]
    for scores, sentence in (("float('nan')", "not finite"), ("0.8, 0.7", "2 boxes, 2 classes and 3 scores")):
        network = DETECTOR.replace("[0.3, 0.8]", f"[0.3, {scores}]")
        with pytest.raises(OutputRefused, match=sentence):
            load(detection(), network=network, **of_classes("detection", boxes=keys)).predict({"image": volume})
    network = DETECTOR.replace("torch.zeros(2)", "torch.tensor([0, 7])")
    with pytest.raises(OutputRefused, match=r"classes \[7\]"):
        load(detection(), network=network, **of_classes("detection", boxes=keys)).predict({"image": volume})
    model = load(detection(), network=DETECTOR, **of_classes("detection", boxes={"box": "boxes"}))
    with pytest.raises(ModelError, match=r"no 'boxes' .* see boxes in"):
        model.predict({"image": volume})


# -- Planar images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [False, True], ids=["grey", "colour"])
def test_labels_of_every_frame_of_an_image(load: Build, colour: bool) -> None:  # noqa: F811
    network = """
import torch


class Threshold(torch.nn.Module):
    def forward(self, image):
        return (image[:, :1] > 100).to(torch.float32)
"""
    array = np.zeros((2, 30, 40, 3) if colour else (2, 30, 40), np.uint8 if colour else np.float32)
    array[0, 3:9, 5:25] = 200
    array[1, 20:, 0] = 200
    config = image_configuration(invert=False)
    model = load(config, network=network, inputs={"image": {"kind": "image"}})
    found = model.predict({"image": planar(array)})
    assert isinstance(found, Labelmap)
    assert found.grid is None
    assert np.array_equal(found.array == 1, (array if not colour else array[..., 0]) > 0)


def test_a_grey_image_as_a_picture_in_its_window(load: Build) -> None:  # noqa: F811
    network = """
import torch


class Threshold(torch.nn.Module):
    seen = []

    def forward(self, image):
        self.seen.append(image.as_tensor().clone())
        return image[:, :1].mean(dim=(2, 3)) / 255
"""
    model = load(
        image_configuration(invert=False),
        network=network,
        inputs={"image": {"kind": "image", "rgb": True}},
        **of_classes("classification", exclusive=False),
    )
    array = np.linspace(-1000, 1000, 12 * 10).reshape(1, 12, 10).astype(np.float32)
    model.predict({"image": planar(array, WindowCenter="0", WindowWidth="400")})
    model.predict({"image": planar(array)})
    windowed, whole = model._evaluator.network.seen
    assert windowed.shape == (1, 3, 10, 12)
    expected = np.clip(np.round((array[0].T + 200) * 255 / 400), 0, 255)
    assert all(np.array_equal(channel, expected) for channel in windowed[0].numpy())
    assert (float(whole.min()), float(whole.max())) == (0.0, 255.0)


def test_scores_of_frames(load: Build) -> None:  # noqa: F811
    network = """
import torch


class Threshold(torch.nn.Module):
    def forward(self, image):
        bright = image.as_tensor().mean()
        return torch.stack([bright, -bright, bright * 0])[None]
"""
    array = np.stack([np.full((8, 8), 2.0), np.full((8, 8), -3.0)]).astype(np.float32)
    parts = of_classes("classification", 3, inputs={"image": {"kind": "image"}})
    model = load(image_configuration(invert=False), network=network, **parts, activation="softmax")
    scores = model.predict({"image": planar(array)})
    assert isinstance(scores, Scores)
    for value, found in zip((2.0, -3.0), scores.values, strict=True):
        expected = torch.tensor([value, -value, 0.0]).softmax(0)
        assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-6)
    model = load(image_configuration(invert=False), network=network, **parts)
    with pytest.raises(OutputRefused, match="are no probabilities: see activation"):
        model.predict({"image": planar(array)})
    short = network.replace(", bright * 0", "")
    with pytest.raises(OutputRefused, match="returned 2 scores; classes go up to 2"):
        load(image_configuration(invert=False), network=short, **parts).predict({"image": planar(array)})


def test_one_score_of_two_classes(load: Build) -> None:  # noqa: F811
    network = """
import torch


class Threshold(torch.nn.Module):
    def forward(self, image):
        return torch.full((1, 1), 0.25)
"""
    parts = of_classes("classification", 2, inputs={"image": {"kind": "image"}})
    scores = load(image_configuration(invert=False), network=network, **parts).predict(
        {"image": planar(np.zeros((1, 8, 8), np.float32))}
    )
    assert scores.values == ({0: 0.75, 1: 0.25},)


def test_landmarks_over_time_of_a_bundle_whose_item_is_no_dictionary(load: Build) -> None:  # noqa: F811
    """As valve_landmarks is written: array transforms, (x, y, 1, time), no decollation."""
    network = """
import torch


class Threshold(torch.nn.Module):
    def forward(self, image):
        points = []
        for frame in image[0].as_tensor():
            place = torch.nonzero(frame > 0.5)[0].float()
            points.append(torch.stack([place, place + 1000], dim=1))
        return torch.stack(points)[None]
"""
    config = configuration(invert=False)
    config["preprocessing"]["transforms"] = [
        {"_target_": "LoadImage", "image_only": True},
        {"_target_": "Transpose", "indices": [3, 0, 1, 2]},
        {"_target_": "SqueezeDim", "dim": -1},
    ]
    config["evaluator"] |= {"decollate": False, "prepare_batch": "$lambda batch, *_: (batch, ())"}
    config["postprocessing"]["transforms"] = [{"_target_": "SqueezeDimd", "keys": "pred", "dim": 0}]
    parts = of_classes("landmarks", 2, inputs={"image": {"kind": "image"}})
    array = np.zeros((3, 20, 32), np.float32)
    places = [(3, 30), (12, 4), (19, 0)]
    for frame, (row, column) in enumerate(places):
        array[frame, row, column] = 1
    found = load(config, network=network, **parts).predict({"image": planar(array)})
    near = load(config, network=network, **parts, absent_within_px=13).predict({"image": planar(array)})
    assert isinstance(near, Landmarks)
    assert [point.frame for point in near.points] == [0, 2]  # row 12, column 4 is nearer to the corner
    assert isinstance(found, Landmarks)
    assert [(point.label, point.frame, point.row, point.column) for point in found.points] == [
        (0, frame, row, column) for frame, (row, column) in enumerate(places)
    ]


def test_a_bundle_that_loads_nothing_gets_the_array(load: Build) -> None:  # noqa: F811
    """As pathology_tumor_detection is written: its dataset cuts patches out of a slide."""
    network = """
import torch


class Threshold(torch.nn.Module):
    def forward(self, image):
        assert image.shape == (1, 3, 10, 12), image.shape
        return image.mean(dim=(1, 2, 3))[:, None] / 255
"""
    config = image_configuration(invert=False)
    config["preprocessing"]["transforms"] = [{"_target_": "CastToTyped", "keys": "image", "dtype": "float32"}]
    parts = of_classes("classification", exclusive=False, inputs={"image": {"kind": "image"}})
    scores = load(config, network=network, **parts).predict({"image": planar(np.full((1, 12, 10, 3), 51, np.uint8))})
    assert scores.values[0][0] == pytest.approx(0.2)


# -- What the zoo was written for --------------------------------------------------------------------------------------


def test_arguments_that_went_and_downloads() -> None:
    swin = {"_target_": "SwinUNETR", "img_size": 96, "in_channels": 1}
    mend_component(swin)
    assert swin == {"_target_": "SwinUNETR", "in_channels": 1}
    pretrained = {"_target_": "TorchVisionFCModel", "pretrained": True}
    mend_component(pretrained)
    assert pretrained["pretrained"] is False
    own = {"_target_": "scripts.net.Net", "img_size": 96, "pretrained": True}
    mend_component(own)
    assert own == {"_target_": "scripts.net.Net", "img_size": 96, "pretrained": True}


def test_a_device_that_is_wired_in() -> None:
    cpu = torch.device("cpu")
    assert mend_expression("$torch.load(@p, map_location=torch.device('cuda'))", cpu).endswith("torch.device('cpu'))")
    assert mend_expression('$torch.device("cuda")', torch.device("cuda:1")) == '$torch.device("cuda:1")'
    assert mend_expression("torch.device('cuda')", cpu) == "torch.device('cuda')"  # a text, no expression


def test_numpy_in_a_checkpoint_and_a_name_that_went(tmp_path) -> None:
    torch.save({"codes": np.ones((3, 2), np.int64), "scale": np.float64(2.5)}, tmp_path / "codes.pt")
    with mended_libraries():
        found = torch.load(tmp_path / "codes.pt", weights_only=True)
        assert np.product([2, 3]) == 6  # pyright: ignore
    assert np.array_equal(found["codes"], np.ones((3, 2)))
    assert not hasattr(np, "product")


def test_boxes_of_an_oblique_image_enclose_it() -> None:
    from node.infer.bundle_output import _around

    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("z", 45, degrees=True).as_matrix()
    low, high = _around(np.zeros((1, 3)), np.full((1, 3), 10.0), affine)
    assert np.allclose(high - low, [[14.142, 14.142, 10.0]], atol=1e-3)
    assert Grid((1, 1, 1), np.eye(4), "").to_lps(np.array([[1.0, 2, 3]])).tolist() == [[1, 2, 3]]
