"""Structure sets: read back they are the label map, on the very slices, whatever rule of filling a reader has."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian

from node.dicom.frames import FrameHeaders
from node.infer.results import Boxes, Labelmap, Landmark, Landmarks
from node.report.colors import to_rgb
from node.report.findings import Findings, measure
from node.report.outlines import trace
from node.report.quiet import quietly
from node.report.results import Result
from node.report.rtstruct import join_holes, make_rtstruct
from tests.report.cases import FIRST, SECOND, SERIES, dciodvfy_errors, draw_mask, run
from tests.report.conftest import CaseOf
from tests.report.contours import fill, rasterise
from tests.report.geometries import VOLUMES, make_subject, plan_real, small_subject
from tests.report.predictions import LANDMARKS, classify_breast, detect, mark_head, read_case, read_planar
from tests.report.predictions import make_subject as planar_subject
from tests.report.test_gsps import SOURCE_ERRORS

SHAPE = (40, 50)


def winding(ring: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.int64]:
    """How often a polygon goes around each pixel's centre; a reader may take what is odd, or what is not zero."""
    row, column = np.mgrid[: shape[0], : shape[1]]
    turns = np.zeros(shape, np.int64)
    for (x, y), (far_x, far_y) in zip(np.roll(ring, 1, axis=0), ring, strict=True):
        if y != far_y:
            beyond = column < (far_x - x) * (row - y) / (far_y - y) + x
            turns += np.where(beyond & (y <= row) & (row < far_y), 1, 0) - np.where(
                beyond & (far_y <= row) & (row < y), 1, 0
            )
    return turns


def random_mask(seed: int, density: float) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random(SHAPE) < density


@pytest.mark.parametrize("density", [0.2, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("seed", range(5))
def test_joined_contours_are_the_mask_by_either_rule(seed: int, density: float) -> None:
    mask = random_mask(seed, density)
    turns = sum(winding(ring, SHAPE) for ring in join_holes(trace(mask)))
    assert np.array_equal(turns, mask)  # exactly once around each of its pixels: odd, and not zero


def test_an_island_in_a_hole_is_a_contour_of_its_own() -> None:
    mask = np.zeros(SHAPE, bool)
    mask[5:35, 5:45], mask[10:30, 10:40], mask[15:25, 15:35], mask[18:20, 20:30] = True, False, True, False
    rings = join_holes(trace(mask))
    assert len(rings) == 2
    assert np.array_equal(sum(winding(ring, SHAPE) for ring in rings), mask)


def write(findings: Findings, folder: Path) -> Path:
    with quietly():
        (structures,) = make_rtstruct(findings)
    file = folder / "rtstruct.dcm"
    file.write_bytes(Result("rtstruct", structures).encode())
    return file


@pytest.mark.parametrize("name", SERIES)
def test_read_back_it_is_the_label_map(case_of: CaseOf, name: str, tmp_path: Path) -> None:
    case = case_of(name)
    file = write(case.analysis.findings, tmp_path)
    structures = dcmread(file)
    for roi, label in (("Right lung", FIRST), ("Nodule", SECOND)):
        assert np.array_equal(rasterise(structures, roi, case.volume), case.labels == label)
    slices = {ref.sop_instance_uid: index for index, ref in enumerate(case.volume.slices)}
    first = structures.ROIContourSequence[0]
    drawn = {slices[contour.ContourImageSequence[0].ReferencedSOPInstanceUID] for contour in first.ContourSequence}
    assert drawn == set(np.flatnonzero((case.labels == FIRST).any(axis=(1, 2))).tolist())
    assert dciodvfy_errors(file) <= SOURCE_ERRORS


@pytest.mark.parametrize("name", ["siemens_ct", "brain_mr", "sarcoma_pet"])
def test_plastimatch_makes_the_same_label_map(shared_data: Path, name: str, tmp_path: Path) -> None:
    """Of segments with holes, islands and pixels that touch at a corner."""
    plan, volume = read_case(shared_data, name)
    labels = draw_mask(plan.grid.shape)
    chance = np.random.default_rng(3).random(labels.shape)
    labels[chance < 0.1] = 0
    file = write(measure(make_subject(plan, labels)), tmp_path)
    (tmp_path / "images").mkdir()
    for number, path in enumerate(plan.paths):
        shutil.copyfile(path, tmp_path / "images" / f"{number}.dcm")
    arguments = ("--referenced-ct", tmp_path / "images", "--output-prefix", tmp_path / "out", "--prefix-format", "nrrd")
    run("plastimatch", "convert", "--input", file, *arguments)
    for roi, label in (("Right lung", FIRST), ("Nodule", SECOND)):
        found = sitk.ReadImage(tmp_path / "out" / f"{roi}.nrrd")
        assert np.allclose(found.GetOrigin(), volume.grid.affine_lps[:3, 3], atol=1e-3)
        assert np.array_equal(sitk.GetArrayFromImage(found).astype(bool), labels == label)


@pytest.mark.parametrize("name", sorted(set(VOLUMES) - {"enhanced_mr_philips"}))  # which has no frame of reference
def test_contours_lie_in_their_images_by_what_the_images_say(shared_data: Path, name: str, tmp_path: Path) -> None:
    """Multi-frame and tilted ones: in the pixels of the frame that it refers to, a contour is the outline there."""
    subject = make_subject(plan_real(shared_data, name))
    findings = measure(subject)
    structures = dcmread(write(findings, tmp_path))
    headers = {str(header.SOPInstanceUID): FrameHeaders(header) for header in subject.sources}
    refs = {(ref.sop_instance_uid, ref.frame): index for index, ref in enumerate(subject.source_slices)}
    drawn: dict[tuple[int, int], NDArray[np.bool_]] = {}
    for region in structures.ROIContourSequence:
        for contour in region.ContourSequence:
            (image,) = contour.ContourImageSequence
            frame = image.get("ReferencedFrameNumber")
            pixels = in_pixels(contour, headers[image.ReferencedSOPInstanceUID][frame or 1])
            index = refs[image.ReferencedSOPInstanceUID, frame]
            mask = drawn.setdefault(
                (region.ReferencedROINumber, index), np.zeros(subject.source.array.shape[1:3], bool)
            )
            mask ^= fill(pixels[:, 0], pixels[:, 1], mask.shape)
    for outline in findings.outlines():
        mask = subject.labelmap.array[outline.index] == outline.label
        assert np.array_equal(drawn.pop((outline.number, outline.index)), mask)
    assert not drawn


def in_pixels(contour: Dataset, header: Dataset) -> NDArray[np.float64]:
    """Columns and rows of a contour's points, after the plane of one image or frame (PS3.3 C.7.6.2.1.1)."""
    points = np.array(contour.ContourData, float).reshape(-1, 3) - np.array(header.ImagePositionPatient, float)
    along_row, along_column = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
    assert np.abs(points @ np.cross(along_row, along_column)).max() < 0.01, "a contour beside its image"
    row_spacing, column_spacing = (float(value) for value in header.PixelSpacing)
    return np.stack([points @ along_row / column_spacing, points @ along_column / row_spacing], axis=1)


def test_what_it_says_of_itself_and_of_its_regions(case_of: CaseOf, tmp_path: Path) -> None:
    case = case_of("siemens_ct")
    structures = dcmread(write(case.analysis.findings, tmp_path))
    seg = dcmread(case.files["seg"])
    assert structures.file_meta.TransferSyntaxUID == ImplicitVRLittleEndian
    assert (structures.Modality, structures.SeriesNumber, structures.StructureSetDate) == ("RTSTRUCT", 908, "20260304")
    assert (structures.StructureSetLabel, structures.ApprovalStatus) == ("AI_UNVERIFIED", "UNAPPROVED")
    assert structures.StructureSetDescription == "AI, NOT VERIFIED - research use only. synthetic 1.2.3"
    assert structures.FrameOfReferenceUID == case.volume.grid.frame_of_reference_uid
    assert (structures.PatientID, structures.StudyInstanceUID) == (seg.PatientID, seg.StudyInstanceUID)
    (frame,) = structures.ReferencedFrameOfReferenceSequence
    (series,) = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence
    assert series.SeriesInstanceUID == case.volume.series_uid
    assert len(series.ContourImageSequence) == len(case.volume.slices)
    regions = [(roi.ROINumber, roi.ROIName, roi.ROIGenerationAlgorithm) for roi in structures.StructureSetROISequence]
    assert regions == [(1, "Right lung", "AUTOMATIC"), (2, "Nodule", "AUTOMATIC")]
    (algorithm,) = structures.StructureSetROISequence[0].ROIDerivationAlgorithmIdentificationSequence
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("synthetic", "1.2.3")
    lung, nodule = structures.RTROIObservationsSequence
    assert (lung.RTROIInterpretedType, nodule.RTROIInterpretedType) == ("ORGAN", "")
    (code,) = lung.RTROIIdentificationCodeSequence
    assert (code.CodeValue, code.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning) == ("39607008", "Right")
    assert list(structures.ROIContourSequence[0].ROIDisplayColor) == list(to_rgb((72.0, -22.0, -32.0)))


def test_boxes_and_points_are_regions_too(shared_data: Path, tmp_path: Path) -> None:
    subject = detect(shared_data)
    structures = dcmread(write(measure(subject), tmp_path))
    assert [roi.ROIName for roi in structures.StructureSetROISequence] == ["Mass", "Nodule 2", "Nodule 3"]
    assert isinstance(subject.prediction, Boxes)
    mass = max(subject.prediction.boxes, key=lambda box: box.score)
    points = np.concatenate(
        [np.array(each.ContourData, float).reshape(-1, 3) for each in structures.ROIContourSequence[0].ContourSequence]
    )
    assert np.allclose([points.min(axis=0), points.max(axis=0)], [mass.low_lps, mass.high_lps], atol=3)
    head = mark_head(shared_data)
    file = write(measure(head), tmp_path)
    assert dciodvfy_errors(file) <= SOURCE_ERRORS
    (first, second) = (region.ContourSequence[0] for region in dcmread(file).ROIContourSequence)
    assert {first.ContourGeometricType, second.ContourGeometricType} == {"POINT"}
    places = [np.array(each.ContourData, float) for each in (first, second)]
    wanted = head.volume.grid.to_lps(np.array([(200.75, 150.0, 121), (60.5, 150.25, 120)]))
    assert all(np.abs(wanted - place).max(axis=1).min() < 1e-3 for place in places)


def test_a_contour_longer_than_explicit_vr_bears(tmp_path: Path) -> None:
    """A comb of 4,000 corners."""
    labels = np.zeros((3, 64, 2048), np.uint16)
    labels[1, 10:40] = FIRST
    labels[1, 20:40, 1::2] = 0
    subject = small_subject(tmp_path / "images", labels.shape)
    subject = dataclasses.replace(subject, prediction=Labelmap(labels, subject.volume.grid))
    structures = dcmread(write(measure(subject), tmp_path))
    (contour,) = structures.ROIContourSequence[0].ContourSequence
    assert (
        len(structures.ROIContourSequence[0].ContourSequence[0]["ContourData"].value)
        == 3 * contour.NumberOfContourPoints
    )
    assert contour.NumberOfContourPoints > 4000
    assert np.array_equal(rasterise(structures, "Right lung", subject.volume), labels == FIRST)


def test_there_is_none_where_nothing_has_a_place_in_space(shared_data: Path) -> None:
    assert make_rtstruct(measure(classify_breast(shared_data))) == []
    assert make_rtstruct(measure(dataclasses.replace(detect(shared_data), prediction=Boxes(())))) == []
    image, headers = read_planar(shared_data / "planar" / "us_colour_multiframe.dcm")
    points = Landmarks((Landmark(1, 3, 100.0, 120.0, 0.9),))
    assert make_rtstruct(measure(planar_subject(image, headers, points, LANDMARKS))) == []
    found = detect(shared_data)
    nowhere = dataclasses.replace(found.volume, grid=dataclasses.replace(found.volume.grid, frame_of_reference_uid=""))
    assert make_rtstruct(measure(dataclasses.replace(found, source=nowhere))) == []
    assert make_rtstruct(measure(make_subject(plan_real(shared_data, "enhanced_mr_philips")))) == []


def test_the_same_findings_make_the_same_file(shared_data: Path, tmp_path: Path) -> None:
    first = write(measure(detect(shared_data)), tmp_path).read_bytes()
    assert write(measure(detect(shared_data)), tmp_path).read_bytes() == first
