"""What a report is about: the images, what the model said of them, and who says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Protocol

from pydicom.dataset import Dataset

from node.dicom.uid import derive_uid
from node.dicom.volume import Image, SliceRef, Volume
from node.errors import OutputRefused
from node.infer.manifest import Finding, Manifest
from node.infer.results import Labelmap, Prediction
from node.infer.saliency import Saliency
from node.report.house import House
from node.report.kinds import Kind

MANUFACTURER = "radnode"
UNKNOWN = "unknown"  # version and digest of a model whose package is not here


class Dated(Protocol):
    """What a result object takes its dates from."""

    @property
    def created(self) -> datetime:
        """Of the work, with its time zone."""
        ...

    @property
    def sources(self) -> tuple[Dataset, ...]:
        """Headers of what it was made of; the first states its offset from UTC or none."""
        ...


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a result object comes from: the job, the images and the model."""

    key: str  # the job's key; every UID of a result derives from it
    created: datetime  # aware; the results' content date and time
    sources: tuple[Dataset, ...]  # headers of the source images without pixel data, in the volume's slice order
    manifest: Manifest
    model_name: str
    model_version: str
    model_digest: str
    node_version: str
    house: House = field(default_factory=House)
    previous: tuple[Dataset, ...] = ()  # headers of the reports of ours that this one replaces
    parameters: dict[str, str] = field(default_factory=dict)

    def uid(self, *parts: str) -> str:
        """A UID of one part of the results."""
        return derive_uid(self.key, *parts)

    @cached_property
    def says(self) -> str:
        """All text of results that is not the images' own, to know which characters it has."""
        return f"{self.house} {self.manifest!r} {self.model_name} {self.model_version} {self.algorithm_parameters()}"

    @property
    def model(self) -> str:
        """The model as people read it: name and version, where that is known."""
        return self.model_name if self.model_version == UNKNOWN else f"{self.model_name} {self.model_version}"

    @property
    def device_uid(self) -> str:
        """The UID of the observing device: this model in this version of the node (PS3.16 TID 1004)."""
        return derive_uid("device", self.model_name, self.model_version, self.node_version)

    def series_number(self, kind: Kind) -> int:
        """The number of the series that the results of one kind are in."""
        return self.house.number(self.model_name, kind)

    def series_description(self, kind: Kind) -> str:
        """What a viewer lists these results under (LO, 64 characters)."""
        return self.house.describe(
            model=self.model_name,
            version="" if self.model_version == UNKNOWN else self.model_version,
            title=self.manifest.title,
            kind=kind,
        )

    def algorithm_parameters(self) -> dict[str, str]:
        """What the result depends on beside the images, by name."""
        return {"package SHA-256": self.model_digest, "radnode": self.node_version, **self.parameters}


@dataclass(frozen=True, kw_only=True)
class Subject(Origin):
    """Everything that the result objects of one run are made from."""

    source: Volume | Image
    prediction: Prediction
    saliency: Saliency | None = None  # what a classifier's scores came from, on the source's slices

    def algorithm_parameters(self) -> dict[str, str]:
        """As of every result, and what the run itself wants said, such as a step down for lack of memory."""
        remarks = {f"remark {number}": remark for number, remark in enumerate(self.prediction.remarks, 1)}
        return super().algorithm_parameters() | remarks

    @property
    def volume(self) -> Volume:
        """The source where only a volume will do."""
        if not isinstance(self.source, Volume):
            raise OutputRefused(f"the model returned a {_kind(self.prediction)} of a planar image: it needs a volume")
        return self.source

    @property
    def source_slices(self) -> tuple[SliceRef, ...]:
        """The slices of the volume or the frames of the image, in the order of its array."""
        return self.source.slices if isinstance(self.source, Volume) else self.source.frames

    @property
    def labelmap(self) -> Labelmap:
        """The prediction where it is known to be a label map."""
        if not isinstance(self.prediction, Labelmap):
            raise TypeError(f"a {_kind(self.prediction)} is no label map")
        return self.prediction

    def meaning(self, label: int) -> Finding:
        """What a class of the prediction means; `OutputRefused` for one that the manifest does not declare."""
        try:
            return self.manifest.classes[label]
        except KeyError:
            raise OutputRefused(f"the model returned class {label}, which dicom.yaml does not declare") from None


def _kind(prediction: Prediction) -> str:
    return type(prediction).__name__.lower()
