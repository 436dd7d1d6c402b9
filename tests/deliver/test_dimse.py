"""Speaking to peers as a client: what a real peer answers becomes a remark or a named error."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SegmentationStorage,
)
from pynetdicom import AE
from pynetdicom.acse import ACSE
from pynetdicom.events import EVT_C_STORE

from node.association import LITTLE_ENDIAN, Checkpoint, Connection
from node.deliver.dimse import Address, StoreSession, echo, judge_status
from node.demo.pacs import Orthanc, free_port
from node.dicom.encode import compress
from node.errors import DeliveryError
from node.report.kinds import SegForm
from tests.report.geometries import small_subject, write_seg
from tests.running_node import wait_until


def address_of(orthanc: Orthanc) -> Address:
    return Address(orthanc.ae_title, "127.0.0.1", orthanc.port, "RADNODE")


@contextmanager
def storescp(folder: Path, *options: str) -> Iterator[Address]:
    """DCMTK's storescp with `options`."""
    program = shutil.which("storescp")
    assert program, "storescp is not installed (Debian: apt-get install dcmtk)"
    address = Address("STORESCP", "127.0.0.1", free_port(), "RADNODE")
    folder.mkdir(exist_ok=True)
    command = [program, *options, "-aet", "STORESCP", "-od", str(folder), str(address.port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: listens(address), 10, "storescp listens")
            yield address
        finally:
            process.terminate()


def listens(address: Address) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((address.host, address.port)) == 0


def test_orthanc_answers_an_echo(orthanc: Orthanc) -> None:
    assert 0 < echo(address_of(orthanc)) < 10


def test_nobody_there_is_said_so() -> None:
    with pytest.raises(DeliveryError, match=r"no DICOM answer from PACS at 127\.0\.0\.1:\d+: is it running"):
        echo(Address("PACS", "127.0.0.1", free_port(), "RADNODE"))


def test_a_rejection_names_the_reason_and_our_title(tmp_path: Path) -> None:
    with Orthanc(tmp_path, options={"DicomCheckCalledAet": True}) as strict:
        address = Address("WRONG", "127.0.0.1", strict.port, "RADNODE")
        with pytest.raises(DeliveryError, match=r"WRONG .* rejected .* as RADNODE: Called AE title not recognised"):
            echo(address)


def test_a_rejection_is_heard_however_late_we_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pynetdicom's one thread closes the connection when the rejection comes, before its other one looks at it."""
    send_request = ACSE.send_request

    def send_and_sleep(acse: ACSE) -> None:
        send_request(acse)
        wait_until(lambda: not acse.dul.is_alive(), 10, "the rejection was read and the connection closed")

    monkeypatch.setattr(ACSE, "send_request", send_and_sleep)
    with Orthanc(tmp_path, options={"DicomCheckCalledAet": True}) as strict:
        address = Address("WRONG", "127.0.0.1", strict.port, "RADNODE")
        with pytest.raises(DeliveryError, match="rejected permanently our association as RADNODE: Called AE title"):
            echo(address)


def test_nothing_waits_for_nagle(orthanc: Orthanc, shared_data: Path) -> None:
    """With his algorithm each object waits 40 ms for the peer's delayed acknowledgement."""
    file = next((shared_data / "chest_ct_philips").rglob("*.dcm"))
    with StoreSession(address_of(orthanc), [file]) as session:
        transport = session._association.dul.socket
        assert transport is not None
        assert transport.socket is not None
        assert transport.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_files_arrive_as_they_are(orthanc: Orthanc, shared_data: Path) -> None:
    files = sorted((shared_data / "chest_ct_siemens" / "soft_kernel_B40f").glob("*.dcm"))[:3]
    with StoreSession(address_of(orthanc), files) as session:
        remarks = [session.send(file) for file in files]
    assert remarks == ["", "", ""]
    sent = {str(header.SOPInstanceUID): header for header in map(dcmread, files)}
    held = orthanc.instances(str(dcmread(files[0]).StudyInstanceUID))
    for uid, header in sent.items():
        assert held[uid].PixelData == header.PixelData


def test_a_peer_with_implicit_vr_only_gets_implicit_vr(tmp_path: Path, shared_data: Path) -> None:
    dataset = dcmread(next((shared_data / "chest_ct_siemens" / "soft_kernel_B40f").glob("*.dcm")))
    explicit = tmp_path / "explicit.dcm"
    dataset.save_as(explicit)
    assert not dataset.file_meta.TransferSyntaxUID.is_implicit_VR
    with storescp(tmp_path / "in", "+xi") as address, StoreSession(address, [explicit]) as session:
        assert session.send(explicit) == ""
    (received,) = (tmp_path / "in").iterdir()
    assert dcmread(received).file_meta.TransferSyntaxUID.is_implicit_VR
    assert dcmread(received).PixelData == dataset.PixelData


def test_a_compressed_object_that_the_peer_cannot_take_is_an_error_with_its_syntax(
    tmp_path: Path, shared_data: Path
) -> None:
    file = next((shared_data / "compressed" / "mr_jpegls").iterdir())
    assert dcmread(file, stop_before_pixels=True).file_meta.TransferSyntaxUID == JPEGLSLossless
    with (
        storescp(tmp_path / "in", "+xe") as address,
        StoreSession(address, [file]) as session,
        pytest.raises(DeliveryError, match="JPEG-LS"),
    ):
        session.send(file)


# What storescp is told to take, the form of the SEG, and the syntax that it is then sent in.
TAKEN = [
    ("+xt", SegForm.FRACTIONAL, JPEGLSLossless),
    ("+xr", SegForm.FRACTIONAL, RLELossless),
    ("+xv", SegForm.FRACTIONAL, JPEG2000Lossless),
    ("+xd", SegForm.FRACTIONAL, DeflatedExplicitVRLittleEndian),
    ("+xa", SegForm.FRACTIONAL, RLELossless),
    ("+xd", SegForm.BINARY, DeflatedExplicitVRLittleEndian),
    ("+xa", SegForm.BINARY, DeflatedExplicitVRLittleEndian),
    ("+xt", SegForm.BINARY, ExplicitVRLittleEndian),
    ("+xe", SegForm.FRACTIONAL, ExplicitVRLittleEndian),
    ("+xi", SegForm.BINARY, ImplicitVRLittleEndian),
]


@pytest.mark.parametrize(("option", "form", "syntax"), TAKEN)
def test_an_object_is_sent_in_the_best_syntax_that_the_peer_takes(
    tmp_path: Path, option: str, form: SegForm, syntax: UID
) -> None:
    seg = write_seg(small_subject(tmp_path / "images", (7, 40, 48)), tmp_path / "seg.dcm", form)
    file = tmp_path / "seg.dcm"
    before = file.read_bytes()
    with storescp(tmp_path / "in", option) as address, StoreSession(address, [file], compress=True) as session:
        assert session.send(file) == ""
    (received,) = (tmp_path / "in").iterdir()
    arrived = dcmread(received)
    assert arrived.file_meta.TransferSyntaxUID == syntax
    assert arrived.SOPInstanceUID == seg.SOPInstanceUID
    assert np.array_equal(arrived.pixel_array, seg.pixel_array)
    assert file.read_bytes() == before
    if syntax in (JPEGLSLossless, RLELossless, DeflatedExplicitVRLittleEndian):
        assert received.stat().st_size < len(before) / 1.2  # of so small frames the functional groups are as much


def test_nothing_is_compressed_unasked(tmp_path: Path) -> None:
    write_seg(small_subject(tmp_path / "images", (7, 40, 48)), tmp_path / "seg.dcm")
    with storescp(tmp_path / "in", "+xa") as address, StoreSession(address, [tmp_path / "seg.dcm"]) as session:
        assert session.send(tmp_path / "seg.dcm") == ""
    (received,) = (tmp_path / "in").iterdir()
    assert dcmread(received).file_meta.TransferSyntaxUID == ExplicitVRLittleEndian


def test_what_compression_makes_larger_is_sent_as_it_is(tmp_path: Path) -> None:
    """Noise, of which JPEG-LS makes more."""
    subject = small_subject(tmp_path / "images", (4, 24, 32))
    noise = np.random.default_rng(1).integers(0, 255, (4, 24, 32), np.uint8)
    prediction = replace(subject.labelmap, probabilities=dict.fromkeys(subject.manifest.segments, noise))
    write_seg(replace(subject, prediction=prediction), tmp_path / "seg.dcm", SegForm.FRACTIONAL)
    compress(tmp_path / "seg.dcm", tmp_path / "large.dcm", JPEGLSLossless)
    assert (tmp_path / "large.dcm").stat().st_size > (tmp_path / "seg.dcm").stat().st_size
    with (
        storescp(tmp_path / "in", "+xt") as address,
        StoreSession(address, [tmp_path / "seg.dcm"], compress=True) as session,
    ):
        assert session.send(tmp_path / "seg.dcm") == ""
    (received,) = (tmp_path / "in").iterdir()
    assert dcmread(received).file_meta.TransferSyntaxUID == ExplicitVRLittleEndian


def test_pixels_that_no_encoder_takes_are_sent_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Some are missing, which is for the peer to judge."""
    seg = write_seg(small_subject(tmp_path / "images", (7, 40, 48)), tmp_path / "seg.dcm", SegForm.FRACTIONAL)
    seg.PixelData = seg.PixelData[:-100]
    seg.save_as(tmp_path / "seg.dcm")
    with (
        storescp(tmp_path / "in", "+xt") as address,
        StoreSession(address, [tmp_path / "seg.dcm"], compress=True) as session,
    ):
        assert session.send(tmp_path / "seg.dcm") == ""
    (received,) = (tmp_path / "in").iterdir()
    assert dcmread(received).PixelData == seg.PixelData
    assert (
        "seg.dcm is sent as it is, not as JPEG-LS Lossless Image Compression: it cannot be compressed (" in caplog.text
    )


@pytest.fixture
def full_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tmpfs without a byte left, where temporary files go."""
    folder = tmp_path / "full"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], check=True)
    try:
        (folder / "ballast").write_bytes(bytes(shutil.disk_usage(folder).free))
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.mounts
def test_without_room_to_compress_it_is_sent_as_it_is(
    tmp_path: Path, full_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_seg(small_subject(tmp_path / "images", (7, 40, 48)), tmp_path / "seg.dcm")
    with (
        storescp(tmp_path / "in", "+xa") as address,
        StoreSession(address, [tmp_path / "seg.dcm"], compress=True) as session,
    ):
        assert session.send(tmp_path / "seg.dcm") == ""
        assert session.send(tmp_path / "seg.dcm") == ""
    (received,) = (tmp_path / "in").iterdir()
    assert dcmread(received).file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert "no temporary file could be written (No space left on device)" in caplog.text
    assert [path.name for path in full_folder.iterdir()] == ["ballast"]


def test_a_file_that_is_gone_is_told_and_the_next_is_sent(tmp_path: Path) -> None:
    write_seg(small_subject(tmp_path / "images", (7, 40, 48)), tmp_path / "seg.dcm")
    shutil.copy(tmp_path / "seg.dcm", tmp_path / "gone.dcm")
    files = [tmp_path / "gone.dcm", tmp_path / "seg.dcm"]
    with storescp(tmp_path / "in", "+xa") as address, StoreSession(address, files, compress=True) as session:
        files[0].unlink()
        with pytest.raises(DeliveryError, match=r"gone\.dcm cannot be read \(No such file or directory\)"):
            session.send(files[0])
        assert session.send(files[1]) == ""


def test_orthanc_takes_every_form_compressed(tmp_path: Path) -> None:
    """Debian's Orthanc 1.10 has to be told to take SOP classes that it does not know, for the label map form."""
    subject = small_subject(tmp_path / "images", (7, 40, 48))
    segs = {form: write_seg(subject, tmp_path / f"{form}.dcm", form) for form in SegForm}
    files = [tmp_path / f"{form}.dcm" for form in SegForm]
    with Orthanc(tmp_path / "orthanc", options={"UnknownSopClassAccepted": True}) as orthanc:
        with StoreSession(address_of(orthanc), files, compress=True) as session:
            assert [session.send(file) for file in files] == ["", "", ""]
        found = orthanc.instances(str(subject.source.study_uid))
    for form, plain in segs.items():
        held = found[str(plain.SOPInstanceUID)]
        check_compressed(held, plain, form)


def check_compressed(held: Dataset, plain: Dataset, form: SegForm) -> None:
    wanted = DeflatedExplicitVRLittleEndian if form is SegForm.BINARY else RLELossless
    assert held.file_meta.TransferSyntaxUID == wanted
    assert np.array_equal(held.pixel_array, plain.pixel_array)


def test_no_association_asks_for_more_than_128_contexts(tmp_path: Path) -> None:
    """Each SOP class asks for itself and for four smaller syntaxes; what is over is asked for plain."""
    seg = write_seg(small_subject(tmp_path / "images", (7, 40, 48)), tmp_path / "seg.dcm", SegForm.FRACTIONAL)
    files = []
    for number in range(40):
        seg.SOPClassUID = f"{seg.SOPClassUID.rpartition('.')[0]}.{66 + number}"
        seg.SOPInstanceUID = f"2.25.{number + 1}"
        files.append(tmp_path / f"{number}.dcm")
        seg.save_as(files[-1], enforce_file_format=True)
    seg.SOPClassUID = SegmentationStorage
    files.append(tmp_path / "seg.dcm")
    with storescp(tmp_path / "in", "+xa") as address, StoreSession(address, files, compress=True) as session:
        assert session.send(tmp_path / "seg.dcm") == ""
    assert len(list((tmp_path / "in").iterdir())) == 1


def test_what_a_peer_says_is_one_line_without_the_patient(tmp_path: Path) -> None:
    """A PACS that has another name under this ID says so with both."""
    seg = write_seg(small_subject(tmp_path / "images", (4, 24, 32)), tmp_path / "seg.dcm")
    status = Dataset()
    status.Status, status.ErrorComment = 0xA900, f"no {seg.PatientID}\x1b[2J here, but of 'Doe'"
    peer = AE("PEER")
    peer.add_supported_context(SegmentationStorage)
    server = peer.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(EVT_C_STORE, lambda event: status)])
    assert server is not None
    address = Address("PEER", "127.0.0.1", server.server_address[1], "RADNODE")
    try:
        with (
            StoreSession(address, [tmp_path / "seg.dcm"]) as session,
            pytest.raises(DeliveryError) as caught,
        ):
            session.send(tmp_path / "seg.dcm")
    finally:
        server.shutdown()
    assert str(caught.value).endswith("answered status 0xA900 (no ... [2J here, but of 'Doe')")


@pytest.mark.parametrize(
    ("code", "permanent"),
    [(0xA700, False), (0x0110, False), (0x0124, False), (0xA900, True), (0xC123, True), (0x0122, True), (0x0117, True)],
)
def test_failures_are_told_apart(code: int, permanent: bool) -> None:
    with pytest.raises(DeliveryError, match=f"0x{code:04X}") as caught:
        judge_status(code, "", Address("PACS", "h", 1, "R"))
    assert caught.value.permanent is permanent


@pytest.mark.parametrize("code", [0xB000, 0xB006, 0xB007, 0x0111])
def test_warnings_mean_stored(code: int) -> None:
    assert f"0x{code:04X}" in judge_status(code, "", Address("PACS", "h", 1, "R"))


class Slow(threading.Event):
    """pynetdicom's own event, whose waiter comes late to its next step, as under load."""

    def wait(self, timeout: float | None = None) -> bool:
        try:
            return super().wait(timeout)
        finally:
            time.sleep(0.05)


class SlowCheckpoint(Checkpoint):
    def wait(self, timeout: float | None = None) -> bool:
        try:
            return super().wait(timeout)
        finally:
            time.sleep(0.05)


def echoes_in_a_row(
    address: Address, event: threading.Event | None, monkeypatch: pytest.MonkeyPatch
) -> list[int | None]:
    """What six echoes are answered, one right after the other."""
    connection = Connection(address, [("1.2.840.10008.1.1", LITTLE_ENDIAN)], answer_timeout_s=1.0)
    with connection as association:
        if event is not None:
            event.set()
            association._reactor_checkpoint = event
        get_msg = association.dimse.get_msg

        def come_late(block: bool = False) -> tuple[Any, Any]:
            time.sleep(0.1 if block else 0)  # the answer is there before its asker looks
            return get_msg(block)

        monkeypatch.setattr(association.dimse, "get_msg", come_late)
        return [association.send_c_echo().get("Status") for _ in range(6) if association.is_established]


def test_an_answer_is_never_taken_by_the_other_thread(orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch) -> None:
    address = address_of(orthanc)
    assert echoes_in_a_row(address, None, monkeypatch) == [0] * 6
    monkeypatch.setattr("node.association.Checkpoint", SlowCheckpoint)
    assert echoes_in_a_row(address, None, monkeypatch) == [0] * 6


def test_pynetdicom_still_needs_the_checkpoint(orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch) -> None:
    assert None in echoes_in_a_row(address_of(orthanc), Slow(), monkeypatch), "node.association.Checkpoint may go"


def test_a_checkpoint_closes_when_its_thread_waits() -> None:
    passed: list[int] = []
    over = threading.Event()

    def react() -> None:
        while not over.is_set():
            checkpoint.wait()
            time.sleep(0.02)
            passed.append(1)

    reactor = threading.Thread(target=react)
    checkpoint = Checkpoint(reactor)
    reactor.start()
    for _ in range(20):
        checkpoint.clear()
        before = len(passed)
        time.sleep(0.03)
        assert len(passed) == before
        checkpoint.set()
    over.set()
    reactor.join()
    checkpoint.clear()  # nobody will come: it does not wait
    assert not checkpoint.is_set()
