"""Voxels: GDCM by way of SimpleITK as the oracle, four encodings of one series, and slices that cannot be decoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.uid import JPEG2000Lossless, RLELossless

from node.dicom.assembly import assemble_volumes
from node.dicom.header import read_header, scan_folder
from node.dicom.pixels import read_volume
from node.dicom.volume import Volume
from node.errors import InputRefused
from tests.dicom.slices import PATIENT, write_series
from tests.dicom.test_assembly import REGULAR, read_with_gdcm

RANDOM = np.random.default_rng(3).integers(-1024, 3000, (6, 64, 48)).astype(np.int16)


def read_volumes(folder: Path) -> list[Volume]:
    headers = {path: read_header(path) for path in scan_folder(folder).files}
    return [read_volume(plan) for plan in assemble_volumes(headers).volumes]


@pytest.mark.parametrize("folder", REGULAR)
def test_voxels_of_a_real_series_are_those_of_gdcm(shared_data: Path, folder: str) -> None:
    headers = {path: read_header(path) for path in scan_folder(shared_data / folder).files}
    plans = assemble_volumes(headers).volumes
    assert len(plans) == REGULAR[folder]
    for plan in plans:
        volume = read_volume(plan)
        expected = sitk.GetArrayFromImage(read_with_gdcm(plan))
        assert volume.array.dtype == np.float32
        assert volume.array.std() > 0
        if plan.modality == "PT":  # fractional slopes: float32 here, double there
            np.testing.assert_allclose(volume.array, expected, rtol=2e-7)
        else:
            assert np.array_equal(volume.array, expected)
        assert (volume.grid, volume.slices, volume.series_uid) == (plan.grid, plan.slices, plan.series_uid)
        assert volume.unit == {"CT": "HU", "PT": "SUVbw"}.get(plan.modality, "")


def test_one_series_in_four_encodings_has_one_content(shared_data: Path) -> None:
    encodings = ("mr_rle", "mr_jpeg", "mr_jpegls", "mr_j2k")
    syntaxes, volumes = set(), []
    for name in encodings:
        (volume,) = read_volumes(shared_data / "compressed" / name)
        volumes.append(volume)
        files = (shared_data / "compressed" / name).iterdir()
        syntaxes |= {dcmread(path).file_meta.TransferSyntaxUID for path in files}
    assert len(syntaxes) == 4
    for volume in volumes[1:]:
        assert np.array_equal(volume.array, volumes[0].array)
        assert np.array_equal(volume.grid.affine_lps, volumes[0].grid.affine_lps)
        assert volume.slices == volumes[0].slices


def test_each_slice_of_pet_has_its_own_slope(shared_data: Path) -> None:
    folder = shared_data / "sarcoma_ct_mr_pet" / "PET" / "image"
    headers = {path: read_header(path) for path in scan_folder(folder).files}
    (plan,) = assemble_volumes(headers).volumes
    assert len({float(header.RescaleSlope) for header in plan.headers}) > 10
    volume = read_volume(plan)
    for index, path in enumerate(plan.paths):
        dataset = dcmread(path)
        stored = np.frombuffer(dataset.PixelData, "<i2" if dataset.PixelRepresentation else "<u2")
        expected = stored.reshape(dataset.Rows, dataset.Columns) * float(dataset.RescaleSlope)
        np.testing.assert_allclose(volume.array[index], expected + float(dataset.RescaleIntercept), rtol=1e-6)


def test_slope_and_intercept_of_each_slice_are_honoured(tmp_path: Path) -> None:
    paths = write_series(tmp_path, RANDOM)
    for index, path in enumerate(paths):
        dataset = dcmread(path)
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{1 + index / 4}", f"{-100 * index}"
        dataset.save_as(path)
    (volume,) = read_volumes(tmp_path)
    for index in range(len(paths)):
        assert np.array_equal(volume.array[index], RANDOM[index] * (1 + index / 4) - 100 * index)


@pytest.mark.parametrize(
    ("vr", "value"), [(b"DS", b"x100"), (b"DS", b"nan "), (b"DS", b"1\\10"), (b"D\0", b"-100")], ids=repr
)
def test_rescale_that_is_no_number_is_refused(tmp_path: Path, vr: bytes, value: bytes) -> None:
    """Taken as absent it would make other values of the voxels than the sender meant."""
    paths = write_series(tmp_path, RANDOM, RescaleIntercept="-100")
    content = paths[3].read_bytes()
    element = b"\x28\x00\x52\x10%b\x04\x00%b"
    assert content.count(element % (b"DS", b"-100")) == 1
    paths[3].write_bytes(content.replace(element % (b"DS", b"-100"), element % (vr, value)))
    uid = dcmread(paths[3]).SOPInstanceUID
    with pytest.raises(InputRefused, match=f"RescaleSlope or RescaleIntercept of instance {uid} is no number"):
        read_volumes(tmp_path)


def test_slices_without_rescale_are_taken_as_stored(tmp_path: Path) -> None:
    for path in write_series(tmp_path, RANDOM):
        dataset = dcmread(path)
        del dataset.RescaleSlope, dataset.RescaleIntercept
        dataset.save_as(path)
    (volume,) = read_volumes(tmp_path)
    assert np.array_equal(volume.array, RANDOM)


def test_descending_files_make_an_ascending_volume(tmp_path: Path) -> None:
    write_series(tmp_path, RANDOM, descending=True)
    (volume,) = read_volumes(tmp_path)
    assert np.array_equal(volume.array, RANDOM[::-1])
    assert volume.grid.affine_lps[2, 3] == 30 - 5 * 2


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_bits_above_those_stored_are_no_part_of_the_value(tmp_path: Path, signed: bool) -> None:
    """12 bits in 16, with an overlay plane in bit 15, as old scanners write it (PS3.5 8.1.1)."""
    values = RANDOM % 4096 - (2048 if signed else 0)
    write_series(
        tmp_path, (values & 0x0FFF) | np.int16(-0x8000), BitsStored=12, HighBit=11, PixelRepresentation=int(signed)
    )
    (volume,) = read_volumes(tmp_path)
    assert np.array_equal(volume.array, values)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless], ids=lambda uid: uid.name)
def test_compressed_here_reads_the_same(tmp_path: Path, syntax: str) -> None:
    for path in write_series(tmp_path, RANDOM):
        dataset = dcmread(path)
        dataset.compress(syntax, generate_instance_uid=False)
        dataset.save_as(path)
    (volume,) = read_volumes(tmp_path)
    assert np.array_equal(volume.array, RANDOM)


def test_files_without_file_meta_information_are_implicit_vr(tmp_path: Path) -> None:
    for path in write_series(tmp_path, RANDOM):
        dataset = dcmread(path)
        del dataset.file_meta
        dataset.preamble = None
        dataset.save_as(path, implicit_vr=True, little_endian=True)
    assert all(path.read_bytes()[128:132] != b"DICM" for path in tmp_path.iterdir())
    (volume,) = read_volumes(tmp_path)
    assert np.array_equal(volume.array, RANDOM)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def remove(path: Path) -> None:
    path.unlink()


def without_pixels(path: Path) -> None:
    dataset = dcmread(path)
    del dataset.PixelData
    dataset.save_as(path)


def unknown_syntax(path: Path) -> None:
    dataset = dcmread(path)
    dataset.compress(RLELossless, generate_instance_uid=False)
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.103"  # MPEG-4
    dataset.save_as(path)


def damaged(path: Path) -> None:
    dataset = dcmread(path)
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    dataset.save_as(path)
    content = bytearray(path.read_bytes())
    start = content.index(b"\xff\x4f\xff\x51")
    content[start : start + 60] = b"\x00" * 60
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, remove, without_pixels, unknown_syntax, damaged])
def test_slice_that_cannot_be_decoded_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    paths = write_series(tmp_path, RANDOM)
    uid = dcmread(paths[2]).SOPInstanceUID
    if damage not in (cut, remove):
        damage(paths[2])
    (plan,) = assemble_volumes({path: read_header(path) for path in paths}).volumes
    if damage in (cut, remove):  # after the headers were read
        damage(paths[2])
    with pytest.raises(InputRefused) as refusal:
        read_volume(plan)
    sentence = str(refusal.value)
    assert sentence.startswith(f"the pixel data of instance {uid} (")
    assert "cannot be decoded: " in sentence
    assert not any(text in sentence for text in (*PATIENT.values(), str(tmp_path)))
    if damage in (damaged, unknown_syntax):
        assert dcmread(paths[2]).file_meta.TransferSyntaxUID.name in sentence
