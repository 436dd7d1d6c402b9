"""Storage commitment: with Orthanc, which hears on an association of ours, and with a client that has no port."""

from __future__ import annotations

import subprocess
from io import BytesIO
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import CTImageStorage, MRImageStorage, generate_uid

from node.archive.commitments import Commitments
from node.archive.store import Archive
from node.demo.pacs import Orthanc, free_port
from node.dicom.commitment import Reference, Request, Verdict
from node.dicom.commitment_messages import report_of
from tests.receive.conftest import Door
from tests.receive.peers import associate
from tests.receive.sending import command, ct, encode, pdus, read_message, read_status, release, store_dataset
from tests.running_node import RunningNode, wait_until

PUSH_MODEL, WELL_KNOWN = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"


def ask(door: Door, references: list[tuple[str, str]], transaction: str | None = None) -> tuple[int, Dataset | None]:
    """N-ACTION; its status, and the report that came on the same association, with its event type as `event_type`."""
    request = Dataset()
    request.TransactionUID = generate_uid() if transaction is None else transaction
    request.ReferencedSOPSequence = [Dataset() for _ in references]
    for item, (sop_class, uid) in zip(request.ReferencedSOPSequence, references, strict=True):
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
    action = command(
        {
            0x0003: PUSH_MODEL.encode(),
            0x0100: b"\x30\x01",
            0x0110: b"\x01\x00",
            0x0800: b"\x00\x00",
            0x1001: WELL_KNOWN.encode(),
            0x1008: b"\x01\x00",
        }
    )
    connection = associate(door.port, syntaxes=(PUSH_MODEL,))
    connection.sendall(pdus(3, action, is_command=True) + pdus(3, encode(request), is_command=False))
    status, _ = read_status(connection)
    report = None
    if status == 0:
        elements, data = read_message(connection)
        assert (elements[0x0100], elements[0x1000]) == (b"\x00\x01", WELL_KNOWN.encode())
        report = read_dataset(BytesIO(data), is_implicit_VR=False, is_little_endian=True)
        report.event_type = int.from_bytes(elements[0x1002], "little")
        heard = {0x0100: b"\x00\x81", 0x0120: elements[0x0110], 0x0800: b"\x01\x01", 0x0900: b"\x00\x00"}
        connection.sendall(pdus(3, command(heard), is_command=True))
    release(connection)
    return status, report


def test_what_is_safe_and_what_is_not(door: Door) -> None:
    images = [ct() for _ in range(3)]
    connection = associate(door.port)
    assert [store_dataset(connection, image)[0] for image in images] == [0, 0, 0]
    release(connection)
    with door.archive() as archive:
        damaged = archive.instance_paths([images[1].SOPInstanceUID])[images[1].SOPInstanceUID]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    absent = generate_uid()
    status, report = ask(
        door,
        [
            (CTImageStorage, images[0].SOPInstanceUID),
            (CTImageStorage, images[1].SOPInstanceUID),
            (MRImageStorage, images[2].SOPInstanceUID),
            (CTImageStorage, absent),
        ],
    )
    assert status == 0
    assert report is not None
    assert report.event_type == 2
    assert [item.ReferencedSOPInstanceUID for item in report.ReferencedSOPSequence] == [images[0].SOPInstanceUID]
    failures = {item.ReferencedSOPInstanceUID: item.FailureReason for item in report.FailedSOPSequence}
    assert failures == {images[1].SOPInstanceUID: 0x0110, images[2].SOPInstanceUID: 0x0119, absent: 0x0112}


def test_all_safe(door: Door) -> None:
    image = ct()
    connection = associate(door.port)
    store_dataset(connection, image)
    release(connection)
    status, report = ask(door, [(CTImageStorage, image.SOPInstanceUID)], "1.2.3.4.5")
    assert report is not None
    assert (status, report.event_type, report.TransactionUID) == (0, 1, "1.2.3.4.5")
    assert "FailedSOPSequence" not in report


@pytest.mark.parametrize(
    ("references", "transaction"),
    [([], None), ([(CTImageStorage, "no UID")], None), ([(CTImageStorage, "1.2")], "x/y")],
)
def test_a_wrong_request_is_refused(
    shared_door: Door, references: list[tuple[str, str]], transaction: str | None
) -> None:
    assert ask(shared_door, references, transaction)[0] == 0x0115


def test_orthanc_asks_and_hears(tmp_path: Path, shared_data: Path) -> None:
    """The node's own processes: received by one, reported by another, on an association to Orthanc."""
    node_port = free_port()
    options = {"DicomModalities": {"radnode": ["RADNODE", "127.0.0.1", node_port]}, "DicomCheckCalledAet": False}
    with Orthanc(tmp_path / "orthanc", options=options) as orthanc:
        images = shared_data / "abdomen_ct_ge"
        subprocess.run(["storescu", "+sd", "+r", "127.0.0.1", str(orthanc.port), images], check=True)
        node = RunningNode(tmp_path, orthanc.port, port=node_port, routes="[]")
        node.start()
        try:
            studies = orthanc.rest("/studies")
            body = {"Resources": studies, "StorageCommitment": True, "Synchronous": True}
            transaction = orthanc.rest("/modalities/radnode/store", body)["StorageCommitmentTransactionUID"]
            path = f"/storage-commitment/{transaction}"
            wait_until(lambda: orthanc.rest(path)["Status"] != "Pending", 20, "Orthanc has heard")
            report = orthanc.rest(path)
            assert report["Status"] == "Success"
            assert len(report["Success"]) == 41
        finally:
            node.kill_all()


def test_a_peer_that_is_down_hears_later(archive: Archive) -> None:
    commitments = Commitments(archive)
    request = Request("pacs", "1.2.3", (Reference(CTImageStorage, "1.2.3.4"),))
    commitments.keep(request)
    commitments.keep(request)  # asked again: still one report is owed
    ((row, kept, attempts),) = commitments.due("pacs")
    assert (kept, attempts, commitments.due("other")) == (request, 0, [])
    commitments.put_off(row, 1, "no answer", 60)
    assert commitments.due("pacs") == []
    commitments.put_off(row, 2, "no answer", -1)
    assert commitments.due("pacs") == [(row, request, 2)]
    commitments.told(row)
    assert commitments.due("pacs") == []


def test_a_report_names_failures_with_their_reason() -> None:
    request = Request("pacs", "1.2.3", (Reference("1.2", "1.3"), Reference("1.2", "1.4")))
    report = report_of(request, Verdict((request.references[0],), ((request.references[1], 0x0112),)))
    assert report.FailedSOPSequence[0].FailureReason == 0x0112
    assert "FailureReason" not in report.ReferencedSOPSequence[0]
