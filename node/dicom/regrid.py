"""Volumes onto other grids and label maps back: irregular stacks made regular, and inputs brought onto one another.

Everything goes in blocks of slices, so that no more than a few slices lie in memory beside the input and the output.
Interpolation is SciPy's and SimpleITK's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from node.dicom.volume import Affine, Grid, SliceRef, Volume
from node.errors import InputRefused

_Value = TypeVar("_Value", np.uint8, np.uint16, np.float32)

BLOCK = 32  # slices at a time
MOST_GROWTH = 4  # a regular volume has at most so many times the slices that were acquired
REGISTER_MM = 2.0
# What registered volumes have: mutual information in nats, and the part of the smaller one that lies within the other.
# CT, MR and PET of one limb share 0.33 and more, a brain and itself 1.12. A brain and a chest share 0.20 at best, where
# 0.20 overlaps; a limb and a brain or a chest 0.11.
LEAST_SHARED = 0.25
LEAST_OVERLAP = 0.5
ALIGNED = 1e-6  # of a voxel per voxel: how far a grid's axes may stand from another's to count as along them


def make_regular(volume: Volume) -> Volume:
    """The volume on an orthogonal, regular grid along its slices' rows, columns and normal; itself where it is regular.

    The grid covers every voxel. Its step is the smallest between acquired slices, or larger where that would make more
    than `MOST_GROWTH` times as many. Each of its slices blends the two acquired ones beside it, each shifted within its
    plane to where the grid has it (trilinear, and linear along the normal, not along a gantry's tilt). Outside of the
    acquired slices lies the volume's smallest value.
    """
    positions = volume.positions_lps
    if positions is None:
        return volume
    axes, spacing_mm = _axes(volume.grid)
    offsets = (positions - positions[0]) @ axes  # along rows, columns and the normal, of each slice's first voxel
    low, high = offsets.min(axis=0), offsets.max(axis=0)
    steps = np.diff(offsets[:, 2])
    if (steps <= 0).any():
        raise ValueError("the slices of a volume lie in the order of their normal")
    count = int(np.ceil((high[2] - low[2]) / steps.min() - 1e-3)) + 1
    count = max(2, min(count, MOST_GROWTH * len(positions)))
    step = (high[2] - low[2]) / (count - 1)
    growth = np.ceil((high[:2] - low[:2]) / spacing_mm - 1e-3).astype(int)
    _, rows, columns = volume.array.shape
    shape = (count, rows + int(growth[1]), columns + int(growth[0]))
    affine = np.eye(4)
    affine[:3, :3] = axes * (*spacing_mm, step)
    affine[:3, 3] = positions[0] + axes @ low
    array = np.empty(shape, np.float32)
    outside = float(volume.array.min())
    depths = offsets[:, 2]
    shifts = (offsets[:, :2] - low[:2]) / spacing_mm  # in pixels of the grid: columns, rows
    shifted: dict[int, NDArray[np.float32]] = {}

    def in_plane(index: int) -> NDArray[np.float32]:
        if index not in shifted:
            for old in [old for old in shifted if old < index - 1]:
                del shifted[old]
            shifted[index] = _shift(volume.array[index], shifts[index], shape[1:], outside)
        return shifted[index]

    refs: list[SliceRef] = []
    for number in range(count):
        depth = min(low[2] + number * step, high[2])
        above = min(max(int(np.searchsorted(depths, depth)), 1), len(depths) - 1)
        weight = float(np.clip((depth - depths[above - 1]) / (depths[above] - depths[above - 1]), 0, 1))
        nearest = above if weight > 0.5 else above - 1
        refs.append(volume.slices[nearest])
        if min(weight, 1 - weight) < 1e-4:  # the slice itself
            array[number] = in_plane(nearest)
        else:
            np.multiply(in_plane(above - 1), np.float32(1 - weight), out=array[number])
            array[number] += in_plane(above) * np.float32(weight)
    grid = Grid(shape, affine, volume.grid.frame_of_reference_uid)
    return replace(volume, array=array, grid=grid, slices=tuple(refs), positions_lps=None)


def carry_back(
    labels: NDArray[_Value], regular_grid: Grid, volume: Volume, *, order: Literal[0, 1] = 0
) -> NDArray[_Value]:
    """A label map on `regular_grid` as the acquired slices of `volume` have it: the nearest label of every voxel.

    `labels` has the grid's shape, the result that of `volume.array`. Outside of the grid there is no label (0). With
    order 1 it is a map of values that blend, such as probabilities.
    """
    found = np.zeros(volume.array.shape, labels.dtype)
    for index, first in enumerate(slice_positions(volume)):
        # The labels' indices (slice, row, column) of the slice's first voxel, and what they grow by per row and column.
        place = np.eye(4)
        place[:3, :2] = volume.grid.affine_lps[:3, :2]
        place[:3, 3] = first
        matrix = (np.linalg.inv(regular_grid.affine_lps) @ place)[:3][::-1]
        per_column, per_row, start = matrix[:, 0], matrix[:, 1], matrix[:, 3]
        aligned = np.abs(per_row - (0, 1, 0)).max() < ALIGNED and np.abs(per_column - (0, 0, 1)).max() < ALIGNED
        if aligned and (order == 0 or np.abs(start - np.rint(start)).max() < ALIGNED):
            _copy_whole_voxels(labels, np.rint(start).astype(int), found[index])
        else:
            turn = np.column_stack([np.zeros(3), per_row, per_column])
            # SciPy's stubs know offsets of one number only.
            offset: Any = start
            ndimage.affine_transform(labels, turn, offset, (1, *found.shape[1:]), found[index : index + 1], order=order)
    return found


def resample_onto(volume: Volume, grid: Grid, *, order: Literal[0, 1] = 1) -> Volume:
    """The volume on another grid of the same frame of reference: linear (1) or the nearest voxel (0).

    For models that see several series as channels. Outside of the volume lies its smallest value. Each slice of the
    result names the acquired slice nearest to its middle. Raises `InputRefused` for another frame of reference.
    """
    uid = volume.grid.frame_of_reference_uid
    if not uid or uid != grid.frame_of_reference_uid:
        raise InputRefused(
            f"series {volume.series_uid} has another frame of reference than the series that it is to be brought onto; "
            "it has to be registered to that one"
        )
    return _resampled(volume, grid, sitk.Transform(3, sitk.sitkIdentity), order)


def register_onto(volume: Volume, fixed: Volume) -> Volume:
    """The volume moved and turned to where its content matches `fixed`, on `fixed`'s grid, linear.

    Rigid, by Mattes' mutual information over three resolutions, from the better of two starts: the coordinates as they
    are, and centre on centre. One thread and a fixed seed, so the same volumes always give the same result. Raises
    `InputRefused` where what is found shares too little information to be the same anatomy.
    """
    still, moving = _coarse(make_regular(fixed)), _coarse(make_regular(volume))
    with _one_thread():
        start = max(
            (_start(still, moving, centred) for centred in (False, True)), key=lambda t: _shared(still, moving, t)
        )
        found = _optimised(still, moving, start)
        shared, transform = max(((_shared(still, moving, t), t) for t in (start, found)), key=lambda pair: pair[0])
    if shared < LEAST_SHARED or _overlap(still, moving, transform) < LEAST_OVERLAP:
        raise InputRefused(
            f"series {volume.series_uid} could not be registered to series {fixed.series_uid}: the best match shares "
            f"{max(0.0, shared):.2f} nats of information, {LEAST_SHARED} is the least that the same anatomy has, or "
            "they hardly overlap"
        )
    return _resampled(volume, fixed.grid, transform, 1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The sums of several threads come in any order, and differ in their last digits: so would the result."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def _optimised(still: sitk.Image, moving: sitk.Image, start: sitk.Euler3DTransform) -> sitk.Euler3DTransform:
    transform = sitk.Euler3DTransform(start)
    method = _mutual_information()
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentagePerLevel([0.5, 0.25, 0.1], 1)  # 1 is the seed
    method.SetOptimizerAsRegularStepGradientDescent(2.0, 0.01, 100, 0.6, 1e-6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([4.0, 2.0, 0.0])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(still, moving)
    except RuntimeError:  # the volumes left each other
        return start
    return transform


def _overlap(still: sitk.Image, moving: sitk.Image, transform: sitk.Transform) -> float:
    """The part of the smaller image that lies within the other one."""
    ones = sitk.Image(moving.GetSize(), sitk.sitkUInt8) + 1
    ones.CopyInformation(moving)
    within = sitk.GetArrayViewFromImage(sitk.Resample(ones, still, transform, sitk.sitkNearestNeighbor, 0))
    voxel_mm3, other_mm3 = (float(np.prod(image.GetSpacing())) for image in (still, moving))
    smaller_mm3 = min(still.GetNumberOfPixels() * voxel_mm3, moving.GetNumberOfPixels() * other_mm3)
    return np.count_nonzero(within) * voxel_mm3 / smaller_mm3


def _coarse(volume: Volume) -> sitk.Image:
    """A regular volume as an image of voxels below `REGISTER_MM`, averaged where it has smaller ones."""
    image = sitk.GetImageFromArray(volume.array)
    _place(image, volume.grid)
    return sitk.BinShrink(image, [max(1, int(REGISTER_MM // spacing)) for spacing in image.GetSpacing()])


def _start(still: sitk.Image, moving: sitk.Image, centred: bool) -> sitk.Euler3DTransform:
    centre, other = (
        np.array(image.TransformContinuousIndexToPhysicalPoint([(size - 1) / 2 for size in image.GetSize()]))
        for image in (still, moving)
    )
    shift = other - centre if centred else np.zeros(3)
    return sitk.Euler3DTransform(centre.tolist(), 0.0, 0.0, 0.0, shift.tolist())


def _mutual_information() -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetInterpolator(sitk.sitkLinear)
    return method


def _shared(still: sitk.Image, moving: sitk.Image, transform: sitk.Transform) -> float:
    """The information that two images share where `transform` puts them; none where they do not overlap."""
    method = _mutual_information()
    method.SetInitialTransform(transform)
    try:
        return -method.MetricEvaluate(still, moving)
    except RuntimeError:  # ITK has no value for images without enough overlap
        return float("-inf")


def _resampled(volume: Volume, grid: Grid, transform: sitk.Transform, order: Literal[0, 1]) -> Volume:
    """`volume` on `grid`, where `transform` takes points of the grid to points of the volume (LPS, mm)."""
    regular = make_regular(volume)
    outside = float(regular.array.min())
    array = np.full(grid.shape, outside, np.float32)
    interpolator = sitk.sitkLinear if order == 1 else sitk.sitkNearestNeighbor
    for start in range(0, grid.shape[0], BLOCK):
        block = _block(grid, start, min(BLOCK, grid.shape[0] - start))
        needed = _needed(regular, block, transform)
        if needed is None:
            continue
        reference = sitk.Image(block.shape[::-1], sitk.sitkUInt8)
        _place(reference, block)
        image = sitk.GetImageFromArray(regular.array[needed[0] : needed[1]])
        _place(image, _block(regular.grid, needed[0], needed[1] - needed[0]))
        moved = sitk.Resample(image, reference, transform, interpolator, outside, sitk.sitkFloat32)
        array[start : start + block.shape[0]] = sitk.GetArrayViewFromImage(moved)
    slices = _nearest_slices(volume, grid, transform)
    return replace(volume, array=array, grid=grid, slices=slices, positions_lps=None)


def _axes(grid: Grid) -> tuple[Affine, NDArray[np.float64]]:
    """Unit vectors along rows, columns and the slices' normal (as columns), and the spacing along rows and columns."""
    across, down = grid.affine_lps[:3, 0], grid.affine_lps[:3, 1]
    spacing_mm = np.array([np.linalg.norm(across), np.linalg.norm(down)], np.float64)
    across, down = across / spacing_mm[0], down / spacing_mm[1]
    return np.column_stack([across, down, np.cross(across, down)]).astype(np.float64), spacing_mm


def slice_positions(volume: Volume) -> Affine:
    """The centre of each slice's first voxel (slices, 3), mm."""
    if volume.positions_lps is not None:
        return volume.positions_lps
    return volume.grid.to_lps(np.array([(0, 0, index) for index in range(volume.array.shape[0])]))


def _shift(
    plane: NDArray[np.float32], shift: NDArray[np.float64], shape: tuple[int, int], outside: float
) -> NDArray[np.float32]:
    """A slice in a larger plane, `shift` (columns, rows) pixels from its first corner."""
    if np.abs(shift - np.round(shift)).max() < 1e-3:
        canvas = np.full(shape, outside, np.float32)
        column, row = np.round(shift).astype(int)
        canvas[row : row + plane.shape[0], column : column + plane.shape[1]] = plane
        return canvas
    canvas = np.empty(shape, np.float32)
    offset: Any = -shift[::-1]  # SciPy's stubs know offsets of one number only
    ndimage.affine_transform(plane, np.ones(2), offset, shape, canvas, order=1, mode="constant", cval=outside)
    return canvas


def _copy_whole_voxels(labels: NDArray[_Value], start: NDArray[np.int_], out: NDArray[_Value]) -> None:
    """The part of one slice of `labels` that begins at `start` (slice, row, column), as far as there is one."""
    if not 0 <= start[0] < labels.shape[0]:
        return
    low = np.maximum(start[1:], 0)
    high = np.minimum(start[1:] + out.shape, labels.shape[1:])
    if (low < high).all():
        to = low - start[1:]
        part = labels[start[0], low[0] : high[0], low[1] : high[1]]
        out[to[0] : to[0] + part.shape[0], to[1] : to[1] + part.shape[1]] = part


def _block(grid: Grid, start: int, count: int) -> Grid:
    """`count` slices of a grid."""
    affine = grid.affine_lps.copy()
    affine[:3, 3] = grid.to_lps(np.array([(0, 0, start)]))[0]
    return Grid((count, *grid.shape[1:]), affine, grid.frame_of_reference_uid)


def _needed(volume: Volume, block: Grid, transform: sitk.Transform) -> tuple[int, int] | None:
    """The slices of a regular volume, from and to, that a block of a grid is interpolated from; None for none."""
    slices, rows, columns = (count - 1 for count in block.shape)
    corners = np.array([(x, y, z) for x in (0, columns) for y in (0, rows) for z in (0, slices)], float)
    points = np.array([transform.TransformPoint(point.tolist()) for point in block.to_lps(corners)])
    inverse = np.linalg.inv(volume.grid.affine_lps)
    depths = (points @ inverse[:3, :3].T + inverse[:3, 3])[:, 2]
    # Two slices more on each side: a rigid transform takes the block's inside to the inside of its corners.
    low, high = max(0, int(np.floor(depths.min())) - 2), min(volume.grid.shape[0], int(np.ceil(depths.max())) + 3)
    return (low, high) if low < high else None


def _place(image: sitk.Image, grid: Grid) -> None:
    slice_mm, row_mm, column_mm = grid.spacing_mm
    image.SetSpacing((column_mm, row_mm, slice_mm))
    image.SetDirection((grid.affine_lps[:3, :3] / (column_mm, row_mm, slice_mm)).ravel().tolist())
    image.SetOrigin(grid.affine_lps[:3, 3].tolist())


def _nearest_slices(volume: Volume, grid: Grid, transform: sitk.Transform) -> tuple[SliceRef, ...]:
    """The acquired slice nearest to the middle of each slice of a grid."""
    axes, _ = _axes(volume.grid)
    depths = slice_positions(volume) @ axes[:, 2]
    _, rows, columns = grid.shape
    middles = grid.to_lps(np.array([((columns - 1) / 2, (rows - 1) / 2, index) for index in range(grid.shape[0])]))
    points = np.array([transform.TransformPoint(point.tolist()) for point in middles])
    return tuple(volume.slices[int(np.abs(depths - depth).argmin())] for depth in points @ axes[:, 2])
