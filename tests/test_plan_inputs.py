"""A job's inputs are assembled again from the instances that it names: to the very volume that was decided on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from node.config import Route
from node.dicom.header import read_header
from node.dicom.naming import name_plan
from node.errors import InputRefused
from node.infer.manifest import Input
from node.infer.package import Package
from node.queue.jobs import job_key
from node.route import decide
from node.work import plan_inputs
from tests.dicom.multiframe import write_multiframe
from tests.dicom.slices import write_series
from tests.report.cases import make_package

ROUTE = Route.model_validate({"name": "all", "when": {}, "run": ["model"], "send_to": []})


@pytest.fixture
def package() -> Package:
    package = make_package()
    return replace(package, manifest=package.manifest.model_copy(update={"inputs": {"image": Input()}}))


def change(path: Path, **values: object) -> None:
    dataset = dcmread(path)
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path)


def headers_of(paths: list[Path]) -> dict[str, dict[Path, Dataset]]:
    headers: dict[Path, Dataset] = {path: read_header(path) for path in paths}
    return {str(next(iter(headers.values())).SeriesInstanceUID): headers}


def test_instances_that_make_another_volume_than_the_job_s_are_refused(tmp_path: Path, package: Package) -> None:
    paths = write_series(tmp_path, np.zeros((12, 4, 4), np.int16))
    for path in paths[7:]:
        change(path, ImageOrientationPatient=["0", "1", "0", "0", "0", "-1"])
    uids = {str(read_header(path).SOPInstanceUID): path for path in paths}
    with pytest.raises(InputRefused, match="12 instances"):
        plan_inputs(package, {"image": sorted(uids)}, uids)


def test_an_uneven_echo_is_split_when_it_is_decided_on_as_when_it_is_run(tmp_path: Path, package: Package) -> None:
    """Each echo's slices are two even stacks, one between the other's slices: so they are without the other echo."""
    paths: list[Path] = []
    for echo in ("1", "2"):
        for angle, start_mm in (("5", 0.0), ("10", 1.6)):
            paths += write_series(
                tmp_path / echo / angle, np.zeros((6, 4, 4), np.int16), spacing_mm=(4.0, 1.0, 1.0),
                origin_mm=(0.0, 0.0, start_mm),
                Modality="MR", EchoTime=echo, FlipAngle=angle, SeriesInstanceUID="1.2.3.4",
            )  # fmt: skip
    (job,) = decide(headers_of(paths), [ROUTE], lambda name: package).jobs
    assert job.refusal == ""
    uids = {str(read_header(path).SOPInstanceUID): path for path in paths}
    plan = plan_inputs(package, {name: list(named) for name, named in job.inputs.items()}, uids)["image"]
    assert sorted(ref.sop_instance_uid for ref in plan.slices) == job.inputs["image"]
    assert len(plan.slices) == 6


def test_two_volumes_of_one_object_are_two_jobs_and_come_back_as_they_were_chosen(
    tmp_path: Path, package: Package
) -> None:
    """Both are told apart at the decision by their conditions; the worker has the object and the job's names alone."""
    frames = [
        {"ImagePositionPatient": ["0", "0", str(height)], "EffectiveEchoTime": echo}
        for echo in (5.0, 80.0)
        for height in range(4)
    ]
    path = write_multiframe(tmp_path / "object.dcm", np.zeros((8, 4, 4), np.int16), frames)
    uid = str(read_header(path).SOPInstanceUID)
    keys: set[str] = set()
    for echo, named in (("< 50", f"{uid}#1-4"), ("> 50", f"{uid}#5-8")):
        wanted = Input.model_validate({"when": {"EchoTime": echo}})
        chosen = replace(package, manifest=package.manifest.model_copy(update={"inputs": {"image": wanted}}))
        (job,) = decide(headers_of([path]), [ROUTE], lambda name, chosen=chosen: chosen).jobs
        assert job.inputs == {"image": [named]}
        keys.add(job_key(job.model, job.model_digest, job.inputs))
        # Whatever the package's ranks would say of the two, the job has named its volume.
        plan = plan_inputs(package, {"image": [named]}, {uid: path})["image"]
        assert name_plan(plan) == [named]
    assert len(keys) == 2
    with pytest.raises(InputRefused, match="of exactly these and their frames"):
        plan_inputs(package, {"image": [f"{uid}#1-3"]}, {uid: path})
