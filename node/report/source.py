"""The source headers as the results copy from them: filled where the standard lets us, never altered in place."""

from __future__ import annotations

from highdicom import SpecificCharacterSetValues
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.valuerep import DA, TM

from node.dicom.identity import PATIENT_AND_STUDY_KEYWORDS

_DATES = {"PatientBirthDate": DA, "StudyDate": DA, "StudyTime": TM}
# Optional sequences of references that are copied; scanners leave them incomplete.
_REFERENCES = ("ReferencedStudySequence", "ReferencedPatientSequence", "ReferencedPerformedProcedureStepSequence")


def complete_header(source: Dataset, says: str = "") -> Dataset:
    """A copy of a source header in which the Type 2 attributes that a result copies are present, empty where unknown.

    Empty is also a date or time that is none, such as a birth date of 00000000, and a sex that DICOM does not know;
    references that are incomplete are left out of the copy. Text is in UTF-8 where highdicom does not take the source's
    character set, and where what the result itself `says` is not ASCII, which that set may not have. Of a name of
    several values the first counts.
    """
    header = source[:]  # shares the elements, not the set of them as copy.copy does
    for keyword in PATIENT_AND_STUDY_KEYWORDS:
        if keyword not in header:
            setattr(header, keyword, None)
    for keyword in ("PatientName", "ReferringPhysicianName"):
        if isinstance(names := header.get(keyword), MultiValue):  # a backslash within it; highdicom takes one value
            delattr(header, keyword)
            setattr(header, keyword, next((name for name in names if name), None))
    if header.get("PatientSex") not in ("M", "F", "O", "", None):  # PS3.3 C.7.1.1; U and X are often sent
        delattr(header, "PatientSex")
        header.PatientSex = None
    for keyword, kind in _DATES.items():
        try:
            kind(str(header.get(keyword) or ""))
        except Exception:  # as many kinds as there are ways to be no date
            delattr(header, keyword)  # the element is the source's own: another one takes its place
            setattr(header, keyword, None)
    stays = "SpecificCharacterSet" not in header or _is_taken(header.SpecificCharacterSet)
    if not (stays and says.isascii()):
        header.pop("SpecificCharacterSet", None)
        header.SpecificCharacterSet = "ISO_IR 192"
    for keyword in _REFERENCES:
        complete = [item for item in header.get(keyword) or () if _is_reference(item)]
        if keyword in header:
            delattr(header, keyword)
        if complete:
            setattr(header, keyword, complete)
    return header


def _is_taken(character_set: object) -> bool:
    """Whether highdicom 0.28 takes it: no empty one, none of the usual Japanese and Korean pairs, whose first is empty,
    and no code extensions by themselves."""
    known = {value.value for value in SpecificCharacterSetValues}
    return isinstance(character_set, str) and character_set in known and not character_set.startswith("ISO 2022")


def _is_reference(item: Dataset) -> bool:
    """Whether a reference has both of its Type 1 attributes (SOP Instance Reference Macro, PS3.3 table 10-11)."""
    return bool(item.get("ReferencedSOPClassUID")) and bool(item.get("ReferencedSOPInstanceUID"))
