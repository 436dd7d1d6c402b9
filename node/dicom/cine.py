"""Slices at one place, taken one after the other: a cine, which is an image of several frames.

A cardiac cine of the long axis is a series of single-frame images (PS3.3 A.4) that differ in nothing but their time.
Slices at several places are volumes wherever they can be (`node.dicom.tell_apart`): only what no volume was made of is
looked at here. Only MR: in CT the place that is watched is that of a bolus tracking, and no image to judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from pydicom.dataset import Dataset

from node.dicom.candidates import Planar, Slice
from node.dicom.stack import LINE_TOLERANCE_MM, SAME_PLACE_MM, heights_mm
from node.dicom.tell_apart import ORIENTATION_TOLERANCE, by_geometry
from node.dicom.traits import WHAT, Value, acquired, number

FRAMES_MIN = 3  # two images of one place are a repetition

Key = Callable[[Slice], Value | None]

# What may say when a frame was taken; the first that all frames of a place differ in counts.
_TIMES: tuple[Key, ...] = (
    number("TriggerTime"),
    number("NominalPercentageOfCardiacPhase"),
    number("TemporalPositionIdentifier", "TemporalPositionIndex"),
    number("FrameReferenceTime"),
    acquired,
)


def find_cines(refused: Sequence[Slice], stacked: Sequence[Slice]) -> list[Planar]:
    """The cines among slices that no volume was made of, each in the order of time.

    `stacked` are the slices of the series that volumes were made of: what lies at a place of theirs is no cine, but
    what is left of a series of volumes. At a place, images of each kind (magnitude and velocity, echoes) are a cine of
    their own; where one of them is none, nothing of that place is.
    """
    cines: list[Planar] = []
    orientations = np.array([slice_.orientation for slice_ in stacked]).reshape(-1, 6)
    positions = np.array([slice_.position_lps for slice_ in stacked]).reshape(-1, 3)
    for shape in by_geometry([slice_ for slice_ in refused if slice_.header.get("Modality") == "MR"]):
        row, column = np.array(shape[0].orientation).reshape(2, 3)
        alike = (np.abs(orientations - shape[0].orientation) <= ORIENTATION_TOLERANCE).all(axis=1)
        taken = positions[alike] @ np.cross(row, column)
        for place in _places(shape):
            if not (np.abs(taken - heights_mm(place)[0]) < SAME_PLACE_MM).any():
                cines += _cines_at(place)
    return cines


def _places(shape: tuple[Slice, ...]) -> Iterator[list[Slice]]:
    """The slices of each place."""
    heights = heights_mm(shape)
    order = np.argsort(heights, kind="stable")
    starts = np.flatnonzero(np.diff(heights[order]) >= SAME_PLACE_MM) + 1
    for indices in np.split(order, starts):
        yield [shape[index] for index in indices.tolist()]


def _cines_at(place: list[Slice]) -> list[Planar]:
    if any(_distance_mm(slice_, place[0]) > LINE_TOLERANCE_MM for slice_ in place):
        return []
    kinds: dict[tuple[Value | None, ...], list[Slice]] = {}
    for slice_ in place:
        kinds.setdefault(tuple(trait.value(slice_) for trait in WHAT if not trait.says_when), []).append(slice_)
    ordered = [_in_time(slices) for slices in kinds.values()]
    return [_planar(slices) for slices in ordered] if all(ordered) else []


def _in_time(slices: list[Slice]) -> list[Slice]:
    """The slices in the order of their times; an empty list where these are not known or not all different."""
    if len(slices) < FRAMES_MIN:
        return []
    for time in _TIMES:
        times = {value: slice_ for slice_ in slices if (value := time(slice_)) is not None}
        if len(times) == len(slices):
            return [times[value] for value in sorted(times)]  # pyright: ignore[reportArgumentType]  # of one kind each
    return []


def _planar(slices: list[Slice]) -> Planar:
    instances: dict[int, Dataset] = {id(slice_.instance): slice_.instance for slice_ in slices}
    return Planar(
        paths=tuple(slice_.path for slice_ in slices),
        instances=tuple(instances.values()),
        header=slices[0].header,
        frames=tuple(slice_.ref for slice_ in slices),
        colour=False,
    )


def _distance_mm(slice_: Slice, other: Slice) -> float:
    return float(np.linalg.norm(np.subtract(slice_.position_lps, other.position_lps)))
