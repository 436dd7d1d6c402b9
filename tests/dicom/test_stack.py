"""Stacks that are not regular: sheared ones and changing steps keep every slice's place, gaps are refused."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from scipy.spatial.transform import Rotation

from node.dicom.assembly import Assembly, VolumePlan, assemble_volumes
from node.dicom.header import read_header, scan_folder
from tests.dicom.multiframe import write_multiframe
from tests.dicom.slices import write_series


def write_steps(folder: Path, steps_mm: list[float]) -> Assembly:
    """Axial slices with these steps between them."""
    heights = np.cumsum([0.0, *steps_mm])
    for path, height in zip(
        write_series(folder, np.zeros((len(heights), 4, 4), np.int16)), heights.tolist(), strict=True
    ):
        dataset = dcmread(path)
        dataset.ImagePositionPatient = ["0", "0", f"{height:.6f}"]
        dataset.save_as(path)
    return assemble_volumes({path: read_header(path) for path in scan_folder(folder).files})


@given(
    turn=st.integers(0, 2**32 - 1),
    spacing_mm=st.tuples(*[st.floats(0.3, 7.0)] * 3),
    shear_mm=st.tuples(*[st.floats(-3.0, 3.0)] * 2),
    flip=st.booleans(),
    as_frames=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_rotation_flip_and_shear_gives_the_affine_back(
    *,
    tmp_path_factory: pytest.TempPathFactory,
    turn: int,
    spacing_mm: tuple[float, float, float],
    shear_mm: tuple[float, float],
    flip: bool,
    as_frames: bool,
) -> None:
    """Slices in any order, along the normal or against it, in single-frame objects or as frames."""
    turned = Rotation.random(rng=np.random.default_rng(turn)).as_matrix()
    row, column, normal = turned.T
    step = normal * spacing_mm[0] + row * shear_mm[0] + column * shear_mm[1]
    positions = np.outer(np.arange(6), step) + np.array([-10.0, 20.0, 30.0])
    given_order = np.arange(6)[:: -1 if flip else 1]
    orientation = [f"{value:.10g}" for value in (*row, *column)]
    folder = tmp_path_factory.mktemp("stack")
    if as_frames:
        frames = [
            {"ImagePositionPatient": [f"{value:.10g}" for value in positions[index]]}
            for index in np.random.default_rng(turn).permutation(given_order)
        ]
        shared = {"ImageOrientationPatient": orientation, "PixelSpacing": [f"{value:.10g}" for value in spacing_mm[1:]]}
        write_multiframe(folder / "all.dcm", np.zeros((6, 3, 4), np.int16), frames, shared=shared)
    else:
        paths = write_series(
            folder, np.zeros((6, 3, 4), np.int16), row=tuple(row), column=tuple(column), spacing_mm=spacing_mm
        )
        for path, index in zip(paths, given_order, strict=True):
            dataset = dcmread(path)
            dataset.ImagePositionPatient = [f"{value:.10g}" for value in positions[index]]
            dataset.save_as(path)
    headers = [(path, read_header(path)) for path in scan_folder(folder).files]
    random.Random(turn).shuffle(headers)
    (plan,) = assemble_volumes(dict(headers)).volumes
    expected = np.column_stack([row * spacing_mm[2], column * spacing_mm[1], step, positions[0]])
    assert np.allclose(plan.grid.affine_lps[:3], expected, atol=1e-4)
    assert np.isclose(plan.grid.voxel_volume_mm3, np.prod(spacing_mm), rtol=1e-4)
    is_sheared = np.hypot(*shear_mm) * 5 > 0.5
    if abs(np.hypot(*shear_mm) * 5 - 0.5) > 1e-3:
        assert (plan.positions_lps is not None) == is_sheared
    if plan.positions_lps is not None:
        assert np.allclose(plan.positions_lps, positions, atol=1e-4)
    assert len(plan.headers) == (1 if as_frames else 6)


IRREGULAR = [
    ("a protocol of two steps", [5.0] * 6 + [10.0] * 5),
    ("... the other way round", [10.0] * 5 + [2.5] * 9),
    ("one slice out of step", [2.0, 2.5, 1.5, 2.0, 2.0]),
    ("overlap at one place", [5.0, 5.0, 2.0, 5.0, 5.0]),
    ("steps that grow", [2.0, 2.2, 2.4, 2.6, 2.8]),
    ("steps within their tolerance that drift", [5.0] * 20 + [5.09] * 20),
]


@pytest.mark.parametrize(("what", "steps"), IRREGULAR, ids=[case[0] for case in IRREGULAR])
def test_changing_steps_keep_every_place(tmp_path: Path, what: str, steps: list[float]) -> None:
    assembly = write_steps(tmp_path, steps)
    assert not assembly.refusals, what
    (plan,) = assembly.volumes
    assert plan.positions_lps is not None
    assert np.allclose(plan.positions_lps[:, 2], np.cumsum([0.0, *steps]), atol=1e-5)
    assert plan.grid.spacing_mm[0] == pytest.approx(np.mean(steps))


GAPS = [
    ([5, 5, 10, 5, 5], "a slice is missing: 10.00 mm between slices 3 and 4 of 6, 5.00 mm elsewhere"),
    ([10, 5, 5], "a slice is missing: 10.00 mm between slices 1 and 2 of 4, 5.00 mm elsewhere"),
    ([5, 5, 5, 5, 20], "3 slices are missing: 20.00 mm between slices 5 and 6 of 6, 5.00 mm elsewhere"),
    ([5, 10, 5, 5, 15, 5, 5], "a slice is missing: 10.00 mm between slices 2 and 3 of 8 (and 1 more such steps), "
     "5.00 mm elsewhere"),
    ([5, 5, 5, 10, 10, 5, 5], "a slice is missing: 10.00 mm between slices 4 and 5 of 8 (and 1 more such steps), "
     "5.00 mm elsewhere"),
    ([5, 5, 5, 47.3, 5, 5], "the slices leave a gap: 47.30 mm between slices 4 and 5 of 7, 5.00 mm elsewhere"),
    ([2, 2, 3.7, 2], "the slices leave a gap: 3.70 mm between slices 3 and 4 of 5, 2.00 mm elsewhere"),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "sentence"), GAPS, ids=[str(case[0]) for case in GAPS])
def test_gaps_are_refused_where_they_are(tmp_path: Path, steps: list[float], sentence: str) -> None:
    assembly = write_steps(tmp_path, steps)
    assert not assembly.volumes
    assert [refusal.sentence for refusal in assembly.refusals] == [sentence]


@given(lost=st.sets(st.integers(1, 18), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_lost_slices_are_never_made_up(tmp_path_factory: pytest.TempPathFactory, lost: set[int]) -> None:
    """Up to four of twenty slices lost anywhere within."""
    heights = [2.5 * index for index in range(20) if index not in lost]
    assembly = write_steps(tmp_path_factory.mktemp("lost"), np.diff(heights).tolist())
    assert not assembly.volumes


def test_tilted_head_is_exact(shared_data: Path) -> None:
    headers = {path: read_header(path) for path in scan_folder(shared_data / "head_ct_tilted").files}
    (plan,) = assemble_volumes(headers).volumes
    assert_exact(plan)
    normal = np.cross(plan.grid.affine_lps[:3, 0], plan.grid.affine_lps[:3, 1])
    cosine = plan.grid.affine_lps[:3, 2] @ normal / np.linalg.norm(normal) / 2.5
    assert np.degrees(np.arccos(cosine)) == pytest.approx(18.5, abs=0.01)


def assert_exact(plan: VolumePlan) -> None:
    """The grid places each slice where its header says."""
    assert plan.positions_lps is not None
    indices = np.column_stack([np.zeros((len(plan.slices), 2)), np.arange(len(plan.slices), dtype=float)])
    assert np.abs(plan.grid.to_lps(indices) - plan.positions_lps).max() < 1e-3
    for path, position in zip(plan.paths, plan.positions_lps, strict=True):
        header = dcmread(path, stop_before_pixels=True)
        assert np.allclose([float(value) for value in header.ImagePositionPatient], position)
