"""Jobs as people and routes see them: made, queued again, cancelled, listed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from node.archive import schema
from node.archive.database import Database, record_event
from node.archive.records import Job, JobState, StoredResult
from node.dicom.naming import instances_of
from node.errors import NotAllowed
from node.priority import Priority
from node.queue.order import lane_of
from node.queue.rows import job_and_study


@dataclass(frozen=True)
class NewJob:
    """What a route wants done."""

    route: str
    model: str
    model_version: str
    model_digest: str
    inputs: Mapping[str, Sequence[str]]  # manifest input name to instances (`node.dicom.naming`)
    send_to: Sequence[str]
    results: Sequence[str] = ("seg", "sr")  # the kinds that are to be made (`node.report.kinds`)
    tell_no_result: bool = True  # whether the peers hear of a job that gives no result
    refusal: str = ""  # why the model is not applicable; then nothing is run
    priority: Priority = Priority.ROUTINE
    deadline_s: float | None = None  # from now; a job that is not done by then fails


def job_key(model: str, model_digest: str, inputs: Mapping[str, Sequence[str]]) -> str:
    """SHA-256 (hex) over model, digest and the sorted names (`node.dicom.naming`) of every input's instances."""
    material = {"model": model, "digest": model_digest, "inputs": {name: sorted(uids) for name, uids in inputs.items()}}
    return hashlib.sha256(json.dumps(material, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def add_job(connection: Connection, study_id: int, study_uid: str, revision: int, new: NewJob, now: float) -> bool:
    """Queue a job in the caller's transaction; False when the same job exists.

    Then its destinations and kinds of results are completed, and one that waits becomes as urgent as the more urgent
    of the two. A job that ended without them runs again, or where it gave no result is told again.
    """
    key = job_key(new.model, new.model_digest, new.inputs)
    # Held until the commit: it may end in this moment, and what is wanted of it must be seen by one of the two.
    existing = connection.execute(select(schema.jobs).where(schema.jobs.c.key == key).with_for_update()).first()
    if existing is not None:
        _complete(connection, Job.from_row(existing), new, study_uid, now)
        return False
    state = JobState.REFUSED if new.refusal else JobState.QUEUED
    source = _sender_of(connection, study_id)
    connection.execute(
        insert(schema.jobs).values(
            key=key,
            study_id=study_id,
            study_revision=revision,
            route=new.route,
            model=new.model,
            model_version=new.model_version,
            model_digest=new.model_digest,
            inputs={name: sorted(uids) for name, uids in new.inputs.items()},
            send_to=list(new.send_to),
            results=list(new.results),
            tell_no_result=new.tell_no_result,
            untold=bool(new.refusal) and new.tell_no_result,
            priority=new.priority,
            source=source,
            lane=lane_of(source, new.model, new.priority),
            deadline_s=new.deadline_s,
            state=state,
            reason=new.refusal,
            created_at=now,
            queued_at=now,
            deadline_at=None if new.deadline_s is None else now + new.deadline_s,
            finished_at=now if new.refusal else None,
        )
    )
    count = len(instances_of(name for names in new.inputs.values() for name in names))
    story = f"refused: {new.refusal}" if new.refusal else f"queued as {new.priority} with {count} instances"
    record_event(connection, "route", study_uid, f"route {new.route!r}: {new.model} {story}")
    return True


# States in which a job has ended without a result.
NO_RESULT_STATES = (JobState.REFUSED, JobState.FAILED, JobState.QUARANTINED)


def again(now: float) -> dict[str, Any]:
    """What a job is set to that runs once more: its waiting and its deadline begin anew."""
    return {
        "state": JobState.QUEUED,
        "reason": "",
        "attempts": 0,
        "not_before": 0.0,
        "queued_at": now,
        "deadline_at": schema.jobs.c.deadline_s + now,
        "finished_at": None,
        "untold": False,
    }


def requeue_job(database: Database, job_id: int, actor: str) -> Job:
    """Run a finished job once more. Its results carry the same UIDs as before and are sent again.

    `NotAllowed` for a job whose results were withdrawn: the PACS would hide the same UIDs again.
    """
    with database.write() as connection:
        job, study_uid = job_and_study(connection, job_id)
        if job.state is JobState.RUNNING:
            return job
        if job.state is JobState.WITHDRAWN:
            raise NotAllowed(
                f"the results of job {job_id} were withdrawn, and run again they would be the same objects: install "
                "another version of the model and reprocess the study"
            )
        connection.execute(update(schema.jobs).where(schema.jobs.c.id == job_id).values(**again(time.time())))
        record_event(connection, actor, study_uid, f"{job.model}: queued again")
        row = connection.execute(select(schema.jobs).where(schema.jobs.c.id == job_id)).one()
    return Job.from_row(row)


def cancel_job(database: Database, job_id: int, actor: str) -> Job:
    """Cancel a job that waits. A running one ends its attempt, whose result is then not accepted."""
    with database.write() as connection:
        job, study_uid = job_and_study(connection, job_id)
        if job.state in (JobState.QUEUED, JobState.RUNNING):
            connection.execute(
                update(schema.jobs)
                .where(schema.jobs.c.id == job_id)
                .values(
                    state=JobState.CANCELLED,
                    reason=f"cancelled by {actor}",
                    lease_owner=None,
                    lease_until=None,
                    finished_at=time.time(),
                )
            )
            record_event(connection, actor, study_uid, f"{job.model}: cancelled")
        row = connection.execute(select(schema.jobs).where(schema.jobs.c.id == job_id)).one()
    return Job.from_row(row)


def prioritise_job(database: Database, job_id: int, priority: Priority, actor: str) -> Job:
    """Make a job more or less urgent. One that waits is started in its new turn."""
    with database.write() as connection:
        job, study_uid = job_and_study(connection, job_id)
        if job.priority is not priority:
            _set_priority(connection, job, priority)
            record_event(connection, actor, study_uid, f"{job.model}: {priority}, was {job.priority}")
        row = connection.execute(select(schema.jobs).where(schema.jobs.c.id == job_id)).one()
    return Job.from_row(row)


def _complete(connection: Connection, job: Job, new: NewJob, study_uid: str, now: float) -> None:
    """Add what a further route wants of a job that exists."""
    if job.state is JobState.QUEUED and new.priority.rank < job.priority.rank:
        _set_priority(connection, job, new.priority)
        record_event(connection, "route", study_uid, f"{job.model}: {new.priority}, was {job.priority}")
    peers = [peer for peer in new.send_to if peer not in job.send_to]
    kinds = [kind for kind in new.results if kind not in job.results]
    tell = new.tell_no_result and not job.tell_no_result
    if not peers and not kinds and not tell:
        return
    changes: dict[str, object] = {
        "send_to": [*job.send_to, *peers],
        "results": [*job.results, *kinds],
        "tell_no_result": job.tell_no_result or new.tell_no_result,
    }
    if job.state is JobState.DONE and (peers or kinds):  # a running one finds out when it ends
        changes |= again(now)
        record_event(connection, "route", study_uid, f"{job.model}: queued again for {', '.join([*peers, *kinds])}")
    elif job.state in NO_RESULT_STATES and new.tell_no_result:  # who came later must hear too
        changes["untold"] = True
    connection.execute(update(schema.jobs).where(schema.jobs.c.id == job.id).values(**changes))


def _set_priority(connection: Connection, job: Job, priority: Priority) -> None:
    values = {"priority": priority, "lane": lane_of(job.source, job.model, priority)}
    connection.execute(update(schema.jobs).where(schema.jobs.c.id == job.id).values(**values))


def _sender_of(connection: Connection, study_id: int) -> str:
    """Who sent the study: the calling AE title of its first instance."""
    instances, series = schema.instances.c, schema.series.c
    query = select(instances.received_from).join(schema.series).where(series.study_id == study_id)
    return connection.scalar(query.order_by(instances.id).limit(1)) or ""


def list_jobs(
    database: Database,
    *,
    study_id: int | None = None,
    model: str | None = None,
    states: Sequence[JobState] = (),
    limit: int | None = 100,
) -> list[tuple[Job, str]]:
    """Jobs with their Study Instance UIDs, the newest first."""
    query = (
        select(schema.jobs, schema.studies.c.study_uid)
        .join(schema.studies)
        .order_by(schema.jobs.c.id.desc())
        .limit(limit)
    )
    if study_id is not None:
        query = query.where(schema.jobs.c.study_id == study_id)
    if model is not None:
        query = query.where(schema.jobs.c.model == model)
    if states:
        query = query.where(schema.jobs.c.state.in_(states))
    with database.read() as connection:
        return [(Job.from_row(row), row._mapping["study_uid"]) for row in connection.execute(query)]


def job_results(database: Database, job_id: int) -> list[StoredResult]:
    """The results of a job."""
    query = select(schema.results).where(schema.results.c.job_id == job_id).order_by(schema.results.c.id)
    with database.read() as connection:
        return [StoredResult.from_row(row) for row in connection.execute(query)]


def count_jobs(database: Database) -> dict[str, int]:
    """How many jobs are in each state."""
    query = select(schema.jobs.c.state, func.count()).group_by(schema.jobs.c.state)
    with database.read() as connection:
        return {str(state): int(count) for state, count in connection.execute(query)}
