"""From the instances of any number of series to volumes in patient space and images, and why where there is none.

`node.dicom.candidates` says what each instance can be, `node.dicom.tell_apart` what belongs together, and
`node.dicom.stack` where the slices stand. Slices of one place that time tells apart are an image (`node.dicom.cine`).
Only headers are looked at; `node.dicom.pixels` reads the voxels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydicom.dataset import Dataset

from node.dicom.candidates import Planar, Slice, numbers, sort_out
from node.dicom.cine import find_cines
from node.dicom.stack import Stack, stack_slices
from node.dicom.tell_apart import tell_apart
from node.dicom.volume import Affine, Grid, SliceRef


@dataclass(frozen=True)
class VolumePlan:
    """A volume as its headers describe it."""

    grid: Grid
    slices: tuple[SliceRef, ...]  # in array order: along +(row direction x column direction)
    paths: tuple[Path, ...]  # one per slice
    headers: tuple[Dataset, ...]  # one per instance as it was sent, in the order of their first slices
    header: Dataset  # stands for the volume in conditions and ranks: that of its middle slice, a frame's flattened
    series_uid: str
    study_uid: str
    modality: str
    name: str = ""  # what tells it from other volumes of its series: "echo 2", "b 1000"
    positions_lps: Affine | None = None  # as in `Volume`


@dataclass(frozen=True)
class ImagePlan:
    """The frames of one planar instance, or of a cine, as their headers describe them."""

    frames: tuple[SliceRef, ...]
    paths: tuple[Path, ...]  # one per frame
    headers: tuple[Dataset, ...]  # one per instance, in the order of their first frames
    header: Dataset  # stands for the image: that of its first frame, with what functional groups say of it
    shape: tuple[int, int, int]  # frames, rows, columns
    colour: bool
    series_uid: str
    study_uid: str
    modality: str
    name: str = ""  # what tells it from other images of its series: "image 2"

    @property
    def slices(self) -> tuple[SliceRef, ...]:
        """Its frames, as a volume's plan calls them."""
        return self.frames


InputPlan = VolumePlan | ImagePlan


def shape_of(plan: InputPlan) -> tuple[int, int, int]:
    """Slices or frames, rows and columns."""
    return plan.grid.shape if isinstance(plan, VolumePlan) else plan.shape


@dataclass(frozen=True)
class Refusal:
    """Instances that make no volume and no image, and why."""

    series_uid: str
    sentence: str
    sop_instance_uids: tuple[str, ...]


@dataclass(frozen=True)
class Assembly:
    """What a set of instances amounts to."""

    volumes: tuple[VolumePlan, ...]
    refusals: tuple[Refusal, ...]
    images: tuple[ImagePlan, ...] = ()


def assemble_volumes(headers: Mapping[Path, Dataset]) -> Assembly:
    """The volumes and images of these instances; the same whatever order they are given in."""
    series: dict[str, list[tuple[Path, Dataset]]] = {}
    for path, header in headers.items():
        series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((path, header))
    volumes: list[VolumePlan] = []
    refusals: list[Refusal] = []
    images: list[ImagePlan] = []
    for uid in sorted(series):
        candidates = sort_out(sorted(series[uid], key=_member_key))
        stacked: list[Slice] = []
        refused: list[tuple[str, tuple[Slice, ...]]] = []
        for group in tell_apart(candidates.slices) if candidates.slices else ():
            outcome = group.refused or stack_slices(group.slices)
            if isinstance(outcome, Stack):
                volumes.append(_volume(uid, group.name, outcome))
                stacked += group.slices
            else:
                refused.append((outcome, group.slices))
        cines = find_cines([slice_ for _, slices in refused for slice_ in slices], stacked)
        candidates.images += cines
        shown = {ref for cine in cines for ref in cine.frames}
        for reason, slices in refused:
            for slice_ in slices:
                if slice_.ref not in shown:
                    candidates.leave(reason, slice_.instance)
        for reason, instances in candidates.aside.items():
            refusals.append(Refusal(uid, reason, tuple(str(header.get("SOPInstanceUID", "")) for header in instances)))
        images += _images(uid, candidates.images)
    return Assembly(tuple(volumes), tuple(refusals), tuple(images))


def _member_key(member: tuple[Path, Dataset]) -> tuple[str, str]:
    path, header = member
    return str(header.get("SOPInstanceUID", "")), str(path)


def _volume(series_uid: str, name: str, stack: Stack) -> VolumePlan:
    slices = stack.slices
    header = slices[len(slices) // 2].header
    instances: dict[int, Dataset] = {id(slice_.instance): slice_.instance for slice_ in slices}
    return VolumePlan(
        grid=Grid(
            (len(slices), *slices[0].size), stack.affine_lps, str(slices[0].header.get("FrameOfReferenceUID", ""))
        ),
        slices=tuple(slice_.ref for slice_ in slices),
        paths=tuple(slice_.path for slice_ in slices),
        headers=tuple(instances.values()),
        header=header,
        series_uid=series_uid,
        study_uid=str(header.get("StudyInstanceUID", "")),
        modality=str(header.get("Modality", "")),
        name=name,
        positions_lps=stack.positions_lps,
    )


def _images(series_uid: str, images: list[Planar]) -> list[ImagePlan]:
    def number(image: Planar) -> float:
        return (numbers(image.header, "InstanceNumber", 1) or [0.0])[0]

    return [
        ImagePlan(
            frames=image.frames,
            paths=image.paths,
            headers=image.instances,
            header=image.header,
            shape=(len(image.frames), int(image.header.Rows), int(image.header.Columns)),
            colour=image.colour,
            series_uid=series_uid,
            study_uid=str(image.header.get("StudyInstanceUID", "")),
            modality=str(image.header.get("Modality", "")),
            name=f"image {place}" if len(images) > 1 else "",
        )
        for place, image in enumerate(sorted(images, key=number), 1)  # ties stay in the order of their UIDs
    ]
