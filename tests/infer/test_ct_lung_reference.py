"""The classical lung model as it is shipped: known volumes, both sides, real chests, and what is no lung."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from node.demo.phantom import LEFT_LUNG, RIGHT_LUNG, make_chest_phantom
from node.dicom.assembly import assemble_volumes
from node.dicom.header import read_header, scan_folder
from node.dicom.pixels import read_volume
from node.dicom.volume import Grid, SliceRef, Volume
from node.infer.bundle import BundleModel
from node.infer.package import load_package

RIGHT, LEFT = 1, 2
PACKAGE = load_package(Path(__file__).parents[2] / "models" / "ct_lung_reference")


@pytest.fixture(scope="module")
def model() -> Iterator[BundleModel]:
    loaded = BundleModel(PACKAGE.folder, PACKAGE.manifest, "cpu")
    yield loaded
    loaded.close()


def read_volumes(folder: Path) -> list[Volume]:
    headers = {path: read_header(path) for path in scan_folder(folder).files}
    return [read_volume(plan) for plan in assemble_volumes(headers).volumes]


def volume_of(array: NDArray[np.floating], spacing_mm: tuple[float, float, float]) -> Volume:
    """An axial volume centred on the patient's origin."""
    affine = np.diag([*reversed(spacing_mm), 1.0])
    affine[:3, 3] = -(np.array(array.shape[::-1]) - 1) / 2 * np.array(spacing_mm[::-1])
    slices = tuple(SliceRef("1.2", f"1.2.{index}") for index in range(len(array)))
    grid = Grid((array.shape[0], array.shape[1], array.shape[2]), affine, "1.2")
    return Volume(array.astype(np.float32), grid, slices, "1.3", "1.4", "CT", "HU")


def millilitres(volume: Volume, labels: NDArray[np.uint16], side: int) -> float:
    return float((labels == side).sum()) * volume.grid.voxel_volume_mm3 / 1000


def centre_lps(volume: Volume, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    slice_, row, column = ndimage.center_of_mass(mask)
    return (volume.grid.affine_lps @ [column, row, slice_, 1])[:3]


def label_at(volume: Volume, labels: NDArray[np.uint16], point_lps: tuple[float, float, float]) -> int:
    column, row, slice_ = np.rint(np.linalg.inv(volume.grid.affine_lps) @ [*point_lps, 1])[:3].astype(int)
    return int(labels[slice_, row, column])


SAGITTAL = ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0))
CORONAL = ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0))
TILTED = ((0.96, 0.28, 0.0), (-0.2688, 0.9216, 0.28))
SCANS = {
    "axial": {},
    "head first": {"feet_first": False},
    "thick slices": {"slices": 45, "spacing_mm": (6.0, 1.5, 1.5)},
    "anisotropic pixels": {"spacing_mm": (2.5, 1.2, 2.0), "shape": (256, 200)},
    "sagittal": {"directions": SAGITTAL, "spacing_mm": (3.0, 2.0, 2.0), "slices": 125, "shape": (160, 160)},
    "coronal": {"directions": CORONAL, "spacing_mm": (3.0, 2.0, 2.0), "slices": 90, "shape": (160, 190)},
    "oblique": {"directions": TILTED, "spacing_mm": (3.0, 2.0, 2.0), "slices": 110, "shape": (190, 190)},
}


@pytest.mark.parametrize("scan", SCANS)
def test_phantom_within_two_percent_and_left_is_left(model: BundleModel, tmp_path: Path, scan: str) -> None:
    phantom = make_chest_phantom(tmp_path, **SCANS[scan])
    (volume,) = read_volumes(tmp_path)
    labels = model.predict({"image": volume}).array
    assert labels.shape == volume.array.shape
    # The bronchi's walls end at the lungs: what is known is the ellipsoids' volume, vessels included.
    assert millilitres(volume, labels, RIGHT) == pytest.approx(phantom.volumes_ml["right lung"], rel=0.02)
    assert millilitres(volume, labels, LEFT) == pytest.approx(phantom.volumes_ml["left lung"], rel=0.02)
    for side, lung in ((RIGHT, RIGHT_LUNG), (LEFT, LEFT_LUNG)):
        # A half ellipsoid's centre of mass lies 3/8 of its height from its waist.
        up = 3 / 8 * (lung.apex_mm**2 - lung.base_mm**2) / (lung.apex_mm + lung.base_mm)
        expected = np.add(lung.center_mm, (0, 0, up))
        assert np.abs(centre_lps(volume, labels == side) - expected).max() < 1.5
    # Trachea and main bronchi are airway, the vessel in the right lung is lung, the heart is neither.
    assert label_at(volume, labels, (0, 20, 100)) == 0
    assert label_at(volume, labels, (0, 20, 40)) == 0
    assert label_at(volume, labels, (-9, 18, 5)) == 0
    assert label_at(volume, labels, (-77.5, -12.5, 0)) == RIGHT
    assert label_at(volume, labels, (80, -10, -5)) == LEFT
    assert label_at(volume, labels, (0, -40, -30)) == 0


CHESTS = {"chest_ct_philips": 1, "chest_ct_siemens": 2}


def trachea_of(volume: Volume) -> tuple[float, float, float]:
    """A point in the trachea, found without the model: the highest air of its size in the middle of the body."""
    hu = volume.array
    for index in range(len(hu) - 1, -1, -1):
        body = ndimage.binary_fill_holes(ndimage.binary_opening(hu[index] > -300, iterations=3))
        pieces, count = ndimage.label(ndimage.binary_erosion(body, iterations=8) & (hu[index] < -900))
        columns = np.flatnonzero(body.any(axis=0))
        for piece in range(1, count + 1):
            where = pieces == piece
            area_mm2 = where.sum() * volume.grid.spacing_mm[1] * volume.grid.spacing_mm[2]
            row, column = ndimage.center_of_mass(where)
            off_mm = abs(column - (columns[0] + columns[-1]) / 2) * volume.grid.spacing_mm[2]
            if 60 < area_mm2 < 500 and off_mm < 25 and index < 0.85 * len(hu):
                return tuple((volume.grid.affine_lps @ [column, row, index, 1])[:3])
    raise AssertionError("the image shows no trachea")


@pytest.mark.parametrize("folder", CHESTS)
def test_real_chest(model: BundleModel, shared_data: Path, folder: str) -> None:
    volumes = read_volumes(shared_data / folder)
    assert len(volumes) == CHESTS[folder]
    for volume in volumes:
        labels = model.predict({"image": volume}).array
        for side in (RIGHT, LEFT):
            assert 1000 < millilitres(volume, labels, side) < 4500
            assert -900 < volume.array[labels == side].mean() < -600
            assert (volume.array[labels == side] < -400).mean() > 0.9
            # One lung, not lung and rubbish elsewhere.
            pieces, _ = ndimage.label(labels == side)
            assert np.bincount(pieces.ravel())[1:].max() > 0.98 * (labels == side).sum()
        left, right = centre_lps(volume, labels == LEFT), centre_lps(volume, labels == RIGHT)
        assert left[0] - right[0] > 100
        assert abs(left[2] - right[2]) < 30
        assert label_at(volume, labels, trachea_of(volume)) == 0


def test_kernels_of_one_scan_agree(model: BundleModel, shared_data: Path) -> None:
    soft, sharp = (model.predict({"image": volume}).array for volume in read_volumes(shared_data / "chest_ct_siemens"))
    for side in (RIGHT, LEFT):
        both = 2 * ((soft == side) & (sharp == side)).sum() / ((soft == side).sum() + (sharp == side).sum())
        assert both > 0.97


def test_bowel_gas_is_no_lung(model: BundleModel, shared_data: Path) -> None:
    """The scan shows the lungs' bases, and below the diaphragm gas in stomach and colon."""
    (volume,) = read_volumes(shared_data / "abdomen_ct_ge")
    labels = model.predict({"image": volume}).array
    # The lowest recess of the lungs lies on slice 20 (seen in a viewer); the colon's gas on slices 0 to 19.
    lowest = 20
    gas = (volume.array < -900) & ndimage.binary_fill_holes(volume.array > -300, structure=np.ones((1, 3, 3)))
    assert gas[:lowest].sum() * volume.grid.voxel_volume_mm3 > 50_000
    assert not labels[:lowest].any()
    assert 600 < millilitres(volume, labels, RIGHT) < 800
    assert 500 < millilitres(volume, labels, LEFT) < 700
    assert centre_lps(volume, labels == LEFT)[0] - centre_lps(volume, labels == RIGHT)[0] > 100


def test_abdomen_below_the_diaphragm_has_no_lung(model: BundleModel, shared_data: Path) -> None:
    (volume,) = read_volumes(shared_data / "abdomen_ct_ge")
    assert not model.predict({"image": volume_of(volume.array[:20], volume.grid.spacing_mm)}).array.any()


def test_cropped_chest_shows_the_right_lung(model: BundleModel, shared_data: Path) -> None:
    """The image holds the right half of the chest to just beyond the spine, with trachea and a tumour of 12 cm."""
    (volume,) = read_volumes(shared_data / "lung_tumour_ct_rtstruct" / "image")
    labels = model.predict({"image": volume}).array
    assert 900 < millilitres(volume, labels, RIGHT) < 1300
    assert not (labels == LEFT).any()
    spine = volume.array[:, 120:].copy() > 150
    assert centre_lps(volume, labels == RIGHT)[0] < (volume.grid.affine_lps @ [np.nonzero(spine)[2].mean(), 0, 0, 1])[0]
    trachea = volume.array[-1, 70:95, 170:200]
    assert (trachea < -950).sum() > 60, "the trachea is here"
    assert (labels[-1, 70:95, 170:200][trachea < -950] == 0).mean() > 0.95


def cylinder(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], radius_mm: float
) -> NDArray[np.bool_]:
    rows, columns = ((np.arange(shape[axis]) - (shape[axis] - 1) / 2) * spacing_mm[axis] for axis in (1, 2))
    return np.broadcast_to(rows[:, None] ** 2 + columns[None, :] ** 2 <= radius_mm**2, shape)


def test_what_holds_no_lung(model: BundleModel) -> None:
    """A water phantom, one with a large bubble, air alone, water alone, and next to no slices."""
    shape, spacing_mm = (40, 128, 128), (5.0, 3.0, 3.0)
    noise = np.random.default_rng(1).normal(0, 15, shape)
    water = np.where(cylinder(shape, spacing_mm, 150), 0.0, -1000.0) + noise
    bubble = np.where(cylinder(shape, spacing_mm, 40) & (np.arange(40) < 30)[:, None, None], -995.0 + noise, water)
    assert ((bubble < -900) & cylinder(shape, spacing_mm, 100)).sum() * 45 / 1000 > 600, "a bubble as large as a lung"
    for array in (
        water,
        bubble,
        np.full(shape, -1000.0),
        np.zeros(shape),
        water[:1],
        water[:, :1, :1],
        water[:, :, :2],
    ):
        # Water alone would be a map of zeros too: `check_labelmap` takes it, for background is in it.
        assert not model.predict({"image": volume_of(array, spacing_mm)}).array.any()


def test_one_lung_is_named_by_the_spine(model: BundleModel, tmp_path: Path) -> None:
    """The image is cropped so that the lung fills it: the middle of the image says nothing."""
    make_chest_phantom(tmp_path)
    (volume,) = read_volumes(tmp_path)
    whole = model.predict({"image": volume}).array
    for side, columns in ((RIGHT, slice(0, 146)), (LEFT, slice(110, 256))):
        array = np.where(whole == (LEFT if side == RIGHT else RIGHT), 40.0, volume.array)  # one lung is consolidated
        labels = model.predict({"image": volume_of(array[:, :, columns], volume.grid.spacing_mm)}).array
        assert set(np.unique(labels)) == {0, side}
        assert (labels == side).sum() == pytest.approx((whole == side).sum(), rel=0.02)
