"""Storage commitment of delivered results: Orthanc, which reports on an association of its own, and odd peers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, build_role
from pynetdicom.events import EVT_N_ACTION, Event
from pynetdicom.sop_class import StorageCommitmentPushModel  # pyright: ignore[reportAttributeAccessIssue]
from sqlalchemy import select, update

from node.archive import asked_commitments, schema
from node.archive.records import CommitmentState, Delivery, DeliveryState
from node.archive.store import Archive
from node.association import LITTLE_ENDIAN, Address, Connection
from node.deliver import outbox
from node.deliver.commitments import ask_due
from node.deliver.peers import Destination
from node.deliver.service import deliver_due
from node.demo.pacs import Orthanc, free_port
from node.dicom.commitment import WELL_KNOWN_INSTANCE, Reference, Verdict
from node.errors import NotFound
from tests.benchmark.receivers import radnode
from tests.deliver.test_outbox import make_due, owe
from tests.receive.conftest import Door
from tests.running_node import wait_until

NO_SUCH_INSTANCE, NOT_SUPPORTED = 0x0112, 0x0122


@pytest.fixture
def files(shared_data: Path) -> list[Path]:
    return sorted((shared_data / "chest_ct_philips").glob("*.dcm"))[:3]


@pytest.fixture
def owed(archive: Archive, files: list[Path]) -> Archive:
    """An archive with three results that were delivered to `pacs` and are to be asked for now."""
    owe(archive, files, "pacs")
    deliver(archive)
    return archive


def deliver(archive: Archive) -> None:
    for parcel in outbox.due_parcels(archive.database, "pacs"):
        outbox.mark_delivered(archive.database, parcel, commitment=True)
    ask_now(archive)


def ask_now(archive: Archive) -> None:
    """Whatever is waited for has taken its time."""
    columns = schema.deliveries.c
    with archive.database.write() as connection:
        connection.execute(
            update(schema.deliveries).where(columns.commitment_due_at.is_not(None)).values(commitment_due_at=0.0)
        )


def deliveries(archive: Archive) -> list[Delivery]:
    with archive.database.read() as connection:
        query = select(schema.deliveries).order_by(schema.deliveries.c.id)
        return [Delivery.from_row(row) for row in connection.execute(query)]


def states(archive: Archive) -> list[str]:
    return [one.commitment.value for one in deliveries(archive)]


def story(archive: Archive) -> list[str]:
    return [line.what for line in archive.events("1.2.3") if line.actor == asked_commitments.ACTOR]


def report_on(request: Dataset, failures: dict[str, int], *, leave_out: int = 0) -> Dataset:
    """The Event Information that answers `request`; the last `leave_out` instances are not in it."""
    report = Dataset()
    report.TransactionUID = request.TransactionUID
    items = list(request.ReferencedSOPSequence)[: len(request.ReferencedSOPSequence) - leave_out]
    for item in items:
        if item.ReferencedSOPInstanceUID in failures:
            item.FailureReason = failures[item.ReferencedSOPInstanceUID]
    report.FailedSOPSequence = [item for item in items if "FailureReason" in item]
    report.ReferencedSOPSequence = [item for item in items if "FailureReason" not in item]
    return report


@contextmanager
def committing(answer: Callable[[Event], int], *, then: Callable[[Event], None] | None = None) -> Iterator[Address]:
    """A peer that answers N-ACTION with a status; `then` runs on its association after that."""
    address = Address("PACS", "127.0.0.1", free_port(), "RADNODE")

    def take(event: Event) -> tuple[int, None]:
        status = answer(event)
        if then is not None:
            threading.Timer(0.2, then, [event]).start()
        return status, None

    ae = AE(ae_title=address.ae_title)
    ae.add_supported_context(StorageCommitmentPushModel)
    server = ae.start_server((address.host, address.port), block=False, evt_handlers=[(EVT_N_ACTION, take)])
    try:
        yield address
    finally:
        assert server is not None
        server.shutdown()


def tell(event: Event, report: Dataset) -> int:
    """N-EVENT-REPORT on the association of the request; the status of the answer."""
    status, _ = event.assoc.send_n_event_report(
        report, 2 if report.FailedSOPSequence else 1, StorageCommitmentPushModel, WELL_KNOWN_INSTANCE
    )
    return status.Status


def test_orthanc_commits_to_what_it_got_on_an_association_of_its_own(tmp_path: Path, files: list[Path]) -> None:
    """Our receiver, with nothing in `receive.from`, hears it; Orthanc is not let in to send images."""
    orthanc_port = free_port()
    peers = f", pacs: {{host: 127.0.0.1, ae_title: PACS, port: {orthanc_port}, commitment: true}}"
    with radnode(tmp_path / "node", peers=peers) as receiver, Orthanc(tmp_path / "orthanc", orthanc_port) as orthanc:
        assert "from: [sender]" in (tmp_path / "node" / "config.yaml").read_text()
        call(orthanc, "PUT", "/modalities/radnode", {"AET": "RADNODE", "Host": "127.0.0.1", "Port": receiver.port})
        door = Door(receiver, tmp_path / "node")
        address = Address("PACS", "127.0.0.1", orthanc.port, "RADNODE")
        with door.archive() as archive:
            owe(archive, files, "pacs")
            peer = Destination(address, commitment=True)
            assert deliver_due(archive.database, archive.storage, "pacs", peer, threading.Event()) == 3
            assert states(archive) == ["due", "due", "due"]
            lost = str(dcmread(files[1]).SOPInstanceUID)
            orthanc_deletes(orthanc, lost)
            ask_now(archive)
            assert ask_due(archive.database, "pacs", address, patience_s=0.1)
            wait_until(lambda: "asked" not in states(archive), 20, "Orthanc has reported")
            assert states(archive) == ["committed", "none", "committed"]
            again = deliveries(archive)[1]
            assert again.state is DeliveryState.PENDING
            assert again.reason == "pacs does not answer for it: no such object instance (0112)"
            make_due(archive)
            assert deliver_due(archive.database, archive.storage, "pacs", peer, threading.Event()) == 1
            ask_now(archive)
            assert ask_due(archive.database, "pacs", address, patience_s=0.1)
            wait_until(lambda: states(archive) == ["committed"] * 3, 20, "Orthanc has the third too")
            assert story(archive) == [
                "pacs is asked to answer for seg, seg, seg",
                "pacs answers for seg, seg",
                "seg: pacs does not answer for it: no such object instance (0112); sent again",
                "pacs is asked to answer for seg",
                "pacs answers for seg",
            ]
        orthanc.rest("/modalities/radnode/store", {"Resources": orthanc.rest("/studies"), "Permissive": True})
        with door.archive() as archive:
            assert [study.study_uid for study in archive.studies()] == ["1.2.3"]


def call(orthanc: Orthanc, method: str, path: str, body: object = None) -> None:
    request = Request(f"http://127.0.0.1:{orthanc.http_port}{path}", json.dumps(body).encode(), method=method)
    urlopen(request, timeout=10).close()


def orthanc_deletes(orthanc: Orthanc, sop_instance_uid: str) -> None:
    (found,) = orthanc.rest("/tools/find", {"Level": "Instance", "Query": {"SOPInstanceUID": sop_instance_uid}})
    call(orthanc, "DELETE", f"/instances/{found}")


def test_a_report_on_the_same_association_that_comes_twice_and_names_some(owed: Archive) -> None:
    """Partial failure, an instance without a word, and the same report a second time."""
    first, second, _ = (parcel.sop_instance_uid for parcel in reversed(outbox.list_parcels(owed.database)))
    statuses: list[int] = []
    told = threading.Event()

    def answer_twice(event: Event) -> None:
        report = report_on(event.action_information, {second: NO_SUCH_INSTANCE}, leave_out=1)
        statuses.append(tell(event, report))
        told.set()

    with committing(lambda _: 0x0000, then=answer_twice) as address:
        assert ask_due(owed.database, "pacs", address, patience_s=30)
        assert told.wait(10)
    assert statuses == [0x0000]
    assert states(owed) == ["committed", "none", "asked"]
    (transaction,) = {one.transaction_uid for one in deliveries(owed)} - {None}
    before = deliveries(owed)
    reference = {parcel.sop_instance_uid: parcel.sop_class_uid for parcel in outbox.list_parcels(owed.database)}
    verdict = Verdict(
        (Reference(reference[first], first),), ((Reference(reference[second], second), NO_SUCH_INSTANCE),)
    )
    assert asked_commitments.take_report(owed.database, "pacs", transaction, verdict) == 0
    assert deliveries(owed) == before


@pytest.mark.parametrize(
    "spoil", [{"TransactionUID": "1.2.3.99"}, {"TransactionUID": ""}, {"ReferencedSOPSequence": []}]
)
def test_a_report_that_nobody_asked_for_is_refused(owed: Archive, spoil: dict[str, Any]) -> None:
    statuses: list[int] = []
    told = threading.Event()

    def answer(event: Event) -> None:
        wrong = report_on(event.action_information, {})
        for keyword, value in spoil.items():
            setattr(wrong, keyword, value)
        statuses.append(tell(event, wrong))
        told.set()

    with committing(lambda _: 0x0000, then=answer) as address:
        assert ask_due(owed.database, "pacs", address, patience_s=30)
        assert told.wait(10)
    assert statuses == [0x0115]
    assert states(owed) == ["asked"] * 3
    transaction = str(deliveries(owed)[0].transaction_uid)
    with pytest.raises(NotFound, match="other was never asked"):
        asked_commitments.take_report(owed.database, "other", transaction, Verdict((), ()))


def test_a_peer_that_never_reports_is_asked_again_and_then_no_more(owed: Archive) -> None:
    asked: list[str] = []

    def take(event: Event) -> int:
        asked.append(str(event.action_information.TransactionUID))
        return 0x0000

    with committing(take) as address:
        assert ask_due(owed.database, "pacs", address, patience_s=0)
        assert states(owed) == ["asked"] * 3
        assert not ask_due(owed.database, "pacs", address, patience_s=0)  # it has its time
        for _ in range(asked_commitments.MAXIMUM_ASKS - 1):
            ask_now(owed)
            assert ask_due(owed.database, "pacs", address, patience_s=0)
            assert states(owed) == ["overdue"] * 3
        ask_now(owed)
        assert not ask_due(owed.database, "pacs", address, patience_s=0)
    assert len(set(asked)) == asked_commitments.MAXIMUM_ASKS
    assert {one.commitment_due_at for one in deliveries(owed)} == {None}
    assert story(owed)[-1] == "pacs did not report on seg, seg, seg and was asked 8 times: given up"
    # An answer to the first request counts even now.
    references = [Reference(one.sop_class_uid, one.sop_instance_uid) for one in outbox.list_parcels(owed.database)]
    assert asked_commitments.take_report(owed.database, "pacs", asked[0], Verdict(tuple(references), ())) == 3
    assert states(owed) == ["committed"] * 3


def test_an_answer_to_a_request_of_before_an_object_was_sent_anew_does_not_count(owed: Archive) -> None:
    request = asked_commitments.next_request(owed.database, "pacs")
    assert request is not None
    for one in deliveries(owed):
        outbox.retry_delivery(owed.database, one.id, "test")
    deliver(owed)
    safe = Verdict(request.references, ())
    assert asked_commitments.take_report(owed.database, "pacs", request.transaction_uid, safe) == 0
    assert states(owed) == ["due"] * 3


@pytest.mark.parametrize(("failure", "sent"), [(NO_SUCH_INSTANCE, 3), (NOT_SUPPORTED, 1)])
def test_what_a_peer_refuses_is_sent_again_and_then_given_up(owed: Archive, failure: int, sent: int) -> None:
    for round_ in range(sent):
        request = asked_commitments.next_request(owed.database, "pacs")
        assert request is not None
        failed = Verdict((), tuple((reference, failure) for reference in request.references))
        assert asked_commitments.take_report(owed.database, "pacs", request.transaction_uid, failed) == 3
        if round_ < sent - 1:
            assert {one.state for one in deliveries(owed)} == {DeliveryState.PENDING}
            make_due(owed)
            deliver(owed)
    assert states(owed) == ["refused"] * 3
    assert {one.state for one in deliveries(owed)} == {DeliveryState.DELIVERED}
    ask_now(owed)
    assert asked_commitments.next_request(owed.database, "pacs") is None
    assert owed.forget_finished(before=1e12) == []  # the PACS lacks them: the only copies are here
    outbox.retry_delivery(owed.database, 1, "test")
    assert (deliveries(owed)[0].commitment, deliveries(owed)[0].commitment_refusals) == (CommitmentState.NONE, 0)


def test_a_peer_that_is_down_or_does_not_know_the_service_is_asked_later(owed: Archive, orthanc: Orthanc) -> None:
    dead = Address("PACS", "127.0.0.1", free_port(), "RADNODE")
    assert not ask_due(owed.database, "pacs", dead)
    assert states(owed) == ["due"] * 3
    assert all("no DICOM answer" in one.commitment_reason for one in deliveries(owed))
    assert {one.commitment_asks for one in deliveries(owed)} == {0}
    ask_now(owed)
    with committing(lambda _: 0x0110) as address:
        assert not ask_due(owed.database, "pacs", address)
    assert all("status 0x0110" in one.commitment_reason for one in deliveries(owed))
    assert owed.forget_finished(before=1e12) == []


def test_only_what_was_committed_to_may_be_forgotten(owed: Archive) -> None:
    request = asked_commitments.next_request(owed.database, "pacs")
    assert request is not None
    assert owed.forget_finished(before=1e12) == []
    asked_commitments.take_report(owed.database, "pacs", request.transaction_uid, Verdict(request.references, ()))
    assert owed.forget_finished(before=1e12) == ["1.2.3"]


def test_our_receiver_answers_a_report_with_what_is_wrong_with_it(tmp_path: Path) -> None:
    port = free_port()
    peers = f", pacs: {{ae_title: PACS, host: 127.0.0.1, port: {port}, commitment: true}}"
    with radnode(tmp_path / "node", peers=peers) as receiver:
        address = Address("RADNODE", "127.0.0.1", receiver.port, "PACS")
        role = build_role(StorageCommitmentPushModel, scu_role=False, scp_role=True)
        with Connection(address, [(StorageCommitmentPushModel, LITTLE_ENDIAN)], [role]) as association:
            (context,) = association.accepted_contexts
            assert context.as_scp
            report: Any = Dataset()
            report.TransactionUID = generate_uid()
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = "1.2.3", "1.2.3.4"
            report.ReferencedSOPSequence = [item]
            for event_type in (1, 3):
                status, _ = association.send_n_event_report(
                    report, event_type, StorageCommitmentPushModel, WELL_KNOWN_INSTANCE
                )
                assert status.Status == 0x0115
            assert "there is no event type 3" in status.ErrorComment
            assert association.is_established
