"""C-STORE over a socket: what each kind of object is answered, and what lies on the disk then."""

from __future__ import annotations

import io
import subprocess
import zlib
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pynetdicom import AE, build_context

from node.archive.records import StudyState
from node.receive.storage import file_header
from tests.receive.conftest import Door
from tests.receive.peers import associate
from tests.receive.sending import ct, encode, release, store, store_dataset
from tests.running_node import wait_until

SUCCESS, OUT_OF_RESOURCES, MISMATCH, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xA900, 0xC000
DEFLATED = "1.2.840.10008.1.2.1.99"


def files(folder: Path) -> list[Path]:
    """All files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_acknowledged_lies_there_byte_by_byte(door: Door) -> None:
    image = ct(PatientName="Müller^Jürgen", SpecificCharacterSet="ISO_IR 192")
    encoded = encode(image)
    connection = associate(door.port)
    assert store_dataset(connection, image) == (SUCCESS, "")
    release(connection)
    (file,) = files(door.storage / "instances")
    assert file.read_bytes().endswith(encoded)
    kept = dcmread(file)
    assert kept == image
    meta = kept.file_meta
    assert (meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID) == (image.SOPInstanceUID, ExplicitVRLittleEndian)
    assert meta.SourceApplicationEntityTitle == "STORESCU"
    wait_until(lambda: files(door.storage / "spool") == [], 5, "an empty spool")


def test_the_file_header_is_what_pydicom_reads_and_writes() -> None:
    header = file_header(CTImageStorage, "1.2.3.45", ExplicitVRLittleEndian, "SCANNER")
    meta = dcmread(io.BytesIO(header + encode(ct()))).file_meta
    assert meta.FileMetaInformationGroupLength == len(header) - 144
    assert meta.MediaStorageSOPInstanceUID == "1.2.3.45"
    again = io.BytesIO()
    dataset = dcmread(io.BytesIO(header + encode(ct())))
    dataset.save_as(again, enforce_file_format=False)
    assert again.getvalue()[: len(header)] == header


def test_a_duplicate_is_acknowledged_and_stored_once(door: Door) -> None:
    image = ct()
    connection = associate(door.port)
    assert [store_dataset(connection, image)[0] for _ in range(3)] == [SUCCESS] * 3
    release(connection)
    assert len(files(door.storage / "instances")) == 1
    with door.archive() as archive:
        assert archive.study(image.StudyInstanceUID).instances == 1


def test_the_same_object_in_another_encoding_is_a_duplicate(door: Door, shared_data: Path) -> None:
    for folder, option in (("mr_rle", "-xr"), ("mr_jpegls", "-xt"), ("mr_j2k", "-xv"), ("mr_jpeg", "-xs")):
        command = ["storescu", "-aec", "RADNODE", option, "+sd", "127.0.0.1", str(door.port)]
        subprocess.run([*command, str(shared_data / "compressed" / folder)], check=True)
    assert len(files(door.storage / "instances")) == 4
    assert files(door.storage / "quarantine") == []


def test_other_content_under_a_known_uid_goes_to_quarantine(door: Door) -> None:
    image = ct()
    connection = associate(door.port)
    assert store_dataset(connection, image)[0] == SUCCESS
    first = files(door.storage / "instances")
    before = first[0].read_bytes()
    image.PixelData = b"\1" * 512
    assert [store_dataset(connection, image)[0] for _ in range(2)] == [SUCCESS] * 2
    release(connection)
    assert files(door.storage / "instances") == first
    assert first[0].read_bytes() == before
    (second,) = files(door.storage / "quarantine")
    assert dcmread(second).PixelData == b"\1" * 512
    with door.archive() as archive:
        story = [event.what for event in archive.events(image.StudyInstanceUID)]
    assert sum(what.startswith("ALARM") and second.name in what for what in story) == 1


def test_two_patients_in_one_study_are_quarantined(door: Door) -> None:
    first = ct(PatientID="P1")
    second = ct(PatientID="P2", StudyInstanceUID=first.StudyInstanceUID)
    connection = associate(door.port)
    assert [store_dataset(connection, image)[0] for image in (first, second)] == [SUCCESS] * 2
    release(connection)
    with door.archive() as archive:
        study = archive.study(first.StudyInstanceUID)
    assert (study.state, study.instances) == (StudyState.QUARANTINED, 2)
    assert "two patients" in study.reason
    assert "P2" not in door.log


def test_data_set_and_request_must_agree(shared_door: Door) -> None:
    connection = associate(shared_door.port)
    image = ct()
    uid = str(image.SOPInstanceUID)
    assert store(connection, encode(image), MRImageStorage, uid)[0] == MISMATCH  # not the context's
    image.SOPClassUID = MRImageStorage
    assert store(connection, encode(image), CTImageStorage, uid)[0] == MISMATCH
    assert store_dataset(connection, ct())[0] == SUCCESS
    status, comment = store(connection, encode(ct()), CTImageStorage, generate_uid())
    assert (status, "another SOP Instance UID" in comment) == (MISMATCH, True)
    release(connection)


HOSTILE_UIDS = ["../../etc/passwd", "1.2.3\n", "1.2.3\x1b[2J", "1." + "2" * 298, "", "1..2", "01.2", "1.2.3/4"]


@pytest.mark.parametrize("uid", HOSTILE_UIDS)
def test_what_is_no_uid_is_refused(shared_door: Door, uid: str) -> None:
    before = files(shared_door.storage / "instances")
    connection = associate(shared_door.port)
    image = ct()
    image.SOPInstanceUID = "1.2.3"
    encoded = encode(image).replace(b"\x08\x00\x18\x00UI\x06\x001.2.3\0", _element(0x0018, uid))
    assert store(connection, encoded, CTImageStorage, uid)[0] == NOT_UNDERSTOOD
    assert store(connection, encoded, CTImageStorage, "1.2.3")[0] in (NOT_UNDERSTOOD, MISMATCH)
    assert store_dataset(connection, ct())[0] == SUCCESS, "the association goes on"
    release(connection)
    assert len(files(shared_door.storage / "instances")) == len(before) + 1


def _element(number: int, value: str) -> bytes:
    data = value.encode() + b"\0" * (len(value.encode()) % 2)
    return b"\x08\x00" + number.to_bytes(2, "little") + b"UI" + len(data).to_bytes(2, "little") + data


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 4096, b"not DICOM at all, " * 50, encode(ct())[:60], encode(ct(StudyInstanceUID=None))]
)
def test_garbage_is_refused(shared_door: Door, data: bytes) -> None:
    connection = associate(shared_door.port)
    assert store(connection, data, CTImageStorage, "1.2.3.4")[0] == NOT_UNDERSTOOD
    assert store_dataset(connection, ct())[0] == SUCCESS
    release(connection)


def test_deeply_nested_sequences_are_refused(shared_door: Door) -> None:
    open_item = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    connection = associate(shared_door.port)
    status, comment = store(connection, open_item * 5000, CTImageStorage, "1.2.3.4")
    assert (status, "nested" in comment) == (NOT_UNDERSTOOD, True)
    assert store_dataset(connection, ct())[0] == SUCCESS
    release(connection)


def test_a_deflate_bomb_stays_small(door: Door) -> None:
    compressor = zlib.compressobj(9, wbits=-15)
    bomb = compressor.compress(
        encode(ct(PixelData=None)) + b"\xe0\x7f\x10\x00OW\0\0" + (2**32 - 2).to_bytes(4, "little")
    )
    zeros = bytes(1 << 20)
    for _ in range(3000):
        bomb += compressor.compress(zeros)
    bomb += compressor.flush()
    assert len(bomb) < 4 << 20
    idle = door.receiver.process.memory_info().rss
    connection = associate(door.port, transfer_syntaxes=(DEFLATED,))
    status, comment = store(connection, bomb, CTImageStorage, "1.2.3.4")
    assert (status, "inflates" in comment) == (NOT_UNDERSTOOD, True)
    release(connection)
    assert door.receiver.process.memory_info().rss - idle < 50e6
    wait_until(lambda: files(door.storage / "spool") == [], 5, "an empty spool")


def test_a_long_value_in_front_is_refused(shared_door: Door) -> None:
    image = ct()
    image.StudyDescription = "x" * 60000
    connection = associate(shared_door.port)
    assert store_dataset(connection, image)[0] == NOT_UNDERSTOOD
    image.StudyDescription = None
    image.ReferencedStudySequence = Sequence([Dataset() for _ in range(100)])
    assert store_dataset(connection, image)[0] == SUCCESS
    release(connection)


def test_every_storage_class_and_transfer_syntax_is_taken(shared_door: Door) -> None:
    """As many contexts as an association can hold, each with its own class."""
    from pynetdicom import AllStoragePresentationContexts

    classes = [context.abstract_syntax for context in AllStoragePresentationContexts]
    for begin in range(0, len(classes), 120):
        ae = AE("STORESCU")
        contexts = [build_context(str(uid)) for uid in classes[begin : begin + 120]]
        association = ae.associate("127.0.0.1", shared_door.port, contexts=contexts, ae_title="RADNODE")
        assert association.is_established
        assert {c.abstract_syntax for c in association.accepted_contexts} == {c.abstract_syntax for c in contexts}
        association.release()
