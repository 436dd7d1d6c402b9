"""Storage commitments: requests kept until the peer has heard, and the instances that they name looked at on disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from sqlalchemy import insert, select, update

from node.archive import schema
from node.archive.files import dataset_offset, file_sha256, sync_file, was_unsynced
from node.archive.store import Archive
from node.dicom.commitment import (
    CLASS_INSTANCE_CONFLICT,
    NO_SUCH_INSTANCE,
    PROCESSING_FAILURE,
    Reference,
    Request,
    Verdict,
)

_AT_ONCE = 500  # SQLite limits the variables of a statement


class Commitments:
    """What peers asked us to answer for."""

    def __init__(self, archive: Archive):
        self._archive = archive

    def keep(self, request: Request) -> None:
        """Keep a request; the same transaction asked again is answered again."""
        table = schema.commitments
        mine = (table.c.peer == request.peer) & (table.c.transaction_uid == request.transaction_uid)
        values = {
            "references": [[one.sop_class_uid, one.sop_instance_uid] for one in request.references],
            "told_at": None,
            "reason": "",
            "attempts": 0,
            "not_before": 0.0,
        }
        with self._archive.database.write() as connection:
            if connection.execute(update(table).where(mine).values(values)).rowcount == 0:
                values |= {"peer": request.peer, "transaction_uid": request.transaction_uid, "created_at": time.time()}
                connection.execute(insert(table).values(values))

    def due(self, peer: str) -> list[tuple[int, Request, int]]:
        """Requests that this peer is owed a report on and may be told now: row, request, attempts before."""
        columns = schema.commitments.c
        query = (
            select(schema.commitments)
            .where(columns.peer == peer, columns.told_at.is_(None), columns.not_before <= time.time())
            .order_by(columns.id)
            .limit(20)
        )
        with self._archive.database.read() as connection:
            return [
                (
                    row.id,
                    Request(peer, row.transaction_uid, tuple(Reference(*pair) for pair in row.references)),
                    row.attempts,
                )
                for row in connection.execute(query)
            ]

    def told(self, row: int) -> None:
        """The peer has the report."""
        self._change(row, told_at=time.time(), reason="")

    def put_off(self, row: int, attempts: int, reason: str, delay_s: float) -> None:
        """The peer could not be told."""
        self._change(row, attempts=attempts, reason=reason, not_before=time.time() + delay_s)

    def verify(self, request: Request) -> Verdict:
        """Read each instance that is named and compare its bytes with the digest of its reception; what was not synced
        then (`durability: relaxed`) is now, for the peer may delete its own.
        """
        safe: list[Reference] = []
        failed: list[tuple[Reference, int]] = []
        for reference, row in self._rows(request.references):
            if row is None:
                failed.append((reference, NO_SUCH_INSTANCE))
            elif row.sop_class_uid != reference.sop_class_uid:
                failed.append((reference, CLASS_INSTANCE_CONFLICT))
            elif not self._is_intact(row):
                failed.append((reference, PROCESSING_FAILURE))
            else:
                safe.append(reference)
        return Verdict(tuple(safe), tuple(failed))

    def _rows(self, references: tuple[Reference, ...]) -> Iterator[tuple[Reference, Any]]:
        columns = schema.instances.c
        for begin in range(0, len(references), _AT_ONCE):
            some = references[begin : begin + _AT_ONCE]
            query = select(columns.sop_instance_uid, columns.sop_class_uid, columns.path, columns.sha256).where(
                columns.sop_instance_uid.in_([one.sop_instance_uid for one in some])
            )
            with self._archive.database.read() as connection:
                found = {row.sop_instance_uid: row for row in connection.execute(query)}
            for reference in some:
                yield reference, found.get(reference.sop_instance_uid)

    def _is_intact(self, row) -> bool:
        path = self._archive.storage / row.path
        try:
            if was_unsynced(path):
                sync_file(path)
            return file_sha256(path, skip=dataset_offset(path)) == row.sha256
        except (OSError, ValueError):
            return False

    def _change(self, row: int, **changes: object) -> None:
        table = schema.commitments
        with self._archive.database.write() as connection:
            connection.execute(update(table).where(table.c.id == row).values(changes))
