"""Fixtures that more than one room of tests needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from node.archive import schema
from node.archive.store import Archive
from node.demo.pacs import Orthanc
from tests.infer.site import Site, running_site
from tests.postgresql import running_postgresql

# In CI the same examples each time; new ones are looked for at the desk.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("desk", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "desk")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared test data; a machine without it fails, it never skips."""
    folder = Path(os.environ.get("RADNODE_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
    assert folder.is_dir(), (
        f"no test data at {folder}; set RADNODE_SHARED_DATA to the folder that holds chest_ct_philips"
    )
    return folder


@pytest.fixture(scope="session")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """An Orthanc as the PACS of this run; a machine without it fails."""
    assert Orthanc.program(), "Orthanc is not installed (Debian: apt-get install orthanc)"
    with Orthanc(tmp_path_factory.mktemp("orthanc")) as running:
        yield running


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Orthanc]:
    """A PACS of this test alone, with nothing in it."""
    with Orthanc(tmp_path / "orthanc") as running:
        yield running


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A PostgreSQL server of this run."""
    with running_postgresql() as url:
        yield url


@pytest.fixture
def site() -> Iterator[Site]:
    """A web server on this machine, closed after the test."""
    with running_site() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Archive]:
    """An empty archive, on each of the two databases."""
    if request.param == "sqlite":
        opened = Archive(tmp_path / "var", f"sqlite:///{tmp_path / 'radnode.sqlite'}")
    else:
        opened = Archive(tmp_path / "var", request.getfixturevalue("postgresql_url"))
    yield opened
    if request.param == "postgresql":
        schema.metadata.drop_all(opened.database.engine)
    opened.close()
