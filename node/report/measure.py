"""What is measured of each segment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from node.dicom.volume import Volume
from node.infer.manifest import Manifest, Measurement
from node.infer.results import Labelmap


@dataclass(frozen=True)
class SegmentMeasurements:
    """The measurements of one segment; intensities are in the volume's unit and None for an empty segment."""

    number: int  # the label value
    name: str
    voxels: int
    volume_ml: float
    unit: str  # of the intensities
    wanted: tuple[Measurement, ...]
    mean: float | None = None
    standard_deviation: float | None = None  # of the population of voxels (divided by n)
    minimum: float | None = None
    maximum: float | None = None

    def value(self, measurement: Measurement) -> float | None:
        """One measurement's value."""
        return {
            Measurement.VOLUME: self.volume_ml,
            Measurement.MEAN: self.mean,
            Measurement.STANDARD_DEVIATION: self.standard_deviation,
            Measurement.MINIMUM: self.minimum,
            Measurement.MAXIMUM: self.maximum,
        }[measurement]

    def rows(self) -> list[dict[str, Any]]:
        """One row for people per wanted measurement that has a value."""
        rows = []
        for measurement in self.wanted:
            value = self.value(measurement)
            if value is not None:
                unit = "mL" if measurement is Measurement.VOLUME else self.unit
                rows.append({"segment": self.name, "measurement": measurement.value, "value": value, "unit": unit})
        return rows


def measure_segments(volume: Volume, labelmap: Labelmap, manifest: Manifest) -> tuple[SegmentMeasurements, ...]:
    """Measure every segment of the manifest.

    Volume is the number of voxels times the voxel's volume, slice by slice where the spacing varies; intensities count
    every voxel alike. One pass over the slices: memory stays at a few slices however many segments there are. Sums are
    in double precision and of differences to one voxel of the segment: squares of PET's millions of Bq/ml would cancel.
    """
    size = max(manifest.segments) + 1
    counts, volumes_mm3 = np.zeros(size, np.int64), np.zeros(size)
    sums, squares = np.zeros(size), np.zeros(size)
    origin, seen = np.zeros(size), np.zeros(size, bool)  # one value of each segment
    lowest, highest = np.full(size, np.inf), np.full(size, -np.inf)
    for labels, values, voxel_mm3 in zip(labelmap.array, volume.array, voxel_volumes_mm3(volume), strict=True):
        where = labels > 0
        if not where.any():
            continue
        flat, grey = labels[where].astype(np.intp), values[where].astype(np.float64)
        order = np.argsort(flat, kind="stable")
        present, starts = np.unique(flat[order], return_index=True)
        origin[present] = np.where(seen[present], origin[present], grey[order][starts])
        seen[present] = True
        difference = grey - origin[flat]
        found = np.bincount(flat, minlength=size)
        counts += found
        volumes_mm3 += found * voxel_mm3
        sums += np.bincount(flat, difference, minlength=size)
        squares += np.bincount(flat, difference * difference, minlength=size)
        lowest[present] = np.minimum(lowest[present], np.minimum.reduceat(grey[order], starts))
        highest[present] = np.maximum(highest[present], np.maximum.reduceat(grey[order], starts))
    measured = []
    for number, segment in sorted(manifest.segments.items()):
        count = int(counts[number])
        common = (number, segment.name, count, float(volumes_mm3[number]) / 1000, volume.unit)
        if count == 0:
            measured.append(SegmentMeasurements(*common, manifest.measurements))
            continue
        shift = sums[number] / count
        mean = origin[number] + shift
        deviation = float(np.sqrt(max(0.0, squares[number] / count - shift * shift)))
        extremes = float(lowest[number]), float(highest[number])
        measured.append(SegmentMeasurements(*common, manifest.measurements, float(mean), deviation, *extremes))
    return tuple(measured)


def voxel_volumes_mm3(volume: Volume) -> NDArray[np.float64]:
    """The volume of a voxel of each slice.

    Where spacing varies, a slice is as thick as half the way to each of its neighbours along the normal, and the first
    and the last reach as far out as in. A sheared voxel has the volume of an upright one.
    """
    if volume.positions_lps is None:
        return np.full(volume.array.shape[0], volume.grid.voxel_volume_mm3)
    plane = np.cross(volume.grid.affine_lps[:3, 0], volume.grid.affine_lps[:3, 1])  # as long as a pixel is large, mm2
    steps = np.abs(np.diff(volume.positions_lps @ (plane / np.linalg.norm(plane))))
    outer = np.concatenate([steps[:1], steps, steps[-1:]])
    return (outer[:-1] + outer[1:]) / 2 * float(np.linalg.norm(plane))
