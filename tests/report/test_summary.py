"""The summary page as a DICOM object: valid, identified by its header, with the report's numbers, in any language."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from node.infer.manifest import Manifest
from node.infer.results import Boxes, Labelmap, Landmark, Landmarks, Scores
from node.report.colors import finding_colors, to_rgb
from node.report.findings import Findings, measure
from node.report.house import House, Language
from node.report.kinds import Kind
from node.report.layout import BANNER, HEIGHT, WARNING, WIDTH, render_page
from node.report.negative import NoResult, make_negative
from node.report.results import Result, make_results
from node.report.subject import Subject
from node.report.summary import make_negative_summary, make_summary
from node.report.words import CATALOGUE, show_number
from tests.report.cases import CREATED, MANIFEST, draw_mask
from tests.report.pictures import decoded, errors_of, recorded, write
from tests.report.predictions import (
    DENSITY,
    LANDMARKS,
    classify_breast,
    detect,
    make_subject,
    mark_head,
    read_case,
    read_planar,
)
from tests.report.readers import items
from tests.report.test_negative import SENTENCES, make_origin

LANGUAGES = get_args(Language)
SIGMOID = DENSITY | {"score_min": 0.9}


def segment(shared_data: Path, name: str = "siemens_ct") -> Subject:
    plan, volume = read_case(shared_data, name)
    return make_subject(volume, plan.headers, Labelmap(draw_mask(volume.grid.shape), volume.grid), MANIFEST)


def segment_nothing(shared_data: Path) -> Subject:
    subject = segment(shared_data)
    empty = Labelmap(np.zeros(subject.volume.grid.shape, np.uint16), subject.volume.grid)
    return dataclasses.replace(subject, prediction=empty)


def detect_nothing(shared_data: Path) -> Subject:
    return dataclasses.replace(detect(shared_data), prediction=Boxes(()))


def mark_photo(shared_data: Path) -> Subject:
    image, headers = read_planar(shared_data / "planar" / "xc_photo.dcm")
    return make_subject(image, headers, Landmarks((Landmark(1, 0, 300, 300), Landmark(3, 0, 100, 500))), LANDMARKS)


def judge_frames(shared_data: Path) -> Subject:
    image, headers = read_planar(shared_data / "planar" / "us_colour_multiframe.dcm")
    count = len(image.frames)
    scores = Scores(tuple({0: number / count, 1: 1 - number / count} for number in range(count)))
    return make_subject(image, headers, scores, DENSITY)


def judge_nothing(shared_data: Path) -> Subject:
    image, headers = read_planar(shared_data / "planar" / "mg_mammo.dcm")
    return make_subject(image, headers, Scores(({0: 0.04, 1: 0.23, 2: 0.1, 3: 0.2},), exclusive=False), SIGMOID)


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    made.__name__: made
    for made in (segment, segment_nothing, detect, detect_nothing, mark_head, mark_photo, classify_breast, judge_frames)
}


def speak(subject: Subject, language: Language) -> Subject:
    return dataclasses.replace(subject, house=House(language=language))


@pytest.mark.parametrize("kind", SUBJECTS)
def test_every_kind_makes_a_valid_page_that_others_read(shared_data: Path, tmp_path: Path, kind: str) -> None:
    findings = measure(SUBJECTS[kind](shared_data))
    file = write(make_summary(findings), tmp_path / "summary.dcm")
    assert not errors_of(file)
    pixels = decoded(file)
    assert (pixels == np.asarray(render_page(findings))).all()
    assert pixels.shape[1] == WIDTH
    assert pixels.shape[0] <= HEIGHT
    banner = (pixels[:BANNER] == WARNING).all(axis=2)
    assert banner.mean() > 0.8
    assert (~banner).mean() > 0.01  # its letters


def test_the_header_identifies_it_and_says_where_it_comes_from(shared_data: Path) -> None:
    subject = segment(shared_data)
    page, source = make_summary(measure(subject)), subject.sources[0]
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID", "StudyDate", "AccessionNumber"):
        assert str(page.get(keyword) or "") == str(source.get(keyword) or ""), keyword
    assert (page.SOPInstanceUID, page.SeriesInstanceUID) == (subject.uid("summary"), subject.uid("summary", "series"))
    assert page.SeriesNumber == subject.series_number(Kind.SUMMARY)
    assert page.SeriesDescription == subject.series_description(Kind.SUMMARY)
    assert (page.Modality, page.ConversionType, list(page.ImageType)) == ("OT", "WSD", ["DERIVED", "SECONDARY"])
    assert page.DateOfSecondaryCapture == page.ContentDate == CREATED.strftime("%Y%m%d")
    assert page.BurnedInAnnotation == "NO"
    named = [item.ReferencedSOPInstanceUID for item in page.SourceImageSequence]
    assert named == [reference.sop_instance_uid for reference in subject.source_slices]
    (model,) = (item for item in page.ContributingEquipmentSequence if item.Manufacturer == "radnode")
    assert model.ManufacturerModelName == "synthetic 1.2.3"
    assert subject.model_digest in model.ContributionDescription


@pytest.mark.parametrize(
    ("said", "modality", "known"),
    [("YES", "CT", "YES"), ("NO", "US", "NO"), (None, "CT", "NO"), (None, "US", None)],
)
def test_burned_in_annotation_is_what_the_images_say(
    shared_data: Path, said: str | None, modality: str, known: str | None
) -> None:
    subject = mark_photo(shared_data)
    header = subject.sources[0][:]
    del header.Modality
    header.Modality = modality
    if "BurnedInAnnotation" in header:
        del header.BurnedInAnnotation
    if said:
        header.BurnedInAnnotation = said
    page = make_summary(measure(dataclasses.replace(subject, sources=(header,))))
    assert page.get("BurnedInAnnotation") == known


def test_frames_of_one_instance_are_referred_to_as_such(shared_data: Path) -> None:
    (item,) = make_summary(measure(judge_frames(shared_data))).SourceImageSequence
    assert list(item.ReferencedFrameNumber) == list(range(1, 31))


@pytest.mark.parametrize("kind", SUBJECTS)
def test_the_same_findings_are_the_same_bytes(shared_data: Path, kind: str) -> None:
    first, second = (Result("summary", make_summary(measure(SUBJECTS[kind](shared_data)))).encode() for _ in range(2))
    assert first == second


def test_another_job_is_another_object(shared_data: Path) -> None:
    subject = segment(shared_data)
    other = dataclasses.replace(subject, key="another")
    assert make_summary(measure(subject)).SOPInstanceUID != make_summary(measure(other)).SOPInstanceUID


def reported(findings: Findings) -> list[float]:
    """Every number of the report's measurement groups."""
    (report,) = (result.dataset for result in make_results(findings) if result.kind == "sr")
    return [
        float(item.MeasuredValueSequence[0].NumericValue)
        for item in items(report)
        if item.ValueType == "NUM" and item.get("RelationshipType") == "CONTAINS"
    ]


def test_the_numbers_are_the_report_s_to_the_digit_shown(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = measure(segment(shared_data))
    numbers = reported(findings)
    assert len(numbers) == 10
    texts = recorded(monkeypatch)
    make_summary(findings)
    rows = [row for measured in findings.measurements for row in measured.rows()]
    for number, row in zip(numbers, rows, strict=True):
        text = show_number(row["value"], row["unit"])
        assert text in texts
        decimals = len(text.partition(".")[2])
        assert text == f"{number:.{decimals}f}"


def test_certainties_are_the_report_s_too(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = classify_breast(shared_data)
    scores = {0: 0.0404999, 1: 0.2394501, 2: 0.61, 3: 0.11}
    findings = measure(dataclasses.replace(subject, prediction=Scores((scores,))))
    texts = recorded(monkeypatch)
    make_summary(findings)
    for number in reported(findings):
        assert f"{number:.1f} %" in texts


def test_segments_are_drawn_in_the_seg_s_colours(shared_data: Path) -> None:
    subject = segment(shared_data)
    pixels = make_summary(measure(subject)).pixel_array
    for color in finding_colors(subject.manifest).values():
        assert (pixels == to_rgb(color)).all(axis=2).sum() > 400


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_page_speaks_the_house_s_language(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, language: Language
) -> None:
    words = CATALOGUE[language]
    texts = recorded(monkeypatch)
    make_summary(measure(speak(segment(shared_data), language)))
    assert {words.series, words.images, words.acquisition, words.analysis, words.finding, words.coronal} <= set(texts)
    assert f"{words.volume} mL" in texts
    assert any(text.startswith(f"{words.slice} ") for text in texts)
    assert "Right lung" in texts  # as the manifest has it


def test_the_series_is_named(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = recorded(monkeypatch)
    make_summary(measure(segment(shared_data)))
    assert "3: ThoraxRoutine 8.0.0 B40f" in texts
    assert "CT, 30 slices, thickness 8 mm, spacing 8 mm, kernel B40f" in texts
    assert "2007-04-25 17:35" in texts
    assert "slice 26 (image 5)" in texts  # the number in the array and the one that viewers show


def test_who_the_patient_is_stands_in_no_pixel(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A description may hold the name: it is left out of the picture."""
    subject = segment(shared_data)
    header = subject.sources[0][:]
    changed = {
        "PatientName": "Vanderberg^Anna-Lena",
        "PatientID": "4711-A",
        "SeriesDescription": "Thorax vanderberg 4711-A",
    }
    for keyword, value in changed.items():
        if keyword in header:
            delattr(header, keyword)
        setattr(header, keyword, value)
    texts = recorded(monkeypatch)
    make_summary(measure(dataclasses.replace(subject, sources=(header, *subject.sources[1:]))))
    assert "3: Thorax ... ..." in texts
    assert not [text for text in texts if re.search("vanderberg|4711", text, re.IGNORECASE)]


@pytest.mark.parametrize("made", [segment_nothing, detect_nothing, judge_nothing])
def test_nothing_found_is_said_aloud_and_is_no_missing_result(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, made: Callable[[Path], Subject]
) -> None:
    subject = made(shared_data)
    texts = recorded(monkeypatch)
    make_summary(measure(speak(subject, "de")))
    assert "Ausgewertet: nichts gefunden" in texts
    assert not any("Kein Ergebnis" in text for text in texts)


def test_what_the_model_says_nothing_of_is_not_called_absent(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = judge_nothing(shared_data)
    partly = Scores(({0: 0.04, 1: 0.23},), exclusive=False)
    texts = recorded(monkeypatch)
    make_summary(measure(dataclasses.replace(subject, prediction=partly)))
    assert texts.count("no score") == 2
    assert "Analysed: nothing found" not in texts


def crowd(shared_data: Path, **manifest: object) -> Subject:
    """104 segments, of which the last four are not found."""
    plan, volume = read_case(shared_data, "siemens_ct")
    labels = np.zeros(volume.grid.shape, np.uint16)
    for label in range(1, 101):
        row, column = divmod(label - 1, 10)
        labels[3 : 4 + label // 5, 30 + 45 * row : 60 + 45 * row, 30 + 45 * column : 60 + 45 * column] = label
    one = {"type": ["SCT", "39607008", "Lung"]}
    segments = {label: one | {"name": f"Structure {label}"} for label in range(1, 105)}
    return make_subject(
        volume, plan.headers, Labelmap(labels, volume.grid), MANIFEST | {"segments": segments} | manifest
    )


def test_of_104_segments_the_largest_are_shown(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = recorded(monkeypatch)
    page = make_summary(measure(crowd(shared_data, measurements=["volume"])))
    assert page.Rows <= HEIGHT
    assert not errors_of(write(page, tmp_path / "summary.dcm"))
    listed = [int(text.removeprefix("Structure ")) for text in texts if re.fullmatch(r"Structure \d+", text)]
    assert len(listed) > 30
    assert min(listed) >= 100 - len(listed) - 4  # the larger the number, the larger the segment
    assert f"and {100 - len(listed)} more in the structured report" in texts
    assert "not found (4): Structure 101, Structure 102, Structure 103, Structure 104" in texts


def test_many_lines_of_many_numbers_stand_in_two_blocks(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = recorded(monkeypatch)
    make_summary(measure(crowd(shared_data)))
    listed = [text for text in texts if re.fullmatch(r"Structure \d+", text)]
    assert texts.count("volume mL") == texts.count("mean HU") == 2
    assert len(listed) > 20
    assert f"and {100 - len(listed)} more in the structured report" in texts
    assert "further measurements in the structured report" in texts


def test_a_long_name_gives_way_to_its_numbers(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = classify_breast(shared_data)
    classes = {
        label: finding | {"name": "A class with a long name " + "x" * 30}
        for label, finding in DENSITY["classes"].items()
    }
    texts = recorded(monkeypatch)
    page = render_page(
        measure(dataclasses.replace(subject, manifest=Manifest.model_validate(DENSITY | {"classes": classes})))
    )
    assert "61.0 %" in texts
    assert any(re.fullmatch(r"A class.*\.\.\.", text) for text in texts)
    assert (np.asarray(page)[BANNER:, -8:] == page.getpixel((1, BANNER + 1))).all()  # nothing runs out of the page


def test_a_long_banner_stands_there_in_full(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    banner = "Automatic analysis, not verified by a physician, for research use only, not a medical device. " * 3
    texts = recorded(monkeypatch)
    make_summary(measure(dataclasses.replace(mark_photo(shared_data), house=House(banner=banner))))
    assert " ".join(texts[:2]) == banner.strip()


def test_remarks_of_the_run_are_at_the_foot(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = segment(shared_data)
    prediction = dataclasses.replace(subject.labelmap, remarks=("ran with less overlap for lack of memory",))
    texts = recorded(monkeypatch)
    make_summary(measure(dataclasses.replace(subject, prediction=prediction)))
    assert texts[-1] == "Remarks of the run: ran with less overlap for lack of memory"


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("state", NoResult)
def test_no_result_has_a_page_too(shared_data: Path, tmp_path: Path, state: NoResult, planar: bool) -> None:
    origin = make_origin(shared_data, planar=planar)
    page = make_negative_summary(origin, state, SENTENCES[state])
    file = write(page, tmp_path / "summary.dcm")
    assert not errors_of(file)
    assert (decoded(file)[:BANNER] == WARNING).all(axis=2).mean() > 0.8
    read = dcmread(file)
    assert read.StudyInstanceUID == origin.sources[0].StudyInstanceUID
    assert read.SOPInstanceUID != origin.uid("summary")  # a job that is run again and gives a result makes another
    assert read.SOPInstanceUID != make_negative(origin, state, SENTENCES[state]).SOPInstanceUID
    assert [item.ReferencedSOPInstanceUID for item in read.SourceImageSequence] == [
        str(source.SOPInstanceUID) for source in origin.sources
    ]
    again = make_negative_summary(origin, state, SENTENCES[state])
    assert Result("summary", again).encode() == file.read_bytes()
    other = make_negative_summary(origin, state, "another reason")
    assert (other.SOPInstanceUID, other.SeriesInstanceUID) != (read.SOPInstanceUID, read.SeriesInstanceUID)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_result_is_said_to_be_no_normal_result(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, language: Language
) -> None:
    words = CATALOGUE[language]
    texts = recorded(monkeypatch)
    origin = dataclasses.replace(make_origin(shared_data), house=House(language=language))
    make_negative_summary(origin, NoResult.FAILED, "ran out of memory twice")
    said = " ".join(texts)
    for part in (words.no_result, words.failed, words.reason, "ran out of memory twice", words.not_normal):
        assert part in said
    assert {words.undetermined, "Right lung, Nodule"} <= set(texts)
    assert any("ThoraxRoutine" in text and words.counted.format(count=30) in text for text in texts)


def test_a_study_without_an_image_has_a_page_too(shared_data: Path, tmp_path: Path) -> None:
    header = make_origin(shared_data).sources[0][:]
    for keyword in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient", "SOPClassUID", "SeriesDescription"):
        delattr(header, keyword)
    header.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.22"
    origin = dataclasses.replace(make_origin(shared_data), sources=(header,))
    page: Dataset = make_negative_summary(origin, NoResult.NOT_APPLICABLE, "there is no image " * 60)
    assert not errors_of(write(page, tmp_path / "summary.dcm"))
    assert "SourceImageSequence" not in page
