"""Several schedulers, receivers, workers and people on one database: what two of them do at one moment happens once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import insert, update

from node.archive import schema
from node.archive.database import Database
from node.archive.records import JobState, StudyState
from node.archive.store import Archive
from node.config import Route
from node.queue import leases
from node.queue.jobs import NewJob, add_job, cancel_job, list_jobs
from node.queue.rows import NewResult
from node.queue.workers import WorkerId
from node.receive.importer import Limits, import_path
from node.route import route_study, start_early
from tests.dicom.slices import write_series
from tests.postgresql import postgresql_server
from tests.test_assemble import look_up

ROUNDS = 40


@pytest.fixture
def machines(archive: Archive) -> Iterator[list[Archive]]:
    """Four processes' worth of archives on one database and one storage folder."""
    url = archive.database.url.render_as_string(hide_password=False)
    with ExitStack() as stack:
        yield [archive, *(stack.enter_context(closing(Archive(archive.storage, url))) for _ in range(3))]


def at_once(steps: Sequence[Callable[[], Any]]) -> list[Any]:
    """Do all of them at the same moment, each in a thread of its own; what they return. What one raises is raised."""
    together = threading.Barrier(len(steps), timeout=60)

    def step_with_others(step: Callable[[], Any]) -> Any:
        together.wait()
        return step()

    with ThreadPoolExecutor(len(steps)) as pool:
        return list(pool.map(step_with_others, steps))


def route(**changes: Any) -> Route:
    return Route.model_validate({"name": "ct", "when": {"Modality": "CT"}, "run": ["model"], "send_to": []} | changes)


@pytest.fixture
def receive(archive: Archive, tmp_path: Path) -> Callable[[int], str]:
    """A new study of three slices in the archive; its UID."""

    def receive_study(number: int) -> str:
        folder = tmp_path / "in" / str(number)
        array = np.zeros((3, 4, 4), np.int16)
        write_series(folder, array, StudyInstanceUID=f"1.5.{number}", SeriesInstanceUID=f"1.6.{number}")
        take(archive, folder)
        return f"1.5.{number}"

    return receive_study


def test_a_study_is_routed_by_one_of_several_schedulers(machines: list[Archive], receive: Callable[[int], str]) -> None:
    for number in range(ROUNDS):
        uid = receive(number)
        study = machines[0].study(uid)
        decisions = at_once([partial(route_study, each, study, [route()], look_up) for each in machines])
        assert sum(decision is not None for decision in decisions) == 1
        assert len(list_jobs(machines[0].database, study_id=study.id)) == 1
        story = [event.what for event in machines[0].events(uid)]
        assert sum("complete with 3 instances" in what for what in story) == 1


def test_a_series_starts_early_by_one_of_several_schedulers(
    machines: list[Archive], receive: Callable[[int], str]
) -> None:
    for number in range(ROUNDS):
        study = machines[0].study(receive(number))
        here = {f"1.6.{number}": 3}
        started = at_once([partial(start_early, each, study, here, [route()], look_up) for each in machines])
        assert sorted(len(jobs) for jobs in started) == [0, 0, 0, 1]
        assert len(list_jobs(machines[0].database, study_id=study.id)) == 1


def test_an_instance_that_comes_while_its_study_is_routed_opens_it_again(
    machines: list[Archive], tmp_path: Path
) -> None:
    """Whichever is first: the study is not left routed without its last instance."""
    router, receiver = machines[:2]
    for number in range(ROUNDS):
        array, series_uid = np.zeros((2, 4, 4), np.int16), f"1.6.{number}"
        first, late = write_series(
            tmp_path / str(number), array, StudyInstanceUID=f"1.5.{number}", SeriesInstanceUID=series_uid
        )
        take(router, first)
        study = router.study(f"1.5.{number}")
        at_once(
            [
                lambda study=study: route_study(router, study, [], look_up),
                lambda late=late: take(receiver, late),
            ]
        )
        study = router.study(study.study_uid)
        assert (study.instances, study.state) == (2, StudyState.RECEIVING)


def take(archive: Archive, path: Path) -> None:
    """Receive a file, or a folder of them."""
    assert all(one.outcome is not None for one in import_path(path, archive, Limits()))


@pytest.fixture
def study_id(archive: Archive) -> int:
    study = {"study_uid": "1.2.3", "state": StudyState.ROUTED, "first_received_at": 0.0, "last_received_at": 0.0}
    with archive.database.write() as connection:
        identifier = connection.scalar(insert(schema.studies).values(**study).returning(schema.studies.c.id))
    assert identifier is not None
    return identifier


def new_job(number: int, *peers: str) -> NewJob:
    return NewJob("chest", "lungs", "1.0", "d" * 64, {"image": [f"1.1.{number}"]}, peers)


def put(archive: Archive, study_id: int, new: NewJob) -> None:
    with archive.database.write() as connection:
        add_job(connection, study_id, "1.2.3", 1, new, time.time())


def test_what_another_route_wants_of_a_job_that_ends_is_made(machines: list[Archive], study_id: int) -> None:
    """The job ends, and a further peer is added to it: it runs again for that peer, or has it from the start."""
    worker, scheduler = machines[:2]
    me = WorkerId.mine()
    for number in range(ROUNDS):
        put(worker, study_id, new_job(number, "pacs"))
        job = leases.claim_job(worker.database, me)
        assert job is not None
        result = [NewResult("seg", f"1.4.{number}", "1.2.840", f"results/{number}.dcm", 1, ["pacs"])]
        finished, _ = at_once(
            [
                lambda job=job, result=result: leases.finish_job(worker.database, job, me, result, [], "made"),
                lambda number=number: put(scheduler, study_id, new_job(number, "pacs", "archive")),
            ]
        )
        assert finished
        ((after, _),) = list_jobs(worker.database, limit=1)
        assert after.send_to == ["pacs", "archive"]
        assert after.state is JobState.QUEUED
        again = leases.claim_job(worker.database, me)
        assert again is not None
        assert leases.finish_job(worker.database, again, me, result, [], "made")


def test_a_cancelled_job_does_not_run_again_and_a_done_one_is_not_cancelled(
    machines: list[Archive], study_id: int
) -> None:
    worker, person = machines[:2]
    me = WorkerId.mine()
    for number in range(ROUNDS):
        put(worker, study_id, new_job(number, "pacs"))
        job = leases.claim_job(worker.database, me)
        assert job is not None

        def end(job=job, number=number) -> bool:
            if number % 2:
                leases.fail_attempt(worker.database, job, me, "it failed")
                return False
            return leases.finish_job(worker.database, job, me, [], [], "made")

        finished, cancelled = at_once([end, lambda job=job: cancel_job(person.database, job.id, "test")])
        ((after, _),) = list_jobs(worker.database, limit=1)
        assert after.state is (JobState.DONE if finished else JobState.CANCELLED)
        assert cancelled.state is after.state


def test_a_lost_job_is_given_back_by_one_of_several_schedulers(machines: list[Archive], study_id: int) -> None:
    database = machines[0].database
    stopped = WorkerId("elsewhere", "boot", 1, "1", "nonce")
    for number in range(ROUNDS):
        put(machines[0], study_id, new_job(number, "pacs"))
        job = leases.claim_job(database, stopped)
        assert job is not None
        with database.write() as connection:
            connection.execute(update(schema.jobs).values(lease_until=time.time() - 1))
        lost = at_once([lambda each=each: leases.recover_lost_jobs(each.database) for each in machines])
        assert sum(len(jobs) for jobs in lost) == 1
        assert not leases.finish_job(database, job, stopped, [], [], "made")
        cancel_job(database, job.id, "test")


def test_the_same_worker_cannot_end_an_attempt_that_it_had_lost(archive: Archive, study_id: int) -> None:
    """It was stopped, its job was given back, and when it woke it took the same job again."""
    put(archive, study_id, new_job(1, "pacs"))
    me = WorkerId.mine()
    first = leases.claim_job(archive.database, me)
    assert first is not None
    with archive.database.write() as connection:
        connection.execute(update(schema.jobs).values(lease_until=time.time() - 1))
    assert leases.recover_lost_jobs(archive.database)
    with archive.database.write() as connection:
        connection.execute(update(schema.jobs).values(not_before=0.0))
    second = leases.claim_job(archive.database, me)
    assert second is not None
    assert not leases.renew_lease(archive.database, first, me)
    assert not leases.finish_job(archive.database, first, me, [], [], "made")
    assert leases.finish_job(archive.database, second, me, [], [], "made")


def test_one_machine_delivers_to_a_peer_at_a_time(machines: list[Archive]) -> None:
    first, second = machines[0].database, machines[1].database
    with first.alone("deliver to pacs") as mine:
        assert mine
        with second.alone("deliver to archive") as other:
            assert other
        with second.alone("deliver to pacs") as too:
            assert too == (second.url.get_backend_name() == "sqlite")  # which serves one machine
    with second.alone("deliver to pacs") as mine:
        assert mine


def test_a_turn_ends_with_its_server(tmp_path: Path) -> None:
    with postgresql_server() as server, closing(Database(server.url)) as one, closing(Database(server.url)) as other:
        with one.alone("deliver to pacs") as mine:
            assert mine
            server.restart()
            with other.alone("deliver to pacs") as too:
                assert too
        with one.alone("deliver to pacs") as mine:
            assert mine
