"""Text that others wrote, as it may stand in an error, a log or a story."""

from __future__ import annotations


def one_line(text: str, longest: int) -> str:
    """The first `longest` characters, with a space for each that is not printable (ESC, line breaks; PS3.5 6.1.3)."""
    return "".join(character if character.isprintable() else " " for character in text[:longest]).strip()
