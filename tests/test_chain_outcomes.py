"""What reaches the PACS beside a result: that there is none and why, and that a result is taken back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from node.demo.pacs import Orthanc
from tests.report.readers import items
from tests.running_node import RunningNode
from tests.test_chain import SEG, SIEMENS, SR, results_in, study_uid_of

KEY_OBJECTS = "1.2.840.10008.5.1.4.1.1.88.59"
ROUTES = (
    "[{name: everything, when: {}, run: [ct_lung_reference], send_to: [pacs], results: [seg, sr, keys]},"
    " {name: absent, when: {Modality: MR}, run: [not_installed], send_to: [pacs], tell_no_result: false}]"
)


@pytest.fixture
def node(tmp_path: Path, pacs: Orthanc) -> Iterator[RunningNode]:
    running = RunningNode(tmp_path, pacs.port, routes=ROUTES)
    running.start()
    yield running
    running.kill_all()


def texts_in(document: Dataset) -> list[str]:
    return [str(item.TextValue) for item in items(document) if "TextValue" in item]


def test_a_study_that_is_refused_is_told_to_the_pacs(node: RunningNode, pacs: Orthanc, shared_data: Path) -> None:
    folder = shared_data / "compressed" / "mr_rle"
    study_uid = study_uid_of(folder)
    node.send(folder, options=["-xr"])
    shown = node.wait_for(study_uid, "refused")
    reasons = {job["model"].split()[0]: job["reason"] for job in shown["jobs"]}
    assert set(reasons) == {"ct_lung_reference", "not_installed"}
    ((sop_class, report),) = results_in(pacs, study_uid).items()  # and nothing of the route that keeps silent
    assert sop_class == SR
    assert reasons["ct_lung_reference"].startswith("not applicable: series ")
    assert reasons["ct_lung_reference"] in texts_in(report)  # which says 'not applicable' once
    assert report.SeriesDescription == "not applicable: AI unverified: ct_lung_reference 0.1.0"
    assert "Modality" in reasons["ct_lung_reference"]
    story = " / ".join(event["what"] for event in shown["events"])
    assert "ct_lung_reference: told as no-result" in story


def test_withdrawn_results_are_rejected_at_the_pacs(node: RunningNode, pacs: Orthanc, shared_data: Path) -> None:
    study_uid = study_uid_of(shared_data / SIEMENS)
    node.send(shared_data / SIEMENS / "soft_kernel_B40f")
    shown = node.wait_for(study_uid, "done")
    made = results_in(pacs, study_uid)
    assert set(made) == {SEG, SR, KEY_OBJECTS}
    (job,) = shown["jobs"]
    said = node.command("jobs", "withdraw", str(job["job"]), "--reason", "safety", "--comment", "wrong side").stdout
    assert "to be told: pacs" in said
    shown = node.wait_for(study_uid, "withdrawn")
    assert "wrong side" in shown["reason"]
    (note,) = [
        dataset
        for dataset in pacs.instances(study_uid).values()
        if dataset.SOPClassUID == KEY_OBJECTS and dataset.SOPInstanceUID != made[KEY_OBJECTS].SOPInstanceUID
    ]
    assert note.ConceptNameCodeSequence[0].CodeMeaning == "Rejected for Patient Safety Reasons"
    rejected = {
        str(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
        for item in items(note)
        if "ReferencedSOPSequence" in item
    }
    assert rejected == {str(dataset.SOPInstanceUID) for dataset in made.values()}
    again = node.command("jobs", "retry", str(job["job"]), check=False)
    assert again.returncode == 1
    assert "withdrawn" in again.stderr
