"""What a report is about: the images, what the model said of them, and who says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from pydicom.dataset import Dataset

from node.dicom.uid import derive_uid
from node.dicom.volume import Volume
from node.infer.manifest import Manifest
from node.infer.results import Labelmap

MANUFACTURER = "radnode"


@dataclass(frozen=True)
class Subject:
    """Everything that the result objects of one run are made from."""

    key: str  # the job's key; every UID of a result derives from it
    created: datetime  # aware; the results' content date and time
    volume: Volume
    sources: tuple[Dataset, ...]  # headers of the source images without pixel data, in the volume's slice order
    labelmap: Labelmap
    manifest: Manifest
    model_name: str
    model_version: str
    model_digest: str
    node_version: str
    series_number: int = 901  # of the first result series; the next kind takes the next number
    parameters: dict[str, str] = field(default_factory=dict)

    def uid(self, *parts: str) -> str:
        """A UID of one part of the results."""
        return derive_uid(self.key, *parts)

    @property
    def device_uid(self) -> str:
        """The UID of the observing device: this model in this version of the node (PS3.16 TID 1004)."""
        return derive_uid("device", self.model_name, self.model_version, self.node_version)

    @property
    def series_description(self) -> str:
        """What a viewer lists the result under (LO, 64 characters); what matters most stands first."""
        return f"AI unverified: {self.model_name} {self.model_version}"[:64]

    def algorithm_parameters(self) -> dict[str, str]:
        """What the result depends on beside the images, by name."""
        return {"package SHA-256": self.model_digest, "radnode": self.node_version, **self.parameters}
