"""What others read of our objects, and whether every code is one of the standard's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.sr._concepts_dict import concepts

from tests.report.cases import run

# UCUM writes litres as L or l; CID 7462 has cubic units only, and people read millilitres.
NOT_IN_PYDICOM = {("UCUM", "mL", "milliliter"), ("RFC5646", "en", "English")}
# Units that TID 1602 fixes for the image library, as highdicom writes them.
NOT_IN_PYDICOM |= {("UCUM", "{pixels}", "Pixels"), ("UCUM", "{-1:1}", "{-1:1}"), ("UCUM", "mm", "mm")}
NOT_IN_PYDICOM |= {("SCT", "276214006", "Finding category")}  # TID 1501
# No dictionary has the quartiles of values as derivations: radnode has its own codes for them (PS3.16 8.2).
NOT_IN_PYDICOM |= {("99RADNODE", f"percentile-{part}", f"{part}th percentile") for part in (25, 75)}


def as_dcmqi_reads(file: Path, folder: Path) -> dict[str, Any]:
    out = folder / "sr.json"
    run("tid1500reader", "--inputDICOM", file, "--outputMetadata", out)
    return json.loads(out.read_text())


def items(dataset: Dataset) -> Iterator[Dataset]:
    """Every content item of an SR."""
    for item in dataset.get("ContentSequence", ()):
        yield item
        yield from items(item)


def codes_in(dataset: Dataset) -> Iterator[tuple[str, str, str]]:
    """Scheme, value and meaning of every coded concept that is not copied from the source."""
    for element in dataset.iterall():
        if element.VR == "SQ" and element.keyword.endswith("CodeSequence"):
            if element.keyword in ("ProcedureCodeSequence", "DeidentificationMethodCodeSequence"):
                continue
            for code in element.value:
                yield code.CodingSchemeDesignator, code.CodeValue, code.CodeMeaning


def unknown_codes(triplets: Iterable[tuple[str, str, str]]) -> set[tuple[str, ...]]:
    """Those that pydicom's dictionaries of PS3.16 do not have, or have with another meaning."""
    unknown: set[tuple[str, ...]] = set()
    for triplet in set(triplets) - NOT_IN_PYDICOM:
        scheme = concepts.get(triplet[0], {})
        meanings = {known[triplet[1]][0] for known in scheme.values() if triplet[1] in known}
        # SNOMED's fully specified names end in a tag: 'Source (attribute)'.
        same = {re.sub(r" \([a-z ]+\)$", "", meaning).casefold() for meaning in meanings}
        if triplet[2].casefold() not in same:
            unknown.add((*triplet, *meanings))
    return unknown


def numbers_of(report: Dataset, group: int = 0) -> dict[str, float]:
    """The numbers of a measurement group: 'Volume', or 'Attenuation Coefficient, Mean' of what was derived."""
    groups = [item for item in items(report) if item.ConceptNameCodeSequence[0].CodeValue == "125007"]
    found: dict[str, float] = {}
    for item in groups[group].ContentSequence:
        if item.ValueType != "NUM":
            continue
        derived = [
            part.ConceptCodeSequence[0].CodeMeaning
            for part in item.get("ContentSequence", ())
            if part.ConceptNameCodeSequence[0].CodeValue == "121401"
        ]
        name = ", ".join([item.ConceptNameCodeSequence[0].CodeMeaning, *derived])
        assert name not in found
        found[name] = float(item.MeasuredValueSequence[0].NumericValue)
    return found
