"""The way from an older database to this version's: one file for each step in `versions/`, run by alembic.

A new table or column is written in `node.archive.schema`, with the step that brings it, and `schema.REVISION` names
that step. A database made anew has the tables at once; `tests/archive/test_migrations.py` holds both to be the same.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, insert, inspect, select

from node.archive import schema


def revision_of(connection: Connection) -> str | None:
    """The step that the tables are at; None for a database without tables."""
    tables = set(inspect(connection).get_table_names())
    if schema.alembic_version.name in tables:
        return connection.scalar(select(schema.alembic_version.c.version_num))
    return "0001" if "schema_version" in tables else None  # what numbered itself before there were steps


def make_tables(connection: Connection) -> None:
    """All tables in a database without any."""
    schema.metadata.create_all(connection)
    connection.execute(insert(schema.alembic_version).values(version_num=schema.REVISION))


def upgrade(connection: Connection, revision: str) -> None:
    """Take the tables from `revision` to `schema.REVISION`, in the connection's transaction.

    `LookupError` for a revision that this version does not know.
    """
    # Only here: a command that finds its database as it should be does not wait for the import.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        ScriptDirectory.from_config(config).get_revision(revision)
    except CommandError as error:
        raise LookupError(revision) from error
    if not inspect(connection).has_table(schema.alembic_version.name):
        command.stamp(config, revision)
    command.upgrade(config, schema.REVISION)
