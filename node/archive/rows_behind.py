"""Rows that follow the answer (`receive.durability: relaxed`), in transactions that many instances share.

Where nothing is synced Success means that an image survives the process. It does when it has its final name beside the
one in the spool: what has no row at a death is adopted at the next start (`node.archive.recover`). So neither the
digest nor the database needs to be waited for, and one transaction is made for what came in the last moment.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from contextlib import suppress

from sqlalchemy.exc import SQLAlchemyError

from node.archive.database import Database, record_event
from node.archive.files import SpoolFile
from node.archive.ingest import LOCK_PATIENCE_S, Arrival, Ingest, Outcome
from node.dicom.identity import Identity
from node.errors import ArchiveError

_log = logging.getLogger(__name__)

MOST = 256  # instances without a row, or a few more: each holds a descriptor, and a start after a death reads each
_GATHER_S = 0.02
_RETRY_S = 0.5


class RowsBehind:
    """The thread that makes the rows; safe to use from many threads."""

    def __init__(self, ingest: Ingest, database: Database):
        self._ingest = ingest
        self._database = database
        self._waiting: deque[tuple[Arrival, SpoolFile]] = deque()  # the oldest first; they go when their rows are there
        self._changed = threading.Condition()
        self._taken = self._settled = 0
        self._asked = 0  # up to this instance somebody waits
        self._refused = ""  # why the database takes none at the moment
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="rows", daemon=True)
        self._thread.start()

    def take(self, spooled: SpoolFile, identity: Identity, received_from: str) -> None:
        """Keep a received instance; when this returns it may be acknowledged, and `spooled` is the caller's no more.

        Raises `ArchiveFull` when there is no room and `ArchiveError` when disk or database refuse; then the instance
        must not be acknowledged, and nothing of it is left behind but what the caller closes.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < MOST or self._refused or self._closing, LOCK_PATIENCE_S)
            if self._refused or self._closing or len(self._waiting) >= MOST:
                raise ArchiveError(self._refused or "the database is too far behind")
        arrival = self._ingest.name(spooled, identity, received_from)
        with self._changed:
            self._waiting.append((arrival, spooled))
            self._taken += 1
            if len(self._waiting) == 1:
                self._changed.notify_all()

    def settle(self, patience_s: float = LOCK_PATIENCE_S) -> bool:
        """Wait until all that was taken up to now has its row; False when the database does not take them."""
        with self._changed:
            asked = self._taken
            if self._settled < asked:
                self._asked = max(self._asked, asked)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._settled >= asked or self._refused, patience_s)
            return self._settled >= asked

    def close(self) -> None:
        """Make the rows that are owed, as far as the database takes them; the next start sees to the rest."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        alone = 0  # so many are committed one by one, to see which of them it is
        while group := self._next(1 if alone else MOST):
            alone = max(0, alone - 1)
            try:
                group = [each for each in group if self._is_readable(*each)]
                self._ingest.commit_acknowledged([arrival for arrival, _ in group])
                for arrival, spooled in group:
                    if arrival.outcome is None:
                        self._ingest.settle_conflict(arrival)
                    self._finish(arrival, spooled)
            except Exception as error:  # whatever it is, what was acknowledged stays
                if not self._ingest.is_at_fault(error):
                    if self._refuse(error):
                        return
                elif len(group) > 1:
                    alone = len(group)
                else:
                    self._set_aside(*group[0], error)

    def _next(self, most: int) -> list[tuple[Arrival, SpoolFile]]:
        """The oldest without a row, a moment after the first came; none when all is done and the end is near."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            self._changed.wait_for(lambda: self._closing or self._asked > self._settled, _GATHER_S)
            return list(itertools.islice(self._waiting, most))

    def _finish(self, arrival: Arrival, spooled: SpoolFile) -> None:
        if arrival.outcome is Outcome.CONFLICT:
            _log.error(
                "ALARM: instance %s came again from %s with other content: quarantined",
                arrival.identity.sop_instance_uid,
                arrival.received_from,
            )
        spooled.close()
        with self._changed:
            if self._refused:
                _log.warning("the database takes rows again")
            self._refused = ""
        self._forget(arrival, spooled)

    def _forget(self, arrival: Arrival, spooled: SpoolFile) -> None:
        with self._changed:
            self._waiting.remove((arrival, spooled))
            self._settled += 1
            self._changed.notify_all()

    def _is_readable(self, arrival: Arrival, spooled: SpoolFile) -> bool:
        """Wait for the digest, before the database is locked; what the disk does not give back is set aside."""
        try:
            _ = spooled.sha256
        except ArchiveError as error:
            self._set_aside(arrival, spooled, error)
            return False
        return True

    def _set_aside(self, arrival: Arrival, spooled: SpoolFile, error: Exception) -> None:
        """An instance that will never have a row as it is: kept for a person, and out of the others' way."""
        uid, sender = arrival.identity.sop_instance_uid, arrival.received_from
        what = f"ALARM: instance {uid} from {sender} was acknowledged and cannot have a row ({type(error).__name__})"
        told = f"{what}: it stays in spool/, as {spooled.token}"
        _log.error(told)
        with suppress(SQLAlchemyError), self._database.write() as connection:
            record_event(connection, "receive", arrival.identity.study_uid, told)
        _owe(spooled)
        self._forget(arrival, spooled)

    def _refuse(self, error: Exception) -> bool:
        """Take nothing more until the database does; True when the end is near and the next start sees to the rest."""
        with self._changed:
            if not self._refused:
                _log.error(
                    "the database takes no rows (%s): nothing is acknowledged until it does", type(error).__name__
                )
            self._refused = f"the database did not take an instance: {type(error).__name__}"
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._closing, _RETRY_S):
                return False
            for _, spooled in self._waiting:
                _owe(spooled)
            return True


def _owe(spooled: SpoolFile) -> None:
    try:
        spooled.owe()
    except ArchiveError as error:  # it lives as long as the machine
        _log.error("an acknowledged instance without a row, %s, is not on the disk: %s", spooled.path, error)
    spooled.close()
