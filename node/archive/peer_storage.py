"""What peers accepted when they were asked, object class by object class."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from sqlalchemy import delete, insert, select

from node.archive import schema
from node.archive.database import Database


def note_accepted(database: Database, peer: str, accepted: Mapping[str, Sequence[str]]) -> None:
    """Keep what a peer said: SOP class to the transfer syntaxes that it takes, none for a class that it refuses."""
    columns = schema.peer_storage.c
    now = time.time()
    with database.write() as connection:
        for sop_class_uid, syntaxes in accepted.items():
            connection.execute(
                delete(schema.peer_storage).where(columns.peer == peer, columns.sop_class_uid == sop_class_uid)
            )
            connection.execute(
                insert(schema.peer_storage).values(
                    peer=peer, sop_class_uid=sop_class_uid, transfer_syntaxes=list(syntaxes), asked_at=now
                )
            )


def does_accept(database: Database, peer: str, sop_class_uid: str) -> bool | None:
    """Whether a peer takes objects of a class; None when it was never asked with an answer."""
    columns = schema.peer_storage.c
    query = select(columns.transfer_syntaxes).where(columns.peer == peer, columns.sop_class_uid == sop_class_uid)
    with database.read() as connection:
        syntaxes = connection.scalar(query)
    return None if syntaxes is None else bool(syntaxes)
