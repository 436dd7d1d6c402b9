"""An association with a peer, we being the one that opens it: what delivering and asking have in common."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.events import EVT_PDU_RECV, Event, InterventionEvent, NotificationEvent
from pynetdicom.pdu import A_ASSOCIATE_RJ
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation

from node.dicom.uid import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION
from node.errors import DeliveryError

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 120.0  # a PACS may take its time over a large SEG
PDU_LENGTH = 131072
_LOOK_S = 0.05  # between two looks whether the other thread still lives
LITTLE_ENDIAN = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)

_REJECTION = {1: "rejected permanently", 2: "rejected for now"}


@dataclass(frozen=True)
class Address:
    """Where a peer listens, and under which names the two speak."""

    ae_title: str
    host: str
    port: int
    calling_ae_title: str

    def __str__(self) -> str:
        return f"{self.ae_title} at {self.host}:{self.port}"


class Connection:
    """An association as a context manager; where none comes about, a `DeliveryError` says how far it came."""

    def __init__(
        self,
        address: Address,
        contexts: list[tuple[str, tuple[str, ...]]],
        roles: Iterable[SCP_SCU_RoleSelectionNegotiation] = (),
        *,
        handlers: Iterable[tuple[InterventionEvent | NotificationEvent, Callable[..., Any]]] = (),
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ):
        """`contexts` are abstract syntaxes with the transfer syntaxes offered for each; `handlers` take what the peer
        asks for in its turn, in pynetdicom's thread.
        """
        self._address = address
        self._roles = list(roles)
        self._handlers = list(handlers)
        self._ae = AE(ae_title=address.calling_ae_title)
        self._ae.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
        self._ae.implementation_version_name = IMPLEMENTATION_VERSION
        self._ae.connection_timeout = connect_timeout_s
        self._ae.acse_timeout = connect_timeout_s * 3
        self._ae.dimse_timeout = answer_timeout_s
        self._ae.network_timeout = answer_timeout_s
        for sop_class, syntaxes in contexts:
            self._ae.add_requested_context(sop_class, list(syntaxes))

    def __enter__(self) -> Association:
        address = self._address
        rejections: list[A_ASSOCIATE_RJ] = []

        def note(event: Event) -> None:
            if isinstance(event.pdu, A_ASSOCIATE_RJ):
                rejections.append(event.pdu)

        association = self._ae.associate(
            address.host,
            address.port,
            ae_title=address.ae_title,
            max_pdu=PDU_LENGTH,
            ext_neg=list(self._roles),
            evt_handlers=[(EVT_PDU_RECV, note), *self._handlers],
        )
        if association.is_established:
            association._reactor_checkpoint = Checkpoint(association)
            _send_at_once(association)
            self._association = association
            return association
        # Not as the association has it: pynetdicom closes the connection upon a rejection, and takes the peer for one
        # that does not answer where that happens before its other thread has looked whether it is connected.
        for answer in rejections[:1]:
            what = _REJECTION.get(answer.result or 0, "rejected")
            raise DeliveryError(f"{address} {what} our association as {address.calling_ae_title}: {answer.reason_str}")
        if association.acceptor.primitive is not None:  # accepted, but no presentation context was, or aborted
            raise DeliveryError(f"{address} accepts none of the SOP classes that we want to send")
        raise DeliveryError(
            f"no DICOM answer from {address}: is it running, is the port right, does a firewall stand between?"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._association.is_established:
            self._association.release()
        self._ae.shutdown()


def _send_at_once(association: Association) -> None:
    """Switch Nagle's algorithm off (RFC 1122 4.2.3.4). A message goes out in two writes, and the second would wait for
    the peer's acknowledgement of the first, which a peer delays: 45 ms for each object to DCMTK, 4 ms without.
    """
    transport = association.dul.socket
    if transport is not None and transport.socket is not None:
        transport.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Checkpoint(threading.Event):
    """Where pynetdicom's own thread of an association waits while we send something and await the answer.

    pynetdicom 3.0 looks at a flag to know that the thread waits, and the flag still says so for a moment after the
    thread was let go. What is sent in that moment, right after an answer, may have its answer taken by that thread: the
    association then stands still until the peer's or our own timeout (1 or 2 minutes; seen with DCMTK's storescp in one
    of ten bursts of 300 studies). Here `clear` returns when the thread really waits.
    """

    def __init__(self, reactor: threading.Thread):
        """`reactor` is the association, open at first."""
        super().__init__()
        self._reactor = reactor
        self._changed = threading.Condition()
        self._is_open, self._waits = True, False

    def wait(self, timeout: float | None = None) -> bool:
        """Called by the association's thread."""
        with self._changed:
            self._waits = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_open, timeout)
            self._waits = False
            return self._is_open

    def clear(self) -> None:
        """Close it, and return when the association's thread waits here or has ended."""
        with self._changed:
            self._is_open = False
            while not self._waits and self._reactor.is_alive() and self._reactor is not threading.current_thread():
                self._changed.wait(_LOOK_S)

    def set(self) -> None:
        """Open it."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def is_set(self) -> bool:
        """Whether it is open."""
        return self._is_open
