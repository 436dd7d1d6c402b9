"""The other machine's side of a slot (`node.infer.ray_slot`): a Ray actor in which models are kept loaded.

Each model runs in a confined process of its own, as on the worker's machine (`node.infer.hosted`). The actor belongs to
one worker and ends with it, and with the machine's Ray; its models' processes end with the actor. What is expected to
go wrong is an answer, never an exception: Ray would add a traceback, and a worker could not tell it from a loss.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from node import __version__
from node.dicom.volume import Image, Volume
from node.errors import InputRefused, ModelError, OutputRefused, RadnodeError
from node.infer.device import choose_device
from node.infer.hosted import HostedModel, probe_protections
from node.infer.package import Package
from node.infer.package_cache import PackageCache, default_cache
from node.infer.results import Prediction
from node.infer.sandbox import Protection
from node.infer.warm import WarmModels
from node.infer.wire import restore_input


@dataclass(frozen=True)
class SlotSettings:
    """What a slot is to be, on whichever machine."""

    device: str = "auto"  # auto, cpu or cuda
    gpus: float = 0.0  # its share of a GPU
    cpus: float = 1.0
    memory_bytes: int | None = None  # the most that one model may take
    cache: str | None = None  # where copies of packages go; None: below the cache folder of the user
    cache_bytes: int = 50 * 10**9


@dataclass(frozen=True)
class Place:
    """What a slot says of itself."""

    machine: str  # its name and its address in the cluster
    version: str  # of radnode
    device: str
    pid: int
    protections: tuple[Protection, ...]


@dataclass(frozen=True)
class Answer:
    """What came of a call."""

    error: str = ""  # the kind of error, one of ours; "" when there is none
    says: str = ""
    prediction: Prediction | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    place: Place | None = None

    def check(self) -> Answer:
        """Itself; raises the error that it tells."""
        kinds = {"OutputRefused": OutputRefused, "InputRefused": InputRefused}
        if self.error:
            raise kinds.get(self.error, ModelError)(self.says)
        return self


class SlotActor:
    """One slot on a machine of the cluster. Calls that load and run come one at a time, the others beside them."""

    def __init__(self, settings: SlotSettings):
        logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # as in a worker: it writes values into its messages
        self._settings = settings
        self._cache = PackageCache(Path(settings.cache) if settings.cache else default_cache(), settings.cache_bytes)
        self._packages: dict[str, Package] = {}  # by digest, as they were found last
        self._models: WarmModels | None = None
        self._running: HostedModel | None = None  # what is loading or runs
        self._given: dict[str, Volume | Image] = {}

    def ping(self) -> bool:
        """It is there."""
        return True

    def describe(self) -> Answer:
        """Choose the device and say what this place is; `ModelError` when the device is not there."""
        try:
            device = choose_device("cpu" if not self._settings.gpus else self._settings.device)
            protections = probe_protections(device)
        except RadnodeError as error:
            return _explain(error)
        address, share = _find_place(self._settings)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._models = WarmModels(
            device,
            memory_bytes=self._settings.memory_bytes,
            warm_bytes=self._settings.memory_bytes or int(memory * share / 2),
            warm_gpu=0.5 * min(self._settings.gpus, 1.0),
        )
        machine = f"{socket.gethostname()} ({address})"
        return Answer(place=Place(machine, __version__, device, os.getpid(), protections))

    # -- Packages --

    def has_package(self, name: str, digest: str, folder: str) -> bool:
        """Whether the package is here: in the folder where the worker's machine has it, or as a copy."""
        package = self._cache.find(name, digest, Path(folder))
        if package is not None:
            self._packages[digest] = package
        return package is not None

    def begin_package(self, name: str, digest: str, size_bytes: int) -> Answer:
        """Make room for a package that comes in parts."""
        try:
            self._cache.begin(name, digest, size_bytes)
        except ModelError as error:
            return _explain(error)
        return Answer()

    def add_part(self, name: str, digest: str, path: str, data: NDArray[np.uint8]) -> Answer:
        """The next part of one of its files."""
        try:
            self._cache.add(name, digest, path, data.data)
        except ModelError as error:
            return _explain(error)
        return Answer()

    def finish_package(self, name: str, digest: str) -> Answer:
        """Check the package and put it in its place."""
        try:
            self._packages[digest] = self._cache.finish(name, digest)
        except RadnodeError as error:
            return _explain(error)
        return Answer()

    # -- Runs --

    def begin_load(self, digest: str) -> Answer:
        """Start the model's process, which loads, and do not wait for it."""
        try:
            self._model(digest)
        except ModelError as error:
            return _explain(error)
        return Answer()

    def load(self, digest: str) -> Answer:
        """Wait until the model is loaded."""
        try:
            self._running = self._model(digest)
            self._running.load()
        except RadnodeError as error:
            return _explain(error)
        return Answer()

    def give(self, described: Mapping[str, Mapping[str, Any]], *arrays: NDArray[Any]) -> None:
        """The inputs of the next run, as `node.infer.wire.describe_input` says, and their voxels in the same order.

        They are in this machine's memory when this is called: a run is timed without their way here.
        """
        self._given = {
            name: restore_input(one, array) for (name, one), array in zip(described.items(), arrays, strict=True)
        }

    def run(self, digest: str) -> Answer:
        """Run the model on what was given, once."""
        inputs, self._given = self._given, {}
        try:
            self._running = model = self._model(digest)
            prediction = model.predict(inputs)
            return Answer(prediction=prediction, seconds=model.seconds)
        except RadnodeError as error:
            return _explain(error)
        finally:
            self._running = None

    def stop(self, why: str) -> None:
        """Kill the process of the model that loads or runs; its call answers with this sentence."""
        if (model := self._running) is not None:
            model.stop(why)

    def make_room(self) -> None:
        """A job is over."""
        if self._models is not None:
            self._models.make_room()
            self._cache.release_but(self._models.digests)

    def _model(self, digest: str) -> HostedModel:
        package = self._packages.get(digest)
        if self._models is None or package is None:
            raise ModelError("the slot was asked for a model before its package")
        model = self._models.get(package)
        assert isinstance(model, HostedModel)  # a program stays on the worker's machine
        return model


def _explain(error: RadnodeError) -> Answer:
    kind = next((kind for kind in (OutputRefused, InputRefused) if isinstance(error, kind)), ModelError)
    return Answer(error=kind.__name__, says=str(error))


def _find_place(settings: SlotSettings) -> tuple[str, float]:
    """The machine's address in the cluster, and which share (0 to 1) of it one slot is, by what slots ask for."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    node = next((node for node in ray.nodes() if node["NodeID"] == here), {})
    has = node.get("Resources", {})
    shares = [
        asked / has[what] for what, asked in (("CPU", settings.cpus), ("GPU", settings.gpus)) if asked and has.get(what)
    ]
    return str(node.get("NodeManagerAddress", "")), min(1.0, max(shares, default=1.0))
