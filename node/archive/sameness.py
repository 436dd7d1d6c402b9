"""Whether two files hold the same DICOM object although their bytes differ: other transfer syntax, same content."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.dataelem import DataElement
from pydicom.pixels import iter_pixels

_log = logging.getLogger(__name__)

_PIXEL_DATA = 0x7FE00010
# What an encoder of pixel data changes beside the pixel data itself: PS3.5 8.2, PS3.3 C.7.6.3.
_ENCODING_TAGS = frozenset(
    {0x00280002, 0x00280004, 0x00280006, 0x00282110, 0x00282112, 0x00282114, 0x7FE00001, 0x7FE00002, _PIXEL_DATA}
)
MAXIMUM_BYTES = 1 << 29  # beyond it the comparison would cost more than a look by a person


def same_object(known: Path, other: Path) -> bool:
    """Whether `other` is the object in `known` in another encoding; False when that cannot be told."""
    try:
        if max(known.stat().st_size, other.stat().st_size) > MAXIMUM_BYTES:
            return False
        first, second = dcmread(known), dcmread(other)
        if first.file_meta.TransferSyntaxUID == second.file_meta.TransferSyntaxUID:
            return False  # the same encoding, yet other bytes
        return _same_elements(first, second, top=True) and _same_pixels(first, second)
    except Exception as error:  # hostile or undecodable content: a person shall look at it
        _log.info("two encodings of one instance cannot be compared: %s", type(error).__name__)
        return False


def _same_elements(first: Dataset, second: Dataset, *, top: bool = False) -> bool:
    ignored = _ENCODING_TAGS if top else frozenset()
    tags = {tag for tag in (*first.keys(), *second.keys()) if tag not in ignored and tag.element != 0}
    return all(tag in first and tag in second and _same_element(first[tag], second[tag]) for tag in tags)


def _same_element(first: DataElement, second: DataElement) -> bool:
    if first.VR == "SQ" and second.VR == "SQ":
        pairs = list(zip(first.value, second.value, strict=False))
        return len(first.value) == len(second.value) and all(_same_elements(*pair) for pair in pairs)
    if "UN" in (first.VR, second.VR) and first.VR != second.VR:
        return True  # a private element whose VR the implicit encoding lost: its bytes cannot be compared as values
    return first.value == second.value


def _same_pixels(first: Dataset, second: Dataset) -> bool:
    if ("PixelData" in first) != ("PixelData" in second):
        return False
    if "PixelData" not in first:
        return True
    frames = zip(iter_pixels(first), iter_pixels(second), strict=True)
    return all(np.array_equal(one, two) for one, two in frames)
