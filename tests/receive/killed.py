"""The receiving process with a death of its own: `python -m tests.receive.killed CONFIG STEP NUMBER` serves as `radnode
serve --role receive` does, and kills itself with SIGKILL when STEP of the contract is reached for the NUMBERth time.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from node import cli
from node.archive import ingest
from node.archive.files import SpoolFile
from node.receive.association import Association
from node.receive.storage import StorageSession

# Where each step lies: the method, and whether death comes before or behind it.
STEPS: dict[str, tuple[Any, str, bool]] = {
    "opened": (SpoolFile, "__init__", False),
    "half written": (SpoolFile, "write", False),
    "before the sync": (SpoolFile, "sync", True),
    "synced": (SpoolFile, "sync", False),
    "named": (SpoolFile, "link", False),
    "folder synced": (ingest, "sync_folder", False),
    "row inserted": (ingest.Ingest, "_insert", False),
    "committed": (ingest.Ingest, "_transact", False),
    "before the answer": (Association, "_answer", True),
    "answered": (Association, "_answer", False),
    "tidied": (StorageSession, "tidy", False),
}


def dying(function: Callable[..., Any], number: int, *, before: bool) -> Callable[..., Any]:
    """`function`, whose `number`th call is the last thing that the process does."""
    calls = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if before and calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        value = function(*arguments, **options)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    return wrapped


if __name__ == "__main__":
    config, step, count = sys.argv[1:]
    owner, name, before = STEPS[step]
    setattr(owner, name, dying(getattr(owner, name), int(count), before=before))
    sys.exit(cli.main(["serve", "--role", "receive", "--config", config]))
