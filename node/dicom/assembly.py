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
from pydicom.multival import MultiValue
from pydicom.uid import UID

from node.dicom.identity import is_uid
from node.dicom.volume import Affine, Grid, SliceRef

ORIENTATION_TOLERANCE = 1e-3  # of a direction cosine
SPACING_TOLERANCE = 0.02  # relative to the median spacing, or
SPACING_TOLERANCE_MM = 0.05
SHEAR_TOLERANCE_MM = 0.5  # how far a slice's corner may stand off the normal through the first one's

_NOT_IMAGES = ("LOCALIZER", "SCREEN SAVE", "DOSE_INFO")


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
    """The frames of one planar instance as its header describes them."""

    frames: tuple[SliceRef, ...]
    path: Path
    header: Dataset
    shape: tuple[int, int, int]  # frames, rows, columns
    colour: bool
    series_uid: str
    study_uid: str
    modality: str
    name: str = ""  # what tells it from other images of its series: "image 2"

    @property
    def headers(self) -> tuple[Dataset, ...]:
        """One per instance, as a volume's plan has them."""
        return (self.header,)

    @property
    def slices(self) -> tuple[SliceRef, ...]:
        """Its frames, as a volume's plan calls them."""
        return self.frames


InputPlan = VolumePlan | ImagePlan


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
    images: tuple[ImagePlan, ...] = ()


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
        kinds = _kinds(header)
        if not _numbers(header, "Rows", 1) or not _numbers(header, "Columns", 1):
            reason = f"{_class_name(header)} is no image"
        elif _numbers(header, "NumberOfFrames", 1) > [1.0] or "SharedFunctionalGroupsSequence" in header:
            reason = f"multi-frame images ({_class_name(header)}) are not supported yet"
        elif found := next((kind for kind in _NOT_IMAGES if kind in kinds), ""):
            reason = f"ImageType says {found}"
        elif _numbers(header, "SamplesPerPixel", 1) > [1.0]:
            reason = "it is a colour image"
        elif not _numbers(header, "ImagePositionPatient", 3) or not _numbers(header, "ImageOrientationPatient", 6):
            reason = "it has no position in the patient (ImagePositionPatient, ImageOrientationPatient)"
        elif not header.get("SOPInstanceUID") or not header.get("SOPClassUID"):
            reason = "it has no SOPInstanceUID or no SOPClassUID"
        elif min(_numbers(header, "PixelSpacing", 2), default=0) <= 0:
            reason = "it has no PixelSpacing"
        else:
            reason = ""
        groups.setdefault(reason, []).append((path, header))
    return groups.items()


def _tell_apart(images: list[tuple[Path, Dataset]]) -> list[tuple[str, list[tuple[Path, Dataset]]]]:
    """Groups of one size, one orientation and one frame of reference."""
    groups: list[tuple[Dataset, list[tuple[Path, Dataset]]]] = []
    for path, header in images:
        for first, group in groups:
            alike = np.allclose(_orientation(first), _orientation(header), atol=ORIENTATION_TOLERANCE)
            if alike and _frame(first) == _frame(header):
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
    if not np.allclose((row @ row, column @ column, row @ column), (1, 1, 0), atol=1e-2):
        return refuse("ImageOrientationPatient is no pair of perpendicular directions")
    if len(images) < 2:
        return refuse("a single slice makes no volume")
    positions = np.array([_numbers(header, "ImagePositionPatient", 3) for _, header in images])
    order = np.argsort(positions @ normal, kind="stable")
    images = [images[index] for index in order]
    positions = positions[order]
    steps = np.diff(positions @ normal)
    if (doubled := np.flatnonzero(steps < 0.01)).size:
        at = positions[doubled[0]] @ normal
        return refuse(
            f"{doubled.size} of {len(images)} slices lie where another one lies "
            f"(the first at {at:.2f} mm along the normal): repeated, or several volumes in one series"
        )
    step = float(np.sort(steps)[(len(steps) - 1) // 2])  # a median that is one of the steps, however few there are
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
    spacings = {tuple(_numbers(header, "PixelSpacing", 2)) for _, header in images}
    if len(spacings) > 1:
        return refuse(f"slices differ in PixelSpacing: {sorted(spacings)[:3]}")
    row_spacing_mm, column_spacing_mm = spacings.pop()
    affine = np.eye(4)
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
        header=images[len(images) // 2][1],
        series_uid=series_uid,
        study_uid=str(first.get("StudyInstanceUID", "")),
        modality=str(first.get("Modality", "")),
        name=name,
    )


def _orientation(header: Dataset) -> np.ndarray:
    return np.array(_numbers(header, "ImageOrientationPatient", 6))


def _frame(header: Dataset) -> tuple[int, int, str]:
    return int(header.Rows), int(header.Columns), str(header.get("FrameOfReferenceUID", ""))


def _numbers(header: Dataset, keyword: str, count: int) -> list[float]:
    """The element's values when they are `count` finite numbers; else an empty list."""
    try:
        value = header.get(keyword)
        numbers = [float(part) for part in (value if isinstance(value, MultiValue | list) else [value])]
    except Exception:  # pydicom raises many kinds for a value that it cannot convert; the element then counts as absent
        return []
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else []


def _kinds(header: Dataset) -> list[str]:
    """The values of ImageType; the standard asks for two at least, scanners also send one."""
    value = header.get("ImageType") or ()
    return [str(kind).upper() for kind in ((value,) if isinstance(value, str) else value)]


def _uids(images: list[tuple[Path, Dataset]]) -> tuple[str, ...]:
    return tuple(str(header.get("SOPInstanceUID", "")) for _, header in images)


def _class_name(header: Dataset) -> str:
    uid = header.get("SOPClassUID")
    # A damaged length can make any text of the file part of the value: only what is a UID is shown.
    return UID(uid).name if isinstance(uid, str) and is_uid(uid) else "an unknown SOP class"
