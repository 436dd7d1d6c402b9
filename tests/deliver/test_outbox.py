"""The outbox: what is owed is tried until it arrives, and one dead peer or object holds up nothing else."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
from pydicom import dcmread
from sqlalchemy import Table, insert, update

from node.archive import schema
from node.archive.records import CommitmentState, DeliveryState, JobState, StudyState
from node.archive.retention import count_kept
from node.archive.store import Archive
from node.deliver import outbox
from node.deliver.dimse import Address, StoreSession
from node.deliver.peers import Destination
from node.deliver.service import deliver_due, deliver_until
from node.demo.pacs import Orthanc, free_port
from node.errors import NotAllowed, NotFound
from node.queue.rows import NewResult
from node.queue.withdrawal import REJECTION, results_to_withdraw, withdraw
from tests.running_node import wait_until


def owe(archive: Archive, files: list[Path], *peers: str) -> None:
    """Make `files` results of a job that are owed to `peers`."""
    with archive.database.write() as connection:
        study = connection.execute(
            insert(schema.studies).values(
                study_uid="1.2.3", state=StudyState.ROUTED, first_received_at=0.0, last_received_at=0.0
            )
        ).inserted_primary_key
        job = connection.execute(
            insert(schema.jobs).values(
                key="k", study_id=study[0], study_revision=1, route="r", model="m", model_version="1", model_digest="d",
                inputs={}, send_to=list(peers), state=JobState.DONE, created_at=0.0,
            )
        ).inserted_primary_key  # fmt: skip
        for number, file in enumerate(files):
            path = f"results/{number}.dcm"
            shutil.copy(file, archive.storage / path)
            meta = dcmread(file, stop_before_pixels=True).file_meta
            result = connection.execute(
                insert(schema.results).values(
                    job_id=job[0], kind="seg", path=path, size=1, created_at=0.0,
                    sop_instance_uid=meta.MediaStorageSOPInstanceUID, sop_class_uid=meta.MediaStorageSOPClassUID,
                )
            ).inserted_primary_key  # fmt: skip
            for peer in peers:
                connection.execute(
                    insert(schema.deliveries).values(
                        result_id=result[0], peer=peer, state=DeliveryState.PENDING, created_at=float(number)
                    )
                )


def make_due(archive: Archive) -> None:
    with archive.database.write() as connection:
        connection.execute(update(schema.deliveries).values(not_before=0.0))


@pytest.fixture
def files(shared_data: Path) -> list[Path]:
    return sorted((shared_data / "chest_ct_philips").glob("*.dcm"))[:3]


def test_what_is_owed_arrives_when_the_peer_comes_back(archive: Archive, files: list[Path], tmp_path: Path) -> None:
    owe(archive, files, "pacs")
    pacs = Orthanc(tmp_path / "pacs")
    peer = Destination(Address(pacs.ae_title, "127.0.0.1", pacs.port, "RADNODE"))
    assert deliver_due(archive.database, archive.storage, "pacs", peer, threading.Event()) == 0
    parcels = outbox.list_parcels(archive.database)
    assert {parcel.delivery.state for parcel in parcels} == {DeliveryState.PENDING}
    assert all("no DICOM answer" in parcel.delivery.reason for parcel in parcels)
    assert all(parcel.delivery.not_before > time.time() for parcel in parcels)
    make_due(archive)
    with pacs:
        assert deliver_due(archive.database, archive.storage, "pacs", peer, threading.Event()) == 3
        assert len(pacs.instances(str(dcmread(files[0]).StudyInstanceUID))) == 3
    assert {parcel.delivery.state for parcel in outbox.list_parcels(archive.database)} == {DeliveryState.DELIVERED}
    assert [line.what for line in archive.events("1.2.3") if "delivered" in line.what] == ["seg delivered to pacs"] * 3


def test_a_dead_peer_delays_nobody_else(archive: Archive, files: list[Path], orthanc: Orthanc) -> None:
    owe(archive, files, "dead", "pacs")
    stop = threading.Event()
    peers = {
        "dead": Destination(Address("DEAD", "127.0.0.1", free_port(), "RADNODE")),
        "pacs": Destination(Address(orthanc.ae_title, "127.0.0.1", orthanc.port, "RADNODE")),
    }
    thread = threading.Thread(target=deliver_until, args=(stop, archive, peers))
    thread.start()
    try:
        wait_until(lambda: outbox.count_deliveries(archive.database).get("delivered") == 3, 20, "the live peer has all")
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive()
    assert outbox.count_deliveries(archive.database) == {"delivered": 3, "pending": 3}


def test_a_damaged_object_is_given_up_and_the_others_go(archive: Archive, files: list[Path], orthanc: Orthanc) -> None:
    owe(archive, files, "pacs")
    (archive.storage / "results" / "0.dcm").write_bytes(b"no DICOM")
    (archive.storage / "results" / "1.dcm").unlink()
    peer = Destination(Address(orthanc.ae_title, "127.0.0.1", orthanc.port, "RADNODE"))
    assert deliver_due(archive.database, archive.storage, "pacs", peer, threading.Event()) == 1
    failed = outbox.list_parcels(archive.database, states=[DeliveryState.FAILED])
    assert {parcel.path for parcel in failed} == {"results/0.dcm", "results/1.dcm"}
    assert all("reprocess" in parcel.delivery.reason for parcel in failed)


def test_an_object_without_its_syntax_is_given_up_and_the_others_go(
    archive: Archive, files: list[Path], orthanc: Orthanc
) -> None:
    owe(archive, files, "pacs")
    (archive.storage / "results" / "0.dcm").write_bytes(bytes(128) + b"DICM\2\0\0\0UL\4\0" + bytes(4))
    peer = Destination(Address(orthanc.ae_title, "127.0.0.1", orthanc.port, "RADNODE"), compress=True)
    assert deliver_due(archive.database, archive.storage, "pacs", peer, threading.Event()) == 2
    (failed,) = outbox.list_parcels(archive.database, states=[DeliveryState.FAILED])
    assert failed.delivery.reason == "its file in results/ cannot be read (AttributeError): reprocess the study"


def test_whatever_comes_of_one_object_the_others_go(
    archive: Archive, files: list[Path], orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reason says no more than the kind of the error: what pydicom says quotes values of elements."""
    owe(archive, files, "pacs")
    peer = Destination(Address(orthanc.ae_title, "127.0.0.1", orthanc.port, "RADNODE"))
    send = StoreSession.send

    def stumble(session: StoreSession, file: Path) -> str:
        if file.name == "0.dcm":
            raise KeyError("DOE^JANE")
        return send(session, file)

    monkeypatch.setattr(StoreSession, "send", stumble)
    assert deliver_due(archive.database, archive.storage, "pacs", peer, threading.Event()) == 2
    (waiting,) = outbox.list_parcels(archive.database, states=[DeliveryState.PENDING])
    assert waiting.delivery.reason == "KeyError in radnode: see the log of the node"


def test_a_person_sends_again(archive: Archive, files: list[Path]) -> None:
    owe(archive, files[:1], "pacs")
    (parcel,) = outbox.list_parcels(archive.database)
    outbox.mark_delivered(archive.database, parcel)
    assert outbox.due_parcels(archive.database, "pacs") == []
    outbox.retry_delivery(archive.database, parcel.delivery.id, "test")
    assert len(outbox.due_parcels(archive.database, "pacs")) == 1
    with pytest.raises(NotFound, match="no delivery 99"):
        outbox.retry_delivery(archive.database, 99, "test")


def take_back(archive: Archive, *peers: str) -> None:
    """Withdraw the job's results."""
    job, _, _ = results_to_withdraw(archive.database, 1)
    note = NewResult(REJECTION, "2.25.9", "1.2.840.10008.5.1.4.1.1.88.59", "results/note.dcm", 1, peers)
    withdraw(archive.database, job, note, "test", "quality")


def test_what_is_withdrawn_while_it_is_on_its_way_is_not_owed_again(archive: Archive, files: list[Path]) -> None:
    """A retry would bring it back to the PACS after the note that took it away."""
    owe(archive, files[:1], "pacs")
    (parcel,) = outbox.due_parcels(archive.database, "pacs")
    assert outbox.is_owed(archive.database, parcel)
    take_back(archive, "pacs")
    assert not outbox.is_owed(archive.database, parcel)
    outbox.mark_undelivered(archive.database, parcel, "broke off", permanent=False)
    make_due(archive)
    assert [each.kind for each in outbox.due_parcels(archive.database, "pacs")] == [REJECTION]
    outbox.mark_delivered(archive.database, parcel)  # it had arrived all the same
    states = {each.kind: each.delivery.state for each in outbox.list_parcels(archive.database)}
    assert states == {"seg": DeliveryState.DELIVERED, REJECTION: DeliveryState.PENDING}


def test_a_round_leaves_out_what_is_withdrawn_meanwhile(
    archive: Archive, files: list[Path], orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch
) -> None:
    owe(archive, files, "pacs")
    peer = Destination(Address(orthanc.ae_title, "127.0.0.1", orthanc.port, "RADNODE"))
    mark_delivered = outbox.mark_delivered

    def mark_and_withdraw(*arguments, **named) -> None:
        mark_delivered(*arguments, **named)
        take_back(archive, "pacs")

    monkeypatch.setattr("node.deliver.service.mark_delivered", mark_and_withdraw)
    assert deliver_due(archive.database, archive.storage, "pacs", peer, threading.Event()) == 1
    states = [each.delivery.state for each in outbox.list_parcels(archive.database) if each.kind != REJECTION]
    assert sorted(states) == [DeliveryState.DELIVERED, DeliveryState.WITHDRAWN, DeliveryState.WITHDRAWN]


def test_nobody_sends_withdrawn_results_again(archive: Archive, files: list[Path]) -> None:
    owe(archive, files[:1], "pacs")
    take_back(archive, "pacs")
    note, seg = outbox.list_parcels(archive.database)
    with pytest.raises(NotAllowed, match="withdrawn"):
        outbox.retry_delivery(archive.database, seg.delivery.id, "test")
    assert outbox.retry_delivery(archive.database, note.delivery.id, "test").kind == REJECTION


def test_what_is_given_up_is_owed_no_longer_and_forgotten_in_time(archive: Archive, files: list[Path]) -> None:
    """A delivery that its peer refuses holds its study however old it is, and says so."""
    owe(archive, files[:2], "pacs")
    first, second = outbox.list_parcels(archive.database)
    outbox.mark_delivered(archive.database, first)
    assert str(count_kept(archive.database, 1.0)) == "1 with a delivery that is still tried"
    outbox.mark_undelivered(archive.database, second, "status 0xA900", permanent=True)
    assert archive.forget_finished(before=1e12) == []
    kept = count_kept(archive.database, 1.0)
    assert (kept.studies, kept.why) == (1, {"a delivery that its peer refuses": 1})
    assert count_kept(archive.database, 0.0).studies == 0
    with pytest.raises(NotAllowed, match=f"delivery {first.delivery.id} is delivered: nothing of it is owed"):
        outbox.give_up(archive.database, first.delivery.id, "test")
    outbox.give_up(archive.database, second.delivery.id, "test")
    assert archive.events("1.2.3")[-1].what == "seg to pacs: given up by hand after 1 attempts"
    assert count_kept(archive.database, 1.0).studies == 0
    assert archive.forget_finished(before=1e12) == ["1.2.3"]
    with pytest.raises(NotFound, match=f"no delivery {second.delivery.id}"):
        outbox.give_up(archive.database, second.delivery.id, "test")


def test_a_result_that_a_peer_does_not_answer_for_is_given_up(archive: Archive, files: list[Path]) -> None:
    owe(archive, files[:1], "pacs")
    (parcel,) = outbox.list_parcels(archive.database)
    outbox.mark_delivered(archive.database, parcel, commitment=True)
    assert count_kept(archive.database, 1.0).why == {"a result that its peer has yet to answer for": 1}
    refused = {"commitment": CommitmentState.REFUSED, "commitment_due_at": None}
    with archive.database.write() as connection:
        connection.execute(update(schema.deliveries).values(refused))
    assert count_kept(archive.database, 1.0).why == {"a result that its peer does not answer for": 1}
    outbox.give_up(archive.database, parcel.delivery.id, "test")
    assert archive.forget_finished(before=1e12) == ["1.2.3"]


@pytest.mark.parametrize(
    ("table", "values", "why"),
    [
        (schema.jobs, {"state": JobState.QUEUED}, "a job that is not finished"),
        (schema.jobs, {"untold": True}, "a job that is not finished"),
        (schema.studies, {"state": StudyState.QUARANTINED}, "content that is in quarantine"),
    ],
)
def test_what_else_holds_an_old_study(archive: Archive, table: Table, values: dict[str, object], why: str) -> None:
    owe(archive, [])
    assert count_kept(archive.database, 1.0).studies == 0
    with archive.database.write() as connection:
        connection.execute(update(table).values(values))
    assert count_kept(archive.database, 1.0).why == {why: 1}
    assert archive.forget_finished(before=1e12) == []


def test_delays_grow_to_ten_minutes() -> None:
    delays = [outbox.retry_delay_s(attempts) for attempts in (1, 2, 3, 8, 9, 1000)]
    assert delays == [5, 10, 20, 600, 600, 600]
