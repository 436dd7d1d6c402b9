"""The report of a run that gave nothing: it cannot be read as a normal one."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from pydicom import dcmread

from node.infer.manifest import Manifest
from node.report.negative import NoResult, make_negative
from node.report.results import Result
from node.report.subject import Origin
from tests.report.cases import CREATED, MANIFEST, dciodvfy_errors, plan_series, run
from tests.report.predictions import DETECTION, read_planar
from tests.report.readers import as_dcmqi_reads, codes_in, items, unknown_codes

SENTENCES = {
    NoResult.NOT_APPLICABLE: "no axial series of 5 mm or less",
    NoResult.FAILED: "ran out of memory twice",
}


def make_origin(shared_data: Path, *, planar: bool = False, key: str = "job") -> Origin:
    headers = (
        read_planar(shared_data / "planar" / "mg_mammo.dcm")[1]
        if planar
        else plan_series(shared_data, "siemens_ct").headers
    )
    return Origin(
        key=key,
        created=CREATED,
        sources=headers,
        manifest=Manifest.model_validate(DETECTION if planar else MANIFEST),
        model_name="synthetic",
        model_version="1.2.3",
        model_digest="0123456789abcdef" * 4,
        node_version="9.9.9",
    )


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("state", NoResult)
def test_it_says_why_and_that_nothing_is_known(
    shared_data: Path, tmp_path: Path, state: NoResult, planar: bool
) -> None:
    origin = make_origin(shared_data, planar=planar)
    file = tmp_path / "sr.dcm"
    file.write_bytes(Result("sr", make_negative(origin, state, SENTENCES[state])).encode())
    assert not dciodvfy_errors(file)
    assert not re.findall(r"^[WEF]: .*", run("dsrdump", "+Pu", file), re.M)
    report = dcmread(file)
    assert not unknown_codes(codes_in(report))
    assert report.SeriesDescription == f"{state}: AI unverified: synthetic 1.2.3"
    assert (report.VerificationFlag, report.StudyInstanceUID) == ("UNVERIFIED", origin.sources[0].StudyInstanceUID)
    comments = [item.TextValue for item in items(report) if item.ConceptNameCodeSequence[0].CodeValue == "121106"]
    assert comments == [f"{state}: {SENTENCES[state]}"]
    status, *findings = as_dcmqi_reads(file, tmp_path)["Measurements"]
    values = {each["conceptCode"]["CodeValue"]: each["conceptValue"] for each in status["qualitativeEvaluations"]}
    assert values["111065"]["CodeValue"] == {NoResult.NOT_APPLICABLE: "111225", NoResult.FAILED: "111224"}[state]
    assert values["121106"] == f"{state}: {SENTENCES[state]}"
    assert [group["Finding"]["CodeMeaning"] for group in findings] == (
        ["Nodule", "Mass"] if planar else ["Lung", "Nodule"]
    )
    said = {
        each["conceptValue"]["CodeMeaning"]
        for group in findings
        for each in group["qualitativeEvaluations"]
        if each["conceptCode"]["CodeValue"] == "121052"
    }
    assert said == {"Undetermined"}


def test_it_names_all_that_was_looked_at(shared_data: Path) -> None:
    origin = make_origin(shared_data)
    dataset = make_negative(origin, NoResult.NOT_APPLICABLE, "no reason")
    (study,) = dataset.CurrentRequestedProcedureEvidenceSequence
    named = {item.ReferencedSOPInstanceUID for item in study.ReferencedSeriesSequence[0].ReferencedSOPSequence}
    assert named == {header.SOPInstanceUID for header in origin.sources}


def test_the_same_refusal_is_the_same_object_and_no_result_of_the_job(shared_data: Path) -> None:
    origin = make_origin(shared_data)
    first = Result("sr", make_negative(origin, NoResult.FAILED, "twice"))
    assert Result("sr", make_negative(origin, NoResult.FAILED, "twice")).encode() == first.encode()
    assert first.sop_instance_uid != origin.uid("sr")  # a job that is run again and gives a result makes another object
    other = Result("sr", make_negative(make_origin(shared_data, key="another"), NoResult.FAILED, "twice"))
    assert other.sop_instance_uid != first.sop_instance_uid


def test_a_study_without_an_image_is_told_too(shared_data: Path, tmp_path: Path) -> None:
    """What arrived may hold reports only."""
    header = make_origin(shared_data).sources[0][:]
    for keyword in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient", "SOPClassUID"):
        delattr(header, keyword)
    header.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.22"
    origin = dataclasses.replace(make_origin(shared_data), sources=(header,))
    file = tmp_path / "sr.dcm"
    file.write_bytes(Result("sr", make_negative(origin, NoResult.NOT_APPLICABLE, "there is no image")).encode())
    assert not dciodvfy_errors(file)
    assert not [item for item in items(dcmread(file)) if item.ValueType == "IMAGE"]
