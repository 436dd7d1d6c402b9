"""The font of every picture: Roboto, which the package carries, so that a page looks alike on every machine.

Pillow's own font has no letter beyond ASCII. Text is laid out glyph by glyph: Pillow's other way of doing it loads
libraries of the machine, and the same page would differ between two of them.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from importlib.resources import files
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont
_MISSING = "\uffff"  # a noncharacter: no font has a glyph for it


@cache
def load_font(size: int, *, bold: bool = False) -> Font:
    """The font in pixels."""
    name = "Roboto-Bold.ttf" if bold else "Roboto-Regular.ttf"
    stream = BytesIO((files("node.report") / "fonts" / name).read_bytes())
    return ImageFont.truetype(stream, size, layout_engine=ImageFont.Layout.BASIC)


def printable(text: str) -> str:
    """The text on one line with a question mark for every character that the font has no glyph for."""
    composed = unicodedata.normalize("NFC", re.sub(r"\s", " ", text.strip()))
    return "".join(each if has_glyph(each) else "?" for each in composed)


@cache
def has_glyph(character: str) -> bool:
    """Whether the font can draw a character."""
    return character == " " or _draw(character) != _draw(_MISSING)


def _draw(character: str) -> bytes:
    picture = Image.new("L", (32, 32))
    ImageDraw.Draw(picture).text((4, 4), character, fill=255, font=load_font(16))
    return picture.tobytes()


def shorten(text: str, font: Font, width: float) -> str:
    """As much of the printable text as fits into so many pixels."""
    text = printable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def wrap(text: str, font: Font, width: float, most: int) -> list[str]:
    """The printable text on at most so many lines of so many pixels; what does not fit ends in dots."""
    words = printable(text).split()
    lines: list[str] = []
    while words and len(lines) < most:
        if len(lines) == most - 1:
            return [*lines, shorten(" ".join(words), font, width)]
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(shorten(" ".join(words[:count]), font, width))
        words = words[count:]
    return lines
