"""Who may open an association: called and calling AE title, and the address that the calling peer is known by."""

from __future__ import annotations

import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Sender:
    """A peer that may send to us."""

    name: str
    ae_title: str
    host: str


@dataclass(frozen=True)
class Admission:
    """The rule of the door."""

    called_ae_title: str
    senders: tuple[Sender, ...]
    check_called: bool = True

    def refusal(self, called: str, calling: str, address: str) -> str:
        """Why this association is refused, one sentence; "" when it is admitted."""
        if self.check_called and called.strip() != self.called_ae_title:
            return f"called AE title {called.strip()!a} is not ours ({self.called_ae_title})"
        named = [sender for sender in self.senders if sender.ae_title == calling.strip()]
        if not named:
            return f"calling AE title {calling.strip()!a} is not in receive.from"
        if not any(address in _addresses(sender.host) for sender in named):
            return f"{calling.strip()!a} may not call from {address}"
        return ""


def _addresses(host: str) -> set[str]:
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return set()
