"""Conditions on data sets: what holds, what is refused when it is written, and what a verdict may show."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydicom import dcmread
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from node.dicom.conditions import Verdict, When


def chest_ct() -> Dataset:
    dataset = Dataset()
    dataset.Modality = "CT"
    dataset.BodyPartExamined = "Chest "
    dataset.SliceThickness = "5.000"
    dataset.SeriesNumber = "3"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.PixelSpacing = ["0.7", "0.9"]
    dataset.Rows = 512
    dataset.PatientAge = "045Y"
    dataset.SeriesDescription = "Lung 1.0 B70f"
    dataset.SoftwareVersions = "1.10"
    dataset.StudyDate = "20240131"
    dataset.StudyInstanceUID = "1.2.20"
    dataset.PatientIdentityRemoved = "YES"
    dataset.ContrastBolusAgent = ""
    dataset.PatientName = "Doe^Jane"
    dataset.PatientID = "4711"
    dataset.PatientBirthDate = "19780102"
    dataset.ReferringPhysicianName = "House^Gregory"
    dataset.ProcedureCodeSequence = [Dataset()]
    return dataset


HOLD = [
    {"Modality": "CT"},
    {"Modality": " ct "},
    {"BodyPartExamined": "CHEST"},
    {"BodyPartExamined": ["THORAX", "CHEST"]},
    {"BodyPartExamined": ["/^thx/i", "/^chest$/i"]},
    {"SliceThickness": "<= 8"},
    {"SliceThickness": "<=5"},
    {"SliceThickness": ">= 5.0"},
    {"SliceThickness": "> 1.5"},
    {"SliceThickness": "< 5.5e0"},
    {"SliceThickness": 5},
    {"SliceThickness": "5.0"},
    {"SliceThickness": [1, "> 4"]},
    {"SeriesNumber": 3},
    {"Rows": 512},
    {"Rows": "512"},
    {"ImageType": "axial"},
    {"PixelSpacing": "> 0.8"},
    {"PixelSpacing": 0.7},
    {"PatientAge": ">= 18"},
    {"PatientAge": "045Y"},
    {"PatientAge": 45},
    {"StudyDate": "> 20240101"},
    {"SeriesDescription": "/b70F/i"},
    {"SeriesDescription": r"/\d\.\d/"},
    {"SoftwareVersions": "1.10"},
    {"PatientIdentityRemoved": "YES"},
    {"ContrastBolusAgent": None},
    {"ContrastBolusAgent": [None, "IODINE"]},
    {"SeriesDescription": "!null"},
    {"ContrastBolusAgent": "!IODINE"},
    {"ContrastBolusRoute": None},
    {"ContrastBolusRoute": "!ORAL"},
    {"ContrastBolusRoute": "!= ORAL"},
    {"Modality": "!MR"},
    {"Modality": "!= MR"},
    {"SliceThickness": "!= 6"},
    {"ImageType": "!/DERIVED|LOCALIZER/"},
    {"AnatomicRegionSequence": None},
    {"PatientName": "doe^jane"},
    {"PatientID": "/^47/"},
    {"Modality": "CT", "SliceThickness": "<= 8", "BodyPartExamined": ["CHEST", None]},
    {},
]

FAIL = [
    {"Modality": "MR"},
    {"Modality": "C"},  # a literal is the whole value
    {"BodyPartExamined": ["ABDOMEN", None]},
    {"SliceThickness": "< 5"},
    {"SliceThickness": "> 5"},
    {"SliceThickness": 4.99},
    {"SliceThickness": None},
    {"SpacingBetweenSlices": "<= 8"},  # absent
    {"SpacingBetweenSlices": "> 0"},
    {"SeriesDescription": "< 8"},  # not a number
    {"SeriesDescription": "/b70F/"},
    {"ImageType": "!AXIAL"},
    {"ImageType": "!/^PRIM/"},
    {"SoftwareVersions": "1.1"},  # text is not compared as a number
    {"StudyInstanceUID": "1.2.2"},
    {"PatientAge": "< 18"},
    {"ContrastBolusAgent": "!null"},
    {"ContrastBolusAgent": "/./"},
    {"ProcedureCodeSequence": None},
    {"Modality": "CT", "SliceThickness": "<= 2"},
]


@pytest.mark.parametrize("conditions", HOLD, ids=str)
def test_condition_holds(conditions: dict[str, Any]) -> None:
    assert When(conditions).matches(chest_ct())


@pytest.mark.parametrize("conditions", FAIL, ids=str)
def test_condition_does_not_hold(conditions: dict[str, Any]) -> None:
    when = When(conditions)
    assert not when.matches(chest_ct())
    assert not all(verdict.holds for verdict in when.explain(chest_ct()))


@pytest.mark.parametrize(
    ("age", "years", "holds"),
    [("018M", "< 2", True), ("018M", "< 1", False), ("006W", "< 1", True), ("200D", "> 1", False)],
)
def test_age_is_compared_in_years(age: str, years: str, holds: bool) -> None:
    dataset = Dataset()
    dataset.PatientAge = age
    assert When({"PatientAge": years}).matches(dataset) is holds


WRONG = [
    ("Modallity", "CT", "is not a DICOM keyword; did you mean Modality?"),
    ("modality", "CT", "is not a DICOM keyword; did you mean Modality?"),
    ("(0008,0060)", "CT", "is not a DICOM keyword; expected one of PS3.6, such as Modality"),
    ("", "CT", "is not a DICOM keyword"),
    ("TransferSyntaxUID", "1.2.840.10008.1.2", "belongs to a command or a file's header"),
    ("ProcedureCodeSequence", "CT", "holds a sequence or binary data; only null"),
    ("PixelData", "/./", "holds a sequence or binary data; only null"),
    ("Modality", [], "found an empty list, which no value ever fits"),
    ("Modality", "", "found an empty text, which no value ever fits; expected null"),
    ("Modality", ["CT", ["MR"]], "found a list in a list"),
    ("Modality", {"is": "CT"}, "found a mapping"),
    ("Modality", True, "found true; expected a DICOM value"),
    ("Modality", ["CT", "!MR"], "found a negation in a list"),
    ("Modality", "!!CT", "expected one negation"),
    ("Modality", "== CT", "expected the value alone"),
    ("Modality", "!", "found an empty text"),
    ("SliceThickness", "thin", "found 'thin'; expected a number, a comparison such as '<= 8', a /regex/ or null"),
    ("SliceThickness", "<= thin", "found 'thin' behind '<='; expected a number, such as '<= 8'"),
    ("SliceThickness", "<", "found '' behind '<'; expected a number"),
    ("SliceThickness", "< 1e999", "expected a number"),
    ("SliceThickness", "!<= 8", "expected the opposite comparison"),
    ("SliceThickness", float("nan"), "expected a finite number"),
    ("SliceThickness", 10**400, "expected a finite number"),
    ("SoftwareVersions", 1.1, "holds text; expected 1.1 in quotes"),
    ("StudyInstanceUID", "< 2", "holds UIDs, which cannot be compared"),
    ("PatientAge", "adult", "expected an age such as 045Y or in years"),
    ("SeriesDescription", "/lung", "expected a regex to end with / or /i"),
    ("SeriesDescription", "/lung/g", "found the regex flags 'g'; expected none or i"),
    ("SeriesDescription", "/lung(/", "which cannot be read (missing ), unterminated subpattern"),
    ("SeriesDescription", "//", "found a regex of 0 characters"),
    ("SeriesDescription", f"/{'a' * 501}/", "found a regex of 501 characters; expected 1 to 500"),
]


@pytest.mark.parametrize(("keyword", "condition", "sentence"), WRONG)
def test_senseless_condition_is_refused(keyword: str, condition: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{keyword}: {sentence}"[: len(keyword) + 2])) as refusal:
        When({keyword: condition})
    assert sentence in str(refusal.value)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"Modallity: .*; SliceThickness: "):
        When({"Modallity": "CT", "SliceThickness": "thin", "BodyPartExamined": "CHEST"})


def test_pydantic_places_each_mistake_at_its_keyword() -> None:
    class Model(BaseModel):
        when: When

    with pytest.raises(ValidationError) as refusal:
        Model.model_validate({"when": {"Modallity": "CT", "SliceThickness": "thin", "Modality": "CT"}})
    assert [error["loc"] for error in refusal.value.errors()] == [("when", "Modallity"), ("when", "SliceThickness")]
    with pytest.raises(ValidationError, match="conditions keyed by DICOM keyword"):
        Model.model_validate({"when": ["Modality"]})
    model = Model.model_validate({"when": {"BodyPartExamined": ["CHEST", None]}})
    assert model.model_dump(mode="json") == {"when": {"BodyPartExamined": ["CHEST", None]}}
    assert Model.model_validate(model.model_dump()) == model


def test_when_is_an_immutable_mapping_of_what_was_written() -> None:
    when = When({"Modality": "CT", "BodyPartExamined": ["CHEST", None]})
    assert dict(when) == {"Modality": "CT", "BodyPartExamined": ("CHEST", None)}
    with pytest.raises(TypeError):
        when["Modality"] = "MR"  # pyright: ignore[reportIndexIssue]
    assert hash(when) == hash(When({"BodyPartExamined": ["CHEST", None], "Modality": "CT"}))
    again = pickle.loads(pickle.dumps(when))
    assert again == when
    assert again.matches(chest_ct())


def test_verdicts_read_as_sentences() -> None:
    when = When({"Modality": "CT", "SpacingBetweenSlices": "<= 8", "ImageType": ["DERIVED", "/LOC/", None]})
    assert when.explain(chest_ct()) == (
        Verdict("Modality", "CT", "CT", True),
        Verdict("SpacingBetweenSlices", "<= 8", "absent", False),
        Verdict("ImageType", "DERIVED, /LOC/ or null", "ORIGINAL\\PRIMARY\\AXIAL", False),
    )
    assert [str(verdict) for verdict in when.explain(chest_ct())] == [
        "Modality is CT, which fits CT",
        "SpacingBetweenSlices is absent, which does not fit <= 8",
        "ImageType is ORIGINAL\\PRIMARY\\AXIAL, which does not fit DERIVED, /LOC/ or null",
    ]


@pytest.mark.parametrize("keyword", ["PatientName", "PatientID", "PatientBirthDate", "ReferringPhysicianName"])
def test_verdict_shows_nothing_that_identifies(keyword: str) -> None:
    value = str(chest_ct()[keyword].value)
    (verdict,) = When({keyword: value}).explain(chest_ct())
    assert verdict.holds
    assert value not in repr(verdict)
    assert value not in str(verdict)
    (absent,) = When({keyword: value}).explain(Dataset())
    assert absent.found == "absent"


def test_verdict_shows_what_describes_the_patient() -> None:
    (verdict,) = When({"PatientAge": ">= 18"}).explain(chest_ct())
    assert str(verdict) == "PatientAge is 045Y, which fits >= 18"


def test_verdict_cannot_steer_a_terminal() -> None:
    dataset = Dataset()
    dataset.SeriesDescription = "\x1b[2Jlung\nINFO forged" + "x" * 200
    (verdict,) = When({"SeriesDescription": "/lung/"}).explain(dataset)
    assert verdict.holds
    assert verdict.found.isprintable()
    assert len(verdict.found) <= 64


def test_undecodable_value_counts_as_its_text() -> None:
    dataset = Dataset()
    tag = Tag("SliceThickness")
    dataset[tag] = RawDataElement(tag, "DS", 6, b"thin ", 0, False, True)
    assert not When({"SliceThickness": "<= 8"}).matches(dataset)
    assert When({"SliceThickness": "!null"}).matches(dataset)
    (verdict,) = When({"SliceThickness": "<= 8"}).explain(dataset)
    assert verdict.found == "thin"


def test_real_chest_ct(shared_data: Path) -> None:
    path = next(path for path in sorted((shared_data / "chest_ct_siemens").rglob("*")) if path.is_file())
    dataset = dcmread(path, stop_before_pixels=True, force=True)
    when = When({"Modality": "CT", "SliceThickness": "<= 8", "Manufacturer": "/siemens/i"})
    assert when.matches(dataset), [str(verdict) for verdict in when.explain(dataset)]


KEYWORDS = [
    "Modality",
    "SliceThickness",
    "SeriesNumber",
    "Rows",
    "PatientAge",
    "PatientName",
    "StudyDate",
    "PixelSpacing",
]
VRS = ["CS", "DS", "IS", "US", "AS", "PN", "DA", "LO", "UN", "SQ", "OB", "FD", "AT", "TM", "DT", "UI", "OW", "FL", "ZZ"]
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)


@settings(max_examples=300, deadline=None)
@given(
    keyword=st.sampled_from([*KEYWORDS, "PixelData", "nonsense"]) | st.text(max_size=12),
    condition=ATOMS
    | st.lists(ATOMS, max_size=4)
    | st.builds("{}{}".format, st.sampled_from(["<", "<=", ">", "!", "!=", "/"]), ATOMS),
)
def test_any_condition_is_read_or_refused(keyword: str, condition: Any) -> None:
    try:
        when = When({keyword: condition})
    except ValueError:
        return
    assert when.matches(chest_ct()) == all(verdict.holds for verdict in when.explain(chest_ct()))


@settings(max_examples=300, deadline=None)
@given(keyword=st.sampled_from(KEYWORDS), vr=st.sampled_from(VRS), value=st.binary(max_size=40))
def test_any_value_is_judged(keyword: str, vr: str, value: bytes) -> None:
    when = When({keyword: ["<= 8"] if keyword != "PatientName" else "/a/"})
    negated = When({keyword: "!/./"})
    present = When({keyword: "!null"})
    dataset = Dataset()
    tag = Tag(keyword)
    dataset[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)
    for condition in (when, negated, present, When({keyword: None})):
        (verdict,) = condition.explain(dataset)
        assert verdict.holds == condition.matches(dataset)
        assert str(verdict).isprintable()
    assert present.matches(dataset) != When({keyword: None}).matches(dataset)
