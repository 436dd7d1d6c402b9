"""Sequences of thousands of items, encoded once and kept in a data set as the bytes that a file has.

pydicom takes 20 microseconds for an element, which are seconds for a segmentation or a report of a hundred organs. Most
elements of those are plain text, UIDs and sequences: these are encoded here, all others by pydicom. What comes out is
to the byte what pydicom writes in explicit VR little endian (PS3.5 7.1.2).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from io import BytesIO

from pydicom import dcmread
from pydicom.charset import convert_encodings
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element, write_sequence_item
from pydicom.tag import Tag

_HEADER = struct.Struct("<HH2sH")
_LONG_HEADER = struct.Struct("<HH2sHI")
_ITEM = struct.Struct("<HHI")
_PADDING = dict.fromkeys(("AE", "AS", "CS", "DA", "DT", "LO", "LT", "SH", "ST", "TM"), b" ") | {"UI": b"\0"}
_CODES = {vr: vr.encode() for vr in (*_PADDING, "SQ", "UT")}


def encode_items(items: Iterable[Dataset], character_set: str | list[str] | None = None) -> bytes:
    """The value of a sequence of these items; `character_set` is the data set's Specific Character Set."""
    encodings = convert_encodings(character_set)
    return b"".join(_encode_item(item, encodings) for item in items)


def encode_sequence(group: int, number: int, items: bytes) -> bytes:
    """A sequence element of items that are encoded."""
    return _LONG_HEADER.pack(group, number, b"SQ", 0, len(items)) + items


def encode_value(group: int, number: int, vr: str, value: bytes) -> bytes:
    """An element of binary numbers, of a VR with a length of 16 bits; `ValueError` for a value that is too long."""
    if len(value) > 0xFFFE:
        raise ValueError(f"{len(value)} bytes do not fit into an element of VR {vr}")
    return _HEADER.pack(group, number, vr.encode(), len(value)) + value


def encode_text(group: int, number: int, vr: str, text: str, character_set: str | list[str] | None = None) -> bytes:
    """An element of one text."""
    return _encode_element(DataElement(Tag(group, number), vr, text), convert_encodings(character_set))


def with_encoded(dataset: Dataset, sequences: Mapping[str, bytes]) -> FileDataset:
    """The data set as pydicom reads it of a file, with encoded sequences in place of those of these keywords.

    A sequence is decoded when somebody looks at it, and written as it is when nobody did. The data set must be for
    explicit VR little endian.
    """
    rest = dataset[:]
    for keyword in sequences:
        rest.pop(keyword, None)
    buffer = BytesIO()
    rest.file_meta = dataset.file_meta  # pyright: ignore[reportAttributeAccessIssue]
    rest.save_as(buffer, enforce_file_format=True)
    buffer.seek(0)
    whole = dcmread(buffer)
    for keyword, value in sequences.items():
        tag = Tag(keyword)
        whole[tag] = RawDataElement(tag, "SQ", len(value), value, 0, is_implicit_VR=False, is_little_endian=True)
    return whole


def _encode_item(item: Dataset, encodings: list[str]) -> bytes:
    if getattr(item, "is_undefined_length_sequence_item", False):
        return _by_pydicom(lambda file: write_sequence_item(file, item, encodings))
    body = b"".join([_encode_element(element, encodings) for element in item])
    return _ITEM.pack(0xFFFE, 0xE000, len(body)) + body


def _encode_element(element: DataElement, encodings: list[str]) -> bytes:
    tag, vr, value = element.tag, element.VR, element.value
    group, number = tag >> 16, tag & 0xFFFF
    if vr == "SQ" and not element.is_undefined_length:
        encoded = b"".join([_encode_item(item, encodings) for item in value])
        return _LONG_HEADER.pack(group, number, b"SQ", 0, len(encoded)) + encoded
    if isinstance(value, str) and value.isascii():  # the same in every character set of DICOM
        encoded = value.encode("ascii")
        if vr in _PADDING:
            encoded += _PADDING[vr] * (len(encoded) % 2)
            if len(encoded) <= 0xFFFF:
                return _HEADER.pack(group, number, _CODES[vr], len(encoded)) + encoded
        elif vr == "UT":
            encoded += b" " * (len(encoded) % 2)
            return _LONG_HEADER.pack(group, number, b"UT", 0, len(encoded)) + encoded
    return _by_pydicom(lambda file: write_data_element(file, element, encodings))


def _by_pydicom(write) -> bytes:
    file = DicomBytesIO()
    file.is_implicit_VR, file.is_little_endian = False, True
    write(file)
    return file.getvalue()
