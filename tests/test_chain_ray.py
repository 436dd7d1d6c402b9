"""A whole node whose models run in a Ray cluster: two machines on loopback, one of which is lost mid-job."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.demo.pacs import Orthanc
from tests.chaos import make_studies
from tests.infer.tiny import MANIFEST, bundle_files, write
from tests.ray_cluster import SmallCluster, processes_with, wait_for_end
from tests.running_node import RunningNode, wait_until
from tests.test_chain import SEG, SR, results_in

NETWORK = b"""\
import time

import torch


class Threshold(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.limit = torch.nn.Parameter(torch.tensor(1e9))

    def forward(self, image):
        time.sleep(10)  # long enough to lose the machine meanwhile
        return (image > self.limit).to(torch.float32)
"""


@pytest.mark.timeout(600)
def test_a_machine_that_is_lost_mid_job_costs_one_attempt(tmp_path: Path) -> None:
    (study_uid, folder), *_ = make_studies(tmp_path / "studies", 1).items()
    files = bundle_files() | {"scripts/net.py": NETWORK, "dicom.yaml": MANIFEST.encode()}
    marker = write(tmp_path / "models" / "marker", files)
    with SmallCluster() as cluster, Orthanc(tmp_path / "orthanc") as pacs:
        cluster.add()
        cluster.add()
        node = RunningNode(
            tmp_path,
            pacs.port,
            models=tmp_path / "models",
            routes="[{name: CT, when: {Modality: CT}, run: [marker], send_to: [pacs]}]",
            workers=f"{{engine: ray, address: '{cluster.address}', gpus: 0}}",
        )
        node.start()
        try:
            first = _machine_of_the_slot(node, 1)
            node.send(folder)
            wait_until(lambda: bool(_models(marker)), 90, "the model's process runs")
            wait_until(lambda: [job["state"] for job in node.json("jobs", "list")] == ["running"], 60, "the job runs")
            cluster.lose(cluster.machine_at(first))
            shown = node.wait_for(study_uid, "done", patience_s=240)
            assert set(results_in(pacs, study_uid)) == {SEG, SR}
            assert _machine_of_the_slot(node, 2) != first
            story = " / ".join(event["what"] for event in shown["events"])
            assert f"({first}) that ran it was lost" in story, story
            assert "attempt 2 started" in story
            assert node.stop() == 0
            wait_for_end(str(marker))
        finally:
            node.kill_all()


def _models(package: Path) -> list[int]:
    return [process.pid for process in processes_with(str(package))]


def _machine_of_the_slot(node: RunningNode, number: int) -> str:
    """The address of the machine on which the worker's slot is, the first, the second, ... that it had."""

    def told() -> list[str]:
        lines = [line for line in node.log.read_text().splitlines() if " slot on " in line]
        return [line.partition("(")[2].partition(")")[0] for line in lines]

    wait_until(lambda: len(told()) >= number, 120, f"slot {number} is told")
    return told()[number - 1]
