"""While a model runs, the next study is read and the last one is reported: one worker, three jobs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.uid import generate_uid
from sqlalchemy import func, select, update

import node.work
from node.archive import schema
from node.archive.ingest import Outcome
from node.archive.records import Job, JobState
from node.archive.store import Archive
from node.assemble import complete_studies
from node.config import Config, load_config
from node.dicom.volume import Image, Volume
from node.errors import InputRefused
from node.infer.results import Labelmap
from node.infer.shelf import PackageShelf
from node.infer.warm import WarmModels
from node.queue.jobs import cancel_job, list_jobs
from node.queue.leases import claim_job, claim_to_read, give_back_read
from node.queue.workers import WorkerId
from node.receive.importer import import_path
from node.route import route_study
from node.work import Worker
from tests.benchmark.pipeline import ROUTES, make_package, make_study
from tests.running_node import RunningNode, wait_until

PATIENCE_S = 60


class Marker:
    """A model of which each run waits until the test lets it go on."""

    name = "marker"

    def __init__(self) -> None:
        self.running = False
        self.stopped = ""
        self.runs = 0
        self.go_on = threading.Semaphore(0)

    def predict(self, inputs: Mapping[str, Volume | Image]) -> Labelmap:
        self.runs += 1
        self.running = True
        assert self.go_on.acquire(timeout=PATIENCE_S), "the test forgot this run"
        self.running = False
        volume = inputs["image"]
        assert isinstance(volume, Volume)
        return Labelmap((volume.array > 500).astype(np.uint16), volume.grid)

    def stop(self, why: str) -> None:
        self.stopped = why

    def close(self) -> None:
        """Nothing is held."""


class OneModel(WarmModels):
    """Gives the marker for every package."""

    def __init__(self, marker: Marker):
        super().__init__("cpu", memory_bytes=None, warm_bytes=0)
        self._marker = marker

    def get(self, package: object) -> Any:
        return self._marker

    @property
    def names(self) -> frozenset[str]:
        return frozenset(("marker",))


@pytest.fixture
def marker() -> Marker:
    return Marker()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    folder = tmp_path / "node"
    folder.mkdir()
    return load_config(RunningNode(folder, 104, routes=ROUTES, models=make_package(tmp_path / "models")).config)


@pytest.fixture
def jobs(tmp_path: Path, archive: Archive, config: Config) -> list[Job]:
    """Three studies of one small CT each, decided over; all have waited for a while."""
    for number in range(3):
        uids = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
        folder = make_study(tmp_path / f"study-{number}", 4, 16, **uids)
        assert {one.outcome for one in import_path(folder, archive)} == {Outcome.STORED}
    shelf = PackageShelf(config.models.paths, {})
    for study in complete_studies(archive, 0.0):
        route_study(archive, study, config.routes, shelf.look_up)
    with archive.database.write() as connection:
        connection.execute(update(schema.jobs).values(queued_at=time.time() - 10 + schema.jobs.c.id / 1000))
    found = [job for job, _ in list_jobs(archive.database)][::-1]
    assert [job.state for job in found] == [JobState.QUEUED] * 3
    return found


@pytest.fixture
def worker(archive: Archive, config: Config, marker: Marker) -> Iterator[Worker]:
    """A worker at work, in a thread of this process."""
    stop = threading.Event()
    working = Worker(stop, archive, config, OneModel(marker))

    def live() -> None:
        while not stop.is_set():
            if not working.do_next():
                stop.wait(0.05)

    thread = threading.Thread(target=live)
    thread.start()
    yield working
    stop.set()
    for _ in range(10):
        marker.go_on.release()
    thread.join(PATIENCE_S)
    working.close()


def states(archive: Archive) -> list[tuple[JobState, int]]:
    return [(job.state, job.attempts) for job, _ in list_jobs(archive.database)][::-1]


def until(what: Callable[[], bool], name: str) -> None:
    wait_until(what, PATIENCE_S, name)


def test_the_next_is_read_and_the_last_is_reported_while_a_model_runs(
    archive: Archive, jobs: list[Job], marker: Marker, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    reporting, report_on = threading.Event(), threading.Event()
    report = node.work.report

    def slow_report(*arguments: Any, **named: Any) -> Any:
        reporting.set()
        assert report_on.wait(PATIENCE_S)
        return report(*arguments, **named)

    monkeypatch.setattr(node.work, "report", slow_report)
    worker: Worker = request.getfixturevalue("worker")
    until(lambda: marker.running, "the first runs")
    until(lambda: worker._ahead.job_id == jobs[1].id, "the second is read")
    until(lambda: states(archive)[1] == (JobState.QUEUED, 0), "it waits on, and no attempt of it counts")
    marker.go_on.release()
    until(lambda: marker.runs == 2 and reporting.is_set(), "the second runs, the first is reported")
    until(lambda: worker._ahead.job_id == jobs[2].id, "the third is read")
    assert [state for state, _ in states(archive)] == [JobState.RUNNING, JobState.RUNNING, JobState.QUEUED]
    report_on.set()
    marker.go_on.release(2)
    until(lambda: states(archive) == [(JobState.DONE, 1)] * 3, "all are done, each by one attempt")
    with archive.database.read() as connection:
        kinds = connection.execute(select(schema.results.c.kind, func.count()).group_by(schema.results.c.kind)).all()
    assert sorted(map(tuple, kinds)) == [("seg", 3), ("sr", 3)]
    starts = [event.what for job in list_jobs(archive.database) for event in archive.events(job[1])]
    assert sum("attempt 1 started" in what for what in starts) == 3, "reading ahead is no start"


def test_what_was_read_ahead_may_run_elsewhere(
    archive: Archive, jobs: list[Job], marker: Marker, worker: Worker
) -> None:
    until(lambda: worker._ahead.job_id == jobs[1].id, "the second is read")
    until(lambda: states(archive)[1] == (JobState.QUEUED, 0), "and given back")
    taken = claim_job(archive.database, WorkerId.mine())  # of another process, as far as the queue knows
    assert taken is not None
    assert taken.id == jobs[1].id
    marker.go_on.release(2)
    until(lambda: [state for state, _ in states(archive)].count(JobState.DONE) == 2, "the others are done here")
    assert states(archive)[1] == (JobState.RUNNING, 1)


def test_images_that_are_gone_end_a_job_when_they_are_read_ahead(
    archive: Archive, jobs: list[Job], marker: Marker, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    plan = node.work.plan_inputs

    def refuse(package: Any, wanted: Any, paths: Any) -> Any:
        if wanted == jobs[1].inputs:
            raise InputRefused("damaged")
        return plan(package, wanted, paths)

    monkeypatch.setattr(node.work, "plan_inputs", refuse)
    request.getfixturevalue("worker")
    until(lambda: marker.running, "the first runs")
    until(lambda: states(archive)[1] == (JobState.REFUSED, 1), "the second is refused meanwhile")
    marker.go_on.release(2)
    until(lambda: [state for state, _ in states(archive)][::2] == [JobState.DONE] * 2, "the others are done")


def test_a_cancelled_job_is_not_run_though_it_was_read(
    archive: Archive, jobs: list[Job], marker: Marker, worker: Worker
) -> None:
    until(lambda: worker._ahead.job_id == jobs[1].id, "the second is read")
    until(lambda: states(archive)[1] == (JobState.QUEUED, 0), "and given back")
    cancel_job(archive.database, jobs[1].id, "a person")
    marker.go_on.release(2)
    until(lambda: [state for state, _ in states(archive)][::2] == [JobState.DONE] * 2, "the others are done")
    assert states(archive)[1] == (JobState.CANCELLED, 0)
    assert marker.runs == 2
    until(lambda: worker._ahead.job_id is None, "nothing of it stays in memory")


def test_only_what_free_workers_left_is_read_ahead(archive: Archive, jobs: list[Job]) -> None:
    with archive.database.write() as connection:
        connection.execute(update(schema.jobs).values(queued_at=time.time() + 5))
    assert claim_to_read(archive.database, WorkerId.mine()) is None
    with archive.database.write() as connection:
        connection.execute(update(schema.jobs).values(queued_at=time.time() - 5))
    worker = WorkerId.mine()
    job = claim_to_read(archive.database, worker)
    assert job is not None
    assert (job.attempts, job.started_at) == (1, None), "a reading that kills the worker counts"
    other = claim_job(archive.database, worker)
    assert other is not None
    assert other.id != job.id, "nobody else takes it meanwhile"
    assert give_back_read(archive.database, job, worker)
    assert not give_back_read(archive.database, job, worker)
    again = claim_job(archive.database, worker, read=job.id)
    assert again is not None
    assert (again.id, again.attempts) == (job.id, 1)
