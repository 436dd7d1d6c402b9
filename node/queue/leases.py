"""Running jobs: a worker holds one by a lease that it renews, and ends it by its results or with a reason.

A lease that ran out or whose process is gone gives the job back. Attempts are counted before they start, so a study
that kills its worker is stopped.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, or_, select, update

from node.archive import schema
from node.archive.database import Database, record_event
from node.archive.records import Job, JobState
from node.queue.jobs import again
from node.queue.order import Lane, in_turn, last_started, waiting_lanes
from node.queue.pauses import are_workers_paused, paused_models, pauses_in
from node.queue.rows import NewResult, put_results, study_uid_of, take_first
from node.queue.workers import WorkerId

LEASE_S = 60.0  # renewed every third of it
MAXIMUM_ATTEMPTS = 3
RETRY_DELAYS_S = (5.0, 30.0)  # before the second and the third attempt
LEFT_S = 1.0  # a job that waits for longer was left by every worker that is free
# The last attempt is left to a worker that has lived for so long. Where one worker after another dies (no memory,
# somebody's kill, a bad update), that is not counted three times against the study that happened to be there.
SETTLED_S = 30.0


def claim_job(
    database: Database, worker: WorkerId, *, loaded: Collection[str] = (), read: int | None = None, alone: bool = True
) -> Job | None:
    """Lease the next job to `worker` (`node.queue.order`); None when nothing waits that may start here.

    `loaded` are the models that run here without being loaded; `read` is the job whose images were read ahead here,
    which goes before others of its lane. The attempt is counted here; the last one is not for a worker younger than
    `SETTLED_S`, and one that would not be `alone` in its worker is the first.
    """
    now = time.time()
    before = MAXIMUM_ATTEMPTS - (1 if worker.age_s() >= SETTLED_S else 2)  # attempts that a job may have had
    before = before if alone else 0
    for lane in _lanes(database, worker, now, before, loaded):  # the next one where others took all that was in it
        if job := _take(database, worker, lane, now, before, read):
            return job
    return None


def claim_to_read(database: Database, worker: WorkerId, *, loaded: Collection[str] = ()) -> Job | None:
    """Lease for a while the job that is probably next here, to read its images ahead; `give_back_read` ends it.

    Only one that was never tried and has waited for `LEFT_S`: no worker is free for it. A reading that kills the worker
    is an attempt.
    """
    now = time.time()
    for lane in _lanes(database, worker, now, 0, loaded):
        if lane.queued_at <= now - LEFT_S and (job := _take(database, worker, lane, now, 0, starts=False)):
            return job
    return None


def give_back_read(database: Database, job: Job, worker: WorkerId) -> bool:
    """Its images are read: it waits again, as if nothing had been; False when the lease was lost meanwhile."""
    with database.write() as connection:
        attempts = schema.jobs.c.attempts - 1
        queued = {"state": JobState.QUEUED, "attempts": attempts, "lease_owner": None, "lease_until": None}
        return _held(connection, job, worker, **queued)


def _lanes(database: Database, worker: WorkerId, now: float, most_attempts: int, loaded: Collection[str]) -> list[Lane]:
    """The lanes that may give this worker its next job, of those that had `most_attempts` at most, in their order."""
    with database.read() as connection:  # no write lock is taken while there is nothing to do
        lanes = waiting_lanes(connection, now, most_attempts)
        if not lanes:
            return []
        pauses, recent = pauses_in(connection), last_started(connection)
    if are_workers_paused(pauses, worker.host):
        return []
    held = paused_models(pauses)
    return in_turn([lane for lane in lanes if lane.model not in held], recent, now, loaded)


def _take(
    database: Database,
    worker: WorkerId,
    lane: Lane,
    now: float,
    most_attempts: int,
    read: int | None = None,
    *,
    starts: bool = True,
) -> Job | None:
    """Lease the job `read` of a lane, else its oldest; None when none is left. One that does not start yet is only
    leased, and its story does not tell of it.
    """
    columns = schema.jobs.c
    waiting = select(columns.id).where(
        columns.state == JobState.QUEUED,
        columns.lane == lane.name,
        columns.not_before <= now,
        columns.attempts <= most_attempts,
    )
    first = waiting.order_by(columns.queued_at, columns.id)
    changes = {
        "state": JobState.RUNNING,
        "attempts": columns.attempts + 1,
        "lease_owner": str(worker),
        "lease_until": now + LEASE_S,
    }
    if starts:
        changes |= {"started_at": now, "reason": ""}
    with database.write() as connection:
        job = take_first(connection, waiting.where(columns.id == read), **changes) if read is not None else None
        job = job or take_first(connection, first, **changes)
        if job is None:
            return None
        if starts:
            study_uid = study_uid_of(connection, job)
            record_event(connection, "work", study_uid, f"{job.model}: attempt {job.attempts} started")
    return job


def renew_lease(database: Database, job: Job, worker: WorkerId) -> bool:
    """Extend the lease; False when it is no longer this worker's: the work is lost to another, was cancelled, or its
    deadline has passed.
    """
    with database.write() as connection:
        return _held(connection, job, worker, lease_until=time.time() + LEASE_S)


def finish_job(
    database: Database,
    job: Job,
    worker: WorkerId,
    results: Sequence[NewResult],
    measurements: list[dict[str, Any]],
    story: str,
    seconds: Mapping[str, float] | None = None,
) -> bool:
    """Record the results and their deliveries and end the job, in one transaction; False (the story says so, nothing
    else is done) without the lease.

    A job of which another route wanted more while it ran is queued again.
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
            seconds=dict(seconds or {}),
            finished_at=now,
            lease_owner=None,
            lease_until=None,
        ):
            _tell_late(connection, job, "it made results")
            return False
        put_results(connection, job.id, results, now)
        record_event(connection, "work", study_uid_of(connection, job), f"{job.model}: {story}")
        columns = schema.jobs.c
        wanted = connection.execute(select(columns.send_to, columns.results).where(columns.id == job.id)).one()
        if (wanted.send_to, wanted.results) != (job.send_to, job.results):
            connection.execute(update(schema.jobs).where(columns.id == job.id).values(**again(now)))
            record_event(
                connection, "work", study_uid_of(connection, job), f"{job.model}: queued again, more is wanted"
            )
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
            untold=schema.jobs.c.tell_no_result,
            finished_at=time.time(),
            lease_owner=None,
            lease_until=None,
        )
        if ended:
            record_event(connection, "work", study_uid_of(connection, job), f"{job.model}: {state.value}: {reason}")
    return ended


def fail_attempt(database: Database, job: Job, worker: WorkerId, reason: str) -> None:
    """An attempt failed: queue the next one after a delay, or quarantine the job when it was the last."""
    with database.write() as connection:
        if _held(connection, job, worker):
            _give_back(connection, job, reason)
        else:
            _tell_late(connection, job, reason)


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
            record_event(
                connection, "work", study_uid_of(connection, job), f"{job.model}: given back, the worker stops"
            )


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


def fail_overdue(database: Database) -> list[Job]:
    """End the jobs whose deadline has passed, waiting or running; returns them as they were.

    A running one loses its lease with it, so that its worker stops it at the next renewal and its results are not
    taken.
    """
    now = time.time()
    columns = schema.jobs.c
    late = (columns.state.in_((JobState.QUEUED, JobState.RUNNING)), columns.deadline_at < now)
    with database.read() as connection:
        overdue = [Job.from_row(row) for row in connection.execute(select(schema.jobs).where(*late))]
    ended = []
    for job in overdue:
        reason = _overdue(job)
        with database.write() as connection:
            row = connection.execute(
                update(schema.jobs)
                .where(columns.id == job.id, *late)
                .values(
                    state=JobState.FAILED,
                    reason=reason,
                    untold=columns.tell_no_result,
                    finished_at=now,
                    lease_owner=None,
                    lease_until=None,
                )
                .returning(columns.id)
            ).first()
            if row is not None:
                record_event(connection, "queue", study_uid_of(connection, job), f"{job.model}: failed: {reason}")
                ended.append(job)
    return ended


def _overdue(job: Job) -> str:
    where = "it waited for a worker"
    if job.state is JobState.RUNNING:
        where = f"attempt {job.attempts} was running"
    elif job.reason:
        where = job.reason
    return f"not done within {_spoken(job.deadline_s or 0.0)} (the deadline of route {job.route!r}): {where}"


def _spoken(seconds: float) -> str:
    """As the configuration writes it: 90s, 30m, 2h."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"


def _held(connection: Connection, job: Job, worker: WorkerId, **changes: Any) -> bool:
    """Apply `changes` if `worker` still holds the job by the lease of this attempt; whether it does.

    Whatever was asked, the row stays as it is until the transaction ends.
    """
    columns = schema.jobs.c
    held = (
        columns.id == job.id,
        columns.state == JobState.RUNNING,
        columns.lease_owner == str(worker),
        columns.attempts == job.attempts,  # the same worker may hold it again, after it had lost it
    )
    if not changes:
        return connection.scalar(select(columns.id).where(*held).with_for_update()) is not None
    return (
        connection.execute(update(schema.jobs).where(*held).values(**changes).returning(columns.id)).first() is not None
    )


def _tell_late(connection: Connection, job: Job, how: str) -> None:
    what = f"{job.model}: attempt {job.attempts} ended without its lease, nothing of it is taken: {how}"
    record_event(connection, "work", study_uid_of(connection, job), what)


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
            queued_at=now + delay,  # behind what waits then: what fails again and again holds up nothing else
            finished_at=now if last else None,
            untold=schema.jobs.c.tell_no_result if last else False,
        )
    )
    outlook = "quarantined" if last else f"next attempt in {delay:.0f} s"
    if job.attempts == MAXIMUM_ATTEMPTS - 1:
        outlook += f" or later, by a worker that has lived for {SETTLED_S:.0f} s"
    record_event(connection, "queue", study_uid_of(connection, job), f"{job.model}: {sentence}; {outlook}")
