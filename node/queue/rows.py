"""Pieces of the queue's transactions: results and deliveries of a job, and the study that it is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, delete, insert, select, update

from node.archive import schema
from node.archive.records import DeliveryState, Job
from node.errors import NotFound


@dataclass(frozen=True)
class NewResult:
    """A result object that lies durable in the archive's `results/`, and the peers that get it."""

    kind: str
    sop_instance_uid: str
    sop_class_uid: str
    path: str  # relative to the storage folder
    size: int
    peers: Sequence[str]


def take_first(connection: Connection, waiting: Select[int], **changes: Any) -> Job | None:
    """Change the first job that `waiting` selects, by its id, and that no other worker is taking now; None when there
    is none.
    """
    row = connection.execute(
        update(schema.jobs)
        .where(schema.jobs.c.id == waiting.limit(1).with_for_update(skip_locked=True).scalar_subquery())
        .values(**changes)
        .returning(schema.jobs)
    ).first()
    return None if row is None else Job.from_row(row)


def put_results(connection: Connection, job_id: int, results: Sequence[NewResult], now: float) -> None:
    """Record results of a job and owe each to its peers.

    What was delivered before is sent again: the receiver knows the UID.
    """
    for result in results:
        result_id = _put_result(connection, job_id, result, now)
        for peer in dict.fromkeys(result.peers):
            _owe(connection, result_id, peer, now)


def job_and_study(connection: Connection, job_id: int) -> tuple[Job, str]:
    """A job, which stays as it is until the transaction ends, and the UID of its study; `NotFound` without one."""
    row = connection.execute(select(schema.jobs).where(schema.jobs.c.id == job_id).with_for_update()).first()
    if row is None:
        raise NotFound(f"no job {job_id} (`radnode jobs list` shows what is here)")
    job = Job.from_row(row)
    return job, study_uid_of(connection, job)


def study_uid_of(connection: Connection, job: Job) -> str:
    """The UID of a job's study."""
    return connection.scalar(select(schema.studies.c.study_uid).where(schema.studies.c.id == job.study_id)) or ""


def _put_result(connection: Connection, job_id: int, result: NewResult, now: float) -> int:
    columns = schema.results.c
    values = {
        "job_id": job_id,
        "kind": result.kind,
        "sop_class_uid": result.sop_class_uid,
        "path": result.path,
        "size": result.size,
    }
    known = connection.scalar(
        update(schema.results)
        .where(columns.sop_instance_uid == result.sop_instance_uid)
        .values(**values)
        .returning(columns.id)
    )
    if known is not None:
        return int(known)
    made = insert(schema.results).values(sop_instance_uid=result.sop_instance_uid, created_at=now, **values)
    return int(connection.scalar(made.returning(columns.id)) or 0)


def _owe(connection: Connection, result_id: int, peer: str, now: float) -> None:
    columns = schema.deliveries.c
    connection.execute(delete(schema.deliveries).where(columns.result_id == result_id, columns.peer == peer))
    connection.execute(
        insert(schema.deliveries).values(
            result_id=result_id, peer=peer, state=DeliveryState.PENDING, attempts=0, not_before=0.0, created_at=now
        )
    )
