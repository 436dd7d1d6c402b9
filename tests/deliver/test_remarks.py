"""What a peer says in words: one short line, and nothing of the patient."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from node.deliver.remarks import LONGEST, clean_comment


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An object of a patient."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "2.25.1"
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = "Müller^Eva Maria", "4711", "19570303"
    dataset.OtherPatientIDs = ["A-1", "B-2"]
    dataset.save_as(tmp_path / "object.dcm", enforce_file_format=True)
    return tmp_path / "object.dcm"


@pytest.mark.parametrize(
    ("comment", "cleaned"),
    [
        ("Out of space", "Out of space"),
        ("no\x1b[31m order\r\nfor this", "no [31m order  for this"),
        ("study 1.2.4711.3 is locked", "study 1.2.4711.3 is locked"),
        ("Patient ID 4711 has another name", "Patient ID ... has another name"),
        ("MÜLLER, EVA is not known (19570303)", "..., ... is not known (...)"),
        ("name Müller^Eva Maria differs", "name ... differs"),
        ("B-2 was merged with a-1", "... was merged with ..."),
        ("", ""),
    ],
)
def test_a_comment_is_one_line_without_the_patient(file: Path, comment: str, cleaned: str) -> None:
    assert clean_comment(comment, file) == cleaned


def test_a_long_comment_is_cut_and_no_half_of_a_name_stays(file: Path) -> None:
    assert clean_comment("x" * 100, file) == "x" * LONGEST
    assert clean_comment("x" * (LONGEST - 4) + " Müller", file) == "x" * (LONGEST - 4) + " ..."


def test_an_object_without_a_patient_hides_nothing(file: Path, tmp_path: Path) -> None:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "2.25.1"
    dataset.PatientName, dataset.PatientID = "", None
    dataset.save_as(tmp_path / "nobody.dcm", enforce_file_format=True)
    assert clean_comment("refused", tmp_path / "nobody.dcm") == "refused"
