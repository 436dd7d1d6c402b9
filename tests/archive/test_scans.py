"""What the processes ask the database again and again finds its rows by an index, however many studies there are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event, insert

from node.archive import schema
from node.archive.asked_commitments import next_request
from node.archive.records import StudyState
from node.archive.store import Archive
from node.assemble import complete_studies
from node.deliver.outbox import due_parcels, mark_delivered
from node.queue.jobs import NewJob, add_job, list_jobs
from node.queue.leases import (
    claim_job,
    claim_to_read,
    fail_overdue,
    finish_job,
    give_back_read,
    recover_lost_jobs,
    renew_lease,
)
from node.queue.rows import NewResult
from node.queue.untold import claim_untold
from node.queue.workers import WorkerId

# What a person holds are a few rows; the rest are made by the statement itself.
SMALL = ("SCAN pauses:", "SCAN lanes:", "SCAN CONSTANT ROW:")


def put_study(archive: Archive) -> int:
    with archive.database.write() as connection:
        study = {"study_uid": "1.2", "state": StudyState.RECEIVING, "first_received_at": 0.0, "last_received_at": 0.0}
        identifier = connection.scalar(insert(schema.studies).values(**study).returning(schema.studies.c.id))
    assert identifier is not None
    return identifier


def a_study_goes_through(archive: Archive) -> None:
    """Every step of the database's that a study takes between its last instance and the delivery of its result."""
    database, worker = archive.database, WorkerId.mine()
    (study,) = complete_studies(archive, 1.0)
    archive.instances(study.id)
    with database.write() as connection:
        add_job(connection, study.id, "1.2", 1, NewJob("r", "m", "1", "d", {"image": ["1.1"]}, ["pacs"]), 0.0)
    assert claim_untold(database, worker) is None
    assert [one.last_received_at for one in archive.receiving(most=16)] == [0.0]
    ahead = claim_to_read(database, worker, loaded=("m",))
    assert ahead is not None
    assert give_back_read(database, ahead, worker)
    job = claim_job(database, worker)
    assert job is not None
    assert renew_lease(database, job, worker)
    recover_lost_jobs(database)
    assert fail_overdue(database) == []
    archive.instance_paths(["1.1"])
    assert finish_job(database, job, worker, [NewResult("seg", "1.3", "1", "results/x", 1, ["pacs"])], [], "made")
    (parcel,) = due_parcels(database, "pacs")
    mark_delivered(database, parcel, commitment=True)
    next_request(database, "pacs")
    list_jobs(database, study_id=study.id)
    archive.events("1.2")
    assert archive.forget_finished(0.0) == []


def test_no_table_is_read_from_end_to_end(tmp_path: Path) -> None:
    asked = [plan for plan in plans_of(tmp_path, a_study_goes_through) if "SCAN" in plan]
    assert [plan for plan in asked if not plan.startswith(SMALL)] == []


def test_a_table_that_is_read_from_end_to_end_is_noticed(tmp_path: Path) -> None:
    def count(archive: Archive) -> None:
        with archive.database.read() as connection:
            connection.exec_driver_sql("SELECT study_uid FROM studies WHERE description = 'chest'").all()

    with pytest.raises(AssertionError):
        assert not [plan for plan in plans_of(tmp_path, count) if "SCAN" in plan]


def plans_of(folder: Path, does: Callable[[Archive], None]) -> list[str]:
    """How SQLite goes about each statement of `does`: what EXPLAIN QUERY PLAN says, and the statement."""
    statements: list[tuple[str, Any]] = []

    def note(connection: Connection, cursor: Any, statement: str, parameters: Any, *_: object) -> None:
        statements.append((statement, parameters))

    with closing(Archive(folder / "var", f"sqlite:///{folder / 'radnode.sqlite'}")) as archive:
        put_study(archive)
        event.listen(archive.database.engine, "before_cursor_execute", note)
        does(archive)
        event.remove(archive.database.engine, "before_cursor_execute", note)
        said = []
        with archive.database.read() as connection:
            for statement, parameters in statements:
                if statement.split()[0] in ("SELECT", "UPDATE", "DELETE"):
                    rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                    said += [f"{row[3]}: {statement}" for row in rows]
    assert len(said) >= len([one for one in statements if one[0].startswith("SELECT")])
    return said
