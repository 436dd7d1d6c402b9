"""What stored values mean: rescaling, lookup tables, padding and units, and the SUV of PET.

A modality LUT goes before a rescale (PS3.3 C.11.1), and a real world value mapping (C.7.6.16.2.11) says what the
values are where neither is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut

from node.dicom.suv import suv_factor
from node.errors import InputRefused

Unit = Literal["HU", "SUVbw", "Bq/ml", ""]

AIR_HU = -1024.0

# Codes of measurement units in real world value mappings (PS3.16 CID 84, CID 301) that a volume has a unit for.
_UNITS: dict[str, Unit] = {
    "[hnsf'U]": "HU",
    "Bq/ml": "Bq/ml",
    "g/ml{SUVbw}": "SUVbw",
    "{SUVbw}g/ml": "SUVbw",
}


@dataclass(frozen=True)
class Rescale:
    """Real-world values of one slice: linear, or by a table."""

    slope: float = 1.0
    intercept: float = 0.0
    table: Dataset | None = None  # with a ModalityLUTSequence, which goes before slope and intercept
    unsaid: frozenset[str] = frozenset()  # which of RescaleSlope and RescaleIntercept nothing was said of

    def apply(self, stored: NDArray[Any], out: NDArray[np.float32]) -> None:
        """Write the real-world values of `stored` to `out`, of the same shape."""
        if self.table is not None:
            stored = apply_modality_lut(stored, self.table)
        if self.slope == 1:
            out[...] = stored
        else:
            np.multiply(stored, np.float32(self.slope), out=out, dtype=np.float32, casting="unsafe")
        if self.intercept != 0:
            out += np.float32(self.intercept)

    def scaled(self, factor: float) -> Rescale:
        """The same in a unit `factor` times as small."""
        return self if factor == 1 else replace(self, slope=self.slope * factor, intercept=self.intercept * factor)

    def bounds(self, lowest: int, highest: int) -> tuple[float, float]:
        """The smallest and the largest real-world value of stored values from `lowest` to `highest`."""
        stored = np.arange(lowest, highest + 1) if self.table is not None else np.array([lowest, highest])
        values = np.empty(stored.shape, np.float32)
        self.apply(stored, values)
        return float(values.min()), float(values.max())


def read_rescale(header: Dataset, sop_instance_uid: str) -> Rescale:
    """The real-world values of one image or frame; `InputRefused` where a number is none."""
    if header.get("ModalityLUTSequence"):
        return Rescale(table=header)
    try:
        if "RescaleSlope" in header or "RescaleIntercept" in header:
            slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
            given = {"RescaleSlope": slope, "RescaleIntercept": intercept}
            unsaid = frozenset(keyword for keyword, value in given.items() if value is None or value == "")
            rescale = Rescale(float(slope or 1.0), float(intercept or 0.0), unsaid=unsaid)
        elif (mapping := _linear_mapping(header)) is not None:
            rescale = Rescale(float(mapping.RealWorldValueSlope), float(mapping.get("RealWorldValueIntercept") or 0.0))
        else:
            return Rescale(unsaid=frozenset(("RescaleSlope", "RescaleIntercept")))
    except Exception:  # as many kinds as pydicom has converters
        rescale = Rescale(np.nan)
    if not np.isfinite((rescale.slope, rescale.intercept)).all():
        raise InputRefused(f"RescaleSlope or RescaleIntercept of instance {sop_instance_uid} is no number")
    return rescale


def find_unscaled(rescales: Sequence[Rescale], modality: str) -> tuple[int, frozenset[str]] | None:
    """The first slice that says less than others of its volume what its stored values mean, and what it lacks.

    A series of which no slice has a rescale is taken as stored. Beside slices that have one, a slice without has lost
    its own, and its values would be of another scale. Nothing is lost where the others say that values are as stored
    (slope 1, intercept 0), but in CT, where every image must have both (PS3.3 C.8.2.1).
    """
    least = frozenset.intersection(*(rescale.unsaid for rescale in rescales))
    if modality != "CT" and all(rescale == replace(Rescale(), unsaid=rescale.unsaid) for rescale in rescales):
        return None
    return next(((index, lacks) for index, rescale in enumerate(rescales) if (lacks := rescale.unsaid - least)), None)


def read_unit(header: Dataset, headers: Sequence[Dataset]) -> tuple[Unit, float]:
    """The unit of a volume (PS3.3 C.8.2.1, C.8.9.1) and what its rescaled values are to be multiplied by for it.

    `header` stands for the volume, `headers` are all of its instances. PET comes in SUV by body weight where its
    headers say enough for that, else in Bq/ml. GML without SUVType is SUV by body weight.
    """
    if not header.get("RescaleType") and "RescaleSlope" not in header and (mapping := _linear_mapping(header)):
        codes = mapping.get("MeasurementUnitsCodeSequence") or [Dataset()]
        return _UNITS.get(str(codes[0].get("CodeValue", "")), ""), 1.0
    match header.get("Modality"), header.get("RescaleType") or "HU", header.get("Units"), header.get("SUVType") or "BW":
        case "CT", "HU", _, _:
            return "HU", 1.0
        case "PT", _, "GML", "BW":
            return "SUVbw", 1.0
        case "PT", _, "BQML" | "CNTS" as units, _:
            factor = suv_factor(headers)
            if factor is not None:
                return "SUVbw", factor
            return ("Bq/ml" if units == "BQML" else ""), 1.0
    return "", 1.0


def _linear_mapping(header: Dataset) -> Dataset | None:
    return next(
        (item for item in header.get("RealWorldValueMappingSequence") or () if "RealWorldValueSlope" in item), None
    )


def stored_range(header: Dataset) -> tuple[int, int]:
    """The lowest and the highest value that BitsStored and PixelRepresentation allow."""
    bits = int(header.BitsStored)
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if header.get("PixelRepresentation") == 1 else (0, (1 << bits) - 1)


def clear_unused_bits(stored: NDArray[Any], header: Dataset) -> NDArray[Any]:
    """Make the bits above BitsStored part of no value (PS3.5 8.1.1), in place; floats are left alone."""
    unused = stored.dtype.itemsize * 8 - int(header.get("BitsStored") or 0)
    if stored.dtype.kind in "iu" and 0 < unused < stored.dtype.itemsize * 8:
        np.left_shift(stored, unused, out=stored)
        np.right_shift(stored, unused, out=stored)
    return stored


@dataclass(frozen=True)
class Padding:
    """Stored values that stand for no measurement (PS3.3 C.7.5.1.1.2)."""

    low: int
    high: int  # the same as `low`, or PixelPaddingRangeLimit

    def within(self, lowest: int, highest: int) -> bool:
        """Whether all of them lie from `lowest` to `highest`."""
        return lowest <= self.low and self.high <= highest

    def find(self, stored: NDArray[Any]) -> NDArray[np.bool_]:
        """Where they are."""
        if self.low == self.high:
            return stored == self.low
        return (stored >= self.low) & (stored <= self.high)


def read_padding(header: Dataset) -> Padding | None:
    """The padding of an image; None without, or where it's no value that the image can have."""
    try:
        value = header.get("PixelPaddingValue")
        limit = header.get("PixelPaddingRangeLimit")
        if value is None or value == "":
            return None
        low, high = sorted(_as_stored(int(number), header) for number in (value, value if limit is None else limit))
    except Exception:  # as many kinds as pydicom has converters
        return None
    return Padding(low, high)


def _as_stored(value: int, header: Dataset) -> int:
    """A padding value in the pixels' own representation: scanners write -2000 as 63536, too."""
    bits = int(header.BitsAllocated)
    value &= (1 << bits) - 1
    return value - (1 << bits) if header.get("PixelRepresentation") == 1 and value >> (bits - 1) else value


def padding_value(unit: Unit, smallest: float) -> float:
    """What padded voxels become, given the smallest measured value.

    In CT they lie outside of the reconstructed circle, where air is the best guess: -1024 HU, what a scanner of 12 bits
    shows of it. The smallest value of the volume would be an artefact's in one series and fat in the next. Elsewhere
    they become zero (no signal, no activity), or the smallest value where there are negative ones: the zero background
    of most MR stays zero, and a normalisation of what is not zero finds what it expects.
    """
    return AIR_HU if unit == "HU" else min(0.0, smallest)
