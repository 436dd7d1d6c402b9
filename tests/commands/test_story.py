"""The story of a study: states that explain themselves, durations as numbers, and a story without end kept short."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import insert

from node.archive import schema
from node.archive.records import CommitmentState, Delivery, DeliveryState, Job, JobState, Study, StudyState
from node.archive.store import Archive
from node.commands.check import gets_reports_alone, look_at_storage
from node.commands.listing import show_study
from node.commands.story import (
    explain_commitment,
    explain_delivery,
    explain_job,
    explain_receiving,
    measure,
)
from node.config import load_config
from node.priority import Priority
from tests.deliver.test_outbox import owe
from tests.dicom.slices import write_series

STUDY = Study(1, "1.2.3", "", "A1", "", "", StudyState.ROUTED, "", 2, 64, 100.0, 160.0, 190.0)
JOB = Job(
    id=1, key="k", study_id=1, study_revision=2, route="r", model="lungs", model_version="1", model_digest="d",
    inputs={}, send_to=["pacs"], results=["seg"], tell_no_result=True, untold=False, priority=Priority.ROUTINE,
    source="SCANNER", deadline_s=None, queued_at=190.0, deadline_at=None, state=JobState.DONE, reason="made",
    measurements=[], seconds={"read": 1.0, "infer": 6.0}, attempts=1, lease_owner=None, lease_until=None,
    not_before=0.0, created_at=190.0, started_at=195.0, finished_at=205.0,
)  # fmt: skip
DELIVERY = Delivery(
    id=1, result_id=1, peer="pacs", state=DeliveryState.DELIVERED, reason="", attempts=1, not_before=0.0,
    created_at=205.0, delivered_at=207.0, commitment=CommitmentState.COMMITTED, commitment_reason="",
    commitment_due_at=None, commitment_asks=1, commitment_refusals=0, transaction_uid="1.2", committed_at=217.0,
)  # fmt: skip


def test_each_stage_has_its_seconds() -> None:
    faster = replace(JOB, id=2, started_at=191.0, finished_at=192.0, seconds={"infer": 1.0})
    earlier = replace(JOB, id=3, study_revision=1, started_at=10.0, created_at=1.0, finished_at=90.0)
    durations = measure(STUDY, [faster, JOB, earlier], [DELIVERY, replace(DELIVERY, id=2, delivered_at=210.0)])
    assert durations.sentence() == (
        "receiving 60.0 s; quiet period 30.0 s; waiting 5.0 s; running 10.0 s (read 1.0 s, infer 6.0 s); "
        "delivering 5.0 s; commitment 10.0 s; last image to last result 50.0 s"
    )


def test_what_has_not_happened_has_no_duration() -> None:
    receiving = replace(STUDY, state=StudyState.RECEIVING)
    early = measure(receiving, [], [])
    assert early.sentence() == "receiving 60.0 s"
    assert early.total_s is None
    queued = replace(JOB, state=JobState.QUEUED, started_at=None, finished_at=None)
    assert measure(STUDY, [queued], []).running_s is None
    pending = replace(DELIVERY, id=2, state=DeliveryState.PENDING, delivered_at=None, committed_at=None)
    durations = measure(STUDY, [JOB], [DELIVERY, pending])
    assert (durations.delivering_s, durations.total_s) == (2.0, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": JobState.QUEUED, "reason": ""}, "waits for a worker since 10.0 s"),
        ({"state": JobState.QUEUED, "reason": "failed", "not_before": 230.0}, "failed; next attempt in 30.0 s"),
        ({"state": JobState.RUNNING, "lease_owner": "gpu1/b/1/2/n"}, "attempt 1 runs since 5.0 s on gpu1"),
        ({}, "made"),
    ],
)
def test_a_job_explains_itself(changes: dict[str, object], said: str) -> None:
    assert explain_job(replace(JOB, **changes), 200.0) == said  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": DeliveryState.PENDING}, "waits to be sent"),
        (
            {"state": DeliveryState.PENDING, "reason": "no answer", "not_before": 205.0},
            "no answer; next attempt in 5.0 s",
        ),
        ({"reason": "stored with a warning"}, "stored with a warning"),
    ],
)
def test_a_delivery_explains_itself(changes: dict[str, object], said: str) -> None:
    assert explain_delivery(replace(DELIVERY, **changes), 200.0) == said  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "committed after 10.0 s"),
        ({"committed_at": None, "commitment": CommitmentState.NONE}, ""),
        (
            {"committed_at": None, "commitment": CommitmentState.DUE, "commitment_due_at": 202.0},
            "due: asked in 2.0 s",
        ),
        (
            {
                "committed_at": None,
                "commitment": CommitmentState.OVERDUE,
                "commitment_reason": "no report",
                "commitment_due_at": 260.0,
            },
            "overdue: no report; asked again in 60.0 s",
        ),
    ],
)
def test_a_commitment_explains_itself(changes: dict[str, object], said: str) -> None:
    assert explain_commitment(replace(DELIVERY, **changes), 200.0) == said  # pyright: ignore[reportArgumentType]


def test_a_study_that_waits_says_for_what() -> None:
    assert explain_receiving(STUDY, 30.0, 172.0) == ("the last of 64 instances came 12.0 s ago; complete after 30.0 s")
    more = replace(STUDY, reason="pacs has 412 instances, 64 are here")
    assert explain_receiving(more, 30.0, 172.0) == "pacs has 412 instances, 64 are here (nothing came for 12.0 s)"


def tell(archive: Archive, lines: int) -> None:
    with archive.database.write() as connection:
        connection.execute(
            insert(schema.studies).values(
                study_uid="1.2.3", state=StudyState.UNWANTED, first_received_at=1.0, last_received_at=2.0
            )
        )
        connection.execute(
            insert(schema.events),
            [{"at": float(n), "actor": "test", "study_uid": "1.2.3", "what": f"line {n}"} for n in range(lines)],
        )


def test_of_a_long_story_its_beginning_and_its_end_are_read(archive: Archive) -> None:
    tell(archive, 10_000)
    begin, left_out, end = archive.some_events("1.2.3", 8)
    assert [line.what for line in begin] == ["line 0", "line 1"]
    assert left_out == 9992
    assert [line.what for line in end] == [f"line {n}" for n in range(9994, 10_000)]


@pytest.mark.parametrize("lines", [1, 8])
def test_a_short_story_is_read_whole(archive: Archive, lines: int) -> None:
    tell(archive, lines)
    begin, left_out, end = archive.some_events("1.2.3", 8)
    assert [line.what for line in (*begin, *end)] == [f"line {n}" for n in range(lines)]
    assert left_out == 0


def test_what_is_left_out_is_said_where_it_would_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"node: {{storage: {tmp_path / 'var'}}}\nmodels: {{path: {tmp_path}}}\n")
    archive = Archive(tmp_path / "var", f"sqlite:///{tmp_path / 'var' / 'radnode.sqlite'}")
    tell(archive, 20)
    archive.close()
    show_study(Namespace(config=config, study="1.2.3", json=False, events=4))
    shown = capsys.readouterr().out
    places = [shown.index(part) for part in ("line 0", "... 16 lines are left out (--events", "line 17", "line 19")]
    assert places == sorted(places)
    assert shown.rstrip().endswith("durations  receiving 1.0 s")


def test_a_delivery_is_shown_with_the_model_that_made_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two models without a result, the deliveries are of one kind each."""
    config = tmp_path / "config.yaml"
    config.write_text(f"node: {{storage: {tmp_path / 'var'}}}\nmodels: {{path: {tmp_path}}}\n")
    archive = Archive(tmp_path / "var", f"sqlite:///{tmp_path / 'var' / 'radnode.sqlite'}")
    owe(archive, [write_series(tmp_path / "images", np.zeros((1, 4, 4), np.int16))[0]], "pacs")
    archive.close()
    show_study(Namespace(config=config, study="1.2.3", json=False, events=4))
    table = capsys.readouterr().out.split("\ndeliveries\n")[1].splitlines()
    assert table[0].split()[:5] == ["delivery", "job", "model", "kind", "peer"]
    assert table[1].split()[:5] == ["1", "1", "m", "seg", "pacs"]
    show_study(Namespace(config=config, study="1.2.3", json=True, events=4))
    (delivery,) = json.loads(capsys.readouterr().out)["deliveries"]
    assert (delivery["job"], delivery["model"]) == (1, "m")


def test_check_says_what_holds_old_studies(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"node: {{storage: {tmp_path / 'var'}}}\nmodels: {{path: {tmp_path}}}\n")
    archive = Archive(tmp_path / "var", f"sqlite:///{tmp_path / 'var' / 'radnode.sqlite'}")
    owe(archive, [write_series(tmp_path / "images", np.zeros((1, 4, 4), np.int16))[0]], "pacs")
    archive.close()
    (finding,) = (finding for finding in look_at_storage(load_config(config)) if finding.what == "retention")
    assert finding.verdict == "note"
    assert finding.says.startswith(
        "1 studies are older than keep.studies and stay: 1 with a delivery that is still tried (docs/operations.md"
    )


@pytest.mark.parametrize(
    ("taken", "made", "alone"),
    [
        ("", "[seg, sr]", False),
        (", results: [sr]", "[seg, sr]", True),
        (", results: [sr, seg]", "[seg, sr]", False),
        ("", "[sr, summary]", True),
        (", results: [summary]", "[sr, summary]", False),
    ],
)
def test_check_knows_who_gets_reports_without_their_segmentation(
    *, tmp_path: Path, taken: str, made: str, alone: bool
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"node: {{storage: {tmp_path / 'var'}}}\nmodels: {{path: {tmp_path}}}\n"
        f"peers: {{pacs: {{ae_title: A, host: h, port: 104{taken}}}}}\n"
        f"routes: [{{name: r, when: {{}}, run: [m], send_to: [pacs], results: {made}}}]\n"
    )
    assert gets_reports_alone(load_config(config), "pacs") is alone
