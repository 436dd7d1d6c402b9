"""Volumes of an analytic marker in every geometry: the truth for whatever is done with geometry.

The marker has no symmetry and is given in LPS millimetres; each volume samples it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from node.dicom.volume import Grid, SliceRef, Volume


def in_marker(x: NDArray[np.float64], y: NDArray[np.float64], z: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Three bars of one corner: 60 mm to the left, 45 mm to the back, 30 mm up; 18 mm thick. LPS, off the origin."""
    x, y, z = x - 12.3, y + 31.7, z - 104.1
    to_left = (x >= 0) & (x < 60) & (y >= 0) & (y < 18) & (z >= 0) & (z < 18)
    to_back = (x >= 0) & (x < 18) & (y >= 0) & (y < 45) & (z >= 0) & (z < 18)
    upwards = (x >= 0) & (x < 18) & (y >= 0) & (y < 18) & (z >= 0) & (z < 30)
    return to_left | to_back | upwards


def scan(
    directions: NDArray[np.float64],
    spacing_mm: tuple[float, float, float] = (2.5, 1.5, 1.5),
    shape: tuple[int, int, int] = (44, 70, 76),
) -> tuple[Volume, NDArray[np.bool_]]:
    """A volume of the marker and the truth on its grid; `directions` are columns: along columns, rows and slices."""
    affine = np.eye(4)
    affine[:3, :3] = directions * np.array(spacing_mm[::-1])
    affine[:3, 3] = np.array([38.0, -12.0, 115.0]) - affine[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    slice_, row, column = np.indices(shape).reshape(3, -1)
    x, y, z = (affine @ [column, row, slice_, np.ones_like(row)])[:3]
    truth = in_marker(x, y, z).reshape(shape)
    slices = tuple(SliceRef("1.2", f"1.2.{index}") for index in range(shape[0]))
    return Volume(truth.astype(np.float32) * 1000, Grid(shape, affine, "1.2"), slices, "1.3", "1.4", "CT", "HU"), truth


def soft_scan(
    directions: NDArray[np.float64],
    spacing_mm: tuple[float, float, float] = (2.5, 1.5, 1.5),
    shape: tuple[int, int, int] = (44, 70, 76),
) -> tuple[Volume, NDArray[np.bool_]]:
    """As `scan`, with a marker whose values rise through 500 at its surface by 50 per mm, which resampling preserves.

    The bars are as long and 24 mm thick, for a surface that voxels of 5 mm can describe.
    """
    volume, _ = scan(directions, spacing_mm, shape)
    slice_, row, column = np.indices(shape).reshape(3, -1)
    x, y, z = (volume.grid.affine_lps @ [column, row, slice_, np.ones_like(row)])[:3]
    x, y, z = x - 12.3, y + 31.7, z - 104.1
    inside = [
        np.minimum.reduce([x, longest - x, y, width - y, z, height - z])
        for longest, width, height in ((60, 24, 24), (24, 45, 24), (24, 24, 30))
    ]
    depth = np.maximum.reduce(inside).reshape(shape)
    array = np.clip(500 + 50 * depth, 0, 1000).astype(np.float32)
    return replace(volume, array=array), depth > 0


AXIAL = np.eye(3)
GEOMETRIES: dict[str, tuple[NDArray[np.float64], tuple[float, float, float]]] = {
    "axial": (AXIAL, (2.5, 1.5, 1.5)),
    "prone": (np.diag([-1.0, -1.0, 1.0]), (2.5, 1.5, 1.5)),
    "descending": (np.diag([1.0, 1.0, -1.0]), (2.5, 1.5, 1.5)),
    "sagittal": (np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]) * [1, 1, -1], (2.0, 1.5, 1.5)),
    "coronal": (np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]), (2.0, 1.7, 1.5)),
    "oblique": (Rotation.from_euler("xyz", [17, -23, 31], degrees=True).as_matrix(), (2.5, 1.5, 1.5)),
    "any rotation": (Rotation.random(rng=np.random.default_rng(8)).as_matrix(), (2.2, 1.6, 1.9)),
    "anisotropic": (AXIAL, (5.0, 1.1, 2.3)),
}


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))
