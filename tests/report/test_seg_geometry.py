"""SEGs of multi-frame, tilted, uneven and planar sources, judged by dciodvfy, dcmqi, highdicom and our own reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.dataset import Dataset

from node.dicom.assembly import VolumePlan, assemble_volumes
from node.dicom.header import read_header
from node.dicom.volume import Image, Volume
from node.errors import InputRefused
from node.report.kinds import SegForm
from node.report.readback import read_labelmap
from tests.dicom.slices import write_series
from tests.report.cases import FIRST, SECOND, dciodvfy_errors, run
from tests.report.geometries import (
    IMAGES,
    REAL,
    REGULAR,
    check_frames,
    make_subject,
    plan_real,
    some_frames,
    uneven,
    write_seg,
)

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


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("form", SegForm)
def test_what_was_written_is_read_back(shared_data: Path, tmp_path: Path, name: str, form: SegForm) -> None:
    subject = make_subject(plan_real(shared_data, name))
    seg = write_seg(subject, tmp_path / "seg.dcm", form)
    check_frames(seg, subject)
    found = read_labelmap(seg, subject.source, (FIRST, SECOND))
    assert np.array_equal(found.array, subject.labelmap.array)
    assert found.grid is subject.labelmap.grid
    assert ("FrameOfReferenceUID" in seg) == isinstance(subject.source, Volume)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("form", [SegForm.BINARY, SegForm.FRACTIONAL])  # Debian's dciodvfy knows no LABELMAP
def test_dciodvfy_finds_only_what_the_source_already_had(
    shared_data: Path, tmp_path: Path, name: str, form: SegForm
) -> None:
    plan = plan_real(shared_data, name)
    inherited = INHERITED.get(name, set())
    for keyword in (error[2:].split("(")[0] for error in inherited):
        value = plan.headers[0][keyword].value
        assert value is None or len(str(value)) < 4, f"{keyword} is listed as inherited, but the source has it right"
    write_seg(make_subject(plan), tmp_path / "seg.dcm", form)
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


@pytest.mark.parametrize("form", SegForm)
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


@pytest.mark.parametrize("form", SegForm)
def test_slices_of_varying_spacing(tmp_path: Path, form: SegForm) -> None:
    subject = make_subject(uneven(tmp_path / "images"))
    seg = write_seg(subject, tmp_path / "seg.dcm", form)
    check_frames(seg, subject)
    assert np.array_equal(read_labelmap(seg, subject.source, (FIRST, SECOND)).array, subject.labelmap.array)
    assert "SpacingBetweenSlices" not in seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    if form is not SegForm.LABELMAP:  # which Debian's dciodvfy does not know
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
