"""An archive with results, and OHIF on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.viewer.archive import Archive
from tests.viewer.ohif import Viewer, find_ohif, start_browser
from tests.viewer.origin import Origin, read_config


@pytest.fixture(scope="package")
def archive(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    """The archive of this package's tests."""
    made = Archive(shared_data, tmp_path_factory.mktemp("viewer"))
    with made.orthanc:
        yield made


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """A browser for all of them."""
    with start_browser() as started:
        yield started


@pytest.fixture
def viewer(archive: Archive, browser: Browser) -> Iterator[Viewer]:
    """OHIF as its makers configure it."""
    with Origin(find_ohif(), read_config(), archive.orthanc.http_port) as origin:
        opened = Viewer(browser, origin.url)
        yield opened
        opened.close()


@pytest.fixture
def tolerant_viewer(archive: Archive, browser: Browser) -> Iterator[Viewer]:
    """OHIF with the addition of docs/viewers.md to its configuration."""
    with Origin(find_ohif(), read_config("reports-without-places.js"), archive.orthanc.http_port) as origin:
        opened = Viewer(browser, origin.url)
        yield opened
        opened.close()
