"""A PACS on this machine for the demonstration (and the tests): Orthanc where it is installed, else a small archive
SCP.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydicom import dcmread
from pydicom.dataset import FileDataset

from node.errors import RadnodeError

START_TIMEOUT_S = 30.0


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Pacs(ABC):
    """A DICOM archive that runs as a process of its own; a context manager."""

    name: str
    ae_title = "PACS"

    def __init__(self, folder: Path, port: int | None = None):
        self.folder = folder
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @abstractmethod
    def command(self) -> list[str]:
        """How the process is started; called once the folder exists."""

    @abstractmethod
    def instances(self, study_uid: str) -> dict[str, FileDataset]:
        """SOP Instance UID to data set, for all that the archive holds of a study."""

    def start(self) -> None:
        """Start it and wait until it listens."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "log.txt"
        with log.open("ab") as output:
            self._process = subprocess.Popen(self.command(), stdout=output, stderr=output, start_new_session=True)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RadnodeError(f"{self.name} did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop it, by force where it does not listen."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _listens(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(0.5)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class Orthanc(Pacs):
    """Orthanc, with its REST interface on a free port."""

    name = "Orthanc"

    def __init__(self, folder: Path, port: int | None = None, options: Mapping[str, Any] | None = None):
        super().__init__(folder, port)
        self.http_port = free_port()
        self._options = dict(options or {})

    @staticmethod
    def program() -> str | None:
        """The Orthanc program of this machine, if there is one."""
        return shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin:/opt/orthanc")

    def command(self) -> list[str]:
        program = self.program()
        if program is None:
            raise RadnodeError("Orthanc is not installed (Debian: apt-get install orthanc)")
        configuration = self.folder / "orthanc.json"
        configuration.write_text(
            json.dumps(
                {
                    "Name": "radnode demo",
                    "StorageDirectory": str(self.folder / "storage"),
                    "IndexDirectory": str(self.folder / "storage"),
                    "DicomAet": self.ae_title,
                    "DicomPort": self.port,
                    "HttpPort": self.http_port,
                    "RemoteAccessAllowed": False,
                    "AuthenticationEnabled": False,
                    "DicomAlwaysAllowEcho": True,
                    "DicomAlwaysAllowStore": True,
                    "Plugins": [],
                }
                | self._options
            )
        )
        return [program, str(configuration)]

    def rest(self, path: str, body: Any = None) -> Any:
        """Answer of Orthanc's REST interface: GET, or POST with a JSON body."""
        data = self.rest_bytes(path, None if body is None else json.dumps(body).encode())
        return json.loads(data)

    def rest_bytes(self, path: str, body: bytes | None = None) -> bytes:
        """The same, undecoded."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", data=body)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def instances(self, study_uid: str) -> dict[str, FileDataset]:
        found = self.rest("/tools/find", {"Level": "Instance", "Query": {"StudyInstanceUID": study_uid}})
        datasets = [dcmread(BytesIO(self.rest_bytes(f"/instances/{identifier}/file"))) for identifier in found]
        return {str(dataset.SOPInstanceUID): dataset for dataset in datasets}

    def _listens(self) -> bool:
        if not super()._listens():
            return False
        try:
            self.rest("/system")
        except (urllib.error.URLError, OSError):
            return False
        return True


class FolderPacs(Pacs):
    """An archive SCP of our own: every object is a file in `objects/`, one per SOP Instance UID."""

    name = "the archive SCP of radnode"

    def command(self) -> list[str]:
        (self.folder / "objects").mkdir(exist_ok=True)
        return [sys.executable, "-m", "node.demo.pacs", str(self.folder / "objects"), self.ae_title, str(self.port)]

    def instances(self, study_uid: str) -> dict[str, FileDataset]:
        datasets = (dcmread(path) for path in (self.folder / "objects").glob("*.dcm"))
        return {str(dataset.SOPInstanceUID): dataset for dataset in datasets if dataset.StudyInstanceUID == study_uid}


def start_pacs(folder: Path) -> Pacs:
    """Orthanc when it is installed, else our own; started."""
    pacs: Pacs = Orthanc(folder) if Orthanc.program() else FolderPacs(folder)
    pacs.start()
    return pacs


def _serve_folder(folder: Path, ae_title: str, port: int) -> None:
    import hashlib

    from pydicom.uid import AllTransferSyntaxes
    from pynetdicom import AE, AllStoragePresentationContexts, evt
    from pynetdicom.sop_class import Verification  # pyright: ignore[reportAttributeAccessIssue]

    def store(event: evt.Event) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)  # pyright: ignore
        final = folder / f"{hashlib.sha256(uid.encode()).hexdigest()[:32]}.dcm"  # never a name that the sender chose
        part = final.with_suffix(f".{id(event)}")
        part.write_bytes(event.encoded_dataset())
        part.rename(final)
        return 0x0000

    ae = AE(ae_title=ae_title)
    for context in AllStoragePresentationContexts:
        ae.add_supported_context(context.abstract_syntax or "", AllTransferSyntaxes)
    ae.add_supported_context(Verification)
    ae.start_server(("127.0.0.1", port), evt_handlers=[(evt.EVT_C_STORE, store)])


if __name__ == "__main__":
    _serve_folder(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
