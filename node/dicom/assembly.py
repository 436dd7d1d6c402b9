"""From the instances of any number of series to regular volumes in patient space, with the reason where there is none.

Slices are ordered along their normal and spacing comes from their positions, never from SliceThickness or instance
numbers (PS3.3 C.7.6.2.1.1). Only headers are looked at; `node.dicom.pixels` reads the voxels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from node.dicom.volume import Affine, Grid, SliceRef

ORIENTATION_TOLERANCE = 1e-3  # of a direction cosine
SPACING_TOLERANCE = 0.02  # relative to the median spacing, or
SPACING_TOLERANCE_MM = 0.05
SHEAR_TOLERANCE_MM = 0.5  # how far a slice's corner may stand off the normal through the first one's

_NOT_IMAGES = ("LOCALIZER", "SCREEN SAVE", "DOSE_INFO")


@dataclass(frozen=True)
class VolumePlan:
    """A regular volume as its headers describe it."""

    grid: Grid
    slices: tuple[SliceRef, ...]  # in array order: along +(row direction x column direction)
    paths: tuple[Path, ...]  # one per slice
    headers: tuple[Dataset, ...]  # one per slice
    series_uid: str
    study_uid: str
    modality: str
    name: str = ""  # what tells it from other volumes of its series

    @property
    def header(self) -> Dataset:
        """The header that stands for the volume: that of its middle slice."""
        return self.headers[len(self.headers) // 2]


@dataclass(frozen=True)
class Refusal:
    """Instances that make no regular volume, and why."""

    series_uid: str
    sentence: str
    sop_instance_uids: tuple[str, ...]


@dataclass(frozen=True)
class Assembly:
    """What a set of instances amounts to."""

    volumes: tuple[VolumePlan, ...]
    refusals: tuple[Refusal, ...]


def assemble_volumes(headers: Mapping[Path, Dataset]) -> Assembly:
    """The regular volumes of these instances; the same whatever order they are given in."""
    series: dict[str, list[tuple[Path, Dataset]]] = {}
    for path, header in headers.items():
        series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((path, header))
    volumes: list[VolumePlan] = []
    refusals: list[Refusal] = []
    for uid in sorted(series):
        members = sorted(series[uid], key=lambda member: str(member[1].get("SOPInstanceUID", "")))
        images: list[tuple[Path, Dataset]] = []
        for reason, group in _set_aside(members):
            if reason:
                refusals.append(Refusal(uid, reason, _uids(group)))
            else:
                images = group
        for name, group in _tell_apart(images):
            outcome = _assemble(uid, name, group)
            (volumes if isinstance(outcome, VolumePlan) else refusals).append(outcome)  # pyright: ignore
    return Assembly(tuple(volumes), tuple(refusals))


def _set_aside(members: list[tuple[Path, Dataset]]) -> Iterable[tuple[str, list[tuple[Path, Dataset]]]]:
    """Split off what is no slice of a volume; the images come with an empty reason."""
    groups: dict[str, list[tuple[Path, Dataset]]] = {}
    for path, header in members:
        kinds = [str(kind).upper() for kind in header.get("ImageType") or []]
        if "Rows" not in header:
            reason = f"{_class_name(header)} is no image"
        elif int(header.get("NumberOfFrames") or 1) > 1 or "SharedFunctionalGroupsSequence" in header:
            reason = f"multi-frame images ({_class_name(header)}) are not supported yet"
        elif found := next((kind for kind in _NOT_IMAGES if kind in kinds), ""):
            reason = f"ImageType says {found}"
        elif int(header.get("SamplesPerPixel") or 1) != 1:
            reason = "it is a colour image"
        elif "ImagePositionPatient" not in header or "ImageOrientationPatient" not in header:
            reason = "it has no position in the patient (ImagePositionPatient, ImageOrientationPatient)"
        elif not header.get("PixelSpacing"):
            reason = "it has no PixelSpacing"
        else:
            reason = ""
        groups.setdefault(reason, []).append((path, header))
    return groups.items()


def _tell_apart(images: list[tuple[Path, Dataset]]) -> list[tuple[str, list[tuple[Path, Dataset]]]]:
    """Groups of one size and one orientation."""
    groups: list[tuple[Dataset, list[tuple[Path, Dataset]]]] = []
    for path, header in images:
        for first, group in groups:
            same_size = (first.Rows, first.Columns) == (header.Rows, header.Columns)
            if same_size and np.allclose(_orientation(first), _orientation(header), atol=ORIENTATION_TOLERANCE):
                group.append((path, header))
                break
        else:
            groups.append((header, [(path, header)]))
    return [(f"volume {number}" if len(groups) > 1 else "", group) for number, (_, group) in enumerate(groups, 1)]


def _assemble(series_uid: str, name: str, images: list[tuple[Path, Dataset]]) -> VolumePlan | Refusal:
    def refuse(sentence: str) -> Refusal:
        return Refusal(series_uid, sentence, _uids(images))

    first = images[0][1]
    row, column = _orientation(first).reshape(2, 3)
    normal = np.cross(row, column)
    if not np.isclose(np.linalg.norm(normal), 1, atol=1e-2):
        return refuse("ImageOrientationPatient is no pair of perpendicular directions")
    if len(images) < 2:
        return refuse("a single slice makes no volume")
    positions = np.array([[float(value) for value in header.ImagePositionPatient] for _, header in images])
    order = np.argsort(positions @ normal, kind="stable")
    images = [images[index] for index in order]
    positions = positions[order]
    steps = np.diff(positions @ normal)
    if (doubled := np.flatnonzero(steps < 0.01)).size:
        at = positions[doubled[0]] @ normal
        return refuse(
            f"{doubled.size + 1} slices or more lie at the same positions (first at {at:.2f} mm along the normal)"
        )
    step = float(np.median(steps))
    if (odd := np.flatnonzero(np.abs(steps - step) > max(SPACING_TOLERANCE * step, SPACING_TOLERANCE_MM))).size:
        index = int(odd[0])
        what = (
            "a slice is missing"
            if np.isclose(steps[index] / step, round(steps[index] / step), atol=0.05)
            else "spacing varies"
        )
        return refuse(
            f"{what}: {steps[index]:.2f} mm between slices {index + 1} and {index + 2} of {len(images)}, "
            f"{step:.2f} mm elsewhere"
        )
    sheared = positions - positions[0] - np.outer((positions - positions[0]) @ normal, normal)
    if (worst := float(np.linalg.norm(sheared, axis=1).max())) > SHEAR_TOLERANCE_MM:
        return refuse(
            f"the slices are sheared (gantry tilt): the last stands {worst:.1f} mm off the normal of the first"
        )
    spacings = {tuple(float(value) for value in header.PixelSpacing) for _, header in images}
    if len(spacings) > 1:
        return refuse(f"slices differ in PixelSpacing: {sorted(spacings)[:3]}")
    row_spacing_mm, column_spacing_mm = spacings.pop()
    affine: Affine = np.eye(4)
    affine[:3, 0] = row * column_spacing_mm
    affine[:3, 1] = column * row_spacing_mm
    affine[:3, 2] = (positions[-1] - positions[0]) / (len(images) - 1)
    affine[:3, 3] = positions[0]
    grid = Grid((len(images), int(first.Rows), int(first.Columns)), affine, str(first.get("FrameOfReferenceUID", "")))
    return VolumePlan(
        grid=grid,
        slices=tuple(SliceRef(str(header.SOPClassUID), str(header.SOPInstanceUID)) for _, header in images),
        paths=tuple(path for path, _ in images),
        headers=tuple(header for _, header in images),
        series_uid=series_uid,
        study_uid=str(first.get("StudyInstanceUID", "")),
        modality=str(first.get("Modality", "")),
        name=name,
    )


def _orientation(header: Dataset) -> np.ndarray:
    return np.array([float(value) for value in header.ImageOrientationPatient])


def _uids(images: list[tuple[Path, Dataset]]) -> tuple[str, ...]:
    return tuple(str(header.get("SOPInstanceUID", "")) for _, header in images)


def _class_name(header: Dataset) -> str:
    uid = header.get("SOPClassUID")
    return getattr(uid, "name", None) or "an unknown SOP class"
