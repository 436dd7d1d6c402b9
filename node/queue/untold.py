"""Jobs that ended without a result and whose peers are still to hear so: silence must never be read as normal.

Telling is work of its own with a lease of its own, after the job has ended: whatever becomes of it, the job's end and
its reason stand.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, or_, select, update

from node.archive import schema
from node.archive.database import Database, record_event
from node.archive.records import Job
from node.queue.jobs import NO_RESULT_STATES
from node.queue.leases import LEASE_S
from node.queue.rows import NewResult, put_results, study_uid_of, take_first
from node.queue.workers import WorkerId


def claim_untold(database: Database, worker: WorkerId) -> Job | None:
    """Take one such job for `LEASE_S`, the longest waiting first; None when nothing is untold."""
    now = time.time()
    columns = schema.jobs.c
    free = or_(columns.lease_until.is_(None), columns.lease_until < now)
    waiting = select(columns.id).where(columns.untold, columns.state.in_(NO_RESULT_STATES), free)
    waiting = waiting.order_by(columns.finished_at, columns.id)
    with database.read() as connection:
        if connection.scalar(waiting.limit(1)) is None:
            return None
    with database.write() as connection:
        return take_first(connection, waiting, lease_owner=str(worker), lease_until=now + LEASE_S)


def finish_untold(database: Database, job: Job, worker: WorkerId, results: Sequence[NewResult]) -> bool:
    """Record what tells of the job, and owe it to its peers; False (nothing done) without the lease.

    A job of which another route wanted more meanwhile is told once more.
    """
    columns = schema.jobs.c
    with database.write() as connection:
        if not _told(connection, job, worker):
            return False
        wanted = connection.execute(select(columns.send_to, columns.results).where(columns.id == job.id)).one()
        if (wanted.send_to, wanted.results) != (job.send_to, job.results):
            connection.execute(update(schema.jobs).where(columns.id == job.id).values(untold=True))
        put_results(connection, job.id, results, time.time())
        kinds = ", ".join(result.kind for result in results) or "nothing that its peers take"
        record_event(connection, "work", study_uid_of(connection, job), f"{job.model}: told as {kinds}")
    return True


def drop_untold(database: Database, job: Job, worker: WorkerId, reason: str) -> None:
    """It cannot be told; the story says why."""
    with database.write() as connection:
        if _told(connection, job, worker):
            record_event(
                connection, "work", study_uid_of(connection, job), f"{job.model}: its peers are not told: {reason}"
            )


def _told(connection: Connection, job: Job, worker: WorkerId) -> bool:
    columns = schema.jobs.c
    mine = (columns.id == job.id, columns.untold, columns.lease_owner == str(worker))
    changes: dict[str, Any] = {"untold": False, "lease_owner": None, "lease_until": None}
    told = update(schema.jobs).where(*mine).values(**changes).returning(columns.id)
    return connection.execute(told).first() is not None
