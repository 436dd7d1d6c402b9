"""Which object a data set is: UIDs by PS3.5 9.1, and what the archive lists."""

from __future__ import annotations

import re
import uuid

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import UID, generate_uid

from node.dicom.identity import IDENTITY_KEYWORDS, Identity, is_uid, read_identity
from node.dicom.uid import derive_uid

FOUR = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")


def chest() -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.SOPInstanceUID = "1.2.3.1"
    dataset.StudyInstanceUID = "1.2.3.2"
    dataset.SeriesInstanceUID = "1.2.3.3"
    dataset.PatientID = " 4711 "
    dataset.AccessionNumber = "A-1"
    dataset.StudyDate = "20240131"
    dataset.StudyDescription = "Thorax für Ärzte"
    dataset.SeriesDescription = "Lung"
    dataset.Modality = "CT"
    return dataset


@pytest.mark.parametrize(
    "text",
    ["1.2", "0.0", "1.2.840.10008.1.1", "2.25.0", "2.25." + "9" * 59, "2.25.329800735698586629295641978511506172918"],
)
def test_what_is_a_uid(text: str) -> None:
    assert is_uid(text)


@pytest.mark.parametrize(
    "text",
    ["", "1", "1.", ".1", "1..2", "1.02", "01.2", "1.2\n", "1.2 ", " 1.2", "1.2\0", "1.2/3", "../../x", "1.2.x",
     "1.2.-3", "1,2", "1.2.\u0663", "1.\u00b2", "2.25." + "9" * 60, "1.2\x1b[2J"],
)  # fmt: skip
def test_what_is_none(text: str) -> None:
    assert not is_uid(text)


def grammar(text: str) -> bool:
    """PS3.5 9.1 said without a regular expression."""
    parts = text.split(".")
    return (
        1 <= len(text) <= 64
        and len(parts) > 1
        and all(part and set(part) <= set("0123456789") and (part == "0" or part[0] != "0") for part in parts)
    )


@given(st.text("0123456789.\n", max_size=70) | st.text(max_size=12) | st.from_regex(r"(\d+\.)+\d+", fullmatch=True))
@example("1.2\n")
def test_uid_by_the_grammar(text: str) -> None:
    assert is_uid(text) == grammar(text)


def test_identity_is_what_the_data_set_says() -> None:
    assert read_identity(chest(), "1.2.840.10008.1.2.1") == Identity(
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        sop_instance_uid="1.2.3.1",
        study_uid="1.2.3.2",
        series_uid="1.2.3.3",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        patient_id="4711",
        accession_number="A-1",
        study_date="20240131",
        study_description="Thorax für Ärzte",
        series_description="Lung",
        modality="CT",
    )
    assert set(IDENTITY_KEYWORDS) == {element.keyword for element in chest()}


@pytest.mark.parametrize("keyword", FOUR)
def test_uid_that_is_missing_or_none_is_named(keyword: str) -> None:
    dataset = chest()
    delattr(dataset, keyword)
    with pytest.raises(ValueError, match=f"^{keyword} is missing$"):
        read_identity(dataset, "1.2")
    for value in ("", None):
        setattr(dataset, keyword, value)
        with pytest.raises(ValueError, match=f"^{keyword} is missing$"):
            read_identity(dataset, "1.2")
    for hostile in ("../../x", "1.2\x1b[2J", "x" * 1000, ["1.2.3", "1.2.4"]):
        setattr(dataset, keyword, hostile)
        with pytest.raises(ValueError, match=f"^{keyword} is not a UID: ") as refusal:
            read_identity(dataset, "1.2")
        assert str(refusal.value).isprintable()
        assert len(str(refusal.value)) < 130
        assert "4711" not in str(refusal.value)


def test_padding_is_no_part_of_a_value() -> None:
    dataset = chest()
    dataset.SOPInstanceUID = UID("1.2.3.1\0")
    dataset.StudyInstanceUID = "1.2.3.2 "
    dataset.Modality = "CT "
    identity = read_identity(dataset, "1.2")
    assert (identity.sop_instance_uid, identity.study_uid, identity.modality) == ("1.2.3.1", "1.2.3.2", "CT")


def test_only_the_uids_are_required() -> None:
    dataset = Dataset()
    for keyword in FOUR:
        setattr(dataset, keyword, generate_uid())
    identity = read_identity(dataset, "1.2")
    assert (identity.patient_id, identity.accession_number, identity.study_date, identity.modality) == ("", "", "", "")


def test_value_that_cannot_be_read_counts_as_absent() -> None:
    """Bytes that no character set explains, in an element that is not needed, lose no instance."""
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    dataset = chest()
    dataset[0x00080020] = RawDataElement(Tag(0x00080020), "XX", 8, b"20240131", 0, False, True)  # no such VR
    assert read_identity(dataset, "1.2").study_date in ("", "20240131")
    assert read_identity(dataset, "1.2").patient_id == "4711"


# -- UIDs of results ---------------------------------------------------------------------------------------------------


@given(st.text(max_size=80), st.lists(st.text(max_size=20), max_size=3))
def test_derived_uid_is_a_uuid_as_a_uid(key: str, parts: list[str]) -> None:
    uid = derive_uid(key, *parts)
    assert grammar(uid)
    assert re.fullmatch(r"2\.25\.\d{1,39}", uid)
    assert uuid.UUID(int=int(uid.removeprefix("2.25."))).version == 5
    assert uid == derive_uid(key, *parts)


def test_derived_uid_never_changes() -> None:
    """A result that is made again by a later version of the node must be the same object to a PACS."""
    expected = uuid.uuid5(uuid.UUID("6b1f1f64-9a3e-5d0c-8b5e-2a7c40d6e1f3"), "job/seg")
    assert derive_uid("job", "seg") == f"2.25.{expected.int}"
    assert derive_uid("job", "seg") != derive_uid("job", "sr") != derive_uid("other", "sr")
    assert len({derive_uid("job", "frame", str(index)) for index in range(1000)}) == 1000
