"""A label map that a program wrote as NIfTI, in the order and direction of axes of the input's own grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Image
from numpy.typing import NDArray

from node.dicom.volume import Grid
from node.errors import OutputRefused
from node.infer.results import check_labelmap

_FILE = "the model's NIfTI file"  # not by its name, which a program may make of the patient's
_TOLERANCE = 0.02  # voxels: programs keep affines as float32, and quaternions of them


def read_labelmap(path: Path, grid: Grid, labels: Mapping[int, str]) -> NDArray[np.uint16]:
    """The label map (slices, rows, columns) of a NIfTI file whose voxels are those of `grid`, in whatever order.

    `OutputRefused` where the file is no NIfTI, where its voxels are others (nothing is resampled: that would move
    outlines that a reader takes for the program's own), or where it is no label map of `labels`.
    """
    try:
        image = nibabel.load(path)  # the header; voxels are read once it is known that they are as many as expected
    except (ImageFileError, OSError, ValueError, EOFError) as reason:
        raise OutputRefused(f"{_FILE} is not a NIfTI file ({type(reason).__name__})") from None
    if not isinstance(image, Nifti1Image):
        raise OutputRefused(f"{_FILE} is a {type(image).__name__}, not a NIfTI file")
    shape = image.shape[:3] if image.ndim > 3 and set(image.shape[3:]) == {1} else image.shape
    affine = image.affine
    if len(shape) != 3 or affine is None:
        raise OutputRefused(f"{_FILE} has {len(shape)} dimensions; expected 3")
    axes, reversed_ = _match(shape, affine, grid)
    try:
        array = np.asanyarray(image.dataobj).reshape(shape)
    except (OSError, ValueError, EOFError) as reason:
        raise OutputRefused(f"{_FILE} is damaged ({type(reason).__name__})") from None
    array = array.transpose(axes)
    array = array[tuple(slice(None, None, -1 if back else 1) for back in reversed_)]
    return check_labelmap(array.transpose(2, 1, 0), grid, labels)


def _match(shape: tuple[int, ...], affine: NDArray[np.float64], grid: Grid) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """For each axis of the grid (column, row, slice): the file's axis along it, and whether that runs the other way."""
    wanted = tuple(reversed(grid.shape))
    said = f"{_FILE} lies on another grid than the input: {_describe(shape, affine)}, the input is "
    refusal = OutputRefused(said + f"{_describe(wanted, grid.affine_ras)}; write the labels on the input's own grid")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise refusal
    steps = np.linalg.inv(grid.affine_ras)[:3, :3] @ affine[:3, :3]  # one voxel of the file, in voxels of the grid
    axes = tuple(int(axis) for axis in np.abs(steps).argmax(axis=1))
    if sorted(axes) != [0, 1, 2] or tuple(shape[axis] for axis in axes) != wanted:
        raise refusal
    reversed_ = tuple(bool(steps[row, axis] < 0) for row, axis in enumerate(axes))
    # The eight corners must fall where the grid has them: that covers spacing, direction, shear and origin.
    for corner in np.ndindex(2, 2, 2):
        on_grid = np.array([end * (size - 1) for end, size in zip(corner, wanted, strict=True)], np.float64)
        in_file = np.zeros(3)
        for row, axis in enumerate(axes):
            in_file[axis] = wanted[row] - 1 - on_grid[row] if reversed_[row] else on_grid[row]
        ras = affine[:3, :3] @ in_file + affine[:3, 3]
        found = np.linalg.inv(grid.affine_ras) @ [*ras, 1.0]
        if np.abs(found[:3] - on_grid).max() > _TOLERANCE * max(1.0, max(wanted) / 256):
            raise refusal
    return axes, reversed_


def _describe(shape: tuple[int, ...], affine: NDArray[np.float64]) -> str:
    spacing = " x ".join(f"{length:.3g}" for length in np.linalg.norm(affine[:3, :3], axis=0))
    return f"{' x '.join(map(str, shape))} voxels of {spacing} mm"
