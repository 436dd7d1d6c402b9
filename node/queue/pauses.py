"""What a person holds: a model, or workers, that start no further job until they go on. What runs is finished."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from sqlalchemy import Connection, delete, func, insert, select

from node.archive import schema
from node.archive.database import Database, record_event
from node.archive.records import Job, JobState, Record

EVERY_HOST = ""


class Held(StrEnum):
    """What can be held."""

    MODEL = "model"
    WORKERS = "workers"  # of one host, or of all


@dataclass(frozen=True)
class Pause(Record):
    """Somebody holds a model or workers."""

    _enums: ClassVar[dict[str, type[StrEnum]]] = {"kind": Held}

    kind: Held
    name: str  # of the model; of the workers' host, `EVERY_HOST` for all
    reason: str  # of the person who did it; may be empty
    actor: str
    since: float

    def __str__(self) -> str:
        what = f"model {self.name} is" if self.kind is Held.MODEL else f"{workers_named(self.name)} are"
        return f"{what} paused by {self.actor}" + (f": {self.reason}" if self.reason else "")

    def holds(self, job: Job) -> bool:
        """Whether a waiting job waits for the end of this pause, wherever it would run."""
        if self.kind is Held.MODEL:
            return job.model == self.name
        return self.name == EVERY_HOST


def pause(database: Database, kind: Held, name: str, reason: str, actor: str) -> Pause:
    """Start nothing more of a model, or on workers; pausing again changes the reason."""
    pause = Pause(kind, name, reason, actor, time.time())
    with database.write() as connection:
        _remove(connection, kind, name)
        values = {"kind": kind, "name": name, "reason": reason, "actor": actor, "since": pause.since}
        connection.execute(insert(schema.pauses).values(**values))
        record_event(connection, actor, "", str(pause))
    return pause


def resume(database: Database, kind: Held, name: str, actor: str) -> bool:
    """End a pause; False when there was none."""
    with database.write() as connection:
        ended = _remove(connection, kind, name)
        if ended:
            what = f"model {name} goes" if kind is Held.MODEL else f"{workers_named(name)} go"
            record_event(connection, actor, "", f"{what} on")
    return ended


def list_pauses(database: Database) -> list[Pause]:
    """What is held now, the longest first."""
    with database.read() as connection:
        return pauses_in(connection)


def pauses_in(connection: Connection) -> list[Pause]:
    """What is held now, the longest first."""
    columns = schema.pauses.c
    rows = connection.execute(select(schema.pauses).order_by(columns.since, columns.kind, columns.name))
    return [Pause.from_row(row) for row in rows]


def paused_models(pauses: Sequence[Pause]) -> set[str]:
    """The models of which nothing starts."""
    return {pause.name for pause in pauses if pause.kind is Held.MODEL}


def are_workers_paused(pauses: Sequence[Pause], host: str) -> bool:
    """Whether the workers of this host start nothing."""
    return any(pause.kind is Held.WORKERS and pause.name in (EVERY_HOST, host) for pause in pauses)


def count_held(database: Database, pause: Pause) -> dict[JobState, int]:
    """How many jobs a pause concerns: those that wait, and those that still run."""
    jobs = schema.jobs.c
    query = select(jobs.state, func.count()).where(jobs.state.in_((JobState.QUEUED, JobState.RUNNING)))
    if pause.kind is Held.MODEL:
        query = query.where(jobs.model == pause.name)
    elif pause.name != EVERY_HOST:  # which of those that wait would run there is not known
        query = query.where(jobs.lease_owner.startswith(f"{pause.name}/", autoescape=True))
    counts = dict.fromkeys((JobState.QUEUED, JobState.RUNNING), 0)
    with database.read() as connection:
        return counts | {JobState(state): int(n) for state, n in connection.execute(query.group_by(jobs.state))}


def workers_named(host: str) -> str:
    """`all workers`, or `the workers of HOST`."""
    return "all workers" if host == EVERY_HOST else f"the workers of {host}"


def _remove(connection: Connection, kind: Held, name: str) -> bool:
    columns = schema.pauses.c
    gone = delete(schema.pauses).where(columns.kind == kind, columns.name == name).returning(columns.name)
    return connection.execute(gone).first() is not None
