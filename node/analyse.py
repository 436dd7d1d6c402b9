"""One model on one study: volumes in, DICOM results out. The worker and `radnode run` share it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from node import __version__
from node.dicom.assembly import InputPlan, VolumePlan
from node.dicom.pixels import read_volume
from node.dicom.volume import Volume
from node.errors import InputRefused, OutputRefused
from node.infer.model import Model
from node.infer.package import Package
from node.infer.results import Labelmap
from node.report.measure import SegmentMeasurements, measure_segments
from node.report.results import Result, make_results
from node.report.subject import Subject

STAGES = ("read", "infer", "measure", "report")


@dataclass(frozen=True)
class Analysis:
    """What came of one run."""

    volume: Volume  # the input that the results refer to
    labelmap: Labelmap
    measurements: tuple[SegmentMeasurements, ...]
    results: tuple[Result, ...]
    seconds: dict[str, float]  # per stage
    subject: Subject


def analyse(
    package: Package,
    model: Model,
    plans: Mapping[str, InputPlan],
    *,
    key: str,
    created: datetime,
    progress: Callable[[str], None] = lambda stage: None,
) -> Analysis:
    """Read the planned volumes, run the model, measure, and make the DICOM results whose UIDs derive from `key`.

    `progress` is told each stage of `STAGES` as it begins. Raises `InputRefused` for voxels that cannot be read,
    `ModelError` when the model fails, `OutputRefused` when what it returned is no result.
    """
    seconds: dict[str, float] = {}
    clock = time.monotonic()

    def begin(stage: str, before: str = "") -> None:
        nonlocal clock
        now = time.monotonic()
        if before:
            seconds[before] = now - clock
        clock = now
        if stage:
            progress(stage)

    begin("read")
    volumes = {name: _read(plan) for name, plan in plans.items()}
    begin("infer", "read")
    labelmap = model.predict(volumes)
    if not isinstance(labelmap, Labelmap):
        raise OutputRefused("results other than a label map are not reported yet")
    begin("measure", "infer")
    plan, volume = plans[labelmap.input], volumes[labelmap.input]
    measurements = measure_segments(volume, labelmap, package.manifest)
    begin("report", "measure")
    subject = Subject(
        key=key,
        created=created,
        volume=volume,
        sources=plan.headers,
        labelmap=labelmap,
        manifest=package.manifest,
        model_name=package.name,
        model_version=package.version,
        model_digest=package.digest,
        node_version=__version__,
    )
    results = make_results(subject, measurements)
    begin("", "report")
    return Analysis(volume, labelmap, measurements, results, seconds, subject)


def _read(plan: InputPlan) -> Volume:
    """The volume of a plan, when it is one that models take as it is."""
    if not isinstance(plan, VolumePlan):
        raise InputRefused(f"series {plan.series_uid} is a planar image, which models are not given yet")
    if plan.positions_lps is not None:
        raise InputRefused(f"the slices of series {plan.series_uid} are sheared (gantry tilt) or of varying spacing")
    return read_volume(plan)
