"""Storage commitment as data (PS3.4 J.3): what was asked, what was found, and the report that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

WELL_KNOWN_INSTANCE: Final = "1.2.840.10008.1.20.1.1"
EVENT_ALL_SAFE, EVENT_FAILURES = 1, 2  # Event Type IDs, PS3.4 table J.3-2

# Failure Reasons, PS3.4 J.3.3.1.1.
PROCESSING_FAILURE, NO_SUCH_INSTANCE, CLASS_INSTANCE_CONFLICT = 0x0110, 0x0112, 0x0119


@dataclass(frozen=True)
class Reference:
    """An instance that a peer asks about."""

    sop_class_uid: str
    sop_instance_uid: str


@dataclass(frozen=True)
class Request:
    """One transaction; `peer` is the name that the configuration gives the peer."""

    peer: str
    transaction_uid: str
    references: tuple[Reference, ...]


@dataclass(frozen=True)
class Verdict:
    """What lies on the disk as it was received, and what does not, with its Failure Reason."""

    safe: tuple[Reference, ...]
    failed: tuple[tuple[Reference, int], ...]


def report_of(request: Request, verdict: Verdict) -> Dataset:
    """The Event Information of the N-EVENT-REPORT (PS3.4 table J.3-3)."""
    report = Dataset()
    report.TransactionUID = request.transaction_uid
    if verdict.failed:
        report.FailedSOPSequence = [_item(reference, reason) for reference, reason in verdict.failed]
    if verdict.safe:
        report.ReferencedSOPSequence = [_item(reference) for reference in verdict.safe]
    return report


def encode_report(request: Request, verdict: Verdict, transfer_syntax: str) -> bytes:
    """The same as it travels."""
    stream = DicomBytesIO()
    stream.is_little_endian = transfer_syntax != ExplicitVRBigEndian
    stream.is_implicit_VR = transfer_syntax == ImplicitVRLittleEndian
    write_dataset(stream, report_of(request, verdict))
    return stream.getvalue()


def _item(reference: Reference, reason: int | None = None) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = reference.sop_class_uid
    item.ReferencedSOPInstanceUID = reference.sop_instance_uid
    if reason is not None:
        item.FailureReason = reason
    return item
