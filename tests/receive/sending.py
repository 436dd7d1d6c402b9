"""C-STORE by hand: data sets as bytes, one message at a time, and the status of the answer."""

from __future__ import annotations

import socket
import struct

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import CTImageStorage, generate_uid

from tests.receive.peers import CT_CONTEXT, read_pdu


def ct(**changes: object) -> Dataset:
    """A small CT image; keywords replace elements, None deletes them."""
    image = Dataset()
    image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, generate_uid()
    image.StudyInstanceUID, image.SeriesInstanceUID = generate_uid(), generate_uid()
    image.PatientID, image.Modality = "P1", "CT"
    image.Rows = image.Columns = 16
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.PixelData = bytes(512)
    for keyword, value in changes.items():
        if value is None:
            delattr(image, keyword)
        else:
            setattr(image, keyword, value)
    return image


def encode(dataset: Dataset, *, implicit: bool = False) -> bytes:
    """As it travels, little endian."""
    stream = DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = True, implicit
    write_dataset(stream, dataset)
    return stream.getvalue()


def command(fields: dict[int, bytes]) -> bytes:
    """A command set from element number to value."""
    body = b"".join(struct.pack("<HHL", 0, tag, len(value)) + value for tag, value in sorted(fields.items()))
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def store_command(sop_class: str, sop_instance: str, message_id: int = 1) -> bytes:
    """A C-STORE-RQ."""
    return command(
        {
            0x0002: _ui(sop_class),
            0x0100: struct.pack("<H", 1),
            0x0110: struct.pack("<H", message_id),
            0x0700: struct.pack("<H", 0),
            0x0800: struct.pack("<H", 0),
            0x1000: _ui(sop_instance),
        }
    )


def pdus(context_id: int, message: bytes, *, is_command: bool, piece: int = 16000) -> bytes:
    """A message part as P-DATA-TF PDUs."""
    packed = b""
    for begin in range(0, max(len(message), 1), piece):
        data = message[begin : begin + piece]
        control = int(is_command) | (2 if begin + piece >= len(message) else 0)
        packed += struct.pack(">BxLLBB", 4, len(data) + 6, len(data) + 2, context_id, control) + data
    return packed


def store_message(data: bytes, sop_class: str, sop_instance: str, context_id: int = CT_CONTEXT) -> bytes:
    """All bytes of a C-STORE-RQ with its data set."""
    request = pdus(context_id, store_command(sop_class, sop_instance), is_command=True)
    return request + pdus(context_id, data, is_command=False)


def store(connection: socket.socket, data: bytes, sop_class: str, sop_instance: str) -> tuple[int, str]:
    """Send one instance; status and error comment of the answer."""
    connection.sendall(store_message(data, sop_class, sop_instance))
    return read_status(connection)


def store_dataset(connection: socket.socket, dataset: Dataset) -> tuple[int, str]:
    """The same for a data set that says what it is."""
    return store(connection, encode(dataset), str(dataset.SOPClassUID), str(dataset.SOPInstanceUID))


def read_message(connection: socket.socket) -> tuple[dict[int, bytes], bytes]:
    """The next message: the elements of its command set, and its data set where it has one."""
    parts = {1: b"", 0: b""}
    elements: dict[int, bytes] = {}
    while True:
        pdu = read_pdu(connection)
        assert pdu[:1] == b"\x04", f"expected P-DATA, found {pdu[:10].hex() or 'the end'}"
        position = 6
        while position < len(pdu):
            length, control = struct.unpack_from(">LxB", pdu, position)
            is_command, is_last = control & 1, control & 2
            parts[is_command] += pdu[position + 6 : position + 4 + length]
            position += 4 + length
            if is_last and is_command:
                elements = _read_command(parts[1])
            if is_last and (not is_command or elements[0x0800] == b"\x01\x01"):
                return elements, parts[0]


def _read_command(body: bytes) -> dict[int, bytes]:
    elements: dict[int, bytes] = {}
    position = 0
    while position < len(body):
        _, tag, length = struct.unpack_from("<HHL", body, position)
        elements[tag] = body[position + 8 : position + 8 + length]
        position += 8 + length
    return elements


def read_status(connection: socket.socket) -> tuple[int, str]:
    """Status and error comment of a response."""
    elements, _ = read_message(connection)
    return struct.unpack("<H", elements[0x0900])[0], elements.get(0x0902, b"").decode().strip()


def release(connection: socket.socket) -> None:
    """A-RELEASE, and its answer."""
    connection.sendall(struct.pack(">BxLL", 5, 4, 0))
    assert read_pdu(connection)[:1] == b"\x06"
    connection.close()


def _ui(uid: str) -> bytes:
    data = uid.encode()
    return data + b"\0" * (len(data) % 2)
