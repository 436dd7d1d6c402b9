"""Instances into the archive, from many threads and processes at once, on both databases."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from node.archive import schema
from node.archive.ingest import Outcome, instance_path
from node.archive.records import StudyState
from node.archive.store import Archive
from node.dicom.identity import Identity
from node.errors import ArchiveError


def identity(number: int = 1, **changes: str) -> Identity:
    """An instance of study 1.1."""
    values = {
        "sop_class_uid": "1.2.840.10008.5.1.4.1.1.2",
        "sop_instance_uid": f"1.3.{number}",
        "study_uid": "1.1",
        "series_uid": "1.2",
        "transfer_syntax_uid": "1.2.840.10008.1.2.1",
        "patient_id": "P1",
    }
    return Identity(**values | changes)


def keep(archive: Archive, of: Identity, content: bytes = b"content") -> Outcome:
    """Store one instance."""
    with archive.spool_file() as spooled:
        spooled.write(content)
        return archive.keep_instance(spooled, of, "CT1")


def files(archive: Archive, folder: str) -> list[Path]:
    """Files below one folder of the storage."""
    return sorted(path for path in (archive.storage / folder).rglob("*") if path.is_file())


def test_counts_follow_what_is_stored(archive: Archive) -> None:
    for number in range(3):
        assert keep(archive, identity(number)) is Outcome.STORED
    assert keep(archive, identity(9, series_uid="1.2.9")) is Outcome.STORED
    assert keep(archive, identity(1)) is Outcome.DUPLICATE
    study = archive.study("1.1")
    assert study.instances == 4
    assert [(series.series_uid, series.instances) for series in archive.series(study.id)] == [("1.2", 3), ("1.2.9", 1)]
    assert len(files(archive, "instances")) == 4
    assert files(archive, "spool") == []


def test_many_threads_and_one_instance(archive: Archive) -> None:
    """Eight associations bring the same and other instances at the same moment: each is there once."""
    outcomes: list[Outcome] = []
    errors: list[Exception] = []

    def send(thread: int) -> None:
        try:
            for number in range(20):
                outcomes.append(keep(archive, identity(number)))
                outcomes.append(keep(archive, identity(1000 * (thread + 1) + number)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert outcomes.count(Outcome.STORED) == 20 + 8 * 20
    assert outcomes.count(Outcome.DUPLICATE) == 7 * 20
    assert archive.study("1.1").instances == 180
    assert len(files(archive, "instances")) == 180


def test_two_contents_at_the_same_moment(archive: Archive) -> None:
    """Whichever comes first stays whole; the other is in quarantine, whole."""
    contents = [bytes([number]) * 1000 for number in range(4)]
    barrier = threading.Barrier(4)
    outcomes = []

    def send(content: bytes) -> None:
        barrier.wait()
        outcomes.append(keep(archive, identity(), content))

    threads = [threading.Thread(target=send, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [Outcome.CONFLICT] * 3 + [Outcome.STORED]
    kept = [path.read_bytes() for folder in ("instances", "quarantine") for path in files(archive, folder)]
    assert sorted(kept) == contents


def test_a_late_instance_reopens_a_routed_study(archive: Archive) -> None:
    keep(archive, identity(1))
    with archive.database.write() as connection:
        connection.execute(update(schema.studies).values(state=StudyState.ROUTED))
    keep(archive, identity(2))
    study = archive.study("1.1")
    assert (study.state, study.revision) == (StudyState.RECEIVING, 2)
    keep(archive, identity(3))
    assert archive.study("1.1").revision == 2


def test_a_second_patient_quarantines(archive: Archive) -> None:
    keep(archive, identity(1))
    keep(archive, identity(2, patient_id="P2"))
    keep(archive, identity(3, patient_id="P3"))
    study = archive.study("1.1")
    assert (study.state, study.instances) == (StudyState.QUARANTINED, 3)
    assert sum("two patients" in event.what for event in archive.events("1.1")) == 1


def test_a_failure_leaves_nothing(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transaction fails for one of the instances that arrive together: that one is refused and gone."""
    inner = archive.ingest._insert

    def refuse(cursor, arrival, now):
        if arrival.identity.sop_instance_uid == "1.3.7":
            raise ArchiveError("refused by the test")
        return inner(cursor, arrival, now)

    monkeypatch.setattr(archive.ingest, "_insert", refuse)
    refused = []

    def send(number: int) -> None:
        try:
            keep(archive, identity(number))
        except ArchiveError:
            refused.append(number)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == [7]
    assert archive.study("1.1").instances == 11
    assert len(files(archive, "instances")) == 11
    assert files(archive, "spool") == []


def test_retention_may_remove_the_folder_meanwhile(archive: Archive) -> None:
    """A study is deleted between the naming of its next instance and that instance's row."""
    keep(archive, identity(1))
    with archive.database.write() as connection:
        connection.execute(update(schema.studies).values(state=StudyState.ROUTED))
    with archive.spool_file() as spooled:
        spooled.write(b"late")
        spooled.sync()
        spooled.link(archive.storage / instance_path(identity(2), spooled.token))
        final = archive.storage / instance_path(identity(2), spooled.token)
        assert archive.forget_finished(time.time() + 1) == ["1.1"]
        assert files(archive, "instances") == [final]
        final.unlink()  # whoever did it: the spool still has it
        final.parent.rmdir()
        assert archive.keep_instance(spooled, identity(2), "CT1") is Outcome.STORED
    (kept,) = files(archive, "instances")
    assert kept.read_bytes() == b"late"


@pytest.mark.parametrize("same", [True, False], ids=["the same instance", "another one of the study"])
def test_two_receivers_and_the_first_instance_of_a_study(archive: Archive, same: bool) -> None:
    """Two machines begin to receive one study at the same moment: neither refuses an image."""
    rounds = 60
    url = archive.database.url.render_as_string(hide_password=False)
    together = threading.Barrier(2, timeout=60)
    errors: list[Exception] = []
    outcomes: list[Outcome] = []

    def receive(other: Archive, machine: int) -> None:
        for number in range(rounds):
            uid = f"1.9.{number}.{0 if same else machine}"
            together.wait()
            try:
                outcomes.append(
                    keep(other, identity(sop_instance_uid=uid, study_uid=f"1.7.{number}", series_uid=f"1.8.{number}"))
                )
            except Exception as error:
                errors.append(error)

    with closing(Archive(archive.storage, url)) as second:
        threads = [
            threading.Thread(target=receive, args=(other, machine)) for machine, other in enumerate((archive, second))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert outcomes.count(Outcome.STORED) == (rounds if same else 2 * rounds)
    studies = archive.studies(limit=2 * rounds)
    assert [study.instances for study in studies] == [1 if same else 2] * rounds
    assert len(files(archive, "instances")) == sum(study.instances for study in studies)


def test_a_commit_whose_answer_was_lost_keeps_the_file(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server ends after the commit and before it says so: what is tried again is known to be the same arrival."""
    ingest = archive.ingest
    transact = ingest._transact
    first = True

    def transact_and_lose(group: list[Any]) -> None:
        nonlocal first
        transact(group)
        if first:
            first = False
            raise ingest._taken("the connection was lost")

    monkeypatch.setattr(ingest, "_transact", transact_and_lose)
    assert keep(archive, identity()) is Outcome.STORED
    (instance,) = archive.instances(archive.study("1.1").id)
    assert (archive.storage / instance.path).exists()
    assert archive.study("1.1").instances == 1


def test_an_instance_that_comes_while_its_study_is_deleted_is_kept(archive: Archive) -> None:
    """Retention and a receiver of another machine: what was acknowledged is there afterwards."""
    url = archive.database.url.render_as_string(hide_password=False)
    with closing(Archive(archive.storage, url)) as second:
        for number in range(40):
            keep(archive, identity(1))
            with archive.database.write() as connection:
                connection.execute(update(schema.studies).values(state=StudyState.UNWANTED, last_received_at=0.0))
            together = threading.Barrier(2, timeout=60)
            deleter = threading.Thread(
                target=lambda together=together: (together.wait(), second.forget_finished(time.time() - 60))
            )
            deleter.start()
            together.wait()
            assert keep(archive, identity(2 + number)) is Outcome.STORED
            deleter.join()
            study = archive.study("1.1")
            kept = {instance.sop_instance_uid: instance for instance in archive.instances(study.id)}
            assert (archive.storage / kept[f"1.3.{2 + number}"].path).exists()
            assert study.instances == len(kept)
