"""Which job is next: priorities, sources in turn, the share of what waits long, and what is paused."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert, update

from node.archive import schema
from node.archive.records import Job, JobState, StudyState
from node.archive.store import Archive
from node.priority import Priority
from node.queue.jobs import NewJob, add_job, list_jobs, prioritise_job, requeue_job
from node.queue.leases import claim_job, fail_attempt, fail_overdue, finish_job, renew_lease
from node.queue.order import AGED_S, COLD_S, STARTS, Lane, in_turn, lane_of
from node.queue.pauses import EVERY_HOST, Held, list_pauses, pause, resume
from node.queue.untold import claim_untold
from node.queue.workers import WorkerId

NOW = 1_000_000.0
ROUTINE, STAT, URGENT, BACKGROUND = Priority.ROUTINE, Priority.STAT, Priority.URGENT, Priority.BACKGROUND


def lane(source: str, priority: Priority, *, waited_s: float = 1.0, started: float = 0.0, model: str = "m") -> Lane:
    return Lane(lane_of(source, model, priority), source, model, priority, NOW - waited_s, started)


def sources(lanes: Sequence[Lane]) -> list[str]:
    return [one.source for one in lanes]


def test_the_more_urgent_goes_first_then_the_source_that_was_served_longest_ago() -> None:
    lanes = [
        lane("A", ROUTINE, waited_s=500, started=NOW - 1),
        lane("B", ROUTINE, waited_s=2, started=NOW - 9),
        lane("C", URGENT, started=NOW),
        lane("D", STAT),
        lane("E", BACKGROUND, waited_s=3000),
    ]
    assert sources(in_turn(lanes, [ROUTINE] * 9, NOW)) == ["D", "C", "B", "A", "E"]


def test_a_model_that_is_loaded_goes_on_until_another_has_waited_for_long() -> None:
    fresh = lane("A", ROUTINE, waited_s=1, started=NOW, model="loaded")
    cold = lane("B", ROUTINE, waited_s=COLD_S - 1, model="cold")
    assert sources(in_turn([cold, fresh], [], NOW, {"loaded"})) == ["A", "B"]
    assert sources(in_turn([cold, fresh], [], NOW)) == ["B", "A"], "where nothing is loaded nothing goes before"
    late = lane("B", ROUTINE, waited_s=COLD_S + 1, model="cold")
    assert sources(in_turn([fresh, late], [], NOW, {"loaded"})) == ["B", "A"]
    urgent = lane("C", URGENT, model="cold")
    assert sources(in_turn([fresh, urgent], [], NOW, {"loaded"})) == ["C", "A"]


def test_one_start_of_ten_goes_to_what_waited_long_but_never_before_stat() -> None:
    old = lane("old", BACKGROUND, waited_s=AGED_S + 1)
    new = lane("new", URGENT)
    assert sources(in_turn([new, old], [URGENT] * (STARTS - 1), NOW)) == ["old", "new"]
    assert sources(in_turn([new, old], [URGENT] * (STARTS - 2) + [BACKGROUND], NOW)) == ["new", "old"]
    assert sources(in_turn([new, old, lane("stat", STAT)], [URGENT] * 9, NOW)) == ["stat", "new", "old"]


@given(st.lists(st.sampled_from([URGENT, ROUTINE, BACKGROUND]), min_size=1, max_size=3, unique=True))
def test_no_priority_that_waits_long_is_passed_over_more_than_twice_the_share(waiting: list[Priority]) -> None:
    """Whatever keeps coming, each priority that has waited long starts within two rounds."""
    lanes = [lane(f"of {priority}", priority, waited_s=AGED_S * 2) for priority in waiting]
    lanes.append(lane("new", URGENT, model="other"))
    started: list[Priority] = [URGENT] * (STARTS - 1)
    for _ in range(2 * STARTS):
        started.insert(0, in_turn(lanes, started[: STARTS - 1], NOW)[0].priority)
    assert set(waiting) <= set(started[: 2 * STARTS])


@pytest.fixture
def worker() -> WorkerId:
    return WorkerId.mine()


def study(archive: Archive, source: str) -> int:
    """A study that `source` sent."""
    times = {"first_received_at": 0.0, "last_received_at": 0.0}
    with archive.database.write() as connection:
        row = insert(schema.studies).values(study_uid=f"1.2.{source}", state=StudyState.ROUTED, instances=1, **times)
        study_id = connection.scalar(row.returning(schema.studies.c.id)) or 0
        of_study = insert(schema.series).values(study_id=study_id, series_uid="1", instances=1)
        series_id = connection.scalar(of_study.returning(schema.series.c.id))
        values: dict[str, Any] = {
            "sop_instance_uid": f"1.2.{source}.1",
            "sop_class_uid": "1",
            "transfer_syntax_uid": "1",
        }
        values |= {"path": source, "size": 1, "sha256": "0", "received_from": source, "received_at": 0.0}
        connection.execute(insert(schema.instances).values(series_id=series_id, **values))
    return study_id


def queue(
    archive: Archive, study_id: int, count: int = 1, *, first: int = 0, model: str = "lungs", **more: Any
) -> None:
    new = NewJob("chest", model, "1.0", "d" * 64, {}, ("pacs",))
    with archive.database.write() as connection:
        for number in range(first, first + count):
            job = replace(new, inputs={"image": (f"1.{study_id}.{number}",)}, **more)
            add_job(connection, study_id, f"1.2.{study_id}", 1, job, time.time())


def claim(archive: Archive, worker: WorkerId) -> Job:
    job = claim_job(archive.database, worker)
    assert job is not None
    return job


def latest(archive: Archive) -> Job:
    return list_jobs(archive.database)[0][0]


def test_a_source_with_many_jobs_holds_up_nobody(archive: Archive, worker: WorkerId) -> None:
    queue(archive, study(archive, "CT1"), 30)
    assert [claim(archive, worker).source for _ in range(3)] == ["CT1"] * 3
    queue(archive, study(archive, "CT2"), 3)
    assert [claim(archive, worker).source for _ in range(6)] == ["CT2", "CT1"] * 3
    assert claim(archive, worker).source == "CT1"


def test_stat_goes_before_what_waits(archive: Archive, worker: WorkerId) -> None:
    study_id = study(archive, "CT1")
    queue(archive, study_id, 3)
    queue(archive, study_id, 1, first=10, priority=STAT)
    queue(archive, study_id, 1, first=20, priority=BACKGROUND)
    waiting = list_jobs(archive.database)[-1][0]
    assert prioritise_job(archive.database, waiting.id, URGENT, "test").priority is URGENT
    priorities = [claim(archive, worker).priority for _ in range(5)]
    assert priorities == [STAT, URGENT, ROUTINE, ROUTINE, BACKGROUND]
    assert claim_job(archive.database, worker) is None


def test_a_second_route_makes_a_waiting_job_more_urgent(archive: Archive) -> None:
    study_id = study(archive, "CT1")
    queue(archive, study_id)
    queue(archive, study_id, priority=STAT)
    queue(archive, study_id, priority=BACKGROUND)
    ((job, _),) = list_jobs(archive.database)
    assert job.priority is STAT


def test_old_background_work_starts_in_its_share(archive: Archive, worker: WorkerId) -> None:
    study_id = study(archive, "CT1")
    queue(archive, study_id, 2, priority=BACKGROUND)
    with archive.database.write() as connection:
        connection.execute(update(schema.jobs).values(queued_at=time.time() - AGED_S - 60))
    queue(archive, study_id, 30, first=10, priority=URGENT)
    started = [claim(archive, worker).priority for _ in range(STARTS + 1)]
    assert started == [BACKGROUND, *[URGENT] * (STARTS - 1), BACKGROUND]


def test_what_waits_for_its_next_attempt_is_passed(archive: Archive, worker: WorkerId) -> None:
    queue(archive, study(archive, "CT1"), 2, priority=STAT)
    first = claim(archive, worker)
    fail_attempt(archive.database, first, worker, "no memory")
    second = claim(archive, worker)
    assert second.id != first.id
    assert claim_job(archive.database, worker) is None


def test_a_paused_model_waits_and_goes_on(archive: Archive, worker: WorkerId) -> None:
    study_id = study(archive, "CT1")
    queue(archive, study_id, 2)
    queue(archive, study_id, 1, first=10, model="spleen")
    running = claim(archive, worker)
    held = pause(archive.database, Held.MODEL, "lungs", "new weights", "test")
    assert str(held) == "model lungs is paused by test: new weights"
    assert held.holds(running)
    assert renew_lease(archive.database, running, worker)  # what runs is finished
    assert claim(archive, worker).model == "spleen"
    assert claim_job(archive.database, worker) is None
    pause(archive.database, Held.MODEL, "lungs", "still", "test")
    assert [one.reason for one in list_pauses(archive.database)] == ["still"]
    assert resume(archive.database, Held.MODEL, "lungs", "test")
    assert not resume(archive.database, Held.MODEL, "lungs", "test")
    assert claim(archive, worker).model == "lungs"


@pytest.mark.parametrize(("host", "holds"), [(EVERY_HOST, True), ("this", True), ("another", False)])
def test_paused_workers_start_nothing(archive: Archive, worker: WorkerId, host: str, holds: bool) -> None:
    queue(archive, study(archive, "CT1"))
    name = worker.host if host == "this" else host
    pause(archive.database, Held.WORKERS, name, "", "test")
    assert (claim_job(archive.database, worker) is None) is holds
    assert resume(archive.database, Held.WORKERS, name, "test")
    assert (claim_job(archive.database, worker) is None) is not holds


def make_late(archive: Archive) -> None:
    with archive.database.write() as connection:
        connection.execute(update(schema.jobs).values(deadline_at=time.time() - 1))


def test_a_waiting_job_ends_at_its_deadline_and_its_peers_are_told(archive: Archive, worker: WorkerId) -> None:
    queue(archive, study(archive, "CT1"), deadline_s=1800.0)
    assert fail_overdue(archive.database) == []
    make_late(archive)
    assert len(fail_overdue(archive.database)) == 1
    job = latest(archive)
    assert job.state is JobState.FAILED
    assert job.reason == "not done within 30m (the deadline of route 'chest'): it waited for a worker"
    assert claim_job(archive.database, worker) is None
    told = claim_untold(archive.database, worker)
    assert told is not None
    assert told.id == job.id
    assert fail_overdue(archive.database) == []
    again = requeue_job(archive.database, job.id, "test")
    assert again.deadline_at is not None
    assert again.deadline_at > time.time() + 1700  # anew


def test_a_running_job_loses_its_lease_at_its_deadline(archive: Archive, worker: WorkerId) -> None:
    queue(archive, study(archive, "CT1"), deadline_s=90.0)
    job = claim(archive, worker)
    make_late(archive)
    assert [late.id for late in fail_overdue(archive.database)] == [job.id]
    assert not renew_lease(archive.database, job, worker)
    assert not finish_job(archive.database, job, worker, [], [], "late")
    assert latest(archive).reason == "not done within 90s (the deadline of route 'chest'): attempt 1 was running"


def test_a_job_without_a_deadline_takes_its_time(archive: Archive) -> None:
    queue(archive, study(archive, "CT1"))
    assert (latest(archive).deadline_at, fail_overdue(archive.database)) == (None, [])
