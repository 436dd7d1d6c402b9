"""Durable jobs: who may run what, for how long, and what became of it.

A job is one model run on one set of instances; its key is the hash of exactly that, and every UID of its results
derives from the key, so the same work done twice makes the same objects. A worker holds a job by a lease that it
renews; a lease that ran out or whose process is gone gives the job back. Attempts are counted before they start, so a
study that kills its worker is stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, func, insert, or_, select, update

from node.archive import schema
from node.archive.database import Database, record_event
from node.archive.records import DeliveryState, Job, JobState, StoredResult
from node.dicom.naming import instances_of
from node.errors import NotFound

LEASE_S = 60.0  # renewed every third of it
MAXIMUM_ATTEMPTS = 3
RETRY_DELAYS_S = (5.0, 30.0)  # before the second and the third attempt


@dataclass(frozen=True)
class WorkerId:
    """A worker process, named so that another process on the same host can tell whether it still lives."""

    host: str
    boot_id: str
    pid: int
    started: str  # start time of the process in clock ticks since boot: a recycled pid differs
    nonce: str

    def __str__(self) -> str:
        return "/".join((self.host, self.boot_id, str(self.pid), self.started, self.nonce))

    @staticmethod
    def parse(text: str) -> WorkerId:
        """The worker that `str()` wrote."""
        host, boot_id, pid, started, nonce = text.split("/")
        return WorkerId(host, boot_id, int(pid), started, nonce)

    @staticmethod
    def mine() -> WorkerId:
        """A new name for this process."""
        pid = os.getpid()
        return WorkerId(socket.gethostname(), _boot_id(), pid, _process_start(pid) or "0", secrets.token_hex(4))

    def is_known_dead(self) -> bool:
        """True only when this host can tell that the process is gone; False when it lives or another host runs it."""
        if self.host != socket.gethostname():
            return False
        return self.boot_id != _boot_id() or _process_start(self.pid) != self.started


@dataclass(frozen=True)
class NewJob:
    """What a route wants done."""

    route: str
    model: str
    model_version: str
    model_digest: str
    inputs: Mapping[str, Sequence[str]]  # manifest input name to instances (`node.dicom.naming`)
    send_to: Sequence[str]
    refusal: str = ""  # why the model is not applicable; then nothing is run


@dataclass(frozen=True)
class NewResult:
    """A result object that lies durable in the archive's `results/`."""

    kind: str
    sop_instance_uid: str
    sop_class_uid: str
    path: str  # relative to the storage folder
    size: int


def job_key(model: str, model_digest: str, inputs: Mapping[str, Sequence[str]]) -> str:
    """SHA-256 (hex) over model, digest and the sorted names (`node.dicom.naming`) of every input's instances."""
    material = {"model": model, "digest": model_digest, "inputs": {name: sorted(uids) for name, uids in inputs.items()}}
    return hashlib.sha256(json.dumps(material, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# -- making jobs -----------------------------------------------------------------------------------------------------


def add_job(connection: Connection, study_id: int, study_uid: str, revision: int, new: NewJob, now: float) -> bool:
    """Queue a job in the caller's transaction; False when the same job exists (then only its destinations are
    completed).
    """
    key = job_key(new.model, new.model_digest, new.inputs)
    existing = connection.execute(select(schema.jobs).where(schema.jobs.c.key == key)).first()
    if existing is not None:
        job = Job.from_row(existing)
        if missing := [peer for peer in new.send_to if peer not in job.send_to]:
            send_to = [*job.send_to, *missing]
            connection.execute(update(schema.jobs).where(schema.jobs.c.id == job.id).values(send_to=send_to))
            _add_deliveries(connection, job.id, missing, now)
        return False
    state = JobState.REFUSED if new.refusal else JobState.QUEUED
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
            state=state,
            reason=new.refusal,
            created_at=now,
            finished_at=now if new.refusal else None,
        )
    )
    count = len(instances_of(name for names in new.inputs.values() for name in names))
    story = f"refused: {new.refusal}" if new.refusal else f"queued with {count} instances"
    record_event(connection, "route", study_uid, f"route {new.route!r}: {new.model} {story}")
    return True


def requeue_job(database: Database, job_id: int, actor: str) -> Job:
    """Run a finished job once more. Its results carry the same UIDs as before and are sent again."""
    with database.write() as connection:
        job, study_uid = _job_and_study(connection, job_id)
        if job.state is JobState.RUNNING:
            return job
        connection.execute(
            update(schema.jobs)
            .where(schema.jobs.c.id == job_id)
            .values(state=JobState.QUEUED, reason="", attempts=0, not_before=0.0, finished_at=None)
        )
        record_event(connection, actor, study_uid, f"{job.model}: queued again")
        row = connection.execute(select(schema.jobs).where(schema.jobs.c.id == job_id)).one()
    return Job.from_row(row)


def cancel_job(database: Database, job_id: int, actor: str) -> Job:
    """Cancel a job that waits. A running one ends its attempt, whose result is then not accepted."""
    with database.write() as connection:
        job, study_uid = _job_and_study(connection, job_id)
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


# -- running jobs ----------------------------------------------------------------------------------------------------


def claim_job(database: Database, worker: WorkerId, models: Sequence[str] | None = None) -> Job | None:
    """Lease the next waiting job to `worker`, oldest first; None when nothing waits. The attempt is counted here."""
    now = time.time()
    columns = schema.jobs.c
    waiting = select(columns.id).where(columns.state == JobState.QUEUED, columns.not_before <= now)
    if models is not None:
        waiting = waiting.where(columns.model.in_(models))
    waiting = waiting.order_by(columns.created_at, columns.id).limit(1)
    with database.read() as connection:  # no write lock is taken while there is nothing to do
        if connection.scalar(waiting) is None:
            return None
    with database.write() as connection:
        row = connection.execute(
            update(schema.jobs)
            .where(columns.id == waiting.with_for_update(skip_locked=True).scalar_subquery())
            .values(
                state=JobState.RUNNING,
                attempts=columns.attempts + 1,
                lease_owner=str(worker),
                lease_until=now + LEASE_S,
                started_at=now,
                reason="",
            )
            .returning(schema.jobs)
        ).first()
        if row is None:
            return None
        job = Job.from_row(row)
        record_event(connection, "work", _study_uid(connection, job), f"{job.model}: attempt {job.attempts} started")
    return job


def renew_lease(database: Database, job: Job, worker: WorkerId) -> bool:
    """Extend the lease; False when it is no longer this worker's (the work is lost to another, or was cancelled)."""
    with database.write() as connection:
        return _held(connection, job, worker, lease_until=time.time() + LEASE_S)


def finish_job(
    database: Database,
    job: Job,
    worker: WorkerId,
    results: Sequence[NewResult],
    measurements: list[dict[str, Any]],
    story: str,
) -> bool:
    """Record the results and their deliveries and end the job, in one transaction; False (nothing done) without the
    lease.
    """
    now = time.time()
    with database.write() as connection:
        if not _held(
            connection,
            job,
            worker,
            state=JobState.DONE,
            reason=story,
            measurements=measurements,
            finished_at=now,
            lease_owner=None,
            lease_until=None,
        ):
            return False
        for result in results:
            _put_result(connection, job.id, result, now)
        # The destinations as they stand now: another route may have added one while the job ran.
        send_to = connection.scalar(select(schema.jobs.c.send_to).where(schema.jobs.c.id == job.id)) or []
        _add_deliveries(connection, job.id, send_to, now)
        record_event(connection, "work", _study_uid(connection, job), f"{job.model}: {story}")
    return True


def end_job(database: Database, job: Job, worker: WorkerId, state: JobState, reason: str) -> bool:
    """End the job without results (`REFUSED`, `FAILED`); False when the lease was lost."""
    with database.write() as connection:
        ended = _held(
            connection,
            job,
            worker,
            state=state,
            reason=reason,
            finished_at=time.time(),
            lease_owner=None,
            lease_until=None,
        )
        if ended:
            record_event(connection, "work", _study_uid(connection, job), f"{job.model}: {state.value}: {reason}")
    return ended


def fail_attempt(database: Database, job: Job, worker: WorkerId, reason: str) -> None:
    """An attempt failed: queue the next one after a delay, or quarantine the job when it was the last."""
    with database.write() as connection:
        if _held(connection, job, worker):
            _give_back(connection, job, reason)


def release_job(database: Database, job: Job, worker: WorkerId) -> None:
    """Give the job back untouched (the worker is stopping); the attempt does not count."""
    with database.write() as connection:
        if _held(
            connection,
            job,
            worker,
            state=JobState.QUEUED,
            attempts=schema.jobs.c.attempts - 1,
            lease_owner=None,
            lease_until=None,
            reason="given back when the worker stopped",
        ):
            record_event(connection, "work", _study_uid(connection, job), f"{job.model}: given back, the worker stops")


def recover_lost_jobs(database: Database) -> list[Job]:
    """Take back jobs whose lease ran out or whose worker this host knows to be dead; returns them as they were."""
    now = time.time()
    columns = schema.jobs.c
    lost: list[Job] = []
    with database.read() as connection:
        running = [
            Job.from_row(row)
            for row in connection.execute(select(schema.jobs).where(columns.state == JobState.RUNNING))
        ]
    for job in running:
        expired = job.lease_until is None or job.lease_until < now
        dead = job.lease_owner is not None and WorkerId.parse(job.lease_owner).is_known_dead()
        if not (expired or dead):
            continue
        with database.write() as connection:
            # The same lease as seen above, else somebody was faster.
            row = connection.execute(
                update(schema.jobs)
                .where(
                    columns.id == job.id,
                    columns.state == JobState.RUNNING,
                    columns.lease_owner == job.lease_owner,
                    or_(columns.lease_until == job.lease_until, columns.lease_until.is_(None)),
                )
                .values(lease_until=None)
                .returning(columns.id)
            ).first()
            if row is not None:
                why = "its worker died" if dead else f"its worker was silent for {LEASE_S:.0f} s"
                _give_back(connection, job, why)
                lost.append(job)
    return lost


# -- reading ---------------------------------------------------------------------------------------------------------


def list_jobs(
    database: Database, *, study_id: int | None = None, states: Sequence[JobState] = (), limit: int = 100
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


# -- below: pieces of the transactions above -------------------------------------------------------------------------


def _held(connection: Connection, job: Job, worker: WorkerId, **changes: Any) -> bool:
    """Apply `changes` if `worker` still holds the job; whether it does."""
    columns = schema.jobs.c
    held = (columns.id == job.id, columns.state == JobState.RUNNING, columns.lease_owner == str(worker))
    if not changes:
        return connection.scalar(select(columns.id).where(*held)) is not None
    return (
        connection.execute(update(schema.jobs).where(*held).values(**changes).returning(columns.id)).first() is not None
    )


def _give_back(connection: Connection, job: Job, reason: str) -> None:
    last = job.attempts >= MAXIMUM_ATTEMPTS
    delay = RETRY_DELAYS_S[min(job.attempts, len(RETRY_DELAYS_S)) - 1]
    now = time.time()
    sentence = f"attempt {job.attempts} of {MAXIMUM_ATTEMPTS} failed: {reason}"
    connection.execute(
        update(schema.jobs)
        .where(schema.jobs.c.id == job.id)
        .values(
            state=JobState.QUARANTINED if last else JobState.QUEUED,
            reason=sentence,
            lease_owner=None,
            lease_until=None,
            not_before=now + delay,
            finished_at=now if last else None,
        )
    )
    outlook = "quarantined" if last else f"next attempt in {delay:.0f} s"
    record_event(connection, "queue", _study_uid(connection, job), f"{job.model}: {sentence}; {outlook}")


def _put_result(connection: Connection, job_id: int, result: NewResult, now: float) -> None:
    columns = schema.results.c
    values = {
        "job_id": job_id,
        "kind": result.kind,
        "sop_class_uid": result.sop_class_uid,
        "path": result.path,
        "size": result.size,
    }
    known = connection.execute(
        update(schema.results)
        .where(columns.sop_instance_uid == result.sop_instance_uid)
        .values(**values)
        .returning(columns.id)
    ).first()
    if known is None:
        connection.execute(
            insert(schema.results).values(sop_instance_uid=result.sop_instance_uid, created_at=now, **values)
        )


def _add_deliveries(connection: Connection, job_id: int, peers: Sequence[str], now: float) -> None:
    """Owe every result of the job to `peers`; what was delivered before is sent again (the receiver knows the UID)."""
    result_ids = list(connection.scalars(select(schema.results.c.id).where(schema.results.c.job_id == job_id)))
    columns = schema.deliveries.c
    pending = {
        "state": DeliveryState.PENDING,
        "reason": "",
        "attempts": 0,
        "not_before": 0.0,
        "created_at": now,
        "delivered_at": None,
    }
    for result_id in result_ids:
        for peer in peers:
            connection.execute(delete(schema.deliveries).where(columns.result_id == result_id, columns.peer == peer))
            connection.execute(insert(schema.deliveries).values(result_id=result_id, peer=peer, **pending))


def _job_and_study(connection: Connection, job_id: int) -> tuple[Job, str]:
    row = connection.execute(select(schema.jobs).where(schema.jobs.c.id == job_id)).first()
    if row is None:
        raise NotFound(f"no job {job_id} (`radnode jobs list` shows what is here)")
    job = Job.from_row(row)
    return job, _study_uid(connection, job)


def _study_uid(connection: Connection, job: Job) -> str:
    return connection.scalar(select(schema.studies.c.study_uid).where(schema.studies.c.id == job.study_id)) or ""


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _process_start(pid: int) -> str | None:
    """Start time of a process (field 22 of /proc/PID/stat); None when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]  # a zombie holds nothing
