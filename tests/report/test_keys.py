"""The key object selection: which images it names, and that others read it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from node.infer.results import Landmark, Landmarks
from node.report.findings import Findings, measure
from node.report.keys import make_keys
from node.report.quiet import quietly
from node.report.results import Result, make_results
from tests.report.cases import dciodvfy_errors, run
from tests.report.conftest import CaseOf
from tests.report.predictions import LANDMARKS, classify_breast, detect, make_subject, read_planar
from tests.report.readers import codes_in, items, unknown_codes


def select(findings: Findings, folder: Path) -> Path:
    """The selection as a file."""
    with quietly():
        keys = make_keys(findings, {result.kind: result.dataset for result in make_results(findings)})
    assert keys is not None
    file = folder / "keys.dcm"
    file.write_bytes(Result("keys", keys).encode())
    return file


def references(document: Dataset) -> list[Dataset]:
    """What it refers to, in its order."""
    return [item.ReferencedSOPSequence[0] for item in items(document) if "ReferencedSOPSequence" in item]


@pytest.fixture(params=["boxes", "segments"])
def findings(shared_data: Path, case_of: CaseOf, request: pytest.FixtureRequest) -> Findings:
    return measure(detect(shared_data)) if request.param == "boxes" else case_of("siemens_ct").analysis.findings


def test_it_names_the_key_images_then_the_results(findings: Findings, tmp_path: Path) -> None:
    file = select(findings, tmp_path)
    assert not dciodvfy_errors(file)
    dump = run("dsrdump", "+Pu", "+Pl", file)
    warnings = re.findall(r"^[WEF]: .*", dump, re.M)
    assert set(warnings) == {"W: Check for template constraints not yet supported"}  # TID 2010 in DCMTK 3.6.7
    assert '"Of Interest"' in dump
    keys = dcmread(file)
    assert not unknown_codes(codes_in(keys))
    slices = findings.subject.source_slices
    results = {result.sop_instance_uid for result in make_results(findings)}
    named = [item.ReferencedSOPInstanceUID for item in references(keys)]
    count = len(findings.key_slices())
    assert named[:count] == [slices[index].sop_instance_uid for index in findings.key_slices()]
    assert set(named[count:]) == results
    (study,) = keys.CurrentRequestedProcedureEvidenceSequence
    evidence = [ref.ReferencedSOPInstanceUID for series in study.ReferencedSeriesSequence for ref in
                series.ReferencedSOPSequence]  # fmt: skip
    assert sorted(evidence) == sorted(named)
    (text,) = [item.TextValue for item in items(keys) if item.ConceptNameCodeSequence[0].CodeValue == "113012"]
    assert text.startswith("AI, NOT VERIFIED - research use only. ")
    assert (keys.Modality, keys.SeriesNumber) == ("KO", 906)


def test_frames_are_named_by_their_numbers(shared_data: Path, tmp_path: Path) -> None:
    image, headers = read_planar(shared_data / "planar" / "us_colour_multiframe.dcm")
    points = (Landmark(1, 3, 100.0, 120.0, 0.8), Landmark(2, 29, 10.0, 20.0, 0.9))
    file = select(measure(make_subject(image, headers, Landmarks(points), LANDMARKS)), tmp_path)
    assert not dciodvfy_errors(file)
    first, second, report = references(dcmread(file))
    assert (first.ReferencedFrameNumber, second.ReferencedFrameNumber) == (30, 4)
    assert first.ReferencedSOPInstanceUID == second.ReferencedSOPInstanceUID == image.frames[0].sop_instance_uid
    assert "ReferencedFrameNumber" not in report


def test_nothing_is_selected_where_nothing_has_a_place(shared_data: Path) -> None:
    assert make_keys(measure(classify_breast(shared_data)), {}) is None


def test_results_of_another_study_are_left_out(findings: Findings) -> None:
    stranger = Dataset()
    stranger.SOPClassUID, stranger.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.3.4"
    stranger.StudyInstanceUID, stranger.SeriesInstanceUID = "1.2.3", "1.2.3.5"
    with quietly():
        keys = make_keys(findings, {"seg": stranger})
    assert keys is not None
    assert len(references(keys)) == len(findings.key_slices())


def test_the_same_selection_is_the_same_file(findings: Findings, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    assert select(findings, tmp_path).read_bytes() == select(findings, tmp_path / "again").read_bytes()
