"""The life of a worker process: lease a job, run its model, make the results durable, give the lease back.

The model runs in a process of its own (`node.infer.hosted`). A heartbeat thread renews the lease. When the lease is
lost, the job was cancelled or its time is up, that process is killed and the worker goes on. A worker that does not
hear of it in `STUCK_S` ends itself; the supervisor starts a fresh one and the queue says what happens to the job.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from node.analyse import Analysis, analyse
from node.archive.records import Job, JobState
from node.archive.store import Archive
from node.config import Config
from node.dicom.assembly import InputPlan, assemble_volumes
from node.dicom.header import read_header
from node.dicom.naming import instances_of, narrow
from node.dicom.selection import select_input
from node.engine import open_models
from node.errors import ArchiveError, InputRefused, ModelError, OutputRefused, RadnodeError
from node.infer.hosted import LOAD_S, probe_protections
from node.infer.package import Package
from node.infer.shelf import PackageShelf
from node.infer.warm import Models
from node.outcome import keep_results, make_untold, previous_reports, wanted_of, what_peers_take, withdraw_replaced
from node.queue.leases import LEASE_S, claim_job, end_job, fail_attempt, finish_job, release_job, renew_lease
from node.queue.untold import claim_untold, drop_untold, finish_untold
from node.queue.workers import WorkerId
from node.wake import Bell, Room, ring

_log = logging.getLogger(__name__)

POLL_S = 0.25
DRAIN_S = 120.0  # a job that runs when the node stops may take so long; then it is given back
AROUND_S = LOAD_S + 600.0  # that radnode may take to load a model and read its input, and then for its results
STUCK_S = 30.0  # that a job may take to end after its model was killed
EXIT_LOST = 70


def work_until(stop: threading.Event, archive: Archive, config: Config, *, ready: Callable[[], None]) -> None:
    """Run jobs until `stop` is set; the job that is running then is finished, or given back after `DRAIN_S`."""
    worker = WorkerId.mine()
    shelf = PackageShelf(config.models.paths, config.models.trusted)
    models = open_models(config.workers)
    _tell_protections(models.device)
    bell = Bell(archive.storage, Room.WORK)
    ready()
    while not stop.is_set():
        try:
            # First what is quick: the peers of a job without a result wait for a sentence only.
            untold = claim_untold(archive.database, worker)
            if untold is not None:
                _tell_no_result(archive, config, untold, worker, shelf)
                continue
            if not models.ready(stop):
                continue
            job = claim_job(archive.database, worker)
            if job is None:
                bell.wait(stop, POLL_S)
                continue
            with _Heartbeat(archive, job, worker, stop, _timeout_s(shelf, job), models):
                _run(archive, config, job, worker, shelf, models)
            models.make_room()
        except SQLAlchemyError as error:
            _log.error("work: database: %s", type(error).__name__)
            stop.wait(2.0)
    bell.close()
    models.close()


def plan_inputs(package: Package, wanted: dict[str, list[str]], paths: dict[str, Path]) -> dict[str, InputPlan]:
    """The volumes and images of a job's inputs, assembled from exactly the instances and frames that it names.

    `paths` are those of the instances by their UIDs. `InputRefused` when one is gone, or when they make another volume
    than the one that was decided on.
    """
    plans: dict[str, InputPlan] = {}
    for input_name, names in wanted.items():
        uids = instances_of(names)
        missing = [uid for uid in uids if uid not in paths]
        if missing:
            raise InputRefused(
                f"{len(missing)} of {len(uids)} instances are no longer in the archive: send the study again"
            )
        assembly = assemble_volumes({paths[uid]: read_header(paths[uid]) for uid in uids})
        named = narrow(assembly, names)
        if not named.volumes and not named.images:
            why = "".join(f" ({refusal.sentence})" for refusal in assembly.refusals[:1])
            raise InputRefused(
                f"the job names {len(uids)} instances, and no input is made of exactly these and their frames that it "
                f"names{why}: `radnode reprocess` decides over the study again"
            )
        plans[input_name] = select_input(named, package.manifest.inputs[input_name]).plan
    return plans


def _run(archive: Archive, config: Config, job: Job, worker: WorkerId, shelf: PackageShelf, models: Models) -> None:
    """One attempt, and its end in the queue whatever happened."""
    database = archive.database
    try:
        package = _package_of(shelf, job)
        if package.digest != job.model_digest:
            raise ModelError(
                f"package {job.model} changed since this job was made (version {job.model_version}, now "
                f"{package.version}): `radnode reprocess` makes a job for the new one"
            )
        wanted = instances_of(name for names in job.inputs.values() for name in names)
        model = models.get(package)  # loads while the headers and voxels are read
        plans = plan_inputs(package, job.inputs, archive.instance_paths(wanted))
        created = datetime.fromtimestamp(job.created_at, UTC)
        takes = what_peers_take(config, database, job.send_to)
        analysis = analyse(
            package,
            model,
            plans,
            key=job.key,
            created=created,
            house=config.results.house,
            wanted=wanted_of(job, takes),
            previous=previous_reports(archive, job),
        )
        results = keep_results(archive, job, analysis.results, takes)
        rows = [row for measurement in analysis.measurements for row in measurement.rows()]
        if finish_job(database, job, worker, results, rows, _tell(analysis), analysis.seconds):
            ring(archive.storage, Room.DELIVER)
            _log.info("job %d done: %s on %d instances, %s", job.id, job.model, len(wanted), _tell(analysis))
            if config.results.withdraw_replaced:
                withdraw_replaced(archive, config, job)
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


def _package_of(shelf: PackageShelf, job: Job) -> Package:
    """The job's package. A job made without one stays refused when it is queued again: there is nothing to try anew."""
    if job.model_digest:
        return shelf.get(job.model)
    package = shelf.look_up(job.model)
    why = f"model package {job.model!r} was added later: `radnode reprocess` makes a job for it"
    raise InputRefused(str(package) if isinstance(package, RadnodeError) else why)


def _tell_no_result(archive: Archive, config: Config, job: Job, worker: WorkerId, shelf: PackageShelf) -> None:
    """Make what tells the peers that a job gave no result; when that cannot be made, the story says why."""
    package = shelf.look_up(job.model)
    try:
        results = make_untold(archive, config, job, package if isinstance(package, Package) else None)
        if finish_untold(archive.database, job, worker, results):
            ring(archive.storage, Room.DELIVER)
            _log.info("job %d: its peers are told that there is no result", job.id)
    except SQLAlchemyError:
        raise
    except ArchiveError as error:  # no room: it stays untold, and is tried again when the lease has run out
        _log.error("job %d: its peers are not told yet: %s", job.id, error)
    except RadnodeError as error:
        drop_untold(archive.database, job, worker, str(error))
        _log.error("job %d: its peers are not told: %s", job.id, error)
    except Exception as error:  # the outermost loop of a worker
        drop_untold(archive.database, job, worker, f"{type(error).__name__} in radnode: see the log of the node")
        _log.exception("job %d: its peers are not told", job.id)


def _tell(analysis: Analysis) -> str:
    counts = Counter(_name_series(result.name) for result in analysis.results)
    kinds = [name.upper() + (f" ({count})" if count > 1 else "") for name, count in counts.items()]
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in analysis.seconds.items())
    return "; ".join([f"{' and '.join(kinds)} made ({times})", *analysis.remarks])


def _name_series(name: str) -> str:
    """The name that the objects of one series share: that of overlay-001 is overlay."""
    series, _, number = name.rpartition("-")
    return series if number.isdecimal() else name


def _timeout_s(shelf: PackageShelf, job: Job) -> float:
    package = shelf.look_up(job.model)
    return package.manifest.timeout_s if isinstance(package, Package) else 60.0


def _tell_protections(device: str) -> None:
    """Log what holds for the models of this worker."""
    try:
        for protection in probe_protections(device):
            _log.log(logging.INFO if protection.holds else logging.WARNING, "models run with %s", protection)
    except ModelError as error:
        _log.error("work: %s", error)


class _Heartbeat:
    """Renews a job's lease while the job runs, and kills its model when that is no longer this worker's business.

    The package's `timeout_s` counts while its model runs; what radnode does before and after has `AROUND_S` each.
    """

    def __init__(
        self,
        archive: Archive,
        job: Job,
        worker: WorkerId,
        stop: threading.Event,
        timeout_s: float,
        models: Models,
    ):
        self._models = models
        self._archive, self._job, self._worker, self._stop = archive, job, worker, stop
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
        stuck_at: float | None = None  # the model was killed, the job should be over
        why = ""
        running, since = False, time.monotonic()
        while not self._done.wait(0.5):
            now = time.monotonic()
            if self._models.running != running:
                running, since = not running, now
            if stuck_at is not None:
                self._models.stop_last(why)  # the job may only now have come to ask for its model
                if now >= stuck_at:
                    sentence = "it did not end when its model was killed"
                    self._try(partial(fail_attempt, database, job, worker, sentence))
                    self._leave(f"job {job.id}: stuck")
                continue
            if now >= since + (self._timeout_s if running else AROUND_S):
                why = f"it took longer than {AROUND_S:.0f} s to load it and read its input, or to make its results"
                if running:
                    why = f"it ran longer than {self._timeout_s:.0f} s (timeout_s in dicom.yaml)"
                self._models.stop_last(why)
                stuck_at = now + STUCK_S
            if self._stop.is_set():
                give_back_at = give_back_at or now + DRAIN_S
                if now >= give_back_at:
                    self._try(partial(release_job, database, job, worker))
                    self._leave(f"job {job.id}: given back, the node stops")
            if now >= renew_at:
                try:
                    if not renew_lease(database, job, worker):
                        why = "the job was cancelled, or its lease was lost"
                        self._models.stop_last(why)
                        stuck_at = now + STUCK_S
                    renew_at, lost_at = now + LEASE_S / 3, now + LEASE_S
                except SQLAlchemyError as error:
                    _log.error("job %d: lease not renewed: %s", job.id, type(error).__name__)
                    renew_at = now + 2.0
                    if now >= lost_at:
                        self._leave(f"job {job.id}: no database for {LEASE_S:.0f} s, the lease has run out")

    def _try(self, step: Callable[[], None]) -> None:
        """What this thread does at its end must not end it before: without the database the lease runs out."""
        try:
            step()
        except SQLAlchemyError as error:
            _log.error("job %d: database: %s", self._job.id, type(error).__name__)

    def _leave(self, why: str) -> None:
        if self._done.is_set():  # the job ended in this moment; nothing is to be stopped
            return
        _log.error("%s; this worker process ends", why)
        logging.shutdown()
        os._exit(EXIT_LOST)
