"""One model on one study: the stages, the input that a result refers to, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from node.analyse import STAGES, analyse
from node.dicom.assembly import VolumePlan, assemble_volumes
from node.dicom.header import read_header
from node.dicom.volume import Image, Volume
from node.errors import InputRefused, ModelError, OutputRefused
from node.infer.manifest import Manifest
from node.infer.package import Package
from node.infer.results import Box, Boxes, Labelmap, Landmark, Landmarks, Prediction, Scores
from tests.dicom.slices import write_series
from tests.report.cases import CREATED, FIRST, make_package
from tests.report.predictions import DENSITY, DETECTION, LANDMARKS

Inputs = Mapping[str, Volume | Image]


class Saying:
    """A model that answers what it was told to, and remembers what it was given."""

    def __init__(self, prediction: Prediction | Exception):
        self.prediction = prediction
        self.inputs: Inputs = {}

    def predict(self, inputs: Inputs) -> Prediction:
        self.inputs = inputs
        if isinstance(self.prediction, Exception):
            raise self.prediction
        return self.prediction

    def close(self) -> None:
        pass


def make_plan(folder: Path, modality: str = "CT", value: int = 40) -> VolumePlan:
    paths = write_series(folder, np.full((6, 16, 12), value, np.int16), Modality=modality)
    (plan,) = assemble_volumes({path: read_header(path) for path in paths}).volumes
    return plan


@pytest.fixture
def plan(tmp_path: Path) -> VolumePlan:
    return make_plan(tmp_path / "ct")


def package_of(manifest: Mapping[str, object]) -> Package:
    return replace(make_package(), manifest=Manifest.model_validate(manifest))


def labels_of(plan: VolumePlan) -> Labelmap:
    array = np.zeros(plan.grid.shape, np.uint16)
    array[1:3, 4:8, 4:8] = FIRST
    return Labelmap(array, plan.grid)


def test_stages_come_in_order_and_are_timed(plan: VolumePlan) -> None:
    told: list[str] = []
    model = Saying(labels_of(plan))
    analysis = analyse(make_package(), model, {"image": plan}, key="job", created=CREATED, progress=told.append)
    assert tuple(told) == STAGES == tuple(analysis.seconds)
    assert all(seconds >= 0 for seconds in analysis.seconds.values())
    assert analysis.subject.source is model.inputs["image"]
    assert analysis.subject.prediction is model.prediction
    assert [result.name for result in analysis.results] == ["seg", "sr"]
    assert [row["value"] for row in analysis.measurements[0].rows() if row["measurement"] == "mean"] == [40]


@pytest.mark.parametrize(
    ("prediction", "manifest", "first_row"),
    [
        (Boxes((Box(1, 0.9, (-9, -19, 31), (-5, -12, 35)),)), DETECTION, "Mass 1"),
        (Landmarks((Landmark(2, 3, 4.0, 5.0),)), LANDMARKS, "Right eye 1"),
        (Scores(({0: 0.9, 1: 0.1},)), DENSITY, "Almost entirely fat"),
    ],
)
def test_every_kind_gives_a_report(
    plan: VolumePlan, prediction: Prediction, manifest: dict[str, object], first_row: str
) -> None:
    analysis = analyse(package_of(manifest), Saying(prediction), {"image": plan}, key="job", created=CREATED)
    (result,) = analysis.results
    assert result.name == "sr"
    assert result.dataset.StudyInstanceUID == plan.study_uid
    assert analysis.measurements[0].rows()[0]["segment"] == first_row


def test_results_refer_to_the_input_that_the_model_names(tmp_path: Path, plan: VolumePlan) -> None:
    other = make_plan(tmp_path / "mr", "MR")
    manifest = DENSITY | {"inputs": {"image": {}, "second": {}}}
    scores = Scores(({0: 0.9},), input="second")
    plans = {"image": plan, "second": other}
    analysis = analyse(package_of(manifest), Saying(scores), plans, key="job", created=CREATED)
    (result,) = analysis.results
    assert analysis.subject.source.series_uid == other.series_uid
    (study,) = result.dataset.CurrentRequestedProcedureEvidenceSequence
    assert [series.SeriesInstanceUID for series in study.ReferencedSeriesSequence] == [other.series_uid]


@pytest.mark.parametrize("error", [ModelError("no memory"), OutputRefused("no result")])
def test_what_the_model_raises_is_what_the_caller_gets(plan: VolumePlan, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        analyse(make_package(), Saying(error), {"image": plan}, key="job", created=CREATED)


def test_a_result_without_a_meaning_is_refused(plan: VolumePlan) -> None:
    boxes = Boxes((Box(5, 0.9, (-9, -19, 31), (-5, -12, 35)),))
    with pytest.raises(OutputRefused, match="class 5"):
        analyse(package_of(DETECTION), Saying(boxes), {"image": plan}, key="job", created=CREATED)


def test_unreadable_pixels_are_refused_before_the_model_runs(plan: VolumePlan) -> None:
    dataset = dcmread(plan.paths[2])
    dataset.PixelData = dataset.PixelData[:10]
    dataset.save_as(plan.paths[2])
    model = Saying(labels_of(plan))
    with pytest.raises(InputRefused, match="cannot be decoded"):
        analyse(make_package(), model, {"image": plan}, key="job", created=CREATED)
    assert not model.inputs
