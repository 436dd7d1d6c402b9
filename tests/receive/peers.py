"""Peers that speak DICOM byte by byte: well-formed requests to begin with, and whatever a test makes of them."""

from __future__ import annotations

import socket
import struct

from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_context
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification

VERIFICATION = "1.2.840.10008.1.1"
ECHO_CONTEXT, CT_CONTEXT = 1, 3


def association_request(
    calling: str = "STORESCU",
    called: str = "RADNODE",
    syntaxes: tuple[str, ...] = (CTImageStorage,),
    transfer_syntaxes: tuple[str, ...] = (ExplicitVRLittleEndian, ImplicitVRLittleEndian),
) -> bytes:
    """An A-ASSOCIATE-RQ: Verification as context 1, then `syntaxes` from 3 on."""
    request = A_ASSOCIATE()
    request.application_context_name = "1.2.840.10008.3.1.1.1"
    request.calling_ae_title, request.called_ae_title = calling, called
    contexts = []
    for number, syntax in enumerate((VERIFICATION, *syntaxes)):
        context = build_context(syntax, list(transfer_syntaxes if number else (ExplicitVRLittleEndian,)))
        context.context_id = 2 * number + 1
        contexts.append(context)
    request.presentation_context_definition_list = contexts
    length = MaximumLengthNotification()
    length.maximum_length_received = 16384
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = "1.2.3.4"
    request.user_information = [length, implementation]
    pdu = A_ASSOCIATE_RQ()
    pdu.from_primitive(request)
    return pdu.encode()


def connect(port: int, timeout_s: float = 20.0) -> socket.socket:
    """A connection on which nothing has been said."""
    return socket.create_connection(("127.0.0.1", port), timeout_s)


def associate(port: int, **request) -> socket.socket:
    """An established association."""
    connection = connect(port)
    connection.sendall(association_request(**request))
    answer = read_pdu(connection)
    assert answer[0] == 2, f"expected A-ASSOCIATE-AC, found {answer[:10].hex()}"
    return connection


def read_pdu(connection: socket.socket) -> bytes:
    """The next PDU, header included; b"" when the peer closed."""
    header = _read(connection, 6)
    if len(header) < 6:
        return b""
    return header + _read(connection, struct.unpack(">L", header[2:])[0])


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        try:
            piece = connection.recv(size - len(data))
        except ConnectionResetError:
            return data
        if not piece:
            return data
        data += piece
    return data
