"""What tells of a run that gave no result: a report, and a page for a PACS that shows no reports."""

from __future__ import annotations

from node.report.kinds import NO_RESULT, Kind, Wanted
from node.report.negative import NoResult, make_negative
from node.report.results import Result
from node.report.subject import Origin
from node.report.summary import make_negative_summary


def make_no_result(origin: Origin, state: NoResult, sentence: str, wanted: Wanted) -> list[Result]:
    """What tells of no result, in those of the wanted kinds that can: a report and a page."""
    results = []
    if Kind.SR in wanted.kinds:
        results.append(Result(NO_RESULT, make_negative(origin, state, sentence), Kind.SR))
    if Kind.SUMMARY in wanted.kinds:
        page = make_negative_summary(origin, state, sentence)
        results.append(Result(f"{NO_RESULT}-page", page, Kind.SUMMARY))
    return results
