"""The receivers that are measured side by side, each a process of its own; ours is `radnode serve --role receive`."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from node.demo.pacs import Orthanc, free_port
from tests.running_node import wait_until

CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Receiver:
    """Where it listens, and the process whose CPU time and memory count."""

    port: int
    called_ae_title: str
    process: psutil.Process


@contextlib.contextmanager
def radnode(
    folder: Path, *, durability: str = "full", receive: str = "", free_disk: str = "100MB", peers: str = ""
) -> Iterator[Receiver]:
    """Our receiving process alone."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    senders = ", ".join(["sender", *re.findall(r"(\w+): \{ae_title", peers)])
    # A folder that was served before keeps its port.
    known = re.search(r"port: (\d+)", config.read_text()) if config.exists() else None
    port = int(known[1]) if known else free_port()
    config.write_text(
        f"""\
node:    {{ae_title: RADNODE, host: 127.0.0.1, port: {port}, storage: ./var}}
peers:   {{sender: {{ae_title: STORESCU, host: 127.0.0.1}}{peers}}}
receive: {{from: [{senders}], durability: {durability}, maximum_associations: 300, maximum_per_address: 300{receive}}}
models:  {{path: {CHECKOUT / "models"}}}
routes:  []
keep:    {{studies: 7d, free_disk: {free_disk}}}
"""
    )
    command = [sys.executable, "-m", "node.cli", "serve", "--role", "receive", "--config", str(config)]
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, cwd=CHECKOUT)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n", (folder / "log.txt").read_text()
        yield Receiver(port, "RADNODE", psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def storescp(folder: Path) -> Iterator[Receiver]:
    """DCMTK's storescp, without Nagle's algorithm (with it the figure is an artefact of delayed ACKs)."""
    port = free_port()
    (folder / "in").mkdir(parents=True, exist_ok=True)
    command = ["storescp", "--fork", "-od", str(folder / "in"), "--max-pdu", "131072", str(port)]
    process = subprocess.Popen(command, env=os.environ | {"TCP_NODELAY": "1"}, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _echoes(port, "ANY-SCP"), 10, "storescp listens")
        yield Receiver(port, "ANY-SCP", psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def orthanc(folder: Path) -> Iterator[Receiver]:
    """Orthanc with its default settings; it is DCMTK inside, so without Nagle's algorithm too."""
    os.environ["TCP_NODELAY"] = "1"
    with Orthanc(folder) as running:
        assert running._process is not None
        wait_until(lambda: _echoes(running.port, running.ae_title), 10, "Orthanc listens")
        yield Receiver(running.port, running.ae_title, psutil.Process(running._process.pid))


@contextlib.contextmanager
def pynetdicom(folder: Path) -> Iterator[Receiver]:
    """A plain pynetdicom SCP whose handler writes `event.encoded_dataset()` to a file."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    program = f"""\
from pathlib import Path
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pydicom.uid import AllTransferSyntaxes
def store(event):
    Path({str(folder)!r}, event.request.AffectedSOPInstanceUID).write_bytes(event.encoded_dataset())
    return 0
ae = AE("ANY-SCP")
ae.maximum_pdu_size = 131072
for context in AllStoragePresentationContexts:
    ae.add_supported_context(context.abstract_syntax, AllTransferSyntaxes)
ae.add_supported_context("1.2.840.10008.1.1")
ae.start_server(("127.0.0.1", {port}), evt_handlers=[(evt.EVT_C_STORE, store)])
"""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program])
    try:
        wait_until(lambda: _echoes(port, "ANY-SCP"), 20, "pynetdicom listens")
        yield Receiver(port, "ANY-SCP", psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(10)


def _echoes(port: int, called: str) -> bool:
    done = subprocess.run(["echoscu", "-aec", called, "127.0.0.1", str(port)], capture_output=True, check=False)
    return done.returncode == 0


def send(receiver: Receiver, folders: list[Path]) -> float:
    """One `storescu` per folder, all at once; seconds until the last has ended. What is not acknowledged fails."""
    command = ["storescu", "-aec", receiver.called_ae_title, "--max-pdu", "131072", "-xe", "+sd", "127.0.0.1"]
    environment = os.environ | {"TCP_NODELAY": "1"}
    begin = time.perf_counter()
    senders = [
        subprocess.Popen(
            [*command, str(receiver.port), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for folder in folders
    ]
    outputs = [sender.communicate()[0] for sender in senders]
    elapsed = time.perf_counter() - begin
    for sender, output in zip(senders, outputs, strict=True):
        assert sender.returncode == 0, output.decode(errors="replace")[-2000:]
    return elapsed
