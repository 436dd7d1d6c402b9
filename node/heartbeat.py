"""While a worker holds a job: its lease is renewed, and what takes too long, or is no longer wanted, is stopped."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial

from sqlalchemy.exc import SQLAlchemyError

from node.archive.database import Database
from node.archive.records import Job
from node.infer.hosted import LOAD_S
from node.infer.model import Stoppable
from node.queue.leases import LEASE_S, fail_attempt, release_job, renew_lease
from node.queue.workers import WorkerId

_log = logging.getLogger(__name__)

DRAIN_S = 120.0  # a job that runs when the node stops may take so long; then it is given back
AROUND_S = LOAD_S + 600.0  # that radnode may take to load a model and read its input, and then for its results
STUCK_S = 30.0  # that a job may take to end after its model was killed
EXIT_LOST = 70


class Heartbeat:
    """Renews a job's lease until `end`, and kills its model when that is no longer this worker's business.

    The package's `timeout_s` counts while its model runs; what radnode does before and after has `AROUND_S` each. A
    worker that does not hear of its model's end in `STUCK_S` ends itself; the supervisor starts a fresh one, and the
    queue says what happens to its jobs.
    """

    def __init__(self, database: Database, job: Job, worker: WorkerId, stop: threading.Event, timeout_s: float):
        """It beats from `start` on; `stop` is the worker's."""
        self._database, self._job, self._worker, self._stop = database, job, worker, stop
        self._timeout_s = timeout_s
        self._model: Stoppable | None = None
        self._why = ""  # the job is to end
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat of job {job.id}", daemon=True)

    def start(self) -> Heartbeat:
        """Begin to beat."""
        self._thread.start()
        return self

    def watch(self, model: Stoppable) -> None:
        """This model runs, or is going to run, for the job; a job that is to end has its model stopped at once."""
        self._model = model
        if self._why:
            model.stop(self._why)

    def let_go(self) -> None:
        """The model has answered; from now on it may run for another job."""
        self._model = None

    def end(self) -> None:
        """Beat no more."""
        self._done.set()
        self._thread.join()

    def _beat(self) -> None:
        job = self._job
        renew_at = time.monotonic() + LEASE_S / 3
        give_back_at: float | None = None
        lost_at = time.monotonic() + LEASE_S
        stuck_at: float | None = None  # the model was killed, the job should be over
        running, since = False, time.monotonic()
        while not self._done.wait(0.5):
            now = time.monotonic()
            model = self._model
            if (model is not None and model.running) != running:
                running, since = not running, now
            if stuck_at is not None:
                if model is not None:
                    model.stop(self._why)  # it may only now have come to start
                if now >= stuck_at:
                    sentence = "it did not end when its model was killed"
                    self._try(partial(fail_attempt, self._database, job, self._worker, sentence))
                    self._leave(f"job {job.id}: stuck")
                continue
            if now >= since + (self._timeout_s if running else AROUND_S):
                why = f"it took longer than {AROUND_S:.0f} s to load it and read its input, or to make its results"
                if running:
                    why = f"it ran longer than {self._timeout_s:.0f} s (timeout_s in dicom.yaml)"
                stuck_at = self._doom(why, now)
            if self._stop.is_set():
                give_back_at = give_back_at or now + DRAIN_S
                if now >= give_back_at:
                    self._try(partial(release_job, self._database, job, self._worker))
                    self._leave(f"job {job.id}: given back, the node stops")
            if now >= renew_at:
                try:
                    renew_at, lost_at = now + LEASE_S / 3, now + LEASE_S
                    if not renew_lease(self._database, job, self._worker):
                        deadline = self._doom("the job was cancelled, or its lease was lost", now)
                        # What is only read or reported ends by itself, and the queue takes nothing of it.
                        stuck_at, renew_at = (None, float("inf")) if model is None else (deadline, renew_at)
                except SQLAlchemyError as error:
                    _log.error("job %d: lease not renewed: %s", job.id, type(error).__name__)
                    renew_at = now + 2.0
                    if now >= lost_at:
                        self._leave(f"job {job.id}: no database for {LEASE_S:.0f} s, the lease has run out")

    def _doom(self, why: str, now: float) -> float:
        """The job is to end; until when it may take to."""
        self._why = why
        if (model := self._model) is not None:
            model.stop(why)
        return now + STUCK_S

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
