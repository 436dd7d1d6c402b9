"""The database of the archive: opening it, its two kinds of transaction, and its version.

SQLite runs in WAL mode with `synchronous=FULL`: a commit has reached the disk when it returns. A writer takes the
write lock when its transaction begins (`BEGIN IMMEDIATE`), so no transaction fails half-way because another one wrote
in between.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, insert, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from node.archive import schema
from node.archive.migrations import make_tables, revision_of, upgrade
from node.errors import ArchiveError

_log = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 30.0
HANGING_S = 900.0
_BRING_UP_LOCK = 0x7261646E6F6465  # 'radnode'
_END_WHEN_IDLE = text(
    "SELECT set_config('idle_session_timeout', :limit, false) "
    "WHERE current_setting('server_version_num')::integer >= 140000"
)


class Database:
    """Connections to the archive's database; safe to share between the threads of a process, not across a fork."""

    def __init__(self, url: str):
        """Open (and where needed make) the database at an SQLAlchemy `url`."""
        self.url = make_url(url)
        self.engine: Engine = create_engine(self.url, pool_pre_ping=self.url.get_backend_name() != "sqlite")
        if self.url.get_backend_name() == "sqlite":
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        self._bring_up()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads: one consistent view, never blocks a writer."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that writes; committed (durably) when the block ends, rolled back when it raises."""
        with self.engine.connect().execution_options(radnode_write=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def alone(self, what: str) -> Iterator[bool]:
        """Do something that only one machine on this database does at a time; False where another one is at it.

        Always True on SQLite, which serves one machine. It is over when the block ends, and when the process or the
        server does; of a process that hangs in it after `HANGING_S` (PostgreSQL 14 and later). So two may be at it
        after a failure: it must be no worse than doing it twice.
        """
        if self.url.get_backend_name() != "postgresql":
            yield True
            return
        key = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], signed=True)
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            if not connection.scalar(select(func.pg_try_advisory_lock(key))):
                yield False
                return
            try:
                connection.execute(_END_WHEN_IDLE, {"limit": f"{HANGING_S:.0f}s"})
                yield True
            finally:
                with suppress(SQLAlchemyError):  # the server has ended meanwhile, and the lock with it
                    connection.execute(_END_WHEN_IDLE, {"limit": "0"})
                    connection.execute(select(func.pg_advisory_unlock(key)))

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def _bring_up(self) -> None:
        try:
            with self.write() as connection:
                if self.url.get_backend_name() == "postgresql":
                    # Processes that start together would race for the tables; SQLite's BEGIN IMMEDIATE already queues.
                    connection.execute(select(func.pg_advisory_xact_lock(_BRING_UP_LOCK)))
                revision = revision_of(connection)
                if revision is None:
                    make_tables(connection)
                elif revision != schema.REVISION:
                    upgrade(connection, revision)
                    _log.warning("database brought from revision %s to %s", revision, schema.REVISION)
        except OperationalError as error:
            raise ArchiveError(f"cannot open the database {self.url.render_as_string()}: {error.orig}") from error
        except LookupError as error:
            raise ArchiveError(
                f"the database {self.url.render_as_string()} is at revision {error}, this radnode knows none beyond "
                f"{schema.REVISION}: install the radnode that made it, or restore a backup"
            ) from error


def _prepare_sqlite(connection: Any, _entry: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("radnode_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def record_event(connection: Connection, actor: str, study_uid: str, what: str) -> None:
    """Write one line of a study's story, in the transaction of the change that it tells."""
    connection.execute(insert(schema.events).values(at=time.time(), actor=actor, study_uid=study_uid, what=what))
