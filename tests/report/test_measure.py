"""Measurements against numpy, one segment at a time, in double precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError

from node.dicom.volume import Grid, SliceRef, Volume
from node.infer.manifest import PERCENTILES, Manifest, Measurement
from node.infer.results import Labelmap
from node.report.measure import SegmentMeasurements, measure_segments, voxel_volumes_mm3
from tests.report.cases import FIRST, MANIFEST, SECOND

SHAPE = (4, 5, 6)
# Sheared and with a negative direction: the voxel's volume is the determinant, not the product of the spacings.
AFFINE = np.array([[0.5, 0.0, 0.0, 7.0], [0.0, -0.8, 1.0, -3.0], [0.0, 0.0, 2.5, 11.0], [0.0, 0.0, 0.0, 1.0]])
VOXEL_ML = 0.5 * 0.8 * 2.5 / 1000


def measure(values: np.ndarray, labels: np.ndarray, unit: str = "HU", **changes: Any) -> dict[int, SegmentMeasurements]:
    grid = Grid(SHAPE, AFFINE, "1.2")
    slices = tuple(SliceRef("1.2", f"1.2.{index}") for index in range(SHAPE[0]))
    volume = Volume(values.astype(np.float32), grid, slices, "1.3", "1.4", "CT", unit)  # pyright: ignore[reportArgumentType]
    manifest = Manifest.model_validate(MANIFEST | changes)
    measured = measure_segments(volume, Labelmap(labels.astype(np.uint16), grid), manifest)
    return {measurements.number: measurements for measurements in measured}


@settings(max_examples=60, deadline=None)
@given(
    labels=arrays(np.uint16, SHAPE, elements=st.sampled_from([0, FIRST, SECOND])),
    values=arrays(np.float32, SHAPE, elements=st.floats(-3000, 60000, width=32)),
)
def test_every_measurement_is_numpy_s(labels: np.ndarray, values: np.ndarray) -> None:
    kinds = ["volume", "mean", "standard deviation", "minimum", "maximum", *PERCENTILES]
    for label, measured in measure(values, labels, measurements=kinds).items():
        wanted = values[labels == label].astype(np.float64)
        assert measured.voxels == wanted.size
        assert measured.volume_ml == pytest.approx(wanted.size * VOXEL_ML, rel=1e-12)
        if not wanted.size:
            assert {kind: measured.value(kind) for kind in Measurement if measured.value(kind) is not None} == {
                Measurement.VOLUME: 0.0
            }
            continue
        assert measured.mean == pytest.approx(wanted.mean(), rel=1e-9, abs=1e-9)
        values_of = measured.values
        assert values_of[Measurement.STANDARD_DEVIATION] == pytest.approx(wanted.std(), rel=1e-7, abs=1e-7)
        assert (values_of[Measurement.MINIMUM], values_of[Measurement.MAXIMUM]) == (wanted.min(), wanted.max())
        for kind, part in PERCENTILES.items():
            assert values_of[kind] == pytest.approx(np.percentile(wanted, part), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("offset", [0.0, 40000.0, 8e6])
def test_a_small_deviation_of_large_values_is_not_lost(offset: float) -> None:
    """PET in Bq/ml has values of millions: sums of squares would cancel."""
    rng = np.random.default_rng(3)
    values = (offset + rng.integers(0, 3, SHAPE)).astype(np.float32)
    labels = np.where(rng.random(SHAPE) < 0.5, FIRST, SECOND)
    for label, measured in measure(values, labels).items():
        wanted = values[labels == label].astype(np.float64)
        assert measured.values[Measurement.STANDARD_DEVIATION] == pytest.approx(wanted.std(), rel=1e-9)


def test_slices_of_varying_spacing_have_their_own_thickness() -> None:
    """Halfway to each neighbour: 2, 2.5, 4 and 5 mm along the normal, whatever the shear adds."""
    depths, shear = np.array([0.0, 2.0, 5.0, 10.0]), np.array([0.0, 0.7, 1.1, 4.0])
    positions = np.column_stack([np.full(4, 7.0), -3 + shear, 11 + depths])
    grid = Grid(SHAPE, AFFINE, "1.2")
    slices = tuple(SliceRef("1.2", f"1.2.{index}") for index in range(SHAPE[0]))
    labels = np.zeros(SHAPE, np.uint16)
    labels[0, 0, :1], labels[1, 0, :2], labels[2, 0, :3], labels[3, 0, :4] = FIRST, FIRST, FIRST, SECOND
    volume = Volume(np.ones(SHAPE, np.float32), grid, slices, "1.3", "1.4", "CT", "HU", positions_lps=positions)
    first, second = measure_segments(volume, Labelmap(labels, grid), Manifest.model_validate(MANIFEST))
    pixel_ml = 0.5 * 0.8 / 1000
    assert first.volume_ml == pytest.approx((1 * 2 + 2 * 2.5 + 3 * 4) * pixel_ml)
    assert second.volume_ml == pytest.approx(4 * 5 * pixel_ml)


def test_a_tilted_stack_measures_as_an_upright_one() -> None:
    """A gantry's tilt moves slices within their planes: it makes no voxel larger."""
    positions = np.array([(7.0, -3.0 + index, 11.0 + 2.5 * index) for index in range(SHAPE[0])], np.float64)
    grid = Grid(SHAPE, AFFINE, "1.2")
    slices = tuple(SliceRef("1.2", f"1.2.{index}") for index in range(SHAPE[0]))
    volume = Volume(
        np.ones(SHAPE, np.float32), grid, slices, "1.3", "1.4", "CT", "HU", positions_lps=positions.astype(np.float64)
    )
    assert voxel_volumes_mm3(volume) == pytest.approx(np.full(SHAPE[0], VOXEL_ML * 1000))
    assert voxel_volumes_mm3(replace(volume, positions_lps=None)) == pytest.approx(np.full(SHAPE[0], VOXEL_ML * 1000))


def test_a_uniform_segment_has_no_deviation() -> None:
    labels = np.full(SHAPE, FIRST)
    assert measure(np.full(SHAPE, 7654321.0), labels)[FIRST].values[Measurement.STANDARD_DEVIATION] == 0.0


def test_rows_are_what_people_read() -> None:
    labels = np.zeros(SHAPE, int)
    labels[1, 2, 3:5] = SECOND
    values = np.zeros(SHAPE)
    values[1, 2, 3:5] = (-100.0, 300.0)
    found = measure(values, labels)
    assert found[SECOND].rows() == [
        {"segment": "Nodule", "measurement": "volume", "value": pytest.approx(2 * VOXEL_ML), "unit": "mL"},
        {"segment": "Nodule", "measurement": "mean", "value": 100.0, "unit": "HU"},
        {"segment": "Nodule", "measurement": "standard deviation", "value": 200.0, "unit": "HU"},
        {"segment": "Nodule", "measurement": "minimum", "value": -100.0, "unit": "HU"},
        {"segment": "Nodule", "measurement": "maximum", "value": 300.0, "unit": "HU"},
    ]
    assert [row["measurement"] for row in found[FIRST].rows()] == ["volume"]
    assert found[FIRST].rows()[0]["value"] == 0.0


@settings(max_examples=40, deadline=None)
@given(
    labels=arrays(np.uint16, SHAPE, elements=st.sampled_from([0, FIRST, SECOND])),
    values=arrays(np.float32, SHAPE, elements=st.integers(-1000, 1000).map(float)),
)
def test_values_outside_of_the_range_count_for_the_volume_alone(labels: np.ndarray, values: np.ndarray) -> None:
    kinds = ["volume", "mean", "standard deviation", "minimum", "maximum", "median", "percentile 90"]
    for label, measured in measure(values, labels, intensity_range=[-200, 300], measurements=kinds).items():
        inside = values[labels == label].astype(np.float64)
        kept = inside[(inside >= -200) & (inside <= 300)]
        assert measured.voxels == inside.size
        assert measured.volume_ml == pytest.approx(inside.size * VOXEL_ML, rel=1e-12)
        expected = {
            Measurement.MEAN: np.mean,
            Measurement.STANDARD_DEVIATION: np.std,
            Measurement.MINIMUM: np.min,
            Measurement.MAXIMUM: np.max,
            Measurement.MEDIAN: np.median,
            Measurement.PERCENTILE_90: lambda kept: np.percentile(kept, 90),
        }
        for kind, of in expected.items():
            if kept.size:
                assert measured.values[kind] == pytest.approx(float(of(kept)), rel=1e-9, abs=1e-6)
            else:
                assert kind not in measured.values


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"measurements": ["area"]}, "area is of planar images"),
        ({"measurements": ["mesh volume"], "inputs": {"image": {"kind": "image"}}}, "mesh volume is of volumes"),
        ({"measurements": ["mean", "mean"]}, "twice"),
        ({"intensity_range": [400, -500]}, "the first must be the smaller"),
    ],
)
def test_measurements_that_mean_nothing_are_mistakes(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Manifest.model_validate(MANIFEST | changes)
