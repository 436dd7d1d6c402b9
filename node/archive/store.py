"""The archive: what was received and what was made of it, durable, found again by UID.

`Archive` owns the storage folder (`spool/`, `instances/`, `results/`, `quarantine/`) and the database. Rules about
jobs live in `node.queue`, about deliveries in `node.deliver.outbox`; both work on this archive's database.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Select, delete, func, select, update

from node.archive import schema
from node.archive.database import Database, record_event
from node.archive.files import Digester, SpoolFile, make_folder, remove
from node.archive.ingest import Ingest, Outcome, study_folder
from node.archive.records import Instance, Series, Study, StudyState
from node.archive.retention import is_owed
from node.dicom.identity import Identity
from node.errors import ArchiveError, NotFound


@dataclass(frozen=True)
class EventLine:
    """One line of a study's story."""

    at: float
    actor: str
    what: str


class Archive:
    """Files and database below one storage folder."""

    def __init__(self, storage: Path, database_url: str, *, durable: bool = True):
        """`durable=False`: what comes by C-STORE is not synced before it is acknowledged. All else always is."""
        self.storage = storage
        self.durable = durable
        for name in ("spool", "instances", "results", "quarantine"):
            try:
                make_folder(storage / name)
            except OSError as error:
                raise ArchiveError(f"cannot make the storage folder {storage / name}: {error.strerror}") from error
        self.database = Database(database_url)
        self.ingest = Ingest(storage, self.database)

    def close(self) -> None:
        """Close the database."""
        self.ingest.close()
        self.database.close()

    def spool_file(self, digester: Digester | None = None, *, relaxed: bool = False) -> SpoolFile:
        """A new file in the spool; a context manager."""
        return SpoolFile(self.storage / "spool", digester, relaxed=relaxed)

    # -- instances ---------------------------------------------------------------------------------------------------

    def keep_instance(self, spooled: SpoolFile, identity: Identity, received_from: str) -> Outcome:
        """Keep a received instance: when this returns, the object is durable or was so before.

        Raises `ArchiveFull` when there is no room and `ArchiveError` when disk or database refuse; then the instance
        must not be acknowledged.
        """
        return self.ingest.keep(spooled, identity, received_from)

    def quarantine_study(self, study: Study, reason: str) -> None:
        """Set a study aside: nothing is run on it until a person looked at it."""
        with self.database.write() as connection:
            connection.execute(
                update(schema.studies)
                .where(schema.studies.c.id == study.id)
                .values(state=StudyState.QUARANTINED, reason=reason)
            )
            record_event(connection, "route", study.study_uid, f"quarantined: {reason}")

    # -- reading -----------------------------------------------------------------------------------------------------

    def study(self, study_uid: str) -> Study:
        """The study of that UID; `NotFound` when it is not here."""
        with self.database.read() as connection:
            row = connection.execute(select(schema.studies).where(schema.studies.c.study_uid == study_uid)).first()
        if row is None:
            raise NotFound(f"no study {study_uid} in this archive (`radnode studies list` shows what is here)")
        return Study.from_row(row)

    def studies(self, *, limit: int = 100, states: Sequence[StudyState] = ()) -> list[Study]:
        """Studies, the last received first."""
        query = select(schema.studies).order_by(schema.studies.c.last_received_at.desc()).limit(limit)
        if states:
            query = query.where(schema.studies.c.state.in_(states))
        with self.database.read() as connection:
            return [Study.from_row(row) for row in connection.execute(query)]

    def series(self, study_id: int) -> list[Series]:
        """The series of a study, ordered by UID."""
        query = select(schema.series).where(schema.series.c.study_id == study_id).order_by(schema.series.c.series_uid)
        with self.database.read() as connection:
            return [Series.from_row(row) for row in connection.execute(query)]

    def receiving(self, *, silent_since: float | None = None, most: int | None = None) -> list[Study]:
        """The studies that are being received, the longest silent first: all, those that got nothing since a time (Unix
        seconds), `most` of them at most.
        """
        columns = schema.studies.c
        query = select(schema.studies).where(columns.state == StudyState.RECEIVING).order_by(columns.last_received_at)
        if silent_since is not None:
            query = query.where(columns.last_received_at <= silent_since)
        with self.database.read() as connection:
            return [Study.from_row(row) for row in connection.execute(query.limit(most))]

    def instances(self, study_id: int) -> list[Instance]:
        """All instances of a study, ordered by SOP Instance UID."""
        query = (
            select(schema.instances)
            .join(schema.series)
            .where(schema.series.c.study_id == study_id)
            .order_by(schema.instances.c.sop_instance_uid)
        )
        with self.database.read() as connection:
            return [Instance.from_row(row) for row in connection.execute(query)]

    def instance_paths(self, sop_instance_uids: Iterable[str]) -> dict[str, Path]:
        """SOP Instance UID to file, for those that are here."""
        wanted = list(sop_instance_uids)
        found: dict[str, Path] = {}
        with self.database.read() as connection:
            for start in range(0, len(wanted), 500):  # SQLite limits the variables of a statement
                query = select(schema.instances.c.sop_instance_uid, schema.instances.c.path).where(
                    schema.instances.c.sop_instance_uid.in_(wanted[start : start + 500])
                )
                found.update({uid: self.storage / path for uid, path in connection.execute(query)})
        return found

    def events(self, study_uid: str) -> list[EventLine]:
        """The story of a study, oldest first."""
        with self.database.read() as connection:
            return [EventLine(*row) for row in connection.execute(_story(study_uid).order_by(schema.events.c.id))]

    def some_events(self, study_uid: str, limit: int) -> tuple[list[EventLine], int, list[EventLine]]:
        """The story of a study in `limit` lines at most: its beginning, how many lines are left out, and its end."""
        columns = schema.events.c
        first = limit // 4
        query = _story(study_uid)
        with self.database.read() as connection:
            begin = connection.execute(query.add_columns(columns.id).order_by(columns.id).limit(first)).all()
            after = begin[-1].id if begin else -1
            end = connection.execute(
                query.where(columns.id > after).order_by(columns.id.desc()).limit(limit - first)
            ).all()
            count = select(func.count()).where(columns.study_uid == study_uid)
            left_out = int(connection.scalar(count) or 0) - len(begin) - len(end)
        return [EventLine(*row[:3]) for row in begin], max(left_out, 0), [EventLine(*row) for row in reversed(end)]

    # -- retention ---------------------------------------------------------------------------------------------------

    def forget_finished(self, before: float) -> list[str]:
        """Delete studies that nothing more is owed to and that were last received before `before`; their UIDs.

        A study with an open job or an undelivered result is never deleted, however old; nor is one in quarantine.
        `node.archive.retention.count_kept` says how many stay so.
        """
        columns = schema.studies.c
        forgotten: list[str] = []
        with self.database.read() as connection:
            candidates = connection.execute(
                select(columns.id, columns.study_uid)
                .where(columns.state.in_([StudyState.ROUTED, StudyState.UNWANTED]), columns.last_received_at < before)
                .order_by(columns.last_received_at)
            ).all()
        for study_id, study_uid in candidates:
            with self.database.write() as connection:
                if not _is_still_old(connection, study_id, before) or is_owed(connection, study_id):
                    continue
                paths = _instance_paths(connection, study_id) + _result_paths(connection, study_id)
                connection.execute(delete(schema.studies).where(columns.id == study_id))
                record_event(connection, "keep", study_uid, "deleted: older than keep.studies, nothing left to deliver")
            # Rows first: a row without a file would be a lost image. Only the files of these rows: in the same folder
            # lies by now, perhaps, what a receiver took of this study since.
            remove([self.storage / path for path in paths])
            with contextlib.suppress(OSError):
                (self.storage / study_folder(study_uid)).rmdir()
            forgotten.append(study_uid)
        return forgotten


def _story(study_uid: str) -> Select[float, str, str]:
    columns = schema.events.c
    return select(columns.at, columns.actor, columns.what).where(columns.study_uid == study_uid)


def _is_still_old(connection: Connection, study_id: int, before: float) -> bool:
    """Whether nothing came meanwhile; the row is held, so that what comes now finds it gone or there, not half."""
    columns = schema.studies.c
    last = connection.scalar(select(columns.last_received_at).where(columns.id == study_id).with_for_update())
    return last is not None and last < before


def _instance_paths(connection: Connection, study_id: int) -> list[str]:
    query = select(schema.instances.c.path).join(schema.series).where(schema.series.c.study_id == study_id)
    return list(connection.scalars(query))


def _result_paths(connection: Connection, study_id: int) -> list[str]:
    query = (
        select(schema.results.c.path)
        .select_from(schema.results.join(schema.jobs))
        .where(schema.jobs.c.study_id == study_id)
    )
    return list(connection.scalars(query))
