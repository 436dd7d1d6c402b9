"""What a model sees of irregular and several inputs, and where its prediction returns to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from node.analyse import analyse
from node.dicom.assembly import assemble_volumes
from node.dicom.header import read_header, scan_folder
from node.dicom.pixels import read_volume
from node.dicom.volume import Image, Volume
from node.errors import InputRefused
from node.infer.regular import inputs_as_seen, prediction_as_sent
from node.infer.results import Box, Boxes, Labelmap, Landmark, Landmarks
from tests.infer.test_bundle import AXIAL, GEOMETRIES, dice, manifest, scan
from tests.report.cases import CREATED, FIRST, make_package


def tilted(shared_data: Path) -> Volume:
    files = scan_folder(shared_data / "head_ct_tilted").files
    (plan,) = assemble_volumes({path: read_header(path) for path in files}).volumes
    return read_volume(plan)


class Bone:
    """What is denser than bone's edge, as a model that thresholds sees it; remembers the geometry that it was given."""

    seen: Volume

    def predict(self, inputs: Mapping[str, Volume | Image]) -> Labelmap:
        volume = inputs["image"]
        assert isinstance(volume, Volume)
        self.seen = volume
        return Labelmap((volume.array > 300).astype(np.uint16) * FIRST, volume.grid)

    def close(self) -> None:
        pass


def test_a_tilted_head_is_seen_upright_and_marked_on_its_own_slices(shared_data: Path) -> None:
    files = scan_folder(shared_data / "head_ct_tilted").files
    (plan,) = assemble_volumes({path: read_header(path) for path in files}).volumes
    model = Bone()
    analysis = analyse(make_package(), model, {"image": plan}, key="job", created=CREATED)
    source = analysis.subject.volume
    assert not source.is_regular
    assert model.seen.is_regular
    axes = model.seen.grid.affine_lps[:3, :3] / np.linalg.norm(model.seen.grid.affine_lps[:3, :3], axis=0)
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    labels = analysis.subject.labelmap
    assert labels.array.shape == source.array.shape
    assert dice(labels.array > 0, source.array > 300) > 0.9
    assert "resampled" in labels.remarks[0]
    assert analysis.remarks == labels.remarks
    seg = next(result for result in analysis.results if result.kind == "seg").dataset
    named = {
        str(groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)
        for groups in seg.PerFrameFunctionalGroupsSequence
    }
    assert named <= {ref.sop_instance_uid for ref in plan.slices}
    assert len(named) > 40
    algorithm = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert "gantry tilt" in algorithm.AlgorithmParameters


def test_landmarks_of_a_tilted_head_return_to_the_slice_that_they_lie_on(shared_data: Path) -> None:
    source = tilted(shared_data)
    seen = inputs_as_seen({"image": source}, manifest())["image"]
    assert isinstance(seen, Volume)
    assert source.positions_lps is not None
    wanted = Landmark(1, frame=20, row=100.25, column=211.5, score=0.5)
    across, down = source.grid.affine_lps[:3, 0], source.grid.affine_lps[:3, 1]
    place = source.positions_lps[20] + wanted.row * down + wanted.column * across
    column, row, frame = np.linalg.solve(seen.grid.affine_lps[:3, :3], place - seen.grid.affine_lps[:3, 3])
    assert abs(frame - round(frame)) < 0.3
    (found,) = prediction_as_sent(
        Landmarks((replace(wanted, frame=round(frame), row=float(row), column=float(column)),)), seen, source
    ).points  # pyright: ignore[reportAttributeAccessIssue]
    assert (found.label, found.frame, found.score) == (1, 20, 0.5)
    assert found.row == pytest.approx(wanted.row, abs=0.5)
    assert found.column == pytest.approx(wanted.column, abs=0.5)
    boxes = Boxes((Box(0, 0.9, (1, 2, 3), (4, 5, 6)),))
    assert prediction_as_sent(boxes, seen, source).boxes == boxes.boxes  # pyright: ignore[reportAttributeAccessIssue]


def test_a_regular_input_is_passed_as_it_is() -> None:
    volume, _ = scan(*GEOMETRIES["oblique"])
    prediction = Labelmap(np.zeros(volume.array.shape, np.uint16), volume.grid)
    assert inputs_as_seen({"image": volume}, manifest())["image"] is volume
    assert prediction_as_sent(prediction, volume, volume) is prediction


def test_further_inputs_come_onto_the_first_ones_grid() -> None:
    first, truth = scan(AXIAL)
    other, _ = scan(*GEOMETRIES["oblique"])
    parts = {"inputs": {"t1": {}, "flair": {"onto_first": True}}}
    seen = inputs_as_seen({"t1": first, "flair": other}, manifest(**parts))
    assert seen["t1"] is first
    assert isinstance(seen["flair"], Volume)
    assert seen["flair"].grid.shape == first.grid.shape
    assert np.array_equal(seen["flair"].grid.affine_lps, first.grid.affine_lps)
    assert dice(seen["flair"].array > 500, truth) > 0.9
    elsewhere = replace(other, grid=replace(other.grid, frame_of_reference_uid="1.9"))
    with pytest.raises(InputRefused, match="another frame of reference"):
        inputs_as_seen({"t1": first, "flair": elsewhere}, manifest(**parts))
