"""Panels of volumes and planar images: sections turned as radiologists look at them, windowed, with their marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from node.dicom.volume import Image, Volume
from node.report.page import Caption, Mark, Panel

AXIAL_PANELS = 6


def spread(first: int, last: int, count: int) -> list[int]:
    """At most `count` indices spread over `first` to `last`, ascending, away from the ends where there is room."""
    return np.unique(np.linspace(first, last, count + 2).round().astype(int)[1:-1]).tolist()


def show_section(
    volume: Volume, axis: int, index: int, labels: NDArray[np.uint16] | None = None, marks: Sequence[Mark] = ()
) -> Panel:
    """A section across one array axis in standard radiological display, whichever way the array runs.

    `labels` are those of the whole volume, `marks` in the pixels of the section.
    """
    across_axis = (slice(None),) * axis + (index,)
    low, high = grey_range(volume)
    grey = np.clip((volume.array[across_axis] - low) / (high - low), 0, 1)
    marked = None if labels is None else labels[across_axis]
    spacing = list(volume.grid.spacing_mm)
    if axis > 0 and volume.positions_lps is not None:
        rows, spacing[0] = _even_slices(volume)
        grey, marked = grey[rows], None if marked is None else marked[rows]
    down, across = (other for other in range(3) if other != axis)
    directions = [volume.grid.affine_lps[:3, 2 - array_axis] for array_axis in range(3)]
    letters = {axis: _letters(directions[axis]) for axis in (down, across)}
    # Standard display: patient's right or anterior at the left edge, anterior or head at the upper edge.
    if letters[across][0] not in "RA":
        width = grey.shape[1]
        grey, marked = grey[:, ::-1], None if marked is None else marked[:, ::-1]
        marks = [Mark(mark.label, mark.points * (1, -1) + (0, width - 1), mark.name) for mark in marks]
        letters[across] = letters[across][::-1]
    if letters[down][0] not in "AH":
        height = grey.shape[0]
        grey, marked = grey[::-1], None if marked is None else marked[::-1]
        marks = [Mark(mark.label, mark.points * (-1, 1) + (height - 1, 0), mark.name) for mark in marks]
        letters[down] = letters[down][::-1]
    caption = Caption("slice", index) if axis == 0 else Caption(_plane(directions[axis]))
    edges = (letters[across][0], letters[down][0])
    return Panel(grey, (spacing[down], spacing[across]), caption, edges, marked, tuple(marks))


def show_sections(volume: Volume) -> list[Panel]:
    """A volume with nothing to point at: slices across all of it, then a coronal and a sagittal section."""
    slices, rows, columns = volume.array.shape
    panels = [show_section(volume, 0, index) for index in spread(0, slices - 1, AXIAL_PANELS)[::-1]]
    return [*panels, show_section(volume, 1, rows // 2), show_section(volume, 2, columns // 2)]


def show_frame(
    image: Image, index: int, labels: NDArray[np.uint16] | None = None, marks: Sequence[Mark] = (), said: str = ""
) -> Panel:
    """One frame of a planar image as it was sent: grey windowed to what the whole image has, colour as it is."""
    frame = image.array[index]
    if image.array.ndim == 4:
        pixels = frame.astype(np.float32) / 255
    else:
        low, high = grey_range(image)
        pixels = np.clip((frame.astype(np.float32) - low) / (high - low), 0, 1)
    caption = Caption("frame", index, said=said) if len(image.frames) > 1 else None
    marked = None if labels is None else labels[index]
    return Panel(pixels, image.spacing_mm or (1.0, 1.0), caption, labels=marked, marks=tuple(marks))


def show_frames(image: Image, indices: Sequence[int], labels: NDArray[np.uint16] | None = None) -> list[Panel]:
    """Several frames of a planar image."""
    return [show_frame(image, index, labels) for index in indices]


def show_at(source: Volume | Image, index: int, marks: Sequence[Mark]) -> Panel:
    """The slice or frame of this index with its marks."""
    if isinstance(source, Volume):
        return show_section(source, 0, index, marks=marks)
    return show_frame(source, index, marks=marks)


def grey_range(source: Volume | Image) -> tuple[float, float]:
    """Lowest and highest value shown: wide enough for lung and soft tissue on CT, percentiles elsewhere."""
    if isinstance(source, Image):
        return _percentiles(source.array, foreground=True)
    return (-1150.0, 350.0) if source.unit == "HU" else _percentiles(source.array)


def zoom(panel: Panel, mark: Mark, *, sides: float = 2.5, least_mm: float = 40.0) -> Panel:
    """The part of a panel around a mark, `sides` times as wide as it and no narrower than `least_mm`."""
    spacing = np.array(panel.spacing_mm)
    low, high = mark.points.min(axis=0), mark.points.max(axis=0)
    half_mm = max(float(((high - low) * spacing).max()) * sides, least_mm) / 2
    shape = np.array(panel.pixels.shape[:2])
    start = np.clip(np.floor((low + high) / 2 - half_mm / spacing), 0, shape - 2).astype(int)
    stop = np.clip(np.ceil((low + high) / 2 + half_mm / spacing) + 1, start + 2, shape).astype(int)
    (top, left), (bottom, right) = start, stop
    moved = tuple(
        Mark(each.label, each.points - start, each.name)
        for each in panel.marks
        if (each.points.max(axis=0) >= start).all() and (each.points.min(axis=0) < stop).all()
    )
    labels = None if panel.labels is None else panel.labels[top:bottom, left:right]
    caption = panel.caption and replace(panel.caption, enlarged=True)
    return Panel(panel.pixels[top:bottom, left:right], panel.spacing_mm, caption, panel.edges, labels, moved)


def _even_slices(volume: Volume) -> tuple[NDArray[np.intp], float]:
    """Of each step of an even stack the nearest slice, and the step in mm, for a volume whose slices lie unevenly."""
    assert volume.positions_lps is not None
    normal = np.cross(volume.grid.affine_lps[:3, 0], volume.grid.affine_lps[:3, 1])
    heights = volume.positions_lps @ (normal / np.linalg.norm(normal))
    step = max(float(np.median(np.abs(np.diff(heights)))), 1e-3) if len(heights) > 1 else 1.0
    even = np.arange(heights.min(), heights.max() + step / 2, step)[: 4 * len(heights)]
    return np.abs(heights[None, :] - even[:, None]).argmin(axis=1), step


def _letters(direction: NDArray[np.float64]) -> str:
    """Where an array axis comes from and leads to, such as 'RL' (PS3.3 C.7.6.1.1.1, H and F for head and feet)."""
    axis = int(np.argmax(np.abs(direction)))
    letters = ("RL", "AP", "FH")[axis]
    return letters if direction[axis] > 0 else letters[::-1]


def _plane(normal: NDArray[np.float64]) -> Literal["sagittal", "coronal", "axial"]:
    """What a section across this direction is called."""
    return ("sagittal", "coronal", "axial")[int(np.argmax(np.abs(normal)))]


def _percentiles(array: NDArray[np.float32] | NDArray[np.uint8], *, foreground: bool = False) -> tuple[float, float]:
    """The range of most values; of the `foreground` without the lowest one, which fills the air around a breast."""
    values = array[:: max(1, array.shape[0] // 32)]
    if foreground and (lit := values[values > values.min()]).size:
        values = lit
    low, high = np.percentile(values, (1, 99.5))
    return float(low), float(max(high, low + 1e-3))
