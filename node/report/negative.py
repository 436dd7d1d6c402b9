"""The report of a run that gave no result, so that silence is never read as normal."""

from __future__ import annotations

from enum import StrEnum

from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from node.report.kinds import Kind
from node.report.quiet import quietly
from node.report.sr import Group, describe, identify_algorithm, make_sr, report_presence
from node.report.subject import Origin


class NoResult(StrEnum):
    """Why there is none."""

    NOT_APPLICABLE = "not applicable"  # the study holds no input that the model may be run on
    FAILED = "failed"  # the model was run and gave nothing, or could not be run


_STATUS = {  # CID 6042 Status of Results
    NoResult.NOT_APPLICABLE: codes.DCM.NotAttempted,
    NoResult.FAILED: codes.DCM.Failed,
}


def make_negative(origin: Origin, state: NoResult, sentence: str) -> Dataset:
    """An SR that says that the model gave no result on these images, and why.

    `origin.sources` are headers of what was looked at, at least one, of any SOP class; `sentence` must hold nothing
    that identifies the patient beyond what the images do. The status of the analysis comes first ((111065, DCM,
    "Summary of Analyses") of CID 6042, as CAD reports say it), with the sentence as a comment; then every finding that
    the model looks for is said to be undetermined (CID 240).
    """
    with quietly():
        groups = [_status(origin, state, sentence), *_undetermined(origin)]
        return make_sr(
            origin,
            groups,
            name=_name(state, sentence),
            description=describe_no_result(origin, state, Kind.SR),
        )


def describe_no_result(origin: Origin, state: NoResult, kind: Kind) -> str:
    """The site's description of the series, behind what must not be overlooked in a list of series (LO, 64)."""
    return f"{state}: {origin.series_description(kind)}"[:64].rstrip()


def _name(state: NoResult, sentence: str) -> str:
    """Another sentence is another document: the same UID must always name the same content."""
    return f"no result: {state}: {sentence}"


def _status(origin: Origin, state: NoResult, sentence: str) -> Group:
    group = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=origin.uid("track", "status"), identifier=f"{origin.model_name} {state}"
        ),
        algorithm_id=identify_algorithm(origin),
        qualitative_evaluations=[
            sr.QualitativeEvaluation(name=codes.DCM.SummaryOfAnalyses, value=_STATUS[state]),
        ],
    )
    group[0].ContentSequence.append(
        sr.TextContentItem(
            name=codes.DCM.Comment,
            value=f"{state}: {sentence}",
            relationship_type=sr.RelationshipTypeValues.CONTAINS,
        )
    )
    return group


def _undetermined(origin: Origin) -> list[Group]:
    findings = {**origin.manifest.segments, **origin.manifest.classes}
    return [
        report_presence(describe(origin, finding, "undetermined", str(label)), codes.SCT.Undetermined)
        for label, finding in sorted(findings.items())
    ]
