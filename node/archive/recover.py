"""What a crash left behind, found at the next start: in time linear in what was on its way, not in what is kept.

A file has a name in the spool from its first byte until its row is committed (`node.archive.ingest`). So the spool
says all: a name whose process is dead is either a fragment, or a file with a second, final name that has its row (then
only the name in the spool is superfluous) or has none. That one is adopted: whether its sender was told Success depends
on `receive.durability`, and one who was not sends it again, and is told that it is here. The other way round, rows
newer than the last clean stop are compared with their files; a study that lacks one is quarantined and says so.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pydicom import dcmread
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag
from sqlalchemy import func, insert, select, update

from node.archive import schema
from node.archive.database import record_event
from node.archive.files import SPOOL_SUFFIX, LeftFile, remove
from node.archive.ingest import instance_path, quarantine_name
from node.archive.records import StudyState
from node.archive.store import Archive
from node.dicom.identity import read_identity
from node.errors import ArchiveError

_log = logging.getLogger(__name__)

_LAST_OF_IDENTITY = 0x0020000E  # Series Instance UID


@dataclass(frozen=True)
class Recovered:
    """What `recover` found; false when nothing was to be done."""

    fragments: int = 0  # files that were never complete, removed
    adopted: int = 0  # complete files without a row, which they have now
    kept: int = 0  # files with a row that lost their second name only
    missing: int = 0  # rows whose file is missing or cut: an alarm

    def __bool__(self) -> bool:
        return bool(self.fragments or self.adopted or self.kept or self.missing)

    def __str__(self) -> str:
        return (
            f"{self.fragments} fragments removed, {self.adopted} files without a row adopted, {self.kept} kept, "
            f"{self.missing} missing"
        )


def recover(archive: Archive) -> Recovered:
    """Bring files and rows together again; `note_clean_stop` makes the next call cheap."""
    counts: Counter[str] = Counter()
    for path in sorted((archive.storage / "spool").glob(f"*{SPOOL_SUFFIX}")):
        if (what := _settle(archive, path)) is not None:
            counts[what] += 1
    counts["missing"] = _report_missing(archive)
    return Recovered(**counts)


def note_clean_stop(archive: Archive) -> None:
    """Everything up to now has been looked at or was stored in good order."""
    with archive.database.write() as connection:
        newest = connection.scalar(select(func.max(schema.instances.c.id))) or 0
        done = connection.execute(update(schema.recovery).values(checked_instance_id=newest))
        if done.rowcount == 0:
            connection.execute(insert(schema.recovery).values(id=1, checked_instance_id=newest))


def _settle(archive: Archive, path: Path) -> str | None:
    """Decide about one name in the spool; None when its process lives or it went meanwhile."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # NFS locks for writing what is open for writing only
    except FileNotFoundError:
        return None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if os.fstat(descriptor).st_nlink < 2:
            what = "fragments"
        elif (what := _settle_named(archive, LeftFile(path, descriptor))) is None:
            return None
        remove([path])
        return what
    finally:
        os.close(descriptor)


def _settle_named(archive: Archive, left: LeftFile) -> str | None:
    """A file with a second name: whether a row stands behind it, or will; None where it stays as it is."""
    try:
        with left.path.open("rb") as file:
            dataset = read_partial(file, stop_when=_is_behind_identity)
        identity = read_identity(dataset, dataset.file_meta.TransferSyntaxUID)
        sender = str(dataset.file_meta.get("SourceApplicationEntityTitle", ""))
    except Exception:  # pydicom raises many kinds over a damaged file
        return _settle_damaged(archive, left.token)
    if _has_row(archive, instance_path(identity, left.token), identity.sop_instance_uid):
        return "kept"
    # A file that was named without a sync may be cut where the machine has died since.
    if not left.is_of_this_boot and not _is_whole_data_set(left.path):
        return _settle_damaged(archive, left.token)
    quarantined = archive.storage / "quarantine" / quarantine_name(identity.sop_instance_uid, left.path)
    if quarantined.exists() and not _is_told(archive, identity.study_uid, quarantined.name):
        remove([quarantined])  # it comes there once more, and is told
    try:
        archive.ingest.adopt(left, identity, sender)
    except (ArchiveError, ValueError) as error:  # ValueError: what the database cannot hold
        _log.error("ALARM: a complete instance without a row stays in %s: %s", left.path, error)
        return None
    return "adopted"


def _is_behind_identity(tag: BaseTag, _vr: str | None, _length: int) -> bool:
    return tag > _LAST_OF_IDENTITY


def _is_whole_data_set(path: Path) -> bool:
    """Whether the file ends where its last element does; no value is read on the way."""
    try:
        with path.open("rb") as file:
            dcmread(file, defer_size=0)
            return file.tell() == os.fstat(file.fileno()).st_size
    except Exception:  # pydicom raises many kinds over a damaged file
        return False


def _settle_damaged(archive: Archive, token: str) -> str:
    """A named file without its content: removed where no row stands behind it, else `_report_missing` tells."""
    for final in (archive.storage / "instances").glob(f"*/*/*-{token}.dcm"):
        if _has_row(archive, final.relative_to(archive.storage)):
            return "kept"
        remove([final])
    return "fragments"


def _has_row(archive: Archive, relative: Path, sop_instance_uid: str | None = None) -> bool:
    """Whether a row names this file; without the UID, which has an index, all rows are looked through."""
    columns = schema.instances.c
    query = select(columns.id).where(columns.path == relative.as_posix())
    if sop_instance_uid is not None:
        query = query.where(columns.sop_instance_uid == sop_instance_uid)
    with archive.database.read() as connection:
        return connection.scalar(query.limit(1)) is not None


def _is_told(archive: Archive, study_uid: str, name: str) -> bool:
    columns = schema.events.c
    query = select(columns.id).where(columns.study_uid == study_uid, columns.what.endswith(f"quarantine/{name}"))
    with archive.database.read() as connection:
        return connection.scalar(query.limit(1)) is not None


def _report_missing(archive: Archive) -> int:
    """Quarantine the studies whose newest rows lack their file, or have it in another size."""
    columns = schema.instances.c
    with archive.database.read() as connection:
        checked = connection.scalar(select(schema.recovery.c.checked_instance_id)) or 0
        query = (
            select(
                columns.sop_instance_uid, columns.path, columns.size, schema.studies.c.id, schema.studies.c.study_uid
            )
            .select_from(schema.instances.join(schema.series).join(schema.studies))
            .where(columns.id > checked)
        )
        broken = [row for row in connection.execute(query) if not _is_whole(archive.storage / row.path, row.size)]
    for row in broken:
        reason = f"the file of instance {row.sop_instance_uid} is missing or cut: send the study again"
        with archive.database.write() as connection:
            connection.execute(
                update(schema.studies)
                .where(schema.studies.c.id == row.id)
                .values(state=StudyState.QUARANTINED, reason=reason)
            )
            record_event(connection, "recover", row.study_uid, f"ALARM: {reason}")
    return len(broken)


def _is_whole(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False
