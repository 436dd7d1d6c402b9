"""What becomes of a job beside its results: more is wanted of it, nobody was told that it failed, it is taken back."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from sqlalchemy import insert, update

from node.archive import schema
from node.archive.records import DeliveryState, Job, JobState, StudyState
from node.archive.store import Archive
from node.deliver.outbox import due_parcels, list_parcels
from node.errors import NotAllowed
from node.queue.jobs import NewJob, add_job, list_jobs, requeue_job
from node.queue.leases import MAXIMUM_ATTEMPTS, claim_job, end_job, fail_attempt, finish_job
from node.queue.rows import NewResult
from node.queue.untold import claim_untold, drop_untold, finish_untold
from node.queue.withdrawal import REJECTION, earlier_reports, replaced_job, results_to_withdraw, withdraw
from node.queue.workers import WorkerId
from node.report.kinds import NO_RESULT

JOB = NewJob("chest", "lungs", "1.0", "d" * 64, {"image": ("1.1",)}, ("pacs",), ("seg", "sr"))
SEG = NewResult("seg", "2.25.1", "1.2.840.10008.5.1.4.1.1.66.4", "results/seg.dcm", 100, ("pacs",))
SR = NewResult("sr", "2.25.2", "1.2.840.10008.5.1.4.1.1.88.34", "results/sr.dcm", 100, ("pacs", "ris"))
TOLD = NewResult(NO_RESULT, "2.25.3", "1.2.840.10008.5.1.4.1.1.88.34", "results/no-result.dcm", 100, ("pacs",))
NOTE = NewResult(REJECTION, "2.25.4", "1.2.840.10008.5.1.4.1.1.88.59", "results/rejection.dcm", 100, ("pacs", "ris"))


@pytest.fixture
def study_id(archive: Archive) -> int:
    times = {"first_received_at": 0.0, "last_received_at": 0.0}
    with archive.database.write() as connection:
        study = insert(schema.studies).values(study_uid="1.2", state=StudyState.ROUTED, instances=1, **times)
        return connection.scalar(study.returning(schema.studies.c.id)) or 0


@pytest.fixture
def worker() -> WorkerId:
    return replace(WorkerId.mine(), started="0")  # since the machine's start, as who makes a last attempt must be old


def add(archive: Archive, study_id: int, job: NewJob = JOB) -> bool:
    with archive.database.write() as connection:
        return add_job(connection, study_id, "1.2", 1, job, time.time())


def claim(archive: Archive, worker: WorkerId) -> Job:
    with archive.database.write() as connection:
        connection.execute(update(schema.jobs).values(not_before=0.0))
    job = claim_job(archive.database, worker)
    assert job is not None
    return job


def latest(archive: Archive) -> Job:
    return list_jobs(archive.database)[0][0]


def story(archive: Archive) -> str:
    return "\n".join(event.what for event in archive.events("1.2"))


def test_each_result_goes_to_its_own_peers(archive: Archive, study_id: int, worker: WorkerId) -> None:
    add(archive, study_id)
    assert finish_job(archive.database, claim(archive, worker), worker, [SEG, SR], [], "made")
    sent = {(parcel.kind, parcel.delivery.peer) for parcel in list_parcels(archive.database)}
    assert sent == {("seg", "pacs"), ("sr", "pacs"), ("sr", "ris")}


@pytest.mark.parametrize("more", [replace(JOB, send_to=("ris",)), replace(JOB, results=("summary",))])
def test_a_finished_job_runs_again_when_another_route_wants_more(
    archive: Archive, study_id: int, worker: WorkerId, more: NewJob
) -> None:
    add(archive, study_id)
    finish_job(archive.database, claim(archive, worker), worker, [SEG], [], "made")
    assert not add(archive, study_id)
    assert latest(archive).state is JobState.DONE, "the same wish again is no work"
    assert not add(archive, study_id, more)
    job = latest(archive)
    assert job.state is JobState.QUEUED
    assert {*job.send_to, *job.results} == {"pacs", "seg", "sr", *more.send_to, *more.results}


def test_what_is_wanted_while_a_job_runs_is_made_afterwards(archive: Archive, study_id: int, worker: WorkerId) -> None:
    add(archive, study_id)
    job = claim(archive, worker)
    add(archive, study_id, replace(JOB, results=("summary",)))
    assert finish_job(archive.database, job, worker, [SEG], [], "made")
    assert len(list_parcels(archive.database)) == 1, "what was made is sent already"
    assert latest(archive).state is JobState.QUEUED
    finish_job(archive.database, claim(archive, worker), worker, [SEG, SR], [], "made")
    assert latest(archive).state is JobState.DONE


def refuse_at_routing(archive: Archive, study_id: int, worker: WorkerId) -> None:
    add(archive, study_id, replace(JOB, refusal="no axial series"))


def refuse_at_work(archive: Archive, study_id: int, worker: WorkerId) -> None:
    add(archive, study_id)
    assert end_job(archive.database, claim(archive, worker), worker, JobState.REFUSED, "no axial series")


def fail_for_good(archive: Archive, study_id: int, worker: WorkerId) -> None:
    add(archive, study_id)
    for _ in range(MAXIMUM_ATTEMPTS):
        assert claim_untold(archive.database, worker) is None, "a job that will be tried again has not failed"
        fail_attempt(archive.database, claim(archive, worker), worker, "out of memory")


ENDS = [refuse_at_routing, refuse_at_work, fail_for_good]


@pytest.mark.parametrize("end", ENDS)
def test_every_end_without_a_result_is_told_once(archive: Archive, study_id: int, worker: WorkerId, end) -> None:
    end(archive, study_id, worker)
    before = latest(archive)
    job = claim_untold(archive.database, worker)
    assert job is not None
    assert (job.state, job.reason) == (before.state, before.reason)
    assert claim_untold(archive.database, WorkerId.mine()) is None, "one teller at a time"
    assert finish_untold(archive.database, job, worker, [TOLD])
    ((parcel,), now) = list_parcels(archive.database), latest(archive)
    assert (parcel.kind, parcel.delivery.peer, now.state, now.reason) == (NO_RESULT, "pacs", job.state, job.reason)
    assert claim_untold(archive.database, worker) is None


@pytest.mark.parametrize("end", ENDS)
def test_a_route_may_keep_silent(
    archive: Archive, study_id: int, worker: WorkerId, end, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "JOB", replace(JOB, tell_no_result=False))
    monkeypatch.setattr(add, "__defaults__", (JOB,))
    end(archive, study_id, worker)
    assert latest(archive).state in (JobState.REFUSED, JobState.QUARANTINED)
    assert claim_untold(archive.database, worker) is None


@pytest.mark.parametrize("end", ENDS)
def test_a_peer_of_a_further_route_hears_too(archive: Archive, study_id: int, worker: WorkerId, end) -> None:
    end(archive, study_id, worker)
    job = claim_untold(archive.database, worker)
    assert job is not None
    add(archive, study_id, replace(JOB, send_to=("ris",)))  # while it is told to the first
    assert finish_untold(archive.database, job, worker, [TOLD])
    again = claim_untold(archive.database, worker)
    assert again is not None
    assert again.send_to == ["pacs", "ris"]
    assert finish_untold(archive.database, again, worker, [replace(TOLD, peers=("pacs", "ris"))])
    add(archive, study_id, replace(JOB, results=("summary",)))  # after it was told
    assert (last := claim_untold(archive.database, worker)) is not None
    assert finish_untold(archive.database, last, worker, [TOLD])
    add(archive, study_id, replace(JOB, send_to=("ris",)))
    assert claim_untold(archive.database, worker) is None, "the same wish again is no news"


def test_one_route_that_tells_is_enough(archive: Archive, study_id: int, worker: WorkerId) -> None:
    add(archive, study_id, replace(JOB, tell_no_result=False))
    add(archive, study_id)
    end_job(archive.database, claim(archive, worker), worker, JobState.FAILED, "no label map")
    assert claim_untold(archive.database, worker) is not None


def test_a_teller_that_dies_leaves_it_to_another(archive: Archive, study_id: int, worker: WorkerId) -> None:
    refuse_at_routing(archive, study_id, worker)
    lost = claim_untold(archive.database, worker)
    assert lost is not None
    with archive.database.write() as connection:
        connection.execute(update(schema.jobs).values(lease_until=time.time() - 1))
    other = WorkerId.mine()
    taken = claim_untold(archive.database, other)
    assert taken is not None
    assert not finish_untold(archive.database, lost, worker, [TOLD])
    assert finish_untold(archive.database, taken, other, [TOLD])


def test_a_job_that_runs_again_has_nothing_to_tell(archive: Archive, study_id: int, worker: WorkerId) -> None:
    refuse_at_routing(archive, study_id, worker)
    requeue_job(archive.database, latest(archive).id, "test")
    assert claim_untold(archive.database, worker) is None


def test_what_cannot_be_told_is_in_the_story(archive: Archive, study_id: int, worker: WorkerId) -> None:
    refuse_at_routing(archive, study_id, worker)
    job = claim_untold(archive.database, worker)
    assert job is not None
    drop_untold(archive.database, job, worker, "its images are gone")
    assert claim_untold(archive.database, worker) is None
    assert "not told: its images are gone" in story(archive)


def test_a_newer_result_replaces_the_last_one(archive: Archive, study_id: int, worker: WorkerId) -> None:
    add(archive, study_id)
    first = claim(archive, worker)
    assert earlier_reports(archive.database, first) == []
    finish_job(archive.database, first, worker, [SEG, SR], [], "made")
    add(archive, study_id, replace(JOB, inputs={"image": ("1.1", "1.2")}))
    later = claim(archive, worker)
    assert [report.sop_instance_uid for report in earlier_reports(archive.database, later)] == ["2.25.2"]
    assert earlier_reports(archive.database, replace(later, model="spleen")) == []


def test_a_result_replaces_the_word_that_there_was_none(archive: Archive, study_id: int, worker: WorkerId) -> None:
    refuse_at_routing(archive, study_id, worker)
    job = claim_untold(archive.database, worker)
    assert job is not None
    finish_untold(archive.database, job, worker, [TOLD])
    requeue_job(archive.database, job.id, "test")
    assert [report.kind for report in earlier_reports(archive.database, claim(archive, worker))] == [NO_RESULT]


def test_what_is_replaced_is_found_behind_the_word_that_there_was_none(
    archive: Archive, study_id: int, worker: WorkerId
) -> None:
    add(archive, study_id)
    first = claim(archive, worker)
    assert replaced_job(archive.database, first) is None
    finish_job(archive.database, first, worker, [SEG, SR], [], "made")
    add(archive, study_id, replace(JOB, inputs={"image": ("1.1", "1.2")}))
    end_job(archive.database, claim(archive, worker), worker, JobState.FAILED, "no label map")
    second = claim_untold(archive.database, worker)
    assert second is not None
    finish_untold(archive.database, second, worker, [TOLD])
    requeue_job(archive.database, second.id, "test")
    second = claim(archive, worker)
    assert [report.kind for report in earlier_reports(archive.database, second)] == [NO_RESULT]
    assert replaced_job(archive.database, second) == first.id


def test_withdrawn_results_are_announced_to_those_who_have_them(
    archive: Archive, study_id: int, worker: WorkerId
) -> None:
    add(archive, study_id)
    with pytest.raises(NotAllowed, match="is queued"):
        results_to_withdraw(archive.database, latest(archive).id)
    finish_job(archive.database, claim(archive, worker), worker, [SEG, SR], [], "made")
    job, results, peers = results_to_withdraw(archive.database, latest(archive).id)
    assert ([result.kind for result in results], peers) == (["seg", "sr"], ["pacs", "ris"])
    withdraw(archive.database, job, NOTE, "test", "quality")
    assert latest(archive).state is JobState.WITHDRAWN
    assert {parcel.kind for peer in peers for parcel in due_parcels(archive.database, peer)} == {REJECTION}
    assert {parcel.delivery.state for parcel in list_parcels(archive.database) if parcel.kind != REJECTION} == {
        DeliveryState.WITHDRAWN
    }
    with pytest.raises(NotAllowed, match="withdrawn before"):
        results_to_withdraw(archive.database, job.id)
    with pytest.raises(NotAllowed, match="another version of the model"):
        requeue_job(archive.database, job.id, "test")
    later = replace(latest(archive), id=job.id + 1)
    assert earlier_reports(archive.database, later) == [], "nothing replaces what was withdrawn"


def test_a_job_with_nothing_out_has_nothing_to_withdraw(archive: Archive, study_id: int, worker: WorkerId) -> None:
    add(archive, study_id, replace(JOB, send_to=()))
    finish_job(archive.database, claim(archive, worker), worker, [replace(SEG, peers=())], [], "made")
    with pytest.raises(NotAllowed, match="nothing to withdraw"):
        results_to_withdraw(archive.database, latest(archive).id)
