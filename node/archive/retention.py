"""Why a study stays longer than `keep.studies`: something of it is owed, or a person must say what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, exists, func, or_, select

from node.archive import schema
from node.archive.database import Database
from node.archive.records import CommitmentState, DeliveryState, JobState, StudyState

_STUDIES, _JOBS, _DELIVERIES = schema.studies.c, schema.jobs.c, schema.deliveries.c
_AWAITED = (CommitmentState.DUE, CommitmentState.ASKED, CommitmentState.OVERDUE)

_OPEN = _JOBS.state.in_([JobState.QUEUED, JobState.RUNNING]) | _JOBS.untold
# What is not settled of a delivery, in words for "so many studies with ...". Where a peer may still say that it lacks a
# result, this is the only one. `overdue` without a time is given up.
_UNSETTLED: dict[str, ColumnElement[bool]] = {
    "a delivery that its peer refuses": _DELIVERIES.state == DeliveryState.FAILED,
    "a delivery that is still tried": _DELIVERIES.state == DeliveryState.PENDING,
    "a result that its peer does not answer for": _DELIVERIES.commitment == CommitmentState.REFUSED,
    "a result that its peer has yet to answer for": _DELIVERIES.commitment.in_(_AWAITED)
    & _DELIVERIES.commitment_due_at.is_not(None),
}


@dataclass(frozen=True)
class Kept:
    """The studies that are older than they are to be kept for, and stay."""

    studies: int
    why: dict[str, int]  # what holds them, in words, and how many; one study may be held by several

    def __str__(self) -> str:
        return ", ".join(f"{count} with {what}" for what, count in self.why.items())


def is_owed(connection: Connection, study_id: int) -> bool:
    """Whether a job of the study is open or a result of it undelivered."""
    held = _has_job(_OPEN) | _has_delivery(or_(*_UNSETTLED.values()))
    return _count(connection, (_STUDIES.id == study_id) & held) > 0


def count_kept(database: Database, before: float) -> Kept:
    """What holds studies that were last received before `before`; what is merely not deleted yet is not counted."""
    reasons = {
        **{what: _has_delivery(condition) for what, condition in _UNSETTLED.items()},
        "a job that is not finished": _has_job(_OPEN),
        "content that is in quarantine": _STUDIES.state == StudyState.QUARANTINED,
    }
    is_old = (_STUDIES.state != StudyState.RECEIVING) & (_STUDIES.last_received_at < before)
    with database.read() as connection:
        counts = {what: _count(connection, is_old & held) for what, held in reasons.items()}
        studies = _count(connection, is_old & or_(*reasons.values()))
    return Kept(studies, {what: count for what, count in counts.items() if count})


def _has_job(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    return exists().where(_JOBS.study_id == _STUDIES.id, condition)


def _has_delivery(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    results = schema.results.c
    return exists().where(
        _JOBS.study_id == _STUDIES.id, results.job_id == _JOBS.id, _DELIVERIES.result_id == results.id, condition
    )


def _count(connection: Connection, condition: ColumnElement[bool]) -> int:
    return connection.scalar(select(func.count()).select_from(schema.studies).where(condition)) or 0
