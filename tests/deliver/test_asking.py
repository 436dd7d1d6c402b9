"""What a peer takes is asked of real ones: DCMTK's storescp knows no label maps, Orthanc can take any class."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from node.archive.peer_storage import does_accept, note_accepted
from node.archive.store import Archive
from node.cli import main
from node.config import Config
from node.deliver.dimse import Address, ask_storage
from node.deliver.peers import Destination
from node.deliver.service import deliver_until
from node.demo.pacs import Orthanc, free_port
from node.errors import DeliveryError
from node.outcome import what_peers_take
from node.report.kinds import LABELMAP_STORAGE, Kind, SegForm
from tests.deliver.test_dimse import storescp
from tests.running_node import wait_until

SEG_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"


def test_an_older_toolkit_takes_segmentations_and_no_label_maps(tmp_path: Path) -> None:
    with storescp(tmp_path) as address:
        accepted = ask_storage(address, [SEG_STORAGE, LABELMAP_STORAGE])
    assert accepted[SEG_STORAGE]
    assert accepted[LABELMAP_STORAGE] == ()


def test_check_names_the_class_that_a_peer_does_not_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    with storescp(tmp_path / "in") as address:
        file.write_text(
            f"""\
node:   {{storage: ./var, port: {free_port()}}}
peers:  {{old: {{ae_title: STORESCP, host: 127.0.0.1, port: {address.port}, seg: labelmap}}}}
models: {{path: .}}
routes: [{{name: all, when: {{}}, run: [lungs], send_to: [old], results: [seg, summary]}}]
"""
        )
        assert main(["check", "--json", "--config", str(file)]) == 1
    found = [finding["says"] for finding in json.loads(capsys.readouterr().out) if finding["what"] == "peer old"]
    assert found[1:] == [
        "does not accept Label Map Segmentation Storage, which a route sends it: enable that SOP class there"
    ]


def test_a_peer_that_does_not_answer_is_an_error() -> None:
    with pytest.raises(DeliveryError, match="no DICOM answer"):
        ask_storage(Address("DEAD", "127.0.0.1", free_port(), "RADNODE"), [SEG_STORAGE])


def test_the_delivering_process_asks_and_the_worker_knows(archive: Archive, tmp_path: Path) -> None:
    asks = (LABELMAP_STORAGE,)
    stop = threading.Event()
    orthanc = Orthanc(tmp_path / "orthanc", options={"UnknownSopClassAccepted": True})
    with storescp(tmp_path) as older, orthanc:
        peers = {
            "older": Destination(older, asks=asks),
            "newer": Destination(Address(orthanc.ae_title, "127.0.0.1", orthanc.port, "RADNODE"), asks=asks),
            "dead": Destination(Address("DEAD", "127.0.0.1", free_port(), "RADNODE"), asks=asks),
        }
        thread = threading.Thread(target=deliver_until, args=(stop, archive, peers))
        thread.start()
        try:
            wait_until(
                lambda: (
                    None not in [does_accept(archive.database, name, LABELMAP_STORAGE) for name in ("older", "newer")]
                ),
                30,
                "both have answered",
            )
        finally:
            stop.set()
            thread.join(30)
    taken = {name: does_accept(archive.database, name, LABELMAP_STORAGE) for name in peers}
    assert taken == {"older": False, "newer": True, "dead": None}
    config = Config.model_validate(
        {
            "node": {"storage": str(tmp_path)},
            "models": {"path": str(tmp_path)},
            "peers": {
                name: {"ae_title": name.upper(), "host": "127.0.0.1", "port": 104, "seg": seg, "results": ["seg"]}
                for name, seg in {"older": "auto", "newer": "auto", "dead": "auto", "asked": "fractional"}.items()
            },
        }
    )
    takes = what_peers_take(config, archive.database, ["older", "newer", "dead", "asked", "gone"])
    assert {name: its.form for name, its in takes.items()} == {
        "older": SegForm.BINARY,
        "newer": SegForm.LABELMAP,
        "dead": SegForm.BINARY,
        "asked": SegForm.FRACTIONAL,
        "gone": SegForm.BINARY,
    }
    assert takes["older"].has(Kind.SEG, (SegForm.BINARY,))
    assert not takes["older"].has(Kind.SR, ())
    assert not takes["newer"].has(Kind.SEG, (SegForm.BINARY,))


def test_a_newer_answer_counts(archive: Archive) -> None:
    assert does_accept(archive.database, "pacs", LABELMAP_STORAGE) is None
    note_accepted(archive.database, "pacs", {LABELMAP_STORAGE: ["1.2.840.10008.1.2.1"]})
    note_accepted(archive.database, "pacs", {LABELMAP_STORAGE: []})
    assert does_accept(archive.database, "pacs", LABELMAP_STORAGE) is False
