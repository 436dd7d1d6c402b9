"""Storage commitment over associations of our own (PS3.4 J.3), both ways: what peers asked us is reported to them, and
what we delivered to them they are asked for.
"""

from __future__ import annotations

import logging

from pydicom.dataset import Dataset
from sqlalchemy.exc import SQLAlchemyError

from node.archive.asked_commitments import next_request, put_off, take_report
from node.archive.commitments import Commitments
from node.archive.database import Database
from node.association import Address
from node.deliver.dimse import ask_commitment, report_commitment
from node.deliver.outbox import retry_delay_s
from node.dicom.commitment import EVENT_ALL_SAFE, EVENT_FAILURES
from node.dicom.commitment_messages import read_report, report_of
from node.errors import DeliveryError, NotFound

_log = logging.getLogger(__name__)

HERE_S = 5.0  # how long a report is waited for on the association of the request
ASK_AGAIN_S = 60.0  # after a request that was not taken
_SUCCESS, _PROCESSING_FAILURE, _INVALID_ARGUMENT = 0x0000, 0x0110, 0x0115  # PS3.7 C


def ask_due(database: Database, name: str, address: Address, *, patience_s: float = HERE_S) -> bool:
    """Ask one peer to answer for what was delivered to it and is due; whether it took a request.

    A report that comes on the same association within `patience_s` is taken here, a later one by
    `node.receive.commitment`.
    """

    def hear(event_type_id: int, information: Dataset) -> int:
        try:
            transaction_uid, verdict = read_report(information, event_type_id)
            answered = take_report(database, name, transaction_uid, verdict)
        except (ValueError, NotFound) as error:
            _log.warning("audit: storage commitment report from %s refused: %s", name, error)
            return _INVALID_ARGUMENT
        except SQLAlchemyError as error:
            _log.error("storage commitment report from %s: database: %s", name, type(error).__name__)
            return _PROCESSING_FAILURE
        _log.info("storage commitment: %s reported on %d results", name, answered)
        return _SUCCESS

    request = next_request(database, name)
    if request is None:
        return False
    try:
        ask_commitment(address, request, hear, patience_s=patience_s)
    except DeliveryError as error:
        _log.warning("storage commitment: %s", error)
        put_off(database, request, str(error), ASK_AGAIN_S)
        return False
    _log.info("storage commitment: %s was asked to answer for %d results", name, len(request.references))
    return True


def report_due(commitments: Commitments, name: str, address: Address) -> int:
    """Tell one peer about everything that it asked and may hear now; how many reports arrived."""
    told = 0
    for row, request, attempts in commitments.due(name):
        verdict = commitments.verify(request)
        event = EVENT_FAILURES if verdict.failed else EVENT_ALL_SAFE
        try:
            report_commitment(address, report_of(request, verdict), event)
        except DeliveryError as error:
            _log.warning("storage commitment report to %s: %s", name, error)
            commitments.put_off(row, attempts + 1, str(error), retry_delay_s(attempts + 1))
            break  # the others would fail alike
        commitments.told(row)
        told += 1
        _log.info(
            "storage commitment: %s was told that %d instances are safe and %d are not",
            name,
            len(verdict.safe),
            len(verdict.failed),
        )
    return told
