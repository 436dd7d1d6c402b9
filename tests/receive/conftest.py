"""The receiving process under test, and the archive that it fills."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from node.archive.store import Archive
from tests.benchmark.receivers import Receiver, radnode


@dataclass(frozen=True)
class Door:
    """A running receiver with its folder."""

    receiver: Receiver
    folder: Path

    @property
    def port(self) -> int:
        return self.receiver.port

    @property
    def log(self) -> str:
        """What it has said so far."""
        return (self.folder / "log.txt").read_text()

    @property
    def storage(self) -> Path:
        return self.folder / "var"

    @contextmanager
    def archive(self) -> Iterator[Archive]:
        """A second view of its archive."""
        opened = Archive(self.storage, f"sqlite:///{self.storage / 'radnode.sqlite'}")
        yield opened
        opened.close()


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    """A receiver of this test's own."""
    with radnode(tmp_path / "node") as receiver:
        yield Door(receiver, tmp_path / "node")


@pytest.fixture(scope="module")
def shared_door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A receiver that the tests of a module share."""
    folder = tmp_path_factory.mktemp("receiver") / "node"
    with radnode(folder) as receiver:
        yield Door(receiver, folder)
