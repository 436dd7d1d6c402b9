"""The queue: leases, attempts, retries, and that a result is recorded once and only by the holder of the lease."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert, update

from node.archive import schema
from node.archive.records import DeliveryState, Job, JobState, StudyState
from node.archive.store import Archive
from node.deliver.outbox import list_parcels
from node.errors import NotFound
from node.queue import jobs, leases
from node.queue.jobs import NewJob
from node.queue.rows import NewResult
from node.queue.workers import WorkerId

STUDY_UID = "1.2.3"


@pytest.fixture
def study_id(archive: Archive) -> int:
    with archive.database.write() as connection:
        identifier = connection.scalar(
            insert(schema.studies)
            .values(
                study_uid=STUDY_UID, state=StudyState.ROUTED, instances=2, first_received_at=0.0, last_received_at=0.0
            )
            .returning(schema.studies.c.id)
        )
    assert identifier is not None
    return identifier


def new_job(*uids: str, model: str = "lungs", refusal: str = "", send_to: tuple[str, ...] = ("pacs",)) -> NewJob:
    return NewJob("chest", model, "1.0", "d" * 64, {"image": uids or ("1.1", "1.2")}, send_to, refusal=refusal)


def add(archive: Archive, study_id: int, job: NewJob) -> bool:
    with archive.database.write() as connection:
        return jobs.add_job(connection, study_id, STUDY_UID, 1, job, time.time())


def only_job(archive: Archive) -> Job:
    ((job, _),) = jobs.list_jobs(archive.database)
    return job


def make_due(archive: Archive) -> None:
    with archive.database.write() as connection:
        connection.execute(update(schema.jobs).values(not_before=0.0))


SEG = NewResult("seg", "2.25.1", "1.2.840.10008.5.1.4.1.1.66.4", "results/seg.dcm", 100, ("pacs",))


@given(st.lists(st.from_regex(r"[1-9]\.[1-9][0-9]{0,5}", fullmatch=True), min_size=1, unique=True), st.randoms())
def test_a_key_is_of_the_set_of_instances(uids: list[str], random) -> None:
    shuffled = list(uids)
    random.shuffle(shuffled)
    key = jobs.job_key("lungs", "d", {"image": uids})
    assert key == jobs.job_key("lungs", "d", {"image": shuffled})
    assert key != jobs.job_key("lungs", "e", {"image": uids})
    assert key != jobs.job_key("spleen", "d", {"image": uids})
    assert key != jobs.job_key("lungs", "d", {"image": [*uids, "9.9.9"]})


def test_the_same_job_is_made_once(archive: Archive, study_id: int) -> None:
    assert add(archive, study_id, new_job("1.1", "1.2"))
    assert not add(archive, study_id, new_job("1.2", "1.1", send_to=("pacs", "archive")))
    assert only_job(archive).send_to == ["pacs", "archive"]


def test_a_job_ends_with_its_results_and_deliveries(archive: Archive, study_id: int) -> None:
    add(archive, study_id, new_job())
    worker = WorkerId.mine()
    job = leases.claim_job(archive.database, worker)
    assert job is not None
    assert (job.state, job.attempts) == (JobState.RUNNING, 1)
    assert leases.claim_job(archive.database, WorkerId.mine()) is None
    assert leases.finish_job(archive.database, job, worker, [SEG], [], "made")
    assert only_job(archive).state is JobState.DONE
    (parcel,) = list_parcels(archive.database)
    assert (parcel.delivery.peer, parcel.delivery.state, parcel.study_uid) == ("pacs", DeliveryState.PENDING, STUDY_UID)


def test_a_run_again_owes_the_same_objects_again(archive: Archive, study_id: int) -> None:
    add(archive, study_id, new_job())
    worker = WorkerId.mine()
    for _ in range(2):
        job = leases.claim_job(archive.database, worker)
        assert job is not None
        assert leases.finish_job(archive.database, job, worker, [SEG], [], "made")
        jobs.requeue_job(archive.database, job.id, "test")
    (parcel,) = list_parcels(archive.database)
    assert parcel.delivery.state is DeliveryState.PENDING
    assert len(jobs.job_results(archive.database, only_job(archive).id)) == 1


def test_a_lost_lease_takes_no_result(archive: Archive, study_id: int) -> None:
    add(archive, study_id, new_job())
    slow, fast = WorkerId.mine(), WorkerId.mine()
    job = leases.claim_job(archive.database, slow)
    assert job is not None
    with archive.database.write() as connection:
        connection.execute(update(schema.jobs).values(lease_until=time.time() - 1))
    assert [lost.id for lost in leases.recover_lost_jobs(archive.database)] == [job.id]
    make_due(archive)
    again = leases.claim_job(archive.database, fast)
    assert again is not None
    assert again.attempts == 2
    assert not leases.renew_lease(archive.database, job, slow)
    assert not leases.finish_job(archive.database, job, slow, [SEG], [], "late")
    assert list_parcels(archive.database) == []
    assert leases.finish_job(archive.database, again, fast, [SEG], [], "made")


def test_a_live_worker_keeps_its_lease(archive: Archive, study_id: int) -> None:
    add(archive, study_id, new_job())
    worker = WorkerId.mine()
    job = leases.claim_job(archive.database, worker)
    assert job is not None
    assert leases.recover_lost_jobs(archive.database) == []
    assert leases.renew_lease(archive.database, job, worker)


def test_a_killed_worker_is_known_dead_at_once(archive: Archive, study_id: int) -> None:
    add(archive, study_id, new_job())
    program = "from node.queue.workers import WorkerId; import time; print(WorkerId.mine(), flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = WorkerId.parse(process.stdout.readline().strip())
        assert leases.claim_job(archive.database, worker) is not None
        assert not worker.is_known_dead()
        assert leases.recover_lost_jobs(archive.database) == []
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert worker.is_known_dead()
    assert len(leases.recover_lost_jobs(archive.database)) == 1
    assert only_job(archive).state is JobState.QUEUED


def test_a_worker_of_another_host_is_never_called_dead() -> None:
    elsewhere = replace(WorkerId.mine(), host="elsewhere", pid=1)
    assert not elsewhere.is_known_dead()
    assert replace(WorkerId.mine(), boot_id="before the restart").is_known_dead()


def test_the_third_failed_attempt_quarantines(archive: Archive, study_id: int) -> None:
    add(archive, study_id, new_job())
    worker = replace(WorkerId.mine(), started="0")
    for attempt in (1, 2, 3):
        job = leases.claim_job(archive.database, worker)
        assert job is not None
        assert job.attempts == attempt
        leases.fail_attempt(archive.database, job, worker, "out of memory")
        assert only_job(archive).not_before > time.time()
        make_due(archive)
    job = only_job(archive)
    assert job.state is JobState.QUARANTINED
    assert job.reason == "attempt 3 of 3 failed: out of memory"
    assert leases.claim_job(archive.database, worker) is None


def test_the_last_attempt_is_left_to_a_worker_that_has_lived_for_a_while(archive: Archive, study_id: int) -> None:
    """Where workers die one after another it is not said of the study that was there."""
    young = WorkerId.mine()
    now_ticks = int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))
    young, old = replace(young, started=str(now_ticks)), replace(young, started="0")
    assert young.age_s() < leases.SETTLED_S < old.age_s()
    add(archive, study_id, new_job())
    for _ in range(2):
        job = leases.claim_job(archive.database, young)
        assert job is not None
        leases.fail_attempt(archive.database, job, young, "its worker died")
        make_due(archive)
    assert leases.claim_job(archive.database, young) is None
    add(archive, study_id, new_job("2.1"))
    other = leases.claim_job(archive.database, young)
    assert other is not None
    assert other.id != job.id, "what waits behind it is not held up"
    last = leases.claim_job(archive.database, old)
    assert last is not None
    assert (last.id, last.attempts) == (job.id, 3)


def test_a_released_job_does_not_count_the_attempt(archive: Archive, study_id: int) -> None:
    add(archive, study_id, new_job())
    worker = WorkerId.mine()
    job = leases.claim_job(archive.database, worker)
    assert job is not None
    leases.release_job(archive.database, job, worker)
    assert (only_job(archive).state, only_job(archive).attempts) == (JobState.QUEUED, 0)


def test_a_cancelled_job_takes_no_result(archive: Archive, study_id: int) -> None:
    add(archive, study_id, new_job())
    worker = WorkerId.mine()
    job = leases.claim_job(archive.database, worker)
    assert job is not None
    assert jobs.cancel_job(archive.database, job.id, "test").state is JobState.CANCELLED
    assert not leases.renew_lease(archive.database, job, worker)
    assert not leases.finish_job(archive.database, job, worker, [SEG], [], "late")


def test_a_refused_job_is_never_run(archive: Archive, study_id: int) -> None:
    add(archive, study_id, new_job(refusal="not applicable: no axial series"))
    assert leases.claim_job(archive.database, WorkerId.mine()) is None
    assert only_job(archive).state is JobState.REFUSED


def test_an_unknown_job_is_named(archive: Archive) -> None:
    with pytest.raises(NotFound, match="no job 7"):
        jobs.requeue_job(archive.database, 7, "test")


def test_many_workers_claim_each_job_once(archive: Archive, study_id: int) -> None:
    for number in range(40):
        add(archive, study_id, new_job(f"1.{number}"))
    program = (
        "import sys; from node.archive.database import Database; from node.queue.leases import claim_job\n"
        "from node.queue.workers import WorkerId\n"
        "database = Database(sys.argv[1]); worker = WorkerId.mine()\n"
        "while job := claim_job(database, worker): print(job.id)"
    )
    url = archive.database.url.render_as_string()
    workers = [
        subprocess.Popen([sys.executable, "-c", program, url], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    claimed = [int(line) for worker in workers for line in worker.communicate(timeout=60)[0].split()]
    assert len(claimed) == 40
    assert len(set(claimed)) == 40
