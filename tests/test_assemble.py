"""When a study, or a route's share of it, may start: quiet periods, starts on a series, and the urgency of a study."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid
from sqlalchemy import update

from node.archive import schema
from node.archive.store import Archive
from node.assemble import EarlyStarts, complete_studies
from node.config import Route
from node.errors import ModelError, RadnodeError
from node.infer.manifest import Input
from node.infer.package import Package
from node.priority import Priority
from node.queue.jobs import list_jobs
from node.receive.importer import Limits, import_path
from node.route import decide, read_headers, route_study
from tests.dicom.slices import write_series
from tests.report.cases import make_package

QUIET_S = 30.0


@pytest.fixture
def study_uid() -> str:
    return generate_uid()


@pytest.fixture
def send(archive: Archive, tmp_path: Path, study_uid: str) -> Callable[..., None]:
    """A series arrives; the last one is `quiet_s` ago."""

    def send_series(name: str, *, slices: int = 12, quiet_s: float = 0.0, **values: Any) -> None:
        values = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": f"1.2.{name}", **values}
        write_series(tmp_path / f"{name}-{slices}", np.zeros((slices, 4, 4), np.int16), **values)
        kept = list(import_path(tmp_path / f"{name}-{slices}", archive, Limits()))
        assert all(one.outcome is not None for one in kept), kept
        set_quiet(archive, f"1.2.{name}", quiet_s)

    return send_series


def set_quiet(archive: Archive, series_uid: str, quiet_s: float) -> None:
    columns = schema.series.c
    with archive.database.write() as connection:
        arrived = update(schema.series).where(columns.series_uid == series_uid)
        connection.execute(arrived.values(last_received_at=time.time() - quiet_s))


def look_up(name: str) -> Package | RadnodeError:
    if name != "model":
        return ModelError("there is no such package")
    package = make_package()
    return replace(package, manifest=package.manifest.model_copy(update={"inputs": {"image": Input()}}))


def route(**changes: Any) -> Route:
    return Route.model_validate({"name": "ct", "when": {"Modality": "CT"}, "run": ["model"], "send_to": []} | changes)


def instances_of_jobs(archive: Archive) -> list[int]:
    """How many instances each job has, in the order in which the jobs were made."""
    return [len(names) for job, _ in reversed(list_jobs(archive.database)) for names in job.inputs.values()]


def test_a_route_starts_on_a_quiet_series_while_another_still_comes(
    archive: Archive, send: Callable[..., None], study_uid: str
) -> None:
    starts = EarlyStarts([route(start="series", quiet="5s")], QUIET_S)
    send("1", quiet_s=6)
    send("2", slices=3)
    assert [new for _, new in starts.start(archive, look_up)] == [1]
    assert instances_of_jobs(archive) == [12]
    assert starts.start(archive, look_up) == []  # nothing new is quiet
    assert complete_studies(archive, QUIET_S) == []
    set_quiet(archive, "1.2.2", 6)
    assert starts.start(archive, look_up) == []  # the choice among both is still the first
    decision = route_study(archive, archive.study(study_uid), [route(start="series", quiet="5s")], look_up)
    assert decision is not None
    assert instances_of_jobs(archive) == [12]  # and over the whole study too: the same job


def test_more_of_a_series_makes_another_job(archive: Archive, send: Callable[..., None]) -> None:
    starts = EarlyStarts([route(start="series", quiet="5s")], QUIET_S)
    send("1", quiet_s=6)
    starts.start(archive, look_up)
    send("1", slices=20)  # other instances of the same series
    assert starts.start(archive, look_up) == []  # not quiet
    send("2", slices=25, quiet_s=6)
    assert [new for _, new in starts.start(archive, look_up)] == [1]
    assert instances_of_jobs(archive) == [12, 25]


def test_a_shorter_quiet_period_waits_for_the_whole_study(archive: Archive, send: Callable[..., None]) -> None:
    starts = EarlyStarts([route(quiet="5s"), route(name="patient")], QUIET_S)
    send("1", quiet_s=6)
    send("2", slices=3)
    assert starts.start(archive, look_up) == []
    set_quiet(archive, "1.2.2", 6)
    assert len(starts.start(archive, look_up)) == 1
    assert [job.route for job, _ in list_jobs(archive.database)] == ["ct"]


def test_what_is_not_applicable_yet_is_not_refused(archive: Archive, send: Callable[..., None]) -> None:
    starts = EarlyStarts([route(start="series", quiet="5s", run=["absent"])], QUIET_S)
    send("1", quiet_s=6)
    assert starts.start(archive, look_up) == []
    assert list_jobs(archive.database) == []


def test_the_silence_while_the_node_was_down_proves_nothing(archive: Archive, send: Callable[..., None]) -> None:
    send("1", quiet_s=60)
    with archive.database.write() as connection:
        connection.execute(update(schema.studies).values(last_received_at=time.time() - 60))
    now = time.time()
    assert complete_studies(archive, QUIET_S, listening_since=now) == []
    assert EarlyStarts([route(start="series")], QUIET_S, listening_since=now).start(archive, look_up) == []
    assert len(complete_studies(archive, QUIET_S, listening_since=now - 31)) == 1


@pytest.mark.parametrize(
    ("station", "priority"), [("ER CT", Priority.STAT), ("RESEARCH", Priority.BACKGROUND), ("CT 3", Priority.URGENT)]
)
def test_the_first_rule_that_fits_says_how_urgent_a_study_is(
    archive: Archive, send: Callable[..., None], study_uid: str, station: str, priority: Priority
) -> None:
    rules = [
        {"when": {"StationName": "/^ER/"}, "priority": "stat"},
        {"when": {"StationName": ["/^ER/", "RESEARCH"]}, "priority": "background"},
    ]
    send("1", StationName="CT 3")
    send("2", slices=13, StationName=station)
    headers = read_headers(archive, archive.study(study_uid))
    (job,) = decide(headers, [route(priority="urgent", priority_when=rules, deadline="30m")], look_up).jobs
    assert (job.priority, job.deadline_s) == (priority, 1800.0)


def test_requested_procedure_priority_can_be_asked(tmp_path: Path) -> None:
    rule = {"when": {"RequestedProcedurePriority": ["STAT", "HIGH"]}, "priority": "stat"}
    for written, priority in (("STAT", Priority.STAT), ("LOW", Priority.ROUTINE)):
        paths = write_series(tmp_path / written, np.zeros((12, 4, 4), np.int16), RequestedProcedurePriority=written)
        headers = {path: dcmread(path) for path in paths}
        (job,) = decide({"1.2": headers}, [route(priority_when=[rule])], look_up).jobs
        assert job.priority is priority
