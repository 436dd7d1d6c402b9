"""Command sets (PS3.7 6.3, E.1): implicit VR little endian, group 0000 only, read and written in microseconds."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from node.receive.wire import AbortReason, Violation

MAXIMUM_COMMAND_BYTES = 16384
NO_DATA_SET = 0x0101

_ELEMENT = struct.Struct("<HHL")
_US = struct.Struct("<H")
_UL = struct.Struct("<L")


class CommandField(IntEnum):
    """PS3.7 E.1-1; a response is its request with 8000H."""

    C_STORE = 0x0001
    C_GET = 0x0010
    C_FIND = 0x0020
    C_MOVE = 0x0021
    C_ECHO = 0x0030
    N_EVENT_REPORT = 0x0100
    N_GET = 0x0110
    N_SET = 0x0120
    N_ACTION = 0x0130
    N_CREATE = 0x0140
    N_DELETE = 0x0150
    C_CANCEL = 0x0FFF


class Status(IntEnum):
    """PS3.7 C, PS3.4 B.2.3."""

    SUCCESS = 0x0000
    PROCESSING_FAILURE = 0x0110
    NO_SUCH_INSTANCE = 0x0112
    INVALID_ARGUMENT = 0x0115
    NO_SUCH_CLASS = 0x0118
    CLASS_INSTANCE_CONFLICT = 0x0119
    SOP_CLASS_NOT_SUPPORTED = 0x0122
    NO_SUCH_ACTION = 0x0123
    NOT_AUTHORIZED = 0x0124
    UNRECOGNIZED_OPERATION = 0x0211
    MISTYPED_ARGUMENT = 0x0212
    OUT_OF_RESOURCES = 0xA700
    DATA_SET_MISMATCH = 0xA900
    CANNOT_UNDERSTAND = 0xC000


class Element(IntEnum):
    """Elements of group 0000."""

    AFFECTED_SOP_CLASS_UID = 0x0002
    REQUESTED_SOP_CLASS_UID = 0x0003
    COMMAND_FIELD = 0x0100
    MESSAGE_ID = 0x0110
    MESSAGE_ID_RESPONDED_TO = 0x0120
    DATA_SET_TYPE = 0x0800
    STATUS = 0x0900
    ERROR_COMMENT = 0x0902
    AFFECTED_SOP_INSTANCE_UID = 0x1000
    REQUESTED_SOP_INSTANCE_UID = 0x1001
    EVENT_TYPE_ID = 0x1002
    ACTION_TYPE_ID = 0x1008


@dataclass(frozen=True)
class Command:
    """A command set as it was received."""

    elements: dict[int, bytes]

    @classmethod
    def decode(cls, encoded: bytes | bytearray) -> Command:
        """Read a command set; `Violation` when it is none."""
        elements: dict[int, bytes] = {}
        position, end = 0, len(encoded)
        while position < end:
            if end - position < _ELEMENT.size:
                raise Violation("a command set that ends within an element")
            group, element, length = _ELEMENT.unpack_from(encoded, position)
            position += _ELEMENT.size
            if group or length > end - position:
                raise Violation("a command set with a foreign or too long element")
            elements[element] = bytes(encoded[position : position + length])
            position += length
        return cls(elements)

    @property
    def field(self) -> int:
        return self.number(Element.COMMAND_FIELD)

    @property
    def message_id(self) -> int:
        return self.number(Element.MESSAGE_ID)

    @property
    def has_data_set(self) -> bool:
        return self.number(Element.DATA_SET_TYPE) != NO_DATA_SET

    def number(self, element: Element) -> int:
        """An element of VR US, which the message must have."""
        value = self.elements.get(element, b"")
        if len(value) != 2:
            raise Violation(f"a command set without (0000,{element:04X})", AbortReason.NOT_SPECIFIED)
        return _US.unpack(value)[0]

    def uid(self, element: Element) -> str:
        """An element of VR UI without its padding, "" when it is absent; whether it is a UID the caller checks."""
        return self.elements.get(element, b"").rstrip(b"\0 ").decode("latin-1")


def encode_command(elements: dict[Element, int | str]) -> bytes:
    """A command set; numbers are US, texts are UI or LO, padded by what they are. The order of tags is the caller's."""
    encoded = bytearray()
    for element, value in elements.items():
        if isinstance(value, int):
            data = _US.pack(value)
        else:
            data = value.encode("ascii", "replace")
            if len(data) % 2:
                data += b" " if element == Element.ERROR_COMMENT else b"\0"
        encoded += _ELEMENT.pack(0, element, len(data)) + data
    return _ELEMENT.pack(0, 0, 4) + _UL.pack(len(encoded)) + encoded


def encode_response(request: Command, status: int, comment: str = "", *, with_data_set: bool = False) -> bytes:
    """The response to a request: its own field, class and instance, a status, and up to 64 characters of why."""
    elements: dict[Element, int | str] = {}
    for affected, requested in (
        (Element.AFFECTED_SOP_CLASS_UID, Element.REQUESTED_SOP_CLASS_UID),
        (Element.AFFECTED_SOP_INSTANCE_UID, Element.REQUESTED_SOP_INSTANCE_UID),
    ):
        elements[affected] = (request.uid(affected) or request.uid(requested))[:64]
    elements = {
        Element.AFFECTED_SOP_CLASS_UID: elements[Element.AFFECTED_SOP_CLASS_UID],
        Element.COMMAND_FIELD: request.field | 0x8000,
        Element.MESSAGE_ID_RESPONDED_TO: request.message_id,
        Element.DATA_SET_TYPE: 0x0001 if with_data_set else NO_DATA_SET,
        Element.STATUS: status,
        Element.ERROR_COMMENT: comment[:64],
        Element.AFFECTED_SOP_INSTANCE_UID: elements[Element.AFFECTED_SOP_INSTANCE_UID],
    }
    for element in (Element.EVENT_TYPE_ID, Element.ACTION_TYPE_ID):
        if element in request.elements:
            elements[element] = request.number(element)
    return encode_command({element: value for element, value in elements.items() if value != ""})
