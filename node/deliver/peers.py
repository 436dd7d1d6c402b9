"""The configured peers as destinations."""

from __future__ import annotations

from dataclasses import dataclass

from node.association import Address
from node.config import Config
from node.report.kinds import LABELMAP_STORAGE


@dataclass(frozen=True)
class Destination:
    """A peer that results are sent to."""

    address: Address
    compress: bool = False  # send in the best lossless syntax that it takes
    commitment: bool = False  # it is asked to answer for what it got
    asks: tuple[str, ...] = ()  # storage classes that it is asked for, as results depend on whether it takes them


def destinations(config: Config) -> dict[str, Destination]:
    """Every peer that can be spoken to (it has a port), by its name in the configuration."""
    return {
        name: Destination(
            Address(peer.ae_title, peer.host, peer.port, config.node.ae_title),
            compress=peer.compression == "lossless",
            commitment=peer.commitment,
            asks=(LABELMAP_STORAGE,) if peer.seg == "auto" else (),
        )
        for name, peer in config.peers.items()
        if peer.port is not None
    }
