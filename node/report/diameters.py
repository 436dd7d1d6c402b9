"""The longest diameter of a segment within one slice and the longest at right angles to it, as readers measure lesions.

RECIST 1.1 and Lung-RADS measure on the slice where a lesion is largest, from edge to edge. Here the edge passes halfway
between the centres of a pixel inside and of its neighbour outside, so that n pixels in a row are n pixels long and a
disc is as wide as it was drawn. Distances are true millimetres in the slice's plane, whatever the pixels' shape. Parts
of a slice that do not touch (8 neighbours) are measured each for itself. A concave part is measured over its bays: the
lines join points of its outline and may leave it between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import ConvexHull
from skimage.measure import find_contours

from node.report.parts import find_parts

Points = NDArray[np.float64]

_TOUCHING = np.ones((3, 3), bool)
_CHUNK = 512  # points whose distances to all others are held at once
_SAME_MM = 1e-9


@dataclass(frozen=True)
class Diameters:
    """The two lines, on one slice or frame."""

    index: int  # of the slice or frame in the image's array
    longest: float  # mm, or pixels where their size is not known
    longest_line: Points  # (2, 2) row and column of both ends in pixels, (0, 0) is the first one's centre
    perpendicular: float
    perpendicular_line: Points


def measure_diameters(mask: NDArray[np.bool_], spacing: tuple[float, float]) -> Diameters:
    """The diameters of the part, on whichever slice, that is the longest; of parts as long, the first.

    `mask` is (slices, rows, columns) with at least one pixel set, `spacing` the distance between rows and between
    columns.
    """
    best = 0.0
    found: tuple[int, NDArray[np.bool_], tuple[int, int], Points] | None = None
    heights = _extents(np.any(mask, axis=2)) * spacing[0]
    widths = _extents(np.any(mask, axis=1)) * spacing[1]
    reach = np.hypot(heights, widths)
    for index in np.argsort(-reach, kind="stable"):
        if reach[index] <= best + _SAME_MM or reach[index] == 0:
            break
        for corner, part in _parts(mask[index]):
            if np.hypot(part.shape[0] * spacing[0], part.shape[1] * spacing[1]) <= best + _SAME_MM:
                continue
            ends = farthest_pair(_edge_points(part) * spacing)
            length = float(np.linalg.norm(ends[1] - ends[0]))
            if length > best + _SAME_MM:
                best, found = length, (int(index), part, corner, ends)
    if found is None:
        raise ValueError("a segment without a pixel has no diameter")
    index, part, corner, ends = found
    across = _widest_across(part, ends, spacing)
    return Diameters(
        index,
        best,
        ends / spacing + corner,
        float(np.linalg.norm(across[1] - across[0])),
        across / spacing + corner,
    )


def farthest_pair(points: Points) -> Points:
    """The two of the points (n, d), not all on one line or plane, that lie farthest apart: (2, d)."""
    hull = points[np.sort(ConvexHull(points).vertices)]
    best, pair = -1.0, (0, 0)
    for start in range(0, len(hull), _CHUNK):
        squares = ((hull[start : start + _CHUNK, None] - hull[None]) ** 2).sum(axis=2)
        first, second = np.unravel_index(int(np.argmax(squares)), squares.shape)
        if squares[first, second] > best + _SAME_MM:
            best, pair = float(squares[first, second]), (start + int(first), int(second))
    return hull[sorted(pair)]


def _extents(lines: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many lines lie between the first and the last that is set, both included, of each slice (slices, lines)."""
    last = lines.shape[1] - np.argmax(lines[:, ::-1], axis=1)
    return np.where(lines.any(axis=1), last - np.argmax(lines, axis=1), 0)


def _parts(mask: NDArray[np.bool_]) -> Iterator[tuple[tuple[int, int], NDArray[np.bool_]]]:
    """Each connected part of a slice, cut out, with the row and column of its first corner."""
    numbers, _ = find_parts(mask, _TOUCHING)
    for number, (rows, columns) in enumerate(ndimage.find_objects(numbers), 1):
        yield (rows.start, columns.start), numbers[rows, columns] == number


def _edge_points(part: NDArray[np.bool_]) -> Points:
    """The points of the outline that its convex hull can have: the ends of every row and column (n, 2)."""
    ends = []
    for axis in (0, 1):
        lines = part if axis == 0 else part.T
        numbers = np.flatnonzero(lines.any(axis=1))
        first = np.argmax(lines[numbers], axis=1) - 0.5
        last = lines.shape[1] - np.argmax(lines[numbers, ::-1], axis=1) - 0.5
        for places in (first, last):
            ends.append(np.column_stack([numbers, places] if axis == 0 else [places, numbers]))
    return np.concatenate(ends)


def _widest_across(part: NDArray[np.bool_], ends: Points, spacing: tuple[float, float]) -> Points:
    """The longest line at right angles to the line between `ends` that joins two points of the outline (2, 2), mm.

    The outline is a polygon: its extent across changes linearly between its corners, so the widest place is at one.
    """
    along = (ends[1] - ends[0]) / np.linalg.norm(ends[1] - ends[0])
    across = np.array([-along[1], along[0]])
    outlines = find_contours(np.pad(part, 1).astype(np.float64), 0.5, fully_connected="high")
    placed = [(outline - 1) * spacing @ np.column_stack([along, across]) for outline in outlines]
    starts = np.concatenate([outline[:-1] for outline in placed])
    stops = np.concatenate([outline[1:] for outline in placed])
    low_u, high_u = np.minimum(starts[:, 0], stops[:, 0]), np.maximum(starts[:, 0], stops[:, 0])
    run = stops[:, 0] - starts[:, 0]
    upright = np.abs(run) <= _SAME_MM
    corners = np.unique(starts[:, 0])
    best, line = -1.0, (0.0, 0.0, 0.0)
    for chunk in np.array_split(corners, -(-len(corners) // _CHUNK)):
        # Of the outline only what lies there: a long one has tens of thousands of lines, of a pixel each.
        near = (high_u >= chunk[0] - _SAME_MM) & (low_u <= chunk[-1] + _SAME_MM)
        start, stop, level = starts[near], stops[near], upright[near]
        u = chunk[:, None]
        crossed = (u >= low_u[near] - _SAME_MM) & (u <= high_u[near] + _SAME_MM)
        share = np.clip((u - start[:, 0]) / np.where(level, 1, run[near]), 0, 1)
        height = start[:, 1] + np.where(level, 0, share) * (stop[:, 1] - start[:, 1])
        other = np.where(level, stop[:, 1], height)
        top = np.where(crossed, np.maximum(height, other), -np.inf).max(axis=1)
        bottom = np.where(crossed, np.minimum(height, other), np.inf).min(axis=1)
        widest = int(np.argmax(top - bottom))
        if top[widest] - bottom[widest] > best + _SAME_MM:
            best, line = float(top[widest] - bottom[widest]), (float(chunk[widest]), bottom[widest], top[widest])
    u, bottom, top = line
    return np.array([u * along + bottom * across, u * along + top * across])
