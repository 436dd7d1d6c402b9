"""Regridding: phantoms known everywhere, a real tilted head, and a known rigid motion of a real brain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from node.dicom import regrid
from node.dicom.assembly import assemble_volumes
from node.dicom.header import read_header, scan_folder
from node.dicom.pixels import read_volume
from node.dicom.regrid import carry_back, make_regular, register_onto, resample_onto
from node.dicom.volume import Grid, SliceRef, Volume
from node.errors import InputRefused

RADIUS_MM = np.array([22.0, 17.0, 26.0])
TURN = sitk.Euler3DTransform((0, 0, 0), 0.3, -0.2, 0.4).GetMatrix()


def distance(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Depth inside of an ellipsoid around the origin, along no axis: about mm near its surface, negative outside."""
    turned = points @ np.array(TURN).reshape(3, 3)
    return (1 - np.linalg.norm(turned / RADIUS_MM, axis=-1)) * RADIUS_MM.min()


def phantom(
    *, depths: NDArray[np.float64], shear: float = 0.0, turn: NDArray[np.float64] | None = None, pixel_mm: float = 0.8
) -> Volume:
    """The ellipsoid in slices at `depths` along the normal, each moved by `shear` mm per mm along its columns.

    `turn` (3x3) turns the whole stack. The surface is smooth over 4 mm, so that linear interpolation finds it again.
    """
    axes = np.eye(3) if turn is None else turn
    rows, columns = round(60 / pixel_mm), round(66 / pixel_mm)
    corner = np.array([-columns / 2 * pixel_mm, -rows / 2 * pixel_mm, 0.0])
    positions = corner + np.outer(depths, (0, shear, 1)) - (0, shear * depths.mean(), 0)
    row, column = np.meshgrid(np.arange(rows) * pixel_mm, np.arange(columns) * pixel_mm, indexing="ij")
    plane = np.stack([column, row, np.zeros_like(row)], axis=-1)
    points = (positions[:, None, None] + plane) @ axes.T
    array = (np.clip(distance(points) / 4, -0.5, 0.5) * 1000 + 100).astype(np.float32)
    affine = np.eye(4)
    affine[:3, :3] = axes * (pixel_mm, pixel_mm, 1)
    affine[:3, 2] = axes @ (positions[-1] - positions[0]) / (len(depths) - 1)
    affine[:3, 3] = axes @ positions[0]
    slices = tuple(SliceRef("1.2", f"1.2.{index}") for index in range(len(depths)))
    return Volume(
        array=array,
        grid=Grid((len(depths), rows, columns), affine, "1.2.3"),
        slices=slices,
        series_uid="1.3",
        study_uid="1.4",
        modality="CT",
        unit="HU",
        positions_lps=positions @ axes.T,
    )


def inside(volume: Volume) -> NDArray[np.bool_]:
    """Where the ellipsoid is, by the volume's own geometry."""
    positions = volume.positions_lps
    _, rows, columns = volume.array.shape
    if positions is None:
        positions = volume.grid.to_lps(np.array([(0, 0, index) for index in range(len(volume.array))]))
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    plane = column[..., None] * volume.grid.affine_lps[:3, 0] + row[..., None] * volume.grid.affine_lps[:3, 1]
    return distance(positions[:, None, None] + plane) > 0


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


EVEN = np.arange(-30, 31, 2.0)
UNEVEN = np.concatenate([np.arange(-30, 0, 1.5), np.arange(0, 31, 3.0)])
OBLIQUE = np.array(sitk.Euler3DTransform((0, 0, 0), 0.5, 0.2, -0.7).GetMatrix()).reshape(3, 3)
IRREGULAR: dict[str, Callable[[], Volume]] = {
    "tilted": lambda: phantom(depths=EVEN, shear=-0.33),
    "tilted and oblique": lambda: phantom(depths=EVEN, shear=0.4, turn=OBLIQUE),
    "uneven": lambda: phantom(depths=UNEVEN),
    "uneven, tilted and oblique": lambda: phantom(depths=UNEVEN, shear=0.2, turn=OBLIQUE),
}


@pytest.mark.parametrize("name", IRREGULAR)
def test_an_object_is_where_it_was(name: str) -> None:
    volume = IRREGULAR[name]()
    regular = make_regular(volume)
    assert regular.is_regular
    assert regular.array.shape == regular.grid.shape
    assert len(regular.slices) == regular.grid.shape[0]
    directions = regular.grid.affine_lps[:3, :3] / regular.grid.spacing_mm[::-1]
    assert np.allclose(directions.T @ directions, np.eye(3), atol=1e-9)
    # Against the object itself, at every voxel of the grid that lies within the acquired stack's reach.
    found = regular.array > 100
    assert dice(found, inside(regular)) >= 0.985
    back = carry_back(found.astype(np.uint16) * 7, regular.grid, volume)
    assert set(np.unique(back)) == {0, 7}
    assert dice(back == 7, inside(volume)) >= 0.99


@pytest.mark.parametrize("name", IRREGULAR)
def test_the_grid_covers_every_voxel_and_is_no_coarser(name: str) -> None:
    volume = IRREGULAR[name]()
    assert volume.positions_lps is not None
    regular = make_regular(volume)
    _, rows, columns = volume.array.shape
    corners = np.array([(x, y, 0) for x in (0, columns - 1) for y in (0, rows - 1)], float)
    inverse = np.linalg.inv(regular.grid.affine_lps)
    for position in volume.positions_lps:
        points = corners @ volume.grid.affine_lps[:3, :3].T + position
        indices = points @ inverse[:3, :3].T + inverse[:3, 3]
        assert (indices > -0.01).all()
        assert (indices[:, ::-1] < np.array(regular.grid.shape) - 0.99).all()
    normal = regular.grid.affine_lps[:3, 2] / regular.grid.spacing_mm[0]
    assert regular.grid.spacing_mm[0] <= np.diff(volume.positions_lps @ normal).min() + 1e-6
    assert regular.grid.spacing_mm[1:] == pytest.approx(volume.grid.spacing_mm[1:])
    assert regular.array.min() == volume.array.min()


def test_acquired_slices_stay_as_they_are_where_the_grid_meets_them() -> None:
    """No half-voxel shift: without a tilt, a grid slice at an acquired one's depth is that slice."""
    volume = phantom(depths=UNEVEN)
    regular = make_regular(volume)
    for depth, acquired, ref in zip(UNEVEN - UNEVEN[0], volume.array, volume.slices, strict=True):
        index = round(depth / regular.grid.spacing_mm[0])
        assert np.array_equal(regular.array[index], acquired)
        assert regular.slices[index] == ref


def test_between_two_slices_lies_their_blend() -> None:
    volume = phantom(depths=np.array([0.0, 1.0, 3.0]))
    regular = make_regular(volume)
    assert regular.array.shape[0] == 4
    np.testing.assert_allclose(regular.array[2], (volume.array[1] + volume.array[2]) / 2, rtol=1e-5, atol=1e-3)


def test_a_regular_volume_is_itself() -> None:
    volume = replace(phantom(depths=EVEN), positions_lps=None)
    assert make_regular(volume) is volume


def test_one_narrow_gap_does_not_make_a_thousand_slices() -> None:
    volume = phantom(depths=np.array([0.0, 0.02, 20.0, 40.0, 60.0]))
    regular = make_regular(volume)
    assert regular.array.shape[0] == 5 * regrid.MOST_GROWTH
    last = regular.grid.to_lps(np.array([(0, 0, regular.array.shape[0] - 1)]))[0]
    assert last[2] == pytest.approx(60.0)


@settings(max_examples=25)
@given(
    shear=st.floats(-0.7, 0.7),
    gaps=st.lists(st.sampled_from([1.0, 2.0, 3.5]), min_size=3, max_size=6),
    turned=st.booleans(),
)
def test_every_voxel_carried_back_has_the_label_of_the_nearest_grid_voxel(
    shear: float, gaps: list[float], turned: bool
) -> None:
    depths = np.concatenate([[0.0], np.cumsum(gaps)])
    volume = phantom(depths=depths, shear=shear, turn=OBLIQUE if turned else None, pixel_mm=6.0)
    assert volume.positions_lps is not None
    grid = make_regular(volume).grid
    labels = np.random.default_rng(1).integers(0, 60000, grid.shape).astype(np.uint16)
    back = carry_back(labels, grid, volume)
    inverse = np.linalg.inv(grid.affine_lps)
    _, rows, columns = volume.array.shape
    for index, position in enumerate(volume.positions_lps):
        for row, column in ((0, 0), (rows - 1, columns - 1), (3, 5)):
            point = position + volume.grid.affine_lps[:3, :2] @ (column, row)
            place = (inverse[:3, :3] @ point + inverse[:3, 3])[::-1]
            if np.abs(place - np.floor(place) - 0.5).min() < 1e-6:
                continue  # between two voxels either is the nearest
            assert back[index, row, column] == labels[tuple(np.rint(place).astype(int))]


def test_labels_on_a_grid_of_other_axes_are_carried_back_too() -> None:
    volume = phantom(depths=EVEN, shear=-0.33)
    grid = phantom(depths=np.arange(-33, 34, 1.0), turn=OBLIQUE, pixel_mm=1.0)
    labels = inside(replace(grid, positions_lps=None)).astype(np.uint16)
    back = carry_back(labels, grid.grid, volume)
    assert dice(back > 0, inside(volume)) > 0.97


def test_outside_of_the_grid_nothing_is_labelled() -> None:
    volume = phantom(depths=EVEN, shear=-0.33)
    part = make_regular(volume).grid
    affine = part.affine_lps.copy()
    affine[:3, 3] += 20
    moved = Grid((8, 30, 30), affine, part.frame_of_reference_uid)
    back = carry_back(np.ones(moved.shape, np.uint16), moved, volume)
    assert 0 < np.count_nonzero(back) < back.size / 4


def read(folder: Path, modality: str | None = None) -> Volume:
    headers = {path: read_header(path) for path in scan_folder(folder).files}
    (plan,) = (plan for plan in assemble_volumes(headers).volumes if modality in (None, plan.modality))
    return read_volume(plan)


def test_a_real_tilted_head_comes_back(shared_data: Path) -> None:
    volume = read(shared_data / "head_ct_tilted")
    assert not volume.is_regular
    regular = make_regular(volume)
    assert regular.grid.spacing_mm[0] == pytest.approx(2.5 * np.cos(np.deg2rad(18.5)), abs=1e-3)
    head, found = volume.array > -300, regular.array > -300
    assert dice(carry_back(found.astype(np.uint16), regular.grid, volume) > 0, head) >= 0.99
    # The head's middle is where the acquired slices have it.
    assert volume.positions_lps is not None
    voxels = np.argwhere(head)
    acquired = volume.positions_lps[voxels[:, 0]] + voxels[:, :0:-1] @ volume.grid.affine_lps[:3, :2].T
    middle = regular.grid.to_lps(np.argwhere(found)[:, ::-1].astype(float)).mean(axis=0)
    assert np.abs(acquired.mean(axis=0) - middle).max() < 0.3


def test_resampling_is_simpleitk_s_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of slices make what the whole volume makes."""
    monkeypatch.setattr(regrid, "BLOCK", 5)
    volume = replace(phantom(depths=EVEN, turn=OBLIQUE), positions_lps=None)
    grid = phantom(depths=np.arange(-26, 27, 3.0), pixel_mm=1.7).grid
    orders: tuple[tuple[Literal[0, 1], int], ...] = ((1, sitk.sitkLinear), (0, sitk.sitkNearestNeighbor))
    for order, interpolator in orders:
        found = resample_onto(volume, grid, order=order)
        image, reference = (
            sitk.GetImageFromArray(np.zeros(grid.shape, np.float32) if of is grid else volume.array)
            for of in (volume.grid, grid)
        )
        for target, of in ((image, volume.grid), (reference, grid)):
            spacing = of.spacing_mm[::-1]
            target.SetSpacing(spacing)
            target.SetDirection((of.affine_lps[:3, :3] / spacing).ravel().tolist())
            target.SetOrigin(of.affine_lps[:3, 3].tolist())
        whole = sitk.Resample(
            image, reference, sitk.Transform(), interpolator, float(volume.array.min()), sitk.sitkFloat32
        )
        np.testing.assert_allclose(found.array, sitk.GetArrayFromImage(whole), atol=0.05)
        assert (found.grid, found.unit, found.series_uid) == (grid, "HU", "1.3")
        assert found.array.std() > 100


def test_an_irregular_volume_is_resampled_where_it_lies() -> None:
    volume = phantom(depths=UNEVEN, shear=0.3)
    grid = phantom(depths=np.arange(-24, 25, 2.0)).grid
    found = resample_onto(volume, grid)
    assert dice(found.array > 100, inside(found)) >= 0.985


def test_each_slice_names_the_acquired_one_nearest_to_it() -> None:
    volume = replace(phantom(depths=EVEN), positions_lps=None)
    grid = phantom(depths=np.array([-30.0, -28.4, 3.1, 29.9])).grid
    affine = grid.affine_lps.copy()
    affine[:3, 2] = (0, 0, 20)
    found = resample_onto(volume, Grid(grid.shape, affine, grid.frame_of_reference_uid))
    assert [ref.sop_instance_uid for ref in found.slices] == ["1.2.0", "1.2.10", "1.2.20", "1.2.30"]


@pytest.mark.parametrize("uids", [("1.2.3", "1.2.4"), ("", "")])
def test_another_frame_of_reference_is_refused(uids: tuple[str, str]) -> None:
    volume = phantom(depths=EVEN)
    volume = replace(volume, grid=replace(volume.grid, frame_of_reference_uid=uids[0]))
    with pytest.raises(InputRefused, match=r"series 1\.3 has another frame of reference"):
        resample_onto(volume, replace(volume.grid, frame_of_reference_uid=uids[1]))


def coarse_brain(shared_data: Path) -> Volume:
    """The brain at 2.7 mm."""
    volume = read(shared_data / "brain_mr_t1")
    shape = tuple(count // 4 for count in volume.array.shape)
    part = volume.array[: shape[0] * 4, : shape[1] * 4, : shape[2] * 4]
    array = part.reshape(shape[0], 4, shape[1], 4, shape[2], 4).mean(axis=(1, 3, 5), dtype=np.float32)
    affine = volume.grid.affine_lps.copy()
    affine[:3, :3] *= 4
    affine[:3, 3] = volume.grid.to_lps(np.array([(1.5, 1.5, 1.5)]))[0]
    grid = Grid(array.shape, affine, volume.grid.frame_of_reference_uid)
    return replace(volume, array=array, grid=grid, slices=volume.slices[2::4][: shape[0]])


def moved(volume: Volume, transform: sitk.Euler3DTransform) -> Volume:
    """The same content as another scanner would have it: every point taken to where `transform` takes it."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    matrix[:3, 3] = transform.TransformPoint((0.0, 0.0, 0.0))
    grid = Grid(volume.grid.shape, matrix @ volume.grid.affine_lps, "9.9")
    return replace(volume, grid=grid, series_uid="1.9")


def test_a_known_rigid_motion_is_undone(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = coarse_brain(shared_data)
    middle = fixed.grid.to_lps((np.array(fixed.grid.shape)[None, ::-1] - 1) / 2)[0]
    motion = sitk.Euler3DTransform(middle.tolist(), 0.1, -0.07, 0.12, (8.0, -6.0, 11.0))
    volume = moved(fixed, motion)
    found: list[sitk.Euler3DTransform] = []
    resampled = regrid._resampled

    def keep(volume: Volume, grid: Grid, transform: sitk.Euler3DTransform, order: int) -> Volume:
        found.append(sitk.Euler3DTransform(transform))
        return resampled(volume, grid, transform, 1)

    monkeypatch.setattr(regrid, "_resampled", keep)
    result = register_onto(volume, fixed)
    again = register_onto(volume, fixed)
    turned = np.array(found[0].GetMatrix()).reshape(3, 3) @ np.array(motion.GetMatrix()).reshape(3, 3).T
    assert np.rad2deg(np.arccos(np.clip((np.trace(turned) - 1) / 2, -1, 1))) < 1
    corners = np.array([(x, y, z) for x in (-60.0, 60.0) for y in (-60.0, 60.0) for z in (-60.0, 60.0)]) + middle
    for point in corners.tolist():
        assert np.linalg.norm(np.subtract(found[0].TransformPoint(point), motion.TransformPoint(point))) < 1
    assert result.grid == fixed.grid
    assert result.series_uid == "1.9"
    assert np.corrcoef(result.array.ravel(), fixed.array.ravel())[0, 1] > 0.98
    assert np.array_equal(result.array, again.array), "the same volumes give the same result"


def test_what_is_not_the_same_anatomy_is_refused(shared_data: Path) -> None:
    chest = moved(read(shared_data / "chest_ct_siemens" / "soft_kernel_B40f"), sitk.Euler3DTransform())
    chest = replace(chest, array=chest.array[:, ::4, ::4], grid=_thinned(chest.grid))
    with pytest.raises(InputRefused, match=r"series 1\.9 could not be registered to series"):
        register_onto(chest, coarse_brain(shared_data))


def _thinned(grid: Grid) -> Grid:
    affine = grid.affine_lps.copy()
    affine[:3, :2] *= 4
    return Grid((grid.shape[0], grid.shape[1] // 4, grid.shape[2] // 4), affine, grid.frame_of_reference_uid)
