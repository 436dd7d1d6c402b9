"""UIDs: that of this software, and those that follow from what an object is, so that the same work done twice makes the
same object.
"""

from __future__ import annotations

import uuid
from typing import Final

from pydicom.uid import UID

from node import __version__

# Which software wrote a file or speaks on an association (PS3.7 D.3.3.2): a random UUID, made once (PS3.5 B.2).
IMPLEMENTATION_CLASS_UID: Final = "2.25.108330617341927352713096246189362430381"
IMPLEMENTATION_VERSION: Final = f"RADNODE_{__version__}"[:16]

# The namespace of radnode's name-based UUIDs. Changing it changes the UID of every result.
_NAMESPACE = uuid.UUID("6b1f1f64-9a3e-5d0c-8b5e-2a7c40d6e1f3")


_YOUNGER = {"1.2.840.10008.5.1.4.1.1.66.7": "Label Map Segmentation Storage"}  # than pydicom 3.0's dictionary


def name_uid(uid: str) -> str:
    """The name of a UID that the standard defines (PS3.6 A), itself where it is not known here."""
    return _YOUNGER.get(uid) or UID(uid).name


def derive_uid(key: str, *parts: str) -> str:
    """The UID of the object that `key` and `parts` name: 2.25 and a UUIDv5 as a decimal number (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, '/'.join((key, *parts))).int}"
