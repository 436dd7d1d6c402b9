"""Where findings lie on the slices of their images, as polygons along pixel edges or as points.

Coordinates are column and row in pixels; the centre of the first pixel is (0, 0), its corner (-0.5, -0.5).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

MOST_KEY_SLICES = 20  # that a person is asked to look at
# What is drawn of one run at most: 8 bytes a point and some 250 a polygon are about 10 MB of presentation states.
MOST_POINTS = 500_000
MOST_POLYGONS = 25_000
TOLERANCE_PX = 1.0  # steps of one pixel along a slanting line are 0.71 pixels off it, curves need some more

Polygon = NDArray[np.float64]  # (n, 2) column and row; the last corner is joined to the first


@dataclass(frozen=True)
class Outline:
    """One finding on one slice or frame: what encloses it, or the point that it is."""

    index: int  # of the slice or frame in the input's array
    label: int  # of the manifest's segments or classes
    number: int  # as in the other results: of the segment, the rank of the box, of the point
    name: str
    text: str  # what people read beside it: name, number and value
    tracking: tuple[str, str]  # ID and UID, as in the other results
    # Whatever lies within an odd number of them is the finding's. Outer boundaries run clockwise on the screen, those
    # of holes the other way round.
    polygons: tuple[Polygon, ...] = ()
    point: tuple[float, float] | None = None  # column and row


def trace_labels(labels: NDArray[np.uint16]) -> Iterator[tuple[int, tuple[Polygon, ...]]]:
    """Each label of a slice (rows, columns), ascending, with the boundary of its pixels."""
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        if box is not None:
            offset = (box[1].start, box[0].start)
            yield label, tuple(polygon + offset for polygon in trace(labels[box] == label))


def trace(mask: NDArray[np.bool_]) -> list[Polygon]:
    """The exact boundary of a mask (rows, columns) along the edges of its pixels, corners only.

    Pixels that touch at a corner only are apart, so that no polygon crosses itself. Polygons come by their uppermost
    and then leftmost corner, which is their first.
    """
    around = np.pad(mask, 1).astype(bool)
    above_left, above_right, below_left, below_right = (
        around[:-1, :-1],
        around[:-1, 1:],
        around[1:, :-1],
        around[1:, 1:],
    )
    up, left = above_left != above_right, above_left != below_left  # edges that meet in a corner of pixels
    down = below_left != below_right
    turns = np.argwhere((up != down) | (up & left & down))
    # Where two pixels touch, two corners lie in one place: the first has the edge to the left, the second the other.
    rows, columns = turns.T
    crossing = (up & left & down)[rows, columns]
    repeats = np.repeat(np.arange(len(turns)), 1 + crossing)
    rows, columns, crossing = rows[repeats], columns[repeats], crossing[repeats]
    second = np.zeros(len(repeats), bool)
    second[1:] = repeats[1:] == repeats[:-1]
    # Of a corner's upper and lower edge it takes the one that belongs to the same pixel.
    lower = np.where(second, above_left[rows, columns], above_right[rows, columns]) & crossing
    # Along a row, and along a column, corners are the ends of edges by turns.
    across = _pairs(np.arange(len(rows)))
    along = _pairs(np.lexsort((lower, rows, columns)))
    inside = below_right[rows, columns].tolist()
    corners = np.column_stack([columns, rows]) - 0.5
    polygons, seen = [], [False] * len(rows)
    for start in range(len(rows)):
        if seen[start]:
            continue
        ring, corner = [], start
        while not seen[corner]:
            other = across[corner]
            seen[corner] = seen[other] = True
            ring += [corner, other]
            corner = along[other]
        # The first edge leads to the right: over pixels of the mask it is the upper edge of them, else of a hole.
        polygons.append(corners[ring] if inside[start] else corners[[ring[0], *ring[:0:-1]]])
    return polygons


def area(polygon: Polygon) -> float:
    """What a polygon encloses, in pixels; negative for a hole."""
    column, row = polygon.T
    last = column[-1] * row[0] - row[-1] * column[0]
    return float(column[:-1] @ row[1:] - row[:-1] @ column[1:] + last) / 2


def bound(outlines: list[Outline]) -> tuple[list[Outline], str]:
    """As many outlines as are drawn of one run, and what was done for that, in words; "" where it was nothing."""
    remarks = []
    sizes = [
        (-abs(area(polygon)), number, place)
        for number, outline in enumerate(outlines)
        for place, polygon in enumerate(outline.polygons)
    ]
    if len(sizes) > MOST_POLYGONS:
        remarks.append(f"only the {MOST_POLYGONS} largest outlines")
        largest: dict[int, list[int]] = {}
        for _, number, place in sorted(sizes)[:MOST_POLYGONS]:
            largest.setdefault(number, []).append(place)
        outlines = [
            replace(outline, polygons=tuple(outline.polygons[place] for place in sorted(largest.get(number, ()))))
            for number, outline in enumerate(outlines)
            if number in largest or outline.point is not None
        ]
    if sum(len(polygon) for outline in outlines for polygon in outline.polygons) > MOST_POINTS:
        remarks.append(f"outlines within {TOLERANCE_PX:g} pixel")
        outlines = [
            replace(outline, polygons=tuple(simplify(polygon, TOLERANCE_PX) for polygon in outline.polygons))
            for outline in outlines
        ]
    return outlines, "; ".join(remarks)


def simplify(polygon: Polygon, tolerance: float) -> Polygon:
    """Some of a polygon's corners: the others lie within `tolerance` of the lines between them.

    One walk around it that goes on as long as one line from the last corner that was kept passes all since then
    (Williams 1978, cone intersection). It takes two seconds for a million corners; Douglas and Peucker's takes minutes.
    """
    points: list[tuple[float, float]] = [(x, y) for x, y in polygon.tolist()]
    kept, (x, y) = [points[0]], points[0]
    last, farthest = points[0], 0.0
    cone: tuple[float, float, float, float] | None = None  # directions of its right and its left edge
    for point in [*points[1:], points[0]]:
        dx, dy = point[0] - x, point[1] - y
        r = sqrt(dx * dx + dy * dy)
        # A line that turns back has passed the end of itself.
        outside = r < farthest - tolerance / 2 or (
            cone is not None and (cone[0] * dy - cone[1] * dx < 0 or dx * cone[3] - dy * cone[2] < 0)
        )
        if outside and last != kept[-1]:
            kept.append(last)
            (x, y), cone, farthest = last, None, 0.0
            dx, dy = point[0] - x, point[1] - y
            r = sqrt(dx * dx + dy * dy)
        if r > tolerance:
            sine = tolerance / r
            cosine = sqrt(1 - sine * sine)
            right = dx * cosine + dy * sine, dy * cosine - dx * sine
            left = dx * cosine - dy * sine, dy * cosine + dx * sine
            if cone is not None:
                right = right if cone[0] * right[1] - cone[1] * right[0] > 0 else cone[:2]
                left = left if left[0] * cone[3] - left[1] * cone[2] > 0 else cone[2:]
            cone = (*right, *left)
        farthest, last = max(farthest, r), point
    return np.array(kept) if len(kept) >= 3 else polygon


def _pairs(order: NDArray[np.intp]) -> list[int]:
    """For every element the one that it is paired with when the first two in `order` are a pair, the next two, ..."""
    partner = np.empty_like(order)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    return partner.tolist()
