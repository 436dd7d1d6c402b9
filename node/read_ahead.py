"""Reading the next study while a model runs on this one.

The job that is probably next is leased for as long as its images are read, and then waits on as if nothing had been:
whatever is more urgent still goes before it, and any worker may take it. So nothing is lost but the reading when
another one does.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from sqlalchemy.exc import SQLAlchemyError

from node.archive.records import Job
from node.dicom.assembly import InputPlan
from node.dicom.volume import Image, Volume

_log = logging.getLogger(__name__)

FAST_S = 0.5  # a model that answers sooner leaves no time to read
POLL_S = 0.5


@dataclass(frozen=True)
class Inputs:
    """The inputs of a job."""

    job_id: int
    plans: Mapping[str, InputPlan]
    sources: Mapping[str, Volume | Image]  # empty where the model reads the files itself
    seconds: float  # that it took to read them


class ReadAhead:
    """What was read of a job that has not started."""

    def __init__(self, claim: Callable[[], Job | None], read: Callable[[Job], Inputs | None]):
        """`claim` leases a job whose images may be read; `read` reads them and gives it back: None when it is over."""
        self._claim = claim
        self._read = read
        self._kept: Inputs | None = None

    @property
    def job_id(self) -> int | None:
        """The job whose images are here."""
        return self._kept.job_id if self._kept is not None else None

    def take(self, job: Job) -> Inputs | None:
        """What was read of this job, once; what was read of another is forgotten: it may have run elsewhere."""
        kept, self._kept = self._kept, None
        return kept if kept is not None and kept.job_id == job.id else None

    def forget(self) -> None:
        """Nothing waits: what was read ran elsewhere, or was cancelled."""
        self._kept = None

    @contextlib.contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Look for a job and read its images in a thread of its own while the body runs; a reading is ended first."""
        over = threading.Event()
        thread = threading.Thread(target=self._look, args=(over,), name="read ahead", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _look(self, over: threading.Event) -> None:
        wait_s = FAST_S
        while self._kept is None and not over.wait(wait_s):
            wait_s = POLL_S
            try:
                if (job := self._claim()) is not None:
                    self._kept = self._read(job)
                    return
            except SQLAlchemyError as error:  # the worker's own loop will find out
                _log.error("read ahead: database: %s", type(error).__name__)
                return
