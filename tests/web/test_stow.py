"""STOW-RS with Orthanc's DICOMweb client, and by hand for what no honest client sends."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from node.archive.store import Archive
from node.demo.pacs import Orthanc, free_port
from tests.receive.sending import ct
from tests.running_node import MODELS, RunningNode, wait_until

TOKEN = "0123456789abcdef0123"
PLUGINS = "/usr/share/orthanc/plugins"


@dataclass(frozen=True)
class WebNode:
    """The web process of a node, with its folder."""

    port: int
    folder: Path
    process: psutil.Process

    @property
    def archive(self) -> Archive:
        """A second view of its archive."""
        return Archive(self.folder / "var", f"sqlite:///{self.folder / 'var' / 'radnode.sqlite'}")

    def post(
        self, body: bytes, *, path: str = "/dicom-web/studies", content_type: str | None = None, token: str = TOKEN
    ) -> tuple[int, dict[str, Any]]:
        """One request; status and JSON of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        kind = content_type or 'multipart/related; type="application/dicom"; boundary=XYZ'
        connection.request("POST", path, body, {"Content-Type": kind, "Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebNode]:
    """`radnode serve --role web`, behind a token."""
    folder, port = tmp_path_factory.mktemp("web"), free_port()
    (folder / "token").write_text(f"{TOKEN}\n")
    (folder / "config.yaml").write_text(
        f"""\
node:    {{storage: ./var}}
models:  {{path: {MODELS}}}
receive: {{maximum_object: 30MB}}
keep:    {{free_disk: 10MB}}
web:     {{listen: "127.0.0.1:{port}", token_file: token}}
"""
    )
    command = [sys.executable, "-m", "node.cli", "serve", "--role", "web", "--config", folder / "config.yaml"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    yield WebNode(port, folder, psutil.Process(process.pid))
    process.terminate()
    assert process.wait(20) == 0


def as_file(dataset: Dataset) -> bytes:
    """A DICOM file in memory."""
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    stream = BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def multipart(*parts: bytes) -> bytes:
    """A multipart/related body with boundary XYZ."""
    head = b"--XYZ\r\nContent-Type: application/dicom\r\n\r\n"
    return b"".join(head + part + b"\r\n" for part in parts) + b"--XYZ--\r\n"


def test_instances_are_stored_and_named_in_the_answer(web: WebNode) -> None:
    images = [ct() for _ in range(3)]
    status, answer = web.post(multipart(*(as_file(image) for image in images)))
    assert status == 200
    stored = [item["00081155"]["Value"][0] for item in answer["00081199"]["Value"]]
    assert stored == [image.SOPInstanceUID for image in images]
    assert "00081198" not in answer
    archive = web.archive
    for uid, path in archive.instance_paths(stored).items():
        assert dcmread(path) == next(image for image in images if image.SOPInstanceUID == uid)
    archive.close()


def test_what_is_refused_is_told_beside_what_is_stored(web: WebNode) -> None:
    good, foreign = ct(), ct()
    path = f"/dicom-web/studies/{good.StudyInstanceUID}"
    status, answer = web.post(multipart(as_file(good), b"no DICOM", as_file(foreign)), path=path)
    assert status == 202
    assert [item["00081155"]["Value"] for item in answer["00081199"]["Value"]] == [[good.SOPInstanceUID]]
    (failed,) = answer["00081198"]["Value"]
    assert failed["00081155"]["Value"] == [foreign.SOPInstanceUID]
    assert failed["00081197"]["Value"] == [0xC000]
    assert len(answer["0008119A"]["Value"]) == 1
    assert web.post(multipart(b"no DICOM"))[0] == 409


@pytest.mark.parametrize(
    ("body", "content_type", "path", "status"),
    [
        (multipart(), None, None, 400),
        (b"", None, None, 400),
        (b"garbage", None, None, 400),
        (multipart(b"x")[:-9], None, None, 400),
        (multipart(b"x"), "application/json", None, 415),
        (multipart(b"x"), "multipart/related; type=application/dicom", None, 415),
        (multipart(b"x"), 'multipart/related; type="application/dicom+json"; boundary=XYZ', None, 415),
        (multipart(b"x"), None, "/dicom-web/studies/1..2", 400),
        (multipart(b"x"), None, "/dicom-web/studies/1.2.3%0a", 400),
    ],
)
def test_wrong_requests(web: WebNode, body: bytes, content_type: str | None, path: str | None, status: int) -> None:
    answered, answer = web.post(body, content_type=content_type, path=path or "/dicom-web/studies")
    assert (answered, bool(answer.get("error"))) == (status, True)


def test_without_the_token_nothing_is_taken(web: WebNode) -> None:
    assert web.post(multipart(as_file(ct())), token="wrong")[0] == 401
    connection = http.client.HTTPConnection("127.0.0.1", web.port)
    connection.request("GET", "/health")
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["status"]) == (200, "serving")


def test_a_large_body_costs_no_memory_and_has_a_bound(web: WebNode) -> None:
    idle = web.process.memory_info().rss
    image = ct(PixelData=os.urandom(25_000_000))
    body = multipart(*[as_file(image)] * 4)
    status, answer = web.post(body)
    assert (status, len(answer["00081199"]["Value"])) == (200, 4)  # one and three duplicates
    assert web.process.memory_info().rss - idle < 40e6
    status, answer = web.post(multipart(as_file(ct(PixelData=bytes(40_000_000)))))
    assert status == 413
    assert "receive.maximum_object" in answer["error"]


def test_a_client_that_goes_away_leaves_nothing(web: WebNode) -> None:
    before = web.process.num_fds()
    with socket.create_connection(("127.0.0.1", web.port)) as connection:
        head = (
            f"POST /dicom-web/studies HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            "Content-Length: 999999\r\n"
            'Content-Type: multipart/related; type="application/dicom"; boundary=XYZ\r\n\r\n'
        )
        connection.sendall(head.encode() + multipart(as_file(ct()))[:600])
    wait_until(lambda: web.process.num_fds() <= before, 5, "every file is closed")
    assert list((web.folder / "var" / "spool").iterdir()) == []
    assert web.post(multipart(as_file(ct())))[0] == 200


def test_orthanc_pushes_a_study(tmp_path: Path, shared_data: Path) -> None:
    """Through the whole node: Orthanc pushes by STOW-RS, the result comes back to it by C-STORE."""
    web_port = free_port()
    options = {
        "Plugins": [PLUGINS],
        "DicomWeb": {"Servers": {"radnode": {"Url": f"http://127.0.0.1:{web_port}/dicom-web"}}},
    }
    with Orthanc(tmp_path / "orthanc", options=options) as orthanc:
        subprocess.run(
            ["storescu", "+sd", "+r", "127.0.0.1", str(orthanc.port), shared_data / "chest_ct_siemens"], check=True
        )
        node = RunningNode(tmp_path, orthanc.port, web=f'{{listen: "127.0.0.1:{web_port}"}}')
        node.start()
        try:
            (study,) = orthanc.rest("/studies")
            uid = orthanc.rest(f"/studies/{study}")["MainDicomTags"]["StudyInstanceUID"]
            body = {"Resources": [study], "Synchronous": True}
            orthanc.rest("/dicom-web/servers/radnode/stow", body)
            node.wait_for(uid, "done")
            (listed,) = node.json("studies", "list")
            assert listed["instances"] == 60
            modalities = {dataset.Modality for dataset in orthanc.instances(uid).values()}
            assert modalities == {"CT", "SEG", "SR"}
            assert set(node.processes()) == {"supervisor", "receive", "schedule", "work", "deliver", "web"}
        finally:
            node.kill_all()


def test_the_same_instance_by_two_doors(web: WebNode) -> None:
    image = ct(StudyInstanceUID=generate_uid())
    assert web.post(multipart(as_file(image)))[0] == 200
    image.PixelData = b"\1" * 512
    assert web.post(multipart(as_file(image)))[0] == 200
    archive = web.archive
    assert any(event.what.startswith("ALARM") for event in archive.events(image.StudyInstanceUID))
    assert archive.study(image.StudyInstanceUID).instances == 1
    archive.close()
