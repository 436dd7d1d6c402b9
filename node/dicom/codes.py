"""Coded concepts as plain values: what DICOM calls a code triplet (PS3.3 8.8); and those that radnode itself uses."""

from __future__ import annotations

from typing import NamedTuple


class Code(NamedTuple):
    """A coded concept: coding scheme designator, code value, code meaning."""

    scheme: str
    value: str
    meaning: str


# CID 244 Laterality (PS3.16), SNOMED CT
LATERALITY = {
    "left": Code("SCT", "7771000", "Left"),
    "right": Code("SCT", "24028007", "Right"),
    "both": Code("SCT", "51440002", "Bilateral"),
    "unpaired": Code("SCT", "66459002", "Unilateral"),
}
