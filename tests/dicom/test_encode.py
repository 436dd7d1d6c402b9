"""Our objects in compressed transfer syntaxes: what DCMTK, GDCM and pydicom decode is what went in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)

from node.dicom.encode import candidates, compress
from node.report.kinds import SegForm
from tests.report.cases import run
from tests.report.geometries import small_subject, write_seg

GREY = (RLELossless, JPEGLSLossless, JPEG2000Lossless, DeflatedExplicitVRLittleEndian)
COLOUR = (JPEGLSLossless, JPEG2000Lossless, RLELossless, DeflatedExplicitVRLittleEndian)


def write_seg_of(form: SegForm, **changes: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_seg(small_subject(folder / "images", (7, 40, 48), **changes), folder / "seg.dcm", form)
        return folder / "seg.dcm"

    return write


def write_many(folder: Path) -> Path:
    """A label map of 16 bits."""
    segments = {label: {"name": f"Part {label}", "type": ["SCT", "39607008", "Lung"]} for label in range(1, 301)}
    return write_seg_of(SegForm.LABELMAP, segments=segments)(folder)


def write_page(folder: Path, **values: object) -> Path:
    """A secondary capture in colour, as a summary page is one."""
    page = Dataset()
    page.file_meta = FileMetaDataset()
    page.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    page.SOPClassUID, page.SOPInstanceUID = SecondaryCaptureImageStorage, "2.25.1"
    page.StudyInstanceUID, page.SeriesInstanceUID = "2.25.2", "2.25.3"
    page.PatientID, page.Modality = "ID-4711", "OT"
    page.SamplesPerPixel, page.PhotometricInterpretation, page.PlanarConfiguration = 3, "RGB", 0
    page.Rows, page.Columns = 60, 80
    page.BitsAllocated, page.BitsStored, page.HighBit, page.PixelRepresentation = 8, 8, 7, 0
    picture = np.random.default_rng(3).integers(0, 255, (6, 8, 3), np.uint8)
    page.PixelData = np.kron(picture, np.ones((10, 10, 1), np.uint8)).tobytes()
    for keyword, value in values.items():
        setattr(page, keyword, value)
    page.save_as(folder / "page.dcm", enforce_file_format=True)
    return folder / "page.dcm"


OBJECTS: dict[str, tuple[Callable[[Path], Path], tuple[UID, ...]]] = {
    "binary": (write_seg_of(SegForm.BINARY), (DeflatedExplicitVRLittleEndian,)),
    "labelmap": (write_seg_of(SegForm.LABELMAP), GREY),
    "labelmap_16": (write_many, GREY),
    "fractional": (write_seg_of(SegForm.FRACTIONAL), GREY),
    "page": (write_page, COLOUR),
}
CASES = [(name, syntax) for name, (_, syntaxes) in OBJECTS.items() for syntax in syntaxes]
# What decodes a syntax beside pydicom; DCMTK 3.6.7 has no JPEG 2000.
DECODERS = {
    RLELossless: ("dcmdrle",),
    JPEGLSLossless: ("dcmdjpls",),
    JPEG2000Lossless: ("gdcmconv", "--raw"),
    DeflatedExplicitVRLittleEndian: ("dcmconv", "+te"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_each_object_has_its_syntaxes(tmp_path: Path, name: str) -> None:
    write, syntaxes = OBJECTS[name]
    assert candidates(write(tmp_path)) == syntaxes


@pytest.mark.parametrize(("name", "syntax"), CASES, ids=[f"{name}-{syntax.keyword}" for name, syntax in CASES])
def test_every_decoder_gives_back_the_pixels(tmp_path: Path, name: str, syntax: UID) -> None:
    source = OBJECTS[name][0](tmp_path)
    small, plain = tmp_path / "small.dcm", tmp_path / "plain.dcm"
    compress(source, small, syntax)
    before, after = dcmread(source), dcmread(small)
    assert after.file_meta.TransferSyntaxUID == syntax
    assert small.stat().st_size < source.stat().st_size
    assert before.keys() == after.keys()
    assert [element.keyword for element in before if element.VM and after[element.tag] != element] in (
        [],
        ["PixelData"],
    )
    assert before.file_meta.MediaStorageSOPInstanceUID == after.file_meta.MediaStorageSOPInstanceUID
    assert np.array_equal(after.pixel_array, before.pixel_array)
    run("dcmftest", small)
    if syntax == JPEG2000Lossless and name.startswith("labelmap"):  # GDCM 3.2 refuses that SOP class
        after.SOPClassUID = SegmentationStorage
        after.save_as(small, enforce_file_format=True)
    run(*DECODERS[syntax], small, plain)
    decoded = dcmread(plain)
    assert not decoded.file_meta.TransferSyntaxUID.is_compressed
    assert decoded.PixelData == before.PixelData


ODD = [(33, 35), (35, 32), (31, 7), (17, 5)]


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize(("rows", "columns"), ODD)
def test_colours_of_odd_sizes_come_back_however_they_lie(tmp_path: Path, rows: int, columns: int, planar: int) -> None:
    """GDCM's RLE encoder ends the process over some of these; pydicom reads JPEG 2000 by the Planar Configuration."""
    pixels = np.random.default_rng(5).integers(0, 255, (3, rows, columns, 3), np.uint8)
    stored = (pixels if planar == 0 else np.moveaxis(pixels, 3, 1)).tobytes()
    values = {"Rows": rows, "Columns": columns, "NumberOfFrames": 3, "PlanarConfiguration": planar}
    source = write_page(tmp_path, **values, PixelData=stored + b"\0" * (len(stored) % 2))
    assert (JPEG2000Lossless in candidates(source)) is (min(rows, columns) >= 32)
    check_pixels(source, pixels)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("rows", "columns"), ODD)
def test_grey_of_odd_sizes_comes_back(tmp_path: Path, rows: int, columns: int, bits: int) -> None:
    pixels = (
        np.random.default_rng(6).integers(0, 1 << bits // 2, (3, rows, columns), np.uint16).astype(f"<u{bits // 8}")
    )
    stored = pixels.tobytes()
    grey = {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "NumberOfFrames": 3}
    depth = {"BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1, "PlanarConfiguration": None}
    source = write_page(
        tmp_path, **grey, **depth, Rows=rows, Columns=columns, PixelData=stored + b"\0" * (len(stored) % 2)
    )
    check_pixels(source, pixels)


def check_pixels(source: Path, pixels: np.ndarray) -> None:
    """What pydicom and another program decode of each compressed form is `pixels`."""
    small, plain = source.with_name("small.dcm"), source.with_name("plain.dcm")
    for syntax in candidates(source):
        compress(source, small, syntax)
        assert np.array_equal(dcmread(small).pixel_array, pixels), syntax.name
        run(*DECODERS[syntax], small, plain)
        assert np.array_equal(dcmread(plain).pixel_array, pixels), syntax.name


@pytest.mark.parametrize("name", OBJECTS)
def test_the_same_object_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    write, syntaxes = OBJECTS[name]
    source = write(tmp_path)
    for syntax in syntaxes:
        for number in range(2):
            compress(source, tmp_path / f"{number}.dcm", syntax)
        assert (tmp_path / "0.dcm").read_bytes() == (tmp_path / "1.dcm").read_bytes()


def test_an_object_without_pixels_is_deflated(tmp_path: Path) -> None:
    source = write_page(tmp_path)
    page = dcmread(source)
    for keyword in ("PixelData", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        delattr(page, keyword)
    page.TextValue = "as of a report, " * 100 + "its end"
    page.save_as(source)
    assert candidates(source) == (DeflatedExplicitVRLittleEndian,)
    compress(source, tmp_path / "small.dcm", DeflatedExplicitVRLittleEndian)
    assert dcmread(tmp_path / "small.dcm") == dcmread(source)
    assert (tmp_path / "small.dcm").stat().st_size % 2 == 0
    run("dcmconv", "+te", tmp_path / "small.dcm", tmp_path / "plain.dcm")
    assert dcmread(tmp_path / "plain.dcm").TextValue == page.TextValue


@pytest.mark.parametrize(
    "values",
    [{"PixelRepresentation": 1}, {"BitsStored": 7}, {"PhotometricInterpretation": "YBR_FULL_422"}],
    ids=["signed", "unused bits", "subsampled colour"],
)
def test_pixels_that_encoders_may_not_keep_are_deflated(tmp_path: Path, values: dict[str, object]) -> None:
    source = write_page(tmp_path, **values)
    assert candidates(source) == (DeflatedExplicitVRLittleEndian,)
    with pytest.raises(ValueError, match=r"page\.dcm cannot be compressed as JPEG-LS"):
        compress(source, tmp_path / "small.dcm", JPEGLSLossless)
    assert not (tmp_path / "small.dcm").exists()


def test_frames_too_small_for_jpeg_2000_are_not_offered_in_it(tmp_path: Path) -> None:
    for size, offered in ((31, False), (32, True)):
        source = write_page(tmp_path, Rows=size, Columns=80, PixelData=bytes(80 * size * 3))
        assert (JPEG2000Lossless in candidates(source)) is offered
    compress(source, tmp_path / "small.dcm", JPEG2000Lossless)
    assert not dcmread(tmp_path / "small.dcm").pixel_array.any()


def test_single_bits_are_not_run_through_an_encoder_of_bytes(tmp_path: Path) -> None:
    source = write_seg_of(SegForm.BINARY)(tmp_path)
    with pytest.raises(ValueError, match="cannot be compressed as RLE Lossless"):
        compress(source, tmp_path / "small.dcm", RLELossless)


def test_what_is_compressed_or_implicit_stays_as_it_is(tmp_path: Path) -> None:
    source = write_page(tmp_path)
    compress(source, tmp_path / "small.dcm", RLELossless)
    assert candidates(tmp_path / "small.dcm") == ()
    page = dcmread(source)
    page.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    page.save_as(tmp_path / "implicit.dcm", implicit_vr=True, little_endian=True)
    assert candidates(tmp_path / "implicit.dcm") == ()
