"""Rows that follow the answer: nothing that was taken is lost, whatever the database says."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import closing
from unittest.mock import Mock

import pytest

from node.archive import rows_behind
from node.archive.files import Digester
from node.archive.ingest import Ingest, Outcome
from node.archive.recover import Recovered, recover
from node.archive.rows_behind import RowsBehind
from node.archive.store import Archive
from node.dicom.identity import Identity
from node.errors import ArchiveError
from node.receive.storage import file_header
from tests.archive.test_ingest import files, identity
from tests.receive.sending import ct, encode
from tests.running_node import wait_until


@pytest.fixture
def ingest(archive: Archive) -> Iterator[Ingest]:
    with closing(Ingest(archive.storage, archive.database)) as ingest:
        yield ingest


@pytest.fixture
def behind(archive: Archive, ingest: Ingest) -> Iterator[RowsBehind]:
    with closing(RowsBehind(ingest, archive.database)) as behind:
        yield behind


def take(
    archive: Archive, behind: RowsBehind, of: Identity, content: bytes = b"content", digester: Digester | None = None
) -> None:
    """Receive one instance."""
    spooled = archive.spool_file(digester, relaxed=True)
    try:
        spooled.write(content)
        behind.take(spooled, of, "CT1")
    except BaseException:
        spooled.close()
        raise


def refuse(archive: Archive) -> Mock:
    """An `Ingest._insert` of a database whose disk is full."""
    return Mock(side_effect=archive.database.engine.dialect.loaded_dbapi.OperationalError("disk full"))


def test_every_instance_has_its_row_when_it_is_settled(archive: Archive, behind: RowsBehind) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))

    def send(first: int) -> None:
        with closing(Digester()) as digester:
            for number in range(first, first + 100):
                take(archive, behind, identity(number), digester=digester)

    senders = [threading.Thread(target=send, args=(1000 * number,)) for number in range(4)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert behind.settle()
    assert archive.study("1.1").instances == 400
    assert len(files(archive, "instances")) == 400
    assert files(archive, "spool") == []
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2


def test_what_comes_twice_is_there_once_and_another_content_in_quarantine(
    archive: Archive, behind: RowsBehind, caplog: pytest.LogCaptureFixture
) -> None:
    for content in (b"first", b"first", b"second"):
        take(archive, behind, identity(), content)
    assert behind.settle()
    (instance,) = archive.instances(1)
    assert (archive.storage / instance.path).read_bytes() == b"first"
    assert len(files(archive, "instances")) == 1
    assert [path.read_bytes() for path in files(archive, "quarantine")] == [b"second"]
    assert "ALARM: instance 1.3.1 came again from CT1 with other content" in caplog.text


def test_while_the_database_refuses_nothing_more_is_taken(
    archive: Archive, ingest: Ingest, behind: RowsBehind, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(ingest, "_insert", refuse(archive))
        for number in range(3):
            take(archive, behind, identity(number))
        assert not behind.settle()
        with pytest.raises(ArchiveError, match="the database did not take"):
            take(archive, behind, identity(4))
        assert len(files(archive, "spool")) == 3
    wait_until(behind.settle, 10, "the database takes them again")
    take(archive, behind, identity(5))
    assert behind.settle()
    assert archive.study("1.1").instances == 4


def test_one_that_the_database_cannot_hold_does_not_stop_the_others(
    archive: Archive,
    ingest: Ingest,
    behind: RowsBehind,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner = ingest._insert

    def insert(cursor, arrival, now):
        if arrival.identity.sop_instance_uid == "1.3.1":
            raise ValueError("a string literal cannot contain NUL")
        return inner(cursor, arrival, now)

    monkeypatch.setattr(ingest, "_insert", insert)
    for number in range(3):
        take(archive, behind, identity(number))
    assert behind.settle()
    assert archive.study("1.1").instances == 2
    assert len(files(archive, "spool")) == 1, "it was acknowledged, so it stays"
    told = "ALARM: instance 1.3.1 from CT1 was acknowledged and cannot have a row (ValueError)"
    assert told in caplog.text
    assert any(told in event.what for event in archive.events("1.1"))


def test_an_image_that_the_disk_does_not_give_back_does_not_stop_the_others(
    archive: Archive, behind: RowsBehind, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Digester()) as digester:
        pread = os.pread
        monkeypatch.setattr(os, "pread", Mock(side_effect=OSError(errno.EIO, "I/O error")))
        take(archive, behind, identity(1), digester=digester)
        digester.wait()
        monkeypatch.setattr(os, "pread", pread)
        take(archive, behind, identity(2), digester=digester)
        assert behind.settle()
    assert [one.sop_instance_uid for one in archive.instances(1)] == ["1.3.2"]
    assert len(files(archive, "spool")) == 1


def test_a_digest_is_whole_when_its_digester_ended(archive: Archive) -> None:
    digester = Digester()
    with archive.spool_file(digester) as spooled:
        spooled.write(b"first")
        digester.close()
        spooled.write(b"second")
        assert spooled.sha256 == hashlib.sha256(b"firstsecond").hexdigest()


def test_after_the_end_nothing_is_taken(archive: Archive, ingest: Ingest) -> None:
    behind = RowsBehind(ingest, archive.database)
    behind.close()
    with pytest.raises(ArchiveError):
        take(archive, behind, identity())
    assert files(archive, "instances") == files(archive, "spool") == []


def test_what_has_no_row_at_the_end_is_adopted_at_the_next_start(
    archive: Archive, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = ct()
    of = identity(sop_instance_uid=image.SOPInstanceUID, study_uid=image.StudyInstanceUID)
    header = file_header(image.SOPClassUID, image.SOPInstanceUID, "1.2.840.10008.1.2.1", "CT1")
    with monkeypatch.context() as broken:
        broken.setattr(ingest, "_insert", refuse(archive))
        with closing(RowsBehind(ingest, archive.database)) as behind:
            take(archive, behind, of, header + encode(image))
    assert recover(archive) == Recovered(adopted=1)
    (instance,) = archive.instances(1)
    assert instance.sop_instance_uid == image.SOPInstanceUID
    assert (archive.storage / instance.path).read_bytes() == header + encode(image)
    assert files(archive, "spool") == []


@pytest.mark.parametrize("named", [True, False])  # its folder was not synced
def test_what_is_owed_at_an_orderly_end_outlives_the_machine(
    archive: Archive, ingest: Ingest, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    image = ct()
    of = identity(sop_instance_uid=image.SOPInstanceUID, study_uid=image.StudyInstanceUID)
    header = file_header(image.SOPClassUID, image.SOPInstanceUID, "1.2.840.10008.1.2.1", "CT1")
    with monkeypatch.context() as broken:
        broken.setattr(ingest, "_insert", refuse(archive))
        with closing(RowsBehind(ingest, archive.database)) as behind:
            take(archive, behind, of, header + encode(image))
    monkeypatch.setattr("node.archive.files._boot", lambda: "another-")
    if not named:
        (final,) = files(archive, "instances")
        final.unlink()
    assert recover(archive) == Recovered(adopted=1)
    (instance,) = archive.instances(1)
    assert (archive.storage / instance.path).read_bytes() == header + encode(image)
    assert files(archive, "spool") == []


def test_a_durable_door_makes_what_is_here_as_safe(
    archive: Archive, behind: RowsBehind, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(archive, behind, identity())
    assert behind.settle()
    (instance,) = archive.instances(1)
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda each: synced.append(os.readlink(f"/proc/self/fd/{each}")) or fsync(each))
    with archive.spool_file() as spooled:
        spooled.write(b"content")
        assert archive.keep_instance(spooled, identity(), "CT2") is Outcome.DUPLICATE
    assert str(archive.storage / instance.path) in synced


def test_one_bad_image_costs_no_more_than_each_alone(
    archive: Archive, ingest: Ingest, behind: RowsBehind, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = Mock(side_effect=ingest._insert)

    def insert(cursor, arrival, now):
        if arrival.identity.sop_instance_uid == "1.3.99":
            raise ValueError("a string literal cannot contain NUL")
        return inner(cursor, arrival, now)

    monkeypatch.setattr(ingest, "_insert", insert)
    with ingest._committing:
        for number in range(100):
            take(archive, behind, identity(number))
    assert behind.settle(30)
    assert archive.study("1.1").instances == 99
    assert inner.call_count < 500


def test_it_does_not_fall_behind_without_bound(
    archive: Archive, ingest: Ingest, behind: RowsBehind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_behind, "MOST", 5)
    monkeypatch.setattr(rows_behind, "LOCK_PATIENCE_S", 0.1)
    with ingest._committing:  # as a commit that takes long
        for number in range(5):
            take(archive, behind, identity(number))
        with pytest.raises(ArchiveError, match="too far behind"):
            take(archive, behind, identity(6))
    assert behind.settle(10)
    assert archive.study("1.1").instances == 5
