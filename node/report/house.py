"""The site's own rules for results: numbers and descriptions of their series, the banner and the language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from node.report.kinds import PLACES, Kind

Language = Literal["en", "de", "es", "fr", "it", "nl"]
BANNER = "AI, NOT VERIFIED - research use only"
DESCRIPTION = "AI unverified: {model} {version}"


@dataclass(frozen=True)
class House:
    """How results look at this site."""

    series_number: int = 901  # of the first kind; every kind has its place after it
    series_numbers: Mapping[str, int] = field(default_factory=dict)  # the same for one model
    series_description: str = DESCRIPTION  # may name {model}, {version}, {title} and {kind}
    banner: str = BANNER  # on every picture
    language: Language = "en"  # of what people read on pictures

    def number(self, model: str, kind: Kind) -> int:
        """The number of the series of one kind of a model's results."""
        return self.series_numbers.get(model, self.series_number) + PLACES[kind]

    def describe(self, *, model: str, version: str, title: str, kind: str) -> str:
        """What a viewer lists a series under (LO, 64 characters)."""
        names = {"model": model, "version": version, "title": title, "kind": kind}
        return " ".join(self.series_description.format_map(names).replace("\\", "/").split())[:64]
