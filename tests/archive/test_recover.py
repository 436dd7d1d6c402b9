"""What a start finds after a crash; the crashes themselves are in tests/receive/test_faults.py."""

from __future__ import annotations

import os
import threading
import time
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import pytest

from node.archive import files
from node.archive.files import dataset_offset, file_sha256
from node.archive.ingest import Outcome, instance_path, quarantine_name
from node.archive.records import StudyState
from node.archive.recover import Recovered, note_clean_stop, recover
from node.archive.store import Archive
from node.dicom.identity import Identity
from node.receive.importer import import_path
from node.receive.storage import file_header
from tests.archive.test_ingest import identity
from tests.benchmark.ingest import make_images
from tests.receive.sending import ct, encode


def left_behind(archive: Archive, *, named: bool) -> tuple[Path, Identity]:
    """A complete file in the spool as a dead process leaves it, with or without its final name."""
    image = ct()
    identity = Identity(
        image.SOPClassUID, image.SOPInstanceUID, image.StudyInstanceUID, image.SeriesInstanceUID, "1.2.840.10008.1.2.1"
    )
    with archive.spool_file() as spooled:
        spooled.write(file_header(image.SOPClassUID, image.SOPInstanceUID, "1.2.840.10008.1.2.1", "CT1"), hashed=False)
        spooled.write(encode(image))
        if named:
            spooled.link(archive.storage / instance_path(identity, spooled.token))
        spooled.leave()
    return spooled.path, identity


def test_nothing_to_do(archive: Archive) -> None:
    assert not recover(archive)


def test_fragments_go_and_named_files_are_adopted(archive: Archive) -> None:
    fragment, _ = left_behind(archive, named=False)
    named, identity = left_behind(archive, named=True)
    final = archive.storage / instance_path(identity, named.stem)
    assert final.exists()
    assert recover(archive) == Recovered(fragments=1, adopted=1)
    assert not any(path.exists() for path in (fragment, named))
    (instance,) = archive.instances(1)
    assert archive.storage / instance.path == final
    assert (instance.size, instance.received_from) == (final.stat().st_size, "CT1")
    assert instance.sha256 == file_sha256(final, dataset_offset(final))


@pytest.mark.parametrize("lost", [1, 300])
def test_a_named_file_that_another_boot_left_cut_goes(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """Without a sync (durability: relaxed) a machine's death may take the end of a file that has its name."""
    whole, _ = left_behind(archive, named=True)
    cut, identity = left_behind(archive, named=True)
    os.truncate(cut, cut.stat().st_size - lost)
    monkeypatch.setattr(files, "_boot", lambda: "another-")
    assert recover(archive) == Recovered(fragments=1, adopted=1)
    assert not (archive.storage / instance_path(identity, cut.stem)).exists()
    assert not any(path.exists() for path in (whole, cut))


def test_what_the_database_does_not_take_stays(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    named, identity = left_behind(archive, named=True)
    with monkeypatch.context() as broken:
        error = archive.database.engine.dialect.loaded_dbapi.OperationalError("disk full")
        broken.setattr(archive.ingest, "_insert", Mock(side_effect=error))
        assert not recover(archive)
    assert named.exists()
    assert (archive.storage / instance_path(identity, named.stem)).exists()
    assert recover(archive) == Recovered(adopted=1)


def test_a_file_with_its_row_stays(archive: Archive, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 1, rows=16)
    list(import_path(tmp_path / "images", archive))
    (instance,) = archive.instances(1)
    final = archive.storage / instance.path
    token = final.stem.split("-")[1]
    (archive.storage / "spool" / f"{token}.part").hardlink_to(final)
    assert recover(archive) == Recovered(kept=1)
    assert final.exists()
    assert list((archive.storage / "spool").iterdir()) == []


def test_a_living_process_keeps_its_files(archive: Archive) -> None:
    with archive.spool_file() as spooled:
        spooled.write(b"on its way")
        assert not recover(archive)
        assert spooled.path.exists()


def test_a_conflict_that_was_not_told_goes(archive: Archive) -> None:
    spooled, identity = left_behind(archive, named=True)
    name = quarantine_name(identity.sop_instance_uid, spooled)
    (archive.storage / "quarantine" / name).hardlink_to(spooled)
    assert recover(archive) == Recovered(adopted=1)
    assert list((archive.storage / "quarantine").iterdir()) == []


def test_rows_without_a_file_raise_an_alarm(archive: Archive, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 3, rows=16)
    list(import_path(tmp_path / "images", archive))
    missing, cut, _ = archive.instances(1)
    (archive.storage / missing.path).unlink()
    (archive.storage / cut.path).write_bytes(b"cut")
    assert recover(archive) == Recovered(missing=2)
    (study,) = archive.studies()
    assert study.state == StudyState.QUARANTINED
    assert "send the study again" in study.reason
    alarms = [event.what for event in archive.events(study.study_uid) if event.what.startswith("ALARM")]
    assert len(alarms) == 2
    assert any(missing.sop_instance_uid in alarm for alarm in alarms)


def test_a_clean_stop_makes_the_next_start_short(archive: Archive, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 3, rows=16)
    list(import_path(tmp_path / "images", archive))
    note_clean_stop(archive)
    first = archive.instances(1)[0]
    (archive.storage / first.path).unlink()
    began = time.perf_counter()
    assert not recover(archive), "what was looked at before is not looked at again"
    assert time.perf_counter() - began < 1


def test_a_named_file_without_its_content_goes(archive: Archive, tmp_path: Path) -> None:
    """As a power cut leaves it where nothing was synced; with a row behind it, it raises the alarm."""
    damaged, identity = left_behind(archive, named=True)
    final = archive.storage / instance_path(identity, damaged.stem)
    damaged.write_bytes(b"")
    assert recover(archive) == Recovered(fragments=1)
    assert not final.exists()
    make_images(tmp_path / "images", 1, rows=16)
    list(import_path(tmp_path / "images", archive))
    (instance,) = archive.instances(1)
    final = archive.storage / instance.path
    (archive.storage / "spool" / f"{final.stem.split('-')[1]}.part").hardlink_to(final)
    final.write_bytes(b"")
    assert recover(archive) == Recovered(kept=1, missing=1)


def test_a_start_beside_a_receiver_takes_none_of_its_files(archive: Archive) -> None:
    """One machine starts again and again while another one receives into the same storage folder."""
    over = threading.Event()
    swept: list[Recovered] = []

    def start_again() -> None:
        with closing(Archive(archive.storage, archive.database.url.render_as_string(hide_password=False))) as other:
            while not over.is_set():
                swept.append(recover(other))

    starter = threading.Thread(target=start_again)
    starter.start()
    try:
        for number in range(300):
            with archive.spool_file() as spooled:
                spooled.write(b"on its way")
                assert spooled.path.exists(), "a file that is being received was swept away"
                assert archive.keep_instance(spooled, identity(number), "CT1") is Outcome.STORED
    finally:
        over.set()
        starter.join()
    assert swept
    assert not any(found.missing for found in swept)
    assert all((archive.storage / instance.path).exists() for instance in archive.instances(1))
