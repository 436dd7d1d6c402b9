"""Agreeing to an association: pynetdicom reads and writes the PDUs and negotiates each context; what we prefer is said
here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    AsynchronousOperationsWindowNegotiation,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
)
from pynetdicom.presentation import PresentationContext, negotiate_as_acceptor
from pynetdicom.sop_class import _STORAGE_CLASSES

from node.dicom.header_scan import TRANSFER_SYNTAXES
from node.dicom.identity import is_uid
from node.dicom.uid import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION
from node.receive.wire import Violation

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
VERIFICATION = "1.2.840.10008.1.1"
STORAGE_COMMITMENT = "1.2.840.10008.1.20.1"

STORAGE_CLASSES = frozenset(str(uid) for uid in _STORAGE_CLASSES.values())
_NATIVE = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)
_STANDARD_ROOT = "1.2.840.10008."
_STANDARD_STORAGE_ROOT = "1.2.840.10008.5.1.4.1.1."
_MAXIMUM_CONTEXTS = 128


class ForeignApplicationContext(Violation):
    """The peer speaks of another application than DICOM (PS3.7 A.2.1)."""


@dataclass(frozen=True)
class Called:
    """The fixed part of an A-ASSOCIATE-RQ: enough to decide about admission before anything else is decoded."""

    called_ae_title: str
    calling_ae_title: str
    protocol_version: int

    @classmethod
    def decode(cls, request: bytes) -> Called:
        if len(request) < 74:
            raise Violation(f"an A-ASSOCIATE-RQ of {len(request)} bytes")
        titles = (request[begin : begin + 16].decode("ascii", "backslashreplace").strip(" \0") for begin in (10, 26))
        return cls(*titles, protocol_version=int.from_bytes(request[6:8]))


@dataclass(frozen=True)
class AcceptedContext:
    """What one presentation context ID means."""

    abstract_syntax: str
    transfer_syntax: str


@dataclass(frozen=True)
class Agreement:
    """The outcome of a negotiation."""

    contexts: dict[int, AcceptedContext]
    peer_maximum_pdu_bytes: int  # 0: any
    acceptance: bytes  # the A-ASSOCIATE-AC PDU


def negotiate(
    request: bytes, *, sop_classes: Collection[str] | None, accept_unknown: bool, maximum_pdu_bytes: int
) -> Agreement:
    """Answer an A-ASSOCIATE-RQ; `Violation` when it cannot be read, `ForeignApplicationContext` when it is not ours."""
    try:
        pdu = A_ASSOCIATE_RQ()
        pdu.decode(request)
        asked = pdu.to_primitive()
        proposed = list(asked.presentation_context_definition_list)
        ids = [context.context_id for context in proposed]
        if asked.application_context_name != APPLICATION_CONTEXT:
            raise ForeignApplicationContext("an A-ASSOCIATE-RQ with a foreign application context")
        if not 1 <= len(ids) <= _MAXIMUM_CONTEXTS or len(set(ids)) != len(ids):
            raise Violation(f"an A-ASSOCIATE-RQ with {len(ids)} presentation contexts, or an ID twice")
    except Violation:
        raise
    except Exception as error:  # pynetdicom raises whatever its parts raise over bytes that are no request
        raise Violation(f"an A-ASSOCIATE-RQ that cannot be read: {type(error).__name__}") from error
    roles: dict[UID, tuple[bool | None, bool | None]] = {
        UID(item.sop_class_uid or ""): (bool(item.scu_role), bool(item.scp_role))
        for item in asked.user_information
        if isinstance(item, SCP_SCU_RoleSelectionNegotiation)
    }
    results: list[PresentationContext] = []
    replies: dict[str, SCP_SCU_RoleSelectionNegotiation] = {}
    for context in proposed:
        ours = _counterpart(context, sop_classes=sop_classes, accept_unknown=accept_unknown, has_role=bool(roles))
        result, role = negotiate_as_acceptor([context], [ours] if ours else [PresentationContext()], roles)
        results += result
        replies |= {str(reply.sop_class_uid): reply for reply in role}
    accepted = {
        context.context_id or 0: AcceptedContext(str(context.abstract_syntax), str(context.transfer_syntax[0]))
        for context in results
        if context.result == 0
    }
    acceptance = _acceptance(asked, results, list(replies.values()), maximum_pdu_bytes)
    return Agreement(accepted, asked.maximum_length_received or 0, acceptance)


def _counterpart(
    context: PresentationContext, *, sop_classes: Collection[str] | None, accept_unknown: bool, has_role: bool
) -> PresentationContext | None:
    """What we would accept of a proposed context, our preferred transfer syntax first; None: nothing."""
    abstract_syntax = str(context.abstract_syntax)
    service = abstract_syntax in (VERIFICATION, STORAGE_COMMITMENT)
    if not service and not _may_store(abstract_syntax, sop_classes, accept_unknown):
        return None
    offered = [str(uid) for uid in context.transfer_syntax]
    usable = [uid for uid in offered if uid in (_NATIVE if service else TRANSFER_SYNTAXES)]
    if not usable:
        usable = [ExplicitVRLittleEndian]  # of our own; the negotiation finds nothing in common
    elif usable[0] in _NATIVE and ExplicitVRLittleEndian in usable:
        # The sender would encode anew anyway, and this encoding keeps the VRs. A compressed first choice is what the
        # sender has: it stays as it is.
        usable = [ExplicitVRLittleEndian, *usable]
    ours = PresentationContext()
    ours.abstract_syntax = context.abstract_syntax
    ours.transfer_syntax = list(dict.fromkeys(usable))
    if has_role:  # we are the SCP of every service here; of storage commitment the SCU too, when its SCP calls back
        ours.scu_role, ours.scp_role = True, abstract_syntax == STORAGE_COMMITMENT
    return ours


def _may_store(abstract_syntax: str, sop_classes: Collection[str] | None, accept_unknown: bool) -> bool:
    if sop_classes is not None:
        return abstract_syntax in sop_classes
    if abstract_syntax in STORAGE_CLASSES:
        return True
    unknown = abstract_syntax.startswith(_STANDARD_STORAGE_ROOT) or not abstract_syntax.startswith(_STANDARD_ROOT)
    return accept_unknown and unknown and is_uid(abstract_syntax)


def _acceptance(
    asked: A_ASSOCIATE,
    results: list[PresentationContext],
    roles: list[SCP_SCU_RoleSelectionNegotiation],
    maximum_pdu_bytes: int,
) -> bytes:
    answer = A_ASSOCIATE()
    answer.application_context_name = APPLICATION_CONTEXT
    answer.calling_ae_title, answer.called_ae_title = asked.calling_ae_title, asked.called_ae_title
    answer.result, answer.result_source = 0, 1
    answer.presentation_context_definition_results_list = results
    length = MaximumLengthNotification()
    length.maximum_length_received = maximum_pdu_bytes
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = IMPLEMENTATION_VERSION
    answer.user_information = [length, implementation, version, *roles]
    if any(isinstance(item, AsynchronousOperationsWindowNegotiation) for item in asked.user_information):
        window = AsynchronousOperationsWindowNegotiation()  # one operation at a time (PS3.7 D.3.3.3.1)
        window.maximum_number_operations_invoked = window.maximum_number_operations_performed = 1
        answer.user_information.append(window)
    pdu = A_ASSOCIATE_AC()
    pdu.from_primitive(answer)
    return pdu.encode()
