"""The small protocol behind which every packaging of a model stands, and the choice of the one that runs a package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from node.dicom.volume import Image, Volume
from node.infer.package import Package
from node.infer.results import Prediction


class Model(Protocol):
    """A model that is loaded: run as often as wanted, by one thread at a time."""

    def predict(self, inputs: Mapping[str, Volume | Image]) -> Prediction:
        """Run on `inputs`, one for each of the manifest's, every volume regular.

        The prediction is in the first input's own geometry. Raises `ModelError` when the model fails, `OutputRefused`
        when what it returned is no result.
        """
        ...

    def close(self) -> None:
        """Let go of the network and its memory."""
        ...


def load_model(package: Package, device: str) -> Model:
    """The package's model on this torch device, in this process; `ModelError` says what is missing or raised."""
    from node.infer.bundle import BundleModel

    return BundleModel(package.folder, package.manifest, device)
