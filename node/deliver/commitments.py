"""N-EVENT-REPORT of storage commitments, on an association of our own (PS3.4 J.3.3), tried again until it arrives."""

from __future__ import annotations

import logging

from node.archive.commitments import Commitments
from node.deliver.dimse import Address, report_commitment
from node.deliver.outbox import retry_delay_s
from node.dicom.commitment import EVENT_ALL_SAFE, EVENT_FAILURES, report_of
from node.errors import DeliveryError

_log = logging.getLogger(__name__)


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
