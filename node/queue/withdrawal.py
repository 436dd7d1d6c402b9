"""Results that replace others, and results that are taken back."""

from __future__ import annotations

import time

from sqlalchemy import ColumnElement, select, update

from node.archive import schema
from node.archive.database import Database, record_event
from node.archive.records import CommitmentState, DeliveryState, Job, JobState, StoredResult
from node.errors import NotAllowed
from node.queue.rows import NewResult, job_and_study, put_results
from node.report.kinds import NO_RESULT

REJECTION = "rejection"  # the kind of a rejection note


def _is_report(kind: ColumnElement[str]) -> ColumnElement[bool]:
    return kind.like("sr%") | (kind == NO_RESULT)


def earlier_reports(database: Database, job: Job) -> list[StoredResult]:
    """The structured reports that a result of this job replaces: that it gave no result before, else those of the last
    job of the same model on the same study and route that has any.
    """
    jobs, results = schema.jobs.c, schema.results.c
    query = (
        select(schema.results)
        .join(schema.jobs)
        .where(
            jobs.study_id == job.study_id, jobs.model == job.model, jobs.route == job.route, _is_report(results.kind)
        )
        .where((jobs.id < job.id) | ((jobs.id == job.id) & (results.kind == NO_RESULT)))
        .where(jobs.state != JobState.WITHDRAWN)
        .order_by(jobs.id.desc(), results.id)
    )
    with database.read() as connection:
        found = [StoredResult.from_row(row) for row in connection.execute(query)]
    return [result for result in found if result.job_id == found[0].job_id]


def replaced_job(database: Database, job: Job) -> int | None:
    """The last earlier job whose reports a result of this job replaces, whatever was told of this job before it had
    one; None without any.
    """
    jobs, results = schema.jobs.c, schema.results.c
    query = (
        select(jobs.id)
        .join_from(schema.jobs, schema.results)
        .where(jobs.study_id == job.study_id, jobs.model == job.model, jobs.route == job.route, jobs.id < job.id)
        .where(jobs.state != JobState.WITHDRAWN, _is_report(results.kind))
        .order_by(jobs.id.desc())
        .limit(1)
    )
    with database.read() as connection:
        return connection.scalar(query)


def results_to_withdraw(database: Database, job_id: int) -> tuple[Job, list[StoredResult], list[str]]:
    """A job, its results that were sent to somebody or wait to be, and those peers.

    `NotFound` without such a job; `NotAllowed` when it runs, was withdrawn before, or has nothing out.
    """
    with database.read() as connection:
        job, _ = job_and_study(connection, job_id)
        if job.state in (JobState.RUNNING, JobState.QUEUED):
            raise NotAllowed(f"job {job_id} is {job.state}: cancel it first, or wait for its end")
        if job.state is JobState.WITHDRAWN:
            raise NotAllowed(f"the results of job {job_id} were withdrawn before")
        results = schema.results.c
        query = select(schema.results, schema.deliveries.c.peer).join(schema.deliveries).where(results.job_id == job_id)
        rows = list(connection.execute(query.where(results.kind != REJECTION).order_by(results.id)))
    if not rows:
        raise NotAllowed(f"job {job_id} has no results that were sent to a peer: there is nothing to withdraw")
    stored = {row._mapping["id"]: StoredResult.from_row(row) for row in rows}
    return job, list(stored.values()), list(dict.fromkeys(row._mapping["peer"] for row in rows))


def withdraw(database: Database, job: Job, note: NewResult, actor: str, why: str) -> None:
    """Owe the rejection note to the peers, send nothing more of what it names, and end the job as withdrawn."""
    now = time.time()
    deliveries = schema.deliveries.c
    with database.write() as connection:
        current, study_uid = job_and_study(connection, job.id)
        if current.state is not job.state:
            raise NotAllowed(f"job {job.id} became {current.state} meanwhile: nothing was withdrawn")
        mine = select(schema.results.c.id).where(schema.results.c.job_id == job.id)
        connection.execute(
            update(schema.deliveries)
            .where(deliveries.result_id.in_(mine), deliveries.state != DeliveryState.DELIVERED)
            .values(state=DeliveryState.WITHDRAWN)
        )
        # A peer that has rejected them need not answer for them, and what it does not answer for would be sent again.
        connection.execute(
            update(schema.deliveries)
            .where(deliveries.result_id.in_(mine), deliveries.commitment != CommitmentState.COMMITTED)
            .values(commitment=CommitmentState.NONE, commitment_due_at=None)
        )
        put_results(connection, job.id, [note], now)
        connection.execute(
            update(schema.jobs)
            .where(schema.jobs.c.id == job.id)
            .values(state=JobState.WITHDRAWN, reason=f"withdrawn by {actor}: {why}", untold=False)
        )
        record_event(connection, actor, study_uid, f"{job.model}: results withdrawn: {why}")
