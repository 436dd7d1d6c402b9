"""Storage commitment as data (PS3.4 J.3): what was asked, and what was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

WELL_KNOWN_INSTANCE: Final = "1.2.840.10008.1.20.1.1"
EVENT_ALL_SAFE, EVENT_FAILURES = 1, 2  # Event Type IDs, PS3.4 table J.3-2

# Failure Reasons, PS3.4 J.3.3.1.1.
PROCESSING_FAILURE, NO_SUCH_INSTANCE, CLASS_INSTANCE_CONFLICT = 0x0110, 0x0112, 0x0119
CLASS_NOT_SUPPORTED, DUPLICATE_TRANSACTION = 0x0122, 0x0131
_FAILURES: Final = {
    PROCESSING_FAILURE: "processing failure",
    NO_SUCH_INSTANCE: "no such object instance",
    0x0213: "resource limitation",
    CLASS_NOT_SUPPORTED: "SOP class not supported",
    CLASS_INSTANCE_CONFLICT: "class and instance conflict",
    DUPLICATE_TRANSACTION: "duplicate transaction UID",
}


@dataclass(frozen=True)
class Reference:
    """An instance that a peer asks about."""

    sop_class_uid: str
    sop_instance_uid: str


@dataclass(frozen=True)
class Request:
    """One transaction; `peer` is the name that the configuration gives the peer."""

    peer: str
    transaction_uid: str
    references: tuple[Reference, ...]


@dataclass(frozen=True)
class Verdict:
    """What is safe with the SCP, and what it does not answer for, with its Failure Reason."""

    safe: tuple[Reference, ...]
    failed: tuple[tuple[Reference, int], ...]


def describe_failure(reason: int) -> str:
    """A Failure Reason for people."""
    return f"{_FAILURES.get(reason, 'a reason of its own')} ({reason:04X})"
