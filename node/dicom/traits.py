"""What may tell volumes of one series apart: echo, b-value, phase, kernel and the rest, and how each is named.

Diffusion weighting is read from the standard's attributes (PS3.3 C.8.13.5.9) and, for single-frame objects of Siemens,
Philips and GE, from where their conformance statements put it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from pydicom.datadict import dictionary_description, keyword_for_tag
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from node.dicom.candidates import Slice, numbers, value_of

Value = float | str | tuple[float, ...] | tuple[str, ...]


@dataclass(frozen=True)
class Trait:
    """One way to tell slices at one place apart."""

    value: Callable[[Slice], Value | None]
    name: Callable[[Value, int], str]  # from the value and its 1-based rank among the series' values
    by_place: bool = False  # the values are compared among slices of one place only: times differ from slice to slice
    in_turn: bool = False  # ... and the volumes must have been taken one after the other
    says_when: bool = False  # it tells frames of one cine apart: a phase, a place in a series in time
    says_what: bool = True  # it is what the image is, or when it was planned to be; not merely when it was made


def traits_of(slices: list[Slice]) -> list[Trait]:
    """The traits in the order in which they are tried: from what an image is to when it was made."""
    return [*WHAT, *_dimensions(slices), *_WHEN]


def _text(keyword: str) -> Callable[[Slice], Value | None]:
    def value(slice_: Slice) -> Value | None:
        found = value_of(slice_.header, keyword)
        if found is None or found == "":
            return None
        parts = found if isinstance(found, MultiValue | list) else [found]
        return tuple(str(part).strip() for part in parts)

    return value


def number(*keywords: str) -> Callable[[Slice], Value | None]:
    """The first of the attributes that is one number."""

    def value(slice_: Slice) -> Value | None:
        for keyword in keywords:
            if found := numbers(slice_.header, keyword, 1):
                return round(found[0], 4)
        return None

    return value


def acquired(slice_: Slice) -> Value | None:
    """Date and time of acquisition, as a text that sorts."""
    return _moment(slice_, "AcquisitionDate", "AcquisitionTime")


def _moment(slice_: Slice, date: str, time: str) -> Value | None:
    found = str(value_of(slice_.header, time) or "").strip()
    return f"{value_of(slice_.header, date) or ''} {found}" if found else None


def _in_turn(value: Callable[[Slice], Value | None]) -> Trait:
    return Trait(value, _numbered("time"), by_place=True, in_turn=True, says_what=False)


def _shown(value: Value) -> str:
    text = " ".join(str(part) for part in value) if isinstance(value, tuple) else str(value)
    return "".join(character for character in text if character.isprintable())[:32]


def _numbered(what: str) -> Callable[[Value, int], str]:
    return lambda value, rank: f"{what} {rank}"


def _valued(form: str) -> Callable[[Value, int], str]:
    return lambda value, rank: form.format(value)


def _instance(slice_: Slice) -> Value | None:
    """Multi-frame objects of one series; single-frame ones are a slice each, which tells nothing apart."""
    if slice_.frame is None:
        return None
    number = (numbers(slice_.instance, "InstanceNumber", 1) or [0.0])[0]
    return f"{int(number):012d} {slice_.instance.SOPInstanceUID}"


# -- Diffusion -----------------------------------------------------------------------------------------------------

_B_VALUES = ((0x0019, 0x0C, "SIEMENS MR HEADER"), (0x2001, 0x03, "Philips Imaging DD 001"))
_DIRECTIONS = ((0x0019, (0x0E,), "SIEMENS MR HEADER"), (0x2005, (0xB0, 0xB1, 0xB2), "Philips MR Imaging DD 001"),
               (0x0019, (0xBB, 0xBC, 0xBD), "GEMS_ACQU_01"))  # fmt: skip


def b_value(slice_: Slice) -> Value | None:
    """s/mm2; None where the header says nothing of diffusion."""
    header = slice_.header
    if found := numbers(header, "DiffusionBValue", 1):
        return round(found[0], 1)
    for group, element, creator in _B_VALUES:
        if found := _private(header, group, element, creator):
            return round(found[0], 1)
    # GE adds 1e9 to the b-values of some protocols.
    if found := _private(header, 0x0043, 0x39, "GEMS_PARM_01"):
        return round(found[0] % 1e5, 1)
    return None


def _gradient(slice_: Slice) -> Value | None:
    """(0, b-value, direction) where there is a direction, (1, b-value) where there is none (b = 0, a trace)."""
    header = slice_.header
    found = numbers(header, "DiffusionGradientOrientation", 3)
    for group, elements, creator in _DIRECTIONS:
        if not found:
            found = [number for element in elements for number in _private(header, group, element, creator)]
    weight = b_value(slice_)
    b = float(weight) if isinstance(weight, float) else 0.0
    if len(found) == 3 and any(found):
        return (0.0, b, *(round(number, 4) for number in found))
    return None if weight is None else (1.0, b)


def _name_gradient(value: Value, rank: int) -> str:
    _, b, *direction = value if isinstance(value, tuple) else (0.0, value)
    return f"b {float(b):g} direction {rank}" if direction else f"b {float(b):g}"


def _private(header: Dataset, group: int, element: int, creator: str) -> list[float]:
    tags = header.keys()
    blocks = (block for block in range(0x10, 0x20) if group << 16 | block in tags)  # in practice the first few
    try:
        block = next(block for block in blocks if header[group << 16 | block].value == creator)
        value = header[group << 16 | block << 8 | element].value
        if isinstance(value, bytes):  # sent as UN
            value = np.frombuffer(value, "<f8") if len(value) in (8, 24) else value.decode("ascii").split("\\")
        found = [float(part) for part in (value if isinstance(value, MultiValue | list | np.ndarray) else [value])]
    except Exception:  # absent, or of any other form
        return []
    return found if np.isfinite(found).all() else []


# -- The list ------------------------------------------------------------------------------------------------------

WHAT = (
    Trait(_text("StackID"), lambda value, rank: f"stack {_shown(value)}"),
    Trait(_text("ImageType"), lambda value, rank: _shown(value)),
    Trait(_text("ComplexImageComponent"), lambda value, rank: _shown(value).lower()),
    Trait(number("EchoTime", "EchoNumbers"), _numbered("echo")),
    Trait(number("EchoNumbers"), _numbered("echo")),
    Trait(number("InversionTime"), _valued("inversion {:g} ms")),
    Trait(number("FlipAngle"), _valued("flip angle {:g}")),
    Trait(b_value, _valued("b {:g}")),
    Trait(_text("DiffusionDirectionality"), lambda value, rank: _shown(value).lower()),
    Trait(_gradient, _name_gradient),
    Trait(_text("ASLContext"), lambda value, rank: _shown(value).lower()),
    Trait(number("NominalPercentageOfCardiacPhase"), _valued("phase {:g} %"), says_when=True),
    Trait(number("NominalPercentageOfRespiratoryPhase"), _valued("respiration {:g} %")),
    Trait(number("TemporalPositionIdentifier", "TemporalPositionIndex"), _numbered("time"), says_when=True),
    Trait(number("FrameReferenceTime"), _numbered("time"), says_when=True),
    Trait(number("TriggerTime"), _numbered("phase"), by_place=True, says_when=True),
    Trait(_text("ConvolutionKernel"), lambda value, rank: f"kernel {_shown(value)}"),
    Trait(number("KVP"), _valued("{:g} kV")),
    Trait(number("SliceThickness"), _valued("slices of {:g} mm")),
    Trait(lambda slice_: slice_.spacing_mm, lambda value, rank: f"pixels of {_shown(value)} mm"),
)
_WHEN = (
    Trait(number("AcquisitionNumber"), lambda value, rank: f"acquisition {_shown(value).removesuffix('.0')}"),
    Trait(_instance, _numbered("object")),
    _in_turn(acquired),
    _in_turn(lambda slice_: _moment(slice_, "ContentDate", "ContentTime")),
)


# Dimensions that say where a frame is, not what.
_PLACES = ("InStackPositionNumber", "ImagePositionPatient", "SliceLocation", "ImageOrientationPatient")


def _dimensions(slices: list[Slice]) -> list[Trait]:
    """What the first multi-frame object itself calls its dimensions (PS3.3 C.7.6.17)."""
    instance = next((slice_.instance for slice_ in slices if slice_.frame is not None), Dataset())
    dimensions = instance.get("DimensionIndexSequence") or []
    traits = []
    for index, dimension in enumerate(dimensions):
        keyword = keyword_for_tag(dimension.get("DimensionIndexPointer") or 0)
        if keyword not in _PLACES:
            what = dictionary_description(keyword).lower() if keyword else f"dimension {index + 1}"
            traits.append(Trait(_dimension(index, len(dimensions)), _numbered(what)))
    return traits


def _dimension(index: int, count: int) -> Callable[[Slice], Value | None]:
    def value(slice_: Slice) -> Value | None:
        found = numbers(slice_.header, "DimensionIndexValues", count)
        return found[index] if found else None

    return value
