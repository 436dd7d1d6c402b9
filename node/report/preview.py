"""The page of a run's result as a small PNG beside its DICOM objects (`node.report.layout` draws it)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from node.report.colors import RGB, finding_colors, to_rgb
from node.report.drawing import FILL_OPACITY, TEXT
from node.report.findings import Findings
from node.report.layout import BACKGROUND, DARK, NOTABLE, WARNING, render_page
from node.report.table import FAINT

_OWN: tuple[RGB, ...] = (BACKGROUND, TEXT, FAINT, WARNING, DARK, NOTABLE)


def render_preview(findings: Findings) -> Image.Image:
    """The page as a palette image, which makes a PNG a third of the size. It carries no patient's name or ID, unless
    the pixels of the images do.
    """
    page = render_page(findings)
    colors = [to_rgb(color) for color in finding_colors(findings.subject.manifest).values()]
    if any(panel.pixels.ndim == 3 for panel in findings.panels()):  # a photograph has more colours than a palette
        own = [*_OWN, *colors][:64]
        found = page.quantize(256 - len(own), Image.Quantize.MEDIANCUT).getpalette() or []
        palette = Image.new("P", (1, 1))
        palette.putpalette([part for entry in own for part in entry] + found[: 3 * (256 - len(own))])
        return page.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    return page.quantize(palette=_palette(colors), dither=Image.Dither.NONE)


def _palette(colors: Sequence[RGB]) -> Image.Image:
    """The page's own colours: 40 greys, and each segment's colour and shades of it over grey, as far as 256 reach."""
    entries: list[tuple[int, ...]] = [*_OWN, *((v, v, v) for v in np.linspace(0, 255, 40).astype(int).tolist())]
    room = (256 - len(entries)) // len(colors)
    shades = np.linspace(0, 255, min(24, room - 1)) if room > 1 else ()
    for color in colors[: 256 - len(entries)]:
        entries.append(color)
        entries += [tuple(int(v * (1 - FILL_OPACITY) + part * FILL_OPACITY) for part in color) for v in shades]
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for entry in entries for part in entry])
    return palette
