"""Two machines on one PostgreSQL and one storage folder: what one does the other one leaves alone, until it is lost.

A machine is a node whose processes have a host name of their own (unshare(1)): that is how a worker knows which others
it can see.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
from sqlalchemy import update

from node.archive import schema
from node.archive.open import open_archive
from node.archive.records import Job, JobState
from node.archive.store import Archive
from node.config import load_config
from node.demo.pacs import Orthanc, free_port
from node.queue.jobs import list_jobs
from node.queue.workers import WorkerId
from node.receive.importer import Limits, import_path
from tests.benchmark.pipeline import ROUTES, make_package, make_study
from tests.chaos import check_results, make_studies, wait_for_results
from tests.infer.tiny import MANIFEST, bundle_files, write
from tests.postgresql import postgresql_server
from tests.running_node import RunningNode, on_host, wait_until

SLOW = """\
import time

import torch


class Threshold(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.limit = torch.nn.Parameter(torch.tensor(1e9))

    def forward(self, image):
        time.sleep({seconds})
        return (image > self.limit).to(torch.float32)
"""


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Orthanc]:
    with Orthanc(tmp_path / "orthanc") as running:
        yield running


@pytest.fixture
def url() -> Iterator[str]:
    with postgresql_server() as server:
        yield server.url


def two_machines(folder: Path, pacs_port: int, url: str, models: Path) -> list[RunningNode]:
    machines = []
    for name in ("alpha", "beta"):
        (folder / name).mkdir()
        machines.append(
            RunningNode(
                folder / name, pacs_port, quiet="2s", routes=ROUTES, models=models, database=url,
                storage=folder / "shared", host=name,
            )
        )  # fmt: skip
    return machines


def slow_package(folder: Path, seconds: float) -> Path:
    """The models folder of a model that takes its time."""
    files = bundle_files(network=SLOW.format(seconds=seconds))
    write(folder / "marker", files | {"dicom.yaml": MANIFEST.encode()})
    return folder


@pytest.mark.timeout(300)
def test_two_machines_share_the_work_and_do_each_piece_once(tmp_path: Path, pacs: Orthanc, url: str) -> None:
    studies = make_studies(tmp_path / "studies", 24)
    machines = two_machines(tmp_path, pacs.port, url, make_package(tmp_path / "models"))
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(RunningNode.start, machines))
            folders = list(studies.values())
            halves = [folders[::2], folders[1::2]]
            list(pool.map(lambda machine, half: machine.send(*half), machines, halves))
        wait_for_results(machines[0], len(studies), 120)
        check_results(machines[0], pacs, studies)
        with closing(open_archive(load_config(machines[0].config))) as archive:
            jobs = list_jobs(archive.database, limit=None)
            assert [job.attempts for job, _ in jobs] == [1] * len(studies)
            for study_uid in studies:
                told = Counter(event.what for event in archive.events(study_uid))
                for once in ("marker: attempt 1 started", "seg delivered to pacs", "sr delivered to pacs"):
                    assert told[once] == 1, told
                assert sum(count for what, count in told.items() if "complete with 5 instances" in what) == 1
        done = [set(re.findall(r"job (\d+) done", machine.log.read_text())) for machine in machines]
        assert all(done), "one machine did nothing"
        assert not done[0] & done[1]
        assert len(done[0] | done[1]) == len(studies)
    finally:
        for machine in machines:
            machine.kill_all()


@pytest.mark.timeout(300)
def test_a_worker_that_wakes_after_its_lease_cannot_commit(tmp_path: Path, pacs: Orthanc, url: str) -> None:
    machines = two_machines(tmp_path, pacs.port, url, slow_package(tmp_path / "models", 4.0))
    study_uid, folder = next(iter(make_studies(tmp_path / "studies", 1).items()))
    stopped: list[psutil.Process] = []
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(RunningNode.start, machines))
        machines[0].send(folder)
        with closing(open_archive(load_config(machines[0].config))) as archive:
            first = wait_for_state(archive, JobState.RUNNING)
            assert first.lease_owner is not None
            owner = WorkerId.parse(first.lease_owner)
            other = "beta" if owner.host == "alpha" else "alpha"
            worker = psutil.Process(owner.pid)
            wait_until(lambda: len(worker.children(recursive=True)) >= 2, 30, "its model's process")
            stopped = [worker, *worker.children(recursive=True)]
            for process in stopped:
                process.send_signal(signal.SIGSTOP)
            with archive.database.write() as connection:  # as it is a minute later
                connection.execute(update(schema.jobs).values(lease_until=time.time() - 1))
            done = wait_for_state(archive, JobState.DONE)
            assert done.attempts == 2
            for process in stopped:
                process.send_signal(signal.SIGCONT)
            late = "marker: attempt 1 ended without its lease, nothing of it is taken"
            wait_until(lambda: any(late in what for what in story(archive, study_uid)), 60, "the late end is refused")
            assert wait_for_state(archive, JobState.DONE).finished_at == done.finished_at
            assert any("attempt 1 of 3 failed: its worker was silent" in what for what in story(archive, study_uid))
        wait_for_results(machines[0], 1, 60)
        check_results(machines[0], pacs, [study_uid])
        assert f"job {first.id} done" in next(each for each in machines if each.host == other).log.read_text()
    finally:
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        for machine in machines:
            machine.kill_all()


@pytest.mark.timeout(300)
def test_no_lease_is_taken_from_a_live_worker(tmp_path: Path, url: str) -> None:
    """The model runs for three leases; the scheduler of another machine looks for lost ones all the time."""
    node = RunningNode(
        tmp_path, free_port(), quiet="1s", routes=ROUTES.replace("[pacs]", "[]"), database=url,
        models=slow_package(tmp_path / "models", 9.0),
    )  # fmt: skip
    short = "import sys, node.queue.leases as leases; leases.LEASE_S = 3.0; from node.cli import main; sys.exit(main())"
    with closing(open_archive(load_config(node.config))) as archive:
        make_study(tmp_path / "study", 5, 64)
        assert all(one.outcome is not None for one in import_path(tmp_path / "study", archive, Limits()))
        roles = [
            subprocess.Popen(
                [*on_host(host), sys.executable, "-c", short, "serve", "--role", role, "--config", str(node.config)],
                stdin=subprocess.DEVNULL, cwd=Path(__file__).parent.parent, env=os.environ,
            )
            for host, role in (("alpha", "schedule"), ("beta", "work"), ("gamma", "work"))
        ]  # fmt: skip
        try:
            running = wait_for_state(archive, JobState.RUNNING)
            leases = set()

            def ended() -> bool:
                (job, _), *_ = list_jobs(archive.database)
                leases.add(job.lease_until)
                return job.state is not JobState.RUNNING

            wait_until(ended, 60, "the job ends")
            job = wait_for_state(archive, JobState.DONE)
            assert (job.attempts, job.started_at) == (1, running.started_at)
            assert len(leases - {None}) >= 3, "the lease was renewed"
        finally:
            node.kill_all()
            for role in roles:
                role.wait(20)


def wait_for_state(archive: Archive, state: JobState) -> Job:
    """The only job, once it is in this state."""
    found: list[Job] = []

    def is_there() -> bool:
        found[:] = [job for job, _ in list_jobs(archive.database, states=[state])]
        return bool(found)

    wait_until(is_there, 90, f"a job is {state}")
    return found[0]


def story(archive: Archive, study_uid: str) -> list[str]:
    return [event.what for event in archive.events(study_uid)]
