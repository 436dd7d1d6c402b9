"""A page that shows what was segmented: slices with the segments drawn over them, in radiological display, and the
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from node.dicom.volume import Volume
from node.report.colors import RGB, segment_colors, to_rgb
from node.report.measure import SegmentMeasurements
from node.report.subject import Subject

PANEL = 288  # pixels
GAP = 6
MARGIN = 24
AXIAL_PANELS = 6
BACKGROUND: RGB = (16, 18, 22)
TEXT: RGB = (232, 234, 237)
FAINT: RGB = (150, 155, 163)
WARNING: RGB = (255, 196, 84)
FILL_OPACITY = 0.32


@dataclass(frozen=True)
class _Panel:
    """One slice as it is shown."""

    grey: NDArray[np.float32]  # 0 to 1
    labels: NDArray[np.uint16]
    spacing_mm: tuple[float, float]  # down, across
    edges: tuple[str, str]  # letters of the left and the upper edge
    caption: str


def render_preview(subject: Subject, measurements: Sequence[SegmentMeasurements]) -> Image.Image:
    """The page as a palette image, which makes a PNG a third of the size. It carries no patient's name or ID."""
    window = _window(subject.volume)
    panels = _choose_panels(subject, window)
    colors = {label: to_rgb(color) for label, color in segment_colors(subject.manifest).items()}
    columns = 4
    rows = -(-len(panels) // columns)
    width = 2 * MARGIN + columns * PANEL + (columns - 1) * GAP
    table = _table_lines(subject, measurements)
    head, foot = 96, 44 + 30 * len(table)
    page = Image.new("RGB", (width, head + rows * (PANEL + GAP) + foot), BACKGROUND)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, 16), subject.manifest.title, fill=TEXT, font=_font(26))
    draw.text((MARGIN, 54), f"{subject.model_name} {subject.model_version}", fill=FAINT, font=_font(16))
    banner = "AI, NOT VERIFIED - research use only"
    draw.text((width - MARGIN, 22), banner, fill=WARNING, font=_font(20), anchor="ra")
    described = (
        f"{subject.volume.modality}, {subject.volume.grid.shape[0]} slices, series ...{subject.volume.series_uid[-14:]}"
    )
    draw.text((width - MARGIN, 54), described, fill=FAINT, font=_font(16), anchor="ra")
    for number, panel in enumerate(panels):
        place = (MARGIN + number % columns * (PANEL + GAP), head + number // columns * (PANEL + GAP))
        page.paste(_draw_panel(panel, colors), place)
    top = head + rows * (PANEL + GAP) + 16
    for line, (label, text) in enumerate(table):
        y = top + 30 * line
        draw.rectangle((MARGIN, y + 3, MARGIN + 18, y + 21), fill=colors[label])
        draw.text((MARGIN + 30, y), text, fill=TEXT, font=_font(19))
    return page.quantize(palette=_palette(list(colors.values())), dither=Image.Dither.NONE)


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


def _choose_panels(subject: Subject, window: tuple[float, float]) -> list[_Panel]:
    """Axial slices across the extent of the segments, then a coronal and a sagittal section through their middle."""
    volume, labels = subject.volume, subject.labelmap.array
    occupied = np.flatnonzero(labels.any(axis=(1, 2)))
    first, last = (int(occupied[0]), int(occupied[-1])) if occupied.size else (0, labels.shape[0] - 1)
    chosen = np.unique(np.linspace(first, last, AXIAL_PANELS + 2).round().astype(int)[1:-1])[::-1]
    panels = [_section(volume, labels, 0, int(index), window) for index in chosen]
    if labels.any():
        weight = labels > 0
        row = int(np.average(np.arange(labels.shape[1]), weights=weight.sum((0, 2))))
        # A column through the larger half, not through the gap between two lungs.
        column = int(np.argmax(weight.sum((0, 1))))
    else:
        row, column = labels.shape[1] // 2, labels.shape[2] // 2
    return [*panels, _section(volume, labels, 1, row, window), _section(volume, labels, 2, column, window)]


def _section(volume: Volume, labels: NDArray[np.uint16], axis: int, index: int, window: tuple[float, float]) -> _Panel:
    """A section across one array axis, turned as radiologists look at it: feet or anterior up or left as the plane
    asks.
    """
    low, high = window
    across_axis = (slice(None),) * axis + (index,)
    grey = np.clip((volume.array[across_axis] - low) / (high - low), 0, 1)
    marked = labels[across_axis]
    down, across = (other for other in range(3) if other != axis)
    directions = [volume.grid.affine_lps[:3, 2 - array_axis] for array_axis in range(3)]
    letters = {down: _letters(directions[down]), across: _letters(directions[across])}
    # Standard display: patient's right or anterior at the left edge, anterior or head at the upper edge.
    if letters[across][0] not in "RA":
        grey, marked = grey[:, ::-1], marked[:, ::-1]
        letters[across] = letters[across][::-1]
    if letters[down][0] not in "AH":
        grey, marked = grey[::-1], marked[::-1]
        letters[down] = letters[down][::-1]
    spacing = volume.grid.spacing_mm
    if axis == 0:
        caption = f"slice {index + 1}"
    else:
        caption = {"R": "sagittal", "L": "sagittal", "A": "coronal", "P": "coronal"}.get(
            _letters(directions[axis])[0], "axial"
        )
    return _Panel(grey, marked, (spacing[down], spacing[across]), (letters[across][0], letters[down][0]), caption)


def _letters(direction: NDArray[np.float64]) -> str:
    """Where an array axis comes from and leads to, such as 'RL' (PS3.3 C.7.6.1.1.1, H and F for head and feet)."""
    axis = int(np.argmax(np.abs(direction)))
    letters = ("RL", "AP", "FH")[axis]
    return letters if direction[axis] > 0 else letters[::-1]


def _draw_panel(panel: _Panel, colors: dict[int, RGB]) -> Image.Image:
    height_mm, width_mm = (size * step for size, step in zip(panel.grey.shape, panel.spacing_mm, strict=True))
    scale = PANEL / max(height_mm, width_mm)
    size = (max(1, round(width_mm * scale)), max(1, round(height_mm * scale)))
    grey = Image.fromarray((panel.grey * 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.repeat(np.asarray(grey, np.float32)[:, :, None], 3, axis=2)
    labels = np.asarray(Image.fromarray(panel.labels.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    for label in np.unique(labels[labels > 0]):
        where = labels == label
        color = np.array(colors[int(label)], np.float32)
        pixels[where] = pixels[where] * (1 - FILL_OPACITY) + color * FILL_OPACITY
        pixels[where & ~ndimage.binary_erosion(where)] = color
    canvas = Image.new("RGB", (PANEL, PANEL), (0, 0, 0))
    corner = ((PANEL - size[0]) // 2, (PANEL - size[1]) // 2)
    canvas.paste(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), corner)
    draw = ImageDraw.Draw(canvas)
    draw.text(
        (6, PANEL // 2), panel.edges[0], fill=TEXT, font=_font(17), anchor="lm", stroke_width=2, stroke_fill=(0, 0, 0)
    )
    draw.text(
        (PANEL // 2, 4), panel.edges[1], fill=TEXT, font=_font(17), anchor="mt", stroke_width=2, stroke_fill=(0, 0, 0)
    )
    draw.text(
        (8, PANEL - 6), panel.caption, fill=FAINT, font=_font(14), anchor="ls", stroke_width=2, stroke_fill=(0, 0, 0)
    )
    return canvas


def _window(volume: Volume) -> tuple[float, float]:
    """Lowest and highest value shown: wide enough for lung and soft tissue on CT, percentiles elsewhere."""
    if volume.unit == "HU":
        return -1150.0, 350.0
    low, high = np.percentile(volume.array[:: max(1, volume.array.shape[0] // 32)], (1, 99.5))
    return float(low), float(max(high, low + 1e-3))


def _table_lines(subject: Subject, measurements: Sequence[SegmentMeasurements]) -> list[tuple[int, str]]:
    lines = []
    for measured in measurements:
        parts = [f"{row['measurement']} {row['value']:.1f} {row['unit']}".strip() for row in measured.rows()]
        lines.append((measured.number, f"{measured.name}:  " + ("   ".join(parts) if measured.voxels else "not found")))
    return lines[:40]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
