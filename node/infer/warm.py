"""The models that a worker keeps loaded between two jobs."""

from __future__ import annotations

import threading
from typing import Protocol

from node.infer.command import CommandModel
from node.infer.hosted import HostedModel
from node.infer.model import DicomModel, Model, open_model
from node.infer.package import Package
from node.infer.packagings import Adapter


class Models(Protocol):
    """Where a worker's models run: on its own machine (`WarmModels`), or on one of a cluster's (`ray_slot.RaySlot`)."""

    device: str  # of this machine

    def ready(self, stop: threading.Event) -> bool:
        """Whether a job may be taken. Where it may not it has waited for a moment, and not when `stop` is set."""
        ...

    def get(self, package: Package) -> Model | DicomModel:
        """The package's model, which begins to load."""
        ...

    def make_room(self) -> None:
        """A job is over: keep no more than may be kept until the next."""
        ...

    @property
    def running(self) -> bool:
        """Whether the model that was asked for last has its input and runs."""
        ...

    def stop_last(self, why: str) -> None:
        """End the model that was asked for last, from any thread; its run fails with this sentence."""
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
        self._models: dict[str, HostedModel] = {}  # by digest, the one that was used last at the end
        self._asked: HostedModel | CommandModel | None = None  # the one that was asked for last

    def ready(self, stop: threading.Event) -> bool:
        """Always: this machine is there."""
        return True

    @property
    def digests(self) -> set[str]:
        """The packages whose models are loaded."""
        return set(self._models)

    def get(self, package: Package) -> Model | DicomModel:
        """The package's model: loaded, or a process that has begun to load it; a program, which is nothing to keep."""
        if package.manifest.adapter is Adapter.COMMAND:
            program = open_model(package, self.device)
            self._asked = program if isinstance(program, CommandModel) else None
            return program
        model = self._models.pop(package.digest, None)
        if model is not None and model.stopped:  # for a job that is over
            model.close()
            model = None
        if model is None:
            model = HostedModel(package, self.device, memory_bytes=self._memory_bytes)
        self._models[package.digest] = self._asked = model
        return model

    def make_room(self) -> None:
        """End what was not used for longest until the others fit; the last one stays, however large it is.

        Of a GPU they hold half at most (or `warm_gpu`): a model that runs needs more than one that waits. No job runs
        meanwhile.
        """
        self._asked = None
        held = {digest: (model.resident_bytes, model.cuda_share) for digest, model in self._models.items()}
        for digest in list(self._models)[:-1]:
            fits = sum(bytes_ for bytes_, _ in held.values()) <= self.warm_bytes
            if fits and sum(share for _, share in held.values()) <= self._warm_gpu:
                return
            del held[digest]
            self._models.pop(digest).close()

    @property
    def running(self) -> bool:
        """Whether the model that was asked for last has its input and runs: it is loaded, and it has not answered."""
        return self._asked is not None and self._asked.running

    def stop_last(self, why: str) -> None:
        """Kill the process of the model that was asked for last, from any thread; its run fails with this sentence."""
        if self._asked is not None:
            self._asked.stop(why)

    def close(self) -> None:
        """End all of them."""
        while self._models:
            self._models.popitem()[1].close()
