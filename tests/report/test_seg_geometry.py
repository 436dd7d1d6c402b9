"""SEGs of multi-frame, tilted, uneven and planar sources, judged by dciodvfy, dcmqi, highdicom and our own reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset

from node.dicom.assembly import InputPlan, VolumePlan, assemble_volumes
from node.dicom.frames import FrameHeaders
from node.dicom.header import read_header, scan_folder
from node.dicom.pixels import read_input
from node.dicom.volume import Image, Volume
from node.errors import InputRefused
from node.infer.results import Labelmap
from node.report.kinds import SegForm
from node.report.readback import read_labelmap
from node.report.results import Result
from node.report.seg import make_seg
from node.report.subject import Subject
from tests.dicom.slices import write_series
from tests.report.cases import CREATED, FIRST, SECOND, dciodvfy_errors, draw_mask, make_package, run

REAL = {
    "enhanced_mr": ("enhanced/mr_siemens_xa30/In/5_anat-T1w_acq-tfl", 0),
    "enhanced_asl": ("enhanced/mr_siemens_xa30/In/27_asl_2d_tra", 0),
    "enhanced_mr_philips": ("enhanced/mr_philips", 0),
    "enhanced_ct": ("enhanced/eCT_Supplemental.dcm", 0),
    "tilted_ct": ("head_ct_tilted", 0),
    "mammogram": ("planar/mg_mammo.dcm", 0),
    "ultrasound_clip": ("planar/us_colour_multiframe.dcm", 0),
    "photograph": ("planar/xc_photo.dcm", 0),
    "radiograph": ("compressed/RG3_J2KR.dcm", 0),
}
# What dciodvfy finds in our objects because the source images have it: it is copied with the patient and the study, and
# how much an image was compressed is not to be known from an empty ratio.
INHERITED = {
    "enhanced_mr_philips": {
        "</PatientAge(0010,1010)[1]> - Value invalid for this VR [AS] - Length invalid for this VR - expected == 4"
    },
    "photograph": {
        "</LossyImageCompressionRatio(0028,2112)> - Empty attribute (no value) for Type 1C Conditional - "
        "Module=<SegmentationImage>"
    },
}
VOLUMES = [name for name, (folder, _) in REAL.items() if "planar" not in folder and name != "radiograph"]
REGULAR = [name for name in VOLUMES if name != "tilted_ct"]
IMAGES = [name for name in REAL if name not in VOLUMES]


@cache
def plan_real(shared_data: Path, name: str) -> InputPlan:
    """The first volume or image of real data."""
    folder, number = REAL[name]
    assembly = assemble_volumes({path: read_header(path) for path in scan_folder(shared_data / folder).files})
    return (*assembly.volumes, *assembly.images)[number]


def make_subject(plan: InputPlan, labels: NDArray[np.uint16] | None = None) -> Subject:
    source = read_input(plan)
    array = draw_mask(source.array.shape[:3]) if labels is None else labels
    package = make_package()
    return Subject(
        key="job",
        created=CREATED,
        source=source,
        sources=plan.headers,
        prediction=Labelmap(array, source.grid if isinstance(source, Volume) else None),
        manifest=package.manifest,
        model_name=package.name,
        model_version=package.version,
        model_digest=package.digest,
        node_version="0",
    )


def write_seg(subject: Subject, path: Path, form: SegForm = SegForm.BINARY) -> Dataset:
    path.write_bytes(Result("seg", make_seg(subject, form)).encode())
    return dcmread(path)


def check_frames(seg: Dataset, subject: Subject) -> None:
    """Every frame refers to the one slice that holds its pixels, and lies where that lies."""
    headers = {str(header.SOPInstanceUID): header for header in subject.sources}
    slices, labels = subject.source_slices, subject.labelmap.array
    places = {(ref.sop_instance_uid, ref.frame): index for index, ref in enumerate(slices)}
    frames = seg.pixel_array.reshape(-1, *labels.shape[1:])
    for frame, groups in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        (item,) = groups.DerivationImageSequence[0].SourceImageSequence
        header = headers[item.ReferencedSOPInstanceUID]
        number = int(item.ReferencedFrameNumber) if "ReferencedFrameNumber" in item else None
        assert item.ReferencedSOPClassUID == header.SOPClassUID
        assert item.SpatialLocationsPreserved == "YES"
        index = places[item.ReferencedSOPInstanceUID, number]
        if "SegmentIdentificationSequence" in groups:
            segment = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            assert np.array_equal(frame > 0, labels[index] == (FIRST, SECOND)[segment - 1])
        else:
            assert np.array_equal(np.array([0, FIRST, SECOND])[frame], labels[index])
        if isinstance(subject.source, Volume):
            own = header if number is None else FrameHeaders(header)[number]
            assert groups.PlanePositionSequence[0].ImagePositionPatient == own.ImagePositionPatient
    wanted = {label for label in np.unique(labels) if label}
    count = sum((labels == label).any(axis=(1, 2)).sum() for label in wanted)
    assert len(frames) == (count if seg.SegmentationType == "BINARY" else labels.any(axis=(1, 2)).sum())
    (series,) = seg.ReferencedSeriesSequence
    assert [item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence] == list(headers)
    assert series.SeriesInstanceUID == subject.source.series_uid


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("form", [SegForm.BINARY, SegForm.LABELMAP])
def test_what_was_written_is_read_back(shared_data: Path, tmp_path: Path, name: str, form: SegForm) -> None:
    subject = make_subject(plan_real(shared_data, name))
    seg = write_seg(subject, tmp_path / "seg.dcm", form)
    check_frames(seg, subject)
    found = read_labelmap(seg, subject.source, (FIRST, SECOND))
    assert np.array_equal(found.array, subject.labelmap.array)
    assert found.grid is subject.labelmap.grid
    assert ("FrameOfReferenceUID" in seg) == isinstance(subject.source, Volume)


@pytest.mark.parametrize("name", REAL)
def test_dciodvfy_finds_only_what_the_source_already_had(shared_data: Path, tmp_path: Path, name: str) -> None:
    plan = plan_real(shared_data, name)
    inherited = INHERITED.get(name, set())
    for keyword in (error[2:].split("(")[0] for error in inherited):
        value = plan.headers[0][keyword].value
        assert value is None or len(str(value)) < 4, f"{keyword} is listed as inherited, but the source has it right"
    write_seg(make_subject(plan), tmp_path / "seg.dcm")
    assert dciodvfy_errors(tmp_path / "seg.dcm") == inherited


@pytest.mark.parametrize("name", REGULAR)
def test_dcmqi_reads_every_voxel_where_it_lies(shared_data: Path, tmp_path: Path, name: str) -> None:
    subject = make_subject(plan_real(shared_data, name))
    write_seg(subject, tmp_path / "seg.dcm")
    run("segimage2itkimage", "--inputDICOM", tmp_path / "seg.dcm", "--outputDirectory", tmp_path, "-t", "nrrd")
    grid, labels = subject.volume.grid, subject.labelmap.array
    for label, number in ((FIRST, 1), (SECOND, 2)):
        segment = sitk.ReadImage(str(tmp_path / f"{number}.nrrd"))
        wanted = grid.to_lps(np.argwhere(labels == label)[:, ::-1].astype(float))
        voxels = np.argwhere(sitk.GetArrayFromImage(segment) > 0)[:, ::-1].tolist()
        found = np.array([segment.TransformIndexToPhysicalPoint(voxel) for voxel in voxels])
        assert found.shape == wanted.shape
        # dcmqi may turn the order of slices around; voxels are compared by where they lie.
        order = [np.lexsort(np.round(points, 2).T) for points in (found, wanted)]
        assert np.abs(found[order[0]] - wanted[order[1]]).max() < 0.02


def test_highdicom_reads_frames_by_their_source(shared_data: Path, tmp_path: Path) -> None:
    subject = make_subject(plan_real(shared_data, "enhanced_mr"))
    write_seg(subject, tmp_path / "seg.dcm")
    seg = hd.seg.segread(tmp_path / "seg.dcm")
    numbers = [ref.frame for ref in subject.volume.slices if ref.frame]
    uid = subject.volume.slices[0].sop_instance_uid
    pixels = seg.get_pixels_by_source_frame(uid, numbers, assert_missing_frames_are_empty=True)
    for segment, label in enumerate((FIRST, SECOND)):
        assert np.array_equal(pixels[..., segment] > 0, subject.labelmap.array == label)


def some_frames(plan: VolumePlan, chosen: slice) -> VolumePlan:
    """A plan of some of the frames, as of one of several volumes in an instance."""
    grid = plan.grid
    affine = grid.affine_lps.copy()
    start, _, step = chosen.indices(grid.shape[0])
    affine[:3, 3] += start * affine[:3, 2]
    affine[:3, 2] *= step
    slices = plan.slices[chosen]
    grid = replace(grid, shape=(len(slices), *grid.shape[1:]), affine_lps=affine)
    return replace(plan, grid=grid, slices=slices, paths=plan.paths[chosen])


@pytest.mark.parametrize("form", [SegForm.BINARY, SegForm.LABELMAP])
def test_one_of_several_volumes_of_an_instance(shared_data: Path, tmp_path: Path, form: SegForm) -> None:
    whole = plan_real(shared_data, "enhanced_mr")
    assert isinstance(whole, VolumePlan)
    plan = some_frames(whole, slice(10, 60, 2))
    subject = make_subject(plan)
    assert np.array_equal(subject.source.array, make_subject(whole).source.array[10:60:2])
    seg = write_seg(subject, tmp_path / "seg.dcm", form)
    check_frames(seg, subject)
    assert np.array_equal(read_labelmap(seg, subject.source, (FIRST, SECOND)).array, subject.labelmap.array)
    numbers = {ref.frame for ref in plan.slices}
    for groups in seg.PerFrameFunctionalGroupsSequence:
        assert groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber in numbers
    other = make_subject(some_frames(whole, slice(11, 60, 2))).source
    with pytest.raises(InputRefused, match="which is not in the volume"):
        read_labelmap(seg, other, (FIRST, SECOND))


def uneven(folder: Path) -> VolumePlan:
    """A series whose last slices lie further apart, and whose orientation is not the same to the last digit."""
    gaps = np.array([0, 2, 4, 6, 8, 11, 14, 17.0])
    rng = np.random.default_rng(4)
    for path, depth in zip(write_series(folder, rng.integers(0, 99, (8, 20, 24)).astype(np.int16)), gaps, strict=True):
        dataset = dcmread(path)
        dataset.ImagePositionPatient = [-10, -20, 30 + depth]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, f"{depth * 1e-5:.6f}"]
        dataset.save_as(path)
    (plan,) = assemble_volumes({path: read_header(path) for path in sorted(folder.iterdir())}).volumes
    assert plan.positions_lps is not None
    return plan


@pytest.mark.parametrize("form", [SegForm.BINARY, SegForm.LABELMAP])
def test_slices_of_varying_spacing(tmp_path: Path, form: SegForm) -> None:
    subject = make_subject(uneven(tmp_path / "images"))
    seg = write_seg(subject, tmp_path / "seg.dcm", form)
    check_frames(seg, subject)
    assert np.array_equal(read_labelmap(seg, subject.source, (FIRST, SECOND)).array, subject.labelmap.array)
    assert "SpacingBetweenSlices" not in seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    if form is SegForm.BINARY:
        assert dciodvfy_errors(tmp_path / "seg.dcm") == set()


def test_the_spacing_of_a_tilted_stack_is_along_its_normal(shared_data: Path, tmp_path: Path) -> None:
    subject = make_subject(plan_real(shared_data, "tilted_ct"))
    seg = write_seg(subject, tmp_path / "seg.dcm")
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert float(measures.SpacingBetweenSlices) == pytest.approx(2.5 * np.cos(np.deg2rad(18.5)), abs=1e-4)


def test_slices_without_thickness_or_frame_of_reference(tmp_path: Path) -> None:
    array = np.random.default_rng(4).integers(0, 99, (8, 20, 24)).astype(np.int16)
    for path in write_series(tmp_path / "images", array):
        dataset = dcmread(path)
        del dataset.SliceThickness, dataset.FrameOfReferenceUID
        dataset.save_as(path)
    paths = sorted((tmp_path / "images").iterdir())
    (plan,) = assemble_volumes({path: read_header(path) for path in paths}).volumes
    subject = make_subject(plan)
    seg = write_seg(subject, tmp_path / "seg.dcm")
    check_frames(seg, subject)
    assert float(seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness) == 2.0
    assert seg.FrameOfReferenceUID
    assert all("SliceThickness" not in header for header in plan.headers), "the source's own headers are left alone"


@pytest.mark.parametrize("name", IMAGES)
def test_a_planar_image_gets_no_place_in_the_patient(shared_data: Path, tmp_path: Path, name: str) -> None:
    subject = make_subject(plan_real(shared_data, name))
    seg = write_seg(subject, tmp_path / "seg.dcm")
    assert isinstance(subject.source, Image)
    (shared,) = seg.SharedFunctionalGroupsSequence
    for keyword in ("PlaneOrientationSequence", "PlanePositionSequence"):
        assert all(keyword not in groups for groups in (shared, *seg.PerFrameFunctionalGroupsSequence))
    if subject.source.spacing_mm is None:
        assert "PixelMeasuresSequence" not in shared
    else:
        spacing = shared.PixelMeasuresSequence[0].PixelSpacing
        assert [float(value) for value in spacing] == pytest.approx(subject.source.spacing_mm)
    for groups in seg.PerFrameFunctionalGroupsSequence:
        item = groups.DerivationImageSequence[0].SourceImageSequence[0]
        content = groups.FrameContentSequence[0]
        assert content.InStackPositionNumber == item.get("ReferencedFrameNumber", 1) == content.DimensionIndexValues[-1]


def no_source(seg: Dataset) -> None:
    del seg.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence


def two_sources(seg: Dataset) -> None:
    sequence = seg.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence
    sequence.append(sequence[0])


@pytest.mark.parametrize("damage", [no_source, two_sources])
def test_a_frame_of_no_one_image_is_refused(tmp_path: Path, damage: Callable[[Dataset], None]) -> None:
    subject = make_subject(uneven(tmp_path / "images"))
    seg = write_seg(subject, tmp_path / "seg.dcm")
    damage(seg)
    with pytest.raises(InputRefused, match=r"refers to [02] images, not to one"):
        read_labelmap(seg, subject.source, (FIRST, SECOND))
