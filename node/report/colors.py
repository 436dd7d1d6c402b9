"""The colour of each segment: the same in the SEG and on the preview."""

from __future__ import annotations

import numpy as np

from node.infer.manifest import Manifest

CIELab = tuple[float, float, float]  # L* 0 to 100, a* and b* -128 to 127; white point D50 (PS3.3 C.10.7.1.1)
RGB = tuple[int, int, int]  # sRGB, 0 to 255

# Colours that colour-blind readers tell apart (Okabe and Ito 2008) for segments whose manifest names none.
_PALETTE: tuple[CIELab, ...] = (
    (69.3, -16.8, -35.5),  # sky blue
    (71.2, 20.1, 74.7),  # orange
    (57.6, -44.7, 12.2),  # green
    (61.2, 37.7, -10.1),  # purple
    (89.5, -8.5, 75.0),  # yellow
    (54.9, 45.3, 64.2),  # vermilion
)


def segment_colors(manifest: Manifest) -> dict[int, CIELab]:
    """Label value to colour: the manifest's, else one of the palette by the segment's place."""
    return {
        label: segment.color_cielab or _PALETTE[number % len(_PALETTE)]
        for number, (label, segment) in enumerate(sorted(manifest.segments.items()))
    }


def finding_colors(manifest: Manifest) -> dict[int, CIELab]:
    """Label or class to colour, whichever the manifest has."""
    classes = {label: _PALETTE[number % len(_PALETTE)] for number, label in enumerate(sorted(manifest.classes))}
    return segment_colors(manifest) or classes


def to_rgb(color: CIELab) -> RGB:
    """CIELab (D50) to sRGB: Bradford-adapted to D65, clipped to the gamut."""
    lightness, a, b = color
    fy = (lightness + 16) / 116
    cube = [(f**3 if f**3 > 216 / 24389 else (116 * f - 16) * 27 / 24389) for f in (fy + a / 500, fy, fy - b / 200)]
    xyz = np.array(cube) * (0.96422, 1.0, 0.82521)
    to_srgb = np.array(
        [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    )
    linear = np.clip(to_srgb @ xyz, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = (int(value) for value in np.rint(encoded * 255))
    return red, green, blue
