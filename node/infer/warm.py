"""The models that a worker keeps loaded between two jobs."""

from __future__ import annotations

import threading
from typing import Protocol

from node.infer.command import CommandModel
from node.infer.hosted import HostedModel
from node.infer.model import DicomModel, Model, Stoppable
from node.infer.package import Package
from node.infer.packagings import Adapter
from node.infer.processes import ForkServer


class StoppableModel(Model, Stoppable, Protocol):
    """A model that another thread may stop."""


class StoppableProgram(DicomModel, Stoppable, Protocol):
    """A model that reads the files itself, and that another thread may stop."""


class Models(Protocol):
    """Where a worker's models run: on its own machine (`WarmModels`), or on one of a cluster's (`ray_slot.RaySlot`)."""

    device: str  # of this machine

    def ready(self, stop: threading.Event) -> bool:
        """Whether a job may be taken. Where it may not it has waited for a moment, and not when `stop` is set."""
        ...

    def get(self, package: Package) -> StoppableModel | StoppableProgram:
        """The package's model, which begins to load."""
        ...

    def make_room(self) -> None:
        """A job is over: keep no more than may be kept until the next."""
        ...

    @property
    def names(self) -> frozenset[str]:
        """The models that are loaded, or about to be."""
        ...

    def close(self) -> None:
        """End all of them."""
        ...


class WarmModels:
    """Loaded models, each in a process of its own, as many as there is room for; the most recently used ones stay."""

    def __init__(self, device: str, *, memory_bytes: int | None, warm_bytes: int, warm_gpu: float = 0.5):
        """`memory_bytes` is the most that one model may take, `warm_bytes` what all may hold between two jobs, and
        `warm_gpu` the share (0 to 1) of the GPU's memory.
        """
        self.device = device
        self._memory_bytes = memory_bytes
        self.warm_bytes = warm_bytes
        self._warm_gpu = warm_gpu
        self._forks = ForkServer()
        self._models: dict[str, HostedModel] = {}  # by digest, the one that was used last at the end

    def ready(self, stop: threading.Event) -> bool:
        """Always: this machine is there."""
        return True

    @property
    def digests(self) -> set[str]:
        """The packages whose models are loaded."""
        return set(self._models)

    def get(self, package: Package) -> HostedModel | CommandModel:
        """The package's model: loaded, or a process that has begun to load it; a program, which is nothing to keep."""
        if self._models and next(reversed(self._models)) != package.digest:
            self._models[next(reversed(self._models))].rest()
        if package.manifest.adapter is Adapter.COMMAND:
            return CommandModel(package.folder, package.manifest, self.device)
        model = self._models.pop(package.digest, None)
        if model is not None and model.stopped:  # for a job that is over
            model.close()
            model = None
        if model is None:
            model = HostedModel(package, self.device, memory_bytes=self._memory_bytes, forks=self._forks)
        self._models[package.digest] = model
        return model

    def make_room(self) -> None:
        """End what was not used for longest until the others fit; the last one stays, however large it is.

        Of a GPU they hold half at most (or `warm_gpu`): a model that runs needs more than one that waits. No job runs
        meanwhile.
        """
        if len(self._models) > 1 and not self._fit():
            for model in self._models.values():
                model.rest(wait=True)  # what it only keeps for its next run is not what it needs
        while len(self._models) > 1 and not self._fit():
            self._models.pop(next(iter(self._models))).close()

    def _fit(self) -> bool:
        """Whether what the models hold may stay."""
        models = self._models.values()
        fits = sum(model.resident_bytes for model in models) <= self.warm_bytes
        return fits and sum(model.cuda_share for model in models) <= self._warm_gpu

    @property
    def names(self) -> frozenset[str]:
        """The models that are loaded, or about to be."""
        return frozenset(model.name for model in self._models.values())

    def close(self) -> None:
        """End all of them."""
        while self._models:
            self._models.popitem()[1].close()
        self._forks.close()
