"""Parametric maps of every geometry, judged by dciodvfy, dcmqi and highdicom."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset

from node.dicom.frames import FrameHeaders
from node.dicom.volume import Image, Volume
from node.infer.results import Scores
from node.infer.saliency import Explained, Saliency
from node.report.kinds import Kind
from node.report.parametric import Form, make_maps, make_saliency_maps
from node.report.results import Result
from node.report.subject import Subject
from tests.report.cases import FIRST, SECOND, plan_series, run
from tests.report.predictions import DENSITY, read_planar
from tests.report.predictions import make_subject as make_scored
from tests.report.readers import codes_in, unknown_codes
from tests.report.test_seg_geometry import INHERITED, make_subject, plan_real

VOLUMES = ["siemens_ct", "tilted_ct", "enhanced_mr", "enhanced_asl", "enhanced_mr_philips"]
IMAGES = ["mammogram", "ultrasound_clip", "photograph", "radiograph"]


def soft(shape: tuple[int, int, int], label: int) -> NDArray[np.uint8]:
    """Probabilities that fall off from a middle that no flip keeps, on some of the slices."""
    places = np.indices(shape, dtype=np.float32).reshape(3, -1).T
    middle = np.array(shape) * ((0.4, 0.3, 0.35) if label == FIRST else (0.6, 0.6, 0.7))
    reach = np.maximum(np.array(shape) * 0.25, 1)
    away = (((places - middle) / reach) ** 2).sum(axis=1).reshape(shape)
    return np.rint(255 * np.clip(1.2 - away, 0, 1)).astype(np.uint8)


def probable(shared_data: Path, name: str) -> Subject:
    plan = plan_series(shared_data, name) if name.endswith("siemens_ct") else plan_real(shared_data, name)
    subject = make_subject(plan)
    shape = subject.source.array.shape[:3]
    found = {label: soft(shape, label) for label in (SECOND, FIRST)}
    return replace(subject, prediction=replace(subject.labelmap, probabilities=found))


def write(made: Dataset, path: Path) -> Dataset:
    path.write_bytes(Result("map", made).encode())
    return dcmread(path)


def errors(file: Path) -> set[str]:
    done = subprocess.run(["dciodvfy", "-new", str(file)], capture_output=True, text=True, timeout=120, check=False)
    said = (done.stdout + done.stderr).splitlines()
    assert "ParametricMap" in said, said
    return {line.removeprefix("Error - ").split(" = <")[0] for line in said if line.startswith("Error")}


def inherited(name: str) -> set[str]:
    return {error.split(" - ")[0] for error in INHERITED.get(name, ())}


def voxels(made: Dataset) -> NDArray[np.number]:
    """The stored values (frames, rows, columns)."""
    keyword, dtype = ("FloatPixelData", "<f4") if "FloatPixelData" in made else ("PixelData", "<u2")
    return np.frombuffer(made[keyword].value, dtype).reshape(-1, made.Rows, made.Columns)


def meant(made: Dataset) -> NDArray[np.float64]:
    """What the stored values stand for, by the real world value mapping."""
    (mapping,) = made.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence
    return voxels(made).astype(np.float64) * float(mapping.RealWorldValueSlope) + float(mapping.RealWorldValueIntercept)


def check_sources(made: Dataset, subject: Subject, slices: range) -> None:
    """Each frame refers to the slice that it is of, and lies where that lies."""
    headers = {str(header.SOPInstanceUID): header for header in subject.sources}
    groups = made.PerFrameFunctionalGroupsSequence
    assert len(groups) == len(slices)
    for group, index in zip(groups, slices, strict=True):
        ref = subject.source_slices[index]
        (item,) = group.DerivationImageSequence[0].SourceImageSequence
        assert (item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID) == (ref.sop_class_uid, ref.sop_instance_uid)
        assert item.get("ReferencedFrameNumber") == ref.frame
        if isinstance(subject.source, Volume):
            header = headers[ref.sop_instance_uid]
            own = header if ref.frame is None else FrameHeaders(header)[ref.frame]
            assert group.PlanePositionSequence[0].ImagePositionPatient == own.ImagePositionPatient
    (series,) = made.ReferencedSeriesSequence
    told = {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence}
    assert told == {ref.sop_instance_uid for ref in subject.source_slices}


@pytest.mark.parametrize("form", ["float", "integer"])
@pytest.mark.parametrize("name", VOLUMES + IMAGES)
def test_probabilities_come_back_value_for_value_on_their_slices(
    shared_data: Path, tmp_path: Path, name: str, form: Form
) -> None:
    subject = probable(shared_data, name)
    maps = make_maps(subject, form)
    assert len(maps) == 2
    assert len({made.SOPInstanceUID for made in maps}) == 2
    assert {made.SeriesInstanceUID for made in maps} == {subject.uid("map", "series")}
    for number, (made, label) in enumerate(zip(maps, (FIRST, SECOND), strict=True), 1):
        written = write(made, tmp_path / f"{number}.dcm")
        values = (subject.labelmap.probabilities or {})[label]
        filled = np.flatnonzero(values.any(axis=(1, 2)))
        slices = range(filled[0], filled[-1] + 1)
        assert np.abs(meant(written) - values[slices.start : slices.stop] / 255).max() < 1e-6
        check_sources(written, subject, slices)
        assert written.InstanceNumber == number
        assert written.SeriesNumber == subject.series_number(Kind.MAP)
        assert (written.ContentLabel, written.ContentQualification) == ("AI_UNVERIFIED", "RESEARCH")
        assert not unknown_codes(codes_in(written))
    assert {error.split(" - ")[0] for error in errors(tmp_path / "1.dcm")} <= inherited(name)


@pytest.mark.parametrize("name", VOLUMES)
def test_dcmqi_reads_the_same_values_in_the_same_place(shared_data: Path, tmp_path: Path, name: str) -> None:
    subject = probable(shared_data, name)
    write(make_maps(subject)[1], tmp_path / "map.dcm")
    run("paramap2itkimage", "--inputDICOM", tmp_path / "map.dcm", "--outputDirectory", tmp_path)
    image = sitk.ReadImage(os.fspath(tmp_path / "pmap.nrrd"))
    values = (subject.labelmap.probabilities or {})[SECOND]
    filled = np.flatnonzero(values.any(axis=(1, 2)))
    assert np.abs(sitk.GetArrayFromImage(image) - values[filled[0] : filled[-1] + 1] / 255).max() < 1e-6
    assert isinstance(subject.source, Volume)
    grid, positions = subject.source.grid, subject.source.positions_lps
    start = grid.to_lps(np.array([[0, 0, filled[0]]]))[0] if positions is None else positions[filled[0]]
    assert np.allclose(image.GetOrigin(), start, atol=1e-3)
    for axis in (0, 1):
        step = np.array(image.GetDirection()).reshape(3, 3)[:, axis] * image.GetSpacing()[axis]
        assert np.allclose(step, grid.affine_lps[:3, axis], atol=1e-4)


def test_highdicom_reads_it_and_what_it_stands_for(shared_data: Path, tmp_path: Path) -> None:
    subject = probable(shared_data, "siemens_ct")
    write(make_maps(subject)[1], tmp_path / "map.dcm")
    read = hd.pm.ParametricMap.from_dataset(dcmread(tmp_path / "map.dcm"))
    (mapping,) = read.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence
    said = {
        item.ConceptNameCodeSequence[0].CodeMeaning: item.ConceptCodeSequence[0].CodeMeaning
        for item in mapping.QuantityDefinitionSequence
    }
    assert said == {
        "Quantity": "Fractional Probabilistic Segmentation",
        "Finding": "Nodule",
        "Finding Site": "Lung",
    }
    assert mapping.LUTExplanation == "Probability of Nodule"
    (anatomy,) = read.SharedFunctionalGroupsSequence[0].FrameAnatomySequence
    assert (anatomy.FrameLaterality, anatomy.AnatomicRegionSequence[0].CodeMeaning) == ("L", "Lung")
    volume = read.get_volume()
    values = (subject.labelmap.probabilities or {})[SECOND]
    assert float(volume.array.max()) == pytest.approx(values.max() / 255)


def test_the_same_subject_makes_the_same_bytes(shared_data: Path) -> None:
    subject = probable(shared_data, "enhanced_asl")
    once, again = ([Result("map", made).encode() for made in make_maps(subject)] for _ in range(2))
    assert once == again


def test_without_probabilities_there_is_no_map(shared_data: Path) -> None:
    subject = make_subject(plan_real(shared_data, "enhanced_asl"))
    assert make_maps(replace(subject, prediction=replace(subject.labelmap, probabilities=None))) == []
    nowhere = {FIRST: np.zeros(subject.labelmap.array.shape, np.uint8)}
    assert make_maps(replace(subject, prediction=replace(subject.labelmap, probabilities=nowhere))) == []


def saliency_of(source: Volume | Image, frames: Mapping[int | None, int]) -> Saliency:
    """Drops from below 0 to above it, of a class for each frame."""
    shape = source.array.shape[:3]
    ramp = np.linspace(-0.2, 0.8, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    parts = [
        Explained(label, 0.61, frame, ramp if frame is None else ramp[frame : frame + 1])
        for frame, label in frames.items()
    ]
    return Saliency(tuple(parts), (8, 8), "local mean", 64)


@pytest.mark.parametrize("form", ["float", "integer"])
def test_saliency_of_a_mammogram(shared_data: Path, tmp_path: Path, form: Form) -> None:
    image, headers = read_planar(shared_data / "planar" / "mg_mammo.dcm")
    subject = make_scored(image, headers, Scores(({0: 0.04, 1: 0.23, 2: 0.61, 3: 0.12},)), DENSITY)
    saliency = saliency_of(image, {0: 2})
    (made,) = make_saliency_maps(subject, saliency, form)
    written = write(made, tmp_path / "map.dcm")
    assert np.abs(meant(written) - saliency.parts[0].drops).max() < 2e-5
    check_sources(written, subject, range(1))
    assert errors(tmp_path / "map.dcm") == set()
    (mapping,) = written.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence
    quantity = mapping.QuantityDefinitionSequence[0].ConceptCodeSequence[0]
    assert (quantity.CodeValue, quantity.CodingSchemeDesignator, quantity.CodeMeaning) == ("130404", "DCM", "Saliency")
    assert mapping.LUTExplanation == "Score drop when occluded: Heterogeneously dense"
    assert written.ContentDescription == "occlusion, 8 x 8 patches, score 0.610 of Heterogeneously dense"
    assert not unknown_codes(codes_in(written))
    (window,) = written.SharedFunctionalGroupsSequence[0].FrameVOILUTSequence
    black = 0.0 if form == "float" else 32767.0
    assert float(window.WindowCenter) - float(window.WindowWidth) / 2 == pytest.approx(black), "no drop is black"
    assert [float(size) for size in image.spacing_mm or ()] == pytest.approx(
        written.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
    )


def test_saliency_of_frames_of_a_clip(shared_data: Path, tmp_path: Path) -> None:
    image, headers = read_planar(shared_data / "planar" / "us_colour_multiframe.dcm")
    scores = Scores(tuple({0: 0.4, 1: 0.6, 2: 0.0, 3: 0.0} for _ in image.frames))
    subject = make_scored(image, headers, scores, DENSITY)
    maps = make_saliency_maps(subject, saliency_of(image, {4: 1, 11: 0}))
    for frame, made in zip((4, 11), maps, strict=True):
        check_sources(write(made, tmp_path / f"{frame}.dcm"), subject, range(frame, frame + 1))
        assert errors(tmp_path / f"{frame}.dcm") == set()
    assert [made.InstanceNumber for made in maps] == [1, 2]
    assert len({made.SOPInstanceUID for made in maps}) == 2


def test_saliency_of_a_volume(shared_data: Path, tmp_path: Path) -> None:
    subject = make_subject(plan_real(shared_data, "enhanced_asl"))
    scored = make_scored(subject.source, subject.sources, Scores(({0: 0.1, 1: 0.9, 2: 0.0, 3: 0.0},)), DENSITY)
    saliency = saliency_of(subject.source, {None: 1})
    (made,) = make_saliency_maps(scored, saliency)
    written = write(made, tmp_path / "map.dcm")
    assert np.array_equal(meant(written), saliency.parts[0].drops)
    check_sources(written, scored, range(len(subject.source_slices)))
    assert errors(tmp_path / "map.dcm") == set()
