"""The addresses of the configured peers."""

from __future__ import annotations

from node.config import Config
from node.deliver.dimse import Address


def destinations(config: Config) -> dict[str, Address]:
    """Every peer that can be spoken to (it has a port), by its name in the configuration."""
    return {
        name: Address(peer.ae_title, peer.host, peer.port, config.node.ae_title)
        for name, peer in config.peers.items()
        if peer.port is not None
    }
