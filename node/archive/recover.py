"""What a crash left behind, found at the next start: in time linear in what was on its way, not in what is kept.

A file has a name in the spool from its first byte until its row is committed (`node.archive.ingest`). So the spool
says all: a name whose process is dead is either a fragment, or a file with a second, final name that has its row (then
only the name in the spool is superfluous) or has none. Then it was never acknowledged, and goes; but where nothing was
synced (`durability: relaxed`, which its name says) it may have been, and is adopted if the machine has not died since.
The other way round, rows newer than the last clean stop are compared with their files, by size; a study that lacks one
is quarantined and says so.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pydicom.filereader import read_file_meta_info
from sqlalchemy import func, insert, select, update

from node.archive import schema
from node.archive.database import record_event
from node.archive.files import SPOOL_SUFFIX, LeftFile, dataset_offset, remove
from node.archive.ingest import instance_path, is_whole, quarantine_name
from node.archive.records import StudyState
from node.archive.store import Archive
from node.dicom.header_scan import HeaderScan
from node.dicom.identity import Identity
from node.errors import ArchiveError

_log = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 16
_MAXIMUM_INFLATED_BYTES = 1 << 30


@dataclass(frozen=True)
class Recovered:
    """What `recover` found; false when nothing was to be done."""

    fragments: int = 0  # files that were never complete, or are no more, removed
    unacknowledged: int = 0  # complete files without a row, removed
    adopted: int = 0  # complete files whose senders may have been told Success, and which have their row now
    kept: int = 0  # files with a row that lost their second name only
    missing: int = 0  # rows whose file is missing or cut: an alarm

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def __str__(self) -> str:
        return (
            f"{self.fragments} fragments and {self.unacknowledged} files that were never acknowledged removed, "
            f"{self.adopted} adopted, {self.kept} kept, {self.missing} missing"
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
    """Everything up to now has been looked at or was stored in good order.

    What this machine did not sync (`durability: relaxed`) is synced now. For others that share the archive nobody can
    say, so there the next start looks at all of it.
    """
    if not archive.durable:
        if archive.database.url.get_backend_name() != "sqlite":
            return
        os.sync()
    with archive.database.write() as connection:
        newest = connection.scalar(select(func.max(schema.instances.c.id))) or 0
        done = connection.execute(update(schema.recovery).values(checked_instance_id=newest))
        if done.rowcount == 0:
            connection.execute(insert(schema.recovery).values(id=1, checked_instance_id=newest))


def _settle(archive: Archive, path: Path) -> str | None:
    """Decide about one name in the spool; None when its process lives, it went meanwhile, or it stays."""
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
        identity, sender = _identify(left.path)
    except Exception as error:  # pydicom raises many kinds over a damaged file
        if left.is_relaxed and (left.is_of_this_boot or not left.is_of_this_machine):
            return _leave(left, error)
        return _settle_damaged(archive, left.token)
    relative = instance_path(identity, left.token)
    if _has_row(archive, relative, identity.sop_instance_uid):
        return "kept"
    if left.is_relaxed and not left.is_of_this_machine:
        return None  # its own machine, which may be alive, adopts it
    if left.is_of_this_boot:
        return _adopt(archive, left, identity, sender)
    remove([archive.storage / relative])
    quarantined = archive.storage / "quarantine" / quarantine_name(identity.sop_instance_uid, left.path)
    if quarantined.exists() and not _is_told(archive, identity.study_uid, quarantined.name):
        remove([quarantined])  # the sender was not told; it comes again
    return "unacknowledged"


def _identify(path: Path) -> tuple[Identity, str]:
    """What a file of ours holds, read as it was when it was received, and the AE title that sent it."""
    meta = read_file_meta_info(path)
    scan = HeaderScan(str(meta.TransferSyntaxUID), maximum_inflated_bytes=_MAXIMUM_INFLATED_BYTES)
    with path.open("rb") as file:
        file.seek(dataset_offset(path))
        while not scan.knows_identity and (piece := file.read(_PIECE_BYTES)):
            scan.feed(piece)
    return scan.early_identity(), str(meta.get("SourceApplicationEntityTitle", ""))


def _adopt(archive: Archive, left: LeftFile, identity: Identity, sender: str) -> str | None:
    """Give a file its row that may have been acknowledged before it had one; `ArchiveError` when that must wait."""
    try:
        archive.ingest.adopt(left, identity, sender)
    except Exception as error:
        if not archive.ingest.is_at_fault(error):
            raise ArchiveError(f"an instance cannot be adopted now: {type(error).__name__}") from error
        return _leave(left, error)
    return "adopted"


def _leave(left: LeftFile, error: Exception) -> None:
    _log.error("ALARM: an instance that may have been acknowledged stays in %s: %s", left.path, type(error).__name__)


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
        broken = [row for row in connection.execute(query) if not is_whole(archive.storage / row.path, row.size)]
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
