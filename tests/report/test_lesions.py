"""A label whose connected parts are findings of their own: from the label map to SEG and SR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from pydicom import dcmread

from node.dicom.volume import Grid, Image, SliceRef, Volume
from node.infer.manifest import Manifest
from node.infer.results import Labelmap
from node.report.lesions import MOST, split_lesions
from node.report.readback import read_labelmap
from node.report.segments import SegmentFindings
from node.report.subject import Subject
from tests.report.cases import FIRST, MANIFEST, SECOND, dciodvfy_errors, make_case, make_package, run
from tests.report.conftest import CaseOf
from tests.report.predictions import make_subject
from tests.report.readers import as_dcmqi_reads, items, numbers_of

SHAPE = (8, 40, 50)


def manifest_of(**of_nodule: Any) -> dict[str, Any]:
    lesions = {"each_lesion": True, **of_nodule}
    segments = {FIRST: MANIFEST["segments"][FIRST], SECOND: MANIFEST["segments"][SECOND] | lesions}
    return MANIFEST | {"segments": segments}


def subject_of(labels: np.ndarray, manifest: dict[str, Any], **more: Any) -> Subject:
    """A label map on slices at 1, 1, 1, 1, 3, 3, 3 mm from each other; pixels of 1 mm2."""
    grid = Grid(SHAPE, np.diag([1.0, 1, 2, 1]), "1.2")
    depths = np.array([0, 1, 2, 3, 4, 7, 10, 13], np.float64)
    positions = np.column_stack([np.zeros(8), np.zeros(8), depths])
    slices = tuple(SliceRef("1.2", f"1.2.{index}") for index in range(SHAPE[0]))
    values = np.arange(labels.size, dtype=np.float32).reshape(SHAPE)
    volume = Volume(values, grid, slices, "1.3", "1.4", "CT", "HU", positions_lps=positions)
    return make_subject(volume, (), Labelmap(labels.astype(np.uint16), grid, **more), manifest)


def three_nodules() -> np.ndarray:
    """Two of 6 voxels each, the one in the thick slices larger, and one of 10 whose halves touch by a corner alone."""
    labels = np.zeros(SHAPE, int)
    labels[0:3, 0:20, 0:20] = FIRST
    labels[1, 30, 5:11] = SECOND  # 6 mm3
    labels[6, 30, 30:36] = SECOND  # 18 mm3
    labels[2, 5:10, 30], labels[3, 10:15, 31] = SECOND, SECOND  # 10 mm3
    return labels


def test_lesions_are_numbered_by_volume() -> None:
    labels = three_nodules()
    split = split_lesions(subject_of(labels, manifest_of()))
    names = {label: segment.name for label, segment in split.manifest.segments.items()}
    assert names == {1: "Right lung", 2: "Nodule 1", 3: "Nodule 2", 4: "Nodule 3"}
    array = split.labelmap.array
    assert (array == 1).sum() == 1200
    assert [np.argwhere(array == label)[0].tolist() for label in (2, 3, 4)] == [[6, 30, 30], [2, 5, 30], [1, 30, 5]]
    assert ((array >= 2) == (labels == SECOND)).all()
    assert not split.prediction.remarks
    volumes = [measured.volume_ml for measured in SegmentFindings(subject_of(labels, manifest_of())).measurements]
    assert volumes == pytest.approx([1.2, 0.018, 0.010, 0.006])


def test_lesions_keep_what_their_segment_says() -> None:
    split = split_lesions(subject_of(three_nodules(), manifest_of(color_cielab=[70, 10, -20])))
    whole = Manifest.model_validate(manifest_of(color_cielab=[70, 10, -20])).segments[SECOND]
    for label in (2, 3, 4):
        lesion = split.manifest.segments[label]
        assert lesion.model_dump(exclude={"name", "each_lesion"}) == whole.model_dump(exclude={"name", "each_lesion"})


def test_small_lesions_are_left_out_and_that_is_said() -> None:
    split = split_lesions(subject_of(three_nodules(), manifest_of(lesion_min_ml=0.01)))
    assert [segment.name for segment in split.manifest.segments.values()] == ["Right lung", "Nodule 1", "Nodule 2"]
    assert (split.labelmap.array > 1).sum() == 16
    assert split.prediction.remarks == ("Nodule: 1 lesion below 0.01 mL left out",)
    assert "Nodule: 1 lesion below 0.01 mL left out" in split.algorithm_parameters().values()


def test_beyond_fifty_the_rest_stays_together() -> None:
    labels = np.zeros(SHAPE, int)
    for number in range(60):
        row, column = divmod(number, 12)
        labels[1 + number % 2, 2 + 6 * row, 2 + 4 * column : 4 + 4 * column] = SECOND
    split = split_lesions(subject_of(labels, manifest_of()))
    names = [segment.name for segment in split.manifest.segments.values()]
    assert names == ["Right lung", *(f"Nodule {rank}" for rank in range(1, MOST + 1)), "Nodule, smaller"]
    counts = np.bincount(split.labelmap.array.ravel())
    assert counts[2:].tolist() == [2] * MOST + [20]
    assert split.prediction.remarks == (
        "Nodule: 60 lesions found; the 10 smallest share the segment 'Nodule, smaller'",
    )


def test_no_lesion_is_one_absent_segment() -> None:
    labels = np.where(three_nodules() == FIRST, FIRST, 0)
    findings = SegmentFindings(subject_of(labels, manifest_of()))
    assert [(measured.name, measured.voxels) for measured in findings.measurements] == [
        ("Right lung", 1200),
        ("Nodule", 0),
    ]


def test_a_manifest_without_lesions_changes_nothing() -> None:
    subject = subject_of(three_nodules(), MANIFEST)
    assert split_lesions(subject) is subject


def test_probabilities_are_those_of_the_lesion() -> None:
    labels = three_nodules()
    rng = np.random.default_rng(5)
    known = {label: rng.integers(0, 256, SHAPE).astype(np.uint8) for label in (FIRST, SECOND)}
    split = split_lesions(subject_of(labels, manifest_of(), probabilities=known)).labelmap
    assert split.probabilities is not None
    assert list(split.probabilities) == [1, 2, 3, 4]
    assert (split.probabilities[1] == known[FIRST]).all()
    for label in (2, 3, 4):
        assert (split.probabilities[label] == np.where(split.array == label, known[SECOND], 0)).all()
    with pytest.raises(KeyError):
        split.probabilities[5]


def test_frames_of_a_planar_image_have_lesions_of_their_own() -> None:
    frames = tuple(SliceRef("1.2", "1.2.3", number) for number in (1, 2))
    image = Image(np.zeros((2, 20, 30), np.float32), frames, "1.3", "1.4", "DX", (0.5, 0.5))
    labels = np.zeros((2, 20, 30), np.uint16)
    labels[0, 3, 3:6], labels[0, 4, 6:8], labels[1, 3, 3:9] = SECOND, SECOND, SECOND
    changes = manifest_of() | {"inputs": {"image": {"kind": "image"}}, "measurements": ["area"]}
    split = split_lesions(make_subject(image, (), Labelmap(labels, None), changes))
    assert np.unique(split.labelmap.array[1]).tolist() == [0, 2]
    assert np.unique(split.labelmap.array[0]).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"each_lesion": False, "lesion_min_ml": 0.1}, "without each_lesion"),
        ({"lesion_min_ml": -1}, "greater than 0"),
    ],
)
def test_fields_that_mean_nothing_are_mistakes(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Manifest.model_validate(manifest_of(**changes))


def test_each_lesion_is_a_segment_and_a_group(case_of: CaseOf, tmp_path: Path) -> None:
    plan = case_of("siemens_ct").plan
    mask = np.zeros(plan.grid.shape, np.uint16)
    mask[5:20, 100:200, 100:180] = FIRST
    mask[8:12, 300:310, 300:310], mask[15, 400:405, 90:100], mask[20:22, 50:90, 50:60] = SECOND, SECOND, SECOND
    wanted = ["volume", "longest diameter", "mean"]
    package = make_package(segments=manifest_of()["segments"], measurements=wanted)
    cases = [make_case(plan, mask, tmp_path / name, package=package) for name in ("one", "two")]
    case = cases[0]
    seg, report = dcmread(case.files["seg"]), dcmread(case.files["sr"])
    names = ["Right lung", "Nodule 1", "Nodule 2", "Nodule 3"]
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == names
    tracked = [str(segment.TrackingUID) for segment in seg.SegmentSequence]
    assert len(set(tracked)) == 4
    read = read_labelmap(seg, case.volume, [1, 2, 3, 4]).array
    assert ((read == 1) == (mask == FIRST)).all()
    assert [int((read == label).sum()) for label in (2, 3, 4)] == [800, 400, 50]
    groups = as_dcmqi_reads(case.files["sr"], tmp_path)["Measurements"][:4]
    assert [group["TrackingUniqueIdentifier"] for group in groups] == tracked
    assert [group["ReferencedSegment"] for group in groups] == [1, 2, 3, 4]
    for number, label in enumerate((1, 2, 3, 4)):
        values = case.volume.array[read == label].astype(np.float64)
        assert numbers_of(report, number)["Attenuation Coefficient, Mean"] == pytest.approx(values.mean(), rel=2e-5)
    said = [item for item in items(report) if item.ConceptNameCodeSequence[0].CodeValue == "112039"]
    assert {str(item.TextValue) for item in said} == {f"synthetic {name}" for name in names}
    for kind, file in case.files.items():
        assert not dciodvfy_errors(file), kind
        run("dcmdump", file)
        assert file.read_bytes() == cases[1].files[kind].read_bytes()
