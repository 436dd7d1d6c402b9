"""Who may open an association: called and calling AE title, the address that the calling peer is known by, and how much
of it a peer may use at once.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

_LOOKED_UP_S = 60.0  # how long a host name's addresses are believed


@dataclass(frozen=True)
class Sender:
    """A peer that may send to us."""

    name: str
    ae_title: str
    host: str  # address, network (10.1.2.0/24) or host name
    port: int | None = None  # where it listens, for storage commitment; None: it does not
    maximum_associations: int | None = None  # at once; None: as many as the node takes
    maximum_instances_s: float | None = None  # mean rate; a faster sender is slowed down, not refused
    sop_classes: frozenset[str] | None = None  # SOP class UIDs that it may send; None: what the node takes

    @cached_property
    def network(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
        """The addresses it may call from; None when `host` is a name."""
        try:
            return ipaddress.ip_network(self.host, strict=False)
        except ValueError:
            return None


class Reject(Enum):
    """Result, source and reason of an A-ASSOCIATE-RJ (PS3.8 table 9-21)."""

    CALLED_AE_TITLE = (1, 1, 7)
    CALLING_AE_TITLE = (1, 1, 3)
    NO_REASON = (1, 1, 1)
    APPLICATION_CONTEXT = (1, 1, 2)
    PROTOCOL_VERSION = (1, 2, 2)
    LOCAL_LIMIT = (2, 3, 2)  # transient: come again later


@dataclass(frozen=True)
class Refusal:
    """Why an association is refused: what the peer hears, and one sentence for the log."""

    reject: Reject
    why: str


@dataclass(frozen=True)
class Admission:
    """The rule of the door."""

    called_ae_title: str
    senders: tuple[Sender, ...]
    check_called: bool = True
    accept_unknown_sop_classes: bool = False  # private storage classes, and standard ones newer than this node

    def decide(self, called: str, calling: str, address: str) -> Sender | Refusal:
        """The sender that calls, or why it is refused."""
        if self.check_called and called != self.called_ae_title:
            return Refusal(Reject.CALLED_AE_TITLE, f"called AE title {called!a} is not ours ({self.called_ae_title})")
        named = [sender for sender in self.senders if sender.ae_title == calling]
        if not named:
            return Refusal(Reject.CALLING_AE_TITLE, f"calling AE title {calling!a} is not in receive.from")
        for sender in named:
            if _is_at(sender, address):
                return sender
        return Refusal(Reject.CALLING_AE_TITLE, f"{calling!a} may not call from {address}")


def _is_at(sender: Sender, address: str) -> bool:
    if sender.network is None:
        return address in _names.addresses(sender.host)
    try:
        called_from = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(called_from, "ipv4_mapped", None)
    return (mapped or called_from) in sender.network


class _Names:
    """Addresses of host names, looked up once a minute: a slow name server must not slow every association."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, frozenset[str]]] = {}

    def addresses(self, host: str) -> frozenset[str]:
        until, addresses = self._known.get(host, (0.0, frozenset()))
        if time.monotonic() < until:
            return addresses
        try:
            found = frozenset(str(entry[4][0]) for entry in socket.getaddrinfo(host, None))
        except OSError:
            return addresses  # what was true a minute ago is better than an outage of the name server
        self._known[host] = (time.monotonic() + _LOOKED_UP_S, found)
        return found


_names = _Names()


class Places:
    """How many associations are open: in all, per address, per sender. Taking a place beyond a limit is refused."""

    def __init__(self, maximum: int, maximum_per_address: int | None):
        self._maximum = maximum
        self._per_address = maximum_per_address or max(8, maximum // 2)
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def take(self, sender: Sender, address: str) -> Iterator[Refusal | None]:
        """Hold a place while the block runs; the block gets a refusal when there is none."""
        # Keys of one counter: no sender or address begins with '='.
        limits = {"=all": self._maximum, f"=address {address}": self._per_address}
        if sender.maximum_associations is not None:
            limits[f"=sender {sender.name}"] = sender.maximum_associations
        with self._lock:
            full = [(key, limit) for key, limit in limits.items() if self._taken[key] >= limit]
            if not full:
                self._taken.update(limits.keys())
        if full:
            key, limit = full[0]
            yield Refusal(Reject.LOCAL_LIMIT, f"all {limit} places of {key[1:]} are taken")
            return
        try:
            yield None
        finally:
            with self._lock:
                self._taken.subtract(limits.keys())
                self._taken += Counter()  # forget what is zero: the addresses of years need no memory

    def taken(self) -> int:
        """Open associations."""
        with self._lock:
            return self._taken["=all"]


class Pace:
    """Keeps one sender below its rate by waiting before an answer; the sender sees a slower node, not an error."""

    def __init__(self) -> None:
        self._next: dict[str, float] = {}
        self._lock = threading.Lock()

    def delay_s(self, sender: Sender) -> float:
        """How long to wait before this sender's next answer."""
        if not sender.maximum_instances_s:
            return 0.0
        now = time.monotonic()
        with self._lock:
            turn = max(self._next.get(sender.name, now), now)
            self._next[sender.name] = turn + 1 / sender.maximum_instances_s
        return turn - now
