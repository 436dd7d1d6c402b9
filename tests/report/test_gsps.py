"""Presentation states: what is drawn where, in which window, and that DCMTK renders images with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture
from pydicom import dcmread
from pydicom.dataset import Dataset
from skimage.draw import polygon2mask

from node.dicom.header import read_header, scan_folder
from node.infer.results import Boxes, Landmark, Landmarks
from node.report import outlines
from node.report.findings import Findings, measure
from node.report.gsps import make_gsps
from node.report.quiet import quietly
from node.report.results import Result
from tests.report.cases import FIRST, SECOND, SERIES, dciodvfy_errors, run
from tests.report.conftest import CaseOf
from tests.report.predictions import LANDMARKS, classify_breast, detect, make_subject, mark_head, read_planar

# What the source's own values are to blame for; they are copied as they were sent.
SOURCE_ERRORS = {
    "</PatientAge(0010,1010)[1]> - Value invalid for this VR [AS] - Length invalid for this VR - expected == 4",
    "</StudyID(0020,0010)[1]> - Value invalid for this VR [SH] - Length invalid for this VR - expected <= 16",
}


def present(findings: Findings, folder: Path) -> list[Path]:
    """The presentation states as files."""
    files = []
    with quietly():
        states = make_gsps(findings)
    for number, state in enumerate(states, 1):
        files.append(folder / f"gsps{number}.dcm")
        files[-1].write_bytes(Result("gsps", state).encode())
    return files


def drawn(states: Sequence[Dataset], uid: str) -> dict[str, list[np.ndarray]]:
    """Layer to the points of each graphic on an image, from the first pixel's corner."""
    found: dict[str, list[np.ndarray]] = {}
    for item in (item for state in states for item in state.GraphicAnnotationSequence):
        if uid in {ref.ReferencedSOPInstanceUID for ref in item.ReferencedImageSequence}:
            for graphic in item.get("GraphicObjectSequence", ()):
                points = np.array(graphic.GraphicData).reshape(-1, 2)
                assert graphic.NumberOfGraphicPoints == len(points)
                found.setdefault(item.GraphicLayer, []).append(points)
    return found


def texts(item: Dataset) -> list[str]:
    return [text.UnformattedTextValue for text in item.get("TextObjectSequence", ())]


@pytest.mark.parametrize("name", SERIES)
def test_what_is_drawn_on_each_slice_is_the_label_map(case_of: CaseOf, name: str, tmp_path: Path) -> None:
    case = case_of(name)
    files = present(case.analysis.findings, tmp_path)
    for file in files:
        assert dciodvfy_errors(file) <= SOURCE_ERRORS
    states = [dcmread(file) for file in files]
    shape = case.labels.shape[1:]
    for index, ref in enumerate(case.volume.slices):
        again = np.zeros(shape, np.uint16)
        for layer, graphics in drawn(states, ref.sop_instance_uid).items():
            inside = np.zeros(shape, bool)
            for points in graphics:
                assert (points[0] == points[-1]).all()  # closed
                inside ^= polygon2mask(shape, points[:-1, ::-1] - 0.5)
            again[inside] = int(layer.removeprefix("AI "))
        assert np.array_equal(again, case.labels[index])
    referenced = [
        ref.ReferencedSOPInstanceUID
        for state in states
        for ref in state.ReferencedSeriesSequence[0].ReferencedImageSequence
    ]
    assert sorted(referenced) == sorted(
        ref.sop_instance_uid for ref, slice_ in zip(case.volume.slices, case.labels, strict=True) if slice_.any()
    )


def test_every_image_has_the_banner_and_every_finding_its_name(case_of: CaseOf, tmp_path: Path) -> None:
    case = case_of("siemens_ct")
    (file,) = present(case.analysis.findings, tmp_path)
    state = dcmread(file)
    banner, *others = state.GraphicAnnotationSequence
    assert texts(banner) == ["AI, NOT VERIFIED - research use only   synthetic 1.2.3"]
    images = state.ReferencedSeriesSequence[0].ReferencedImageSequence
    assert list(banner.ReferencedImageSequence) == list(images)
    volumes = {measured.number: measured.volume_ml for measured in case.measurements}
    assert {(item.GraphicLayer, *texts(item)) for item in others} == {
        (f"AI {FIRST}", f"Right lung {volumes[FIRST]:.1f} mL"),
        (f"AI {SECOND}", f"Nodule {volumes[SECOND]:.1f} mL"),
    }
    layers = {layer.GraphicLayer: layer for layer in state.GraphicLayerSequence}
    assert set(layers) == {"AI", f"AI {FIRST}", f"AI {SECOND}"}
    seg = dcmread(case.files["seg"])
    assert (
        layers[f"AI {FIRST}"].GraphicLayerRecommendedDisplayCIELabValue
        == seg.SegmentSequence[0].RecommendedDisplayCIELabValue
    )
    assert others[0].GraphicObjectSequence[0].TrackingUID == seg.SegmentSequence[0].TrackingUID
    assert (state.PresentationCreationDate, state.Modality, state.SeriesNumber) == ("20260304", "PR", 907)


def test_dcmtk_renders_a_slice_in_its_own_window(shared_data: Path, tmp_path: Path) -> None:
    """The mean grey of the rendered slice is that of the window of the scanner."""
    findings = measure(detect(shared_data))
    (file,) = present(findings, tmp_path)
    index = findings.key_slices()[0]
    volume = findings.subject.volume
    folder = shared_data / "chest_ct_philips"
    paths = {str(read_header(path).SOPInstanceUID): path for path in scan_folder(folder).files}
    run("dcmp2pgm", paths[volume.slices[index].sop_instance_uid], tmp_path / "slice.pgm", "-p", file)
    rendered = np.asarray(Picture.open(tmp_path / "slice.pgm"), float)
    centre, width = -600, 1600
    known = np.clip((volume.array[index] - (centre - 0.5)) / (width - 1) + 0.5, 0, 1) * 255
    assert np.abs(rendered - known).max() <= 1.5


def test_a_pet_has_a_state_for_each_rescaling(case_of: CaseOf, tmp_path: Path) -> None:
    case = case_of("sarcoma_pet")
    states = [dcmread(file) for file in present(case.analysis.findings, tmp_path)]
    slopes = {str(header.SOPInstanceUID): header.RescaleSlope for header in case.plan.headers}
    assert len({state.SOPInstanceUID for state in states}) == len(states) == 19
    assert len({state.SeriesInstanceUID for state in states}) == 1
    for state in states:
        (ref,) = state.ReferencedSeriesSequence[0].ReferencedImageSequence
        assert state.RescaleSlope == slopes[ref.ReferencedSOPInstanceUID]
        assert state.SoftcopyVOILUTSequence[0].VOILUTFunction == "LINEAR_EXACT"  # a few SUV wide


def test_boxes_and_points_lie_where_they_are(shared_data: Path, tmp_path: Path) -> None:
    findings = measure(detect(shared_data))
    (state,) = (dcmread(file) for file in present(findings, tmp_path))
    first = next(outline for outline in findings.outlines() if outline.index == findings.key_slices()[0])
    uid = findings.subject.source_slices[first.index].sop_instance_uid
    (points,) = drawn([state], uid)["AI 1"]
    assert np.allclose(points[:-1], first.polygons[0] + 0.5, atol=1e-4)
    head = measure(mark_head(shared_data))
    (file,) = present(head, tmp_path)
    assert dciodvfy_errors(file) <= SOURCE_ERRORS
    uid = head.subject.source_slices[121].sop_instance_uid
    assert [points.tolist() for points in drawn([dcmread(file)], uid)["AI 1"]] == [[[201.25, 150.5]]]


def test_frames_of_a_colour_clip_are_drawn_on(shared_data: Path, tmp_path: Path) -> None:
    image, headers = read_planar(shared_data / "planar" / "us_colour_multiframe.dcm")
    points = (Landmark(1, 3, 100.0, 120.0, 0.9), Landmark(2, 7, 10.0, 20.0, 0.9))
    (file,) = present(measure(make_subject(image, headers, Landmarks(points), LANDMARKS)), tmp_path)
    assert not dciodvfy_errors(file)
    state = dcmread(file)
    assert state.SOPClassUID.name == "Color Softcopy Presentation State Storage"
    (ref,) = state.ReferencedSeriesSequence[0].ReferencedImageSequence
    assert list(ref.ReferencedFrameNumber) == [4, 8]
    numbers = [item.ReferencedImageSequence[0].ReferencedFrameNumber for item in state.GraphicAnnotationSequence[1:]]
    assert numbers == [4, 8]


def test_polarity_and_window_of_a_radiograph_are_kept(shared_data: Path, tmp_path: Path) -> None:
    image, (header,) = read_planar(shared_data / "planar" / "mg_mammo.dcm")
    subject = make_subject(image, (header,), Landmarks((Landmark(1, 0, 100.0, 120.0, 0.9),)), LANDMARKS)
    (file,) = present(measure(subject), tmp_path)
    assert not dciodvfy_errors(file)
    state = dcmread(file)
    (window,) = state.SoftcopyVOILUTSequence
    assert (window.WindowCenter, window.WindowWidth, window.VOILUTFunction) == (2653, 900, "SIGMOID")
    assert (state.PresentationLUTShape, state.Laterality) == ("IDENTITY", "R")
    negative = header[:]
    del negative["PhotometricInterpretation"]
    negative.PhotometricInterpretation = "MONOCHROME1"
    (file,) = present(measure(dataclasses.replace(subject, sources=(negative,))), tmp_path)
    assert dcmread(file).PresentationLUTShape == "INVERSE"


def test_what_was_left_out_is_said(case_of: CaseOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlines, "MOST_POINTS", 100)
    (file,) = present(case_of("siemens_ct").analysis.findings, tmp_path)
    (said,) = texts(dcmread(file).GraphicAnnotationSequence[0])
    assert said.endswith("outlines within 1 pixel")


def test_there_is_none_where_nothing_has_a_place(shared_data: Path) -> None:
    assert make_gsps(measure(classify_breast(shared_data))) == []
    assert make_gsps(measure(dataclasses.replace(detect(shared_data), prediction=Boxes(())))) == []


def test_the_same_findings_make_the_same_file(shared_data: Path, tmp_path: Path) -> None:
    first = present(measure(detect(shared_data)), tmp_path)[0].read_bytes()
    assert present(measure(detect(shared_data)), tmp_path)[0].read_bytes() == first
