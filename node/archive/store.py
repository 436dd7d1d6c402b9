"""The archive: what was received and what was made of it, durable, found again by UID.

`Archive` owns the storage folder (`spool/`, `instances/`, `results/`, `quarantine/`) and the database. Rules about
jobs live in `node.queue`, about deliveries in `node.deliver.outbox`; both work on this archive's database.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from node.archive import schema
from node.archive.database import Database, record_event
from node.archive.files import SpoolFile, make_folder
from node.archive.records import DeliveryState, Instance, JobState, Series, Study, StudyState
from node.dicom.identity import Identity
from node.errors import ArchiveError, NotFound


class Outcome(StrEnum):
    """What became of a received instance."""

    STORED = "stored"  # new, durable
    DUPLICATE = "duplicate"  # the same content was here already
    CONFLICT = "conflict"  # the UID was here with other content: the first stays, this one lies in quarantine


@dataclass(frozen=True)
class EventLine:
    """One line of a study's story."""

    at: float
    actor: str
    what: str


class Archive:
    """Files and database below one storage folder."""

    def __init__(self, storage: Path, database_url: str, *, durable: bool = True):
        self.storage = storage
        self.durable = durable
        for name in ("spool", "instances", "results", "quarantine"):
            try:
                make_folder(storage / name, durable=durable)
            except OSError as error:
                raise ArchiveError(f"cannot make the storage folder {storage / name}: {error.strerror}") from error
        self.database = Database(database_url, durable=durable)

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    def spool_file(self) -> SpoolFile:
        """A new file in the spool; a context manager."""
        return SpoolFile(self.storage / "spool", durable=self.durable)

    # -- instances ---------------------------------------------------------------------------------------------------

    def keep_instance(self, spooled: SpoolFile, identity: Identity, received_from: str) -> Outcome:
        """Keep a received instance: when this returns, the object is durable or was so before.

        Raises `ArchiveFull` when there is no room and `ArchiveError` when disk or database refuse; then the instance
        must not be acknowledged.
        """
        now = time.time()
        try:
            with self.database.read() as connection:
                outcome = _known_content(connection, identity, spooled.sha256)
            if outcome is None:
                relative = instance_path(identity, spooled.sha256)
                spooled.keep(self.storage / relative)
                with self.database.write() as connection:
                    # Another association may have stored the same UID since the look above.
                    outcome = _known_content(connection, identity, spooled.sha256)
                    if outcome is None:
                        _insert_instance(connection, identity, relative, spooled, received_from, now)
                        return Outcome.STORED
            if outcome is Outcome.CONFLICT:
                self._quarantine(spooled, identity, received_from)
        except SQLAlchemyError as error:
            raise ArchiveError(f"the database did not take the instance: {type(error).__name__}") from error
        return outcome

    def _quarantine(self, spooled: SpoolFile, identity: Identity, received_from: str) -> None:
        name = f"{hashlib.sha256(identity.sop_instance_uid.encode()).hexdigest()[:32]}-{spooled.sha256[:16]}.dcm"
        spooled.keep(self.storage / "quarantine" / name)
        with self.database.write() as connection:
            record_event(
                connection,
                "receive",
                identity.study_uid,
                f"ALARM: instance {identity.sop_instance_uid} came again from {received_from} with other content; "
                f"the first stays, the second is quarantine/{name}",
            )

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
        columns = schema.events.c
        query = (
            select(columns.at, columns.actor, columns.what).where(columns.study_uid == study_uid).order_by(columns.id)
        )
        with self.database.read() as connection:
            return [EventLine(*row) for row in connection.execute(query)]

    # -- retention ---------------------------------------------------------------------------------------------------

    def forget_finished(self, before: float) -> list[str]:
        """Delete studies that nothing more is owed to and that were last received before `before`; their UIDs.

        A study with an open job or an undelivered result is never deleted, however old; nor is one in quarantine.
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
                if _is_owed(connection, study_id) or not _is_still_old(connection, study_id, before):
                    continue
                result_paths = _result_paths(connection, study_id)
                connection.execute(delete(schema.studies).where(columns.id == study_id))
                record_event(connection, "keep", study_uid, "deleted: older than keep.studies, nothing left to deliver")
            # Rows first: a file without a row is swept at the next start, a row without a file would be a lost image.
            shutil.rmtree(self.storage / study_folder(study_uid), ignore_errors=True)
            for path in result_paths:
                (self.storage / path).unlink(missing_ok=True)
            forgotten.append(study_uid)
        return forgotten


def study_folder(study_uid: str) -> Path:
    """Where a study's instances lie, relative to the storage folder: named by hash, never by what a sender wrote."""
    digest = hashlib.sha256(study_uid.encode()).hexdigest()
    return Path("instances") / digest[:2] / digest[:32]


def instance_path(identity: Identity, sha256: str) -> Path:
    """Where an instance of that content lies, relative to the storage folder.

    The content is part of the name: two associations that bring one UID with different contents at the same moment
    never write over each other's file.
    """
    name = hashlib.sha256(identity.sop_instance_uid.encode()).hexdigest()[:24]
    return study_folder(identity.study_uid) / f"{name}-{sha256[:8]}.dcm"


def _known_content(connection: Connection, identity: Identity, sha256: str) -> Outcome | None:
    query = select(schema.instances.c.sha256).where(schema.instances.c.sop_instance_uid == identity.sop_instance_uid)
    known = connection.scalar(query)
    if known is None:
        return None
    return Outcome.DUPLICATE if known == sha256 else Outcome.CONFLICT


def _insert_instance(
    connection: Connection, identity: Identity, path: Path, spooled: SpoolFile, received_from: str, now: float
) -> None:
    study_id = _upsert_study(connection, identity, received_from, now)
    columns = schema.series.c
    series_id = connection.scalar(
        update(schema.series)
        .where(columns.study_id == study_id, columns.series_uid == identity.series_uid)
        .values(instances=columns.instances + 1)
        .returning(columns.id)
    )
    if series_id is None:
        series_id = connection.scalar(
            insert(schema.series)
            .values(
                study_id=study_id,
                series_uid=identity.series_uid,
                modality=identity.modality,
                description=identity.series_description,
                instances=1,
            )
            .returning(columns.id)
        )
    connection.execute(
        insert(schema.instances).values(
            series_id=series_id,
            sop_instance_uid=identity.sop_instance_uid,
            sop_class_uid=identity.sop_class_uid,
            transfer_syntax_uid=identity.transfer_syntax_uid,
            path=path.as_posix(),
            size=spooled.size,
            sha256=spooled.sha256,
            received_from=received_from,
            received_at=now,
        )
    )


def _upsert_study(connection: Connection, identity: Identity, received_from: str, now: float) -> int:
    columns = schema.studies.c
    row = connection.execute(
        select(columns.id, columns.state, columns.patient_id, columns.revision).where(
            columns.study_uid == identity.study_uid
        )
    ).first()
    if row is None:
        study_id = connection.scalar(
            insert(schema.studies)
            .values(
                study_uid=identity.study_uid,
                patient_id=identity.patient_id,
                accession_number=identity.accession_number,
                study_date=identity.study_date,
                description=identity.study_description,
                state=StudyState.RECEIVING,
                instances=1,
                first_received_at=now,
                last_received_at=now,
            )
            .returning(columns.id)
        )
        record_event(connection, "receive", identity.study_uid, f"first instance received from {received_from}")
        assert study_id is not None
        return study_id
    changes: dict[str, object] = {"instances": columns.instances + 1, "last_received_at": now}
    if row.patient_id != identity.patient_id and row.state != StudyState.QUARANTINED:
        changes |= {"state": StudyState.QUARANTINED, "reason": "instances of two patients carry this study UID"}
        record_event(
            connection,
            "receive",
            identity.study_uid,
            "ALARM: instances of two patients carry this study UID; quarantined",
        )
    elif row.state in (StudyState.ROUTED, StudyState.UNWANTED):
        changes |= {"state": StudyState.RECEIVING, "reason": "", "revision": row.revision + 1}
        record_event(
            connection,
            "receive",
            identity.study_uid,
            f"late instance from {received_from}: revision {row.revision + 1}",
        )
    connection.execute(update(schema.studies).where(columns.id == row.id).values(changes))
    return row.id


def _is_owed(connection: Connection, study_id: int) -> bool:
    jobs = select(func.count()).where(
        schema.jobs.c.study_id == study_id, schema.jobs.c.state.in_([JobState.QUEUED, JobState.RUNNING])
    )
    deliveries = (
        select(func.count())
        .select_from(schema.deliveries.join(schema.results).join(schema.jobs))
        .where(schema.jobs.c.study_id == study_id, schema.deliveries.c.state != DeliveryState.DELIVERED)
    )
    return bool(connection.scalar(jobs)) or bool(connection.scalar(deliveries))


def _is_still_old(connection: Connection, study_id: int, before: float) -> bool:
    last = connection.scalar(select(schema.studies.c.last_received_at).where(schema.studies.c.id == study_id))
    return last is not None and last < before


def _result_paths(connection: Connection, study_id: int) -> list[str]:
    query = (
        select(schema.results.c.path)
        .select_from(schema.results.join(schema.jobs))
        .where(schema.jobs.c.study_id == study_id)
    )
    return list(connection.scalars(query))
