"""The table of a page: a line per finding with its colour, its numbers under their heads, and a bar where there is a
part of one. Many lines stand in blocks beside each other; where there is no room for all, the heaviest stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from node.report.colors import RGB
from node.report.drawing import TEXT
from node.report.fonts import load_font, printable, shorten, wrap
from node.report.page import Line
from node.report.words import Words, show_number

FAINT: RGB = (158, 163, 171)
ROW = 27  # pixels
_HEAD = 26
_RULE: RGB = (56, 60, 68)
_TROUGH: RGB = (44, 48, 54)
_SWATCH = 28
_GAP = 26  # between columns
_BLOCK_GAP = 44
_BAR, _PERCENT = 150, 72
_NAME, _SHORTEST = 330, 150  # the widest name, and how far it gives way
_NOTES = 3  # lines for all that was not found, where it has no lines of its own


@dataclass(frozen=True)
class _Block:
    """The columns of a block, in pixels from its left edge."""

    name: float  # width
    cells: dict[str, float]  # head to right edge
    bar: float | None  # left edge
    width: float


class Table:
    """Lines as they are laid out in a width of so many pixels."""

    def __init__(self, lines: Sequence[Line], words: Words, width: int):
        self._lines, self._words, self._width = list(lines), words, width
        self._block, self._further = _measure(self._lines, words, width)
        self._blocks = max(1, int((width + _BLOCK_GAP) // (self._block.width + _BLOCK_GAP)))

    @property
    def count(self) -> int:
        """How many lines there are."""
        return len(self._lines)

    def height(self, lines: int) -> int:
        """Pixels that so many lines need at least."""
        return _HEAD + ROW * -(-lines // self._blocks)

    def draw(self, page: Image.Image, place: tuple[int, int], height: int, colors: Mapping[int, RGB]) -> int:
        """Draw it at a place of the page in at most so many pixels; returns how many it took."""
        self._halve(height)
        lines, foot = self._choose(height)
        room = max(1, (height - _HEAD - 24 * len(foot)) // ROW)
        blocks = max(1, min(self._blocks, -(-len(lines) // room)))
        rows = -(-len(lines) // blocks)
        for number in range(blocks):
            left = place[0] + round(number * (self._block.width + _BLOCK_GAP))
            if part := lines[number * rows : (number + 1) * rows]:
                self._draw_block(page, part, (left, place[1]), colors, only=blocks == 1)
        draw = ImageDraw.Draw(page)
        below = place[1] + _HEAD + ROW * rows + 2
        for number, text in enumerate(foot):
            draw.text((place[0], below + 24 * number), text, fill=FAINT, font=load_font(16))
        return _HEAD + ROW * rows + 24 * len(foot)

    def _halve(self, height: int) -> None:
        """Two blocks of fewer numbers where one block of all of them has no room for every line."""
        if self._blocks > 1 or self.height(self.count) <= height:
            return
        block, further = _measure(self._lines, self._words, (self._width - _BLOCK_GAP) // 2)
        if block.cells and 2 * block.width + _BLOCK_GAP <= self._width:
            self._block, self._further, self._blocks = block, further, 2

    def _choose(self, height: int) -> tuple[list[Line], list[str]]:
        """The lines that have room, and what is said of the others below them."""
        further = [printable(self._words.further)] if self._further else []
        if self.height(self.count) + 24 * len(further) <= height:
            return self._lines, further
        noted: dict[str, list[str]] = {}
        for line in self._lines:
            if line.note:
                noted.setdefault(line.note, []).append(line.text)
        foot = [
            text
            for note, names in noted.items()
            for text in wrap(
                f"{note} ({len(names)}){self._words.colon} {', '.join(names)}", load_font(16), self._width, _NOTES
            )
        ]
        foot += further
        others = [line for line in self._lines if not line.note]
        room = self._blocks * max(1, (height - _HEAD - 24 * len(foot)) // ROW)
        if len(others) <= room:
            return others, foot
        room = self._blocks * max(1, (height - _HEAD - 24 * (len(foot) + 1)) // ROW)
        kept = sorted(others, key=lambda line: -line.weight)[:room]
        return kept, [printable(self._words.more.format(count=len(others) - len(kept))), *foot]

    def _draw_block(
        self,
        page: Image.Image,
        lines: Sequence[Line],
        place: tuple[int, int],
        colors: Mapping[int, RGB],
        *,
        only: bool,
    ) -> None:
        draw, block = ImageDraw.Draw(page), self._block
        left, top = place
        width = min(block.width, self._width)
        small, usual, bold = load_font(15), load_font(18), load_font(18, bold=True)
        decided = any(line.strong for line in self._lines)
        draw.text((left + _SWATCH, top + 16), printable(self._words.finding), fill=FAINT, font=small, anchor="ls")
        for head, right in block.cells.items():
            draw.text((left + right, top + 16), printable(head), fill=FAINT, font=small, anchor="rs")
        if block.bar is not None:
            draw.text((left + block.bar, top + 16), self._words.certainty, fill=FAINT, font=small, anchor="ls")
        draw.line((left, top + _HEAD - 3, left + width, top + _HEAD - 3), fill=_RULE)
        for number, line in enumerate(lines):
            y = top + _HEAD + ROW * number
            base = y + 19
            draw.rectangle((left, y + 4, left + 17, y + 21), fill=colors[line.label])
            font = bold if line.strong else usual
            tone = TEXT if line.strong or not decided else FAINT
            name = shorten(line.text, font, block.name)
            draw.text((left + _SWATCH, base), name, fill=tone, font=font, anchor="ls")
            if line.note:
                start = left + _SWATCH + block.name + _GAP
                room = (left + width - start) if not only else self._width - (start - left)
                draw.text((start, base), shorten(line.note, usual, room), fill=FAINT, font=usual, anchor="ls")
                continue
            for cell in line.cells:
                if cell.head in block.cells:
                    draw.text((left + block.cells[cell.head], base), cell.text, fill=tone, font=font, anchor="rs")
            if line.part is not None and block.bar is not None:
                x = left + block.bar
                draw.rectangle((x, y + 6, x + _BAR, y + 19), fill=_TROUGH)
                draw.rectangle((x, y + 6, x + max(1, round(_BAR * line.part)), y + 19), fill=colors[line.label])
                # As the report rounds it, to the digit shown.
                percent = f"{show_number(round(100 * line.part, 2), '%')} %"
                draw.text((x + _BAR + _PERCENT, base), percent, fill=tone, font=font, anchor="rs")


def _measure(lines: Sequence[Line], words: Words, most: int) -> tuple[_Block, bool]:
    """The columns that `lines` need in `most` pixels, and whether some of their numbers have no room."""
    small, bold = load_font(15), load_font(18, bold=True)
    widths: dict[str, float] = {}
    for line in lines:
        for cell in line.cells:
            before = widths.get(cell.head, small.getlength(printable(cell.head)))
            widths[cell.head] = max(before, bold.getlength(cell.text))
    bars = _GAP + _BAR + _PERCENT if any(line.part is not None for line in lines) else 0
    name = min(_NAME, max(bold.getlength(printable(text)) for text in [words.finding, *(line.text for line in lines)]))
    # Names give way to numbers, down to what is still a name.
    room = most - _SWATCH - bars
    name = max(min(name, room - sum(width + _GAP for width in widths.values())), min(name, _SHORTEST))
    edge, cells = _SWATCH + name, {}
    for head, width in widths.items():
        if edge + _GAP + width > most - bars:
            break
        edge += _GAP + width
        cells[head] = edge
    bar = edge + _GAP if bars else None
    edge += bars
    if notes := max((bold.getlength(printable(line.note)) for line in lines), default=0):
        edge = max(edge, _SWATCH + name + _GAP + notes)
    return _Block(name, cells, bar, edge), len(cells) < len(widths)
