"""A study or a model that is the end of whatever runs it costs its own attempts, and nobody else's work."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from node.archive.open import open_archive
from node.archive.records import JobState
from node.archive.store import Archive
from node.config import load_config
from node.demo.pacs import Orthanc
from node.queue.jobs import list_jobs
from node.queue.workers import WorkerId
from tests.misbehaving import TIMEOUT_S, Sign, make_signed, misbehaving_node
from tests.running_node import RunningNode, wait_until
from tests.test_chain import SEG, SR, results_in

GIVEN_UP = {
    "crash": "attempt 3 of 3 failed: model marker: its process crashed (SIGSEGV)",
    "hang": f"attempt 3 of 3 failed: model marker: it ran longer than {TIMEOUT_S} s (timeout_s in dicom.yaml)",
    "memory": "attempt 3 of 3 failed: model marker could not run: out of memory",
    "killed": "attempt 3 of 3 failed: its worker died",
    "nan": "attempt 3 of 3 failed: the weights of bundle not_a_number have values in limit that are not finite",
}


@pytest.mark.timeout(400)
def test_what_kills_or_hangs_is_set_aside_and_the_rest_is_done(tmp_path: Path) -> None:
    with Orthanc(tmp_path / "orthanc") as pacs:
        node = misbehaving_node(tmp_path, pacs.port)
        wrong = {
            "crash": make_signed(tmp_path / "studies" / "crash", Sign.CRASH),
            "hang": make_signed(tmp_path / "studies" / "hang", Sign.HANG),
            "memory": make_signed(tmp_path / "studies" / "memory", Sign.MEMORY),
            "killed": make_signed(tmp_path / "studies" / "killed", Sign.SLOW),
            "nan": make_signed(tmp_path / "studies" / "nan", Sign.FINE, description="other"),
        }
        fine = [make_signed(tmp_path / "studies" / f"fine-{number}", Sign.FINE) for number in range(8)]
        over = threading.Event()
        node.start()
        with closing(open_archive(load_config(node.config))) as archive:
            killer = threading.Thread(target=kill_workers_of, args=(archive, wrong["killed"], over))
            killer.start()
            try:
                node.send(tmp_path / "studies")
                wait_until(lambda: all_settled(archive, len(wrong) + len(fine)), 300, "every job has ended")
                shown = {job["study"]: job for job in node.json("jobs", "list")}
                for name, study_uid in wrong.items():
                    assert shown[study_uid]["state"] == "quarantined", shown[study_uid]
                    assert GIVEN_UP[name] in shown[study_uid]["reason"]
                    assert shown[study_uid]["attempts"] == 3
                for study_uid in fine:
                    assert node.wait_for(study_uid, "done")
                    assert set(results_in(pacs, study_uid)) == {SEG, SR}
                check_told(node, pacs, wrong)
            finally:
                over.set()
                killer.join()
                node.kill_all()


def check_told(node: RunningNode, pacs: Orthanc, wrong: dict[str, str]) -> None:
    """The PACS hears of each that there is no result, in one report."""
    for study_uid in wrong.values():
        wait_until(lambda study_uid=study_uid: len(pacs.instances(study_uid)) == 1, 60, "it is told")
        (report,) = pacs.instances(study_uid).values()
        assert report.SOPClassUID in (SR, "1.2.840.10008.5.1.4.1.1.88.11", "1.2.840.10008.5.1.4.1.1.88.22")


def kill_workers_of(archive: Archive, study_uid: str, over: threading.Event) -> None:
    """kill -9 of every worker that runs the job of this study."""
    killed: set[Any] = set()
    while not over.wait(0.1):
        for job, of in list_jobs(archive.database, states=[JobState.RUNNING]):
            if of == study_uid and job.lease_owner is not None and job.lease_owner not in killed:
                killed.add(job.lease_owner)
                with suppress(ProcessLookupError):
                    os.kill(WorkerId.parse(job.lease_owner).pid, signal.SIGKILL)


def all_settled(archive: Archive, count: int) -> bool:
    states = [job.state for job, _ in list_jobs(archive.database)]
    return len(states) == count and not {JobState.QUEUED, JobState.RUNNING} & set(states)
