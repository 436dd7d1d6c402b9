"""The image's values under each segment: their sums, extremes and percentiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from node.infer.manifest import PERCENTILES, Measurement

Range = tuple[float, float]


class Tally:
    """Counts voxels and sums up values by label, a slice or frame at a time.

    Sums are in double precision and of differences to one voxel of the segment: squares of PET's millions of Bq/ml
    would cancel. Voxels whose values are not `within` (both ends included) are counted and left out of every sum.
    """

    def __init__(self, highest_label: int, within: Range | None = None):
        size = highest_label + 1
        self._within = within
        self.voxels = np.zeros(size, np.int64)
        self.volumes_mm3 = np.zeros(size)
        self._counts, self._seen = np.zeros(size, np.int64), np.zeros(size, bool)
        self._origin = np.zeros(size)  # one value of each segment
        self._sums, self._squares = np.zeros(size), np.zeros(size)
        self._lowest, self._highest = np.full(size, np.inf), np.full(size, -np.inf)

    def add(self, labels: NDArray[np.uint16], values: NDArray[np.floating] | None, voxel_mm3: float = 0.0) -> None:
        """One slice or frame (rows, columns); without `values` it is only counted."""
        where = labels > 0
        if not where.any():
            return
        size = len(self.voxels)
        flat = labels[where].astype(np.intp)
        found = np.bincount(flat, minlength=size)
        self.voxels += found
        self.volumes_mm3 += found * voxel_mm3
        if values is None:
            return
        grey = values[where].astype(np.float64)
        if self._within is not None:
            low, high = self._within
            inside = (grey >= low) & (grey <= high)
            flat, grey = flat[inside], grey[inside]
            found = np.bincount(flat, minlength=size)
            if not flat.size:
                return
        order = np.argsort(flat, kind="stable")
        present, starts = np.unique(flat[order], return_index=True)
        self._origin[present] = np.where(self._seen[present], self._origin[present], grey[order][starts])
        self._seen[present] = True
        difference = grey - self._origin[flat]
        self._counts += found
        self._sums += np.bincount(flat, difference, minlength=size)
        self._squares += np.bincount(flat, difference * difference, minlength=size)
        self._lowest[present] = np.minimum(self._lowest[present], np.minimum.reduceat(grey[order], starts))
        self._highest[present] = np.maximum(self._highest[present], np.maximum.reduceat(grey[order], starts))

    def of(self, label: int) -> dict[Measurement, float]:
        """Mean, standard deviation of the population (divided by n), minimum, maximum; empty where no value counts."""
        count = int(self._counts[label])
        if not count:
            return {}
        shift = self._sums[label] / count
        return {
            Measurement.MEAN: float(self._origin[label] + shift),
            Measurement.STANDARD_DEVIATION: float(np.sqrt(max(0.0, self._squares[label] / count - shift * shift))),
            Measurement.MINIMUM: float(self._lowest[label]),
            Measurement.MAXIMUM: float(self._highest[label]),
        }


def find_percentiles(
    values: NDArray[np.floating], wanted: Sequence[Measurement], within: Range | None = None
) -> dict[Measurement, float]:
    """Those of the `wanted` that are percentiles, between neighbouring values in proportion; empty without values."""
    kinds = [kind for kind in wanted if kind in PERCENTILES]
    if within is not None:
        values = values[(values >= within[0]) & (values <= within[1])]
    if not kinds or not values.size:
        return {}
    found = np.percentile(values.astype(np.float64), [PERCENTILES[kind] for kind in kinds])
    return {kind: float(value) for kind, value in zip(kinds, found, strict=True)}
