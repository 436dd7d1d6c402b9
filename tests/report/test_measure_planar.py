"""Segments of planar images: measured frame by frame, reported as regions of frames of the SEG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from highdicom import sr
from pydicom import dcmread
from pydicom.dataset import Dataset

from node.dicom.volume import Image
from node.infer.manifest import Measurement
from node.infer.results import Labelmap
from node.report.quiet import quietly
from node.report.results import make_results
from node.report.segments import SegmentFindings
from tests.report.cases import FIRST, MANIFEST, SECOND, dciodvfy_errors, run
from tests.report.predictions import make_subject, read_planar
from tests.report.readers import codes_in, items, numbers_of, unknown_codes

PLANAR = MANIFEST | {
    "inputs": {"image": {"kind": "image"}},
    "measurements": ["area", "longest diameter", "perpendicular diameter", "mean", "minimum", "percentile 90"],
}

# The photograph of the eye has the age '0', which its results repeat.
OF_THE_SOURCE = {
    "</PatientAge(0010,1010)[1]> - Value invalid for this VR [AS] - Length invalid for this VR - expected == 4"
}


def report(image: Image, headers: tuple[Dataset, ...], labels: np.ndarray, folder: Path) -> SegmentFindings:
    """The findings, and their results as files."""
    findings = SegmentFindings(make_subject(image, headers, Labelmap(labels.astype(np.uint16), None), PLANAR))
    for result in make_results(findings):
        (folder / f"{result.kind}.dcm").write_bytes(result.encode())
    return findings


def draw(image: Image) -> np.ndarray:
    """A rectangle on every frame but the last two, taller by a row on each, and on the first one another."""
    frames, rows, columns = image.array.shape[:3]
    labels = np.zeros((frames, rows, columns), int)
    for frame in range(max(1, frames - 2)):
        labels[frame, 40 : 51 + frame, 60:100] = FIRST
    labels[0, rows - 30 : rows - 10, columns - 60 : columns - 20] = SECOND
    return labels


def test_a_mammogram_is_measured_in_millimetres(shared_data: Path, tmp_path: Path) -> None:
    image, headers = read_planar(shared_data / "planar" / "mg_mammo.dcm")
    assert image.spacing_mm is not None
    labels = draw(image)
    findings = report(image, headers, labels, tmp_path)
    pixel_mm2 = image.spacing_mm[0] * image.spacing_mm[1]
    read = dcmread(tmp_path / "sr.dcm")
    for number, label in enumerate((FIRST, SECOND)):
        found = numbers_of(read, number)
        values = image.array[labels == label].astype(np.float64)
        assert found == {
            "Area": pytest.approx(values.size * pixel_mm2, rel=1e-5),
            "Long axis": pytest.approx(findings.measurements[number].value(Measurement.LONGEST_DIAMETER)),
            "Short axis": pytest.approx(findings.measurements[number].value(Measurement.PERPENDICULAR_DIAMETER)),
            "X-Ray Attenuation, Mean": pytest.approx(values.mean(), rel=1e-5),
            "X-Ray Attenuation, Minimum": values.min(),
            "X-Ray Attenuation, Ninetieth percentile": pytest.approx(np.percentile(values, 90), rel=1e-5),
        }
    area = findings.measurements[0].rows()[0]
    assert (area["measurement"], area["unit"]) == ("area", "mm2")


def test_frames_are_told_apart_and_colour_has_no_values(shared_data: Path, tmp_path: Path) -> None:
    image, headers = read_planar(shared_data / "planar" / "us_colour_multiframe.dcm")
    labels = draw(image)
    frames = image.array.shape[0]
    findings = report(image, headers, labels, tmp_path)
    read, seg = dcmread(tmp_path / "sr.dcm"), dcmread(tmp_path / "seg.dcm")
    groups = [
        item
        for item in items(read)
        if item.ConceptNameCodeSequence[0].CodeValue == "125007"
        and any(part.ConceptNameCodeSequence[0].CodeValue == "121214" for part in item.ContentSequence)
    ]
    assert len(groups) == frames - 2 + 1
    scale = image.spacing_mm or (1.0, 1.0)
    for index, group in enumerate(groups):
        found = numbers_of(read, index)
        assert not any("," in name for name in found)
        part = {item.ConceptNameCodeSequence[0].CodeValue: item for item in group.ContentSequence}
        segment_frame = part["121214"].ReferencedSOPSequence[0]
        source = part["121233"].ReferencedSOPSequence[0]
        frame = int(source.ReferencedFrameNumber)
        number = 1 + (part["112039"].TextValue == "synthetic Nodule")
        mask = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)[int(segment_frame.ReferencedFrameNumber) - 1] > 0
        assert (mask == (labels[frame - 1] == (FIRST, SECOND)[number - 1])).all()
        assert found["Area"] == pytest.approx(mask.sum() * scale[0] * scale[1], rel=1e-5)
    assert [row["segment"] for row in findings.measurements[1].rows()] == ["Right lung, frame 2"] * 3
    (line, _) = findings.lines()
    assert [cell.text for cell in line.cells if cell.head == "frame"] == [f"{frames - 2} ({frames - 2})"]


def test_pixels_of_unknown_size_are_counted(shared_data: Path, tmp_path: Path) -> None:
    image, headers = read_planar(shared_data / "planar" / "xc_photo.dcm")
    assert image.spacing_mm is None
    labels = np.where(draw(image) == FIRST, FIRST, 0)
    findings = report(image, headers, labels, tmp_path)
    read = dcmread(tmp_path / "sr.dcm")
    assert numbers_of(read)["Area"] == 11 * 40
    units = {
        item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue
        for item in items(read)
        if item.ValueType == "NUM"
        and item.ConceptNameCodeSequence[0].CodeMeaning in ("Area", "Long axis", "Short axis")
    }
    assert units == {"{pixels}"}
    assert {row["unit"] for row in findings.measurements[0].rows()} == {"pixels"}
    (absent,) = (each for each in findings.measurements if not each.voxels)
    assert absent.name == "Nodule"


@pytest.mark.parametrize("name", ["mg_mammo", "op_fundus", "us_colour_multiframe", "xc_photo"])
def test_others_read_the_reports(shared_data: Path, tmp_path: Path, name: str) -> None:
    image, headers = read_planar(shared_data / "planar" / f"{name}.dcm")
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        report(image, headers, draw(image), folder)
    file = tmp_path / "one" / "sr.dcm"
    assert dciodvfy_errors(file) <= OF_THE_SOURCE
    assert not unknown_codes(codes_in(dcmread(file)))
    assert "Referenced Segmentation Frame" in run("dsrdump", "+Pl", file)
    with quietly():
        content = sr.srread(file).content
    regions = content.get_planar_roi_measurement_groups()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(regions) == (draw(image).any(axis=(1, 2)).sum() + 1)
    for kind in ("seg", "sr"):
        assert (tmp_path / "one" / f"{kind}.dcm").read_bytes() == (tmp_path / "two" / f"{kind}.dcm").read_bytes()
