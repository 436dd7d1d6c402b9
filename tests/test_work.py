"""The life of a worker: what its heartbeat does with a job that must end while the database is away."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from node.work import EXIT_LOST

# A worker in a process of its own, as it ends itself. Its job never ends and asks for no model.
WORKER = """
import sys, threading, time
from pathlib import Path
from sqlalchemy import insert, text
from node import work
from node.queue.jobs import NewJob, add_job
from node.queue.leases import claim_job
from node.infer.warm import WarmModels
from node.queue.workers import WorkerId
from node.archive import schema
from node.archive.records import StudyState
from node.archive.store import Archive

work.STUCK_S = work.DRAIN_S = 0.0
archive = Archive(Path(sys.argv[1]), f"sqlite:///{sys.argv[1]}/radnode.sqlite")
with archive.database.write() as connection:
    study = dict(study_uid="1.2", state=StudyState.ROUTED, instances=1, first_received_at=0.0, last_received_at=0.0)
    study_id = connection.scalar(insert(schema.studies).values(**study).returning(schema.studies.c.id))
    job = NewJob("chest", "lungs", "1.0", "d" * 64, {"image": ("1.1",)}, ())
    add_job(connection, study_id, "1.2", 1, job, time.time())
worker = WorkerId.mine()
job = claim_job(archive.database, worker)
with archive.database.write() as connection:
    connection.execute(text("ALTER TABLE jobs RENAME TO gone"))
stop = threading.Event()
timeout_s = 600.0

class Asked:  # a model that was asked for, as far as a heartbeat looks at it
    running = sys.argv[2] == "runs too long"
    stop = staticmethod(print)

match sys.argv[2]:
    case "stops":
        stop.set()
    case "stuck":
        work.AROUND_S = 0.0
    case "reads" | "runs too long":
        timeout_s = 0.0
models = WarmModels("cpu", memory_bytes=None, warm_bytes=0)
models._asked = Asked
with work._Heartbeat(archive, job, worker, stop, timeout_s, models):
    time.sleep(2 if sys.argv[2] == "reads" else 30)
"""


def ends_with(folder: Path, why: str) -> tuple[int, str]:
    argv = [sys.executable, "-c", WORKER, str(folder), why]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1], check=False)
    return ended.returncode, ended.stdout + ended.stderr


def test_a_job_that_is_stuck_ends_the_worker_without_its_database(tmp_path: Path) -> None:
    code, said = ends_with(tmp_path, "stuck")
    assert code == EXIT_LOST, said
    assert "job 1: stuck" in said


def test_a_model_that_runs_too_long_is_stopped_by_the_time_in_its_manifest(tmp_path: Path) -> None:
    code, said = ends_with(tmp_path, "runs too long")
    assert code == EXIT_LOST, said
    assert "it ran longer than 0 s (timeout_s in dicom.yaml)" in said


def test_loading_a_model_and_reading_a_study_are_not_its_run(tmp_path: Path) -> None:
    """`timeout_s` is long over, and nobody minds."""
    code, said = ends_with(tmp_path, "reads")
    assert (code, said) == (0, "")


def test_a_node_that_stops_waits_for_no_job_without_its_database(tmp_path: Path) -> None:
    code, said = ends_with(tmp_path, "stops")
    assert code == EXIT_LOST, said
    assert "given back" in said
