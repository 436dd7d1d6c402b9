"""Which object a data set is: its UIDs and the few attributes that the archive lists studies by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands that only list load no pydicom
    from pydicom.dataset import Dataset

# PS3.5 9.1: components of digits without leading zeros, at most 64 characters. `fullmatch` matters: `$` allows a
# newline.
_UID = re.compile(r"(?:0|[1-9][0-9]*)(?:\.(?:0|[1-9][0-9]*))+")

IDENTITY_KEYWORDS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "PatientID",
    "AccessionNumber",
    "StudyDate",
    "StudyDescription",
    "SeriesDescription",
    "Modality",
)

# Type 2 attributes of the Patient and General Study modules (PS3.3 C.7.1.1, C.7.2.1): present, and empty when unknown.
PATIENT_AND_STUDY_KEYWORDS = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)


def is_uid(text: str) -> bool:
    """Whether `text` is a UID by PS3.5 9.1: nothing before, nothing after, 64 characters at most."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


@dataclass(frozen=True)
class Identity:
    """What the archive must know of an instance before it keeps it."""

    sop_class_uid: str
    sop_instance_uid: str
    study_uid: str
    series_uid: str
    transfer_syntax_uid: str
    patient_id: str = ""
    accession_number: str = ""
    study_date: str = ""
    study_description: str = ""
    series_description: str = ""
    modality: str = ""


def read_identity(dataset: Dataset, transfer_syntax_uid: str) -> Identity:
    """The identity of `dataset`, whose four UIDs must be present and valid; `ValueError` says which is not."""
    uids: dict[str, str] = {}
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        text = _text(dataset, keyword)
        if not is_uid(text):
            raise ValueError(f"{keyword} is missing" if not text else f"{keyword} is not a UID: {text[:80]!a}")
        uids[keyword] = text
    return Identity(
        sop_class_uid=uids["SOPClassUID"],
        sop_instance_uid=uids["SOPInstanceUID"],
        study_uid=uids["StudyInstanceUID"],
        series_uid=uids["SeriesInstanceUID"],
        transfer_syntax_uid=transfer_syntax_uid,
        patient_id=_text(dataset, "PatientID"),
        accession_number=_text(dataset, "AccessionNumber"),
        study_date=_text(dataset, "StudyDate")[:8],
        study_description=_text(dataset, "StudyDescription"),
        series_description=_text(dataset, "SeriesDescription"),
        modality=_text(dataset, "Modality")[:16],
    )


def _text(dataset: Dataset, keyword: str) -> str:
    """The element's value as text without padding and NUL; "" where it is absent or cannot be read."""
    try:
        value = dataset.get(keyword)
    except Exception:  # pydicom raises many kinds for a value that it cannot convert; the element then counts as absent
        return ""
    return "" if value is None else str(value).replace("\0", "").strip()
