"""kill -9 of any process, again and again: every study ends with exactly one set of results at the PACS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from node.archive import schema
from node.demo.pacs import Orthanc
from tests.chaos import QUIET, make_studies, under_fire, wait_for_results
from tests.running_node import RunningNode
from tests.test_chain import SEG, SR


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "sqlite":
        yield "sqlite"
        return
    url = request.getfixturevalue("postgresql_url")
    yield url
    engine = create_engine(url)
    schema.metadata.drop_all(engine)
    engine.dispose()


@pytest.mark.timeout(900)
def test_every_study_ends_with_one_set_of_results(tmp_path: Path, database: str) -> None:
    studies = make_studies(tmp_path / "studies", 20)
    with Orthanc(tmp_path / "orthanc") as pacs:
        node = RunningNode(tmp_path, pacs.port, quiet=QUIET, database=database)
        node.start()
        try:
            fire = under_fire(node, studies, 20.0, seed=6)
            assert fire.killed
            wait_for_results(pacs, studies, {SEG, SR}, 400)
            states = {study["state"] for study in node.json("studies", "list")}
            assert states == {"done"}
        finally:
            node.kill_all()
