"""Storage Commitment Push Model as others call us for it (PS3.4 J.3): what a peer asks us to answer for and what we
answer, and what a destination reports on the results that it got.

The request is kept in the archive before it is answered. A peer that listens (it has a port) hears the outcome on an
association of our own, opened by the delivering process and tried again until it arrives (`node.deliver.commitments`);
one that does not hears it at once, on the association on which it asked.
"""

from __future__ import annotations

import logging
from io import BytesIO

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian
from sqlalchemy.exc import SQLAlchemyError

from node.archive.asked_commitments import take_report
from node.archive.commitments import Commitments
from node.archive.store import Archive
from node.dicom.commitment import (
    EVENT_ALL_SAFE,
    EVENT_FAILURES,
    WELL_KNOWN_INSTANCE,
    Reference,
    Request,
    Verdict,
)
from node.dicom.commitment_messages import encode_report, read_report
from node.dicom.identity import is_uid
from node.errors import NotFound
from node.receive.admission import Sender
from node.receive.dimse import Command, CommandField, Element, Status, encode_command
from node.receive.negotiation import STORAGE_COMMITMENT
from node.receive.storage import Answer

_log = logging.getLogger(__name__)

_REQUEST = 1  # Action Type ID
_DATA_SET_FOLLOWS = 1
_MESSAGE_ID = 1


class Commitment:
    """The storage commitment service of a process."""

    def __init__(self, archive: Archive):
        self._commitments = Commitments(archive)
        self._database = archive.database

    def take(
        self, request: Command, data_set: bytes, transfer_syntax: str, sender: Sender
    ) -> tuple[Answer, tuple[bytes, bytes] | None]:
        """Answer an N-ACTION; with it the N-EVENT-REPORT (command, data set) that must follow on this association."""
        if request.uid(Element.REQUESTED_SOP_CLASS_UID) != STORAGE_COMMITMENT:
            return Answer(Status.NO_SUCH_CLASS, "only Storage Commitment Push Model"), None
        if request.uid(Element.REQUESTED_SOP_INSTANCE_UID) != WELL_KNOWN_INSTANCE:
            return Answer(Status.NO_SUCH_INSTANCE, f"the instance is {WELL_KNOWN_INSTANCE}"), None
        if request.number(Element.ACTION_TYPE_ID) != _REQUEST:
            return Answer(Status.NO_SUCH_ACTION, "the only action is 1, Request Storage Commitment"), None
        try:
            asked = _read_request(data_set, transfer_syntax, sender.name)
        except ValueError as error:
            return Answer(Status.INVALID_ARGUMENT, str(error)), None
        try:
            if sender.port is not None:
                self._commitments.keep(asked)
                return Answer(Status.SUCCESS), None
            return Answer(Status.SUCCESS), _report(asked, self._commitments.verify(asked), transfer_syntax)
        except SQLAlchemyError as error:
            _log.error("storage commitment for %s: database: %s", sender.name, type(error).__name__)
            return Answer(Status.PROCESSING_FAILURE, "the archive cannot answer now"), None

    def hear(self, request: Command, data_set: bytes, transfer_syntax: str, sender: Sender) -> Answer:
        """Answer an N-EVENT-REPORT, by which `sender` says what it answers for of what we delivered to it."""
        if request.uid(Element.AFFECTED_SOP_CLASS_UID) != STORAGE_COMMITMENT:
            return Answer(Status.NO_SUCH_CLASS, "only Storage Commitment Push Model")
        try:
            report = _decode(data_set, transfer_syntax)
        except Exception as error:  # whatever pydicom raises over hostile bytes
            return Answer(Status.INVALID_ARGUMENT, f"the report cannot be read: {type(error).__name__}")
        try:
            transaction_uid, verdict = read_report(report, request.number(Element.EVENT_TYPE_ID))
            answered = take_report(self._database, sender.name, transaction_uid, verdict)
        except (ValueError, NotFound) as error:
            return Answer(Status.INVALID_ARGUMENT, str(error))
        except SQLAlchemyError as error:
            _log.error("storage commitment report of %s: database: %s", sender.name, type(error).__name__)
            return Answer(Status.PROCESSING_FAILURE, "the archive cannot take the report now")
        _log.info("storage commitment: %s reported on %d results", sender.name, answered)
        return Answer(Status.SUCCESS)


def _read_request(data_set: bytes, transfer_syntax: str, peer: str) -> Request:
    """`ValueError` says what is wrong with it."""
    try:
        dataset = _decode(data_set, transfer_syntax)
        transaction_uid = str(dataset.get("TransactionUID", ""))
        items = dataset.get("ReferencedSOPSequence") or []
        references = tuple(
            Reference(str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID)) for item in items
        )
    except Exception as error:  # whatever pydicom raises over hostile bytes
        raise ValueError(f"the request cannot be read: {type(error).__name__}") from error
    if not is_uid(transaction_uid):
        raise ValueError("Transaction UID is missing or is not a UID")
    if not references:
        raise ValueError("Referenced SOP Sequence is missing or empty")
    if not all(is_uid(one.sop_class_uid) and is_uid(one.sop_instance_uid) for one in references):
        raise ValueError("Referenced SOP Sequence holds what is not a UID")
    return Request(peer, transaction_uid, references)


def _decode(data_set: bytes, transfer_syntax: str) -> Dataset:
    return read_dataset(
        BytesIO(data_set),
        is_implicit_VR=transfer_syntax == ImplicitVRLittleEndian,
        is_little_endian=transfer_syntax != ExplicitVRBigEndian,
    )


def _report(asked: Request, verdict: Verdict, transfer_syntax: str) -> tuple[bytes, bytes]:
    command = encode_command(
        {
            Element.AFFECTED_SOP_CLASS_UID: STORAGE_COMMITMENT,
            Element.COMMAND_FIELD: CommandField.N_EVENT_REPORT,
            Element.MESSAGE_ID: _MESSAGE_ID,
            Element.DATA_SET_TYPE: _DATA_SET_FOLLOWS,
            Element.AFFECTED_SOP_INSTANCE_UID: WELL_KNOWN_INSTANCE,
            Element.EVENT_TYPE_ID: EVENT_FAILURES if verdict.failed else EVENT_ALL_SAFE,
        }
    )
    return command, encode_report(asked, verdict, transfer_syntax)
