"""How a received instance enters the archive: named, synced, its folder synced, its row committed, in that order.

The name before the sync, because a journal that brings the file to the disk then brings its name along: the folder's
sync finds nothing more to write, and costs a drive with a slow flush nothing. A name without content is no harm, see
below: nothing believes in a file before it has its row.

Associations that arrive at the same moment share one transaction: whoever finds no other thread committing commits for
all that wait (a group commit without a thread of its own, so one association alone pays no hand-over). The statements
go to the driver as text, compiled once: through SQLAlchemy's execution they cost more than the disk.

Until its row is committed a file has two names, one in the spool and its final one. After a crash the spool therefore
says which files may have no row, however many lie in the archive; see `node.archive.recover`.

With `durability: relaxed` nothing of a C-STORE is synced, and rows follow the answer: `node.archive.rows_behind`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Dialect, Executable, bindparam, insert, literal_column, select, update
from sqlalchemy.sql import ClauseElement

from node.archive import schema
from node.archive.database import Database
from node.archive.files import (
    LeftFile,
    SpoolFile,
    archive_error,
    dataset_offset,
    file_sha256,
    is_intact,
    remove,
    sync_file,
    sync_folder,
    was_unsynced,
)
from node.archive.records import StudyState
from node.dicom.identity import Identity
from node.errors import ArchiveError

_ONE = literal_column("1")  # a number would become a parameter
LOST = ": send the study again"  # how the reason of a study ends that was quarantined because files of it are lost
RACES = 3  # with another process for the first row of a study, before the sender hears A700
LOCK_PATIENCE_S = 10.0  # how long a commit waits for another process's transaction before the sender hears A700


class Outcome(StrEnum):
    """What became of a received instance."""

    STORED = "stored"  # new, durable
    DUPLICATE = "duplicate"  # the same object was here already
    CONFLICT = "conflict"  # the UID was here with other content: the first stays, this one lies in quarantine


@dataclass(eq=False)
class Arrival:
    """One named file on its way to a row."""

    spooled: SpoolFile | LeftFile
    identity: Identity
    received_from: str
    path: Path  # final, relative to the storage folder
    known_path: str = ""  # the file that holds this UID already, with other bytes
    replaced: Path | None = None  # the file of this instance that was missing or cut, and is this one now
    judged: bool = False  # whether `known_path` was compared: the object is another one
    settled: bool = False
    outcome: Outcome | None = None  # None once settled: the UID is here in other bytes, `known_path`
    error: Exception | None = None


class Ingest:
    """The door to `instances/` and its tables; safe to use from many threads."""

    def __init__(self, storage: Path, database: Database):
        self._storage = storage
        self._database = database
        self._statements = _Statements(database.engine.dialect)
        self._failures: Final = (database.engine.dialect.loaded_dbapi.Error,)
        self._taken: Final = database.engine.dialect.loaded_dbapi.IntegrityError
        self._waiting: list[Arrival] = []
        self._waiting_lock = threading.Lock()
        self._committing = threading.Lock()
        self._connection: Any = None

    def keep(self, spooled: SpoolFile, identity: Identity, received_from: str) -> Outcome:
        """Keep a received instance: when this returns, the object is durable or was so before.

        Raises `ArchiveFull` when there is no room and `ArchiveError` when disk or database refuse; then the instance
        must not be acknowledged, and nothing of it is left behind.
        """
        arrival = Arrival(spooled, identity, received_from, instance_path(identity, spooled.token))
        spooled.link(self._storage / arrival.path)
        try:
            self._sync(arrival)
        except ArchiveError:
            remove([self._storage / arrival.path])
            raise
        return self._commit_judged(arrival)

    def name(self, spooled: SpoolFile, identity: Identity, received_from: str) -> Arrival:
        """Give a received file its final name, unsynced, so that it outlives its process: it may be acknowledged then,
        and is owed its row (`commit_acknowledged`). `ArchiveFull` or `ArchiveError` when the disk refuses.
        """
        arrival = Arrival(spooled, identity, received_from, instance_path(identity, spooled.token))
        spooled.link(self._storage / arrival.path)
        return arrival

    def commit_acknowledged(self, group: list[Arrival]) -> None:
        """Make the rows of instances that `name` named, in one transaction.

        Those whose UID is here in other bytes have no outcome then, and `settle_conflict` is for them. When this raises
        (see `is_at_fault`) none of the rows was made, and it may be called again with the same.
        """
        with self._committing:
            self._transact_in_race(group)
            self._remove_superfluous(group)

    def settle_conflict(self, arrival: Arrival) -> None:
        """See whether an acknowledged instance is here in another encoding, or goes to quarantine; raises as above."""
        self._judge(arrival)
        if arrival.judged:
            self.commit_acknowledged([arrival])

    def adopt(self, left: LeftFile, identity: Identity, received_from: str) -> Outcome:
        """Keep an acknowledged file that a process left without a row when it died; raises as `commit_acknowledged`."""
        arrival = Arrival(left, identity, received_from, instance_path(identity, left.token))
        self._sync(arrival)
        self.commit_acknowledged([arrival])
        if arrival.outcome is None:
            self.settle_conflict(arrival)
        assert arrival.outcome is not None
        return arrival.outcome

    def is_at_fault(self, error: Exception) -> bool:
        """Whether it is the instance that a commit failed for, and not the database or the disk."""
        dbapi = self._database.engine.dialect.loaded_dbapi
        return isinstance(error, (dbapi.DataError, dbapi.IntegrityError, ValueError))

    def _sync(self, arrival: Arrival) -> None:
        """Bring a named file and its name to the disk."""
        arrival.spooled.sync()
        try:
            sync_folder((self._storage / arrival.path).parent)
        except FileNotFoundError:  # removed by retention; `_name_again` makes it anew
            pass
        except OSError as error:
            raise archive_error(error, "sync a folder") from error

    def close(self) -> None:
        """Give the connection back."""
        with self._committing:
            self._drop_connection()

    def _commit_judged(self, arrival: Arrival) -> Outcome:
        if self._commit(arrival) is None:
            self._judge(arrival)
            if arrival.judged:
                self._commit(arrival)
        assert arrival.outcome is not None
        return arrival.outcome

    def _judge(self, arrival: Arrival) -> None:
        """The UID is here in other bytes: outside of the lock see whether it is the same object in another encoding."""
        from node.archive.sameness import same_object  # loads the decoders; commands that only list need none

        known = self._storage / arrival.known_path
        if same_object(known, arrival.spooled.path):
            if was_unsynced(known):
                sync_file(known)
            arrival.outcome = Outcome.DUPLICATE
            self._remove_superfluous([arrival])
        else:
            arrival.judged = True

    def _remove_superfluous(self, group: list[Arrival]) -> None:
        """Remove the final names of what is here already, or lies in quarantine, and files that were replaced."""
        for arrival in group:
            if arrival.outcome in (Outcome.DUPLICATE, Outcome.CONFLICT):
                remove([self._storage / arrival.path])
            elif arrival.replaced is not None:
                remove([self._storage / arrival.replaced])

    def _commit(self, arrival: Arrival) -> Outcome | None:
        arrival.settled = False
        with self._waiting_lock:
            self._waiting.append(arrival)
        with self._committing:
            if not arrival.settled:  # else another thread took it into its group
                with self._waiting_lock:
                    group, self._waiting = self._waiting, []
                self._commit_group(group)
        if arrival.error is not None:
            if isinstance(arrival.error, self._failures):
                message = f"the database did not take the instance: {type(arrival.error).__name__}"
                raise ArchiveError(message) from arrival.error
            raise arrival.error
        return arrival.outcome

    def _commit_group(self, group: list[Arrival]) -> None:
        try:
            self._transact_in_race(group)
        except Exception as error:
            if len(group) > 1:  # one bad row must not cost the others their place
                for arrival in group:
                    self._commit_group([arrival])
                return
            group[0].error = archive_error(error, "keep an instance") if isinstance(error, OSError) else error
            self._clean_up(group[0])
        for arrival in group:
            arrival.settled = True
        self._remove_superfluous(group)

    def _transact_in_race(self, group: list[Arrival]) -> None:
        for race in range(RACES):
            try:
                self._transact(group)
                return
            except self._taken:  # another receiver made the same row: now it is there
                if race == RACES - 1:
                    raise

    def _transact(self, group: list[Arrival]) -> None:
        connection = self._open_connection()
        cursor = connection.cursor()
        try:
            self._begin(cursor)
            now = time.time()
            for arrival in sorted(group, key=_study_uid):  # in an order that all receivers keep: no deadlock
                arrival.outcome = self._insert(cursor, arrival, now)
            connection.commit()
        except BaseException:
            for arrival in group:
                arrival.outcome = arrival.replaced = None
            with contextlib.suppress(*self._failures):
                connection.rollback()
            self._drop_connection()
            raise
        finally:
            with contextlib.suppress(*self._failures):
                cursor.close()

    def _begin(self, cursor: Any) -> None:
        if self._database.url.get_backend_name() == "sqlite":
            cursor.execute("BEGIN IMMEDIATE")

    def _insert(self, cursor: Any, arrival: Arrival, now: float) -> Outcome | None:
        identity, statements = arrival.identity, self._statements
        known = statements.known.one(cursor, {"uid": identity.sop_instance_uid})
        if known is not None:
            sha256, path, size = known
            if path == arrival.path.as_posix():  # the commit was not answered, and had been made
                return Outcome.STORED
            if sha256 == arrival.spooled.sha256:
                if not is_intact(self._storage / path, size, sha256):
                    self._replace(cursor, arrival, Path(path), now)
                    return Outcome.STORED
                if was_unsynced(Path(path)):  # the one that stays must be as safe as this one
                    sync_file(self._storage / path)
                return Outcome.DUPLICATE
            if not arrival.judged:
                arrival.known_path = path
                return None
            self._quarantine(cursor, arrival, now)
            return Outcome.CONFLICT
        self._name_again(arrival)
        series_id = self._count_in(cursor, arrival, now)
        statements.add_instance.run(
            cursor,
            {
                "series_id": series_id,
                "sop_instance_uid": identity.sop_instance_uid,
                "sop_class_uid": identity.sop_class_uid,
                "transfer_syntax_uid": identity.transfer_syntax_uid,
                "path": arrival.path.as_posix(),
                "size": arrival.spooled.size,
                "sha256": arrival.spooled.sha256,
                "received_from": arrival.received_from,
                "received_at": now,
            },
        )
        return Outcome.STORED

    def _replace(self, cursor: Any, arrival: Arrival, lost: Path, now: float) -> None:
        """The instance's file was missing or cut, and it came again."""
        identity, statements = arrival.identity, self._statements
        row = statements.study.one(cursor, {"uid": identity.study_uid, "series": identity.series_uid})
        self._name_again(arrival)
        changes = {"uid": identity.sop_instance_uid, "path": lost.as_posix()}
        changes |= {"new_path": arrival.path.as_posix(), "new_size": arrival.spooled.size}
        if row is None or statements.change_file.run(cursor, changes).rowcount != 1:
            raise ArchiveError("another receiver or retention has changed the instance meanwhile")
        arrival.replaced = lost
        what = f"the file of instance {identity.sop_instance_uid}, which was missing or damaged, came again"
        self._tell(cursor, identity, now, what)
        study_id, state, _, revision, _ = row
        files = statements.files.all(cursor, {"id": study_id, "reason": LOST})
        if (
            state == StudyState.QUARANTINED
            and files
            and all(is_intact(self._storage / path, *rest) for path, *rest in files)
        ):
            changes = {
                "id": study_id,
                "state": StudyState.RECEIVING,
                "reason": "",
                "revision": revision + 1,
                "now": now,
            }
            statements.resume_study.run(cursor, changes)
            self._tell(cursor, identity, now, f"complete again: revision {revision + 1}")

    def _name_again(self, arrival: Arrival) -> None:
        """Retention may have removed the study's folder between the naming and this transaction; the spool still has
        it.
        """
        final = self._storage / arrival.path
        if not os.path.exists(final):
            arrival.spooled.link(final)
            sync_folder(final.parent)

    def _count_in(self, cursor: Any, arrival: Arrival, now: float) -> int:
        """Count the instance in its study and series, which are made when they are new; the id of the series."""
        identity, statements = arrival.identity, self._statements
        row = statements.study.one(cursor, {"uid": identity.study_uid, "series": identity.series_uid})
        if row is None:
            study_id, series_id = self._add_study(cursor, arrival, now), None
        else:
            study_id, state, patient_id, revision, series_id = row
            statements.count_study.run(cursor, {"id": study_id, "now": now})
            if patient_id != identity.patient_id and state != StudyState.QUARANTINED:
                reason = "instances of two patients carry this study UID"
                changes = {"id": study_id, "state": StudyState.QUARANTINED, "reason": reason, "revision": revision}
                statements.change_study.run(cursor, changes)
                self._tell(cursor, identity, now, f"ALARM: {reason}; quarantined")
            elif state in (StudyState.ROUTED, StudyState.UNWANTED):
                changes = {"id": study_id, "state": StudyState.RECEIVING, "reason": "", "revision": revision + 1}
                statements.change_study.run(cursor, changes)
                self._tell(
                    cursor, identity, now, f"late instance from {arrival.received_from}: revision {revision + 1}"
                )
        if series_id is not None:
            statements.count_series.run(cursor, {"id": series_id, "now": now})
            return series_id
        series = {
            "study_id": study_id,
            "series_uid": identity.series_uid,
            "modality": identity.modality,
            "description": identity.series_description,
            "instances": 1,
            "last_received_at": now,
        }
        return statements.add_series.one(cursor, series)[0]

    def _add_study(self, cursor: Any, arrival: Arrival, now: float) -> int:
        identity = arrival.identity
        study = {
            "study_uid": identity.study_uid,
            "patient_id": identity.patient_id,
            "accession_number": identity.accession_number,
            "study_date": identity.study_date,
            "description": identity.study_description,
            "state": StudyState.RECEIVING,
            "reason": "",
            "revision": 1,
            "instances": 1,
            "first_received_at": now,
            "last_received_at": now,
            "completed_at": None,
        }
        study_id = self._statements.add_study.one(cursor, study)[0]
        self._tell(cursor, identity, now, f"first instance received from {arrival.received_from}")
        return study_id

    def _quarantine(self, cursor: Any, arrival: Arrival, now: float) -> None:
        """Name the file in the quarantine; the same wrong object once, however often it comes."""
        name = _quarantine_name(arrival.identity.sop_instance_uid, arrival.spooled.sha256)
        final = self._storage / "quarantine" / name
        if not final.exists():
            arrival.spooled.link(final)
            sync_folder(final.parent)
        uid, sender = arrival.identity.sop_instance_uid, arrival.received_from
        what = f"ALARM: instance {uid} came again from {sender} with other content; the first stays, the second is "
        told = {"study_uid": arrival.identity.study_uid, "what": f"{what}quarantine/{name}"}
        if self._statements.told.one(cursor, told) is None:
            self._tell(cursor, arrival.identity, now, told["what"])

    def _tell(self, cursor: Any, identity: Identity, now: float, what: str) -> None:
        event = {"at": now, "actor": "receive", "study_uid": identity.study_uid, "what": what}
        self._statements.add_event.run(cursor, event)

    def _clean_up(self, arrival: Arrival) -> None:
        """After a failure leave nothing of an instance that was not kept; leave all when the database can't tell."""
        try:
            connection = self._open_connection()
            wanted = {"uid": arrival.identity.sop_instance_uid, "path": arrival.path.as_posix()}
            known = self._statements.owner.one(connection.cursor(), wanted)
            connection.rollback()
        except self._failures:
            self._drop_connection()
            arrival.spooled.leave()
            return
        if known is None:
            remove([self._storage / arrival.path])

    def _open_connection(self) -> Any:
        if self._connection is None:
            self._connection = self._database.engine.raw_connection()
            if self._database.url.get_backend_name() == "sqlite":
                self._connection.cursor().execute(f"PRAGMA busy_timeout = {int(LOCK_PATIENCE_S * 1000)}")
        return self._connection

    def _drop_connection(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(Exception):  # it is given up because it is broken
                self._connection.invalidate()
            self._connection = None


def _study_uid(arrival: Arrival) -> str:
    return arrival.identity.study_uid


def study_folder(study_uid: str) -> Path:
    """Where a study's instances lie, relative to the storage folder: named by hash, never by what a sender wrote."""
    digest = hashlib.sha256(study_uid.encode()).hexdigest()
    return Path("instances") / digest[:2] / digest[:32]


def instance_path(identity: Identity, token: str) -> Path:
    """Where an instance lies, relative to the storage folder, `token` being the name of its reception in the spool.

    No two receptions share a path: two associations that bring one UID at the same moment never write over each other.
    """
    name = hashlib.sha256(identity.sop_instance_uid.encode()).hexdigest()[:24]
    return study_folder(identity.study_uid) / f"{name}-{token}.dcm"


def quarantine_name(sop_instance_uid: str, path: Path) -> str:
    """The name that the object in `path` has, or would have, in the quarantine."""
    return _quarantine_name(sop_instance_uid, file_sha256(path, skip=dataset_offset(path)))


def _quarantine_name(sop_instance_uid: str, sha256: str) -> str:
    return f"{hashlib.sha256(sop_instance_uid.encode()).hexdigest()[:32]}-{sha256[:32]}.dcm"


class _Statement:
    """A statement as text for the driver, with named parameters."""

    def __init__(self, statement: Executable, dialect: Dialect):
        assert isinstance(statement, ClauseElement)
        self._text = str(statement.compile(dialect=dialect))

    def run(self, cursor: Any, values: Mapping[str, object]) -> Any:
        cursor.execute(self._text, values)
        return cursor

    def all(self, cursor: Any, values: Mapping[str, object]) -> list[Any]:
        return self.run(cursor, values).fetchall()

    def one(self, cursor: Any, values: Mapping[str, object]) -> Any:
        cursor.execute(self._text, values)
        return cursor.fetchone()


class _Statements:
    """What an ingest says to the database."""

    def __init__(self, used: Dialect):
        dialect: Dialect = type(used)(paramstyle="named" if used.name == "sqlite" else "pyformat")  # pyright: ignore[reportCallIssue]
        studies, series, instances = schema.studies, schema.series, schema.instances
        columns = (instances.c.sha256, instances.c.path, instances.c.size)
        known = select(*columns).where(instances.c.sop_instance_uid == bindparam("uid"))
        self.known = _Statement(known, dialect)
        owner = known.where(instances.c.path == bindparam("path"))
        self.owner = _Statement(owner, dialect)
        joined = studies.outerjoin(
            series, (series.c.study_id == studies.c.id) & (series.c.series_uid == bindparam("series"))
        )
        columns = (studies.c.id, studies.c.state, studies.c.patient_id, studies.c.revision, series.c.id)
        study = select(*columns).select_from(joined).where(studies.c.study_uid == bindparam("uid"))
        # SQLite has one writer at a time anyway and leaves FOR UPDATE out.
        self.study = _Statement(study.with_for_update(of=studies), dialect)
        self.add_study = _Statement(
            insert(studies).values(_bind(studies, skip=("id",))).returning(studies.c.id), dialect
        )
        self.count_study = _Statement(
            update(studies)
            .where(studies.c.id == bindparam("id"))
            .values(instances=studies.c.instances + _ONE, last_received_at=bindparam("now")),
            dialect,
        )
        self.change_study = _Statement(
            update(studies)
            .where(studies.c.id == bindparam("id"))
            .values({name: bindparam(name) for name in ("state", "reason", "revision")}),
            dialect,
        )
        self.add_series = _Statement(insert(series).values(_bind(series, skip=("id",))).returning(series.c.id), dialect)
        self.count_series = _Statement(
            update(series)
            .where(series.c.id == bindparam("id"))
            .values(instances=series.c.instances + _ONE, last_received_at=bindparam("now")),
            dialect,
        )
        self.add_instance = _Statement(insert(instances).values(_bind(instances, skip=("id",))), dialect)
        self.change_file = _Statement(
            update(instances)
            .where((instances.c.sop_instance_uid == bindparam("uid")) & (instances.c.path == bindparam("path")))
            .values(path=bindparam("new_path"), size=bindparam("new_size")),
            dialect,
        )
        # The files of a study, if it is for a lost one that it was quarantined.
        self.files = _Statement(
            select(instances.c.path, instances.c.size, instances.c.sha256)
            .select_from(instances.join(series).join(studies))
            .where((studies.c.id == bindparam("id")) & studies.c.reason.endswith(bindparam("reason"))),
            dialect,
        )
        self.resume_study = _Statement(
            update(studies)
            .where(studies.c.id == bindparam("id"))
            .values(
                **{name: bindparam(name) for name in ("state", "reason", "revision")}, last_received_at=bindparam("now")
            ),
            dialect,
        )
        self.told = _Statement(
            select(schema.events.c.id).where(
                (schema.events.c.study_uid == bindparam("study_uid")) & (schema.events.c.what == bindparam("what"))
            ),
            dialect,
        )
        self.add_event = _Statement(insert(schema.events).values(_bind(schema.events, skip=("id",))), dialect)


def _bind(table: Any, skip: tuple[str, ...]) -> dict[str, Any]:
    return {column.name: bindparam(column.name) for column in table.columns if column.name not in skip}
