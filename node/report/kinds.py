"""The kinds of result objects, by the names that the configuration, the archive and file names have for them."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """What a result object is."""

    SEG = "seg"  # Segmentation, in the form that the destination takes
    SR = "sr"  # TID 1500 report
    SUMMARY = "summary"  # one secondary-capture page
    OVERLAY = "overlay"  # secondary-capture images with the findings drawn in
    MAP = "map"  # parametric map of probabilities or of what a score came from
    KEYS = "keys"  # key object selection of the images that matter
    GSPS = "gsps"  # presentation state with the outlines


class SegForm(StrEnum):
    """The form of a segmentation (PS3.3 C.8.20.2, Segmentation Type)."""

    BINARY = "binary"
    LABELMAP = "labelmap"
    FRACTIONAL = "fractional"  # probabilities, where the model gives them


# A result's place in the site's block of series numbers; two forms of one thing never go to the same destination.
PLACES = {kind: place for place, kind in enumerate(Kind)}
