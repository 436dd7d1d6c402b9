"""Frames of a multi-frame object, each described as a single-frame header would describe it.

Enhanced and legacy converted objects keep what belongs to a frame in functional groups: sequences ("macros") of one
item each, shared by all frames or per frame (PS3.3 C.7.6.16, C.8.13, C.8.15, C.8.22). Most of their attributes have
the names that single-frame objects use, so every macro is flattened alike; the few other names are listed below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag, Tag

Elements = dict[BaseTag, DataElement]


def frame_header(header: Dataset, frame: int) -> Dataset:
    """The attributes of one frame (1-based) of a multi-frame object, as `FrameHeaders` gives them."""
    return FrameHeaders(header)[frame]


def frame_count(header: Dataset) -> int:
    """How many frames an instance says that it has; 1 where it says nothing, or nothing that can be read."""
    try:
        return max(1, int(header.get("NumberOfFrames") or 1))
    except (TypeError, ValueError):
        return 1


def flatten_first_frame(header: Dataset) -> Dataset:
    """A multi-frame object's header as it is, with what its functional groups say of the first frame beside it."""
    flat = frame_header(header, 1)
    for tag in _STRUCTURE & set(header.keys()):
        flat[tag] = header[tag]
    return flat


class FrameHeaders(Mapping[int, Dataset]):
    """The frames of a multi-frame object by their 1-based numbers, each as a header without functional groups.

    What a frame says of itself goes before what all frames share, and that before what the object says. The frames'
    data sets share their elements with `header` and with each other: they are to be read, not changed. Values that
    pydicom cannot convert are left out. A frame without an item of its own (a damaged object; an ultrasound clip, which
    has no functional groups at all) has what all frames share.
    """

    def __init__(self, header: Dataset):
        self._file_meta = getattr(header, "file_meta", None)
        items = _items(header, "PerFrameFunctionalGroupsSequence")
        self._count = max(frame_count(header), len(items))
        self._items = items
        self._common: Elements = {element.tag: element for element in header if element.tag not in _STRUCTURE}
        for tag, element in _renamed(self._common).items():
            self._common.setdefault(tag, element)
        for item in _items(header, "SharedFunctionalGroupsSequence")[:1]:
            self._common = _merge(self._common, _flatten(item))

    def __getitem__(self, frame: int) -> Dataset:
        if not 1 <= frame <= self._count:
            raise KeyError(frame)
        own = _flatten(self._items[frame - 1]) if frame <= len(self._items) else {}
        dataset = Dataset(cast("dict[BaseTag, DataElement | RawDataElement]", _merge(self._common, own)))
        if self._file_meta is not None:
            dataset.file_meta = self._file_meta
        return dataset

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, self._count + 1))

    def __len__(self) -> int:
        return self._count


def _tags(*keywords: str) -> frozenset[BaseTag]:
    return frozenset(Tag(keyword) for keyword in keywords)


# What only the multi-frame object as a whole has.
_STRUCTURE = _tags(
    "NumberOfFrames",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "DimensionIndexSequence",
    "DimensionOrganizationSequence",
)

# A frame is one of its object's, whatever a macro says: these are the object's alone.
_OF_THE_OBJECT = _tags(
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality",
    "PatientID", "PatientName", "PatientBirthDate", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation",
    "PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
)  # fmt: skip

# Macros that single-frame objects have as the same sequences.
_KEPT = _tags(
    "RealWorldValueMappingSequence",
    "ReferencedImageSequence",
    "DerivationImageSequence",
    "ConversionSourceAttributesSequence",
)

# Legacy converted objects keep here what has no place in a macro (PS3.3 C.7.6.16.2.25.1): it replaces nothing.
_UNASSIGNED = _tags("UnassignedSharedConvertedAttributesSequence", "UnassignedPerFrameConvertedAttributesSequence")

# Within a macro, sequences of one item whose attributes single-frame objects have in no sequence.
_NESTED = _tags("DiffusionGradientDirectionSequence")


def _flatten(groups: Dataset) -> Elements:
    """The elements in one item of functional groups, under the names of single-frame objects too."""
    found: Elements = {}
    unassigned: Elements = {}
    for macro in _convertible(groups):
        items = macro.value if macro.VR == "SQ" else None
        if items is None or macro.tag in _KEPT or len(items) > 1:
            found[macro.tag] = macro
        elif len(items) == 1:
            (unassigned if macro.tag in _UNASSIGNED else found).update(_elements(items[0]))
    for tag, element in unassigned.items():
        found.setdefault(tag, element)
    return found | _renamed(found)


def _elements(item: Dataset) -> Elements:
    elements: Elements = {}
    for element in _convertible(item):
        if element.tag in _NESTED and len(element.value) == 1:
            elements.update(_elements(element.value[0]))
        if element.tag not in _OF_THE_OBJECT:
            elements[element.tag] = element
    return elements


def _convertible(dataset: Dataset) -> Iterator[DataElement]:
    """The standard elements whose values can be read; `read_header` has seen to those outside of sequences only."""
    for tag in list(dataset.keys()):
        if tag.is_private:
            continue
        try:
            yield dataset[tag]
        except Exception:  # of as many kinds as there are converters
            continue


def _merge(common: Elements, own: Elements) -> Elements:
    """`own` before `common`; what is empty replaces nothing."""
    return common | {tag: element for tag, element in own.items() if not element.is_empty or tag not in common}


def _items(header: Dataset, keyword: str) -> list[Dataset]:
    value = header.get(keyword)
    # A damaged object can have anything under a sequence's tag.
    return [item for item in value if isinstance(item, Dataset)] if isinstance(value, Sequence) else []


# -- Names ---------------------------------------------------------------------------------------------------------

Convert = Callable[[str], str]


def _number(value: str) -> str:
    return f"{float(value):.10g}"  # 16 characters are what a decimal string may have (PS3.5 6.2)


def _whole(value: str) -> str:
    return str(round(float(value)))


def _date(value: str) -> str:
    return value[:8]


def _time(value: str) -> str:
    """The time of a date and time YYYYMMDDHHMMSS.FFFFFF&ZZXX, without the offset from UTC."""
    return value[8:].partition("+")[0].partition("-")[0]


# Attribute of a macro or of an enhanced object, attribute of a single-frame object, and how the value is written.
_RENAMED: tuple[tuple[str, str, Convert], ...] = (
    ("EffectiveEchoTime", "EchoTime", _number),
    ("InversionTimes", "InversionTime", _number),
    ("TemporalPositionIndex", "TemporalPositionIdentifier", _whole),
    ("NominalCardiacTriggerDelayTime", "TriggerTime", _number),
    ("FrameAcquisitionNumber", "AcquisitionNumber", _whole),
    ("AcquisitionDateTime", "AcquisitionDate", _date),
    ("AcquisitionDateTime", "AcquisitionTime", _time),
    ("FrameAcquisitionDateTime", "AcquisitionDateTime", str),
    ("FrameAcquisitionDateTime", "AcquisitionDate", _date),
    ("FrameAcquisitionDateTime", "AcquisitionTime", _time),
    ("FrameLaterality", "ImageLaterality", str),
    ("FrameComments", "ImageComments", str),
    ("ExposureTimeInms", "ExposureTime", _whole),
    ("XRayTubeCurrentInmA", "XRayTubeCurrent", _whole),
    ("ExposureInmAs", "Exposure", _whole),
)
_RENAMED_TAGS = tuple(
    (Tag(source), Tag(target), dictionary_VR(Tag(target)), convert) for source, target, convert in _RENAMED
)
_FRAME_TYPE, _IMAGE_TYPE = Tag("FrameType"), Tag("ImageType")


def _renamed(elements: Elements) -> Elements:
    """Those of `elements` that single-frame objects call otherwise, under that name."""
    found: Elements = {}
    for source, target, representation, convert in _RENAMED_TAGS:
        element = elements.get(source)
        if element is None or element.is_empty or element.VM != 1:
            continue
        try:
            found[target] = DataElement(target, representation, convert(str(element.value)))
        except ValueError:  # a number that is none
            continue
    if _FRAME_TYPE in elements and not elements[_FRAME_TYPE].is_empty:
        found[_IMAGE_TYPE] = DataElement(_IMAGE_TYPE, "CS", elements[_FRAME_TYPE].value)
    return found
