"""A page for a PACS that shows neither a segmentation nor a report: one Secondary Capture image of what was found."""

from __future__ import annotations

from pydicom.dataset import Dataset

from node.dicom.volume import SliceRef
from node.report.capture import capture
from node.report.findings import Findings
from node.report.kinds import Kind
from node.report.layout import render_negative_page, render_page
from node.report.negative import NoResult, describe_no_result
from node.report.subject import Origin


def make_summary(findings: Findings) -> Dataset:
    """The page of what was found, RGB of 1280 by at most 1024 pixels.

    Its pixels carry no patient's name, ID or birth date of radnode's own: the header identifies it, as it does every
    image of the study, and `BurnedInAnnotation` says what the source images say.
    """
    subject = findings.subject
    return capture(
        subject,
        render_page(findings),
        Kind.SUMMARY,
        uid=subject.uid("summary"),
        series_uid=subject.uid("summary", "series"),
        refs=subject.source_slices,
        derivation=f"Summary of the findings of {subject.model_name} {subject.model_version}",
    )


def make_negative_summary(origin: Origin, state: NoResult, sentence: str) -> Dataset:
    """The page of a run that gave no result; `sentence` must hold nothing that identifies the patient.

    Its UIDs are not those of the job's summary, and another sentence makes another object: a job that is run again
    gives a result or fails for another reason, and the same UID must always name the same content.
    """
    images = [source for source in origin.sources if "Rows" in source]
    return capture(
        origin,
        render_negative_page(origin, state, sentence),
        Kind.SUMMARY,
        uid=origin.uid("summary", "no result", state, sentence),
        series_uid=origin.uid("summary", "no result", state, sentence, "series"),
        refs=[SliceRef(str(source.SOPClassUID), str(source.SOPInstanceUID)) for source in images],
        derivation=f"{origin.model} gave no result: {state}",
        description=describe_no_result(origin, state, Kind.SUMMARY),
    )
