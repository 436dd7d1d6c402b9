"""dcm2niix as the witness: the same grids and the same values from every real series, single-frame and enhanced."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from node.dicom.assembly import VolumePlan, assemble_volumes
from node.dicom.header import read_header, scan_folder
from node.dicom.pixels import read_volume
from node.dicom.volume import Volume

XA30 = "enhanced/mr_siemens_xa30/In"

# What to convert, and how many volumes it holds.
REGULAR = {
    "abdomen_ct_ge": 1,
    "brain_mr_t1": 1,
    "chest_ct_philips": 1,
    "chest_ct_siemens": 2,
    "compressed/mr_j2k": 1,
    "compressed/mr_jpeg": 1,
    "compressed/mr_rle": 1,
    "enhanced/eCT_Supplemental.dcm": 1,
    "enhanced/mr_philips": 1,
    f"{XA30}/11_DWI_dir80_PA": 1,
    f"{XA30}/27_asl_2d_tra": 1,
    f"{XA30}/5_anat-T1w_acq-tfl": 1,
    f"{XA30}/9_gre_field_mapping": 1,
    "irregular/sliceorientation": 2,
    "lung_tumour_ct_rtstruct/image": 1,
    "sarcoma_ct_mr_pet": 3,
}
PADDING = {"abdomen_ct_ge": -3024.0}  # PixelPaddingValue -2000, rescaled; dcm2niix keeps it, here it is air
TILTED = ["head_ct_tilted", "irregular/gantrytilting"]


@dataclass(frozen=True)
class Converted:
    """One NIfTI file in the order of our arrays."""

    array: NDArray[np.float64]  # (slices, rows, columns)
    affine_ras: NDArray[np.float64]  # of (column, row, slice)


def convert(source: Path, folder: Path) -> list[Converted]:
    """What dcm2niix makes of a folder or file, each file turned back to the order of rows and slices in the DICOM."""
    program = shutil.which("dcm2niix")
    assert program, "dcm2niix is not installed (Debian: apt-get install dcm2niix)"
    # -p n: the values that a display shows, not those of Philips's private scale; -s y: a file without its siblings;
    # -x i: no rotation of 3D acquisitions to another plane
    options = ["-b", "n", "-z", "n", "-p", "n", "-x", "i", "-s", "y" if source.is_file() else "n"]
    options += ["-f", "%j", "-o", str(folder)]
    subprocess.run([program, *options, str(source)], check=True, capture_output=True, timeout=300)
    return [read_nifti(path) for path in sorted(folder.glob("*.nii"))]


def read_nifti(path: Path) -> Converted:
    image = nibabel.load(path)  # pyright: ignore[reportPrivateImportUsage]
    assert isinstance(image, nibabel.Nifti1Image)  # pyright: ignore[reportPrivateImportUsage]
    return Converted(image.get_fdata().transpose(2, 1, 0).astype(np.float64), np.asarray(image.affine))


def reorder(converted: Converted, plan: VolumePlan) -> NDArray[np.float64] | None:
    """The values in the plan's order, when both grids hold the same points; dcm2niix turns rows and slices over."""
    if converted.array.shape != plan.grid.shape:
        return None
    columns, rows, slices = np.array(plan.grid.shape[::-1]) - 1
    array = converted.array
    change = np.linalg.inv(converted.affine_ras) @ plan.grid.affine_ras  # from our indices to its own
    for axis, last in ((0, columns), (1, rows), (2, slices)):
        if change[axis, axis] < 0:
            array = np.flip(array, 2 - axis)
            change[axis] *= -1
            change[axis, 3] += last
    corners = np.array(np.meshgrid((0, columns), (0, rows), (0, slices), [1])).reshape(4, -1)
    # In voxels, at every corner: NIfTI keeps 32-bit floats, and headers 16 characters per number.
    return array if np.abs((change - np.eye(4)) @ corners).max() < 0.02 else None


def plans_of(source: Path) -> tuple[VolumePlan, ...]:
    return assemble_volumes({path: read_header(path) for path in scan_folder(source).files}).volumes


@pytest.mark.parametrize("name", REGULAR)
def test_same_grid_and_values(shared_data: Path, tmp_path: Path, name: str) -> None:
    plans = plans_of(shared_data / name)
    converted = convert(shared_data / name, tmp_path)
    assert len(plans) == REGULAR[name]
    for plan in plans:
        candidates = [array for each in converted if (array := reorder(each, plan)) is not None]
        assert candidates, [(each.array.shape, each.affine_ras) for each in converted]
        volume = read_volume(plan)
        assert volume.is_regular
        # Two kernels of one acquisition have one grid.
        assert (
            min(worst_difference(volume, array, PADDING.get(name)) for array in candidates)
            <= 1e-5 * np.abs(candidates).max()
        )


def worst_difference(volume: Volume, array: NDArray[np.float64], padding: float | None) -> float:
    """Between the values that were measured."""
    padded = array == padding
    assert (volume.array[padded] == -1024).all()
    assert padded.any() == (padding is not None)
    return float(np.abs(volume.array - array)[~padded].max())


@pytest.mark.parametrize("name", TILTED)
def test_sheared_grid_is_where_the_corrected_volume_of_dcm2niix_is(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    """dcm2niix moves the rows of each slice to where a regular grid wants them: our rows, moved alike, are the same."""
    (plan,) = plans_of(shared_data / name)
    as_sent, corrected = sorted(convert(shared_data / name, tmp_path), key=lambda each: each.array.shape)
    volume = read_volume(plan)
    assert plan.positions_lps is not None
    assert not volume.is_regular
    assert np.array_equal(as_sent.array[:, ::-1], volume.array)
    change = np.linalg.inv(corrected.affine_ras) @ plan.grid.affine_ras
    slices, rows, _ = plan.grid.shape
    shift = change[1, 2]  # rows per slice
    expected = [[1, 0, 0, 0], [0, -1, shift, rows - 1], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert np.abs(change - expected).max() * slices < 0.02
    assert 1 < abs(shift) < 5
    for index in (0, slices // 2, slices - 1):
        moved = np.arange(corrected.array.shape[1]) - rows + 1 - shift * index  # its rows in ours, counted down
        at = -moved
        inside = (at >= 1) & (at <= rows - 2)
        below = np.floor(at[inside]).astype(int)
        part = (at[inside] - below)[:, None]
        ours = (1 - part) * volume.array[index, below] + part * volume.array[index, below + 1]
        assert inside.sum() > rows - 4
        assert np.abs(ours - corrected.array[index, inside]).max() <= 1.5  # it rounds to whole numbers
