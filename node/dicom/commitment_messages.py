"""Storage commitment as it travels (PS3.4 J.3): the request of an N-ACTION, the report of an N-EVENT-REPORT."""

from __future__ import annotations

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from node.dicom.commitment import EVENT_ALL_SAFE, EVENT_FAILURES, PROCESSING_FAILURE, Reference, Request, Verdict
from node.dicom.identity import is_uid


def request_of(request: Request) -> Dataset:
    """The Action Information of the N-ACTION (PS3.4 table J.3-1)."""
    action = Dataset()
    action.TransactionUID = request.transaction_uid
    action.ReferencedSOPSequence = [_item(reference) for reference in request.references]
    return action


def read_report(report: Dataset, event_type_id: int) -> tuple[str, Verdict]:
    """The Transaction UID and the verdict of an N-EVENT-REPORT (PS3.4 table J.3-3); `ValueError` says what is wrong.

    What a report names as safe and as failed counts as failed. What it does not name has no verdict.
    """
    if event_type_id not in (EVENT_ALL_SAFE, EVENT_FAILURES):
        raise ValueError(f"there is no event type {event_type_id} of storage commitment")
    try:
        transaction_uid = str(report.get("TransactionUID", "") or "")
        failed = tuple(
            (_reference(item), int(item.get("FailureReason", None) or PROCESSING_FAILURE))
            for item in report.get("FailedSOPSequence") or []
        )
        refused = {reference for reference, _ in failed}
        safe = tuple(
            reference
            for item in report.get("ReferencedSOPSequence") or []
            if (reference := _reference(item)) not in refused
        )
    except Exception as error:  # whatever pydicom raises over hostile bytes
        raise ValueError(f"the report cannot be read: {type(error).__name__}") from error
    if not is_uid(transaction_uid):
        raise ValueError("Transaction UID is missing or is not a UID")
    if not safe and not failed:
        raise ValueError("the report names no instance")
    return transaction_uid, Verdict(safe, failed)


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


def _reference(item: Dataset) -> Reference:
    return Reference(str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID))


def _item(reference: Reference, reason: int | None = None) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = reference.sop_class_uid
    item.ReferencedSOPInstanceUID = reference.sop_instance_uid
    if reason is not None:
        item.FailureReason = reason
    return item
