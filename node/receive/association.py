"""One association, from its first byte to its end, in a thread of its own that sleeps while the peer is silent.

Admission is decided on the fixed part of the A-ASSOCIATE-RQ, before anything of variable length is decoded; the
contexts are negotiated by pynetdicom (`node.receive.negotiation`); the messages go to the services.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from node.receive.admission import Admission, Pace, Places, Refusal, Reject, Sender
from node.receive.commitment import Commitment
from node.receive.dimse import MAXIMUM_COMMAND_BYTES, Command, CommandField, Status, encode_response
from node.receive.limits import Limits
from node.receive.negotiation import (
    APPLICATION_CONTEXT,
    STORAGE_COMMITMENT,
    VERIFICATION,
    AcceptedContext,
    Agreement,
    Called,
    ForeignApplicationContext,
    negotiate,
)
from node.receive.storage import Answer, Storage, StorageSession
from node.receive.wire import AbortReason, Fragment, PeerGone, Violation, Wire

_log = logging.getLogger(__name__)

_MAXIMUM_SMALL_DATA_SET_BYTES = 16 << 20  # of storage commitment: 100,000 instances fit
_HAS_DATA_SET = (CommandField.C_STORE, CommandField.N_ACTION)


@dataclass(frozen=True)
class Services:
    """What all associations of a process share."""

    admission: Admission
    places: Places
    pace: Pace
    limits: Limits
    storage: Storage
    commitment: Commitment


class Association:
    """The acceptor's side of one association."""

    def __init__(self, connection: socket.socket, address: str, services: Services):
        self.wire = Wire(connection, services.limits)
        self.address = address
        self.is_established = False
        self._services = services
        self._sender: Sender | None = None
        self._agreement = Agreement({}, 0, b"")
        self._storage = StorageSession(services.storage)

    def serve(self, tls: ssl.SSLContext | None) -> None:
        """Serve until the peer releases, goes or is cut; never raises, and closes the connection."""
        try:
            if tls is not None:
                self._secure(tls)
            self._establish()
        except PeerGone as error:
            if not isinstance(error, _Finished):
                _log.info("%s: %s", self, error)
        except Violation as error:
            _log.warning("audit: %s aborted: %s", self, error)
            self._abort(error.reason)
        except Exception:  # the thread's outermost frame: one strange peer must not cost the others anything
            _log.exception("%s aborted", self)
            self._abort(AbortReason.NOT_SPECIFIED)
        finally:
            self.wire.close()

    def __str__(self) -> str:
        who = f"{self._sender.name} ({self._sender.ae_title})" if self._sender else "unknown peer"
        return f"association of {who} at {self.address}"

    # -- opening -----------------------------------------------------------------------------------------------------

    def _secure(self, tls: ssl.SSLContext) -> None:
        try:
            # Wrapping takes the descriptor from the plain socket: who cuts a slow handshake needs the new one.
            secured = tls.wrap_socket(self.wire.connection, server_side=True, do_handshake_on_connect=False)
            self.wire.connection = secured
            secured.do_handshake()
        except (OSError, ValueError) as error:  # ValueError: cut while the handshake began
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
            _log.warning("audit: TLS refused for %s: %s", self.address, self.wire.cut_because or reason)
            raise _Finished from error

    def _establish(self) -> None:
        request = self.wire.read_request()
        called = Called.decode(request)
        if not called.protocol_version & 1:
            self._refuse(Refusal(Reject.PROTOCOL_VERSION, f"protocol version {called.protocol_version}"))
        decision = self._services.admission.decide(called.called_ae_title, called.calling_ae_title, self.address)
        if isinstance(decision, Refusal):
            self._refuse(decision)
        self._sender = decision
        with self._services.places.take(decision, self.address) as full:
            if full is not None:
                self._refuse(full)
            try:
                self._agreement = negotiate(
                    request,
                    sop_classes=decision.sop_classes,
                    accept_unknown=self._services.admission.accept_unknown_sop_classes,
                    maximum_pdu_bytes=self._services.limits.maximum_pdu_bytes,
                )
            except ForeignApplicationContext:
                self._refuse(
                    Refusal(Reject.APPLICATION_CONTEXT, f"its application context is not {APPLICATION_CONTEXT}")
                )
            self.wire.send(self._agreement.acceptance)
            self.is_established = True
            self.wire.widen()
            with self._storage:
                self._converse()

    def _refuse(self, refusal: Refusal) -> NoReturn:
        _log.warning("audit: association refused for %s: %s", self.address, refusal.why)
        self.wire.send_reject(*refusal.reject.value)
        raise _Finished

    def _abort(self, reason: AbortReason) -> None:
        with contextlib.suppress(PeerGone):
            self.wire.send_abort(reason)

    # -- messages ----------------------------------------------------------------------------------------------------

    def _converse(self) -> None:
        while (fragment := self.wire.read_fragment()) is not None:
            self.wire.begin_message()
            context_id, encoded = fragment.context_id, bytearray()
            while True:
                if not fragment.is_command or fragment.context_id != context_id:
                    raise Violation("a data set, or another presentation context, within a command")
                encoded += fragment.data
                if len(encoded) > MAXIMUM_COMMAND_BYTES:
                    raise Violation(f"a command set of more than {MAXIMUM_COMMAND_BYTES} bytes")
                if fragment.is_last:
                    break
                fragment = self._next_fragment()
            context = self._agreement.contexts.get(context_id)
            if context is None:
                raise Violation(f"a message for presentation context {context_id}, which was not accepted")
            self._handle(Command.decode(encoded), context_id, context)
            self.wire.end_message()
        self._services.storage.settle()  # who releases may look at once for what it sent
        self.wire.send_release_response()

    def _handle(self, request: Command, context_id: int, context: AcceptedContext) -> None:
        is_service = context.abstract_syntax in (VERIFICATION, STORAGE_COMMITMENT)
        if request.field == CommandField.C_CANCEL:
            return  # nothing here takes long enough to be cancelled
        if request.field & 0x8000:
            raise Violation("a response to nothing that was asked")
        if request.field == CommandField.C_STORE and request.has_data_set and not is_service:
            assert self._sender is not None
            fragments = self._data_set(context_id)
            answer = self._storage.store(request, context, self._sender.ae_title, fragments)
            self._tell_refused(answer)
            if delay_s := self._services.pace.delay_s(self._sender):
                time.sleep(min(delay_s, self._services.limits.pdu_s / 2))
            self._answer(request, context_id, answer)
            self._storage.tidy()
        elif request.field == CommandField.C_ECHO and context.abstract_syntax == VERIFICATION:
            self._answer(request, context_id, Answer(Status.SUCCESS))
        elif request.field == CommandField.N_ACTION and context.abstract_syntax == STORAGE_COMMITMENT:
            self._commit_to(request, context_id, context)
        elif request.field == CommandField.N_EVENT_REPORT and context.abstract_syntax == STORAGE_COMMITMENT:
            assert self._sender is not None
            report = self._small_data_set(request, context_id)
            answer = self._services.commitment.hear(request, report, context.transfer_syntax, self._sender)
            self._tell_refused(answer)
            self._answer(request, context_id, answer)
        else:
            self._read_to_end(request, context_id)
            self._answer(request, context_id, Answer(Status.UNRECOGNIZED_OPERATION))

    def _commit_to(self, request: Command, context_id: int, context: AcceptedContext) -> None:
        assert self._sender is not None
        asked = self._small_data_set(request, context_id)
        if not self._services.storage.settle():  # it is about what came a moment ago
            answer = Answer(Status.PROCESSING_FAILURE, "the archive cannot answer now")
            self._tell_refused(answer)
            self._answer(request, context_id, answer)
            return
        answer, report = self._services.commitment.take(request, asked, context.transfer_syntax, self._sender)
        self._tell_refused(answer)
        self._answer(request, context_id, answer)
        if report is not None:  # the peer has no port where we could call it: it hears on this association
            command, data_set = report
            self.wire.send_message(context_id, command, data_set, self._agreement.peer_maximum_pdu_bytes)
            self._read_report_response(context_id)

    def _read_report_response(self, context_id: int) -> None:
        """The peer's answer to our N-EVENT-REPORT; whatever its status is, nothing is left to do."""
        fragment = self.wire.read_fragment()
        encoded = bytearray()
        while fragment is not None:
            if not fragment.is_command or fragment.context_id != context_id:
                raise Violation("something else where the answer to N-EVENT-REPORT was due")
            encoded += fragment.data
            if fragment.is_last:
                if Command.decode(encoded).field != CommandField.N_EVENT_REPORT | 0x8000:
                    raise Violation("another message where the answer to N-EVENT-REPORT was due")
                return
            fragment = self.wire.read_fragment()
        self.wire.send_release_response()
        raise _Finished

    def _small_data_set(self, request: Command, context_id: int) -> bytes:
        """The data set of a request that carries no image, in one piece."""
        encoded = bytearray()
        if request.has_data_set:
            for data in self._data_set(context_id):
                encoded += data
                if len(encoded) > _MAXIMUM_SMALL_DATA_SET_BYTES:
                    raise Violation(f"a request of more than {_MAXIMUM_SMALL_DATA_SET_BYTES} bytes")
        return bytes(encoded)

    def _read_to_end(self, request: Command, context_id: int) -> None:
        if request.has_data_set:
            size = 0
            for data in self._data_set(context_id):
                size += len(data)
                if size > _MAXIMUM_SMALL_DATA_SET_BYTES:
                    raise Violation("a long data set of a service that is not here")

    def _data_set(self, context_id: int) -> Iterator[memoryview]:
        """The bytes of the data set that follows a command."""
        while True:
            fragment = self._next_fragment()
            if fragment.is_command or fragment.context_id != context_id:
                raise Violation("a command, or another presentation context, within a data set")
            yield fragment.data
            if fragment.is_last:
                return

    def _next_fragment(self) -> Fragment:
        fragment = self.wire.read_fragment()
        if fragment is None:  # the wire refuses a release within a message
            raise Violation("the association ends within a message", AbortReason.UNEXPECTED_PDU)
        return fragment

    def _answer(self, request: Command, context_id: int, answer: Answer) -> None:
        self.wire.send_message(context_id, encode_response(request, answer.status, answer.why))

    def _tell_refused(self, answer: Answer) -> None:
        if answer.status != Status.SUCCESS:
            _log.warning("audit: %s: status %04X: %s", self, answer.status, answer.why)


class _Finished(PeerGone):
    """The association was refused and told so: nothing more to say."""
