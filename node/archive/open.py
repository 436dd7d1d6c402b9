"""The archive that a configuration names."""

from __future__ import annotations

from node.archive.store import Archive
from node.config import Config


def open_archive(config: Config) -> Archive:
    """Open (and at the first time make) the configured archive."""
    return Archive(config.node.storage, config.database_url, durable=config.receive.durability == "full")
