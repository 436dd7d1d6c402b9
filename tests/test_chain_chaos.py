"""kill -9 of any process, again and again: every study ends with exactly one set of results at the PACS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from node.demo.pacs import Orthanc
from tests.chaos import check_results, fast_node, make_studies, under_fire, wait_for_results
from tests.postgresql import postgresql_server

Database = tuple[str, Callable[[], None]]


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """What the configuration names, and what happens to it half-way."""
    if request.param == "sqlite":
        yield "sqlite", lambda: None
        return
    with postgresql_server() as server:
        yield server.url, server.restart


@pytest.mark.timeout(600)
def test_every_study_ends_with_one_set_of_results(tmp_path: Path, database: Database) -> None:
    url, half_way = database
    studies = make_studies(tmp_path / "studies", 20)
    with Orthanc(tmp_path / "orthanc") as pacs:
        node = fast_node(tmp_path, pacs.port, database=url)
        node.start()
        try:
            fire = under_fire(node, list(studies.values()), 20.0, seed=6, half_way=half_way)
            assert fire.killed.total() >= 3
            wait_for_results(node, len(studies), 300)
            check_results(node, pacs, studies)
            assert {study["state"] for study in node.json("studies", "list")} == {"done"}
        finally:
            node.kill_all()
