"""An older database becomes this version's, with what is in it; one of a later version is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, insert, inspect, update

from node.archive import schema
from node.archive.database import Database
from node.errors import ArchiveError
from node.queue.jobs import list_jobs
from tests.archive import schema_0001


@pytest.fixture(params=["sqlite", "postgresql"])
def old_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of the first version with one job."""
    url = f"sqlite:///{tmp_path / 'old.sqlite'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql_url")
    engine = create_engine(url)
    schema_0001.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(schema_0001.schema_version).values(version=1))
        times = {"first_received_at": 1.0, "last_received_at": 2.0}
        connection.execute(insert(schema_0001.studies).values(id=7, study_uid="1.2", state="routed", **times))
        job = {"key": "k", "study_id": 7, "study_revision": 1, "route": "r", "model": "m", "model_version": "1"}
        job |= {"model_digest": "d", "inputs": {"image": ["1.2.3"]}, "send_to": ["pacs"], "state": "done"}
        connection.execute(insert(schema_0001.jobs).values(created_at=3.0, **job))
    engine.dispose()
    yield url
    if request.param == "postgresql":
        engine = create_engine(url)
        schema.metadata.drop_all(engine)
        engine.dispose()


def test_an_old_database_becomes_what_a_new_one_is(old_url: str) -> None:
    database = Database(old_url)
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
        assert not inspect(connection).has_table("schema_version")
    ((job, study_uid),) = list_jobs(database)
    assert (study_uid, job.results, job.send_to, job.untold) == ("1.2", ["seg", "sr"], ["pacs"], False)
    database.close()
    again = Database(old_url)  # and stays so
    assert len(list_jobs(again)) == 1
    again.close()


def test_a_database_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.sqlite'}"
    database = Database(url)
    with database.write() as connection:
        connection.execute(update(schema.alembic_version).values(version_num="9999"))
    database.close()
    with pytest.raises(ArchiveError, match="revision 9999, this radnode knows none beyond"):
        Database(url)
