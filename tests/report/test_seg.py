"""The SEG, judged by dcmqi, SimpleITK, highdicom's reader and dciodvfy."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.dataset import Dataset

from node.report.readback import read_labelmap
from tests.report.cases import (
    CREATED,
    FIRST,
    MANIFEST,
    SECOND,
    Case,
    dciodvfy_errors,
    draw_mask,
    make_case,
    make_package,
    plan_series,
    run,
)
from tests.report.conftest import CaseOf

# What dciodvfy finds in our objects because the source images have it and it is copied with the patient and the study.
INHERITED = {
    "brain_mr": {
        "</PatientAge(0010,1010)[1]> - Value invalid for this VR [AS] - Length invalid for this VR - expected == 4"
    },
    "sarcoma_mr": {
        "</StudyID(0020,0010)[1]> - Value invalid for this VR [SH] - Length invalid for this VR - expected <= 16"
    },
    "sarcoma_pet": {
        "</StudyID(0020,0010)[1]> - Value invalid for this VR [SH] - Length invalid for this VR - expected <= 16"
    },
}
COPIED = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyTime",
    "StudyID", "AccessionNumber", "ReferringPhysicianName", "FrameOfReferenceUID",
)  # fmt: skip


def source_image(case: Case) -> sitk.Image:
    """The source series as SimpleITK reads it, on its own."""
    reader = sitk.ImageSeriesReader()
    names = reader.GetGDCMSeriesFileNames(str(case.plan.paths[0].parent), case.plan.series_uid)
    reader.SetFileNames(names)
    return reader.Execute()


def code_of(item: Dataset) -> tuple[str, str, str]:
    return item.CodingSchemeDesignator, item.CodeValue, item.CodeMeaning


def test_dcmqi_reads_our_mask_on_the_grid_of_the_source(case: Case, tmp_path: Path) -> None:
    image = source_image(case)
    values = sitk.GetArrayFromImage(image)
    if case.plan.header.get("PixelPaddingValue") == -2000:  # GE; padding is air here, which SimpleITK knows nothing of
        values[values == -3024] = -1024
    assert np.allclose(values, case.volume.array, rtol=1e-6, atol=0)
    run("segimage2itkimage", "--inputDICOM", case.files["seg"], "--outputDirectory", tmp_path, "-t", "nrrd")
    attributes = json.loads((tmp_path / "meta.json").read_text())["segmentAttributes"]
    numbers = {segment["SegmentLabel"]: segment["labelID"] for group in attributes for segment in group}
    assert numbers == {"Right lung": 1, "Nodule": 2}
    for label, number in ((FIRST, 1), (SECOND, 2)):
        segment = sitk.ReadImage(str(tmp_path / f"{number}.nrrd"))
        assert segment.GetSpacing() == pytest.approx(image.GetSpacing(), abs=1e-4)
        assert segment.GetDirection() == pytest.approx(image.GetDirection(), abs=1e-5)
        # dcmqi leaves out empty slices at the ends, so its origin may be that of a later slice.
        start = np.array(image.TransformPhysicalPointToContinuousIndex(segment.GetOrigin()))
        assert start == pytest.approx(np.round(start), abs=2e-3)
        column, row, first = np.round(start).astype(int)
        assert (column, row) == (0, 0)
        found = np.zeros(case.labels.shape, bool)
        voxels = sitk.GetArrayFromImage(segment) > 0
        found[first : first + len(voxels)] = voxels
        wanted = case.labels == label
        assert wanted.any()
        assert np.array_equal(found, wanted), f"{np.count_nonzero(found != wanted)} voxels differ"


def test_highdicom_and_our_own_reader_read_our_mask(case: Case) -> None:
    array = case.labels
    seg = hd.seg.segread(case.files["seg"])
    uids = [str(header.SOPInstanceUID) for header in case.plan.headers]
    pixels = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    assert np.array_equal(pixels[..., 0] > 0, array == FIRST)
    assert np.array_equal(pixels[..., 1] > 0, array == SECOND)
    ours = read_labelmap(dcmread(case.files["seg"]), case.volume, (FIRST, SECOND)).array
    assert np.array_equal(ours, array)


def test_every_frame_refers_to_the_image_at_its_position(case: Case) -> None:
    seg = dcmread(case.files["seg"])
    headers = {str(header.SOPInstanceUID): header for header in case.plan.headers}
    array = case.labels
    expected = {
        (uid, number)
        for uid, labels in zip(headers, array, strict=True)
        for number, label in ((1, FIRST), (2, SECOND))
        if (labels == label).any()
    }
    found = []
    for groups in seg.PerFrameFunctionalGroupsSequence:
        (source,) = groups.DerivationImageSequence[0].SourceImageSequence
        header = headers[source.ReferencedSOPInstanceUID]
        assert source.ReferencedSOPClassUID == header.SOPClassUID
        position = groups.PlanePositionSequence[0].ImagePositionPatient
        assert list(position) == pytest.approx(list(header.ImagePositionPatient), abs=1e-6)
        found.append(
            (
                str(source.ReferencedSOPInstanceUID),
                int(groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber),
            )
        )
    assert len(found) == len(set(found)) == seg.NumberOfFrames
    assert set(found) == expected
    (series,) = seg.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == case.plan.series_uid
    assert {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence} >= {uid for uid, _ in found}


def test_dciodvfy_finds_only_what_the_source_already_had(case: Case, request: pytest.FixtureRequest) -> None:
    inherited = INHERITED.get(request.node.callspec.params["case"], set())
    assert inherited <= dciodvfy_errors(case.plan.paths[0]), "listed as inherited, but the source does not have it"
    assert dciodvfy_errors(case.files["seg"]) == inherited
    assert dciodvfy_errors(case.files["sr"]) == inherited


def test_patient_study_and_frame_of_reference_are_the_source_s(case: Case) -> None:
    seg, source = dcmread(case.files["seg"]), case.plan.header
    for keyword in COPIED:
        assert keyword in seg, keyword
        assert str(seg[keyword].value or "") == str(source.get(keyword) or ""), keyword
    assert seg.SeriesInstanceUID != case.plan.series_uid


def test_what_says_who_made_it(case_of: CaseOf) -> None:
    case = case_of("siemens_ct")
    seg = dcmread(case.files["seg"])
    assert seg.SegmentationType == "BINARY"
    assert seg.SOPClassUID == "1.2.840.10008.5.1.4.1.1.66.4"
    assert (seg.Manufacturer, seg.ManufacturerModelName) == ("radnode", "synthetic 1.2.3")
    assert seg.SoftwareVersions == f"radnode {case.analysis.subject.node_version}"
    assert seg.DeviceSerialNumber == "0123456789abcdef"
    assert seg.SeriesNumber == 901
    assert seg.SeriesDescription.startswith("AI ")
    assert "unverified" in seg.SeriesDescription.lower()
    assert seg.ContentLabel == "AI_UNVERIFIED"
    first, second = seg.SegmentSequence
    assert [first.SegmentNumber, second.SegmentNumber] == [1, 2]
    assert [first.SegmentLabel, second.SegmentLabel] == ["Right lung", "Nodule"]
    for segment in (first, second):
        assert segment.SegmentAlgorithmType == "AUTOMATIC"
        assert segment.SegmentAlgorithmName == "synthetic"
        algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("synthetic", "1.2.3")
        family = algorithm.AlgorithmFamilyCodeSequence[0]
        assert code_of(family) == ("DCM", "123110", "Artificial Intelligence")
        assert "0123456789abcdef" * 4 in str(algorithm.AlgorithmParameters)
    assert code_of(first.SegmentedPropertyCategoryCodeSequence[0]) == ("SCT", "91723000", "Anatomical Structure")
    assert code_of(first.SegmentedPropertyTypeCodeSequence[0]) == ("SCT", "39607008", "Lung")
    modifier = first.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert code_of(modifier) == ("SCT", "24028007", "Right")
    assert code_of(second.SegmentedPropertyTypeCodeSequence[0]) == ("SCT", "27925004", "Nodule")
    assert code_of(second.AnatomicRegionSequence[0]) == ("SCT", "39607008", "Lung")


def test_laterality_of_a_finding_modifies_its_region(case_of: CaseOf) -> None:
    second = dcmread(case_of("siemens_ct").files["seg"]).SegmentSequence[1]
    assert "SegmentedPropertyTypeModifierCodeSequence" not in second.SegmentedPropertyTypeCodeSequence[0]
    modifier = second.AnatomicRegionSequence[0].AnatomicRegionModifierSequence[0]
    assert code_of(modifier) == ("SCT", "7771000", "Left")


def test_colours_are_the_manifest_s_or_chosen(case_of: CaseOf, tmp_path: Path) -> None:
    case = case_of("siemens_ct")
    first, second = dcmread(case.files["seg"]).SegmentSequence
    # PS3.3 C.10.7.1.1: L* 0 to 100 and a*, b* -128 to 127, each over 0 to 65535.
    lab = [72.0 / 100 * 65535, (-22.0 + 128) / 255 * 65535, (-32.0 + 128) / 255 * 65535]
    assert first.RecommendedDisplayCIELabValue == pytest.approx(lab, abs=1)
    assert second.RecommendedDisplayCIELabValue != first.RecommendedDisplayCIELabValue
    run("segimage2itkimage", "--inputDICOM", case.files["seg"], "--outputDirectory", tmp_path, "-t", "nrrd")
    groups = json.loads((tmp_path / "meta.json").read_text())["segmentAttributes"]
    shown = {segment["SegmentLabel"]: segment["recommendedDisplayRGBValue"] for group in groups for segment in group}
    assert shown["Nodule"] == pytest.approx([230, 159, 0], abs=12)  # the second of the colours for those without one


def test_one_absent_segment_is_described_and_has_no_frame(case_of: CaseOf, tmp_path: Path) -> None:
    plan = case_of("siemens_ct").plan
    mask = draw_mask(plan.grid.shape)
    mask[mask == SECOND] = 0
    case = make_case(plan, mask, tmp_path)
    seg = dcmread(case.files["seg"])
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == ["Right lung", "Nodule"]
    numbers = {
        group.SegmentIdentificationSequence[0].ReferencedSegmentNumber for group in seg.PerFrameFunctionalGroupsSequence
    }
    assert numbers == {1}
    assert not dciodvfy_errors(case.files["seg"])
    run("segimage2itkimage", "--inputDICOM", case.files["seg"], "--outputDirectory", tmp_path, "-t", "nrrd")


def test_times_are_in_the_source_s_time_zone(shared_data: Path, tmp_path: Path) -> None:
    """One offset holds for every time of a data set (PS3.3 C.12.1.1.8), so also for the copied time of the study."""
    plan = plan_series(shared_data, "siemens_ct")
    for header in plan.headers:
        header.TimezoneOffsetFromUTC = "-0330"
    try:
        case = make_case(plan, draw_mask(plan.grid.shape), tmp_path)
    finally:
        for header in plan.headers:
            del header.TimezoneOffsetFromUTC
    there = CREATED.astimezone(timezone(timedelta(hours=-3, minutes=-30)))
    for file in case.files.values():
        dataset = dcmread(file)
        assert dataset.TimezoneOffsetFromUTC == "-0330"
        assert dataset.StudyTime == plan.header.StudyTime
        stamp = dataset.ContentDate + dataset.ContentTime
        assert datetime.strptime(stamp + "-0330", "%Y%m%d%H%M%S.%f%z") == CREATED
        assert dataset.InstanceCreationTime == there.strftime("%H%M%S.%f")


def test_no_time_zone_is_claimed_for_a_source_that_says_none(case: Case) -> None:
    assert "TimezoneOffsetFromUTC" not in case.plan.header
    for file in case.files.values():
        assert "TimezoneOffsetFromUTC" not in dcmread(file)


def test_a_label_without_colour_or_laterality_is_written(case_of: CaseOf, tmp_path: Path) -> None:
    plan = case_of("siemens_ct").plan
    bare = {label: {"name": f"Part {label}", "type": ["SCT", "39607008", "Lung"]} for label in MANIFEST["segments"]}
    case = make_case(plan, draw_mask(plan.grid.shape), tmp_path, package=make_package(segments=bare))
    colors = [tuple(s.RecommendedDisplayCIELabValue) for s in dcmread(case.files["seg"]).SegmentSequence]
    assert len(set(colors)) == 2
    assert not dciodvfy_errors(case.files["seg"])
