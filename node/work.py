"""The life of a worker process: lease a job, run its model, make the results durable, give the lease back.

The model runs in a process of its own (`node.infer.hosted`). While it does, the images of the job that is probably next
are read (`node.read_ahead`), and the results of the one before are measured, made and kept: up to three jobs are on
their way, of which one has the model. Each has a heartbeat (`node.heartbeat`) and ends by itself.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from node import memory
from node.analyse import Analysis, Run, read_sources, report, run_model
from node.archive.records import Job, JobState
from node.archive.store import Archive
from node.config import Config
from node.dicom.assembly import InputPlan, assemble_volumes, shape_of
from node.dicom.header import read_header
from node.dicom.naming import instances_of, narrow
from node.dicom.selection import select_input
from node.engine import open_models
from node.errors import ArchiveError, InputRefused, ModelError, OutputRefused, RadnodeError
from node.heartbeat import Heartbeat
from node.infer.hosted import probe_protections
from node.infer.package import Package
from node.infer.packagings import Adapter
from node.infer.shelf import PackageShelf
from node.infer.warm import Models
from node.outcome import keep_results, make_untold, previous_reports, wanted_of, what_peers_take, withdraw_replaced
from node.queue.leases import claim_job, claim_to_read, end_job, fail_attempt, finish_job, give_back_read
from node.queue.untold import claim_untold, drop_untold, finish_untold
from node.queue.workers import WorkerId
from node.read_ahead import Inputs, ReadAhead
from node.report.kinds import Takes, Wanted
from node.wake import Bell, Room, ring

_log = logging.getLogger(__name__)

POLL_S = 0.25
MOST_BESIDE = 20  # jobs in a row that start while results are made: then one that failed before may have its turn


def work_until(stop: threading.Event, archive: Archive, config: Config, *, ready: Callable[[], None]) -> None:
    """Run jobs until `stop` is set; what is on its way then is finished, or given back after `heartbeat.DRAIN_S`."""
    models = open_models(config.workers)
    _tell_protections(models.device)
    worker = Worker(stop, archive, config, models)
    bell = Bell(archive.storage, Room.WORK)
    memory.keep_freed()
    ready()
    while not stop.is_set():
        try:
            if not worker.do_next():
                worker.rest()
                bell.wait(stop, POLL_S)
        except SQLAlchemyError as error:
            _log.error("work: database: %s", type(error).__name__)
            stop.wait(2.0)
    worker.close()
    bell.close()
    models.close()


@dataclass(frozen=True)
class _Attempt:
    """A job that this worker holds."""

    job: Job
    package: Package
    takes: Mapping[str, Takes]  # what each of its peers gets
    wanted: Wanted


class Worker:
    """Runs one job's model at a time."""

    def __init__(self, stop: threading.Event, archive: Archive, config: Config, models: Models):
        """It works until `stop` is set by whoever calls it."""
        self._stop, self._archive, self._config, self._models = stop, archive, config, models
        self._id = WorkerId.mine()
        self._shelf = PackageShelf(config.models.paths, config.models.trusted)
        self._ahead = ReadAhead(self._claim_to_read, self._read_ahead)
        self._reporter = ThreadPoolExecutor(1, thread_name_prefix="report")
        self._reporting: Future[None] | None = None
        self._beside = 0  # how many jobs in a row were looked for while results were made
        self._worked_at: float | None = None  # when the last job's model ended; None once what it left was given back

    def do_next(self) -> bool:
        """Take the next piece of work, or wait for a place to do it; False when there is none."""
        # First what is quick: the peers of a job without a result wait for a sentence only.
        untold = claim_untold(self._archive.database, self._id)
        if untold is not None:
            _tell_no_result(self._archive, self._config, untold, self._id, self._shelf)
            return True
        if not self._models.ready(self._stop):
            return True
        # While results are made, none that failed before: if it killed this worker, they would go with it.
        self._beside = self._beside + 1 if self._reporting is not None and not self._reporting.done() else 0
        if self._beside > MOST_BESIDE:
            self._wait_for_report()
            self._beside = 0
        alone = not self._beside
        job = claim_job(
            self._archive.database, self._id, loaded=self._models.names, read=self._ahead.job_id, alone=alone
        )
        if job is None:
            self._ahead.forget()
            return False
        self._attempt(job)
        self._worked_at = monotonic()
        self._models.make_room()
        return True

    def rest(self) -> None:
        """There is nothing to do: after a while the memory that is kept for the next study is given back."""
        if self._worked_at is not None and monotonic() > self._worked_at + memory.IDLE_S:
            memory.give_back()
            self._worked_at = None

    def close(self) -> None:
        """Wait for the results that are being made."""
        self._reporter.shutdown()

    def _attempt(self, job: Job) -> None:
        """Run a job's model and hand what it said to the reporting thread.

        One that failed before is alone here: if it kills this worker, no other job pays with it.
        """
        alone = job.attempts > 1
        beat = self._heartbeat(job)
        handed_over = False
        try:
            with self._ending(job):
                attempt = self._begin(job)
                model = self._models.get(attempt.package)  # loads while the headers and voxels are read
                beat.watch(model)
                inputs = self._ahead.take(job) or self._read(attempt)
                assert inputs is not None  # without a limit it is read
                with nullcontext() if alone else self._ahead.meanwhile():
                    run = run_model(
                        attempt.package, model, inputs.plans, inputs.sources, key=job.key, wanted=attempt.wanted
                    )
                    beat.let_go()
                    run = replace(run, seconds={"read": inputs.seconds} | run.seconds)
                    del inputs  # the results are made of less
                    self._wait_for_report()  # one at a time: each holds a study
                    self._reporting = self._reporter.submit(self._report, attempt, run, beat)
                    handed_over = True
            if alone:
                self._wait_for_report()
        finally:
            if not handed_over:
                beat.end()

    def _wait_for_report(self) -> None:
        if self._reporting is not None:
            self._reporting.result()

    def _begin(self, job: Job) -> _Attempt:
        package = _package_of(self._shelf, job)
        if package.digest != job.model_digest:
            raise ModelError(
                f"package {job.model} changed since this job was made (version {job.model_version}, now "
                f"{package.version}): `radnode reprocess` makes a job for the new one"
            )
        takes = what_peers_take(self._config, self._archive.database, job.send_to)
        return _Attempt(job, package, takes, wanted_of(job, takes))

    def _read(self, attempt: _Attempt, most_bytes: float = float("inf")) -> Inputs | None:
        """The job's inputs; None where the voxels of them would take more than `most_bytes`."""
        begin = monotonic()
        job, package = attempt.job, attempt.package
        wanted = instances_of(name for names in job.inputs.values() for name in names)
        plans = plan_inputs(package, job.inputs, self._archive.instance_paths(wanted))
        sources = {}
        if package.manifest.adapter is not Adapter.COMMAND:
            if sum(map(_voxel_bytes, plans.values())) > most_bytes:
                return None
            sources = read_sources(plans)
        return Inputs(job.id, plans, sources, monotonic() - begin)

    def _report(self, attempt: _Attempt, run: Run, beat: Heartbeat) -> None:
        """Measure what the model said, make the results and end the job; in the reporting thread."""
        job = attempt.job
        try:
            with self._ending(job):
                analysis = report(
                    attempt.package,
                    run,
                    key=job.key,
                    created=datetime.fromtimestamp(job.created_at, UTC),
                    house=self._config.results.house,
                    wanted=attempt.wanted,
                    previous=previous_reports(self._archive, job),
                )
                self._finish(attempt, analysis)
        except SQLAlchemyError as error:  # its lease runs out
            _log.error("job %d: database: %s", job.id, type(error).__name__)
        finally:
            beat.end()

    def _finish(self, attempt: _Attempt, analysis: Analysis) -> None:
        job = attempt.job
        results = keep_results(self._archive, job, analysis.results, attempt.takes)
        rows = [row for measurement in analysis.measurements for row in measurement.rows()]
        story = _tell(analysis)
        if not finish_job(self._archive.database, job, self._id, results, rows, story, analysis.seconds):
            _log.warning("job %d: the lease was lost, its results are not taken", job.id)
            return
        ring(self._archive.storage, Room.DELIVER)
        _log.info("job %d done: %s, %s", job.id, job.model, story)
        if self._config.results.withdraw_replaced:
            withdraw_replaced(self._archive, self._config, job)

    def _claim_to_read(self) -> Job | None:
        if self._stop.is_set() or not self._config.workers.read_ahead:
            return None
        return claim_to_read(self._archive.database, self._id, loaded=self._models.names)

    def _read_ahead(self, job: Job) -> Inputs | None:
        """Read a job's inputs and give it back; whatever is wrong with them ends it now."""
        beat = self._heartbeat(job)
        try:
            with self._ending(job):
                inputs = self._read(self._begin(job), most_bytes=_free_memory() / 4)
                return inputs if give_back_read(self._archive.database, job, self._id) else None
        finally:
            beat.end()
        return None

    def _heartbeat(self, job: Job) -> Heartbeat:
        package = self._shelf.look_up(job.model)
        timeout_s = package.manifest.timeout_s if isinstance(package, Package) else 60.0
        return Heartbeat(self._archive.database, job, self._id, self._stop, timeout_s).start()

    @contextmanager
    def _ending(self, job: Job) -> Iterator[None]:
        """Whatever is raised within ends the attempt in the queue; what the database raises goes on."""
        database = self._archive.database
        try:
            yield
        except InputRefused as error:
            end_job(database, job, self._id, JobState.REFUSED, str(error))
            _log.info("job %d refused: %s", job.id, error)
        except OutputRefused as error:
            end_job(database, job, self._id, JobState.FAILED, str(error))
            _log.error("job %d failed: %s", job.id, error)
        except SQLAlchemyError:
            raise
        except ArchiveError as error:  # no room for the result: the next attempt may find some
            fail_attempt(database, job, self._id, str(error))
            _log.error("job %d: %s", job.id, error)
        except RadnodeError as error:
            fail_attempt(database, job, self._id, str(error))
            _log.error("job %d: attempt %d: %s", job.id, job.attempts, error)
        except Exception as error:  # the outermost loop of a worker: the attempt failed, the worker goes on
            fail_attempt(database, job, self._id, f"{type(error).__name__} in radnode: see the log of the node")
            _log.exception("job %d: attempt %d", job.id, job.attempts)


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


def _voxel_bytes(plan: InputPlan) -> int:
    """What an input takes once it is read."""
    return math.prod(shape_of(plan)) * np.dtype(np.float32).itemsize


def _free_memory() -> int:
    """Bytes that can be taken without swapping (proc(5))."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _tell_protections(device: str) -> None:
    """Log what holds for the models of this worker."""
    try:
        for protection in probe_protections(device):
            _log.log(logging.INFO if protection.holds else logging.WARNING, "models run with %s", protection)
    except ModelError as error:
        _log.error("work: %s", error)
