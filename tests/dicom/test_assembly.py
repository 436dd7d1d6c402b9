"""Volumes from instances: GDCM's geometry as the oracle on real series, and a sentence for what is no volume."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import RTDoseStorage
from scipy.spatial.transform import Rotation

from node.dicom.assembly import Assembly, VolumePlan, assemble_volumes
from node.dicom.header import read_header, scan_folder
from tests.dicom.slices import PATIENT, write_series

# Folder and how many regular volumes it holds.
REGULAR = {
    "chest_ct_philips": 1,
    "chest_ct_siemens": 2,
    "abdomen_ct_ge": 1,
    "lung_tumour_ct_rtstruct/image": 1,
    "brain_mr_t1": 1,
    "sarcoma_ct_mr_pet": 3,
    "compressed/mr_rle": 1,
    "compressed/mr_jpeg": 1,
    "compressed/mr_jpegls": 1,
    "compressed/mr_j2k": 1,
}


def headers_in(folder: Path) -> dict[Path, Dataset]:
    return {path: read_header(path) for path in scan_folder(folder).files}


def assemble(folder: Path) -> Assembly:
    return assemble_volumes(headers_in(folder))


def read_with_gdcm(plan: VolumePlan) -> sitk.Image:
    """The same series as SimpleITK's GDCM reader finds, sorts and stacks it."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(
        sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(plan.paths[0].parent), plan.series_uid, False, False)
    )
    return reader.Execute()


def affine_of(image: sitk.Image) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return affine


@pytest.mark.parametrize("folder", REGULAR)
def test_grid_of_a_real_series_is_that_of_gdcm(shared_data: Path, folder: str) -> None:
    headers = headers_in(shared_data / folder)
    shuffled = list(headers.items())
    random.Random(5).shuffle(shuffled)
    assembly = assemble_volumes(dict(shuffled))
    assert len(assembly.volumes) == REGULAR[folder]
    again = assemble_volumes(headers)
    for plan, same in zip(assembly.volumes, again.volumes, strict=True):
        assert (plan.paths, plan.slices, plan.series_uid, plan.name) == (
            same.paths, same.slices, same.series_uid, same.name,
        )  # fmt: skip
        assert np.array_equal(plan.grid.affine_lps, same.grid.affine_lps)
        image = read_with_gdcm(plan)
        assert plan.grid.shape == image.GetSize()[::-1]
        # In millimetres at every corner: what a rounding of a direction cosine does grows with the distance.
        corners = np.array(np.meshgrid(*[(0, size - 1) for size in image.GetSize()], [1])).reshape(4, -1)
        assert np.abs((plan.grid.affine_lps - affine_of(image)) @ corners).max() < 1e-4
        for index in (0, len(plan.paths) // 3, len(plan.paths) - 1):
            header = dcmread(plan.paths[index], stop_before_pixels=True)
            assert plan.slices[index].sop_instance_uid == header.SOPInstanceUID
            assert plan.slices[index].sop_class_uid == header.SOPClassUID
            at = plan.grid.affine_lps @ [0, 0, index, 1]
            assert np.allclose(at[:3], [float(value) for value in header.ImagePositionPatient], atol=0.05)
        assert plan.grid.frame_of_reference_uid == plan.header.get("FrameOfReferenceUID", "")
        assert plan.study_uid == plan.header.StudyInstanceUID


@given(
    turn=st.integers(0, 2**32 - 1),
    spacing_mm=st.tuples(*[st.floats(0.3, 7.0)] * 3),
    origin_mm=st.tuples(*[st.floats(-300.0, 300.0)] * 3),
    descending=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_any_rotation_spacing_and_direction(
    *,
    tmp_path_factory: pytest.TempPathFactory,
    turn: int,
    spacing_mm: tuple[float, float, float],
    origin_mm: tuple[float, float, float],
    descending: bool,
) -> None:
    turned = Rotation.random(rng=np.random.default_rng(turn)).as_matrix()
    paths = write_series(
        tmp_path_factory.mktemp("series"), np.zeros((5, 3, 4), np.int16),
        row=tuple(turned[:, 0]), column=tuple(turned[:, 1]),
        spacing_mm=spacing_mm, origin_mm=origin_mm, descending=descending,
    )  # fmt: skip
    random.Random(turn).shuffle(paths)
    (plan,) = assemble_volumes({path: read_header(path) for path in paths}).volumes
    assert [int(path.stem) for path in plan.paths] == ([4, 3, 2, 1, 0] if descending else [0, 1, 2, 3, 4])
    first = np.array(origin_mm) - (turned[:, 2] * spacing_mm[0] * 4 if descending else 0)
    expected = np.column_stack(
        [turned[:, 0] * spacing_mm[2], turned[:, 1] * spacing_mm[1], turned[:, 2] * spacing_mm[0], first]
    )
    assert np.allclose(plan.grid.affine_lps[:3], expected, atol=1e-4)
    assert np.allclose(plan.grid.spacing_mm, spacing_mm, rtol=1e-4)
    assert np.isclose(plan.grid.voxel_volume_mm3, np.prod(spacing_mm), rtol=1e-4)


# -- Refusals ----------------------------------------------------------------------------------------------------------


def test_mixed_orientations_are_told_apart_or_refused(shared_data: Path) -> None:
    """Two slices in each of two orientations: two small volumes, each regular, each with a name of its own."""
    headers = headers_in(shared_data / "irregular" / "sliceorientation")
    assembly = assemble_volumes(headers)
    reverse = assemble_volumes(dict(reversed(headers.items())))
    assert [(plan.name, plan.paths) for plan in reverse.volumes] == [
        (plan.name, plan.paths) for plan in assembly.volumes
    ]
    assert [(plan.name, plan.grid.shape[0]) for plan in assembly.volumes] == [("volume 1", 2), ("volume 2", 2)]
    for plan in assembly.volumes:
        for index, path in enumerate(plan.paths):
            header = dcmread(path, stop_before_pixels=True)
            orientation = np.array([float(value) for value in header.ImageOrientationPatient]).reshape(2, 3)
            assert np.allclose(plan.grid.affine_lps[:3, :2] / plan.grid.spacing_mm[2:0:-1], orientation.T, atol=1e-3)
            at = plan.grid.affine_lps @ [0, 0, index, 1]
            assert np.allclose(at[:3], [float(value) for value in header.ImagePositionPatient], atol=1e-3)


def drop_slice(paths: list[Path]) -> None:
    paths[4].unlink()


def set_everywhere(**values: Any) -> Callable[[list[Path]], None]:
    def change(paths: list[Path]) -> None:
        for path in paths:
            dataset = dcmread(path)
            for keyword, value in values.items():
                setattr(dataset, keyword, value)
            dataset.save_as(path)

    return change


def set_in_one(**values: Any) -> Callable[[list[Path]], None]:
    return lambda paths: set_everywhere(**values)(paths[3:4])


def clear(*keywords: str) -> Callable[[list[Path]], None]:
    def change(paths: list[Path]) -> None:
        for path in paths:
            dataset = dcmread(path)
            for keyword in keywords:
                delattr(dataset, keyword)
            dataset.save_as(path)

    return change


NO_DIRECTIONS = "ImageOrientationPatient is no pair of perpendicular directions"
NO_POSITION = "it has no position in the patient (ImagePositionPatient, ImageOrientationPatient)"
BROKEN = [
    ("a missing slice", drop_slice, "a slice is missing: 4.00 mm between slices 4 and 5 of 9, 2.00 mm elsewhere"),
    ("a slice beside the others", set_in_one(ImagePositionPatient=["-8", "-20", "36"]),
     "the slices do not stand in line: slice 4 of 10 is 2.0 mm beside the line from the first to the last"),
    ("pixel spacing that changes", set_in_one(PixelSpacing=["1", "1.1"]),
     "slices differ in PixelSpacing: [(1.0, 1.0), (1.0, 1.1)]"),
    ("colour", set_everywhere(SamplesPerPixel=3), "it is a colour image of slices, which holds no measured values"),
    ("a colour table", set_everywhere(PhotometricInterpretation="PALETTE COLOR"),
     "it is a colour image of slices, which holds no measured values"),
    ("several frames", set_everywhere(NumberOfFrames="2"), "its 2 frames have no positions of their own"),
    ("a damaged number of frames", set_everywhere(NumberOfFrames="2000000000"),
     "it announces 2000000000 frames: NumberOfFrames is damaged"),
    ("no position", clear("ImagePositionPatient"), NO_POSITION),
    ("an empty position", set_everywhere(ImagePositionPatient=None), NO_POSITION),
    ("a position of two numbers", set_everywhere(ImagePositionPatient=["1", "2"]), NO_POSITION),
    ("no orientation", clear("ImageOrientationPatient"), NO_POSITION),
    ("an orientation of one number", set_everywhere(ImageOrientationPatient="1"), NO_POSITION),
    ("directions that are none", set_everywhere(ImageOrientationPatient=["1", "0", "0", "1", "0", "0"]), NO_DIRECTIONS),
    ("directions of other lengths", set_everywhere(ImageOrientationPatient=["2", "0", "0", "0", ".5", "0"]),
     NO_DIRECTIONS),
    ("no spacing", clear("PixelSpacing"), "it has no PixelSpacing"),
    ("a spacing of one number", set_everywhere(PixelSpacing="1"), "it has no PixelSpacing"),
    ("a spacing of nothing", set_everywhere(PixelSpacing=["0", "0"]), "it has no PixelSpacing"),
    ("a scout", set_everywhere(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "ImageType says LOCALIZER"),
    ("an image type of one value", set_everywhere(ImageType="LOCALIZER"), "ImageType says LOCALIZER"),
    ("a topogram", set_everywhere(ImageType=["ORIGINAL", "PRIMARY", "OTHER", "CT_SOM5 TOP"]),
     "ImageType says TOP"),
    ("a projection", set_everywhere(ImageType=["DERIVED", "SECONDARY", "MIP"]),
     "it is a projection or a rendering, no slice (ImageType says MIP)"),
    ("no instance UID", clear("SOPInstanceUID"), "it has no SOPInstanceUID or no SOPClassUID"),
    ("no class UID", clear("SOPClassUID"), "it has no SOPInstanceUID or no SOPClassUID"),
    ("an empty size", set_everywhere(Rows=None), "CT Image Storage is no image"),
    ("a size of nothing", set_everywhere(Rows=0), "it has no rows or no columns"),
    ("one place", set_everywhere(ImagePositionPatient=["1", "2", "3"]),
     "all 10 slices lie at one place, 3.00 mm along the normal"),
    ("a dose", set_everywhere(SOPClassUID=RTDoseStorage), "RT Dose Storage is a result, no image"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "break_series", "sentence"), BROKEN, ids=[case[0] for case in BROKEN])
def test_broken_series_is_refused_in_whole(
    tmp_path: Path, what: str, break_series: Callable[[list[Path]], None], sentence: str
) -> None:
    paths = write_series(tmp_path, np.zeros((10, 8, 8), np.int16))
    assert len(assemble(tmp_path).volumes) == 1
    break_series(paths)
    assembly = assemble(tmp_path)
    assert not assembly.volumes, what
    (refusal,) = assembly.refusals
    assert refusal.sentence == sentence
    assert len(refusal.sop_instance_uids) == len(list(tmp_path.iterdir()))
    assert not any(text in str(refusal) for text in PATIENT.values())


def test_doubled_slice_is_refused_by_name(tmp_path: Path) -> None:
    """Which of two slices at one place is the right one cannot be known: neither is taken."""
    paths = write_series(tmp_path, np.zeros((10, 8, 8), np.int16))
    dataset = dcmread(paths[4])
    uid = dataset.SOPInstanceUID
    dataset.SOPInstanceUID = "1.2.3"
    dataset.save_as(tmp_path / "doubled.dcm")
    (refusal,) = assemble(tmp_path).refusals
    assert not assemble(tmp_path).volumes
    assert refusal.sentence == (
        "1 of 11 slices lie where another one lies, and no attribute tells them apart: "
        f"at 38.00 mm along the normal 1.2.3, {uid}"
    )
    assert len(refusal.sop_instance_uids) == 11


def test_same_instance_twice_is_refused_by_name(tmp_path: Path) -> None:
    paths = write_series(tmp_path, np.zeros((10, 8, 8), np.int16))
    (tmp_path / "copy.dcm").write_bytes(paths[4].read_bytes())
    (refusal,) = assemble(tmp_path).refusals
    assert refusal.sentence.startswith("1 of 11 slices lie where another one lies, the same instance twice: at 38.00")


def test_repeated_slice_of_another_acquisition_is_refused(tmp_path: Path) -> None:
    """A slice that was taken again, for motion say: the acquisitions are no two volumes, and neither is preferred."""
    paths = write_series(tmp_path, np.zeros((10, 8, 8), np.int16), AcquisitionNumber=1)
    dataset = dcmread(paths[4])
    dataset.SOPInstanceUID += ".1"
    dataset.AcquisitionNumber = 2
    dataset.save_as(tmp_path / "again.dcm")
    assembly = assemble(tmp_path)
    assert not assembly.volumes
    assert "no attribute tells them apart" in assembly.refusals[0].sentence


@pytest.mark.parametrize(
    "raw", [b"abc\\1\\2 ", b"nan\\1\\2 ", b"inf\\1\\2 ", b"1e999\\1\\2 ", b"\\\\", b"1,5\\2\\3 "], ids=repr
)
def test_position_that_is_no_number_is_refused(tmp_path: Path, raw: bytes) -> None:
    good = b"-10\\-20\\36"
    paths = write_series(tmp_path, np.zeros((10, 8, 8), np.int16))
    content = paths[3].read_bytes()
    assert content.count(good) == 1
    length = len(good).to_bytes(2, "little")
    paths[3].write_bytes(content.replace(length + good, len(raw).to_bytes(2, "little") + raw))
    assembly = assemble(tmp_path)
    assert not assembly.volumes  # what remains lacks a slice
    assert NO_POSITION in [refusal.sentence for refusal in assembly.refusals]


def test_missing_slice_of_three_is_named(tmp_path: Path) -> None:
    write_series(tmp_path, np.zeros((4, 8, 8), np.int16))[2].unlink()
    (refusal,) = assemble(tmp_path).refusals
    assert refusal.sentence == "a slice is missing: 4.00 mm between slices 2 and 3 of 3, 2.00 mm elsewhere"


def test_scout_in_a_series_leaves_the_volume(tmp_path: Path) -> None:
    paths = write_series(tmp_path, np.zeros((6, 8, 8), np.int16))
    scout = dcmread(paths[0])
    scout.SOPInstanceUID += ".1"
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.save_as(tmp_path / "scout.dcm")
    assembly = assemble(tmp_path)
    assert [plan.paths for plan in assembly.volumes] == [tuple(paths)]
    assert [(refusal.sentence, refusal.sop_instance_uids) for refusal in assembly.refusals] == [
        ("ImageType says LOCALIZER", (scout.SOPInstanceUID,))
    ]


def test_slices_of_two_frames_of_reference_are_two_volumes(tmp_path: Path) -> None:
    """The same coordinates in another frame of reference are another place (PS3.3 C.7.4.1)."""
    series: dict[str, Any] = {"SeriesInstanceUID": "1.2.3.4", "StudyInstanceUID": "1.2.3"}
    write_series(tmp_path / "a", np.zeros((3, 8, 8), np.int16), FrameOfReferenceUID="1.2.8", **series)
    write_series(
        tmp_path / "b", np.zeros((3, 8, 8), np.int16), FrameOfReferenceUID="1.2.9", origin_mm=(-10, -20, 36), **series
    )
    assembly = assemble(tmp_path)
    assert {(plan.grid.frame_of_reference_uid, len(plan.paths)) for plan in assembly.volumes} == {
        ("1.2.8", 3),
        ("1.2.9", 3),
    }


def test_tolerances_let_a_scanner_round(tmp_path: Path) -> None:
    """Positions to a tenth of a millimetre, as some scanners write them, are no varying spacing."""
    paths = write_series(tmp_path, np.zeros((20, 8, 8), np.int16), spacing_mm=(0.666, 1, 1))
    for path in paths:
        dataset = dcmread(path)
        dataset.ImagePositionPatient = [f"{float(value):.2f}" for value in dataset.ImagePositionPatient]
        dataset.save_as(path)
    (plan,) = assemble(tmp_path).volumes
    assert plan.grid.spacing_mm[0] == pytest.approx(0.666, abs=1e-3)
