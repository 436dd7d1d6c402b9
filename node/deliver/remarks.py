"""What a peer says of an object in words (Error Comment, PS3.7 C.4), as it may stand in a log and a story."""

from __future__ import annotations

import re
from pathlib import Path

from pydicom import dcmread

from node.text import one_line

LONGEST = 64  # characters of Error Comment, an LO (PS3.5 6.2); peers send more
_IDENTIFYING = ("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "OtherPatientIDs")
_LEFT_OUT = "..."


def clean_comment(comment: str, file: Path) -> str:
    """One printable line of `comment`, without what the object in `file` says of its patient: peers quote it when they
    refuse an object for it, such as a name that they have not under that ID.
    """
    # Left out before it is cut, so that no half of a name stays.
    said = one_line(comment, 1024)
    for part in sorted(_identifying_parts(file), key=len, reverse=True) if said else ():
        # A whole word, and no component of a UID.
        pattern = rf"(?<!\w)(?<!\d\.){re.escape(part)}(?!\w)(?!\.\d)"
        said = re.sub(pattern, _LEFT_OUT, said, flags=re.IGNORECASE)
    return said[:LONGEST].strip()


def _identifying_parts(file: Path) -> set[str]:
    """The values of the elements that identify a patient, and the words of a name."""
    header = dcmread(file, stop_before_pixels=True, specific_tags=list(_IDENTIFYING))
    parts: set[str] = set()
    for element in header:
        values = element.value if element.VM > 1 else [element.value]
        for value in filter(None, map(str, values)):
            parts |= {value, *(re.split(r"[\^=\s,]+", value) if element.VR == "PN" else ())}
    return {part.strip() for part in parts} - {""}
