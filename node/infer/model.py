"""The small protocols behind which every packaging of a model stands, and the choice of the one that runs a package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from node.dicom.assembly import InputPlan
from node.dicom.volume import Image, Volume
from node.errors import ModelError
from node.infer.package import Package
from node.infer.packagings import Adapter
from node.infer.results import DicomObjects, Labelmap, Prediction


class Model(Protocol):
    """A model that is loaded: run as often as wanted, by one thread at a time."""

    def predict(self, inputs: Mapping[str, Volume | Image]) -> Prediction:
        """Run on `inputs`, one for each of the manifest's, every volume regular.

        The prediction is in the first input's own geometry. Raises `ModelError` when the model fails, `OutputRefused`
        when what it returned is no result, `InputRefused` when the inputs do not fit each other or the model.
        """
        ...

    def close(self) -> None:
        """Let go of the network and its memory."""
        ...


@runtime_checkable
class DicomModel(Protocol):
    """A model that reads the DICOM files of its inputs itself."""

    def run(self, plans: Mapping[str, InputPlan], key: str) -> DicomObjects | Labelmap:
        """Run on the files of `plans`, one for each of the manifest's inputs; UIDs of results derive from `key`.

        Raises `ModelError` when the model fails, `OutputRefused` when what it wrote is no result of these inputs.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class Stoppable(Protocol):
    """What runs for a job, as far as its worker's other threads look at it."""

    running: bool  # it has its input and has not answered yet

    def stop(self, why: str) -> None:
        """End its process, from any thread; its run, or the one that comes next, fails with this sentence."""
        ...


def open_model(
    package: Package, device: str, *, memory_bytes: int | None = None, in_process: bool = False
) -> Model | DicomModel:
    """The package's model as a worker runs it: in a confined process of its own, which loads when it is first needed.

    A program or container starts processes itself, which the confinement would forbid, and has walls of its own
    (`node.infer.command`). `in_process` loads the model into this process, to look for a mistake in it.
    """
    if in_process or package.manifest.adapter is Adapter.COMMAND:
        return load_model(package, device)
    from node.infer.hosted import HostedModel

    return HostedModel(package, device, memory_bytes=memory_bytes)


def load_model(package: Package, device: str) -> Model | DicomModel:
    """The package's model on this torch device, in this process; `ModelError` says what is missing or raised."""
    folder, manifest = package.folder, package.manifest
    match manifest.adapter:
        case Adapter.MONAI_BUNDLE:
            from node.infer.bundle import BundleModel

            return BundleModel(folder, manifest, device)
        case Adapter.TORCHSCRIPT | Adapter.TORCH_EXPORT:
            from node.infer.network import NetworkModel

            return NetworkModel(folder, manifest, device)
        case Adapter.NNUNET:
            from node.infer.nnunet import NnUNetModel

            return NnUNetModel(folder, manifest, device)
        case Adapter.COMMAND:
            from node.infer.command import CommandModel

            return CommandModel(folder, manifest, device)
    raise ModelError(f"model package {package.name}: there is no adapter {manifest.adapter}")
