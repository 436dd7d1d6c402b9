"""Classifications of planar images, of volumes and frame by frame, through the eyes of other readers."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from node.errors import OutputRefused
from node.infer.results import Scores
from node.report.findings import measure
from node.report.scores import MeasuredClass, ScoreFindings
from node.report.subject import Subject
from tests.report.cases import dciodvfy_errors, run
from tests.report.predictions import DENSITY, classify_breast, make_subject, read_case, read_planar, tell
from tests.report.readers import as_dcmqi_reads, codes_in, items, unknown_codes


@pytest.fixture(scope="module")
def breast(shared_data: Path) -> Subject:
    return classify_breast(shared_data)


@pytest.fixture(scope="module")
def heart(shared_data: Path) -> Subject:
    """Thirty frames: the first class rises from 0 to 97 %, the second falls, the third is never named."""
    image, headers = read_planar(shared_data / "planar" / "us_colour_multiframe.dcm")
    count = len(image.frames)
    values = tuple({0: number / count, 1: 1 - number / count, 3: 0.0} for number in range(count))
    return make_subject(image, headers, Scores(values), DENSITY)


def summarize(report: dict[str, Any]) -> list[tuple[str, str, float | None]]:
    """Finding, presence and certainty of each group, as dcmqi reads them."""
    told = []
    for group in report["Measurements"]:
        (presence,) = [
            each["conceptValue"]["CodeMeaning"]
            for each in group["qualitativeEvaluations"]
            if each["conceptCode"]["CodeValue"] == "121052"
        ]
        values = [float(item["value"]) for item in group["measurementItems"]]
        told.append((group["Finding"]["CodeMeaning"], presence, values[0] if values else None))
    return told


def test_the_winner_is_present_and_every_class_is_said(breast: Subject, tmp_path: Path) -> None:
    file = tell(breast, tmp_path).files["sr"]
    assert summarize(as_dcmqi_reads(file, tmp_path)) == [
        ("Almost entirely fat", "Absent", 4.0),
        ("Scattered fibroglandular densities", "Absent", 23.0),
        ("Heterogeneously dense", "Present", 61.0),
        ("Extremely dense", "Absent", 12.0),
    ]
    assert not dciodvfy_errors(file)
    assert not re.findall(r"^[WEF]: .*", run("dsrdump", "+Pu", file), re.M)
    report = dcmread(file)
    assert not unknown_codes(codes_in(report))
    assert report.VerificationFlag == "UNVERIFIED"
    assert "SCOORD" not in {item.ValueType for item in items(report)}
    # 00000000 in the source is no date; a patient without a birth date is one whose birth date is empty.
    assert breast.sources[0].PatientBirthDate == "00000000"
    assert report["PatientBirthDate"].is_empty


def test_classes_that_do_not_exclude_each_other_hold_from_score_min(breast: Subject, tmp_path: Path) -> None:
    scores = Scores(({0: 0.5, 1: 0.499, 3: 0.9},), exclusive=False)
    file = tell(dataclasses.replace(breast, prediction=scores), tmp_path).files["sr"]
    assert summarize(as_dcmqi_reads(file, tmp_path)) == [
        ("Almost entirely fat", "Present", 50.0),
        ("Scattered fibroglandular densities", "Absent", 49.9),
        ("Heterogeneously dense", "Undetermined", None),
        ("Extremely dense", "Present", 90.0),
    ]


def test_a_volume_is_classified_as_a_whole(shared_data: Path, tmp_path: Path) -> None:
    plan, volume = read_case(shared_data, "siemens_ct")
    subject = make_subject(volume, plan.headers, Scores(({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4},)), DENSITY)
    file = tell(subject, tmp_path).files["sr"]
    assert [each for each in summarize(as_dcmqi_reads(file, tmp_path)) if each[1] == "Present"] == [
        ("Extremely dense", "Present", 40.0)
    ]
    assert not dciodvfy_errors(file)
    assert len([item for item in items(dcmread(file)) if item.ValueType == "IMAGE"]) == len(volume.slices)


def test_frames_are_judged_one_by_one_in_few_groups(heart: Subject, tmp_path: Path) -> None:
    file = tell(heart, tmp_path).files["sr"]
    assert not dciodvfy_errors(file)
    present: dict[str, list[int]] = {}
    absent: dict[str, list[int]] = {}
    undetermined: dict[str, list[int]] = {}
    groups = [item for item in items(dcmread(file)) if item.ConceptNameCodeSequence[0].CodeValue == "125007"]
    for group in groups:
        parts = {item.ConceptNameCodeSequence[0].CodeMeaning: item for item in group.ContentSequence}
        finding = parts["Finding"].ConceptCodeSequence[0].CodeMeaning
        frames = parts["Source of Measurement"].ReferencedSOPSequence[0].ReferencedFrameNumber
        frames = [frames] if isinstance(frames, int) else list(frames)
        where = {"Present": present, "Absent": absent, "Undetermined": undetermined}[
            parts["Presence of property"].ConceptCodeSequence[0].CodeMeaning
        ]
        where.setdefault(finding, []).extend(frames)
        if where is present:
            (frame,) = frames
            score = (frame - 1) / 30 if finding == "Almost entirely fat" else 1 - (frame - 1) / 30
            value = float(parts["Certainty of Finding"].MeasuredValueSequence[0].NumericValue)
            assert value == pytest.approx(100 * score, abs=0.005)
        elif where is absent:
            (derivation,) = parts["Certainty of Finding"].ContentSequence
            assert derivation.ConceptCodeSequence[0].CodeMeaning == "Maximum"
    fat, scattered = "Almost entirely fat", "Scattered fibroglandular densities"
    assert present == {fat: list(range(16, 31)), scattered: list(range(1, 16))}  # of two equal scores the first class
    assert absent == {fat: list(range(1, 16)), scattered: list(range(16, 31)), "Extremely dense": list(range(1, 31))}
    assert undetermined == {"Heterogeneously dense": list(range(1, 31))}
    assert len(groups) == 30 + 4
    assert len({group.ContentSequence[1].UID for group in groups}) == len(groups)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (({0: 0.5, 8: 0.5},), "class 8, which dicom.yaml does not declare"),
        (({0: 1.2},), "score 1.2 for Almost entirely fat"),
        (({0: float("nan")},), "score nan"),
        (({},), "without a score"),
        (({0: 0.5}, {0: 0.5}), "2 classifications of an input of 1 frames"),
    ],
)
def test_what_is_no_classification_is_refused(
    breast: Subject, values: tuple[dict[int, float], ...], sentence: str
) -> None:
    with pytest.raises(OutputRefused, match=re.escape(sentence)):
        measure(dataclasses.replace(breast, prediction=Scores(values)))


def test_rows_say_what_holds(breast: Subject, heart: Subject) -> None:
    rows = [row for measured in measure(breast).measurements for row in measured.rows()]
    assert [row["holds"] for row in rows] == [False, False, True, False]
    assert rows[2] | {"value": 61} == {
        "segment": "Heterogeneously dense",
        "measurement": "certainty",
        "value": 61,
        "unit": "%",
        "holds": True,
    }
    findings = measure(heart)
    assert isinstance(findings, ScoreFindings)
    assert findings.measurements[0] == MeasuredClass(0, "Almost entirely fat", 0, 0.0, holds=False)
    assert findings.measurements[0].rows()[0]["segment"] == "Almost entirely fat, frame 1"


def test_the_same_scores_make_the_same_bytes(breast: Subject, tmp_path: Path) -> None:
    first = tell(breast, tmp_path).files["sr"].read_bytes()
    time.sleep(1.1)  # a clock's seconds would differ
    assert tell(breast, tmp_path).files["sr"].read_bytes() == first
