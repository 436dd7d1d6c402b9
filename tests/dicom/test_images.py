"""Planar images: grey and colour, as they are shown, from real data and from encodings made here."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image as Picture
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.processing import convert_color_space
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from node.dicom.assembly import ImagePlan
from node.dicom.header import read_header
from node.dicom.pixels import image_spacing_mm, read_input
from node.dicom.volume import Image, SliceRef
from node.errors import InputRefused

RNG = np.random.default_rng(6)
COLOURS = RNG.integers(0, 256, (2, 64, 48, 3)).astype(np.uint8)


def write_image(path: Path, pixels: bytes, frames: int = 1, **values: Any) -> Path:
    dataset = Dataset()
    header: dict[str, Any] = {
        "SOPClassUID": SecondaryCaptureImageStorage,
        "SOPInstanceUID": generate_uid(),
        "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "Modality": "OT",
        "Rows": 64,
        "Columns": 48,
        "NumberOfFrames": frames,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 8,
        "PixelRepresentation": 0,
        **values,
    }
    header.setdefault("BitsStored", header["BitsAllocated"])
    for keyword, value in (header | {"HighBit": header["BitsStored"] - 1}).items():
        setattr(dataset, keyword, value)
    dataset.PixelData = pixels
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(path, enforce_file_format=True)
    return path


def read(path: Path, colour: bool | None = None) -> Image:
    header = read_header(path)
    photometric, frames = str(header.PhotometricInterpretation), int(header.get("NumberOfFrames") or 1)
    plan = ImagePlan(
        frames=tuple(SliceRef(header.SOPClassUID, header.SOPInstanceUID, number + 1) for number in range(frames)),
        paths=(path,) * frames,
        headers=(header,),
        header=header,
        shape=(frames, header.Rows, header.Columns),
        colour=not photometric.startswith("MONOCHROME") if colour is None else colour,
        series_uid=str(header.get("SeriesInstanceUID", "")),
        study_uid=str(header.get("StudyInstanceUID", "")),
        modality=str(header.get("Modality", "")),
    )
    image = read_input(plan)
    assert isinstance(image, Image)
    assert image.array.shape[:3] == plan.shape
    return image


@pytest.mark.parametrize(("syntax", "planar"), [("plain", 0), ("plain", 1), (RLELossless, 0), (JPEG2000Lossless, 0)])
def test_rgb_of_either_planar_configuration(tmp_path: Path, syntax: str, planar: int) -> None:
    pixels = COLOURS if planar == 0 else COLOURS.transpose(0, 3, 1, 2)
    path = write_image(
        tmp_path / "image.dcm", pixels.tobytes(), 2, SamplesPerPixel=3, PhotometricInterpretation="RGB",
        PlanarConfiguration=planar,
    )  # fmt: skip
    if syntax != "plain":
        dataset = dcmread(path)
        dataset.compress(syntax, generate_instance_uid=False)
        dataset.save_as(path)
    image = read(path)
    assert image.array.dtype == np.uint8
    assert np.array_equal(image.array, COLOURS)


def test_ybr_becomes_rgb(tmp_path: Path) -> None:
    ybr = convert_color_space(COLOURS, "RGB", "YBR_FULL")
    path = write_image(
        tmp_path / "image.dcm", ybr.tobytes(), 2, SamplesPerPixel=3, PhotometricInterpretation="YBR_FULL",
        PlanarConfiguration=0,
    )  # fmt: skip
    assert np.abs(read(path).array.astype(int) - COLOURS).max() <= 2


def test_sixteen_bits_become_the_upper_eight(tmp_path: Path) -> None:
    wide = COLOURS.astype(np.uint16) * 257
    path = write_image(
        tmp_path / "image.dcm", wide.tobytes(), 2, SamplesPerPixel=3, PhotometricInterpretation="RGB",
        PlanarConfiguration=0, BitsAllocated=16,
    )  # fmt: skip
    assert np.array_equal(read(path).array, COLOURS)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_becomes_rgb(tmp_path: Path, bits: int) -> None:
    palette = RNG.integers(0, 256, (3, 256)).astype(np.uint16)
    palette[:, 0] = 255
    stored = RNG.integers(0, 256, (64, 48)).astype(np.uint8)
    values: dict[str, Any] = {}
    for colour, entries in zip(("Red", "Green", "Blue"), palette, strict=True):
        values[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        table = entries.astype(np.uint8) if bits == 8 else entries * 257
        values[f"{colour}PaletteColorLookupTableData"] = table.tobytes()
    path = write_image(tmp_path / "image.dcm", stored.tobytes(), PhotometricInterpretation="PALETTE COLOR", **values)
    assert np.array_equal(read(path).array[0], palette[:, stored].transpose(1, 2, 0))


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_monochrome1_is_turned_over(tmp_path: Path, signed: bool) -> None:
    """12 bits: the darkest value becomes what the brightest was, with the rescale still on top."""
    low, high = (-2048, 2047) if signed else (0, 4095)
    stored = RNG.integers(low, high + 1, (64, 48)).astype(np.int16)
    stored[0, :2] = low, high
    path = write_image(
        tmp_path / "image.dcm", stored.tobytes(), PhotometricInterpretation="MONOCHROME1", BitsAllocated=16,
        BitsStored=12, PixelRepresentation=int(signed), RescaleSlope="2", RescaleIntercept="5",
    )  # fmt: skip
    np.testing.assert_array_equal(read(path).array[0], (low + high - stored.astype(float)) * 2 + 5)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_the_window_shows_the_same_whichever_way_round(tmp_path: Path, photometric: str) -> None:
    stored = RNG.integers(0, 4096, (64, 48)).astype(np.uint16)
    path = write_image(
        tmp_path / "image.dcm", stored.tobytes(), PhotometricInterpretation=photometric, BitsAllocated=16,
        BitsStored=12, RescaleSlope="2", RescaleIntercept="5", WindowCenter=["1005", "7"], WindowWidth=["400", "8"],
    )  # fmt: skip
    image = read(path)
    centre, width = (float(image.attributes[keyword]) for keyword in ("WindowCenter", "WindowWidth"))
    assert width == 400
    brighter = np.argsort(np.abs(stored.astype(float) * 2 + 5 - 1005), axis=None)[:1]  # the pixel nearest the centre
    assert abs(image.array[0].flat[brighter[0]] - centre) <= 2


def test_padding_is_dark_whichever_way_round(tmp_path: Path) -> None:
    stored = RNG.integers(100, 4000, (64, 48)).astype(np.uint16)
    stored[:3] = 4095
    values: dict[str, Any] = {"BitsAllocated": 16, "BitsStored": 12, "PixelPaddingValue": 4095}
    plain = read(write_image(tmp_path / "1.dcm", stored.tobytes(), **values))
    turned = read(write_image(tmp_path / "2.dcm", stored.tobytes(), PhotometricInterpretation="MONOCHROME1", **values))
    for image, rest in ((plain, stored[3:].astype(float)), (turned, 4095 - stored[3:].astype(float))):
        assert (image.array[0, :3] == 0).all()
        assert np.array_equal(image.array[0, 3:], rest)


def gdcm(path: Path) -> NDArray[Any]:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_a_real_mammogram_and_a_radiograph_are_gdcm_s(shared_data: Path) -> None:
    path = shared_data / "planar" / "mg_mammo.dcm"
    image, expected = read(path), gdcm(path)
    header = read_header(path)
    assert (header.PixelPaddingValue, header.PixelPaddingRangeLimit) == (0, 30)
    expected[expected <= 30] = 0
    assert np.array_equal(image.array, expected)
    path = shared_data / "compressed" / "RG3_J2KR.dcm"
    image = read(path)
    assert np.array_equal(image.array[0], 1023.0 - dcmread(path).pixel_array)
    assert np.array_equal(image.array, gdcm(path)), "ITK turns MONOCHROME1 over, too"


def test_a_real_photograph_is_pillow_s(shared_data: Path) -> None:
    path = shared_data / "planar" / "xc_photo.dcm"
    encoded = dcmread(path).PixelData
    jpeg = encoded[encoded.index(b"\xff\xd8\xff") :]
    picture = np.asarray(Picture.open(BytesIO(jpeg)).convert("RGB"))
    assert np.abs(read(path).array[0].astype(int) - picture).mean() < 1


def test_a_real_ultrasound_clip_has_all_its_frames(shared_data: Path) -> None:
    path = shared_data / "planar" / "us_colour_multiframe.dcm"
    image = read(path)
    assert image.array.shape == (30, 240, 320, 3)
    expected = gdcm(path)
    assert np.abs(image.array.astype(int) - expected).mean() < 2
    assert [ref.frame for ref in image.frames] == list(range(1, 31))
    assert any(not np.array_equal(image.array[0], frame) for frame in image.array[1:])


def test_lossy_htj2k_looks_as_the_lossless_one(shared_data: Path) -> None:
    lossless = read(shared_data / "compressed" / "HTJ2KLossless_08_RGB.dcm").array.astype(int)
    lossy = read(shared_data / "compressed" / "HTJ2K_08_RGB.dcm").array.astype(int)
    assert lossless.std() > 20
    assert 0 < np.abs(lossless - lossy).mean() < 3


def test_a_grey_image_that_was_to_have_colours_is_refused(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.dcm", bytes(64 * 48))
    with pytest.raises(InputRefused, match="pixel data of instance"):
        read(path, colour=True)


def header_of(**values: Any) -> Dataset:
    header = Dataset()
    for keyword, value in values.items():
        setattr(header, keyword, value)
    return header


def region(delta_x_cm: float, delta_y_cm: float, spatial: int = 1, units: int = 3) -> Dataset:
    return header_of(
        RegionSpatialFormat=spatial, PhysicalDeltaX=delta_x_cm, PhysicalDeltaY=delta_y_cm,
        PhysicalUnitsXDirection=units, PhysicalUnitsYDirection=units,
    )  # fmt: skip


SPACINGS: dict[str, tuple[Dataset, tuple[float, float] | None]] = {
    "calibrated": (header_of(PixelSpacing=["0.2", "0.3"], ImagerPixelSpacing=["9", "9"]), (0.2, 0.3)),
    "on the detector": (header_of(ImagerPixelSpacing=["0.1", "0.1"]), (0.1, 0.1)),
    "magnified": (
        header_of(ImagerPixelSpacing=["0.1", "0.1"], EstimatedRadiographicMagnificationFactor="1.25"),
        (0.08, 0.08),
    ),
    "ultrasound": (header_of(SequenceOfUltrasoundRegions=[region(0.05, -0.04), region(1, 1, spatial=3)]), (0.4, 0.5)),
    "two scales": (header_of(SequenceOfUltrasoundRegions=[region(0.05, 0.04), region(0.02, 0.02)]), None),
    "not in cm": (header_of(SequenceOfUltrasoundRegions=[region(0.05, 0.04, units=4)]), None),
    "zero": (header_of(PixelSpacing=["0", "0"]), None),
    "unknown": (header_of(), None),
}


@pytest.mark.parametrize("case", SPACINGS)
def test_spacing_of_an_image(case: str) -> None:
    header, expected = SPACINGS[case]
    found = image_spacing_mm(header)
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_clip_that_no_machine_has_memory_for_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = write_image(
        tmp_path / "clip.dcm", b"", 100_000, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0,
        Rows=8192, Columns=8192,
    )  # fmt: skip
    with pytest.raises(InputRefused, match=r"its 100000 colour frames of 8192 x 8192 pixels take 20132\.7 GB"):
        read(path)
