"""Landmarks on slices of a volume and on planar images, through the eyes of other readers."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from highdicom import sr
from pydicom import dcmread

from node.dicom.volume import Image
from node.errors import OutputRefused
from node.infer.results import Landmark, Landmarks
from node.report.findings import measure
from node.report.subject import Subject
from tests.report.cases import dciodvfy_errors, run
from tests.report.predictions import LANDMARKS, Told, make_subject, mark_head, read_planar, tell
from tests.report.readers import as_dcmqi_reads, codes_in, items, unknown_codes


@pytest.fixture(scope="module")
def head(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    return tell(mark_head(shared_data), tmp_path_factory.mktemp("head"))


@pytest.fixture(scope="module")
def eye(shared_data: Path) -> Subject:
    """Two points of one class and one of another on a photograph of a retina."""
    image, headers = read_planar(shared_data / "planar" / "op_fundus.dcm")
    points = (Landmark(3, 0, 760.0, 1360.0, 0.9), Landmark(1, 0, -0.5, 1535.5, 0.5), Landmark(3, 0, 3.0, 4.0))
    return make_subject(image, headers, Landmarks(points), LANDMARKS)


def test_points_lie_on_their_slices_and_in_the_patient(head: Told) -> None:
    report = sr.srread(head.files["sr"])
    assert isinstance(report, sr.Comprehensive3DSR)
    groups = report.content.get_planar_roi_measurement_groups()  # pyright: ignore[reportAttributeAccessIssue]
    subject = head.findings.subject
    known = [("Left eye", 121, 150.0, 200.75), ("Right eye", 120, 150.25, 60.5)]
    assert len(groups) == len(known)
    for number, (group, (name, index, row, column)) in enumerate(zip(groups, known, strict=True), 1):
        assert group.tracking_identifier == f"synthetic {name} {number}"
        header = subject.sources[index]
        source = group.roi.ContentSequence[0].ReferencedSOPSequence[0]
        assert source.ReferencedSOPInstanceUID == header.SOPInstanceUID
        assert group.roi.graphic_type is sr.GraphicTypeValues.POINT
        # PS3.3 C.18.6.1: the centre of the first pixel is 0.5, 0.5.
        assert np.allclose(group.roi.value, [[column + 0.5, row + 0.5]], atol=1e-4)
        across, down = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
        row_mm, column_mm = (float(value) for value in header.PixelSpacing)
        place = np.array(header.ImagePositionPatient, float) + column * column_mm * across + row * row_mm * down
        (point,) = [item for item in items(group[0]) if item.ValueType == "SCOORD3D"]
        assert np.allclose(point.GraphicData, place, atol=2e-3)
        assert point.ReferencedFrameOfReferenceUID == header.FrameOfReferenceUID


def test_dcmqi_reads_names_sides_and_certainty(head: Told, tmp_path: Path) -> None:
    left, right, pituitary = as_dcmqi_reads(head.files["sr"], tmp_path)["Measurements"]
    assert left["Laterality"]["CodeMeaning"] == "Left"
    assert right["Laterality"]["CodeMeaning"] == "Right"
    assert left["measurementItems"] == []  # the model gave no score
    (certainty,) = right["measurementItems"]
    assert (certainty["quantity"]["CodeValue"], certainty["units"]["CodeValue"]) == ("111012", "%")
    assert float(certainty["value"]) == 81.0
    # Found with a score below score_min: not found.
    assert pituitary["Finding"]["CodeMeaning"] == "Pituitary"
    presence = {each["conceptCode"]["CodeValue"]: each["conceptValue"] for each in pituitary["qualitativeEvaluations"]}
    assert presence["121052"]["CodeMeaning"] == "Absent"


def test_a_planar_image_has_pixels_only(eye: Subject, tmp_path: Path) -> None:
    file = tell(eye, tmp_path).files["sr"]
    report = dcmread(file)
    found = list(items(report))
    assert not [item for item in found if item.ValueType == "SCOORD3D"]
    points = [tuple(item.GraphicData) for item in found if item.ValueType == "SCOORD"]
    assert points == [(1536.0, 0.0), (4.5, 3.5), (1360.5, 760.5)]
    for item in found:
        if item.ValueType == "SCOORD":
            (source,) = item.ContentSequence[0].ReferencedSOPSequence
            assert source.ReferencedSOPInstanceUID == eye.sources[0].SOPInstanceUID
    assert report.StudyInstanceUID == eye.sources[0].StudyInstanceUID
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    (evidence,) = study.ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert evidence.ReferencedSOPInstanceUID == eye.sources[0].SOPInstanceUID
    # The age of the source, `24`, is no AS (PS3.5 6.2); it is copied with the patient.
    assert eye.sources[0].PatientAge == "24"
    assert {error.split(" - ")[0] for error in dciodvfy_errors(file)} == {"</PatientAge(0010,1010)[1]>"}
    assert not unknown_codes(codes_in(report))
    assert not re.findall(r"^[WEF]: .*", run("dsrdump", "+Pu", file), re.M)


def test_the_library_says_what_the_image_has(eye: Subject, tmp_path: Path) -> None:
    found = items(dcmread(tell(eye, tmp_path).files["sr"]))
    library = {
        item.ConceptNameCodeSequence[0].CodeMeaning: item
        for item in found
        if item.RelationshipType == "HAS ACQ CONTEXT"
    }
    assert library["Modality"].ConceptCodeSequence[0].CodeValue == "OP"
    assert library["Pixel Data Rows"].MeasuredValueSequence[0].NumericValue == 1536
    assert float(library["Horizontal Pixel Spacing"].MeasuredValueSequence[0].NumericValue) == 0.005768
    assert library["Patient Orientation Row"].TextValue == "L"
    assert not [name for name in library if "Position" in name]


def test_frames_of_a_multi_frame_image_are_named(shared_data: Path, tmp_path: Path) -> None:
    image, headers = read_planar(shared_data / "planar" / "us_colour_multiframe.dcm")
    subject = make_subject(image, headers, Landmarks((Landmark(1, 4, 9.0, 9.0), Landmark(1, 29, 9.0, 8.0))), LANDMARKS)
    found = items(dcmread(tell(subject, tmp_path).files["sr"]))
    regions = [item for item in found if item.ValueType == "SCOORD"]
    frames = [item.ContentSequence[0].ReferencedSOPSequence[0].ReferencedFrameNumber for item in regions]
    assert frames == [5, 30]
    assert not dciodvfy_errors(tmp_path / "sr.dcm")


@pytest.mark.parametrize(
    ("point", "sentence"),
    [
        (Landmark(9, 0, 1, 1), "class 9, which dicom.yaml does not declare"),
        (Landmark(1, 1, 1, 1), "outside of the 1 frames"),
        (Landmark(1, 0, 1536.0, 1), "outside of the 1 frames of 1536 rows"),
        (Landmark(1, 0, float("nan"), 1), "row nan"),
        (Landmark(1, 0, 1, -0.6), "column -0.6"),
        (Landmark(1, 0, 1, 1, float("nan")), "score nan"),
    ],
)
def test_what_is_no_landmark_is_refused(eye: Subject, point: Landmark, sentence: str) -> None:
    with pytest.raises(OutputRefused, match=re.escape(sentence)):
        measure(dataclasses.replace(eye, prediction=Landmarks((point,))))


def test_rows_for_people(head: Told, eye: Subject) -> None:
    rows = [row for measured in head.findings.measurements for row in measured.rows()]
    assert {"segment": "Left eye 1", "measurement": "slice or frame", "value": 122, "unit": ""} in rows
    assert {"segment": "Right eye 2", "measurement": "certainty", "value": 81.0, "unit": "%"} in rows
    assert [row["measurement"] for row in rows if row["segment"] == "Left eye 1"][-3:] == ["x", "y", "z"]
    assert isinstance(eye.source, Image)
    planar = [row["measurement"] for row in measure(eye).measurements[0].rows()]
    assert planar == ["slice or frame", "column", "row", "certainty"]
