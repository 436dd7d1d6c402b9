"""All kinds of results from one run to two destinations that take different ones, over real sockets."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

from node.demo.pacs import Orthanc
from node.report.kinds import LABELMAP_STORAGE
from tests.deliver.test_dimse import storescp
from tests.running_node import RunningNode, wait_until
from tests.test_chain import SIEMENS, study_uid_of
from tests.test_chain_outcomes import texts_in

SLICES = 30
MANIFEST = """\
title: Bone
adapter: torchscript
version: 1.2.0
intended_use: Tests.
licence_code: Apache-2.0
licence_weights: none
inputs: {image: {when: {Modality: CT}}}
segments: {1: {name: Bone, type: [SCT, 272673000, Bone]}}
probabilities: true
network: {file: models/bone.ts}
"""
ROUTES = """
  - name: everything
    when: {Modality: CT}
    run: [bone, not_installed]
    send_to: [pacs, old]
    results: [seg, sr, summary, overlay, map, keys, gsps, rtstruct]
"""
HOUSE = '{series_number: 7000, series_description: "KI {model} {version} {kind}", language: de}'
# What dciodvfy of 2022 says of an object class that is younger than it (docs/dicom-validity.md).
NO_LABELMAPS = re.compile(
    r"Information Object Not found|SegmentNumber not monotonically|ReferencedSegmentNumber.* not segm"
)


class Bone(torch.nn.Module):
    """Logits whose softmax crosses a half where the mean of a patch crosses 200 HU."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logit = (torch.nn.functional.avg_pool3d(image, (9, 9, 1), 1, (4, 4, 0)) - 200) / 100
        return torch.cat([-logit, logit], dim=1)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "bone"
    (folder / "models").mkdir(parents=True)
    torch.jit.script(Bone().eval()).save(str(folder / "models" / "bone.ts"))
    (folder / "dicom.yaml").write_text(MANIFEST)
    return folder.parent


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Orthanc]:
    """A PACS that takes label maps, and an object that comes again in the place of the one that it has."""
    with Orthanc(tmp_path / "pacs", options={"UnknownSopClassAccepted": True, "OverwriteInstances": True}) as running:
        yield running


def series_of(datasets: list[Dataset]) -> Counter[tuple[int, str, str]]:
    return Counter((int(each.SeriesNumber), str(each.Modality), str(each.SeriesDescription)) for each in datasets)


def own_errors(file: Path) -> list[str]:
    done = subprocess.run(["dciodvfy", "-new", str(file)], capture_output=True, text=True, timeout=60, check=False)
    said = (done.stdout + done.stderr).splitlines()
    errors = [line for line in said if line.startswith("Error")]
    assert said, "dciodvfy names at least the object that it looked at"
    return [line for line in errors if not ("labelmap" in file.name and NO_LABELMAPS.search(line))]


def test_each_destination_gets_its_kinds_once(tmp_path: Path, models: Path, pacs: Orthanc, shared_data: Path) -> None:
    received = tmp_path / "old"
    with storescp(received) as old:
        node = RunningNode(
            tmp_path,
            pacs.port,
            routes=ROUTES,
            models=models,
            pacs=", seg: auto, compression: lossless",
            peers=f"  old:    {{ae_title: STORESCP, host: 127.0.0.1, port: {old.port}, results: [summary, overlay]}}",
            results=HOUSE,
        )
        node.start()
        try:
            study_uid = study_uid_of(shared_data / SIEMENS)
            node.send(shared_data / SIEMENS / "soft_kernel_B40f")
            shown = settled(node, study_uid)
            held = list(pacs.instances(study_uid).values())
            check_what_arrived(held, [dcmread(file) for file in received.iterdir()])
            (made,) = [job["reason"] for job in shown["jobs"] if job["state"] == "done"]
            pages = f"SUMMARY and OVERLAY ({SLICES})"
            assert made.startswith(
                f"SEG-LABELMAP and SR-LABELMAP and {pages} and MAP and KEYS and GSPS and RTSTRUCT made"
            )
            results = {file: file.read_bytes() for file in (node.folder / "var" / "results").rglob("*.dcm")}
            assert len(results) == len(held)
            assert {file.name: errors for file in results if (errors := own_errors(file))} == {}

            arrived = {file: file.read_bytes() for file in received.iterdir()}
            for file in received.iterdir():
                file.unlink()
            node.command("reprocess", "--study", study_uid)
            assert settled(node, study_uid)["jobs"] != shown["jobs"], "they ran again"
            assert {file: file.read_bytes() for file in results} == results
            assert {file: file.read_bytes() for file in received.iterdir()} == arrived
            assert series_of(list(pacs.instances(study_uid).values())) == series_of(held)
        finally:
            node.kill_all()


def settled(node: RunningNode, study_uid: str) -> dict[str, Any]:
    """The story when the one job is done, the other refused, and all that is owed was delivered."""
    shown: dict[str, Any] = {}

    def is_settled() -> bool:
        nonlocal shown
        done = node.command("studies", "show", study_uid, "--json", check=False)
        shown = json.loads(done.stdout) if done.returncode == 0 else {}
        states = sorted(job["state"] for job in shown.get("jobs", ()))
        delivered = {delivery["state"] for delivery in shown.get("deliveries", ())} == {"delivered"}
        told = sum("told as no-result" in event["what"] for event in shown.get("events", ()))
        asked = sum("not_installed refused" in event["what"] for event in shown.get("events", ()))
        return states == ["done", "refused"] and delivered and told >= asked >= 1

    wait_until(is_settled, 180, f"all is done and delivered: {shown.get('jobs')}")
    return shown


def check_what_arrived(at_pacs: list[Dataset], at_old: list[Dataset]) -> None:
    pages = {
        (7002, "OT", "KI bone 1.2.0 summary"): 1,
        (7002, "OT", "failed: KI not_installed summary"): 1,
        (7003, "OT", "KI bone 1.2.0 overlay"): SLICES,
    }
    assert series_of(at_old) == pages
    assert series_of(at_pacs) == pages | {
        (7000, "SEG", "KI bone 1.2.0 seg"): 1,
        (7001, "SR", "KI bone 1.2.0 sr"): 1,
        (7001, "SR", "failed: KI not_installed sr"): 1,
        (7004, "OT", "KI bone 1.2.0 map"): 1,
        (7005, "KO", "KI bone 1.2.0 keys"): 1,
        (7006, "PR", "KI bone 1.2.0 gsps"): 1,
        (7007, "RTSTRUCT", "KI bone 1.2.0 rtstruct"): 1,
    }
    (seg,) = [each for each in at_pacs if each.Modality == "SEG"]
    assert seg.SOPClassUID == LABELMAP_STORAGE
    assert seg.file_meta.TransferSyntaxUID == RLELossless
    (told,) = [each for each in at_pacs if each.SeriesDescription == "failed: KI not_installed sr"]
    (why,) = [text for text in texts_in(told) if text.startswith("failed: ")]
    assert "is not installed" in why
    assert "/" not in why, "where packages lie is nobody's business at the PACS"
