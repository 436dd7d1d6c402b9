"""Inversion by blocks beside MONAI's Invertd: the same labels on every geometry, for every preprocessing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.meta_tensor import MetaTensor
from monai.transforms.compose import Compose
from monai.transforms.croppad.dictionary import CropForegroundd, DivisiblePadd, ResizeWithPadOrCropd, SpatialPadd
from monai.transforms.intensity.dictionary import NormalizeIntensityd
from monai.transforms.post.dictionary import Activationsd, AsDiscreted, Invertd
from monai.transforms.spatial.dictionary import Flipd, Orientationd, Resized, Rotate90d, Spacingd
from monai.transforms.utility.dictionary import CastToTyped, EnsureTyped, Lambdad
from scipy.spatial.transform import Rotation

from node.infer.blockwise import ChunkedInvertArgmaxd, ChunkedInvertd, invert_argmax
from tests.benchmark.many_classes import measure

SMALL = {"class_bytes": 300_000, "block_bytes": 200_000}  # several chunks of classes, several blocks of rows


def affine(columns: Any, spacing_mm: tuple[float, float, float]) -> torch.Tensor:
    """RAS affine of voxels (x, y, z) whose axes point along `columns`."""
    made = np.eye(4)
    made[:3, :3] = np.asarray(columns, dtype=float) @ np.diag(spacing_mm)
    made[:3, 3] = (12.5, -80.25, 33.0)
    return torch.as_tensor(made)


AXIAL = np.diag([-1, -1, 1])
GEOMETRIES = {
    "axial": affine(AXIAL, (0.7, 0.7, 1.0)),
    "descending, thick": affine(np.diag([-1, -1, -1]), (0.7, 0.9, 5.0)),
    "sagittal": affine([[0, 0, 1], [-1, 0, 0], [0, -1, 0]], (0.8, 0.8, 2.0)),
    "oblique": affine(Rotation.from_euler("xyz", [12, -7, 5], degrees=True).as_matrix() @ AXIAL, (0.7, 0.7, 2.5)),
    "half the network's": affine(AXIAL, (0.75, 0.75, 0.75)),  # every second sample lies on a tie of nearest neighbours
    "the network's own": affine(AXIAL, (1.5, 1.5, 1.5)),
}


def foreground(values: torch.Tensor) -> torch.Tensor:
    return values > 0.5


CROP = CropForegroundd("image", source_key="image", select_fn=foreground, allow_smaller=True)
ORIENT = Orientationd("image", axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))
PREPROCESSINGS: dict[str, Callable[[], list[Any]]] = {
    "orient, space": lambda: [ORIENT, Spacingd("image", (1.5, 1.5, 1.5), mode="bilinear")],
    "space, crop": lambda: [ORIENT, Spacingd("image", (1.5, 1.5, 2.0)), CROP, EnsureTyped("image")],
    "crop, space, pad": lambda: [CROP, ORIENT, Spacingd("image", (1.5, 1.5, 2.0)), SpatialPadd("image", (40, 40, 40))],
    "flip, turn, divide": lambda: [Flipd("image", 0), Rotate90d("image"), DivisiblePadd("image", 16)],
    "pad or crop": lambda: [ORIENT, ResizeWithPadOrCropd("image", (24, 40, 16)), Spacingd("image", (1.5, 1.5, 1.5))],
    "zeros beyond the edge": lambda: [ORIENT, Spacingd("image", (1.5, 1.5, 2.0), padding_mode="zeros")],
    "mirrored edge": lambda: [ORIENT, Spacingd("image", (1.5, 1.5, 2.0), padding_mode="reflection")],
    "corners aligned": lambda: [ORIENT, Spacingd("image", (1.5, 1.5, 2.0), align_corners=True)],
    "axes of the body": lambda: [Spacingd("image", (1.5, 1.5, 2.0), diagonal=True)],
    "space twice": lambda: [Spacingd("image", (1.0, 1.0, 1.0)), ORIENT, Spacingd("image", (2.0, 2.0, 2.0))],
    "nested": lambda: [Compose([ORIENT, Compose([Spacingd("image", (1.5, 1.5, 1.5))])]), CastToTyped("image")],
    "resize": lambda: [ORIENT, Resized("image", (20, 24, 18))],
    "spline": lambda: [ORIENT, Spacingd("image", (1.5, 1.5, 2.0), mode=1, padding_mode="nearest")],
    "nothing spatial": lambda: [NormalizeIntensityd("image")],
}


def preprocessed(transform: Compose, where: torch.Tensor, shape: tuple[int, int, int] = (31, 29, 17)) -> dict[str, Any]:
    """A block in a larger volume, preprocessed."""
    source = torch.zeros(1, *shape)
    x, y, z = (max(1, extent // 5) for extent in shape)
    source[:, x : shape[0] - x, y : shape[1] - y, z : shape[2] - z] = 1.0
    source += 0.1 * torch.rand(source.shape, generator=torch.Generator().manual_seed(3))
    return transform({"image": MetaTensor(source, affine=where)})


def with_logits(item: dict[str, Any], classes: int = 6, seed: int = 0) -> dict[str, Any]:
    """`item` with random logits on the network's grid, as decollating gives them."""
    shape = (classes, *item["image"].shape[1:])
    logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return item | {"pred": MetaTensor(logits, affine=item["image"].affine)}


def assert_same(ours: Any, naive: Any) -> None:
    """The same values in the same place. None of the inputs holds a tie, so no voxel is excused."""
    assert isinstance(ours, MetaTensor)
    assert ours.shape == naive.shape
    assert torch.equal(ours.as_tensor().float(), naive.as_tensor().float())
    np.testing.assert_allclose(np.asarray(ours.affine), np.asarray(naive.affine), atol=1e-12)
    assert ours.applied_operations == naive.applied_operations
    assert ours.meta.keys() == naive.meta.keys()


# Every preprocessing on two geometries, every geometry with the two usual preprocessings.
CASES = [(name, place) for name in PREPROCESSINGS for place in ("axial", "oblique")]
CASES += [(name, place) for name in ("orient, space", "space, crop") for place in GEOMETRIES]


@pytest.mark.parametrize(("preprocessing", "geometry"), list(dict.fromkeys(CASES)))
class TestEqualToMonai:
    def test_softmax_invert_argmax(self, geometry: str, preprocessing: str) -> None:
        transform = Compose(PREPROCESSINGS[preprocessing]())
        item = preprocessed(transform, GEOMETRIES[geometry])
        naive = Compose(
            [
                Activationsd("pred", softmax=True),
                Invertd("pred", transform, orig_keys="image", nearest_interp=False),
                AsDiscreted("pred", argmax=True),
            ]
        )(with_logits(item))
        ours = ChunkedInvertArgmaxd(
            "pred", transform, orig_keys="image", nearest_interp=False, activation="softmax", **SMALL
        )
        assert_same(ours(with_logits(item))["pred"], naive["pred"])
        assert ours.remarks == []

    def test_argmax_invert_nearest(self, geometry: str, preprocessing: str) -> None:
        transform = Compose(PREPROCESSINGS[preprocessing]())
        item = preprocessed(transform, GEOMETRIES[geometry])
        naive = Compose(
            [AsDiscreted("pred", argmax=True), Invertd("pred", transform, orig_keys="image", nearest_interp=True)]
        )(with_logits(item))["pred"]
        first = ChunkedInvertArgmaxd("pred", transform, orig_keys="image", argmax_first=True, **SMALL)
        ours = first(with_logits(item))["pred"]
        assert ours.dtype == torch.uint8
        assert_same(ours, naive)
        labels = with_logits(item)["pred"].argmax(dim=0, keepdim=True).to(torch.uint8)
        plain = ChunkedInvertd("pred", transform, orig_keys="image", **SMALL)
        assert_same(plain(item | {"pred": labels})["pred"], naive)

    def test_sigmoid_after_or_before_and_a_threshold(self, geometry: str, preprocessing: str) -> None:
        transform = Compose(PREPROCESSINGS[preprocessing]())
        item = preprocessed(transform, GEOMETRIES[geometry])
        invert = Invertd("pred", transform, orig_keys="image", nearest_interp=False)
        for before in (True, False):
            sigmoid = Activationsd("pred", sigmoid=True)
            chain = [sigmoid, invert] if before else [invert, sigmoid]
            naive = Compose([*chain, AsDiscreted("pred", threshold=0.5)])(with_logits(item))["pred"]
            ours = ChunkedInvertArgmaxd(
                "pred",
                transform,
                orig_keys="image",
                nearest_interp=False,
                threshold=0.5,
                **{"activation" if before else "activation_after": "sigmoid"},
                **SMALL,
            )(with_logits(item))["pred"]
            assert ours.dtype == torch.uint8
            assert_same(ours, naive)


@given(
    shape=st.tuples(*[st.integers(2, 24)] * 3),
    spacing_mm=st.tuples(*[st.floats(0.4, 4.0)] * 3),
    pixdim=st.tuples(*[st.floats(0.6, 3.0)] * 3),
    degrees=st.tuples(*[st.sampled_from([0, 90, 180, 11.5, -37])] * 3),
    classes=st.integers(1, 9),
    nearest=st.booleans(),
    limits=st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)),
)
@settings(max_examples=40)
def test_any_grid_and_any_memory_give_the_same_labels(
    shape: Any, spacing_mm: Any, pixdim: Any, degrees: Any, classes: int, nearest: bool, limits: tuple[int, int]
) -> None:
    where = affine(Rotation.from_euler("xyz", degrees, degrees=True).as_matrix(), spacing_mm)
    transform = Compose([ORIENT, Spacingd("image", pixdim)])
    item = preprocessed(transform, where, shape)
    naive = Compose(
        [
            Activationsd("pred", softmax=True),
            Invertd("pred", transform, orig_keys="image", nearest_interp=nearest),
            AsDiscreted("pred", argmax=True),
        ]
    )(with_logits(item, classes))["pred"]
    ours = ChunkedInvertArgmaxd(
        "pred",
        transform,
        orig_keys="image",
        nearest_interp=nearest,
        activation="softmax",
        class_bytes=limits[0],
        block_bytes=limits[1],
    )(with_logits(item, classes))["pred"]
    assert_same(ours, naive)


def test_of_equal_values_the_first_class_wins_and_nan_wins_over_numbers() -> None:
    """In chunks of one class, so that a tie lies between chunks."""
    transform = Compose([ORIENT, Spacingd("image", (1.5, 1.5, 1.5))])
    item = preprocessed(transform, GEOMETRIES["axial"])
    values = torch.full((4, *item["image"].shape[1:]), 0.25)
    values[2, 3:6] = float("nan")
    invert = {"transform": transform, "orig_keys": "image", "nearest_interp": False}
    pred = MetaTensor(values, affine=item["image"].affine)
    naive = Compose([Invertd("pred", **invert), AsDiscreted("pred", argmax=True)])(item | {"pred": pred.clone()})
    ours = ChunkedInvertArgmaxd("pred", **invert, class_bytes=1, block_bytes=1)(item | {"pred": pred.clone()})
    assert set(naive["pred"].unique().tolist()) == {0, 2}
    assert_same(ours["pred"], naive["pred"])


def test_a_preprocessing_that_is_not_known_is_inverted_at_once_and_remarked() -> None:
    """A Lambda's inverse may do anything with the channels: this one turns their order round."""
    turn = Lambdad("image", func=lambda values: values, inv_func=lambda values: values.flip(0))
    transform = Compose([ORIENT, Spacingd("image", (1.5, 1.5, 1.5)), turn])
    item = preprocessed(transform, GEOMETRIES["oblique"])
    invert = {"transform": transform, "orig_keys": "image", "nearest_interp": False}
    naive = Compose([Invertd("pred", **invert), AsDiscreted("pred", argmax=True)])(with_logits(item))["pred"]
    ours = ChunkedInvertArgmaxd("pred", **invert, **SMALL)
    assert_same(ours(with_logits(item))["pred"], naive)
    assert "Lambda" in ours.remarks[0]


def test_a_prediction_that_invertd_passes_by_is_reduced_all_the_same() -> None:
    """Without geometry MONAI does not know how to invert it; the argmax after it still ran."""
    transform = Compose([NormalizeIntensityd("image")])
    item = preprocessed(transform, GEOMETRIES["axial"])
    logits = torch.randn(5, 31, 29, 17)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = ChunkedInvertArgmaxd("pred", transform, orig_keys="image", activation="softmax")(
            item | {"pred": logits.clone()}
        )["pred"]
    assert torch.equal(ours[0].long(), logits.softmax(0).argmax(0))


def test_a_type_can_be_asked_for() -> None:
    transform = Compose([ORIENT])
    item = preprocessed(transform, GEOMETRIES["axial"])
    invert = ChunkedInvertArgmaxd("pred", transform, orig_keys="image", dtype=torch.float32)
    assert invert(with_logits(item))["pred"].dtype == torch.float32


def test_as_a_function() -> None:
    transform = Compose([ORIENT, Spacingd("image", (1.5, 1.5, 1.5))])
    item = with_logits(preprocessed(transform, GEOMETRIES["axial"]))
    naive = Compose(
        [Invertd("pred", transform, orig_keys="image", nearest_interp=False), AsDiscreted("pred", argmax=True)]
    )(item)["pred"]
    assert_same(invert_argmax(item["pred"], item["image"], transform), naive)


@pytest.mark.parametrize(
    "wrong",
    [
        {"argmax_first": True, "threshold": 0.5},
        {"argmax_first": True, "nearest_interp": False},
        {"activation": "tanh"},
        {"activation_after": "softmax"},
    ],
)
def test_settings_that_contradict_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"labels|activation"):
        ChunkedInvertArgmaxd("pred", Compose([ORIENT]), orig_keys="image", **wrong)


def test_thirty_classes_are_inverted_in_the_memory_of_a_few() -> None:
    """Of 11 MB per class on the source grid, MONAI holds all: the values in float64, in float32, and its copies."""
    ours = measure("ours", "probabilities", classes=30, scale=0.3, threads=1)
    naive = measure("naive", "probabilities", classes=30, scale=0.3, threads=1)
    assert (ours.labels == naive.labels).all()
    assert ours.remarks == ()
    assert ours.peak_mb - ours.before_mb < 0.5 * (naive.peak_mb - naive.before_mb), (ours.peak_mb, naive.peak_mb)
