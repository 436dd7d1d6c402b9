"""Detections: the outlines against the annotators' own pixels, the SR through the eyes of other readers."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from highdicom import sr
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread

from node.dicom.header import read_header
from node.dicom.volume import Grid, SliceRef, Volume
from node.errors import OutputRefused
from node.infer.results import Box, Boxes
from node.report.boxes import BoxFindings
from node.report.findings import measure
from node.report.space import cut_box
from node.report.subject import Subject
from tests.report.cases import dciodvfy_errors, run
from tests.report.predictions import DETECTION, Told, annotated_box, classify_breast, detect, make_subject, tell
from tests.report.readers import as_dcmqi_reads, codes_in, items, unknown_codes


@pytest.fixture(scope="module")
def told(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    return tell(detect(shared_data), tmp_path_factory.mktemp("boxes"))


def make_volume(
    shape: tuple[int, int, int] = (20, 60, 50),
    affine: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    frame_of_reference: str = "1.2.3",
) -> Volume:
    slices = tuple(SliceRef("1.2.840.10008.5.1.4.1.1.2", f"1.2.{number}") for number in range(1, shape[0] + 1))
    grid = Grid(shape, np.eye(4) if affine is None else affine, frame_of_reference)
    return Volume(np.zeros(shape, np.float32), grid, slices, "1.9", "1.8", "CT", "HU", positions_lps=positions)


def test_outlines_lie_on_the_annotated_pixels(shared_data: Path, told: Told) -> None:
    """The tumour's rectangle on each slice of the annotation, in the pixels of the annotation."""
    volume = told.findings.subject.volume
    outlines = cut_box(volume, annotated_box(shared_data, volume))
    folder = shared_data / "annotations" / "chest_ct_philips"
    found = {}
    for file in folder.glob("*.xml"):
        text = file.read_text()
        found[file.stem] = [int(re.findall(rf"<{tag}>(\d+)<", text)[0]) for tag in ("xmin", "ymin", "xmax", "ymax")]
    edges = np.array(list(found.values()))
    known = np.array([*edges[:, :2].min(axis=0), *edges[:, 2:].max(axis=0)])
    assert {volume.slices[index].sop_instance_uid for index in outlines} >= found.keys()
    for outline in outlines.values():
        assert np.allclose([*outline.min(axis=0), *outline.max(axis=0)], known, atol=1e-6)
        assert len(outline) == 4


def test_groups_come_by_score_with_what_is_measured(told: Told, tmp_path: Path) -> None:
    groups = as_dcmqi_reads(told.files["sr"], tmp_path)["Measurements"]
    assert [group["Finding"]["CodeMeaning"] for group in groups] == ["Mass", "Nodule", "Nodule"]
    assert [group["TrackingIdentifier"] for group in groups] == [
        "synthetic Mass 1",
        "synthetic Nodule 2",
        "synthetic Nodule 3",
    ]
    assert len({group["TrackingUniqueIdentifier"] for group in groups}) == 3
    values = [
        {item["quantity"]["CodeMeaning"]: (float(item["value"]), item["units"]["CodeValue"]) for item in items}
        for items in (group["measurementItems"] for group in groups)
    ]
    assert [value["Certainty of Finding"] for value in values] == [(93.0, "%"), (72.0, "%"), (41.0, "%")]
    assert values[1] == {
        "Certainty of Finding": (72.0, "%"),
        "Width": (8.0, "mm"),
        "Depth": (10.0, "mm"),
        "Height": (8.0, "mm"),
    }
    assert all(group["FindingSite"]["CodeMeaning"] == "Lung" for group in groups)
    assert all(group["measurementAlgorithmIdentification"]["AlgorithmName"] == "synthetic" for group in groups)


def test_highdicom_reads_the_regions_and_where_they_lie(told: Told) -> None:
    report = sr.srread(told.files["sr"])
    assert isinstance(report, sr.Comprehensive3DSR)
    volume = told.findings.subject.volume
    groups = report.content.get_volumetric_roi_measurement_groups()  # pyright: ignore[reportAttributeAccessIssue]
    boxes = [measured.box for measured in findings_of(told).measurements]
    assert len(groups) == len(boxes) == 3
    for group, box in zip(groups, boxes, strict=True):
        heights = []
        for region in group.roi:
            source = region.ContentSequence[0].ReferencedSOPSequence[0]
            index = [reference.sop_instance_uid for reference in volume.slices].index(source.ReferencedSOPInstanceUID)
            assert region.graphic_type is sr.GraphicTypeValues.POLYLINE
            assert (region.value[0] == region.value[-1]).all()
            header = told.findings.subject.sources[index]
            # PS3.3 C.7.6.2.1.1 from the slice's own header; SCOORD counts from the corner of the first pixel.
            across, down = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
            row_mm, column_mm = (float(value) for value in header.PixelSpacing)
            places = (
                np.array(header.ImagePositionPatient, float)
                + (region.value[:, :1] - 0.5) * across * column_mm
                + (region.value[:, 1:] - 0.5) * down * row_mm
            )
            assert np.allclose(places.min(axis=0)[:2], box.low_lps[:2], atol=1e-3)
            assert np.allclose(places.max(axis=0)[:2], box.high_lps[:2], atol=1e-3)
            heights.append(places[0, 2])
        assert min(np.abs(np.array(heights) - box.centre_lps[2])) == abs(heights[0] - box.centre_lps[2])
        assert box.low_lps[2] <= min(heights) <= max(heights) <= box.high_lps[2]


def findings_of(told: Told) -> BoxFindings:
    assert isinstance(told.findings, BoxFindings)
    return told.findings


def test_the_centre_is_a_point_in_the_frame_of_reference(told: Told) -> None:
    centres = [item for item in items(dcmread(told.files["sr"])) if item.ValueType == "SCOORD3D"]
    boxes = [measured.box for measured in findings_of(told).measurements]
    assert len(centres) == len(boxes)
    for item, box in zip(centres, boxes, strict=True):
        assert item.GraphicType == "POINT"
        assert item.ConceptNameCodeSequence[0].CodeValue == "111010"
        assert np.allclose(item.GraphicData, box.centre_lps, atol=1e-3)
        assert item.ReferencedFrameOfReferenceUID == told.findings.subject.sources[0].FrameOfReferenceUID


def test_no_validator_complains(told: Told) -> None:
    assert not dciodvfy_errors(told.files["sr"])
    said = run("dsrdump", "+Pu", "+Pc", told.files["sr"])
    assert not re.findall(r"^[WEF]: .*", said, re.M)
    assert not unknown_codes(codes_in(dcmread(told.files["sr"])))
    report = dcmread(told.files["sr"])
    assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")


def test_below_the_threshold_is_left_out_and_none_is_said(shared_data: Path, told: Told, tmp_path: Path) -> None:
    prediction = told.findings.subject.prediction
    assert isinstance(prediction, Boxes)
    strict = DETECTION | {"score_min": 0.8}
    subject = make_subject(told.findings.subject.volume, told.findings.subject.sources, prediction, strict)
    groups = as_dcmqi_reads(tell(subject, tmp_path).files["sr"], tmp_path)["Measurements"]
    assert [group["Finding"]["CodeMeaning"] for group in groups] == ["Mass", "Nodule"]
    (evaluation,) = [
        each for each in groups[1]["qualitativeEvaluations"] if each["conceptCode"]["CodeValue"] == "121052"
    ]
    assert evaluation["conceptValue"]["CodeMeaning"] == "Absent"
    assert groups[1]["measurementItems"] == []
    nothing = dataclasses.replace(subject, prediction=Boxes(()))
    groups = as_dcmqi_reads(tell(nothing, tmp_path).files["sr"], tmp_path)["Measurements"]
    assert [group["Finding"]["CodeMeaning"] for group in groups] == ["Nodule", "Mass"]


def test_images_without_a_frame_of_reference_have_no_points_in_space(shared_data: Path, tmp_path: Path) -> None:
    subject = detect(shared_data)
    grid = dataclasses.replace(subject.volume.grid, frame_of_reference_uid="")
    headers = []
    for header in subject.sources:
        headers.append(header[:])
        del headers[-1].FrameOfReferenceUID
    source = dataclasses.replace(subject.volume, grid=grid)
    bare = dataclasses.replace(subject, source=source, sources=tuple(headers))
    file = tell(bare, tmp_path).files["sr"]
    kinds = {item.ValueType for item in items(dcmread(file))}
    assert "SCOORD" in kinds
    assert "SCOORD3D" not in kinds
    assert not dciodvfy_errors(file)


@pytest.mark.parametrize(
    ("box", "sentence"),
    [
        (Box(7, 0.9, (0, 0, 0), (9, 9, 9)), "class 7, which dicom.yaml does not declare"),
        (Box(0, 1.5, (0, 0, 0), (9, 9, 9)), "score 1.5"),
        (Box(0, float("nan"), (0, 0, 0), (9, 9, 9)), "score nan"),
        (Box(0, 0.9, (0, 0, 0), (9, -9, 9)), "9 x -9 x 9 mm"),
        (Box(0, 0.9, (0, 0, 40), (9, 9, 49)), "outside of the image"),
        (Box(0, 0.9, (60, 0, 4), (70, 9, 9)), "outside of the image"),
    ],
)
def test_what_is_no_detection_is_refused(box: Box, sentence: str) -> None:
    with pytest.raises(OutputRefused, match=re.escape(sentence)):
        measure(make_subject(make_volume(), (), Boxes((box,)), DETECTION))


def test_a_box_between_two_slices_is_shown_on_the_nearer_one() -> None:
    affine = np.diag([1.0, 1.0, 5.0, 1.0])
    outlines = cut_box(make_volume(affine=affine), Box(0, 1, (10, 20, 13), (14, 26, 14)))
    assert list(outlines) == [3]
    assert np.allclose(sorted(map(tuple, outlines[3])), [(10, 20), (10, 26), (14, 20), (14, 26)])


def test_a_box_is_cut_off_at_the_edge_of_the_image() -> None:
    outlines = cut_box(make_volume(), Box(0, 1, (-30, 50, 4.2), (3, 90, 5.9)))
    assert list(outlines) == [5]
    assert np.allclose(sorted(map(tuple, outlines[5])), [(-0.5, 50), (-0.5, 59.5), (3, 50), (3, 59.5)])


def test_uneven_slices_are_where_their_positions_say() -> None:
    heights = np.array([0.0, 1, 2, 7, 8, 9])
    positions = np.column_stack([np.zeros(6), np.zeros(6), heights])
    affine = np.diag([1.0, 1.0, 1.8, 1.0])
    volume = make_volume((6, 60, 50), affine, positions)
    assert list(cut_box(volume, Box(0, 1, (1, 1, 6.5), (9, 9, 8.4)))) == [3, 4]
    assert list(cut_box(volume, Box(0, 1, (1, 1, 5), (9, 9, 6)))) == [3]  # in the gap


def test_frames_of_an_enhanced_image_are_named(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "enhanced" / "emri_small.dcm"
    dataset = dcmread(path)
    array = dataset.pixel_array.astype(np.float32)
    uids = str(dataset.SOPClassUID), str(dataset.SOPInstanceUID)
    slices = tuple(SliceRef(*uids, number) for number in range(1, len(array) + 1))
    grid = Grid(array.shape, np.diag([2.0, 2.0, 5.0, 1.0]), "1.2.3")  # the header has no geometry
    volume = Volume(array, grid, slices, str(dataset.SeriesInstanceUID), str(dataset.StudyInstanceUID), "MR")
    x, y, z = grid.to_lps(np.array([[25.0, 30.0, 4.0]]))[0].tolist()
    box = Box(0, 0.9, (x - 9, y - 9, z - 9), (x + 9, y + 9, z + 9))
    subject = make_subject(volume, (read_header(path),), Boxes((box,)), DETECTION)
    file = tell(subject, tmp_path).files["sr"]
    regions = [item for item in items(dcmread(file)) if item.ValueType == "SCOORD"]
    frames = [int(item.ContentSequence[0].ReferencedSOPSequence[0].ReferencedFrameNumber) for item in regions]
    assert frames[0] == 5
    assert sorted(frames) == [number + 1 for number in sorted(cut_box(volume, box))]
    assert not {error for error in dciodvfy_errors(file) if "Content" in error or "Referenced" in error}


angles = st.floats(-180, 180)
sizes = st.floats(2, 30)


@given(angles, angles, angles, st.tuples(sizes, sizes, sizes), st.floats(0.3, 3), st.floats(0.3, 6))
@settings(max_examples=60)
def test_whatever_the_orientation_an_outline_holds_what_the_box_holds(
    a: float, b: float, c: float, size: tuple[float, float, float], pixel: float, step: float
) -> None:
    """On each slice, a pixel lies in the box exactly when it lies within the outline."""
    volume = make_volume((24, 40, 36), oblique(a, b, c, pixel, step))
    shape = volume.grid.shape
    centre = volume.grid.to_lps(np.array([[shape[2] / 2 + 0.3, shape[1] / 2 - 0.2, shape[0] / 2 + 0.1]]))[0]
    low, high = centre - np.array(size) / 2, centre + np.array(size) / 2
    outlines = cut_box(volume, Box(0, 1, tuple(low.tolist()), tuple(high.tolist())))
    rows, columns = np.indices(shape[1:])
    pixels = np.column_stack([columns.ravel(), rows.ravel()]).astype(float)
    inside_any = set()
    for index in range(shape[0]):
        places = volume.grid.to_lps(np.column_stack([pixels, np.full(len(pixels), index)]))
        # Pixels within rounding of a face may fall either way.
        surely = ((places > low + 1e-6) & (places < high - 1e-6)).all(axis=1)
        surely_not = ((places < low - 1e-6) | (places > high + 1e-6)).any(axis=1)
        if surely.any():
            inside_any.add(index)
        if index in outlines and inside_any:
            within = in_polygon(pixels, outlines[index])
            if surely.any():
                assert within[surely].all()
                assert not (within & surely_not).any()
    assert inside_any <= outlines.keys()
    assert outlines


def in_polygon(points: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """Which points lie in a convex polygon, with a hair of tolerance."""
    edges = np.roll(polygon, -1, axis=0) - polygon
    to_points = points[:, None, :] - polygon[None]
    sides = edges[None, :, 0] * to_points[..., 1] - edges[None, :, 1] * to_points[..., 0]
    return np.logical_or((sides > -1e-7).all(axis=1), (sides < 1e-7).all(axis=1))


def oblique(a: float, b: float, c: float, pixel: float, step: float) -> np.ndarray:
    """An affine with directions turned by three angles (degrees)."""
    turn = np.eye(3)
    for angle, axis in ((a, 0), (b, 1), (c, 2)):
        one, other = (number for number in range(3) if number != axis)
        part = np.eye(3)
        cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        part[one, one], part[one, other], part[other, one], part[other, other] = cosine, -sine, sine, cosine
        turn = turn @ part
    affine = np.eye(4)
    affine[:3, :3] = turn * (pixel, pixel, step)
    affine[:3, 3] = (-12.0, 33.0, 5.0)
    return affine


def test_the_same_detections_make_the_same_bytes(shared_data: Path, told: Told, tmp_path: Path) -> None:
    again = tell(detect(shared_data), tmp_path)
    assert again.files["sr"].read_bytes() == told.files["sr"].read_bytes()
    moved = dataclasses.replace(told.findings.subject, key="another job")
    other = tell(moved, tmp_path / "other").files["sr"]
    assert other.read_bytes() != told.files["sr"].read_bytes()
    assert dcmread(other).SOPInstanceUID != dcmread(told.files["sr"]).SOPInstanceUID


def test_a_planar_image_has_no_boxes_in_space(shared_data: Path) -> None:
    subject: Subject = dataclasses.replace(classify_breast(shared_data), prediction=Boxes(()))
    with pytest.raises(OutputRefused, match="boxes of a planar image"):
        measure(subject)
