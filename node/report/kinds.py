"""The kinds of result objects, by the names that the configuration, the archive and file names have for them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
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
    RTSTRUCT = "rtstruct"  # RT structure set


class SegForm(StrEnum):
    """The form of a segmentation (PS3.3 C.8.20.2, Segmentation Type)."""

    BINARY = "binary"
    LABELMAP = "labelmap"
    FRACTIONAL = "fractional"  # probabilities, where the model gives them


# A result's place in the site's block of series numbers; two forms of one thing never go to the same destination.
PLACES = {kind: place for place, kind in enumerate(Kind)}

# The name of a report that there is no result; that of its page begins with it.
NO_RESULT = "no-result"

# The SOP class of a label map segmentation (PS3.4 B.5), which peers may accept or not.
LABELMAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"
_STORAGE = {  # PS3.4 B.5
    Kind.SEG: "1.2.840.10008.5.1.4.1.1.66.4",
    Kind.SR: "1.2.840.10008.5.1.4.1.1.88.34",
    Kind.SUMMARY: "1.2.840.10008.5.1.4.1.1.7",
    Kind.OVERLAY: "1.2.840.10008.5.1.4.1.1.7",
    Kind.MAP: "1.2.840.10008.5.1.4.1.1.30",
    Kind.KEYS: "1.2.840.10008.5.1.4.1.1.88.59",
    Kind.GSPS: "1.2.840.10008.5.1.4.1.1.11.1",
    Kind.RTSTRUCT: "1.2.840.10008.5.1.4.1.1.481.3",
}


def storage_classes(kinds: Collection[Kind], seg: str) -> list[str]:
    """The SOP classes of results of these kinds, for a destination that takes segmentations in the form `seg`."""
    classes = {_STORAGE[kind] for kind in kinds}
    if Kind.SEG in kinds and seg == SegForm.LABELMAP:
        classes = (classes - {_STORAGE[Kind.SEG]}) | {LABELMAP_STORAGE}
    return sorted(classes)


@dataclass(frozen=True)
class Wanted:
    """What is to be made of a run."""

    kinds: Collection[Kind] = (Kind.SEG, Kind.SR)
    forms: tuple[SegForm, ...] = (SegForm.BINARY,)  # of the segmentation; a report is made for each


@dataclass(frozen=True)
class Takes:
    """What one destination gets."""

    kinds: Collection[Kind]
    form: SegForm

    def has(self, kind: Kind | None, forms: Collection[SegForm]) -> bool:
        """Whether it gets a result of this kind for takers of these forms (none: of any).

        A result of no kind is an object that the model made itself: everybody gets it.
        """
        return kind is None or (kind in self.kinds and (not forms or self.form in forms))


def all_of(destinations: Iterable[Takes], kinds: Collection[Kind]) -> Wanted:
    """What is to be made so that every destination gets what it takes of `kinds`; without any, what is usual."""
    takes = list(destinations)
    taken = [kind for kind in kinds if not takes or any(kind in each.kinds for each in takes)]
    # A form is made for those only who get the segmentation or the report that refers to it.
    of_segments = {Kind.SEG, Kind.SR} & set(taken)
    forms = dict.fromkeys(each.form for each in takes if of_segments & set(each.kinds))
    return Wanted(taken, tuple(forms) or (SegForm.BINARY,))
