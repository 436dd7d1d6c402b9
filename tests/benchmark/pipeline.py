"""What the benchmarks of the whole chain share: a model that returns at once, studies to send, and the times that the
node's own database holds of them.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sqlalchemy import func, select

from node.archive import schema
from node.archive.database import Database
from node.archive.records import DeliveryState, JobState
from tests.dicom.slices import write_series
from tests.infer.tiny import MANIFEST, bundle_files, write
from tests.running_node import RunningNode

ROUTES = "[{name: all CT, when: {Modality: CT}, run: [marker], send_to: [pacs]}]"


@dataclass(frozen=True)
class Story:
    """When a study (or many) passed each stage: Unix seconds, of one clock."""

    received_at: float  # the first instance
    last_received_at: float
    routed_at: float  # the last was complete, and its jobs were queued
    started_at: float  # the last job
    finished_at: float
    delivered_at: float  # the last result
    job_story: str  # what the last job says of its stages


def make_package(folder: Path) -> Path:
    """A bundle `marker` that marks what is brighter than 500; its folder of models."""
    write(folder / "marker", bundle_files() | {"dicom.yaml": MANIFEST.encode()})
    return folder


def make_study(folder: Path, slices: int, rows: int, *, value: int = 1000, **values: str) -> Path:
    """A CT of noise with a ball of this value and a diameter of a third of its width; `values` are set by keyword."""
    array = np.random.default_rng(1).integers(-50, 50, (slices, rows, rows), np.int16)
    z, y, x = np.ogrid[:slices, :rows, :rows]
    ball = ((z - slices / 2) / slices) ** 2 + ((y - rows / 2) / rows) ** 2 + ((x - rows / 2) / rows) ** 2 < 1 / 36
    array[ball] = value
    write_series(folder, array, spacing_mm=(1.0, 0.7, 0.7), SliceThickness="1", **values)
    return folder


@contextlib.contextmanager
def running(
    folder: Path, pacs_port: int, models: Path, *, quiet: str, database: str = "sqlite", settings: str = ""
) -> Iterator[RunningNode]:
    """A whole node at work; `database` is as in its configuration."""
    folder.mkdir()
    node = RunningNode(folder, pacs_port, quiet=quiet, routes=ROUTES, models=models, database=database)
    node.config.write_text(node.config.read_text() + settings)
    node.start()
    try:
        yield node
        node.stop()
    finally:
        node.kill_all()


def send(node: RunningNode, folder: Path) -> None:
    """DCMTK sends everything below the folder over one association, quietly."""
    command = ["storescu", "-aec", "RADNODE", "--max-pdu", "131072", "-R", "+sd", "+r", "127.0.0.1", str(node.port)]
    done = subprocess.run(
        [*command, str(folder)], env=os.environ | {"TCP_NODELAY": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def cpu_seconds(node: RunningNode) -> dict[str, float]:
    """Processor time so far by role; that of a model's own process is counted with its worker."""
    spent = {}
    for role, process in node.processes().items():
        family = [process, *(process.children(recursive=True) if role != "supervisor" else [])]
        times = [one.cpu_times() for one in family]
        spent[role] = sum(each.user + each.system + each.children_user + each.children_system for each in times)
    return spent


def unfinished(database: Database, studies: int) -> str:
    """What is still to be done of `studies` studies with one job each; "" when all results are delivered."""
    with database.read() as connection:
        states = dict(connection.execute(select(schema.jobs.c.state, func.count()).group_by("state")).all())
        owed = connection.scalar(
            select(func.count())
            .select_from(schema.deliveries)
            .where(schema.deliveries.c.state == DeliveryState.PENDING)
        )
    wrong = {state: count for state, count in states.items() if state not in ("queued", "running", "done")}
    assert not wrong, f"jobs ended otherwise: {wrong}"
    done = states.get(JobState.DONE, 0)
    return "" if done == studies and not owed else f"{done} of {studies} jobs done, {owed} deliveries owed"


def story_of(database: Database) -> Story:
    """The times of all that is here, from the first to the last."""
    jobs, studies, deliveries = schema.jobs.c, schema.studies.c, schema.deliveries.c
    with database.read() as connection:
        first, last = connection.execute(
            select(func.min(studies.first_received_at), func.max(studies.last_received_at))
        ).one()
        routed, started, finished = connection.execute(
            select(func.max(jobs.created_at), func.max(jobs.started_at), func.max(jobs.finished_at))
        ).one()
        delivered = connection.scalar(select(func.max(deliveries.delivered_at)))
        said = connection.scalar(select(jobs.reason).order_by(jobs.id.desc()).limit(1))
    return Story(first, last, routed, started, finished, delivered, re.sub(r"\s+", " ", said))
