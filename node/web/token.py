"""The bearer token of the HTTP door."""

from __future__ import annotations

from pathlib import Path

from node.errors import RadnodeError

SHORTEST = 16


def read_token(file: Path) -> str:
    """The first line of `file`; `RadnodeError` says why it cannot serve."""
    try:
        token = file.read_text().splitlines()[0].strip()
    except (OSError, IndexError, UnicodeDecodeError) as error:
        raise RadnodeError(f"web.token_file: {file} cannot be read: {error}") from error
    if len(token) < SHORTEST:
        raise RadnodeError(f"web.token_file: the first line of {file} must have {SHORTEST} characters or more")
    return token
