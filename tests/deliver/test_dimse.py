"""Speaking to peers as a client: what a real peer answers becomes a remark or a named error."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.uid import JPEGLSLossless
from pynetdicom.acse import ACSE

from node.deliver.dimse import Address, StoreSession, echo, judge_status
from node.demo.pacs import Orthanc, free_port
from node.errors import DeliveryError
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
