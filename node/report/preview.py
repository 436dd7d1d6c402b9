"""A page that shows what was found: images with the findings drawn over them in radiological display, and numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from node.dicom.volume import Volume
from node.report.colors import RGB, finding_colors, to_rgb
from node.report.findings import Findings
from node.report.page import Line, Mark, Panel
from node.report.subject import Subject

PANEL = 288  # pixels
GAP = 6
MARGIN = 24
COLUMNS = 4
HEAD = 96
LINE = 30
BAR = 150
LINES = 40
BACKGROUND: RGB = (16, 18, 22)
TEXT: RGB = (232, 234, 237)
FAINT: RGB = (150, 155, 163)
WARNING: RGB = (255, 196, 84)
FILL_OPACITY = 0.32

Place = tuple[int, int]


def render_preview(findings: Findings) -> Image.Image:
    """The page as a palette image, which makes a PNG a third of the size. It carries no patient's name or ID, unless
    the pixels of the images do.

    Few panels are drawn larger, with the table at their side: a row of one or two small ones would waste the page.
    """
    subject, panels, lines = findings.subject, findings.panels(), findings.lines()[:LINES]
    colors = {label: to_rgb(color) for label, color in finding_colors(subject.manifest).items()}
    width = 2 * MARGIN + COLUMNS * PANEL + (COLUMNS - 1) * GAP
    columns, size = (COLUMNS, PANEL) if len(panels) > 2 else (2, 2 * PANEL + GAP)
    body = -(-len(panels) // columns) * (size + GAP)
    if len(panels) == 1:
        body, foot, table = max(body, LINE * len(lines)), 20, (2 * MARGIN + size, HEAD + 4)
    else:
        foot, table = 44 + LINE * len(lines), (MARGIN, HEAD + body + 16)
    page = Image.new("RGB", (width, HEAD + body + foot), BACKGROUND)
    _draw_head(page, subject)
    for number, panel in enumerate(panels):
        place = (MARGIN + number % columns * (size + GAP), HEAD + number // columns * (size + GAP))
        page.paste(_draw_panel(panel, colors, size), place)
    _draw_table(page, lines, colors, table)
    if any(panel.pixels.ndim == 3 for panel in panels):  # a photograph has more colours than a palette
        own = [BACKGROUND, TEXT, FAINT, WARNING, *colors.values()][:64]
        found = page.quantize(256 - len(own), Image.Quantize.MEDIANCUT).getpalette() or []
        palette = Image.new("P", (1, 1))
        palette.putpalette([part for entry in own for part in entry] + found[: 3 * (256 - len(own))])
        return page.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    return page.quantize(palette=_palette(list(colors.values())), dither=Image.Dither.NONE)


def _draw_head(page: Image.Image, subject: Subject) -> None:
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, 16), subject.manifest.title, fill=TEXT, font=_font(26))
    draw.text((MARGIN, 54), f"{subject.model_name} {subject.model_version}", fill=FAINT, font=_font(16))
    banner = "AI, NOT VERIFIED - research use only"
    draw.text((page.width - MARGIN, 22), banner, fill=WARNING, font=_font(20), anchor="ra")
    count = len(subject.source_slices)
    parts = f"{count} slices" if isinstance(subject.source, Volume) else f"{count} frame{'s' * (count > 1)}"
    described = f"{subject.source.modality}, {parts}, series ...{subject.source.series_uid[-14:]}"
    draw.text((page.width - MARGIN, 54), described, fill=FAINT, font=_font(16), anchor="ra")


def _palette(colors: Sequence[RGB]) -> Image.Image:
    """The page's own colours: 40 greys, and each segment's colour and shades of it over grey, as far as 256 reach."""
    entries = [BACKGROUND, TEXT, FAINT, WARNING, *((v, v, v) for v in np.linspace(0, 255, 40).astype(int).tolist())]
    room = (256 - len(entries)) // len(colors)
    shades = np.linspace(0, 255, min(24, room - 1)) if room > 1 else ()
    for color in colors[: 256 - len(entries)]:
        entries.append(color)
        entries += [tuple(int(v * (1 - FILL_OPACITY) + part * FILL_OPACITY) for part in color) for v in shades]
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for entry in entries for part in entry])
    return palette


def _draw_panel(panel: Panel, colors: dict[int, RGB], side: int) -> Image.Image:
    """A square of `side` pixels with the image in its middle, as large as it goes in its true proportions."""
    height_mm, width_mm = (size * step for size, step in zip(panel.pixels.shape[:2], panel.spacing_mm, strict=True))
    scale = side / max(height_mm, width_mm)
    size = (max(1, round(width_mm * scale)), max(1, round(height_mm * scale)))
    shown = Image.fromarray((panel.pixels * 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC).convert("RGB")
    if panel.labels is not None:
        shown = _fill(shown, panel.labels, colors)
    canvas = Image.new("RGB", (side, side), (0, 0, 0))
    corner = ((side - size[0]) // 2, (side - size[1]) // 2)
    canvas.paste(shown, corner)
    draw = ImageDraw.Draw(canvas)
    pixels = (size[1] / panel.pixels.shape[0], size[0] / panel.pixels.shape[1])
    taken: list[tuple[float, float, float, float]] = []
    for mark in panel.marks:
        points = (mark.points + 0.5) * pixels + corner[::-1]
        _draw_mark(draw, mark, [(float(x), float(y)) for y, x in points], colors[mark.label], side, taken)
    for place, text, anchor in (((6, side // 2), panel.edges[0], "lm"), ((side // 2, 4), panel.edges[1], "mt")):
        draw.text(place, text, fill=TEXT, font=_font(17), anchor=anchor, stroke_width=2, stroke_fill=(0, 0, 0))
    caption = (8, side - 6)
    draw.text(caption, panel.caption, fill=FAINT, font=_font(14), anchor="ls", stroke_width=2, stroke_fill=(0, 0, 0))
    return canvas


def _fill(shown: Image.Image, labels: np.ndarray, colors: dict[int, RGB]) -> Image.Image:
    """The labels as outlines, and thinly inside them."""
    pixels = np.asarray(shown).astype(np.float32)
    labels = np.asarray(Image.fromarray(labels.astype(np.int32)).resize(shown.size, Image.Resampling.NEAREST))
    for label in np.unique(labels[labels > 0]):
        where = labels == label
        color = np.array(colors[int(label)], np.float32)
        pixels[where] = pixels[where] * (1 - FILL_OPACITY) + color * FILL_OPACITY
        pixels[where & ~ndimage.binary_erosion(where)] = color
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _draw_mark(
    draw: ImageDraw.ImageDraw,
    mark: Mark,
    points: list[tuple[float, float]],
    color: RGB,
    side: int,
    taken: list[tuple[float, float, float, float]],
) -> None:
    """An outline or a cross with its name where no other name stands (`taken`)."""
    if len(points) > 1:
        draw.line([*points, points[0]], fill=(0, 0, 0), width=4, joint="curve")
        draw.line([*points, points[0]], fill=color, width=2, joint="curve")
        right, top = max(x for x, _ in points), min(y for _, y in points)
    else:
        (x, y) = points[0]
        for width, reach, paint in ((4, 8, (0, 0, 0)), (2, 7, color)):
            draw.line((x - reach, y, x + reach, y), fill=paint, width=width)
            draw.line((x, y - reach, x, y + reach), fill=paint, width=width)
        right, top = x + 4, y - 4
    font = _font(15)
    left, upper, far, lower = draw.textbbox((0, 0), mark.name, font=font)
    width, height = far - left, lower - upper
    x, y = min(right + 3, side - width - 2), max(top - height - 2, 0)
    while any(x < r and x + width > le and y < b and y + height > t for le, t, r, b in taken) and y < side:
        y += 4
    taken.append((x, y, x + width, y + height))
    draw.text((x - left, y - upper), mark.name, fill=color, font=font, stroke_width=2, stroke_fill=(0, 0, 0))


def _draw_table(page: Image.Image, lines: Sequence[Line], colors: dict[int, RGB], place: Place) -> None:
    """A line per finding: its colour, its text, and a bar with a figure where it has a part of one."""
    draw = ImageDraw.Draw(page)
    font = _font(19)
    room = page.width - MARGIN - place[0] - 30
    bars = [line for line in lines if line.part is not None]
    widest = max((draw.textlength(line.text, font=font) for line in bars), default=0)
    column = place[0] + 30 + min(widest + 24, room - BAR - 70)
    for number, line in enumerate(lines):
        y = place[1] + LINE * number
        if line.label is not None:
            draw.rectangle((place[0], y + 3, place[0] + 18, y + 21), fill=colors[line.label])
        tone = TEXT if line.strong or not any(other.strong for other in lines) else FAINT
        text = _shorten(draw, line.text, room if line.part is None else column - place[0] - 40)
        draw.text((place[0] + 30, y), text, fill=tone, font=font)
        if line.part is None:
            continue
        color = TEXT if line.label is None else colors[line.label]
        draw.rectangle((column, y + 5, column + BAR, y + 19), fill=(44, 48, 54))
        draw.rectangle((column, y + 5, column + max(1, round(BAR * line.part)), y + 19), fill=color)
        draw.text((column + BAR + 10, y), f"{100 * line.part:.1f} %", fill=tone, font=font)


def _shorten(draw: ImageDraw.ImageDraw, text: str, width: float) -> str:
    """The text as far as it fits."""
    font = _font(19)
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
