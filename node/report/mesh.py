"""The surface of a segment as a mesh, as the Image Biomarker Standardisation Initiative measures shapes (IBSI, 3.1).

Marching cubes at 0.5: the mesh passes halfway between a voxel inside and its neighbour outside. Its corners are placed
in the patient, so that gantry tilt and changing spacing are measured as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull
from skimage.measure import marching_cubes

from node.dicom.volume import Volume
from node.report.diameters import farthest_pair
from node.report.space import first_voxels

_SLAB = 32  # slices whose mesh is held at once

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Mesh:
    """What is measured of a mesh."""

    volume_mm3: float
    area_mm2: float
    diameter_mm: float  # between the two corners that lie farthest apart


def measure_mesh(volume: Volume, mask: NDArray[np.bool_], box: Box) -> Mesh:
    """Measure the mesh of a segment; `mask` is the part of it in `box` of the volume's array, with a voxel set.

    Slab by slab: volume and area are sums over triangles, and of the corners only those of the convex hull are kept.
    """
    place = _Places(volume, box)
    padded = np.pad(mask, 1)
    volume_mm3 = area_mm2 = 0.0
    corners: list[NDArray[np.float64]] = []
    for start in range(0, padded.shape[0] - 1, _SLAB):
        slab = padded[start : start + _SLAB + 1]
        if not slab.any():
            continue
        vertices, faces, *_ = marching_cubes(slab.astype(np.float32), 0.5)
        placed = place(vertices + np.array([start, 0, 0]))
        first, second, third = (placed[faces[:, corner]] for corner in range(3))
        normals = np.cross(second - first, third - first)
        volume_mm3 += float((first * normals).sum()) / 6
        area_mm2 += float(np.linalg.norm(normals, axis=1).sum()) / 2
        corners.append(placed[np.sort(ConvexHull(placed).vertices)])
    ends = farthest_pair(np.concatenate(corners))
    return Mesh(abs(volume_mm3), area_mm2, float(np.linalg.norm(ends[1] - ends[0])))


class _Places:
    """Where a place in a padded box lies in the patient, in mm from the box's first voxel."""

    def __init__(self, volume: Volume, box: Box):
        firsts = first_voxels(volume)
        step = volume.grid.affine_lps[:3, 2]
        before, after = (firsts[1] - firsts[0], firsts[-1] - firsts[-2]) if len(firsts) > 1 else (step, step)
        # A slice before the first and one after the last, where the mesh closes: as far out as in.
        firsts = np.concatenate([firsts[:1] - before, firsts, firsts[-1:] + after])
        firsts = firsts[box[0].start : box[0].stop + 2]
        self._column, self._row = volume.grid.affine_lps[:3, 0], volume.grid.affine_lps[:3, 1]
        self._firsts = firsts - firsts[0]

    def __call__(self, places: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n, 3) slice, row, column of the padded box to (n, 3) mm."""
        depth, row, column = places.astype(np.float64).T
        numbers = np.arange(len(self._firsts))
        origin = np.column_stack([np.interp(depth, numbers, self._firsts[:, axis]) for axis in range(3)])
        return origin + row[:, None] * self._row + column[:, None] * self._column
