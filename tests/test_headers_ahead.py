"""Headers that are read before their study is complete."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import generate_uid
from sqlalchemy import update

from node import route
from node.archive import schema
from node.archive.records import Study
from node.archive.store import Archive
from node.headers_ahead import HeadersAhead
from node.receive.importer import Limits, import_path
from tests.dicom.slices import write_series

Send = Callable[[str, int], Study]


@pytest.fixture
def send(archive: Archive, tmp_path: Path) -> Send:
    """So many more slices of a study arrive, some seconds ago."""
    uids: dict[str, str] = {}

    def send_slices(name: str, slices: int) -> Study:
        uid = uids.setdefault(name, generate_uid())
        write_series(tmp_path / f"{name}-{slices}", np.zeros((slices, 4, 4), np.int16), StudyInstanceUID=uid)
        list(import_path(tmp_path / f"{name}-{slices}", archive, Limits()))
        columns = schema.studies.c
        with archive.database.write() as connection:
            came = update(schema.studies).where(columns.study_uid == uid)
            connection.execute(came.values(last_received_at=time.time() - 5))
        return archive.study(uid)

    return send_slices


def test_a_study_is_decided_on_without_reading_it_again(
    archive: Archive, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = HeadersAhead(archive)
    study = send("a", 5)
    plain = route.read_headers(archive, study)
    ahead.read([study], 10)
    read: list[Path] = []
    monkeypatch.setattr("node.route.read_header", read.append)
    known = ahead.take(study)
    assert len(known) == 5
    assert route.read_headers(archive, study, known) == plain
    assert read == []
    assert ahead.take(study) == {}


def test_what_came_since_is_read_then(archive: Archive, send: Send) -> None:
    ahead = HeadersAhead(archive)
    ahead.read([send("a", 5)], 10)
    study = send("a", 3)
    known = ahead.take(study)
    assert len(known) == 5
    assert sum(map(len, route.read_headers(archive, study, known).values())) == 8


def test_while_images_come_nothing_is_read(archive: Archive, send: Send) -> None:
    ahead = HeadersAhead(archive)
    study = send("a", 5)
    with archive.database.write() as connection:
        connection.execute(update(schema.studies).values(last_received_at=time.time()))
    ahead.read([archive.study(study.study_uid)], 10)
    assert ahead.take(study) == {}


def test_it_goes_on_where_its_time_ended(archive: Archive, send: Send) -> None:
    ahead = HeadersAhead(archive)
    study = send("a", 5)
    ahead.read([study], 0)
    assert ahead.take(study) == {}
    ahead.read([study], 10)
    assert len(ahead.take(study)) == 5


def test_it_keeps_no_more_than_it_may(archive: Archive, send: Send) -> None:
    ahead = HeadersAhead(archive, most_bytes=2500)  # a header is some 1,000 bytes
    studies = [send("a", 5), send("b", 5)]
    ahead.read(studies, 10)
    assert sum(len(ahead.take(study)) for study in studies) in (2, 3, 4)


def test_a_study_that_was_decided_on_elsewhere_is_forgotten(archive: Archive, send: Send) -> None:
    ahead = HeadersAhead(archive)
    first, second = send("a", 5), send("b", 2)
    ahead.read([first, second], 10)
    ahead.read([second], 10)
    assert (len(ahead.take(first)), len(ahead.take(second))) == (0, 2)


def test_a_lost_file_is_left_to_the_decision(archive: Archive, send: Send) -> None:
    ahead = HeadersAhead(archive)
    study = send("a", 3)
    path = archive.storage / archive.instances(study.id)[1].path
    path.unlink()
    ahead.read([study], 10)
    assert path not in (known := ahead.take(study))
    assert len(known) == 2
