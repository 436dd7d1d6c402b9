"""Rejection notes: what they withdraw, why, and that a note made twice is one note. Predecessors of a report."""

from __future__ import annotations

import dataclasses
import re
from datetime import timedelta
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from node.errors import NotAllowed
from node.report.findings import measure
from node.report.negative import NoResult, make_negative
from node.report.rejection import RejectionReason, make_rejection
from node.report.results import Result, make_results
from tests.report.cases import CREATED, Case, dciodvfy_errors, run
from tests.report.conftest import CaseOf
from tests.report.readers import codes_in, items, unknown_codes

TITLES = {
    RejectionReason.QUALITY: ("113001", "Rejected for Quality Reasons"),
    RejectionReason.SAFETY: ("113037", "Rejected for Patient Safety Reasons"),
    RejectionReason.WORKLIST: ("113038", "Incorrect Modality Worklist Entry"),
    RejectionReason.RETENTION: ("113039", "Data Retention Policy Expired"),
}


@pytest.fixture(scope="module")
def case(case_of: CaseOf) -> Case:
    return case_of("siemens_ct")


@pytest.fixture(scope="module")
def stored(case: Case) -> list[Dataset]:
    """Headers of the files of SEG and SR, as the archive has them."""
    return [dcmread(file, stop_before_pixels=True) for file in case.files.values()]


def reject(stored: list[Dataset], reason: RejectionReason = RejectionReason.QUALITY, comment: str = "") -> Dataset:
    return make_rejection(stored, reason, created=CREATED, node_version="9.9.9", comment=comment)


@pytest.mark.parametrize("reason", RejectionReason)
def test_it_says_what_is_withdrawn_and_why(stored: list[Dataset], reason: RejectionReason, tmp_path: Path) -> None:
    file = tmp_path / "note.dcm"
    file.write_bytes(Result("rejection", reject(stored, reason, "of another patient")).encode())
    assert not dciodvfy_errors(file)
    assert set(re.findall(r"^[WEF]: .*", run("dsrdump", "+Pu", file), re.M)) == {
        "W: Check for template constraints not yet supported"
    }
    note = dcmread(file)
    assert not unknown_codes(codes_in(note))
    (title,) = note.ConceptNameCodeSequence
    assert (title.CodeValue, title.CodeMeaning) == TITLES[reason]
    assert note.StudyInstanceUID == stored[0].StudyInstanceUID
    assert note.SeriesInstanceUID not in {each.SeriesInstanceUID for each in stored}
    (study,) = note.CurrentRequestedProcedureEvidenceSequence
    evidence = {
        (series.SeriesInstanceUID, ref.ReferencedSOPClassUID, ref.ReferencedSOPInstanceUID)
        for series in study.ReferencedSeriesSequence
        for ref in series.ReferencedSOPSequence
    }
    assert evidence == {(each.SeriesInstanceUID, each.SOPClassUID, each.SOPInstanceUID) for each in stored}
    named = [item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in items(note) if
             "ReferencedSOPSequence" in item]  # fmt: skip
    assert sorted(named) == sorted(each.SOPInstanceUID for each in stored)
    assert note.SOPInstanceUID not in named
    texts = [item.TextValue for item in items(note) if item.ConceptNameCodeSequence[0].CodeValue == "113012"]
    assert texts == ["of another patient"]


def test_a_series_that_holds_several_is_named_once(stored: list[Dataset]) -> None:
    other = stored[0][:]
    del other["SOPInstanceUID"]
    other.SOPInstanceUID = "1.2.3.4"
    (study,) = reject([*stored, other]).CurrentRequestedProcedureEvidenceSequence
    assert sorted(len(series.ReferencedSOPSequence) for series in study.ReferencedSeriesSequence) == [1, 2]


def test_the_same_withdrawal_is_the_same_note(stored: list[Dataset]) -> None:
    first = Result("rejection", reject(stored))
    assert Result("rejection", reject([*stored[::-1], stored[0]])).encode() == first.encode()
    later = make_rejection(stored, RejectionReason.QUALITY, created=CREATED + timedelta(1), node_version="9.9.9")
    assert later.SOPInstanceUID == first.sop_instance_uid
    assert reject(stored, RejectionReason.SAFETY).SOPInstanceUID != first.sop_instance_uid
    assert reject(stored[:1]).SOPInstanceUID != first.sop_instance_uid


def test_what_cannot_be_withdrawn_together_is_refused(stored: list[Dataset]) -> None:
    with pytest.raises(NotAllowed, match="at least one"):
        reject([])
    elsewhere = stored[0][:]
    for keyword in ("SOPInstanceUID", "StudyInstanceUID"):
        delattr(elsewhere, keyword)
        setattr(elsewhere, keyword, "1.2.3")
    with pytest.raises(NotAllowed, match="objects of 2 studies"):
        reject([*stored, elsewhere])
    note = reject(stored)
    with pytest.raises(NotAllowed, match=f"{note.SOPInstanceUID} is a rejection note"):
        reject([note])


def test_a_newer_report_names_the_one_that_it_replaces(case: Case, stored: list[Dataset], tmp_path: Path) -> None:
    earlier = [each for each in stored if each.Modality == "SR"]
    newer = dataclasses.replace(case.analysis.subject, key="newer", previous=tuple(earlier))
    made = [{result.kind: result for result in make_results(measure(newer))}["sr"] for _ in range(2)]
    assert made[0].encode() == made[1].encode()
    file = tmp_path / "sr.dcm"
    file.write_bytes(made[0].encode())
    assert not dciodvfy_errors(file)
    (study,) = dcmread(file).PredecessorDocumentsSequence
    (series,) = study.ReferencedSeriesSequence
    (document,) = series.ReferencedSOPSequence
    assert [study.StudyInstanceUID, series.SeriesInstanceUID, document.ReferencedSOPInstanceUID] == [
        earlier[0].StudyInstanceUID,
        earlier[0].SeriesInstanceUID,
        earlier[0].SOPInstanceUID,
    ]
    assert "PredecessorDocumentsSequence" not in earlier[0]


def test_a_report_that_is_made_again_replaces_no_other(case: Case, stored: list[Dataset]) -> None:
    origin = dataclasses.replace(case.analysis.subject, previous=tuple(stored))
    again = make_negative(origin, NoResult.FAILED, "twice")
    own = make_negative(dataclasses.replace(origin, previous=(again,)), NoResult.FAILED, "twice")
    assert len(again.PredecessorDocumentsSequence[0].ReferencedSeriesSequence) == len(stored)
    assert "PredecessorDocumentsSequence" not in own
