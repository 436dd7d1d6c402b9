"""What we ask peers to answer for (PS3.4 J, we being the SCU): which delivered results, what they say, what follows.

A request is committed to the database before it is sent, so an answer finds it, however soon it comes and to whichever
process. An answer counts once for each result: one that comes twice changes nothing.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from node.archive import schema
from node.archive.database import Database, record_event
from node.archive.records import CommitmentState, Delivery, DeliveryState
from node.dicom.commitment import (
    CLASS_INSTANCE_CONFLICT,
    CLASS_NOT_SUPPORTED,
    DUPLICATE_TRANSACTION,
    Reference,
    Request,
    Verdict,
    describe_failure,
)
from node.errors import NotFound

ACTOR = "commitment"
SETTLE_S = 2.0  # results delivered within this time are asked for together
AT_ONCE = 100  # instances of a request
FIRST_PATIENCE_S = 600.0  # for a report; doubled with each request
LAST_PATIENCE_S = 86400.0
MAXIMUM_ASKS = 8  # two days in all
MAXIMUM_REFUSALS = 3  # a refused result is sent again twice
FIRST_RESEND_S, LAST_RESEND_S = 5.0, 600.0
KEPT_S = 30 * 86400.0  # an answer that comes later is one to an unknown transaction

# What sending the same object again cannot change.
_FINAL = (CLASS_NOT_SUPPORTED, CLASS_INSTANCE_CONFLICT)
_AWAITED = (CommitmentState.ASKED, CommitmentState.OVERDUE)
_NOTHING = {"commitment": CommitmentState.NONE, "commitment_reason": "", "commitment_due_at": None}
NOT_WANTED = _NOTHING | {"commitment_asks": 0, "transaction_uid": None, "committed_at": None}  # and not any more
UNANSWERED = (CommitmentState.DUE, *_AWAITED)  # something is still to come


@dataclass(frozen=True)
class _Owed:
    """A delivery with the result that it carried."""

    delivery: Delivery
    study_uid: str
    kind: str
    reference: Reference


def wanted_now() -> dict[str, object]:
    """The changes of a delivery that has just arrived at a peer that is asked."""
    return NOT_WANTED | {"commitment": CommitmentState.DUE, "commitment_due_at": time.time() + SETTLE_S}


def next_request(database: Database, peer: str) -> Request | None:
    """The next request to send to `peer`, kept; None when nothing is due. What was overdue for long is given up here.

    When it is not taken, `put_off` it; else the report is awaited from now on.
    """
    columns, now = schema.deliveries.c, time.time()
    due = (columns.peer == peer) & (columns.commitment_due_at <= now)
    with database.read() as connection:  # no write lock is taken while there is nothing to do
        if connection.scalar(select(columns.id).where(due).limit(1)) is None:
            return None
    with database.write() as connection:
        found = _owed(connection, due, limit=AT_ONCE)
        given_up = [one for one in found if one.delivery.commitment_asks >= MAXIMUM_ASKS]
        asked = [one for one in found if one not in given_up]
        late = [one for one in asked if one.delivery.commitment in _AWAITED]
        _change(connection, given_up, commitment=CommitmentState.OVERDUE, commitment_due_at=None, commitment_reason=(
            f"{peer} was asked {MAXIMUM_ASKS} times and did not report"))  # fmt: skip
        _tell(connection, given_up, f"{peer} did not report on {{}} and was asked {MAXIMUM_ASKS} times: given up")
        for one in late:
            reason = f"{peer} did not report in {_patience_s(one.delivery.commitment_asks):.0f} s and was asked again"
            _change(connection, [one], commitment=CommitmentState.OVERDUE, commitment_reason=reason)
        _tell(connection, late, f"{peer} did not report on {{}} in time: asked again")
        if not asked:
            return None
        request = Request(peer, f"2.25.{uuid.uuid4().int}", tuple(one.reference for one in asked))
        for one in asked:
            asks = one.delivery.commitment_asks + 1
            values: dict[str, object] = {
                "commitment_asks": asks,
                "commitment_due_at": now + _patience_s(asks),
                "transaction_uid": request.transaction_uid,
            }
            if one not in late:
                values |= {"commitment": CommitmentState.ASKED, "commitment_reason": ""}
            _change(connection, [one], **values)
        references = [[one.delivery.id, *_pair(one.reference)] for one in asked]
        table = schema.commitment_requests
        connection.execute(
            insert(table).values(
                peer=peer, transaction_uid=request.transaction_uid, references=references, asked_at=now
            )
        )
        connection.execute(delete(table).where(table.c.peer == peer, table.c.asked_at < now - KEPT_S))
        _tell(connection, [one for one in asked if one not in late], f"{peer} is asked to answer for {{}}")
    return request


def put_off(database: Database, request: Request, reason: str, delay_s: float) -> None:
    """The peer did not take the request: it is asked anew after a while, and this one does not count.

    The request is kept: whether the peer took it is not known when only its answer was lost.
    """
    columns = schema.deliveries.c
    mine = (columns.transaction_uid == request.transaction_uid) & columns.commitment.in_(_AWAITED)
    with database.write() as connection:
        connection.execute(
            update(schema.deliveries)
            .where(mine)
            .values(
                commitment=CommitmentState.DUE,
                commitment_reason=reason,
                commitment_due_at=time.time() + delay_s,
                commitment_asks=columns.commitment_asks - 1,
            )
        )


def take_report(database: Database, peer: str, transaction_uid: str, verdict: Verdict) -> int:
    """Record what `peer` reports; how many results have their answer by it.

    What it does not answer for is sent again, unless that was often enough. `NotFound` for a transaction that this peer
    was not asked in.
    """
    requests, now = schema.commitment_requests.c, time.time()
    with database.write() as connection:
        row = connection.execute(
            select(schema.commitment_requests).where(requests.peer == peer, requests.transaction_uid == transaction_uid)
        ).first()
        if row is None:
            raise NotFound(f"{peer} was never asked in transaction {transaction_uid}, or more than 30 days ago")
        named = {delivery: Reference(*pair) for delivery, *pair in row.references}
        owed = [
            one
            for one in _owed(connection, schema.deliveries.c.id.in_(list(named)), limit=len(named))
            if one.delivery.state is DeliveryState.DELIVERED and one.delivery.commitment in UNANSWERED
        ]
        safe = set(verdict.safe)
        # An answer to an earlier request counts too, if the object was not sent anew since.
        kept = [one for one in owed if one.reference in safe and (one.delivery.delivered_at or 0.0) <= row.asked_at]
        _change(
            connection,
            kept,
            commitment=CommitmentState.COMMITTED,
            commitment_reason="",
            commitment_due_at=None,
            committed_at=now,
        )
        _tell(connection, kept, f"{peer} answers for {{}}")
        failed = dict(verdict.failed)
        refused = [one for one in owed if one.reference in failed and one.delivery.transaction_uid == transaction_uid]
        for one in refused:
            _refuse(connection, one, failed[one.reference], now)
    return len(kept) + len(refused)


def _refuse(connection: Connection, one: _Owed, failure: int, now: float) -> None:
    peer, refusals = one.delivery.peer, one.delivery.commitment_refusals + 1
    reason = f"{peer} does not answer for it: {describe_failure(failure)}"
    changes: dict[str, object] = {"commitment_reason": reason, "commitment_refusals": refusals}
    delay = min(FIRST_RESEND_S * 2 ** (refusals - 1), LAST_RESEND_S)
    if failure in _FINAL or refusals >= MAXIMUM_REFUSALS:
        changes |= {"commitment": CommitmentState.REFUSED, "commitment_due_at": None}
        outlook = "given up"
    elif failure == DUPLICATE_TRANSACTION:
        changes |= {"commitment": CommitmentState.DUE, "commitment_due_at": now + delay}
        outlook = "asked again"
    else:
        changes |= _NOTHING | {"state": DeliveryState.PENDING, "reason": reason, "not_before": now + delay}
        outlook = "sent again"
    _change(connection, [one], **changes)
    record_event(connection, ACTOR, one.study_uid, f"{one.kind}: {reason}; {outlook}")


def _patience_s(asks: int) -> float:
    return min(FIRST_PATIENCE_S * 2 ** (max(asks, 1) - 1), LAST_PATIENCE_S)


def _owed(connection: Connection, condition: Any, *, limit: int) -> list[_Owed]:
    """Deliveries under a condition, locked, those of a study together."""
    studies, results = schema.studies.c, schema.results.c
    joined = schema.deliveries.join(schema.results).join(schema.jobs).join(schema.studies)
    query = (
        select(schema.deliveries, studies.study_uid, results.kind, results.sop_class_uid, results.sop_instance_uid)
        .select_from(joined)
        .where(condition)
        .order_by(studies.id, schema.deliveries.c.id)
        .limit(limit)
        .with_for_update(of=schema.deliveries)
    )
    return [
        _Owed(Delivery.from_row(row), row.study_uid, row.kind, Reference(row.sop_class_uid, row.sop_instance_uid))
        for row in connection.execute(query)
    ]


def _change(connection: Connection, owed: Sequence[_Owed], **changes: object) -> None:
    if owed:
        ids = [one.delivery.id for one in owed]
        connection.execute(update(schema.deliveries).where(schema.deliveries.c.id.in_(ids)).values(**changes))


def _tell(connection: Connection, owed: Iterable[_Owed], sentence: str) -> None:
    """One line for each study, `{}` in it being its results."""
    for study_uid, kinds in _by_study(owed):
        record_event(connection, ACTOR, study_uid, sentence.format(kinds))


def _by_study(owed: Iterable[_Owed]) -> Iterator[tuple[str, str]]:
    for study_uid, ones in groupby(owed, key=lambda one: one.study_uid):
        yield study_uid, ", ".join(one.kind for one in ones)


def _pair(reference: Reference) -> tuple[str, str]:
    return reference.sop_class_uid, reference.sop_instance_uid
