"""The outbox: which result is owed to which peer, when it is tried next, and what the peer said."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, func, select, update

from node.archive import schema
from node.archive.asked_commitments import NOT_WANTED, wanted_now
from node.archive.database import Database, record_event
from node.archive.records import CommitmentState, Delivery, DeliveryState, JobState
from node.errors import NotAllowed, NotFound
from node.queue.withdrawal import REJECTION

FIRST_RETRY_S = 5.0
LAST_RETRY_S = 600.0  # a peer that is back is noticed within ten minutes


@dataclass(frozen=True)
class Parcel:
    """One delivery with the object that it carries."""

    delivery: Delivery
    study_uid: str
    job_id: int
    model: str
    kind: str
    sop_class_uid: str
    sop_instance_uid: str
    path: str  # relative to the storage folder

    def file(self, storage: Path) -> Path:
        """The object's file."""
        return storage / self.path


def due_parcels(database: Database, peer: str, limit: int = 100) -> list[Parcel]:
    """What is owed to `peer` and may be tried now, oldest first."""
    columns = schema.deliveries.c
    query = (
        _parcels()
        .where(columns.peer == peer, columns.state == DeliveryState.PENDING, columns.not_before <= time.time())
        .order_by(columns.created_at, columns.id)
        .limit(limit)
    )
    return _fetch(database, query)


def is_owed(database: Database, parcel: Parcel) -> bool:
    """Whether a parcel is still to be sent: results are withdrawn at any time, those in hand too."""
    columns = schema.deliveries.c
    query = select(columns.id).where(columns.id == parcel.delivery.id, columns.state == DeliveryState.PENDING)
    with database.read() as connection:
        return connection.scalar(query) is not None


def list_parcels(
    database: Database,
    *,
    study_id: int | None = None,
    states: Sequence[DeliveryState] = (),
    commitments: Sequence[CommitmentState] = (),
    limit: int = 100,
) -> list[Parcel]:
    """Deliveries, the newest first."""
    query = _parcels().order_by(schema.deliveries.c.id.desc()).limit(limit)
    if study_id is not None:
        query = query.where(schema.jobs.c.study_id == study_id)
    if states:
        query = query.where(schema.deliveries.c.state.in_(states))
    if commitments:
        query = query.where(schema.deliveries.c.commitment.in_(commitments))
    return _fetch(database, query)


def count_deliveries(database: Database) -> dict[str, int]:
    """How many deliveries are in each state."""
    query = select(schema.deliveries.c.state, func.count()).group_by(schema.deliveries.c.state)
    with database.read() as connection:
        return {str(state): int(count) for state, count in connection.execute(query)}


def mark_delivered(database: Database, parcel: Parcel, remark: str = "", *, commitment: bool = False) -> None:
    """The peer has the object; with `commitment` it is to be asked to answer for it."""
    now = time.time()
    with database.write() as connection:
        _change(
            connection,
            parcel,
            state=DeliveryState.DELIVERED,
            reason=remark,
            attempts=parcel.delivery.attempts + 1,
            delivered_at=now,
            **(wanted_now() if commitment else {}),
        )
        tail = f" ({remark})" if remark else ""
        record_event(
            connection, "deliver", parcel.study_uid, f"{parcel.kind} delivered to {parcel.delivery.peer}{tail}"
        )


def mark_undelivered(database: Database, parcel: Parcel, reason: str, *, permanent: bool) -> None:
    """This attempt failed: try again later (5 s, doubling up to 10 minutes, without end), or stop when the peer
    refuses for good. What is no longer owed, being withdrawn meanwhile, stays as it is.
    """
    attempts = parcel.delivery.attempts + 1
    delay = retry_delay_s(attempts)
    columns = schema.deliveries.c
    with database.write() as connection:
        changed = connection.execute(
            update(schema.deliveries)
            .where(columns.id == parcel.delivery.id, columns.state == DeliveryState.PENDING)
            .values(
                state=DeliveryState.FAILED if permanent else DeliveryState.PENDING,
                reason=reason,
                attempts=attempts,
                not_before=time.time() + delay,
            )
            .returning(columns.id)
        ).first()
        if changed is None:
            return
        # One line when it starts to fail or fails for good; the attempts between are counted in the row.
        if attempts == 1 or permanent:
            outlook = "given up" if permanent else "will be tried until it arrives"
            record_event(
                connection,
                "deliver",
                parcel.study_uid,
                f"{parcel.kind} not taken by {parcel.delivery.peer}: {reason}; {outlook}",
            )


def retry_delay_s(attempts: int) -> float:
    """Seconds before the next attempt, after `attempts` that failed."""
    return min(FIRST_RETRY_S * 2 ** min(attempts - 1, 20), LAST_RETRY_S)


def retry_delivery(database: Database, delivery_id: int, actor: str) -> Parcel:
    """Send a delivery again at once, whatever its state; `NotAllowed` for what was withdrawn."""
    columns = schema.deliveries.c
    with database.write() as connection:
        row = connection.execute(
            _parcels().add_columns(schema.jobs.c.state.label("job_state")).where(columns.id == delivery_id)
        ).first()
        if row is None:
            raise NotFound(f"no delivery {delivery_id} (`radnode deliveries list` shows what is here)")
        parcel = _parcel(row)
        if row._mapping["job_state"] == JobState.WITHDRAWN and parcel.kind != REJECTION:
            raise NotAllowed(
                f"delivery {delivery_id} is of job {parcel.job_id}, whose results were withdrawn: they stay so"
            )
        anew = NOT_WANTED | {"state": DeliveryState.PENDING, "reason": "", "not_before": 0.0, "delivered_at": None}
        _change(connection, parcel, **anew, commitment_refusals=0)
        record_event(connection, actor, parcel.study_uid, f"{parcel.kind} to {parcel.delivery.peer}: to be sent again")
    return parcel


def give_up(database: Database, delivery_id: int, actor: str) -> Parcel:
    """Owe a delivery no longer, so that its study may be forgotten in time; `NotAllowed` for what nothing is owed of.

    Of a result that its peer has and does not answer for, the peer is asked no more.
    """
    columns = schema.deliveries.c
    with database.write() as connection:
        row = connection.execute(_parcels().where(columns.id == delivery_id)).first()
        if row is None:
            raise NotFound(f"no delivery {delivery_id} (`radnode deliveries list` shows what is here)")
        parcel = _parcel(row)
        delivery = parcel.delivery
        if delivery.state in (DeliveryState.PENDING, DeliveryState.FAILED):
            said = f"given up by hand after {delivery.attempts} attempts"
            _change(connection, parcel, state=DeliveryState.WITHDRAWN, reason=said)
        elif delivery.commitment in (CommitmentState.NONE, CommitmentState.COMMITTED):
            raise NotAllowed(f"delivery {delivery_id} is {delivery.state.value}: nothing of it is owed")
        else:
            said = "the peer is asked no more whether it keeps it"
            _change(connection, parcel, **NOT_WANTED)
        record_event(connection, actor, parcel.study_uid, f"{parcel.kind} to {delivery.peer}: {said}")
    return parcel


def _parcels():
    joined = schema.deliveries.join(schema.results).join(schema.jobs).join(schema.studies)
    return select(
        schema.deliveries,
        schema.studies.c.study_uid,
        schema.results.c.job_id,
        schema.jobs.c.model,
        schema.results.c.kind,
        schema.results.c.sop_class_uid,
        schema.results.c.sop_instance_uid,
        schema.results.c.path,
    ).select_from(joined)


def _fetch(database: Database, query) -> list[Parcel]:
    with database.read() as connection:
        return [_parcel(row) for row in connection.execute(query)]


def _parcel(row) -> Parcel:
    columns = row._mapping
    return Parcel(
        delivery=Delivery.from_row(row),
        study_uid=columns["study_uid"],
        job_id=columns["job_id"],
        model=columns["model"],
        kind=columns["kind"],
        sop_class_uid=columns["sop_class_uid"],
        sop_instance_uid=columns["sop_instance_uid"],
        path=columns["path"],
    )


def _change(connection: Connection, parcel: Parcel, **changes) -> None:
    connection.execute(update(schema.deliveries).where(schema.deliveries.c.id == parcel.delivery.id).values(**changes))
