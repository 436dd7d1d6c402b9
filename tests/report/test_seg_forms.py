"""The three forms of a SEG, against what highdicom makes of the same label map frame by frame."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
import SimpleITK as sitk
from highdicom.seg import Segmentation
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from node.dicom.volume import Image
from node.errors import OutputRefused
from node.infer.results import Labelmap
from node.report import seg as seg_module
from node.report.kinds import Kind, SegForm
from node.report.readback import read_labelmap
from node.report.results import Result
from node.report.seg import make_seg
from node.report.slices import drop_geometry, refer_to_sources, stand_ins
from node.report.subject import Subject
from tests.report.cases import FIRST, MANIFEST, SECOND, run
from tests.report.geometries import REAL, REGULAR, make_subject, plan_real, small_subject, uneven, write_seg


def plain_seg(subject: Subject, form: SegForm) -> Dataset:
    """What `make_seg` has to make, as highdicom makes it of the whole."""
    labels = sorted(subject.manifest.segments)
    number_of = np.zeros(max(labels) + 1, np.uint16)
    number_of[labels] = np.arange(1, len(labels) + 1)
    array = number_of[subject.labelmap.array]
    if form is SegForm.FRACTIONAL:
        assert subject.labelmap.probabilities is not None
        array = np.stack([subject.labelmap.probabilities[label] for label in labels], axis=-1) / np.float32(255)
    names = [] if form is SegForm.BINARY else [form.value]
    seg = Segmentation(
        source_images=stand_ins(subject),
        pixel_array=array,
        segmentation_type=form.upper(),
        segment_descriptions=[seg_module._describe(subject, number, label) for number, label in enumerate(labels, 1)],
        series_instance_uid=subject.uid("seg", *names, "series"),
        series_number=901,
        sop_instance_uid=subject.uid("seg", *names),
        instance_number=1,
        manufacturer="radnode",
        manufacturer_model_name="synthetic 1.2.3",
        software_versions="radnode 0",
        device_serial_number="0123456789abcdef",
        content_label="AI_UNVERIFIED",
        content_description=subject.series_description(Kind.SEG),
        content_creator_name="radnode^AI",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        omit_empty_frames=True,
        series_description=subject.series_description(Kind.SEG),
    )
    refer_to_sources(seg, subject)
    if isinstance(subject.source, Image):
        drop_geometry(seg, subject.source, subject.sources[0])
    seg_module.stamp(seg, subject)
    uid = subject.uid("seg", *names, "dimensions")
    for item in (seg.DimensionOrganizationSequence[0], *seg.DimensionIndexSequence):
        item.DimensionOrganizationUID = uid
    if form is SegForm.LABELMAP:
        # radnode names the background last, since OHIF takes a segment's colour by its place.
        background, *segments = seg.SegmentSequence
        seg.SegmentSequence = [*segments, background]
    # highdicom 0.28 fills odd pixel data with the character 0; PS3.5 8.1.1 asks for the byte 0.
    pixels = int(seg.NumberOfFrames) * seg.Rows * seg.Columns * seg.BitsAllocated
    if -(-pixels // 8) % 2:
        seg.PixelData = seg.PixelData[:-1] + b"\0"
    return seg


def check_sameness(subject: Subject, form: SegForm) -> Dataset:
    """Both ways give the same file; ours as a data set."""
    ours, theirs = (Result("seg", seg).encode() for seg in (make_seg(subject, form), plain_seg(subject, form)))
    read, expected = (dcmread(io.BytesIO(file)) for file in (ours, theirs))
    assert read.keys() == expected.keys()
    assert [element.keyword for element in read if element != expected[element.tag]] == []
    assert ours == theirs
    return read


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("form", SegForm)
def test_highdicom_makes_the_same_file(shared_data: Path, name: str, form: SegForm) -> None:
    check_sameness(make_subject(plan_real(shared_data, name)), form)


@pytest.mark.parametrize("form", SegForm)
def test_highdicom_makes_the_same_file_of_uneven_slices(tmp_path: Path, form: SegForm) -> None:
    check_sameness(make_subject(uneven(tmp_path)), form)


@pytest.mark.parametrize("shape", [(6, 17, 19), (9, 5, 7), (8, 5, 5), (5, 3, 4), (16, 6, 6)])
@pytest.mark.parametrize("form", SegForm)
def test_frames_need_not_fill_whole_bytes(tmp_path: Path, shape: tuple[int, int, int], form: SegForm) -> None:
    """Frames of single bits follow each other without a gap (PS3.5 8.1.1)."""
    subject = small_subject(tmp_path, shape)
    found = read_labelmap(check_sameness(subject, form), subject.source, (FIRST, SECOND))
    assert np.array_equal(found.array, subject.labelmap.array)


@pytest.mark.parametrize("form", SegForm)
def test_one_segment_is_named_once_for_all_frames(tmp_path: Path, form: SegForm) -> None:
    subject = small_subject(tmp_path, (8, 20, 24), segments={FIRST: MANIFEST["segments"][FIRST]})
    labels = np.where(subject.labelmap.array == FIRST, FIRST, 0).astype(np.uint16)
    subject = replace(subject, prediction=replace(subject.labelmap, array=labels))
    seg = check_sameness(subject, form)
    assert "SegmentIdentificationSequence" not in seg.PerFrameFunctionalGroupsSequence[0]
    assert np.array_equal(read_labelmap(seg, subject.source, [FIRST]).array, labels)


def many_segments(folder: Path, count: int) -> Subject:
    """Small segments of labels 1 to `count`, a few in each slice."""
    segments = {label: {"name": f"Part {label}", "type": ["SCT", "39607008", "Lung"]} for label in range(1, count + 1)}
    subject = small_subject(folder, (10, 32, 40), segments=segments)
    labels = np.zeros((10, 32, 40), np.uint16)
    labels[:, ::2] = np.arange(10 * 16 * 40).reshape(10, 16, 40) // 12 % (count + 1)
    return replace(subject, prediction=replace(subject.labelmap, array=labels, probabilities=None))


@pytest.mark.parametrize("form", [SegForm.BINARY, SegForm.LABELMAP])
@pytest.mark.parametrize("count", [104, 255, 256, 300])
def test_many_segments(tmp_path: Path, form: SegForm, count: int) -> None:
    """From 256 on a label map has 16 bits."""
    subject = many_segments(tmp_path, count)
    seg = check_sameness(subject, form)
    assert seg.BitsAllocated == {SegForm.BINARY: 1, SegForm.LABELMAP: 8 if count < 256 else 16}[form]
    assert np.array_equal(read_labelmap(seg, subject.source, range(1, count + 1)).array, subject.labelmap.array)


def test_the_three_forms_are_three_objects_that_number_segments_alike(tmp_path: Path) -> None:
    subject = small_subject(tmp_path, (8, 20, 24))
    segs = [make_seg(subject, form) for form in SegForm]
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID"):
        assert len({str(seg[keyword].value) for seg in segs}) == 3
    assert segs[0].SOPInstanceUID == subject.uid("seg")
    numbers = [{item.SegmentLabel: item.SegmentNumber for item in seg.SegmentSequence} for seg in segs]
    assert numbers == [{"Right lung": 1, "Nodule": 2}, {"Background": 0, "Right lung": 1, "Nodule": 2}, numbers[0]]
    # Segmentation Storage, and Label Map Segmentation Storage (PS3.4 B.5).
    assert [seg.SOPClassUID.rpartition(".1.1.")[2] for seg in segs] == ["66.4", "66.7", "66.4"]
    fractional = segs[2]
    assert (fractional.SegmentationFractionalType, fractional.MaximumFractionalValue) == ("PROBABILITY", 255)


@pytest.mark.parametrize("form", SegForm)
def test_a_seg_is_written_twice_and_looked_into_between(tmp_path: Path, form: SegForm) -> None:
    subject = small_subject(tmp_path, (8, 17, 19))
    result = Result("seg", make_seg(subject, form))
    first = result.encode()
    assert result.dataset.PerFrameFunctionalGroupsSequence[0].FrameContentSequence
    assert np.array_equal(result.dataset.pixel_array, dcmread(io.BytesIO(first)).pixel_array)
    assert result.encode() == first
    assert Result("seg", make_seg(subject, form)).encode() == first


@pytest.mark.parametrize("whence", [io.SEEK_SET, io.SEEK_CUR, io.SEEK_END])
def test_pixels_are_read_from_any_place(tmp_path: Path, whence: int) -> None:
    subject = small_subject(tmp_path, (9, 5, 7))
    stream = make_seg(subject)["PixelData"].value
    whole = stream.read()
    assert len(whole) % 2 == 0
    here = {io.SEEK_SET: 0, io.SEEK_CUR: 11, io.SEEK_END: len(whole)}[whence]
    for start in (3, 0, 40, len(whole) - 1):
        stream.seek(11)
        assert stream.seek(start - here, whence) == start
        assert stream.read(9) == whole[start : start + 9]


def test_a_model_without_probabilities_has_no_fractional_form(tmp_path: Path) -> None:
    subject = small_subject(tmp_path, (8, 20, 24))
    bare = replace(subject, prediction=replace(subject.labelmap, probabilities=None))
    with pytest.raises(OutputRefused, match=r"synthetic gave no probabilities.*BINARY or LABELMAP"):
        make_seg(bare, SegForm.FRACTIONAL)


@pytest.mark.parametrize("form", SegForm)
def test_of_nothing_no_segmentation_is_made(tmp_path: Path, form: SegForm) -> None:
    """A SEG has at least one frame."""
    subject = small_subject(tmp_path, (8, 20, 24))
    nothing = {label: np.zeros((8, 20, 24), np.uint8) for label in (FIRST, SECOND)}
    prediction = replace(subject.labelmap, array=np.zeros((8, 20, 24), np.uint16), probabilities=nothing)
    with pytest.raises(OutputRefused, match=f"found nothing of which a {form.upper()} segmentation"):
        make_seg(replace(subject, prediction=prediction), form)


def test_a_segment_without_probabilities_has_no_frames(tmp_path: Path) -> None:
    subject = small_subject(tmp_path, (8, 20, 24))
    assert subject.labelmap.probabilities is not None
    only = {SECOND: subject.labelmap.probabilities[SECOND]}
    seg = write_seg(
        replace(subject, prediction=replace(subject.labelmap, probabilities=only)),
        tmp_path / "seg.dcm",
        SegForm.FRACTIONAL,
    )
    numbers = {
        groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        for groups in seg.PerFrameFunctionalGroupsSequence
    }
    assert numbers == {2}
    assert len(seg.SegmentSequence) == 2


def test_pixels_beyond_four_gigabytes_are_refused(tmp_path: Path) -> None:
    """Pixel Data has a length of 32 bits; the arrays here are views of one byte."""
    subject = small_subject(tmp_path, (8, 20, 24))
    source = replace(subject.source, array=np.broadcast_to(np.float32(0), (8, 20000, 20000)))
    certain = np.broadcast_to(np.uint8(255), (8, 20000, 20000))
    labels = np.broadcast_to(np.uint16(FIRST), (8, 20000, 20000))
    prediction = Labelmap(labels, subject.labelmap.grid, probabilities={FIRST: certain, SECOND: certain})
    with pytest.raises(OutputRefused, match=r"FRACTIONAL segmentation of 16 frames .* does not fit .*4 GiB"):
        make_seg(replace(subject, source=source, prediction=prediction), SegForm.FRACTIONAL)


def test_of_two_segments_that_are_half_there_the_stronger_is_read_back(tmp_path: Path) -> None:
    subject = small_subject(tmp_path, (2, 4, 5))
    maps = {label: np.zeros((2, 4, 5), np.uint8) for label in (FIRST, SECOND)}
    maps[FIRST][0, 0] = (127, 128, 200, 130, 255)
    maps[SECOND][0, 0] = (126, 0, 199, 131, 0)
    prediction = replace(subject.labelmap, probabilities=maps)
    seg = write_seg(replace(subject, prediction=prediction), tmp_path / "seg.dcm", SegForm.FRACTIONAL)
    found = read_labelmap(seg, subject.source, (FIRST, SECOND)).array
    assert found[0, 0].tolist() == [0, FIRST, FIRST, SECOND, FIRST]
    assert not found[0, 1:].any()
    assert not found[1].any()


@pytest.mark.parametrize("name", REGULAR)
def test_highdicom_reads_the_label_map_form(shared_data: Path, tmp_path: Path, name: str) -> None:
    subject = make_subject(plan_real(shared_data, name))
    write_seg(subject, tmp_path / "seg.dcm", SegForm.LABELMAP)
    seg = hd.seg.segread(tmp_path / "seg.dcm")
    volume = seg.get_volume(combine_segments=True)
    found = {
        tuple(point) for point in np.round(volume.map_indices_to_reference(np.argwhere(volume.array == 2)), 2).tolist()
    }
    wanted = np.argwhere(subject.labelmap.array == SECOND)[:, ::-1].astype(float)
    assert found == {tuple(point) for point in np.round(subject.volume.grid.to_lps(wanted), 2).tolist()}


@pytest.mark.parametrize("name", REGULAR)
def test_dcmqi_reads_the_label_map_form(shared_data: Path, tmp_path: Path, name: str) -> None:
    """dcmqi 1.5.7 knows it, other than DCMTK 3.6.7 and Debian's dciodvfy."""
    subject = make_subject(plan_real(shared_data, name))
    write_seg(subject, tmp_path / "seg.dcm", SegForm.LABELMAP)
    run("segimage2itkimage", "--inputDICOM", tmp_path / "seg.dcm", "--outputDirectory", tmp_path, "-t", "nrrd")
    files = sorted(tmp_path.glob("*.nrrd"))
    assert files
    values = [sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in files]
    for number, label in ((1, FIRST), (2, SECOND)):
        count = max(np.count_nonzero(array == number) for array in values)
        assert count == np.count_nonzero(subject.labelmap.array == label)
