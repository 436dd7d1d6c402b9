"""Who may open an association, and how much one peer may use."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from pydicom.uid import CTImageStorage, MRImageStorage

from node.receive.admission import Admission, Pace, Places, Refusal, Reject, Sender
from tests.benchmark.receivers import radnode
from tests.receive.conftest import Door
from tests.receive.peers import associate, association_request, connect, read_pdu
from tests.receive.sending import ct, encode, release, store_dataset, store_message

SENDERS = (
    Sender("scanner", "CT1", "10.1.2.0/24"),
    Sender("gateway", "GATE", "192.0.2.7"),
    Sender("gateway6", "GATE", "2001:db8::/32"),
    Sender("named", "LOCAL", "localhost"),
)
ADMISSION = Admission("RADNODE", SENDERS)


@pytest.mark.parametrize(
    ("called", "calling", "address", "expected"),
    [
        ("RADNODE", "CT1", "10.1.2.3", "scanner"),
        ("RADNODE", "CT1", "::ffff:10.1.2.3", "scanner"),
        ("RADNODE", "GATE", "192.0.2.7", "gateway"),
        ("RADNODE", "GATE", "2001:db8::1", "gateway6"),
        ("RADNODE", "LOCAL", "127.0.0.1", "named"),
        ("RADNODE", "CT1", "10.1.3.3", Reject.CALLING_AE_TITLE),
        ("RADNODE", "CT1", "no address", Reject.CALLING_AE_TITLE),
        ("RADNODE", "ct1", "10.1.2.3", Reject.CALLING_AE_TITLE),
        ("RADNODE", "", "10.1.2.3", Reject.CALLING_AE_TITLE),
        ("OTHER", "CT1", "10.1.2.3", Reject.CALLED_AE_TITLE),
    ],
)
def test_who_gets_in(called: str, calling: str, address: str, expected: str | Reject) -> None:
    decision = ADMISSION.decide(called, calling, address)
    assert (decision.reject if isinstance(decision, Refusal) else decision.name) == expected


def test_the_called_title_need_not_be_checked() -> None:
    assert Admission("RADNODE", SENDERS, check_called=False).decide("ANY", "CT1", "10.1.2.3") == SENDERS[0]


def test_places_are_limited_in_all_per_address_and_per_sender() -> None:
    places = Places(4, 3)
    two = Sender("two", "TWO", "h", maximum_associations=2)
    with places.take(two, "a") as first, places.take(two, "b") as second, places.take(two, "c") as third:
        assert (first, second) == (None, None)
        assert third is not None
        assert "2 places" in third.why
        assert third.reject is Reject.LOCAL_LIMIT
        with places.take(SENDERS[0], "a") as more, places.take(SENDERS[0], "a") as last:
            assert (more, last) == (None, None)
            with places.take(SENDERS[1], "x") as full:
                assert full is not None
    assert places.taken() == 0
    with ExitStack() as held:
        assert [held.enter_context(places.take(SENDERS[0], "a")) for _ in range(3)] == [None] * 3
        refused = held.enter_context(places.take(SENDERS[1], "a"))
        assert refused is not None
        assert "address a" in refused.why


def test_a_rate_is_kept_in_the_mean() -> None:
    pace, sender = Pace(), Sender("s", "S", "h", maximum_instances_s=10)
    delays = [pace.delay_s(sender) for _ in range(5)]
    assert delays[0] == 0
    assert delays[4] == pytest.approx(0.4, abs=0.05)
    assert pace.delay_s(SENDERS[0]) == 0


@pytest.mark.parametrize(
    ("request_options", "reason"),
    [({"called": "OTHER"}, (1, 1, 7)), ({"calling": "STRANGER"}, (1, 1, 3))],
)
def test_a_refusal_has_its_reason_and_an_audit_line(
    shared_door: Door, request_options: dict[str, str], reason: tuple[int, int, int]
) -> None:
    connection = connect(shared_door.port)
    connection.sendall(association_request(**request_options))
    answer = read_pdu(connection)
    assert (answer[0], tuple(answer[7:10])) == (3, reason)
    assert read_pdu(connection) == b""
    assert "audit: association refused for 127.0.0.1" in shared_door.log


def test_a_foreign_application_or_version_is_refused(shared_door: Door) -> None:
    request = bytearray(association_request())
    foreign = request.replace(b"1.2.840.10008.3.1.1.1", b"1.2.840.10008.3.1.1.9")
    request[6:8] = b"\x00\x02"
    for sent, reason in ((foreign, (1, 1, 2)), (request, (1, 2, 2))):
        connection = connect(shared_door.port)
        connection.sendall(sent)
        answer = read_pdu(connection)
        assert (answer[0], tuple(answer[7:10])) == (3, reason)


def test_a_senders_own_limits(tmp_path: Path) -> None:
    peers = (
        ", slow: {ae_title: SLOW, host: 127.0.0.1, maximum_rate: 5.0}"
        ", ct_only: {ae_title: CTONLY, host: 127.0.0.0/8, maximum_associations: 1, "
        f"sop_classes: [{CTImageStorage}]}}"
    )
    with radnode(tmp_path / "node", peers=peers) as receiver:
        connection = associate(receiver.port, calling="SLOW")
        began = time.monotonic()
        assert [store_dataset(connection, ct())[0] for _ in range(6)] == [0] * 6
        assert 0.9 < time.monotonic() - began < 2
        release(connection)
        connection = associate(receiver.port, calling="CTONLY", syntaxes=(CTImageStorage, MRImageStorage))
        assert store_dataset(connection, ct())[0] == 0
        other = connect(receiver.port)
        other.sendall(association_request(calling="CTONLY"))
        assert tuple(read_pdu(other)[7:10]) == (2, 3, 2)
        image = ct(SOPClassUID=MRImageStorage)
        connection.sendall(store_message(encode(image), MRImageStorage, image.SOPInstanceUID, context_id=5))
        assert read_pdu(connection)[:1] == b"\x07", "that context was not accepted"


PRIVATE = "1.3.12.2.1107.5.9.1"


@pytest.mark.parametrize("allowed", [True, False])
def test_private_classes_when_the_configuration_allows_them(tmp_path: Path, allowed: bool) -> None:
    with radnode(tmp_path / "node", receive=f", unknown_sop_classes: {str(allowed).lower()}") as receiver:
        connection = associate(receiver.port, syntaxes=(PRIVATE, CTImageStorage))
        image = ct(SOPClassUID=PRIVATE)
        if allowed:
            assert store_dataset(connection, image)[0] == 0
            assert len(list((tmp_path / "node" / "var" / "instances").rglob("*.dcm"))) == 1
        else:
            with pytest.raises(AssertionError, match="found 07"):
                store_dataset(connection, image)
        connection.close()
