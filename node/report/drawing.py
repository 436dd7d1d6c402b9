"""Images with what was found drawn over them: panels of a page, and the images of an overlay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from node.report.colors import RGB
from node.report.fonts import load_font, shorten
from node.report.page import Mark, Panel

FILL_OPACITY = 0.32
TEXT: RGB = (232, 234, 237)
BLACK: RGB = (0, 0, 0)

Frame = tuple[float, float, float, float]  # left, upper, right, lower


def draw_panel(panel: Panel, caption: str, colors: Mapping[int, RGB], side: int) -> Image.Image:
    """A square of `side` pixels with the image in its middle, as large as it goes in its true proportions."""
    height_mm, width_mm = (size * step for size, step in zip(panel.pixels.shape[:2], panel.spacing_mm, strict=True))
    scale = side / max(height_mm, width_mm)
    size = (max(1, round(width_mm * scale)), max(1, round(height_mm * scale)))
    shown = to_picture(panel.pixels).resize(size, Image.Resampling.BICUBIC)
    if panel.labels is not None:
        labels = Image.fromarray(panel.labels.astype(np.int32)).resize(size, Image.Resampling.NEAREST)
        shown = fill_labels(shown, np.asarray(labels), colors)
    canvas = Image.new("RGB", (side, side), BLACK)
    corner = ((side - size[0]) // 2, (side - size[1]) // 2)
    canvas.paste(shown, corner)
    pixels = (size[1] / panel.pixels.shape[0], size[0] / panel.pixels.shape[1])
    draw_marks(canvas, panel.marks, colors, corner=(corner[1], corner[0]), scale=pixels)
    draw = ImageDraw.Draw(canvas)
    bold = load_font(17, bold=True)
    for place, text, anchor in (((7, side // 2), panel.edges[0], "lm"), ((side // 2, 6), panel.edges[1], "mt")):
        draw.text(place, text, fill=TEXT, font=bold, anchor=anchor, stroke_width=2, stroke_fill=BLACK)
    font = load_font(15)
    caption = shorten(caption, font, side - 16)
    draw.text((8, side - 7), caption, fill=TEXT, font=font, anchor="ls", stroke_width=2, stroke_fill=BLACK)
    return canvas


def to_picture(pixels: NDArray[np.float32]) -> Image.Image:
    """RGB of 8 bits from grey or RGB of 0 to 1."""
    return Image.fromarray(np.rint(pixels * 255).astype(np.uint8)).convert("RGB")


def fill_labels(shown: Image.Image, labels: NDArray[np.integer], colors: Mapping[int, RGB]) -> Image.Image:
    """The labels, of the picture's size, as outlines, and thinly inside them."""
    pixels = np.asarray(shown).astype(np.float32)
    # Each within its own rectangle: a whole picture per label takes seconds for a hundred of them.
    for label, part in enumerate(ndimage.find_objects(labels), 1):
        if part is None:
            continue
        where = labels[part] == label
        color, inside = np.array(colors[label], np.float32), pixels[part]
        inside[where] = inside[where] * (1 - FILL_OPACITY) + color * FILL_OPACITY
        inside[where & ~ndimage.binary_erosion(where)] = color
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_marks(
    canvas: Image.Image,
    marks: Sequence[Mark],
    colors: Mapping[int, RGB],
    *,
    corner: tuple[float, float] = (0, 0),
    scale: tuple[float, float] = (1, 1),
    weight: float = 1,
) -> None:
    """Outlines and crosses with their names, each name where no other one stands.

    `corner` and `scale` lead from the marks' pixels to the canvas: down, across. Lines and letters are `weight` times
    as large as on a page.
    """
    draw = ImageDraw.Draw(canvas)
    taken: list[Frame] = []
    for mark in marks:
        points = [(float(x), float(y)) for y, x in (mark.points + 0.5) * scale + corner]
        _draw_mark(draw, mark.name, points, colors[mark.label], canvas.size, taken, weight)


def _draw_mark(
    draw: ImageDraw.ImageDraw,
    name: str,
    points: list[tuple[float, float]],
    color: RGB,
    size: tuple[int, int],
    taken: list[Frame],
    weight: float,
) -> None:
    thin, wide, reach = (max(1, round(pixels * weight)) for pixels in (2, 4, 7))
    if len(points) > 1:
        draw.line([*points, points[0]], fill=BLACK, width=wide, joint="curve")
        draw.line([*points, points[0]], fill=color, width=thin, joint="curve")
        right, top = max(x for x, _ in points), min(y for _, y in points)
    else:
        (x, y) = points[0]
        for width, length, paint in ((wide, reach + 1, BLACK), (thin, reach, color)):
            draw.line((x - length, y, x + length, y), fill=paint, width=width)
            draw.line((x, y - length, x, y + length), fill=paint, width=width)
        right, top = x + 4, y - 4
    font = load_font(round(16 * weight), bold=True)
    left, upper, far, lower = draw.textbbox((0, 0), name, font=font)
    width, height = far - left, lower - upper
    x, y = min(right + 3, size[0] - width - 2), max(top - height - 2, 0)
    while any(x < r and x + width > le and y < b and y + height > t for le, t, r, b in taken) and y < size[1]:
        y += 4
    taken.append((x, y, x + width, y + height))
    draw.text((x - left, y - upper), name, fill=color, font=font, stroke_width=2, stroke_fill=BLACK)
