"""Images and findings at the edge of what there is: each makes every kind of result, and pages that can be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from node.dicom.assembly import assemble_volumes
from node.dicom.header import read_header
from node.report.findings import measure
from node.report.kinds import Kind, Wanted
from node.report.layout import WIDTH
from node.report.results import make_results
from node.report.subject import Subject
from tests.dicom.slices import write_series
from tests.report.cases import FIRST, SECOND, make_package
from tests.report.geometries import make_subject
from tests.report.pictures import decoded, errors_of

RNG = np.random.default_rng(1)
MEASURED = ["volume", "mean", "minimum", "maximum", "standard deviation", "percentile 95", "longest diameter"]
IMAGES: dict[str, tuple[NDArray[np.int16], dict[str, str]]] = {
    "of one pixel each": (RNG.integers(-900, 300, (4, 1, 1)).astype(np.int16), {}),
    "of one column": (RNG.integers(-900, 300, (3, 50, 1)).astype(np.int16), {}),
    "long and narrow": (RNG.integers(-900, 300, (2, 3, 20_000)).astype(np.int16), {}),
    "all equal": (np.full((5, 20, 24), 7, np.int16), {}),
    "all equal in MR": (np.full((5, 20, 24), 7, np.int16), {"Modality": "MR"}),
    "huge": (RNG.integers(-900, 300, (5, 20, 24)).astype(np.int16), {"Modality": "MR", "RescaleSlope": "1e30"}),
}


def make_odd(folder: Path, image: str, labels: str) -> Subject:
    """A subject on one of `IMAGES`, with nothing, one voxel or every voxel labelled."""
    array, values = IMAGES[image]
    paths = write_series(folder, array, **values)
    assembly = assemble_volumes({path: read_header(path) for path in paths})
    (plan,) = (*assembly.volumes, *assembly.images)
    found = np.zeros(array.shape, np.uint16)
    if labels == "one voxel":
        found[tuple(size // 2 for size in array.shape)] = FIRST
    if labels == "every voxel":
        found[:] = SECOND
    return make_subject(plan, found, make_package(measurements=MEASURED))


@pytest.mark.parametrize("labels", ["nothing", "one voxel", "every voxel"])
@pytest.mark.parametrize("image", IMAGES)
def test_odd_images_make_every_kind(tmp_path: Path, image: str, labels: str) -> None:
    subject = make_odd(tmp_path / "images", image, labels)
    results = make_results(measure(subject), Wanted(tuple(Kind)))
    made = {result.kind for result in results}
    assert {Kind.SR, Kind.SUMMARY} <= made
    assert (Kind.OVERLAY in made) is (labels != "nothing")
    for result in results:
        file = tmp_path / f"{result.name}.dcm"
        file.write_bytes(result.encode())
        if result.kind in (Kind.SUMMARY, Kind.OVERLAY):
            assert errors_of(file) == []
            pixels = decoded(file)
            assert result.kind is Kind.OVERLAY or pixels.shape[1] == WIDTH
            assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 8
