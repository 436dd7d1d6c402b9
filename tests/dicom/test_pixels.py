"""Voxels: GDCM by way of SimpleITK as the oracle, four encodings of one series, and slices that cannot be decoded."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread, encaps
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLSLossless,
    RLELossless,
)

from node.dicom.assembly import assemble_volumes
from node.dicom.header import read_header, scan_folder
from node.dicom.pixels import check_memory, read_volume
from node.dicom.volume import Volume
from node.errors import InputRefused
from tests.dicom.multiframe import write_multiframe
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
        if plan.header.get("PixelPaddingValue") == -2000:  # GE; padding is air here, which GDCM knows nothing of
            assert (expected == -3024).any()
            expected[expected == -3024] = -1024
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


@pytest.mark.parametrize("lost", [("RescaleSlope", "RescaleIntercept"), ("RescaleIntercept",)], ids=len)
@pytest.mark.parametrize("empty", [False, True])
def test_a_slice_without_a_rescale_among_others_is_refused_by_name(
    tmp_path: Path, lost: tuple[str, ...], empty: bool
) -> None:
    paths = write_series(tmp_path, RANDOM, RescaleIntercept="-1024")
    dataset = dcmread(paths[2])
    for keyword in lost:
        if empty:
            setattr(dataset, keyword, None)
        else:
            delattr(dataset, keyword)
    dataset.save_as(paths[2])
    sentence = f"instance {dataset.SOPInstanceUID} has no {' and '.join(lost)}, which other slices"
    with pytest.raises(InputRefused, match=sentence):
        read_volumes(tmp_path)


def test_a_frame_without_a_rescale_among_others_is_refused_by_number(tmp_path: Path) -> None:
    frames: list[dict[str, Any]] = [
        {"ImagePositionPatient": ["0", "0", str(height)], "RescaleSlope": "1", "RescaleIntercept": "-1024"}
        for height in range(3)
    ]
    del frames[1]["RescaleSlope"], frames[1]["RescaleIntercept"]
    path = write_multiframe(tmp_path / "object.dcm", RANDOM[:3], frames)
    with pytest.raises(InputRefused, match=f"frame 2 of instance {dcmread(path).SOPInstanceUID} has no RescaleSlope"):
        read_volumes(tmp_path)


def test_a_rescale_that_changes_nothing_may_be_left_out_where_it_is_optional(tmp_path: Path) -> None:
    paths = write_series(tmp_path, RANDOM, Modality="MR")
    dataset = dcmread(paths[2])
    del dataset.RescaleSlope, dataset.RescaleIntercept
    dataset.save_as(paths[2])
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


def test_files_without_file_meta_information_may_be_explicit_vr(tmp_path: Path) -> None:
    for path in write_series(tmp_path, RANDOM):
        dataset = dcmread(path)
        del dataset.file_meta
        dataset.preamble = None
        dataset.save_as(path, implicit_vr=False, little_endian=True)
    (volume,) = read_volumes(tmp_path)
    assert np.array_equal(volume.array, RANDOM)


def test_explicit_vr_that_is_called_implicit_is_read_from_its_first_pixel(tmp_path: Path) -> None:
    for path in write_series(tmp_path, RANDOM):
        content = path.read_bytes()
        path.write_bytes(content.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0", 1))
        assert dcmread(path).file_meta.TransferSyntaxUID == ImplicitVRLittleEndian
    (volume,) = read_volumes(tmp_path)
    assert np.array_equal(volume.array, RANDOM)


def test_a_high_bit_that_is_not_the_last_stored_one_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path, (RANDOM & 0x0FFF) << 4, BitsStored=12, HighBit=15, PixelRepresentation=0)
    with pytest.raises(InputRefused, match="HighBit"):
        read_volumes(tmp_path)


def test_an_icon_before_the_pixels_is_not_read_in_their_place(tmp_path: Path) -> None:
    for path in write_series(tmp_path, RANDOM):
        dataset = dcmread(path)
        icon = Dataset()
        icon.Rows, icon.Columns, icon.BitsAllocated, icon.PixelRepresentation = 2, 2, 8, 0
        icon.PixelData = b"icon"
        icon["PixelData"].VR = "OB"
        dataset.IconImageSequence = [icon]
        if path.stem < "002":
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        dataset.save_as(path)
    (volume,) = read_volumes(tmp_path)
    assert np.array_equal(volume.array, RANDOM)


# -- Multi-frame ---------------------------------------------------------------------------------------------------

ENHANCED = ["mr_philips", "mr_siemens_xa30/In/5_anat-T1w_acq-tfl", "eCT_Supplemental.dcm"]


@pytest.mark.parametrize("name", ENHANCED)
def test_frames_are_rescaled_each_by_itself(shared_data: Path, name: str) -> None:
    (volume,) = read_volumes(shared_data / "enhanced" / name)
    (path,) = scan_folder(shared_data / "enhanced" / name).files
    dataset = dcmread(path)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    for values, ref in zip(volume.array, volume.slices, strict=True):
        assert ref.frame is not None
        own = dataset.PerFrameFunctionalGroupsSequence[ref.frame - 1]
        (rescale,) = (own if "PixelValueTransformationSequence" in own else shared).PixelValueTransformationSequence
        expected = dataset.pixel_array[ref.frame - 1] * float(rescale.RescaleSlope) + float(rescale.RescaleIntercept)
        np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-4)


@pytest.mark.parametrize(
    "syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless, DeflatedExplicitVRLittleEndian], ids=lambda uid: uid.name
)
def test_frames_of_a_compressed_object_are_the_same(shared_data: Path, tmp_path: Path, syntax: UID) -> None:
    folder = shared_data / "enhanced" / ENHANCED[1]
    (plain,) = read_volumes(folder)
    (path,) = scan_folder(folder).files
    dataset = dcmread(path)
    if syntax.is_encapsulated:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(tmp_path / "compressed.dcm")
    (compressed,) = read_volumes(tmp_path)
    assert np.array_equal(plain.array, compressed.array)


def test_a_truncated_object_is_refused_by_its_name(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "enhanced" / ENHANCED[1]
    (path,) = scan_folder(folder).files
    (tmp_path / "cut.dcm").write_bytes(path.read_bytes()[:-5000])
    uid = re.escape(dcmread(path).SOPInstanceUID)
    with pytest.raises(InputRefused, match=rf"instance {uid} \(Explicit VR Little Endian\).*the file is truncated"):
        read_volumes(tmp_path)


@pytest.mark.parametrize("values", [{"RescaleSlope": "1e37"}, {"RescaleSlope": "-1e300"}, {"RescaleIntercept": "1e40"}])
def test_values_beyond_all_numbers_are_refused(tmp_path: Path, values: dict[str, str]) -> None:
    """A model would make anything of infinity, and a picture and a report nothing."""
    write_series(tmp_path, np.full((4, 8, 9), 100, np.int16), **values)
    with pytest.raises(InputRefused, match=r"the values of instance [\d.]+ are beyond all numbers: its RescaleSlope"):
        read_volumes(tmp_path)


def test_a_frame_s_rescale_that_is_no_number_is_refused(shared_data: Path, tmp_path: Path) -> None:
    (path,) = scan_folder(shared_data / "enhanced" / ENHANCED[2]).files
    content = path.read_bytes()
    element = b"\x28\x00\x53\x10DS\x08\x00%b"
    assert element % b"1.00000 " in content
    (tmp_path / "bad.dcm").write_bytes(content.replace(element % b"1.00000 ", element % b"x.00000 "))
    with pytest.raises(InputRefused, match=r"RescaleSlope or RescaleIntercept of instance .* is no number"):
        read_volumes(tmp_path)


# -- Values --------------------------------------------------------------------------------------------------------


def encapsulated(frames: list[bytes], how: str) -> tuple[bytes, bytes, bytes]:
    """The pixel data of these frames, and the extended offset table where there is one."""
    match how:
        case "basic offsets":
            return encapsulate(frames), b"", b""
        case "extended offsets":
            return encapsulate_extended(frames)
        case "several fragments":
            return encapsulate(frames, fragments_per_frame=2, has_bot=False), b"", b""
    return encapsulate(frames, has_bot=False), b"", b""


@pytest.mark.parametrize("how", ["no offsets", "basic offsets", "extended offsets", "several fragments"])
def test_places_of_compressed_frames_are_looked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    array = np.random.default_rng(8).integers(-9, 900, (40, 16, 12)).astype(np.int16)
    frames = [{"ImagePositionPatient": ["0", "0", str(height)]} for height in range(len(array))]
    path = write_multiframe(tmp_path / "object.dcm", array, frames)
    dataset = dcmread(path)
    dataset.compress(JPEGLSLossless, generate_instance_uid=False)
    encoded = list(generate_frames(dataset.PixelData, number_of_frames=len(array)))
    dataset.PixelData, offsets, lengths = encapsulated(encoded, how)
    if offsets:
        dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = offsets, lengths
    dataset.save_as(path)
    looked: list[int] = []
    for name in ("parse_fragments", "generate_fragments"):
        original = getattr(encaps, name)
        monkeypatch.setattr(encaps, name, lambda *args, call=original, **kw: (looked.append(1), call(*args, **kw))[1])
    (volume,) = read_volumes(tmp_path)
    assert np.array_equal(volume.array, array)
    assert len(looked) <= 2


def test_what_takes_more_memory_than_there_is_for_it_is_refused_before_it_is_read(tmp_path: Path) -> None:
    paths = write_series(tmp_path, RANDOM)
    (plan,) = assemble_volumes({path: read_header(path) for path in paths}).volumes
    need = RANDOM.size * 4
    check_memory(plan, need)
    with pytest.raises(InputRefused, match=r"its 6 slices of 64 x 48 pixels take 0\.0 GB"):
        check_memory(plan, need - 1)


def test_big_endian_and_deflated_files_read_the_same(tmp_path: Path) -> None:
    for index, path in enumerate(write_series(tmp_path, RANDOM)):
        syntax = "+tb" if index % 2 else "+td"
        subprocess.run(["dcmconv", syntax, str(path), str(path)], check=True)
    syntaxes = {dcmread(path).file_meta.TransferSyntaxUID for path in tmp_path.iterdir()}
    assert syntaxes == {ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian}
    (volume,) = read_volumes(tmp_path)
    assert np.array_equal(volume.array, RANDOM)


def test_the_values_of_a_volume_are_not_turned_over(tmp_path: Path) -> None:
    """PS3.3 C.7.6.3.1.2: MONOCHROME1 says how values are shown, and Hounsfield units are what they are."""
    write_series(tmp_path, RANDOM, PhotometricInterpretation="MONOCHROME1")
    (volume,) = read_volumes(tmp_path)
    assert np.array_equal(volume.array, RANDOM)


PADDING: list[tuple[dict[str, Any], list[int]]] = [
    ({"PixelPaddingValue": -2000}, [-2000]),
    ({"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1998}, [-2000, -1999, -1998]),
    ({"PixelPaddingValue": -1998, "PixelPaddingRangeLimit": -2000}, [-2000, -1999, -1998]),
]


@pytest.mark.parametrize(("header", "padding"), PADDING, ids=["value", "range", "range the other way"])
@pytest.mark.parametrize(("modality", "expected"), [("CT", -1024), ("MR", -1000), ("PT", -1000)])
def test_padding_is_air_or_nothing(
    tmp_path: Path, header: dict[str, Any], padding: list[int], modality: str, expected: int
) -> None:
    values = np.maximum(RANDOM, -1000)
    array = values.copy()
    array[1, :10], array[1, 10:20], array[4, 7, 7] = padding[0], padding[-1], padding[len(padding) // 2]
    write_series(tmp_path, array, Modality=modality, **header)
    (volume,) = read_volumes(tmp_path)
    padded = array < -1000
    assert (volume.array[padded] == expected).all()
    assert np.array_equal(volume.array[~padded], values[~padded])


def test_padding_above_the_bits_stored_is_found(tmp_path: Path) -> None:
    """-2000 in 16 bits beside values of 12, as GE and Philips scanners have sent it: 2096 by its lower bits."""
    array = (RANDOM % 4096).astype(np.int16)
    array[2, :5] = -2000
    array[3, 0, 0] = 2096
    write_series(
        tmp_path, array, BitsStored=12, HighBit=11, PixelRepresentation=0, RescaleIntercept="-1024",
        PixelPaddingValue=63536,
    )  # fmt: skip
    (volume,) = read_volumes(tmp_path)
    assert (volume.array[2, :5] == -1024).all()
    assert volume.array[3, 0, 0] == 2096 - 1024


def test_a_zero_background_that_is_called_padding_stays_zero(tmp_path: Path) -> None:
    """Normalisations leave out what is zero; it must not become the smallest of the other values."""
    array = np.abs(RANDOM) + 5
    array[:, :8] = 0
    write_series(tmp_path, array.astype(np.int16), Modality="MR", PixelPaddingValue=0)
    (volume,) = read_volumes(tmp_path)
    assert np.array_equal(volume.array, array)


def test_a_slice_of_nothing_but_padding(tmp_path: Path) -> None:
    array = RANDOM.copy()
    array[3] = -2000
    write_series(tmp_path, array, PixelPaddingValue=-2000)
    (volume,) = read_volumes(tmp_path)
    assert (volume.array[3] == -1024).all()


def test_a_modality_lut_goes_before_a_rescale(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [4096, 0, 16], "US"
    table.LUTData = (np.arange(4096, dtype=np.uint16) * 3).tobytes()
    array = np.abs(RANDOM)
    write_series(tmp_path, array, ModalityLUTSequence=[table], PixelRepresentation=0, RescaleSlope="99")
    (volume,) = read_volumes(tmp_path)
    assert np.array_equal(volume.array, array.astype(float) * 3)


def test_a_real_world_value_mapping_counts_without_a_rescale(tmp_path: Path) -> None:
    mapping, unit = Dataset(), Dataset()
    unit.CodeValue, unit.CodingSchemeDesignator, unit.CodeMeaning = "Bq/ml", "UCUM", "Becquerels/milliliter"
    mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = 2.5, -3.0
    mapping.MeasurementUnitsCodeSequence = [unit]
    for path in write_series(tmp_path, RANDOM, Modality="PT", RealWorldValueMappingSequence=[mapping]):
        dataset = dcmread(path)
        del dataset.RescaleSlope, dataset.RescaleIntercept
        dataset.save_as(path)
    (volume,) = read_volumes(tmp_path)
    assert volume.unit == "Bq/ml"
    np.testing.assert_allclose(volume.array, RANDOM * 2.5 - 3)


def test_attributes_name_no_patient(tmp_path: Path) -> None:
    write_series(tmp_path, RANDOM, PatientAge="042Y", PatientSex="F", ConvolutionKernel="B40f")
    (volume,) = read_volumes(tmp_path)
    assert volume.attributes == {"PatientAge": "042Y", "PatientSex": "F", "ConvolutionKernel": "B40f"}


# -- Refusals ------------------------------------------------------------------------------------------------------


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
    dataset.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.103")  # MPEG-4
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


def test_no_decoder_is_said_with_the_syntax_s_name(tmp_path: Path) -> None:
    """JPEG of 12 bits, as DCMTK makes it: gdcm cannot, and what can is under the GPL."""
    plain = write_series(tmp_path / "plain", np.abs(RANDOM), BitsStored=12, HighBit=11, PixelRepresentation=0)
    (tmp_path / "jpeg").mkdir()
    for path in plain:
        subprocess.run(["dcmcjpeg", "+ee", "+un", str(path), str(tmp_path / "jpeg" / path.name)], check=True)
    syntax = dcmread(tmp_path / "jpeg" / plain[0].name).file_meta.TransferSyntaxUID
    assert syntax == JPEGExtended12Bit
    with pytest.raises(InputRefused, match=rf"{re.escape(syntax.name)}.*no decoder here reads this transfer syntax"):
        read_volumes(tmp_path / "jpeg")


@pytest.mark.parametrize(
    ("known", "syntax"),
    [
        ("1.2.840.10008.1.2.4.55", "1.2.840.10008.1.2.4.55"),  # progressive JPEG
        ("1.2.840.10008.1.2.4.103", "1.2.840.10008.1.2.4.110"),  # JPEG XL
        ("1.2.840.10008.1.2.4.55", "1.2.840.10008.1.2.8.1"),  # deflated frames
    ],
)
def test_syntaxes_that_nothing_decodes_are_refused(tmp_path: Path, known: str, syntax: str) -> None:
    for path in write_series(tmp_path, RANDOM):
        dataset = dcmread(path)
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.file_meta.TransferSyntaxUID = UID(known)  # pydicom writes no syntax that it does not know
        dataset.save_as(path)
        path.write_bytes(path.read_bytes().replace(known.encode(), syntax.encode().ljust(len(known), b"\0")))
    with pytest.raises(InputRefused, match=rf"{re.escape(UID(syntax).name)}.*no decoder here reads this"):
        read_volumes(tmp_path)
