"""The image library: what it says of images of every kind, once for those that are alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from node.report.library import describe_images
from tests.report.cases import plan_series
from tests.report.predictions import read_planar
from tests.report.readers import items


def said(container: Dataset) -> dict[str, object]:
    """Name to value of a group's descriptors."""
    return {
        item.ConceptNameCodeSequence[0].CodeMeaning: item.MeasuredValueSequence[0].NumericValue
        for item in items(container)
        if item.ValueType == "NUM"
    }


def test_slices_are_described_once(shared_data: Path) -> None:
    sources = plan_series(shared_data, "philips_ct").headers
    (group,) = describe_images(sources).ContentSequence
    assert len([item for item in group.ContentSequence if item.ValueType == "IMAGE"]) == len(sources) == 64
    first = sources[0]
    assert said(group) == {
        "Pixel Data Rows": 512,
        "Pixel Data Columns": 512,
        "Vertical Pixel Spacing": float(first.PixelSpacing[0]),
        "Horizontal Pixel Spacing": float(first.PixelSpacing[1]),
        "Slice Thickness": 5.0,
        "Spacing between slices": 5.0,
        **{
            f"Image Orientation (Patient) {side} {axis}": float(first.ImageOrientationPatient[number])
            for number, (side, axis) in enumerate((side, axis) for side in ("Row", "Column") for axis in "XYZ")
        },
    }


def test_other_images_have_groups_of_their_own(shared_data: Path) -> None:
    chest = plan_series(shared_data, "siemens_ct").headers
    breast = read_planar(shared_data / "planar" / "mg_mammo.dcm")[1]
    first, second = describe_images([*chest[:3], *breast, *chest[3:]]).ContentSequence
    assert said(first)["Pixel Data Rows"] == 512
    assert said(second)["Pixel Data Rows"] == 3062
    assert said(second)["Horizontal Pixel Spacing"] == pytest.approx(0.09409090909091)
    assert [
        len([item for item in group.ContentSequence if item.ValueType == "IMAGE"]) for group in (first, second)
    ] == [
        len(chest),
        1,
    ]


@pytest.mark.parametrize("value", [None, "", 0.5, MultiValue(float, [0.5]), MultiValue(float, [0.5, float("nan")])])
def test_a_spacing_that_is_none_is_left_out(shared_data: Path, value: object) -> None:
    header = plan_series(shared_data, "siemens_ct").headers[0][:]
    del header.PixelSpacing
    header.PixelSpacing = value
    assert not [name for name in said(describe_images([header])) if "Pixel Spacing" in name]
