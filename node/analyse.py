"""One model on one study: images in, DICOM results out. The worker and `radnode run` share it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from pydicom.dataset import Dataset

from node import __version__
from node.dicom.assembly import InputPlan
from node.dicom.pixels import read_input
from node.dicom.volume import Image, Volume
from node.errors import ModelError, OutputRefused
from node.infer.manifest import Manifest
from node.infer.model import DicomModel, Model
from node.infer.package import Package
from node.infer.regular import inputs_as_seen, prediction_as_sent, saliency_as_sent
from node.infer.results import DicomObjects, Prediction, Scores
from node.infer.saliency import Saliency, explain_scores
from node.report.findings import Findings, Measured, measure
from node.report.house import House
from node.report.kinds import Kind, Wanted
from node.report.results import Result, make_results
from node.report.subject import Subject

STAGES = ("read", "infer", "measure", "report")


@dataclass(frozen=True)
class Analysis:
    """What came of one run."""

    plan: InputPlan  # of the input that the results refer to
    findings: Findings | None  # None where the model wrote finished DICOM objects, which speak for themselves
    results: tuple[Result, ...]
    seconds: dict[str, float]  # per stage
    remarks: tuple[str, ...] = ()  # what the run wants said

    @property
    def subject(self) -> Subject:
        """What radnode's own results are of; there is none where the model wrote finished objects."""
        assert self.findings is not None
        return self.findings.subject

    @property
    def measurements(self) -> Sequence[Measured]:
        """What was measured of each finding."""
        return self.findings.measurements if self.findings else ()


@dataclass(frozen=True)
class Run:
    """What a model said of a study, before anything is made of it."""

    plan: InputPlan  # of the input that the results refer to
    source: Volume | Image | None  # None where the model read the files itself
    prediction: Prediction
    saliency: Saliency | None
    seconds: dict[str, float]


def analyse(
    package: Package,
    model: Model | DicomModel,
    plans: Mapping[str, InputPlan],
    *,
    key: str,
    created: datetime,
    house: House | None = None,
    wanted: Wanted | None = None,
    previous: tuple[Dataset, ...] = (),
    progress: Callable[[str], None] = lambda stage: None,
) -> Analysis:
    """Read the planned inputs, run the model, measure, and make the DICOM results whose UIDs derive from `key`.

    `house` are the site's rules for them, `wanted` says which are made, `previous` are the reports that these replace.
    `progress` is told each stage of `STAGES` as it begins. Raises `InputRefused` for voxels that cannot be read,
    `ModelError` when the model fails, `OutputRefused` when what it returned is no result.
    """
    wanted = wanted or Wanted()
    progress("read")
    begin = time.monotonic()
    sources = {} if isinstance(model, DicomModel) else read_sources(plans)
    read_s = time.monotonic() - begin
    progress("infer")
    run = run_model(package, model, plans, sources, key=key, wanted=wanted)
    run = replace(run, seconds={"read": read_s} | run.seconds)
    return report(
        package, run, key=key, created=created, house=house, wanted=wanted, previous=previous, progress=progress
    )


def read_sources(plans: Mapping[str, InputPlan]) -> dict[str, Volume | Image]:
    """The voxels of each input; `InputRefused` for those that cannot be read."""
    return {name: read_input(plan) for name, plan in plans.items()}


def run_model(
    package: Package,
    model: Model | DicomModel,
    plans: Mapping[str, InputPlan],
    sources: Mapping[str, Volume | Image],
    *,
    key: str,
    wanted: Wanted,
) -> Run:
    """Run the model on `sources`, or on the files of `plans` where it reads them itself. Errors as of `analyse`."""
    begin = time.monotonic()
    if isinstance(model, DicomModel):
        prediction = model.run(plans, key)
        return Run(plans[prediction.input], None, prediction, None, {"infer": time.monotonic() - begin})
    saliency: Saliency | None = None
    seen = inputs_as_seen(sources, package.manifest)
    prediction = model.predict(seen)
    if package.manifest.saliency is not None and isinstance(prediction, Scores) and Kind.MAP in wanted.kinds:
        prediction, saliency = _explain(model, seen, prediction, package.manifest, sources)
    prediction = prediction_as_sent(prediction, seen[prediction.input], sources[prediction.input])
    plan, source = plans[prediction.input], sources[prediction.input]
    return Run(plan, source, prediction, saliency, {"infer": time.monotonic() - begin})


def report(
    package: Package,
    run: Run,
    *,
    key: str,
    created: datetime,
    house: House | None = None,
    wanted: Wanted | None = None,
    previous: tuple[Dataset, ...] = (),
    progress: Callable[[str], None] = lambda stage: None,
) -> Analysis:
    """Measure what a model said, and make the DICOM results. Arguments and errors as of `analyse`."""
    progress("measure")
    begin = time.monotonic()
    prediction = run.prediction
    if isinstance(prediction, DicomObjects):
        progress("report")
        results = tuple(
            Result(f"object-{number:03d}", dataset) for number, dataset in enumerate(prediction.datasets, 1)
        )
        seconds = run.seconds | {"measure": 0.0, "report": time.monotonic() - begin}
        return Analysis(run.plan, None, results, seconds, prediction.remarks)
    findings = measure(
        Subject(
            key=key,
            created=created,
            source=read_input(run.plan) if run.source is None else run.source,
            sources=run.plan.headers,
            prediction=prediction,
            manifest=package.manifest,
            model_name=package.name,
            model_version=package.version,
            model_digest=package.digest,
            node_version=__version__,
            house=house or House(),
            previous=previous,
            saliency=run.saliency,
        )
    )
    progress("report")
    measured = time.monotonic()
    results = make_results(findings, wanted)
    seconds = run.seconds | {"measure": measured - begin, "report": time.monotonic() - measured}
    return Analysis(run.plan, findings, results, seconds, findings.subject.prediction.remarks)


def _explain(
    model: Model,
    seen: Mapping[str, Volume | Image],
    prediction: Scores,
    manifest: Manifest,
    sources: Mapping[str, Volume | Image],
) -> tuple[Scores, Saliency | None]:
    """What the scores came from, in the slices as sent. The scores stand without it: why it is missing is a remark."""
    try:
        saliency = explain_scores(model, seen, prediction, manifest)
    except (ModelError, OutputRefused) as error:
        remark = f"No map was made of what the scores came from: {error}"
        return replace(prediction, remarks=(*prediction.remarks, remark)), None
    prediction = replace(prediction, remarks=(*prediction.remarks, *saliency.remarks))
    return prediction, saliency_as_sent(saliency, seen[saliency.input], sources[saliency.input])
