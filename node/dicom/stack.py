"""Where slices stand: their order, their steps, and the grid that they lie on.

Slices are ordered along their normal and steps come from positions, never from SliceThickness, SpacingBetweenSlices or
instance numbers (PS3.3 C.7.6.2.1.1). What is safe for the patient decides what becomes of a stack that is not regular:

- Slices sheared against each other (gantry tilt) lose nothing: the grid is exact, and the stack is irregular.
- Where the step changes, every slice still stands at a known place: the stack is irregular, its grid nominal.
- Where steps much longer than the others are fewer than five in a row, slices were lost or never taken. Values would
  have to be invented there, and a finding could be hidden: such a stack is refused.
- A slice beside the line of the others, or with pixels of another size, contradicts them: such a stack is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from node.dicom.candidates import Slice
from node.dicom.volume import Affine

SPACING_TOLERANCE = 0.02  # relative to the median step, or
SPACING_TOLERANCE_MM = 0.05
PLACE_TOLERANCE = 0.1  # how far from its place on a regular grid a slice may stand, relative to the step
LINE_TOLERANCE_MM = 0.5  # how far a slice may stand beside the line of the others, or that line lean off the normal
SAME_PLACE_MM = 0.01
GAP = 1.75  # a step this many times the median is a gap, unless
LASTING = 5  # so many steps in a row are that long: then the protocol took fewer slices there


@dataclass(frozen=True)
class Stack:
    """Slices in their places."""

    slices: tuple[Slice, ...]  # along +(row direction x column direction)
    affine_lps: Affine  # as in `Grid`; the shear is exact, the step the mean one
    positions_lps: Affine | None  # as in `Volume`


def stack_slices(slices: Sequence[Slice]) -> Stack | str:
    """The stack of slices of one size and orientation, each at a place of its own; or why they are none."""
    if len(slices) < 2:
        return "a single slice makes no volume"
    heights = heights_mm(slices)
    order = np.argsort(heights, kind="stable")
    slices = tuple(slices[index] for index in order)
    heights = heights[order]
    positions = np.array([slice_.position_lps for slice_ in slices])
    steps = np.diff(heights)
    if gap := _find_gap(steps):
        return gap
    spacings = sorted({slice_.spacing_mm for slice_ in slices})
    if not np.allclose(spacings, spacings[0], rtol=1e-3):
        return f"slices differ in PixelSpacing: {spacings[:3]}"
    line = positions[-1] - positions[0]
    along = (heights - heights[0]) / (heights[-1] - heights[0])
    beside = np.linalg.norm(positions - positions[0] - np.outer(along, line), axis=1)
    if beside.max() > LINE_TOLERANCE_MM:
        return (
            f"the slices do not stand in line: slice {int(beside.argmax()) + 1} of {len(slices)} is "
            f"{beside.max():.1f} mm beside the line from the first to the last"
        )
    row, column = np.array(slices[0].orientation).reshape(2, 3)
    normal = np.cross(row, column)
    is_sheared = np.linalg.norm(line - (line @ normal) * normal) > LINE_TOLERANCE_MM
    row_spacing_mm, column_spacing_mm = slices[0].spacing_mm
    affine = np.eye(4)
    affine[:3, 0] = row * column_spacing_mm
    affine[:3, 1] = column * row_spacing_mm
    affine[:3, 2] = line / (len(slices) - 1)
    affine[:3, 3] = positions[0]
    return Stack(slices, affine, positions if is_sheared or not is_even(heights) else None)


def heights_mm(slices: Sequence[Slice]) -> NDArray[np.float64]:
    """How far along the normal each slice stands; the normal is that of the first."""
    row, column = np.array(slices[0].orientation).reshape(2, 3)
    return np.array([slice_.position_lps for slice_ in slices]) @ np.cross(row, column)


def is_even(heights: NDArray[np.float64]) -> bool:
    """Whether ascending heights have one step, and none has drifted from its place."""
    steps = np.diff(heights)
    step = _median(steps)
    places = np.linspace(heights[0], heights[-1], len(heights))
    drift = np.abs(heights - places).max()
    return bool(_alike(steps, step).all() and drift <= max(PLACE_TOLERANCE * step, SPACING_TOLERANCE_MM))


def _find_gap(steps: NDArray[np.float64]) -> str:
    """The sentence for slices that are not there; "" where none is missing."""
    step = _median(steps)
    gaps: list[int] = []
    start = 0
    for index in range(1, len(steps) + 1):
        if index == len(steps) or not _alike(steps[index : index + 1], steps[start])[0]:
            if steps[start] >= GAP * step and index - start < LASTING:
                gaps.extend(range(start, index))
            start = index
    if not gaps:
        return ""
    first = gaps[0]
    lost = steps[first] / step
    what = "the slices leave a gap"
    if abs(lost - round(lost)) < 0.1:
        what = "a slice is missing" if round(lost) == 2 else f"{round(lost) - 1} slices are missing"
    more = f" (and {len(gaps) - 1} more such steps)" if len(gaps) > 1 else ""
    return (
        f"{what}: {steps[first]:.2f} mm between slices {first + 1} and {first + 2} of {len(steps) + 1}{more}, "
        f"{step:.2f} mm elsewhere"
    )


def _alike(steps: NDArray[np.float64], step: float) -> NDArray[np.bool_]:
    return np.abs(steps - step) <= max(SPACING_TOLERANCE * step, SPACING_TOLERANCE_MM)


def _median(steps: NDArray[np.float64]) -> float:
    """A median that is one of the steps, however few there are; the smaller one of two."""
    return float(np.sort(steps)[(len(steps) - 1) // 2])
