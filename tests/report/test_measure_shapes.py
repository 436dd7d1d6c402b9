"""Diameters and meshes of phantoms against the closed form, on the grids that scanners make."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from node.dicom.volume import Grid, SliceRef, Volume
from node.infer.manifest import Manifest, Measurement
from node.infer.results import Labelmap
from node.report.diameters import measure_diameters
from node.report.measure import SegmentMeasurements, measure_segments
from node.report.space import first_voxels
from tests.report.cases import FIRST, MANIFEST

WANTED = [
    "volume", "mesh volume", "surface area", "longest diameter", "perpendicular diameter", "maximum 3D diameter"
]  # fmt: skip
SHAPE = (60, 72, 80)
AXES_MM = np.array([15.0, 11.0, 20.0])  # half axes of an ellipsoid along columns, rows and the normal


def turned(degrees: float) -> np.ndarray:
    """A rotation about an axis of no symmetry."""
    axis = np.array([1.0, 2.0, 3.0]) / np.sqrt(14)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    angle = np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def grid_of(spacing: tuple[float, float, float], *, degrees: float = 0.0, tilt: float = 0.0) -> Grid:
    """Spacing between columns, rows, slices; turned in the patient; each slice shifted along the rows by the tilt."""
    affine = np.eye(4)
    affine[:3, :3] = np.diag(spacing)
    affine[1, 2] = np.tan(np.radians(tilt)) * spacing[2]
    affine[:3, :3] = turned(degrees) @ affine[:3, :3]
    affine[:3, 3] = (-31.0, 47.0, -205.0)
    return Grid(SHAPE, affine, "1.2")


def volume_of(grid: Grid, positions: np.ndarray | None = None) -> Volume:
    slices = tuple(SliceRef("1.2", f"1.2.{index}") for index in range(grid.shape[0]))
    values = np.zeros(grid.shape, np.float32)
    return Volume(values, grid, slices, "1.3", "1.4", "CT", "HU", positions_lps=positions)


def ellipsoid(volume: Volume) -> np.ndarray:
    """An ellipsoid in the middle of the volume, its axes along the rows, the columns and the normal of the slices."""
    column, row = (volume.grid.affine_lps[:3, axis] for axis in (0, 1))
    axes = np.array([column / np.linalg.norm(column), row / np.linalg.norm(row)])
    axes = np.vstack([axes, np.cross(*axes)])
    rows, columns = np.mgrid[: SHAPE[1], : SHAPE[2]]
    in_plane = columns[..., None] * column + rows[..., None] * row
    places = first_voxels(volume)[:, None, None] + in_plane
    centre = (places[0].mean(axis=(0, 1)) + places[-1].mean(axis=(0, 1))) / 2
    return ((((places - centre) @ axes.T) / AXES_MM) ** 2).sum(axis=-1) <= 1


def measure(volume: Volume, mask: np.ndarray) -> SegmentMeasurements:
    manifest = Manifest.model_validate(
        MANIFEST | {"segments": {FIRST: MANIFEST["segments"][FIRST]}, "measurements": WANTED}
    )
    labels = np.where(mask, FIRST, 0).astype(np.uint16)
    (measured,) = measure_segments(volume, Labelmap(labels, volume.grid), manifest)
    return measured


GRIDS = {
    "isotropic": grid_of((0.8, 0.8, 0.8)),
    "anisotropic": grid_of((0.7, 0.9, 1.25)),
    "oblique": grid_of((0.7, 0.9, 1.25), degrees=33),
    "tilted": grid_of((0.7, 0.9, 1.25), tilt=-18.5),
}


def even(grid: Grid) -> Volume:
    """The volume of a grid; of a tilted one with the place of each slice, as it is read."""
    plain = volume_of(grid)
    skewed = abs(float(grid.affine_lps[:3, 1] @ grid.affine_lps[:3, 2])) > 1e-9
    return volume_of(grid, first_voxels(plain)) if skewed else plain


@pytest.mark.parametrize("name", GRIDS)
def test_an_ellipsoid_has_its_volume_and_diameters(name: str) -> None:
    volume = even(GRIDS[name])
    mask = ellipsoid(volume)
    measured = measure(volume, mask)
    true_ml = 4 / 3 * np.pi * AXES_MM.prod() / 1000
    step = max(volume.grid.spacing_mm)
    assert measured.volume_ml == pytest.approx(true_ml, rel=0.01)
    assert measured.values[Measurement.MESH_VOLUME] == pytest.approx(true_ml, rel=0.01)
    assert measured.values[Measurement.MAXIMUM_3D_DIAMETER] == pytest.approx(2 * AXES_MM[2], abs=step)
    assert measured.values[Measurement.LONGEST_DIAMETER] == pytest.approx(2 * AXES_MM[0], abs=step)
    assert measured.values[Measurement.PERPENDICULAR_DIAMETER] == pytest.approx(2 * AXES_MM[1], abs=step)
    assert measured.diameters is not None
    assert abs(measured.diameters.index - (SHAPE[0] - 1) / 2) <= 3  # where it hardly gets narrower


def test_spacing_that_changes_is_measured_as_it_is() -> None:
    grid = GRIDS["oblique"]
    normal = np.cross(grid.affine_lps[:3, 0], grid.affine_lps[:3, 1])
    normal /= np.linalg.norm(normal)
    depths = np.concatenate([[0], np.cumsum(np.where(np.arange(SHAPE[0] - 1) < 30, 0.9, 1.6))])
    volume = volume_of(grid, grid.affine_lps[:3, 3] + depths[:, None] * normal)
    measured = measure(volume, ellipsoid(volume))
    true_ml = 4 / 3 * np.pi * AXES_MM.prod() / 1000
    assert measured.volume_ml == pytest.approx(true_ml, rel=0.01)
    assert measured.values[Measurement.MESH_VOLUME] == pytest.approx(true_ml, rel=0.01)
    assert measured.values[Measurement.MAXIMUM_3D_DIAMETER] == pytest.approx(2 * AXES_MM[2], abs=1.6)


@pytest.mark.parametrize("name", GRIDS)
def test_the_mesh_of_a_box_is_the_box_without_its_edges(name: str) -> None:
    """Marching cubes at 0.5 takes an eighth of a voxel from each along the edges, and leaves a 48th at each corner."""
    volume = even(GRIDS[name])
    mask = np.zeros(SHAPE, bool)
    n, m, k = 7, 9, 41  # slices, across the seam between two slabs, rows, columns
    mask[29 : 29 + n, 10 : 10 + m, 20 : 20 + k] = True
    mesh_voxels = n * m * k - 4 * (n - 1 + m - 1 + k - 1) / 8 - 8 * (1 / 8 - 1 / 48)
    assert measure(volume, mask).values[Measurement.MESH_VOLUME] * 1000 == pytest.approx(
        mesh_voxels * volume.grid.voxel_volume_mm3, rel=1e-6
    )


def test_a_single_voxel_has_every_measurement() -> None:
    volume = even(GRIDS["oblique"])
    for place in ((30, 20, 20), (0, 0, 0), (SHAPE[0] - 1, SHAPE[1] - 1, SHAPE[2] - 1)):
        mask = np.zeros(SHAPE, bool)
        mask[place] = True
        measured = measure(volume, mask)
        assert measured.values[Measurement.MESH_VOLUME] * 1000 == pytest.approx(0.7 * 0.9 * 1.25 / 6)
        assert measured.values[Measurement.MAXIMUM_3D_DIAMETER] == pytest.approx(1.25)
        assert measured.values[Measurement.LONGEST_DIAMETER] == pytest.approx(0.9)
        assert measured.values[Measurement.PERPENDICULAR_DIAMETER] == pytest.approx(0.7)


def test_slabs_of_the_mesh_make_one_mesh() -> None:
    """A body through many slabs, with a hole in it: the hole is not part of its volume."""
    volume = even(GRIDS["isotropic"])
    mask = np.zeros(SHAPE, bool)
    mask[:, 5:65, 5:65] = True
    mask[10:50, 25:45, 25:45] = False
    hollow = np.zeros(SHAPE, bool)
    hollow[10:50, 25:45, 25:45] = True
    whole, hole = measure(volume, mask), measure(volume, hollow)
    filled = mask.copy()
    filled[10:50, 25:45, 25:45] = True
    kind = Measurement.MESH_VOLUME
    voxels_around = 40 * 20 * 20 * volume.grid.voxel_volume_mm3 / 1000
    assert hole.values[kind] < voxels_around
    # The mesh passes halfway between voxels inside and outside, whichever of them are the segment's.
    assert measure(volume, filled).values[kind] - whole.values[kind] == pytest.approx(hole.values[kind], rel=1e-6)


def test_a_rectangle_is_measured_from_edge_to_edge() -> None:
    mask = np.zeros((3, 20, 30), bool)
    mask[0, 2, 2:6] = True
    mask[1, 4:5, 3:28] = True
    found = measure_diameters(mask, (2.0, 0.5))
    assert (found.index, found.longest, found.perpendicular) == (1, 12.5, 2.0)
    assert found.longest_line.tolist() == [[4, 2.5], [4, 27.5]]


def test_parts_that_do_not_touch_have_no_common_diameter() -> None:
    mask = np.zeros((1, 20, 30), bool)
    mask[0, 2, 2:6], mask[0, 17, 20:28] = True, True
    assert measure_diameters(mask, (1.0, 1.0)).longest == 8
    mask[0, 3, 6:9] = True  # touches the first by a corner
    assert measure_diameters(mask, (1.0, 1.0)).longest == 8
    mask[0, 4, 9:12] = True
    assert measure_diameters(mask, (1.0, 1.0)).longest > 9


@settings(max_examples=60, deadline=None)
@given(
    mask=arrays(bool, (2, 7, 9), elements=st.booleans()).filter(lambda mask: mask.any()),
    spacing=st.tuples(st.sampled_from([0.5, 1.0, 1.7]), st.sampled_from([0.5, 1.0, 0.9])),
)
def test_no_two_points_of_an_outline_lie_farther_apart(mask: np.ndarray, spacing: tuple[float, float]) -> None:
    """Against every pair of points between a pixel inside and a neighbour outside, part by part."""
    found = measure_diameters(mask, spacing)
    longest = 0.0
    for part in parts_of(mask):
        points = [
            (row + down / 2, column + across / 2)
            for row, column in part
            for down, across in ((-1, 0), (1, 0), (0, -1), (0, 1))
            if (row + down, column + across) not in part
        ]
        places = np.array(points) * spacing
        longest = max(longest, *(float(np.linalg.norm(a - b)) for a, b in combinations(places, 2)))
    assert found.longest == pytest.approx(longest)
    along, across = (np.diff(line * spacing, axis=0)[0] for line in (found.longest_line, found.perpendicular_line))
    assert np.linalg.norm(along) == pytest.approx(found.longest)
    assert np.linalg.norm(across) == pytest.approx(found.perpendicular)
    assert abs(along @ across) < 1e-6
    assert found.perpendicular <= found.longest + 1e-9


def parts_of(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """The parts of each slice that touch by side or corner, found by walking."""
    parts = []
    for plane in mask:
        left = {(int(row), int(column)) for row, column in np.argwhere(plane)}
        while left:
            part, edge = set(), [left.pop()]
            while edge:
                row, column = edge.pop()
                part.add((row, column))
                near = {(row + a, column + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
                left -= near
                edge += near
            parts.append(part)
    return parts
