"""How lists and records are printed: a table for people, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    json.dump(value, sys.stdout, indent=2, default=str)
    print()


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, empty: str) -> None:
    """A table of `columns`, or the sentence `empty`. Values are shown as they are: no markup, no control characters."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        print(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(str(row[column]))) for column in columns))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 250)  # a pipe or a file has no width to fold to
    console.print(table)


def clean(text: str) -> str:
    """`text` as it may be shown: characters that are not printable (ESC, NUL; PS3.5 6.1.3) are shown as their
    escapes.
    """
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def local_time(seconds: float | None) -> str:
    """A point in time for people, local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def duration(seconds: float | None) -> str:
    """A duration for people."""
    if seconds is None:
        return ""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
