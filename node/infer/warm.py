"""The models that a worker keeps loaded between two jobs."""

from __future__ import annotations

from node.infer.command import CommandModel
from node.infer.hosted import HostedModel
from node.infer.package import Package
from node.infer.packagings import Adapter


class WarmModels:
    """Loaded models, each in a process of its own, as many as there is room for; the most recently used ones stay."""

    def __init__(self, device: str, *, memory_bytes: int | None, warm_bytes: int):
        """`memory_bytes` is the most that one model may take, `warm_bytes` what all may hold between two jobs."""
        self.device = device
        self._memory_bytes = memory_bytes
        self.warm_bytes = warm_bytes
        self._models: dict[str, HostedModel] = {}  # by digest, the one that was used last at the end

    def get(self, package: Package) -> HostedModel | CommandModel:
        """The package's model: loaded, or a process that has begun to load it; a program, which is nothing to keep."""
        if package.manifest.adapter is Adapter.COMMAND:
            return CommandModel(package.folder, package.manifest, self.device)
        model = self._models.pop(package.digest, None)
        if model is not None and model.stopped:  # for a job that is over
            model.close()
            model = None
        if model is None:
            model = HostedModel(package, self.device, memory_bytes=self._memory_bytes)
        self._models[package.digest] = model
        return model

    def make_room(self) -> None:
        """End what was not used for longest until the others fit; the last one stays, however large it is.

        Of a GPU they hold half at most: a model that runs needs more than one that waits. No job runs meanwhile.
        """
        held = {digest: (model.resident_bytes, model.cuda_share) for digest, model in self._models.items()}
        for digest in list(self._models)[:-1]:
            fits = sum(bytes_ for bytes_, _ in held.values()) <= self.warm_bytes
            if fits and sum(share for _, share in held.values()) <= 0.5:
                return
            del held[digest]
            self._models.pop(digest).close()

    @property
    def names(self) -> frozenset[str]:
        """The models that are loaded, or about to be."""
        return frozenset(model.name for model in self._models.values())

    def close(self) -> None:
        """End all of them."""
        while self._models:
            self._models.popitem()[1].close()
