"""A node under fire: studies come in while kill -9 hits one of its processes every other second."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from pydicom import dcmread
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError

from node.archive import schema
from node.archive.database import Database
from node.archive.open import open_archive
from node.archive.records import DeliveryState, JobState, StudyState
from node.config import load_config
from node.demo.pacs import Orthanc
from node.dicom.naming import instances_of
from node.queue.jobs import job_results, list_jobs
from tests.benchmark.pipeline import ROUTES, make_package, make_study
from tests.running_node import RunningNode, wait_until

EVERY_S = 2.0
# Short, as a scheduler must live for so long to route anything. So a transfer that was cut may go on too late, in a
# study that was routed: it then has a second job, of the whole study, whose results replace those of the first.
QUIET = "3s"
IMAGES = 5  # of a study


@dataclass
class Fire:
    """What was killed, and what came back."""

    killed: Counter[str] = field(default_factory=Counter)
    studies: int = 0
    resent: int = 0  # transfers that were cut or refused, and that were sent again


def make_studies(folder: Path, count: int) -> dict[str, Path]:
    """Small CT in a folder each: Study Instance UID to folder."""
    folders = [make_study(folder / f"{number:04d}", IMAGES, 64) for number in range(count)]
    return {str(dcmread(next(each.iterdir()), stop_before_pixels=True).StudyInstanceUID): each for each in folders}


def fast_node(folder: Path, pacs_port: int, *, database: str, quiet: str = QUIET) -> RunningNode:
    """A node whose one model returns at once."""
    return RunningNode(
        folder, pacs_port, quiet=quiet, database=database, routes=ROUTES, models=make_package(folder / "models")
    )


def under_fire(
    node: RunningNode,
    folders: Sequence[Path],
    seconds: float,
    *,
    seed: int,
    half_way: Callable[[], None] = lambda: None,
) -> Fire:
    """Send the studies, and for `seconds` kill a random process of the node every `EVERY_S`: its roles, their
    supervisor, and whatever these started. The node runs at the end. `half_way` happens in the middle.

    A supervisor that is killed is started again when its children have gone, as systemd does; meanwhile these are shot
    at.
    """
    fire = Fire(studies=len(folders))
    over = threading.Event()
    sender = threading.Thread(target=_send_all, args=(node, folders, fire, over), name="sender")
    sender.start()
    try:
        dice = random.Random(seed)
        begin = time.monotonic()
        while (passed := time.monotonic() - begin) < seconds:
            until = time.monotonic() + EVERY_S
            while time.monotonic() < until:
                time.sleep(0.1)
                _revive(node)
            _kill_one(node, dice, fire)
            if passed < seconds / 2 <= time.monotonic() - begin:
                half_way()
        if not _revive(node):
            wait_until(lambda: _revive(node), 180, "the children of a killed supervisor end")
        node.wait_ready()
        sender.join(900)
        assert not sender.is_alive(), f"the studies were not taken after the fire\n{_log_of(node)}"
    finally:
        over.set()
        sender.join()
    return fire


def wait_for_results(node: RunningNode, studies: int, patience_s: float) -> None:
    """Until every study is here and routed, all jobs are done and all results delivered.

    What ended otherwise fails at once, with its reason.
    """
    with closing(Database(load_config(node.config).database_url)) as database:
        left = ""

        def all_done() -> bool:
            nonlocal left
            with suppress(OperationalError):  # the server restarts
                left = _unfinished(database, studies)
            return not left

        try:
            wait_until(all_done, patience_s, f"all results of {studies} studies")
        except AssertionError as error:
            raise AssertionError(f"{error}: {left}\n{_log_of(node)}") from None


def check_results(node: RunningNode, pacs: Orthanc, studies: Collection[str]) -> int:
    """Fail unless the last job of every study is on all of its images and has one SEG and one SR, and the PACS holds
    exactly what the jobs made; how many studies had an earlier job, their transfer having been cut and taken up again
    after they were routed.
    """
    earlier = 0
    with closing(open_archive(load_config(node.config))) as archive:
        for study_uid in studies:
            study = archive.study(study_uid)
            jobs = [job for job, _ in list_jobs(archive.database, study_id=study.id, limit=None)]
            assert len(jobs) == 1 or study.revision > 1, f"{len(jobs)} jobs of {study_uid}"
            assert len(instances_of(jobs[0].inputs["image"])) == study.instances == IMAGES
            results = [job_results(archive.database, job.id) for job in jobs]
            assert Counter(result.kind for result in results[0]) == {"seg": 1, "sr": 1}
            assert set(pacs.instances(study_uid)) == {each.sop_instance_uid for of_job in results for each in of_job}
            earlier += len(jobs) > 1
    return earlier


def _is_wrong(state: str, inputs: dict[str, list[str]]) -> bool:
    """Whether a job ended as none should. Of a part of a study there may be no volume."""
    if state == JobState.REFUSED:
        return len(instances_of(name for names in inputs.values() for name in names)) == IMAGES
    return state not in (JobState.QUEUED, JobState.RUNNING, JobState.DONE)


def _unfinished(database: Database, studies: int) -> str:
    """What is still to be done; "" when nothing is."""
    columns, jobs, deliveries = schema.studies.c, schema.jobs.c, schema.deliveries.c
    with database.read() as connection:
        images = connection.scalar(select(func.sum(columns.instances)))
        in_state = dict(connection.execute(select(columns.state, func.count()).group_by(columns.state)).all())
        untold = connection.scalar(select(func.count()).where(jobs.untold))
        jobs_in = dict(connection.execute(select(jobs.state, func.count()).group_by(jobs.state)).all())
        owed = dict(connection.execute(select(deliveries.state, func.count()).group_by(deliveries.state)).all())
        bad = [
            *connection.execute(
                select(columns.study_uid, columns.state, columns.reason).where(
                    columns.state.in_([StudyState.UNWANTED, StudyState.QUARANTINED])
                )
            ),
            *(
                (row.id, row.state, row.reason)
                for row in connection.execute(select(jobs.id, jobs.state, jobs.reason, jobs.inputs))
                if _is_wrong(row.state, row.inputs)
            ),
            *connection.execute(
                select(deliveries.id, deliveries.state, deliveries.reason).where(
                    deliveries.state == DeliveryState.FAILED
                )
            ),
        ]
    assert not bad, f"{len(bad)} ended otherwise: {[tuple(row) for row in bad[:5]]}"
    if (
        in_state == {StudyState.ROUTED: studies}
        and set(jobs_in) <= {JobState.DONE, JobState.REFUSED}
        and images == IMAGES * studies
    ):
        return f"{owed}, {untold} to be told" if owed.get(DeliveryState.PENDING) or untold else ""
    return f"{images} images, studies {in_state}, jobs {jobs_in}, deliveries {owed}"


def _kill_one(node: RunningNode, dice: random.Random, fire: Fire) -> None:
    family = node.family()
    if {name for name, _ in family.values()} <= {
        "supervisor"
    }:  # it has only begun; systemd too waits before it tries again
        return
    pid = dice.choice(sorted(family))
    name, process = family[pid]
    with suppress(psutil.NoSuchProcess):
        process.kill()
        fire.killed[name] += 1
    if name == "supervisor" and node.process is not None:
        node.process.wait(30)


def _revive(node: RunningNode) -> bool:
    """Start a supervisor that was killed and whose children have gone; whether one runs."""
    if node.process is not None and node.process.poll() is not None:
        node.process = None
    if node.process is None and not node.processes():
        node.launch()
    return node.process is not None


def _send_all(node: RunningNode, folders: Sequence[Path], fire: Fire, over: threading.Event) -> None:
    """As a modality does: what was not taken is sent again, until it is."""
    for folder in folders:
        while not over.is_set() and not _send(node, folder):
            fire.resent += 1
            over.wait(0.5)


def _send(node: RunningNode, folder: Path) -> bool:
    command = ["storescu", "-aec", "RADNODE", "--timeout", "5", "-R", "+sd", "127.0.0.1", str(node.port), str(folder)]
    done = subprocess.run(command, env=os.environ | {"TCP_NODELAY": "1"}, capture_output=True, timeout=300, check=False)
    return done.returncode == 0


def _log_of(node: RunningNode) -> str:
    return node.log.read_text(errors="replace")[-6000:]
