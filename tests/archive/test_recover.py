"""What a start finds after a crash; the crashes themselves are in tests/receive/test_faults.py."""

from __future__ import annotations

import errno
import threading
import time
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import pytest
from pydicom import Dataset

from node.archive import files
from node.archive.files import dataset_offset, file_sha256
from node.archive.ingest import Outcome, instance_path, quarantine_name
from node.archive.records import StudyState
from node.archive.recover import Recovered, note_clean_stop, recover
from node.archive.store import Archive
from node.dicom.identity import Identity
from node.errors import ArchiveError
from node.receive.importer import import_path
from node.receive.storage import file_header
from tests.archive.test_ingest import identity
from tests.benchmark.ingest import make_images
from tests.receive.sending import ct, encode


def left_behind(
    archive: Archive, *, named: bool, relaxed: bool = False, image: Dataset | None = None
) -> tuple[Path, Identity]:
    """A complete file in the spool as a dead process leaves it, with or without its final name."""
    image = image or ct()
    identity = Identity(
        image.SOPClassUID, image.SOPInstanceUID, image.StudyInstanceUID, image.SeriesInstanceUID, "1.2.840.10008.1.2.1"
    )
    with archive.spool_file(relaxed=relaxed) as spooled:
        spooled.write(file_header(image.SOPClassUID, image.SOPInstanceUID, "1.2.840.10008.1.2.1", "CT1"), hashed=False)
        spooled.write(encode(image))
        if named:
            spooled.link(archive.storage / instance_path(identity, spooled.token))
        spooled.leave()
    return spooled.path, identity


def test_nothing_to_do(archive: Archive) -> None:
    assert not recover(archive)


def test_fragments_and_unacknowledged_files_go(archive: Archive) -> None:
    fragment, _ = left_behind(archive, named=False)
    named, identity = left_behind(archive, named=True)
    final = archive.storage / instance_path(identity, named.stem)
    assert final.exists()
    assert recover(archive) == Recovered(fragments=1, unacknowledged=1)
    assert not any(path.exists() for path in (fragment, named, final))


def test_what_may_have_been_acknowledged_is_adopted(archive: Archive) -> None:
    """The row is the one that it would have had."""
    image = ct(PatientID="A\\B", StudyDate="20260102", StudyDescription="Thorax")
    named, identity = left_behind(archive, named=True, relaxed=True, image=image)
    assert recover(archive) == Recovered(adopted=1)
    (instance,) = archive.instances(1)
    final = archive.storage / instance.path
    assert final == archive.storage / instance_path(identity, named.stem)
    assert (instance.size, instance.received_from) == (final.stat().st_size, "CT1")
    assert instance.sha256 == file_sha256(final, dataset_offset(final))
    (study,) = archive.studies()
    assert (study.patient_id, study.study_date, study.description) == ("A\\B", "20260102", "Thorax")
    assert not named.exists()


def test_what_came_again_meanwhile_is_there_once_and_a_conflict_is_told(archive: Archive) -> None:
    image = ct()
    left_behind(archive, named=True, relaxed=True, image=image)
    left_behind(archive, named=True, relaxed=True, image=image)
    image.PatientComments = "another content"
    left_behind(archive, named=True, relaxed=True, image=image)
    assert recover(archive) == Recovered(adopted=3)
    assert len(archive.instances(1)) == len(list((archive.storage / "instances").rglob("*.dcm"))) == 1
    assert len(list((archive.storage / "quarantine").iterdir())) == 1
    assert any(
        "came again from CT1 with other content" in event.what for event in archive.events(image.StudyInstanceUID)
    )
    assert list((archive.storage / "spool").iterdir()) == []


def test_what_a_machine_left_that_has_ended_since_is_told_as_lost(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a sync a machine's end may take any part of a file."""
    named, identity = left_behind(archive, named=True, relaxed=True)
    monkeypatch.setattr(files, "_boot", lambda: "another-")
    assert recover(archive) == Recovered(lost=1)
    assert not named.exists()
    assert not (archive.storage / instance_path(identity, named.stem)).exists()
    (event,) = archive.events(identity.study_uid)
    assert event.what.startswith(f"ALARM: instance {identity.sop_instance_uid} from CT1")


def test_zeros_where_an_unsynced_file_was_are_no_instance(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may know a file's size and not its content; and what comes again takes its place."""
    image = ct()
    left_behind(archive, named=True, relaxed=True, image=image)
    assert recover(archive) == Recovered(adopted=1)
    (instance,) = archive.instances(1)
    whole = (archive.storage / instance.path).read_bytes()
    (archive.storage / instance.path).write_bytes(bytes(len(whole)))
    assert not recover(archive), "the machine has not ended: nobody reads its content"
    monkeypatch.setattr(files, "_boot", lambda: "another-")
    assert recover(archive) == Recovered(missing=1)
    assert archive.study(image.StudyInstanceUID).state == StudyState.QUARANTINED
    with archive.spool_file() as spooled:
        spooled.write(file_header(image.SOPClassUID, image.SOPInstanceUID, "1.2.840.10008.1.2.1", "CT1"), hashed=False)
        spooled.write(encode(image))
        of = Identity(
            image.SOPClassUID,
            image.SOPInstanceUID,
            image.StudyInstanceUID,
            image.SeriesInstanceUID,
            "1.2.840.10008.1.2.1",
        )
        assert archive.keep_instance(spooled, of, "CT1") is Outcome.STORED
    (instance,) = archive.instances(1)
    assert (archive.storage / instance.path).read_bytes() == whole
    study = archive.study(image.StudyInstanceUID)
    assert (study.state, study.reason, study.revision) == (StudyState.RECEIVING, "", 2)
    assert not recover(archive)


def test_what_cannot_be_read_now_stays(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    named, identity = left_behind(archive, named=True, relaxed=True)
    with monkeypatch.context() as broken:
        broken.setattr("node.archive.recover.read_file_meta_info", Mock(side_effect=OSError(errno.EIO, "I/O error")))
        assert not recover(archive)
    assert (archive.storage / instance_path(identity, named.stem)).exists()
    assert recover(archive) == Recovered(adopted=1)


def test_a_start_waits_for_a_database_that_takes_nothing(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    named, identity = left_behind(archive, named=True, relaxed=True)
    with monkeypatch.context() as broken:
        error = archive.database.engine.dialect.loaded_dbapi.OperationalError("disk full")
        broken.setattr(archive.ingest, "_insert", Mock(side_effect=error))
        with pytest.raises(ArchiveError, match="cannot be adopted now"):
            recover(archive)
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
    assert recover(archive) == Recovered(unacknowledged=1)
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


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"cut")])
def test_a_lost_file_that_comes_again_is_whole_again(archive: Archive, tmp_path: Path, damage) -> None:
    make_images(tmp_path / "images", 2, rows=16)
    list(import_path(tmp_path / "images", archive))
    lost, other = (archive.storage / one.path for one in archive.instances(1))
    damage(lost)
    assert recover(archive) == Recovered(missing=1)
    assert archive.studies()[0].state == StudyState.QUARANTINED
    assert [one.outcome for one in import_path(tmp_path / "images", archive)].count(Outcome.STORED) == 1
    assert not recover(archive)
    (study,) = archive.studies()
    assert (study.instances, study.state, study.reason) == (2, StudyState.RECEIVING, "")
    assert len(list((archive.storage / "instances").rglob("*.dcm"))) == 2
    assert other.exists()
    assert any(
        "missing or damaged, came again" in event.what for event in archive.events(archive.studies()[0].study_uid)
    )


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
