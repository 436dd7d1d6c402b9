"""Contours of an RTSTRUCT as a mask on the grid of the images that they were drawn on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from node.dicom.volume import Volume


def rasterise(rtstruct: Dataset, roi: str, volume: Volume) -> NDArray[np.bool_]:
    """The voxels whose centres lie within the closed planar contours of a region; contours in contours are holes."""
    (number,) = (int(item.ROINumber) for item in rtstruct.StructureSetROISequence if item.ROIName == roi)
    (found,) = (item for item in rtstruct.ROIContourSequence if int(item.ReferencedROINumber) == number)
    mask = np.zeros(volume.array.shape, bool)
    to_indices = np.linalg.inv(volume.grid.affine_lps)
    for contour in found.ContourSequence:
        points = np.array(contour.ContourData, np.float64).reshape(-1, 3)
        columns, rows, slices = (points @ to_indices[:3, :3].T + to_indices[:3, 3]).T
        index = round(float(slices.mean()))
        assert np.abs(slices - index).max() < 0.01, "a contour lies between slices"
        mask[index] ^= fill(columns, rows, (volume.array.shape[1], volume.array.shape[2]))
    return mask


def fill(columns: NDArray[np.float64], rows: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels whose centres a polygon has around it: those from which a ray crosses it an odd number of times."""
    row, column = np.mgrid[: shape[0], : shape[1]]
    inside = np.zeros(shape, bool)
    for start in range(len(columns)):
        x, y, far_x, far_y = columns[start - 1], rows[start - 1], columns[start], rows[start]
        if y == far_y:
            continue
        crossed = (y > row) != (far_y > row)
        inside ^= crossed & (column < (far_x - x) * (row - y) / (far_y - y) + x)
    return inside
