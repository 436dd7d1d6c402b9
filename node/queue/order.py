"""Which waiting job is next: the more urgent first, then what needs no model loaded, then sources in turn, then the one
that waits longest.

The waiting jobs of one source, one model and one priority are a lane, and in a lane the oldest is next. So a choice
looks at one job for each lane, found by an index, however many wait behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, bindparam, func, select

from node.archive import schema
from node.archive.records import JobState
from node.priority import Priority

AGED_S = 3600.0  # a job that waited for so long has a claim to a start out of its turn ...
STARTS = 10  # ... one of so many, for its priority
COLD_S = 30.0  # that a job may wait longer because a worker goes on with the models that it has loaded


@dataclass(frozen=True)
class Lane:
    """The waiting jobs of one source, model and priority, by the one that is next."""

    name: str
    source: str  # calling AE title
    model: str
    priority: Priority
    queued_at: float  # since when the next one waits
    source_started_at: float  # when a job of this source last started; 0.0: never


def lane_of(source: str, model: str, priority: Priority) -> str:
    """The name of a lane. A backslash stands in neither an AE title (PS3.5 6.2) nor a model's name."""
    return "\\".join((source, model, priority))


def in_turn(
    lanes: Sequence[Lane], last_started: Sequence[Priority], now: float, loaded: Collection[str] = ()
) -> list[Lane]:
    """The lanes in the order in which they give the next job.

    The more urgent priority comes first; within it a job whose model is `loaded` here, for as long as none of another
    model waits more than `COLD_S`; then the source whose last start is longest ago; of one source the job that waits
    longest. So that nothing waits for ever, one of `STARTS` starts goes to each lower priority whose oldest job waited
    for more than `AGED_S`; it never goes before STAT. `last_started` are the priorities of the last `STARTS` - 1
    starts.
    """

    def turn(lane: Lane) -> tuple[object, ...]:
        cold = bool(loaded) and lane.model not in loaded and now - lane.queued_at <= COLD_S
        return (lane.priority.rank, cold, lane.source_started_at, lane.queued_at, lane.name)

    ordered = sorted(lanes, key=turn)
    if not ordered or ordered[0].priority is Priority.STAT:
        return ordered
    aged = [lane for lane in lanes if now - lane.queued_at > AGED_S and lane.priority not in last_started]
    if aged:
        first = min(aged, key=lambda lane: (lane.queued_at, lane.name))
        ordered.remove(first)
        ordered.insert(0, first)
    return ordered


def waiting_lanes(connection: Connection, now: float, most_attempts: int) -> list[Lane]:
    """The lanes in which a job waits that may start now and has had `most_attempts` at most."""
    return [
        Lane(name, source, model, Priority(priority), queued_at, started_at or 0.0)
        for name, source, model, priority, queued_at, started_at in connection.execute(
            _WAITING, {"now": now, "most_attempts": most_attempts}
        )
    ]


def last_started(connection: Connection) -> list[Priority]:
    """The priorities of the last `STARTS` - 1 starts."""
    jobs = schema.jobs.c
    query = select(jobs.priority).where(jobs.started_at.is_not(None)).order_by(jobs.started_at.desc())
    return [Priority(priority) for priority in connection.scalars(query.limit(STARTS - 1))]


def _select_waiting() -> Select[*tuple[Any, ...]]:
    jobs, other, head = schema.jobs.c, schema.jobs.alias("other"), schema.jobs.alias("head")
    queued = jobs.state == JobState.QUEUED
    # From one name to the next by the index `jobs_waiting`; DISTINCT would read all that waits.
    names = select(func.min(jobs.lane).label("lane")).where(queued).cte("lanes", recursive=True)
    following = select(func.min(jobs.lane)).where(queued, jobs.lane > names.c.lane).scalar_subquery()
    names = names.union_all(select(following).where(names.c.lane.is_not(None)))
    due = select(jobs.id).where(queued, jobs.lane == names.c.lane, jobs.not_before <= bindparam("now"))
    due = due.where(jobs.attempts <= bindparam("most_attempts"))
    first = due.order_by(jobs.queued_at, jobs.id).limit(1).scalar_subquery()
    heads = select(first.label("id")).select_from(names).where(names.c.lane.is_not(None)).subquery("heads")
    started = select(func.max(other.c.started_at)).where(other.c.source == head.c.source).scalar_subquery()
    columns = (head.c.lane, head.c.source, head.c.model, head.c.priority, head.c.queued_at, started)
    return select(*columns).select_from(heads.join(head, head.c.id == heads.c.id))


_WAITING = _select_waiting()  # once: to build it takes longer than to run it
