"""What a crash left behind, found at the next start: in time linear in what was on its way, not in what is kept.

A file has a name in the spool from its first byte until its row is committed (`node.archive.ingest`). So the spool
says all: a name whose process is dead is either a fragment, or a file with a second, final name that has its row (then
only the name in the spool is superfluous) or has none. Then it was never acknowledged, and goes; but where nothing was
synced (`durability: relaxed`, which its name says) it may have been, and is adopted if the machine has not ended since,
else it is told as lost. The other way round, rows newer than the last clean stop are compared with their files; a study
that lacks one is quarantined and says so.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydicom.filereader import read_file_meta_info
from sqlalchemy import Row, func, insert, select, update

from node.archive import schema
from node.archive.database import record_event
from node.archive.files import OWED_SUFFIX, SPOOL_SUFFIX, LeftFile, dataset_offset, is_intact, remove
from node.archive.ingest import LOST, Outcome, instance_path, quarantine_name
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
    lost: int = 0  # files that may have been acknowledged, of which a part may be missing, removed: an alarm
    missing: int = 0  # rows whose file is missing or damaged: an alarm

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def __str__(self) -> str:
        return (
            f"{self.fragments} fragments and {self.unacknowledged} files that were never acknowledged removed, "
            f"{self.adopted} adopted, {self.kept} kept, {self.lost} lost, {self.missing} missing"
        )


def recover(archive: Archive) -> Recovered:
    """Bring files and rows together again; `note_clean_stop` makes the next call cheap."""
    counts: Counter[str] = Counter()
    damaged: set[str] = set()
    for path in sorted((archive.storage / "spool").iterdir()):
        if path.suffix in (SPOOL_SUFFIX, OWED_SUFFIX) and (what := _settle(archive, path, damaged)) is not None:
            counts[what] += 1
    for what in _settle_damaged(archive, damaged):
        counts[what] += 1
    counts["missing"] = _report_missing(archive)
    return Recovered(**counts)


def note_clean_stop(archive: Archive) -> None:
    """Everything up to now has been looked at or was stored in good order.

    What was not synced when it came (`durability: relaxed`) is now.
    """
    with archive.database.read() as connection:
        newest = connection.scalar(select(func.max(schema.instances.c.id))) or 0
    if not archive.durable:
        os.sync()
    with archive.database.write() as connection:
        done = connection.execute(update(schema.recovery).values(checked_instance_id=newest))
        if done.rowcount == 0:
            connection.execute(insert(schema.recovery).values(id=1, checked_instance_id=newest))


def _settle(archive: Archive, path: Path, damaged: set[str]) -> str | None:
    """Decide about one name in the spool; None when its process lives, it went meanwhile, it stays, or it goes to
    `damaged`, whose final names have to be looked for.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # NFS locks for writing what is open for writing only
    except FileNotFoundError:
        return None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        # What is owed a row is synced under its name in the spool; the other one may be lost, and is given again.
        if os.fstat(descriptor).st_nlink < 2 and path.suffix != OWED_SUFFIX:
            what = "fragments"
        elif (what := _settle_named(archive, LeftFile(path, descriptor), damaged)) is None and path.stem not in damaged:
            return None
        remove([path])
        return what
    finally:
        os.close(descriptor)


def _settle_named(archive: Archive, left: LeftFile, damaged: set[str]) -> str | None:
    """A file with a second name: whether a row stands behind it, or will; None where it stays as it is."""
    try:
        identity, sender = _identify(left.path)
    except Exception as error:  # pydicom raises many kinds over a damaged file
        if left.is_relaxed and not left.outlived_its_machine:
            return _leave(left, error)
        damaged.add(left.token)
        return None
    relative = instance_path(identity, left.token)
    if _has_row(archive, relative, identity.sop_instance_uid):
        return "kept"
    if left.is_relaxed and not left.outlived_its_machine:
        return _adopt(archive, left, identity, sender)
    remove([archive.storage / relative])
    quarantined = archive.storage / "quarantine" / quarantine_name(identity.sop_instance_uid, left.path)
    if quarantined.exists() and not _is_told(archive, identity.study_uid, quarantined.name):
        remove([quarantined])  # the sender was not told; it comes again
    if left.is_relaxed:
        told = f"ALARM: instance {identity.sop_instance_uid} from {sender} was on its way when the machine ended"
        told += ", acknowledged without a sync (receive.durability: relaxed), and is lost: send the study again"
        _log.error("study %s: %s", identity.study_uid, told)
        with archive.database.write() as connection:
            record_event(connection, "recover", identity.study_uid, told)
        return "lost"
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
        outcome = archive.ingest.adopt(left, identity, sender)
    except Exception as error:
        if not archive.ingest.is_at_fault(error):
            raise ArchiveError(f"an instance cannot be adopted now: {type(error).__name__}") from error
        return _leave(left, error)
    if outcome is Outcome.CONFLICT:
        uid = identity.sop_instance_uid
        _log.error("ALARM: instance %s came again from %s with other content: quarantined", uid, sender)
    return "adopted"


def _leave(left: LeftFile, error: Exception) -> None:
    _log.error("ALARM: an instance that may have been acknowledged stays in %s: %s", left.path, type(error).__name__)


def _settle_damaged(archive: Archive, tokens: set[str]) -> Iterator[str]:
    """Named files without their content: removed where no row stands behind them, else `_report_missing` tells."""
    finals = (archive.storage / "instances").glob("*/*/*.dcm") if tokens else ()
    found = {token: final for final in finals if (token := final.stem.rpartition("-")[2]) in tokens}
    for token in tokens:
        final = found.get(token)
        if final is not None and _has_row(archive, final.relative_to(archive.storage)):
            yield "kept"
        else:
            remove([final] if final is not None else [])
            yield "fragments"


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
    """Quarantine the studies whose newest rows lack their file, or have another (`is_intact`)."""
    columns = schema.instances.c
    with archive.database.read() as connection:
        checked = connection.scalar(select(schema.recovery.c.checked_instance_id)) or 0
        query = (
            select(
                columns.sop_instance_uid,
                columns.path,
                columns.size,
                columns.sha256,
                schema.studies.c.id,
                schema.studies.c.study_uid,
            )
            .select_from(schema.instances.join(schema.series).join(schema.studies))
            .where(columns.id > checked)
        )
        broken = [row for row in connection.execute(query) if not _is_intact(archive, row)]
    for row in broken:
        reason = f"the file of instance {row.sop_instance_uid} is missing or damaged{LOST}"
        with archive.database.write() as connection:
            connection.execute(
                update(schema.studies)
                .where(schema.studies.c.id == row.id)
                .values(state=StudyState.QUARANTINED, reason=reason)
            )
            record_event(connection, "recover", row.study_uid, f"ALARM: {reason}")
    return len(broken)


def _is_intact(archive: Archive, row: Row) -> bool:
    try:
        return is_intact(archive.storage / row.path, row.size, row.sha256)
    except OSError:
        return False
