"""The life of a worker process: lease a job, run its model, make the results durable, give the lease back.

A heartbeat thread renews the lease. When the lease is lost, the job was cancelled or its time is up, the process ends
at once (nothing else stops a model that hangs in native code); the supervisor starts a fresh one and the queue says
what happens to the job.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from node.analyse import Analysis, analyse
from node.archive.records import Job, JobState
from node.archive.store import Archive
from node.config import Config
from node.dicom.assembly import InputPlan, assemble_volumes
from node.dicom.header import read_header
from node.dicom.selection import select_input
from node.errors import ArchiveError, InputRefused, ModelError, OutputRefused, RadnodeError
from node.infer.device import choose_device
from node.infer.model import Model, load_model
from node.infer.package import Package
from node.infer.shelf import PackageShelf
from node.queue import (
    LEASE_S,
    NewResult,
    WorkerId,
    claim_job,
    end_job,
    fail_attempt,
    finish_job,
    release_job,
    renew_lease,
)

_log = logging.getLogger(__name__)

POLL_S = 0.25
DRAIN_S = 120.0  # a job that runs when the node stops may take so long; then it is given back
EXIT_LOST = 70


def work_until(stop: threading.Event, archive: Archive, config: Config, *, ready: Callable[[], None]) -> None:
    """Run jobs until `stop` is set; the job that is running then is finished, or given back after `DRAIN_S`."""
    worker = WorkerId.mine()
    shelf = PackageShelf(config.models.paths, config.models.trusted)
    models = WarmModels(choose_device(config.workers.device))
    ready()
    while not stop.is_set():
        try:
            job = claim_job(archive.database, worker)
            if job is None:
                stop.wait(POLL_S)
                continue
            with _Heartbeat(archive, job, worker, stop, _timeout_s(shelf, job)):
                _run(archive, job, worker, shelf, models)
        except SQLAlchemyError as error:
            _log.error("work: database: %s", type(error).__name__)
            stop.wait(2.0)


class WarmModels:
    """Loaded models by digest; the one that was used last stays loaded."""

    def __init__(self, device: str):
        self.device = device
        self._digest = ""
        self._model: Model | None = None

    def get(self, package: Package) -> Model:
        """The package's model, loaded."""
        if self._model is None or self._digest != package.digest:
            if self._model is not None:
                self._model.close()
            self._model, self._digest = load_model(package, self.device), package.digest
        return self._model


def plan_inputs(package: Package, wanted: dict[str, list[str]], paths: dict[str, Path]) -> dict[str, InputPlan]:
    """The volumes and images of a job's inputs, assembled from exactly the instances that it names.

    `InputRefused` when one is gone.
    """
    plans: dict[str, InputPlan] = {}
    for name, uids in wanted.items():
        missing = [uid for uid in uids if uid not in paths]
        if missing:
            raise InputRefused(
                f"{len(missing)} of {len(uids)} instances are no longer in the archive: send the study again"
            )
        headers = {paths[uid]: read_header(paths[uid]) for uid in uids}
        plans[name] = select_input(assemble_volumes(headers), package.manifest.inputs[name]).plan
    return plans


def _run(archive: Archive, job: Job, worker: WorkerId, shelf: PackageShelf, models: WarmModels) -> None:
    """One attempt, and its end in the queue whatever happened."""
    database = archive.database
    try:
        package = shelf.get(job.model)
        if package.digest != job.model_digest:
            raise ModelError(
                f"package {job.model} changed since this job was made (version {job.model_version}, now "
                f"{package.version}): `radnode reprocess` makes a job for the new one"
            )
        wanted = sorted({uid for uids in job.inputs.values() for uid in uids})
        plans = plan_inputs(package, job.inputs, archive.instance_paths(wanted))
        created = datetime.fromtimestamp(job.created_at, UTC)
        analysis = analyse(package, models.get(package), plans, key=job.key, created=created)
        results = [_keep_result(archive, job, result) for result in analysis.results]
        rows = [row for measurement in analysis.measurements for row in measurement.rows()]
        if finish_job(database, job, worker, results, rows, _tell(analysis)):
            _log.info("job %d done: %s on %d instances, %s", job.id, job.model, len(wanted), _tell(analysis))
        else:
            _log.warning("job %d: the lease was lost, its results are not taken", job.id)
    except InputRefused as error:
        end_job(database, job, worker, JobState.REFUSED, str(error))
        _log.info("job %d refused: %s", job.id, error)
    except OutputRefused as error:
        end_job(database, job, worker, JobState.FAILED, str(error))
        _log.error("job %d failed: %s", job.id, error)
    except SQLAlchemyError:
        raise
    except ArchiveError as error:  # no room for the result: the next attempt may find some
        fail_attempt(database, job, worker, str(error))
        _log.error("job %d: %s", job.id, error)
    except RadnodeError as error:
        fail_attempt(database, job, worker, str(error))
        _log.error("job %d: attempt %d: %s", job.id, job.attempts, error)
    except Exception as error:  # the outermost loop of a worker: the attempt failed, the worker goes on
        fail_attempt(database, job, worker, f"{type(error).__name__} in radnode: see the log of the node")
        _log.exception("job %d: attempt %d", job.id, job.attempts)


def _keep_result(archive: Archive, job: Job, result) -> NewResult:
    relative = Path("results") / job.key[:2] / job.key / f"{result.kind}.dcm"
    encoded = result.encode()
    with archive.spool_file() as spooled:
        spooled.write(encoded)
        spooled.keep(archive.storage / relative)
    return NewResult(result.kind, result.sop_instance_uid, result.sop_class_uid, relative.as_posix(), len(encoded))


def _tell(analysis: Analysis) -> str:
    kinds = " and ".join(result.kind.upper() for result in analysis.results)
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in analysis.seconds.items())
    return f"{kinds} made ({times})"


def _timeout_s(shelf: PackageShelf, job: Job) -> float:
    package = shelf.look_up(job.model)
    return package.manifest.timeout_s if isinstance(package, Package) else 60.0


class _Heartbeat:
    """Renews a job's lease while the job runs, and ends the process when that is no longer this worker's business."""

    def __init__(self, archive: Archive, job: Job, worker: WorkerId, stop: threading.Event, timeout_s: float):
        self._archive, self._job, self._worker, self._stop = archive, job, worker, stop
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _beat(self) -> None:
        database, job, worker = self._archive.database, self._job, self._worker
        renew_at = time.monotonic() + LEASE_S / 3
        give_back_at: float | None = None
        lost_at = time.monotonic() + LEASE_S
        while not self._done.wait(0.5):
            now = time.monotonic()
            if now >= self._deadline:
                fail_attempt(
                    database, job, worker, f"it ran longer than {self._timeout_s:.0f} s (timeout_s in dicom.yaml)"
                )
                self._leave(f"job {job.id}: out of time")
            if self._stop.is_set():
                give_back_at = give_back_at or now + DRAIN_S
                if now >= give_back_at:
                    release_job(database, job, worker)
                    self._leave(f"job {job.id}: given back, the node stops")
            if now >= renew_at:
                try:
                    if not renew_lease(database, job, worker):
                        self._leave(f"job {job.id}: cancelled, or the lease was lost")
                    renew_at, lost_at = now + LEASE_S / 3, now + LEASE_S
                except SQLAlchemyError as error:
                    _log.error("job %d: lease not renewed: %s", job.id, type(error).__name__)
                    renew_at = now + 2.0
                    if now >= lost_at:
                        self._leave(f"job {job.id}: no database for {LEASE_S:.0f} s, the lease has run out")

    def _leave(self, why: str) -> None:
        if self._done.is_set():  # the job ended in this moment; nothing is to be stopped
            return
        _log.error("%s; this worker process ends", why)
        logging.shutdown()
        os._exit(EXIT_LOST)
