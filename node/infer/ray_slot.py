"""A worker's slot on a machine of a Ray cluster: an actor in which its models run; all else stays with the worker.

What goes over are the voxels of a model's inputs with their geometry, and its package when the machine has none; what
comes back is the prediction. No UID, nothing of the patient, no file of the archive. When the machine is lost the run
fails with a sentence, the attempt counts, and the next one gets a slot elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from node import __version__
from node.dicom.volume import Image, Volume
from node.errors import ModelError
from node.infer.command import CommandModel
from node.infer.hosted import LOAD_S
from node.infer.package import Package, package_files, package_size
from node.infer.packagings import Adapter
from node.infer.ray_actor import Answer, Place, SlotActor, SlotSettings
from node.infer.ray_cluster import ClusterUnreachable, connect, list_machines, tell_resources
from node.infer.results import Labelmap, Prediction
from node.infer.wire import describe_input

_log = logging.getLogger(__name__)

PENDING_S = 300.0  # that a slot may be waited for before it is told; within a job it is the most
_LOOK_S = 0.25  # between two looks at whether a run is to be stopped
_PING_S = 10.0  # that a slot may take to say that it is there
_SEEN_S = 2.0  # that a slot counts as there after it said so
_PART = 64 << 20  # bytes of a package that go over at once
_GIVE_S = 600.0  # that the inputs of a run may take to get there
_AFTER_S = 120.0  # that a prediction may take to come back when the model's time is up
_STOP_S = 15.0  # that a stopped run may take to end before its actor is killed


class _Seat:
    """The actor that a worker has, and where it is."""

    def __init__(self, ray: Any, actor: Any):
        self.ray = ray
        self.actor = actor
        self.place: Place | None = None
        self.lost = False
        self.seen = 0.0  # monotonic

    @property
    def machine(self) -> str:
        return self.place.machine if self.place else "not known yet"

    def beside(self, method: str, *arguments: object) -> Any:
        """Call what does not wait for the run."""
        return getattr(self.actor, method).options(concurrency_group="beside").remote(*arguments)

    def leave(self) -> None:
        """End the actor, and with it the models' processes."""
        self.lost = True
        with contextlib.suppress(Exception):  # it is gone, or its machine is
            self.ray.kill(self.actor, no_restart=True)


class RaySlot:
    """One worker's place in the cluster, with the interface of `node.infer.warm.Models`."""

    def __init__(self, address: str, settings: SlotSettings, *, device: str, pending_s: float = PENDING_S):
        """`device` is that of this machine, on which programs run; nothing is asked of the cluster yet."""
        self.device = device
        self._address = address
        self._settings = settings
        self._pending_s = pending_s
        self._ray: Any = None
        self._seat: _Seat | None = None
        self._coming: tuple[_Seat, Any, float] | None = None  # an actor, the answer to its first call, asked when
        self._seeking = threading.Lock()
        self._told = ""
        self._closed = False
        self._names: set[str] = set()
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="slot")

    def ready(self, stop: threading.Event) -> bool:
        """Whether there is a slot. A worker without one takes no job: others may have theirs, and attempts count.

        Raises `ModelError` for what waiting does not mend (a wrong token, another version of Ray).
        """
        try:
            seat = self._seat
            if seat is not None and self._is_there(seat):
                return True
            since = self._coming[2] if self._coming else time.monotonic()
            if self.seek(1.0) is not None:
                self._told = ""
                return True
            if time.monotonic() >= since + self._pending_s:
                self._tell(self._tell_pending())
        except ClusterUnreachable as error:
            self._tell(str(error))
            stop.wait(5.0)
        except ModelError as error:
            if self._ray is None:  # not joined: a fresh process tries again
                raise
            self._tell(str(error))
            stop.wait(5.0)
        return False

    def get(self, package: Package) -> _RayModel | CommandModel:
        """The package's model, which begins to load there; a program runs on this machine, with its files."""
        if package.manifest.adapter is Adapter.COMMAND:
            return CommandModel(package.folder, package.manifest, self.device)
        self._names.add(package.name)
        return _RayModel(package, self, self._helper)

    def make_room(self) -> None:
        """A job is over: the slot keeps what there is room for on its machine."""
        if self._seat is not None and not self._seat.lost:
            with contextlib.suppress(ModelError), _losing(self._seat, "the slot"):
                self._seat.actor.make_room.remote()

    @property
    def names(self) -> frozenset[str]:
        """The models that the slot was given: as far as it has room they are loaded."""
        return frozenset(self._names)

    def close(self) -> None:
        """Give the slot back."""
        self._closed = True
        self._helper.shutdown(wait=False, cancel_futures=True)
        for seat in (self._seat, self._coming[0] if self._coming else None):
            if seat is not None:
                seat.leave()

    def take_seat(self, stopped: Callable[[], None]) -> _Seat:
        """The slot's actor, a new one where the last was lost; `stopped` raises when nobody waits for it any more.

        `ModelError` after `pending_s`: the request stands, and the next job may find it fulfilled.
        """
        deadline = time.monotonic() + self._pending_s
        while (seat := self.seek(_LOOK_S)) is None:
            stopped()
            if self._closed:
                raise ModelError("the worker ends")
            if time.monotonic() >= deadline:
                raise ModelError(self._tell_pending())
        return seat

    def seek(self, wait_s: float) -> _Seat | None:
        """The slot's actor; None when the cluster has no room for it yet. `ModelError` when it cannot be there."""
        with self._seeking:
            if self._seat is not None and not self._seat.lost:
                return self._seat
            if self._ray is None:
                self._ray = connect(self._address)
            if self._coming is None:
                seat = self._request()
                self._coming = seat, seat.beside("ping"), time.monotonic()
            seat, answer, _ = self._coming
            with _asking(seat, "a slot's actor cannot start: see whether radnode is installed for Ray on all machines"):
                if not self._ray.wait([answer], timeout=wait_s)[0]:
                    return None
                self._coming = None  # whatever comes of it
                self._ray.get(answer)
            place = self._describe(seat)
            seat.place, seat.seen = place, time.monotonic()
            self._seat = seat
            self._names.clear()
            _log.info("slot on %s: models run on %s, in process %d", place.machine, place.device, place.pid)
            for protection in place.protections:
                level = logging.INFO if protection.holds else logging.WARNING
                _log.log(level, "models on %s run with %s", place.machine, protection)
            return seat

    def _request(self) -> _Seat:
        settings = self._settings
        remote = self._ray.remote(
            num_cpus=settings.cpus,
            num_gpus=settings.gpus,
            max_restarts=0,  # a fresh one is made here, wherever there is room
            max_task_retries=0,  # an attempt is counted by the queue
            scheduling_strategy="SPREAD",
            concurrency_groups={"beside": 4},
        )(SlotActor)
        return _Seat(self._ray, remote.remote(settings))

    def _describe(self, seat: _Seat) -> Place:
        """Where the new actor is; one that is of no use is ended."""
        with _asking(seat, "its machine was lost while the slot began"):
            answer = seat.actor.describe.remote()
            if not self._ray.wait([answer], timeout=LOAD_S)[0]:
                seat.leave()
                raise ModelError(f"a slot did not begin within {LOAD_S:.0f} s")
            told: Answer = self._ray.get(answer)
        place = told.place
        if place is None or place.version != __version__:
            seat.leave()
            told.check()
            has = place.version if place else "another"
            where = place.machine if place else "a machine"
            raise ModelError(f"{where} has radnode {has}, this one {__version__}: install the same on all machines")
        return place

    def _is_there(self, seat: _Seat) -> bool:
        if not seat.lost and time.monotonic() >= seat.seen + _SEEN_S:
            try:
                with _losing(seat, "the worker"):
                    answer = seat.beside("ping")
                    if self._ray.wait([answer], timeout=_PING_S)[0]:
                        self._ray.get(answer)
                        seat.seen = time.monotonic()
                    else:
                        seat.leave()
            except ModelError as error:
                _log.warning("slot: %s", error)
        return not seat.lost

    def _tell_pending(self) -> str:
        asked = tell_resources({"CPU": self._settings.cpus, "GPU": self._settings.gpus})
        try:
            machines = "; ".join(map(str, list_machines(self._ray)))
            free = tell_resources(self._ray.available_resources())
        except Exception as error:  # what Ray raises when its head does not answer
            machines, free = f"not known ({type(error).__name__})", "not known"
        return (
            f"the Ray cluster has had no room for a slot of {asked} for {self._pending_s:.0f} s; free are {free}; "
            f"there are {machines}: see workers.count, workers.gpus and workers.cpus"
        )

    def _tell(self, sentence: str) -> None:
        """Once, not every few seconds."""
        if sentence != self._told:
            self._told = sentence
            _log.error("work: %s", sentence)


class _RayModel:
    """One package's model as one job uses it."""

    def __init__(self, package: Package, slot: RaySlot, helper: ThreadPoolExecutor):
        self._package = package
        self._slot = slot
        self._stopped = ""
        self.running = False  # it has its input and has not answered yet
        self.seconds: dict[str, float] = {}  # of the last run, by its parts
        self._seat: Future[_Seat] = helper.submit(self._prepare)

    def predict(self, inputs: Mapping[str, Volume | Image]) -> Prediction:
        """Run on `inputs`, as `node.infer.model.Model` says; `ModelError` too when the machine was lost."""
        while not self._seat.done():
            self._raise_if_stopped()
            with contextlib.suppress(TimeoutError):
                self._seat.result(_LOOK_S)
        seat = self._seat.result()
        ray, name, digest = seat.ray, self._package.name, self._package.digest
        limit_s = self._package.manifest.timeout_s
        with _losing(seat, f"model {name}"):
            self._wait(seat, seat.actor.load.remote(digest), LOAD_S + 60, "its machine does not answer").check()
            described = {key: describe_input(source) for key, source in inputs.items()}
            with _asking(seat, f"model {name}: this machine's Ray has no room for its inputs"):
                arrays = [ray.put(np.ascontiguousarray(source.array)) for source in inputs.values()]
            self._wait(seat, seat.actor.give.remote(described, *arrays), _GIVE_S, "its inputs do not get there")
            del arrays  # from this machine's store
            self.running = True
            try:
                late = f"neither its result nor an error came from {seat.machine}"
                answer = self._wait(seat, seat.actor.run.remote(digest), limit_s + _AFTER_S, late).check()
            finally:
                self.running = False
        self.seconds = answer.seconds
        assert answer.prediction is not None
        return _take_over(answer.prediction, inputs)

    def stop(self, why: str) -> None:
        """Stop it, from any thread: the run that goes on raises `ModelError` with this sentence, or else the next."""
        self._stopped = f"model {self._package.name}: {why}"

    def close(self) -> None:
        """It stays loaded: what there is no room for goes after the job."""

    def _prepare(self) -> _Seat:
        """See that the package is there, and let it load."""
        seat = self._slot.take_seat(self._raise_if_stopped)
        name, digest = self._package.name, self._package.digest
        with _losing(seat, f"model {name}"):
            there = seat.actor.has_package.remote(name, digest, str(self._package.folder.resolve()))
            if not self._wait(seat, there, LOAD_S, "its machine does not answer"):
                self._send_package(seat)
            self._wait(seat, seat.actor.begin_load.remote(digest), 60, "its machine does not answer").check()
        return seat

    def _send_package(self, seat: _Seat) -> None:
        """The package's files in parts, each gone from the object store before the next."""
        name, digest, folder = self._package.name, self._package.digest, self._package.folder
        began = time.monotonic()
        late = f"its package does not get to {seat.machine}"
        try:
            size = package_size(folder)
            self._wait(seat, seat.actor.begin_package.remote(name, digest, size), 600, late).check()
            for path in package_files(folder):
                with (folder / path).open("rb") as file:
                    first = True
                    while (data := file.read(_PART)) or first:  # an empty file is one too
                        first = False
                        part = np.frombuffer(data, np.uint8)
                        self._wait(seat, seat.actor.add_part.remote(name, digest, path, part), _GIVE_S, late).check()
            self._wait(seat, seat.actor.finish_package.remote(name, digest), LOAD_S + size / 50e6, late).check()
        except OSError as error:
            raise ModelError(f"model package {name}: {error.filename} cannot be read ({error.strerror})") from None
        seconds = time.monotonic() - began
        _log.info("package %s is copied to %s: %.0f MB in %.1f s", name, seat.machine, size / 1e6, seconds)

    def _wait(self, seat: _Seat, answer: Any, limit_s: float, late: str) -> Any:
        """What a call gives; `ModelError` when it is stopped, and with the words `late` after `limit_s`."""
        deadline = time.monotonic() + limit_s
        while not seat.ray.wait([answer], timeout=_LOOK_S)[0]:
            if self._stopped:
                self._end(seat, answer)
                raise ModelError(self._stopped)
            if time.monotonic() >= deadline:
                seat.leave()
                raise ModelError(f"model {self._package.name}: {late} within {limit_s:.0f} s")
        found = seat.ray.get(answer)
        self._raise_if_stopped()
        seat.seen = time.monotonic()
        return found

    def _end(self, seat: _Seat, answer: Any) -> None:
        """Kill the model's process there, and the actor where that does not end the call."""
        seat.beside("stop", "it was stopped")
        if not seat.ray.wait([answer], timeout=_STOP_S)[0]:
            _log.warning("model %s does not end on %s: its slot is ended", self._package.name, seat.machine)
            seat.leave()

    def _raise_if_stopped(self) -> None:
        if self._stopped:
            raise ModelError(self._stopped)


def _take_over(prediction: Prediction, inputs: Mapping[str, Volume | Image]) -> Prediction:
    """The prediction on the worker's own grid, in memory that may be written and is no longer Ray's."""
    if not isinstance(prediction, Labelmap):
        return prediction
    source = inputs[prediction.input]
    maps = prediction.probabilities
    return replace(
        prediction,
        array=prediction.array.copy(),
        grid=source.grid if isinstance(source, Volume) else None,
        probabilities=None if maps is None else {label: one.copy() for label, one in maps.items()},
    )


@contextlib.contextmanager
def _losing(seat: _Seat, what: str) -> Iterator[None]:
    """What Ray raises when an actor, its machine or an object is gone is an expected failure of one attempt."""
    with _asking(seat, f"{what}: the machine {seat.machine} that ran it was lost"):
        yield


@contextlib.contextmanager
def _asking(seat: _Seat, sentence: str) -> Iterator[None]:
    """Every error of Ray is a `ModelError` with this sentence and its kind; the seat is given up."""
    try:
        yield
    except seat.ray.exceptions.RayError as error:
        seat.leave()
        raise ModelError(f"{sentence} ({_kind(error)})") from None


def _kind(error: Exception) -> str:
    """The name of Ray's error: its text may hold anything."""
    cause = getattr(error, "cause", None)
    return type(cause if isinstance(cause, Exception) else error).__name__
