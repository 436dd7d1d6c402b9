"""Source headers as results copy from them."""

from __future__ import annotations

import copy

import pytest
from pydicom import config
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from node.report.source import complete_header

# Type 2 of the Patient module and the General Study module: PS3.3 tables C.7-1 and C.7-3.
TYPE_2 = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip


def reference(**attributes: str) -> Dataset:
    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return item


@pytest.mark.parametrize("keyword", TYPE_2)
def test_what_is_missing_becomes_empty(keyword: str) -> None:
    source = Dataset()
    completed = complete_header(source)
    assert keyword in completed
    assert not completed[keyword].value
    assert keyword not in source


def test_what_is_there_stays() -> None:
    source = Dataset()
    for keyword in TYPE_2:
        setattr(source, keyword, "20260102" if "Date" in keyword else "101112" if "Time" in keyword else "F")
    assert complete_header(source) == source


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("PatientBirthDate", "00000000"), ("PatientBirthDate", "19701331"), ("StudyDate", "today"), ("StudyTime", "99")],
)
def test_a_date_that_is_none_becomes_empty_in_the_copy_only(keyword: str, value: str) -> None:
    """highdicom refuses to copy them, and the study would have no result."""
    source = Dataset()
    with config.disable_value_validation():
        setattr(source, keyword, value)
    completed = complete_header(source)
    assert keyword in completed
    assert completed[keyword].is_empty
    assert str(source[keyword].value) == value


def test_incomplete_references_are_left_out_of_the_copy_only() -> None:
    good = reference(ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1", ReferencedSOPInstanceUID="1.2.3")
    source = Dataset()
    source.ReferencedStudySequence = Sequence([reference(ReferencedSOPClassUID="1.2.3"), good])
    source.ReferencedPatientSequence = Sequence([reference(ReferencedSOPInstanceUID="1.2.3")])
    source.ReferencedPerformedProcedureStepSequence = Sequence([])
    before = copy.deepcopy(source)
    completed = complete_header(source)
    assert list(completed.ReferencedStudySequence) == [good]
    assert "ReferencedPatientSequence" not in completed
    assert "ReferencedPerformedProcedureStepSequence" not in completed
    assert source == before
