"""Which object a data set is, read from its first bytes while the rest is still on its way.

A scanner of top-level elements for the four native encodings of PS3.5 (implicit and explicit VR little endian,
explicit VR big endian, deflated). It decodes nothing but the handful of elements that `Identity` needs, keeps no more
than those in memory, skips everything else by its length, walks undefined lengths without recursion, and stops behind
(0020,000E).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final

from pydicom import charset
from pydicom.uid import AllTransferSyntaxes, ExplicitVRBigEndian, ImplicitVRLittleEndian

from node.dicom.identity import Identity, is_uid
from node.errors import InstanceRefused

# Ours, where pydicom's list is behind the standard: encapsulated uncompressed, deflated image frame, JPEG XL (PS3.6
# table A-1).
_NEWER_SYNTAXES = (
    "1.2.840.10008.1.2.1.98",
    "1.2.840.10008.1.2.8.1",
    "1.2.840.10008.1.2.4.110",
    "1.2.840.10008.1.2.4.111",
    "1.2.840.10008.1.2.4.112",
)
TRANSFER_SYNTAXES: Final = frozenset(str(uid) for uid in AllTransferSyntaxes) | frozenset(_NEWER_SYNTAXES)
# The whole data set is one deflate stream (PS3.5 A.5, A.7, A.12).
DEFLATED_SYNTAXES: Final = frozenset({"1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"})

MAXIMUM_SCANNED_BYTES = 1 << 20  # of element headers and wanted values; skipped values do not count
MAXIMUM_VALUE_BYTES = (
    16384  # of one wanted value; LO has 64 characters, 16 kB bears any character set and any sloppiness
)
MAXIMUM_DEPTH = 64  # of nested sequences in front of the identity; pydicom recurses, so the workers could not read more

_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_LAST_TAG = 0x0020000E
_CHARACTER_SET = 0x00080005
_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_SHORT_VRS = frozenset(
    {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS"}
    | {b"ST", b"TM", b"UI", b"UL", b"US"}
)
_FIELDS: Final = {
    0x00080016: "sop_class_uid",
    0x00080018: "sop_instance_uid",
    0x00080020: "study_date",
    0x00080050: "accession_number",
    0x00080060: "modality",
    0x00081030: "study_description",
    0x0008103E: "series_description",
    0x00100020: "patient_id",
    0x0020000D: "study_uid",
    0x0020000E: "series_uid",
}
_UID_NAMES: Final = {
    "sop_class_uid": "SOP Class UID",
    "sop_instance_uid": "SOP Instance UID",
    "study_uid": "Study Instance UID",
    "series_uid": "Series Instance UID",
}
_INFLATE_STEP_BYTES = 1 << 18


@dataclass(frozen=True)
class _Encoding:
    """How element headers are written: byte order and whether they name the VR."""

    explicit: bool
    tag: struct.Struct
    short: struct.Struct  # 16-bit length
    long: struct.Struct  # 32-bit length


def _encoding(order: str, *, explicit: bool) -> _Encoding:
    return _Encoding(explicit, struct.Struct(f"{order}HH"), struct.Struct(f"{order}H"), struct.Struct(f"{order}L"))


_IMPLICIT_LITTLE = _encoding("<", explicit=False)
_EXPLICIT_LITTLE = _encoding("<", explicit=True)
_EXPLICIT_BIG = _encoding(">", explicit=True)


class HeaderScan:
    """The identity of one data set, from its bytes in the order of their arrival: `feed` them all, then ask `identity`.

    Both raise `InstanceRefused` (Cxxx) when the bytes cannot be understood.
    """

    def __init__(self, transfer_syntax_uid: str, *, maximum_inflated_bytes: int):
        self._transfer_syntax_uid = transfer_syntax_uid
        if transfer_syntax_uid == ImplicitVRLittleEndian:
            encoding = _IMPLICIT_LITTLE
        elif transfer_syntax_uid == ExplicitVRBigEndian:
            encoding = _EXPLICIT_BIG
        else:
            encoding = _EXPLICIT_LITTLE
        self._elements = _ElementScan(encoding)
        self._inflater = zlib.decompressobj(-15) if transfer_syntax_uid in DEFLATED_SYNTAXES else None
        self._inflated = 0
        self._maximum_inflated_bytes = maximum_inflated_bytes

    @property
    def wants_more(self) -> bool:
        """Whether further bytes matter; of a deflated data set all do, to bound its inflated size."""
        return self._inflater is not None or not self._elements.done

    def feed(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the data set."""
        if self._inflater is None:
            self._elements.feed(data)
        else:
            self._inflate(self._inflater, data)

    def identity(self) -> Identity:
        """What the data set is, after all of it was fed."""
        if self._inflater is not None and not self._inflater.eof:
            raise InstanceRefused("the deflated data set ends early")
        return self.early_identity()

    @property
    def knows_identity(self) -> bool:
        """Whether what was fed reaches beyond the identity; `early_identity` says what it is, or what is wrong."""
        return self._elements.done

    def early_identity(self) -> Identity:
        """What the data set is, as far as it was fed."""
        values = self._elements.values
        texts = {name: _decode(values.get(tag, b""), values.get(_CHARACTER_SET)) for tag, name in _FIELDS.items()}
        for tag, name in _FIELDS.items():
            if name in _UID_NAMES:  # NUL is the padding (PS3.5 6.2), a space a common mistake; a newline is neither
                texts[name] = values.get(tag, b"").rstrip(b"\0 ").decode("latin-1")
        for name, title in _UID_NAMES.items():
            if not is_uid(texts[name]):
                raise InstanceRefused(f"{title} is missing" if not texts[name] else f"{title} is not a UID")
        texts["study_date"] = texts["study_date"][:8]
        texts["modality"] = texts["modality"][:16]
        return Identity(transfer_syntax_uid=self._transfer_syntax_uid, **texts)

    def _inflate(self, inflater: zlib._Decompress, data: bytes | memoryview) -> None:
        while data and not inflater.eof:
            try:
                inflated = inflater.decompress(data, _INFLATE_STEP_BYTES)
            except zlib.error as error:
                raise InstanceRefused("the deflated data set is damaged") from error
            data = inflater.unconsumed_tail
            self._inflated += len(inflated)
            if self._inflated > self._maximum_inflated_bytes:
                raise InstanceRefused(f"the data set inflates to more than {self._maximum_inflated_bytes} bytes")
            if not self._elements.done:
                self._elements.feed(inflated)


class _ElementScan:
    """A scanner over element headers that remembers where it is between two `feed`s."""

    def __init__(self, encoding: _Encoding):
        self.values: dict[int, bytes] = {}
        self.done = False
        self._encoding = encoding
        self._held = b""  # the beginning of an element whose header or wanted value is not complete yet
        self._skip = 0  # bytes of a value that nobody wants, still to come
        self._scanned = 0
        # What encloses the next element: one entry per open undefined length, (is it an item, encoding within).
        self._open: list[tuple[bool, _Encoding]] = []

    def feed(self, data: bytes | memoryview) -> None:
        if self.done:
            return
        if self._skip >= len(data):
            self._skip -= len(data)
            return
        if self._skip or self._held:
            data = self._held + bytes(data[self._skip :])
            self._skip, self._held = 0, b""
        position, end = 0, len(data)
        while not self.done:
            step = self._element(data, position, end)
            if step == 0:
                self._held = bytes(data[position:])
                return
            position += step
            if position > end:
                self._skip = position - end
                return

    def _element(self, data: bytes | memoryview, position: int, end: int) -> int:
        """Read one element header at `position`: how many bytes to go on by; 0 when it is not complete here."""
        if end - position < 8:
            return 0
        in_item, encoding = self._open[-1] if self._open else (True, self._encoding)
        group, element = encoding.tag.unpack_from(data, position)
        tag = group << 16 | element
        if not self._open and tag > _LAST_TAG:
            self.done = True
            return 8
        header = 8
        vr = b""
        if group == 0xFFFE or not encoding.explicit:
            length = encoding.long.unpack_from(data, position + 4)[0]
        else:
            vr = bytes(data[position + 4 : position + 6])
            if vr in _SHORT_VRS:
                length = encoding.short.unpack_from(data, position + 6)[0]
            elif vr in _LONG_VRS:
                if end - position < 12:
                    return 0
                header = 12
                length = encoding.long.unpack_from(data, position + 8)[0]
            else:
                raise InstanceRefused(f"element {_name(tag)} has no known VR")
        self._count(header)
        if group == 0xFFFE or not in_item:
            return header + self._delimiter(tag, length, in_item, encoding)
        if length == _UNDEFINED:
            self._enter(vr, encoding)
            return header
        if not self._open and (tag in _FIELDS or tag == _CHARACTER_SET):
            if length > MAXIMUM_VALUE_BYTES:
                raise InstanceRefused(f"element {_name(tag)} is {length} bytes long")
            if end - position < header + length:
                self._scanned -= header  # it is read again
                return 0
            self._count(length)
            self.values[tag] = bytes(data[position + header : position + header + length])
            self.done = tag == _LAST_TAG
        return header + length

    def _delimiter(self, tag: int, length: int, in_item: bool, encoding: _Encoding) -> int:
        """An item begins or ends, or a sequence ends: the bytes to skip behind its header."""
        if not self._open:
            raise InstanceRefused(f"{_name(tag)} outside of a sequence")
        if tag == _ITEM and not in_item:
            if length != _UNDEFINED:
                return length
            self._open.append((True, encoding))
        elif (tag == _ITEM_END and in_item) or (tag == _SEQUENCE_END and not in_item):
            self._open.pop()
        else:
            raise InstanceRefused(f"{_name(tag)} where a sequence does not allow it")
        return 0

    def _enter(self, vr: bytes, encoding: _Encoding) -> None:
        """An element of undefined length begins: a sequence, encapsulated pixel data, or either as UN."""
        if len(self._open) >= 2 * MAXIMUM_DEPTH:
            raise InstanceRefused(f"sequences are nested deeper than {MAXIMUM_DEPTH}")
        if vr and vr not in _LONG_VRS:
            raise InstanceRefused(f"an element of VR {vr.decode()} has no length")
        # PS3.5 6.2.2 note 2: UN of undefined length holds implicit VR little endian, whatever is around it.
        self._open.append((False, _IMPLICIT_LITTLE if vr == b"UN" else encoding))

    def _count(self, scanned: int) -> None:
        self._scanned += scanned
        if self._scanned > MAXIMUM_SCANNED_BYTES:
            raise InstanceRefused(f"no series UID within the first {MAXIMUM_SCANNED_BYTES} bytes of element headers")


def _name(tag: int) -> str:
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


def _decode(value: bytes, character_set: bytes | None) -> str:
    """A value as text, without padding and NUL."""
    try:
        text = value.decode("ascii") if b"\x1b" not in value else _decode_extended(value, character_set)
    except UnicodeDecodeError:
        text = _decode_extended(value, character_set)
    return text.replace("\0", "").strip()


def _decode_extended(value: bytes, character_set: bytes | None) -> str:
    try:
        terms = (character_set or b"").decode("ascii").replace("\0", "").split("\\")
        encodings = charset.convert_encodings([term.strip() for term in terms])
        return charset.decode_bytes(value, encodings, {ord("\\")})
    except Exception:  # an unknown or wrong character set spoils the listing, not the image
        return value.decode("latin-1")
