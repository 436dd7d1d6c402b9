"""One connection as PDUs and fragments (PS3.8 9.3): bytes in, checked, without copying; nothing here knows DIMSE.

Reads block, without a time-out of their own: `deadline` says until when the peer must have sent what is waited for, and
the receiver's clock cuts connections that are past it. So an idle association costs a sleeping thread and no CPU time.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from dataclasses import dataclass
from enum import IntEnum

from node.receive.limits import Limits

MAXIMUM_REQUEST_BYTES = 1 << 18  # A-ASSOCIATE-RQ: 128 contexts with every transfer syntax there is stay below 200 kB
_MAXIMUM_SMALL_BYTES = 1024  # every other PDU that is no P-DATA has 4 bytes
_BUFFER_BYTES = 1 << 18
_MESSAGE_GRACE_S = 120.0
_MAXIMUM_LAST_BYTES = 4 << 20  # what is read behind our last PDU

_HEADER = struct.Struct(">BxL")
_PDV = struct.Struct(">LBB")
_RESPONSE = struct.Struct(">BxLLBB")


class PduType(IntEnum):
    """PS3.8 9.3.1."""

    ASSOCIATE_RQ = 1
    ASSOCIATE_AC = 2
    ASSOCIATE_RJ = 3
    P_DATA = 4
    RELEASE_RQ = 5
    RELEASE_RP = 6
    ABORT = 7


class AbortReason(IntEnum):
    """Why the service provider aborts (PS3.8 9.3.8)."""

    NOT_SPECIFIED = 0
    UNRECOGNIZED_PDU = 1
    UNEXPECTED_PDU = 2
    INVALID_PARAMETER = 6


class PeerGone(Exception):
    """The peer closed, aborted or was cut."""


class Violation(Exception):
    """The peer broke the upper layer protocol; `reason` is what the A-ABORT says."""

    def __init__(self, message: str, reason: AbortReason = AbortReason.INVALID_PARAMETER):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Fragment:
    """Consecutive bytes of one presentation data value; `data` is valid until the next read."""

    context_id: int
    is_command: bool
    is_last: bool  # these bytes end the message (command or data set)
    data: memoryview


class Wire:
    """The reading and writing end of one connection, for one thread."""

    def __init__(self, connection: socket.socket, limits: Limits):
        self.connection = connection
        self.deadline = time.monotonic() + limits.handshake_s
        self.in_message = False  # inside of a message a pause is as bad as a slow PDU
        self.cut_because = ""
        self._limits = limits
        self._buffer = memoryview(bytearray(64))
        self._start = self._end = 0  # what lies unread in the buffer
        self._pdu_left = 0  # bytes of the current P-DATA that are not read yet
        self._pdv_left = 0
        self._pdv = (0, 0)  # context ID and control header of the current value
        self._message_began = 0.0
        self._message_bytes = 0

    def widen(self) -> None:
        """Take the large buffer: from now on images come."""
        wide = memoryview(bytearray(_BUFFER_BYTES))
        wide[: self._end - self._start] = self._buffer[self._start : self._end]
        self._buffer, self._start, self._end = wide, 0, self._end - self._start

    def cut(self, reason: str) -> None:
        """End the connection from another thread; the reader finds it closed."""
        self.cut_because = self.cut_because or reason
        with contextlib.suppress(OSError):  # not SSLSocket.shutdown: it would take the TLS state from under the reader
            socket.socket.shutdown(self.connection, socket.SHUT_RDWR)

    @property
    def is_idle(self) -> bool:
        """Whether the peer owes us nothing at the moment."""
        return not self.in_message

    # -- reading -----------------------------------------------------------------------------------------------------

    def read_request(self) -> bytes:
        """The first PDU, which must be an A-ASSOCIATE-RQ: all of it, header included."""
        pdu_type, length = self._read_header()
        if pdu_type != PduType.ASSOCIATE_RQ:
            raise Violation(f"the first PDU has type {pdu_type}", AbortReason.UNEXPECTED_PDU)
        if length > MAXIMUM_REQUEST_BYTES:
            raise Violation(f"an A-ASSOCIATE-RQ of {length} bytes")
        return _HEADER.pack(pdu_type, length) + self._read_exactly(length)

    def read_fragment(self) -> Fragment | None:
        """The next bytes of a message; None when the peer wants to release the association."""
        if self._pdv_left == 0:
            if self._pdu_left == 0 and not self._enter_pdu():
                return None
            self._enter_value()
        if self._pdv_left:  # a value may be empty, and still be the last
            self._fill(1)
        size = min(self._end - self._start, self._pdv_left)
        data = self._buffer[self._start : self._start + size]
        self._start += size
        self._pdv_left -= size
        self._pdu_left -= size
        self._message_bytes += size
        context_id, control = self._pdv
        return Fragment(context_id, bool(control & 1), bool(control & 2) and self._pdv_left == 0, data)

    def begin_message(self) -> None:
        """The peer has begun a command; from here to the end of its data set it must keep up."""
        self.in_message = True
        self._message_began = time.monotonic()
        self._message_bytes = 0

    def end_message(self) -> None:
        """All of the message is here."""
        self.in_message = False

    def _enter_pdu(self) -> bool:
        now = time.monotonic()
        if self.in_message:
            earned = _MESSAGE_GRACE_S + self._message_bytes / self._limits.minimum_rate_bytes_s
            self.deadline = min(now + self._limits.pdu_s, self._message_began + earned)
        else:
            self.deadline = now + self._limits.idle_s
            self._fill(1)
            self.deadline = time.monotonic() + self._limits.pdu_s
        pdu_type, length = self._read_header()
        if pdu_type == PduType.P_DATA:
            if not 6 <= length <= self._limits.maximum_pdu_bytes:
                raise Violation(f"a P-DATA PDU of {length} bytes")
            self._pdu_left = length
            return True
        if length > _MAXIMUM_SMALL_BYTES:
            raise Violation(f"a PDU of type {pdu_type} and {length} bytes")
        self._read_exactly(length)
        if pdu_type == PduType.ABORT:
            raise PeerGone("aborted by the peer")
        if pdu_type == PduType.RELEASE_RQ and not self.in_message:
            return False
        known = pdu_type in PduType._value2member_map_
        raise Violation(
            f"a PDU of type {pdu_type}", AbortReason.UNEXPECTED_PDU if known else AbortReason.UNRECOGNIZED_PDU
        )

    def _enter_value(self) -> None:
        if self._pdu_left < _PDV.size:
            raise Violation("a presentation data value longer than its PDU")
        self._fill(_PDV.size)
        length, context_id, control = _PDV.unpack_from(self._buffer, self._start)
        self._start += _PDV.size
        self._pdu_left -= _PDV.size
        self._pdv_left = length - 2
        if not 0 <= self._pdv_left <= self._pdu_left:
            raise Violation("a presentation data value longer than its PDU")
        self._pdv = (context_id, control)

    def _read_header(self) -> tuple[int, int]:
        self._fill(_HEADER.size)
        pdu_type, length = _HEADER.unpack_from(self._buffer, self._start)
        self._start += _HEADER.size
        return pdu_type, length

    def _read_exactly(self, length: int) -> bytes:
        """`length` bytes as they come; memory grows with what has arrived, not with what was announced."""
        body = bytearray()
        while len(body) < length:
            self._fill(1)
            size = min(self._end - self._start, length - len(body))
            body += self._buffer[self._start : self._start + size]
            self._start += size
        return bytes(body)

    def _fill(self, needed: int) -> None:
        """Have at least `needed` bytes in one piece, unread, in the buffer."""
        if self._end - self._start >= needed:
            return
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start + needed > len(self._buffer):
            rest = bytes(self._buffer[self._start : self._end])
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        while self._end - self._start < needed:
            try:
                received = self.connection.recv_into(self._buffer[self._end :])
            except OSError as error:
                raise PeerGone(self.cut_because or f"connection lost: {error.strerror or error}") from error
            if received == 0:
                raise PeerGone(self.cut_because or "closed by the peer")
            self._end += received

    # -- writing -----------------------------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Send all of `data`; a peer that does not read is cut like one that does not send."""
        self.deadline = time.monotonic() + self._limits.pdu_s
        try:
            self.connection.sendall(data)
        except OSError as error:
            raise PeerGone(self.cut_because or f"connection lost: {error.strerror or error}") from error

    def send_message(self, context_id: int, command: bytes, data_set: bytes = b"", maximum_pdu_bytes: int = 0) -> None:
        """A command and its data set, in PDUs of the size that the peer takes (0: any)."""
        room = max((maximum_pdu_bytes or 16384) - _PDV.size, 128)
        pieces = []
        for control, message in ((1, command), (0, data_set)):
            for begin in range(0, len(message), room):
                piece = message[begin : begin + room]
                last = 2 if begin + room >= len(message) else 0
                header = _RESPONSE.pack(PduType.P_DATA, len(piece) + 6, len(piece) + 2, context_id, control | last)
                pieces.append(header + piece)
        self.send(b"".join(pieces))

    def send_release_response(self) -> None:
        """Agree to the end of the association, and wait until the peer closes."""
        self.send(_HEADER.pack(PduType.RELEASE_RP, 4) + bytes(4))

    def send_reject(self, result: int, source: int, reason: int) -> None:
        """A-ASSOCIATE-RJ (PS3.8 9.3.4)."""
        self.send(_HEADER.pack(PduType.ASSOCIATE_RJ, 4) + bytes((0, result, source, reason)))

    def send_abort(self, reason: AbortReason) -> None:
        """A-ABORT by the service provider."""
        self.send(_HEADER.pack(PduType.ABORT, 4) + bytes((0, 0, 2, reason)))

    def close(self) -> None:
        """End politely: a reset would take our last PDU with it, so what still comes is read, within bounds."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.connection, socket.SHUT_WR)
            self.connection.settimeout(1.0)
            until, left = time.monotonic() + 1.0, _MAXIMUM_LAST_BYTES
            while time.monotonic() < until and left > 0 and (last := socket.socket.recv(self.connection, 65536)):
                left -= len(last)
        with contextlib.suppress(OSError):
            self.connection.close()
