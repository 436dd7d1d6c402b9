"""The image library of a report (PS3.16 TID 1600): described once for all images of a group, whatever they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

_SOURCE = sr.CodedConcept("260753009", "SCT", "Source")
_PIXELS = sr.CodedConcept("{pixels}", "UCUM", "Pixels")
_MILLIMETRES = sr.CodedConcept("mm", "UCUM", "mm")
_RATIO = sr.CodedConcept("{-1:1}", "UCUM", "{-1:1}")
_ORIENTATION = (
    codes.DCM.ImageOrientationPatientRowX,
    codes.DCM.ImageOrientationPatientRowY,
    codes.DCM.ImageOrientationPatientRowZ,
    codes.DCM.ImageOrientationPatientColumnX,
    codes.DCM.ImageOrientationPatientColumnY,
    codes.DCM.ImageOrientationPatientColumnZ,
)
_CONTEXT = sr.RelationshipTypeValues.HAS_ACQ_CONTEXT


# Images that differ in one of these are in groups of their own.
_ALIKE = ("SeriesInstanceUID", "Modality", "FrameOfReferenceUID", "Rows", "Columns")


def describe_images(sources: Sequence[Dataset]) -> sr.ContainerContentItem:
    """The library of these images: what they share once for each group (TID 1601), and a reference to each.

    What a header lacks is left out (TID 1602, 1603 and 1604 make it optional): planar images have no place in the
    patient, and multi-frame images say it frame by frame. What an image's position is, the image itself says.
    """
    groups: dict[tuple[str, ...], list[Dataset]] = {}
    for source in sources:
        groups.setdefault(tuple(str(source.get(keyword)) for keyword in _ALIKE), []).append(source)
    library = sr.ContainerContentItem(name=codes.DCM.ImageLibrary, relationship_type=sr.RelationshipTypeValues.CONTAINS)
    library.ContentSequence = sr.ContentSequence([_describe_group(group) for group in groups.values()])
    return library


def _describe_group(sources: Sequence[Dataset]) -> sr.ContainerContentItem:
    group = sr.ContainerContentItem(
        name=codes.DCM.ImageLibraryGroup, relationship_type=sr.RelationshipTypeValues.CONTAINS
    )
    entries = [
        sr.ImageContentItem(
            name=_SOURCE,
            referenced_sop_class_uid=source.SOPClassUID,
            referenced_sop_instance_uid=source.SOPInstanceUID,
            relationship_type=sr.RelationshipTypeValues.CONTAINS,
        )
        for source in sources
    ]
    group.ContentSequence = sr.ContentSequence([*_shared(sources), *entries])
    return group


def _shared(sources: Sequence[Dataset]) -> Iterator[sr.ContentItem]:
    first = sources[0]
    modality = next((code for code in codes.cid29.concepts.values() if code.value == first.get("Modality")), None)
    if modality is not None:
        yield sr.CodeContentItem(name=codes.DCM.Modality, value=modality, relationship_type=_CONTEXT)
    if frame := first.get("FrameOfReferenceUID"):
        yield sr.UIDRefContentItem(name=codes.DCM.FrameOfReferenceUID, value=frame, relationship_type=_CONTEXT)
    yield from _numbers(first, "Rows", (codes.DCM.PixelDataRows,), _PIXELS)
    yield from _numbers(first, "Columns", (codes.DCM.PixelDataColumns,), _PIXELS)
    spacing = "PixelSpacing" if first.get("PixelSpacing") else "ImagerPixelSpacing"
    yield from _numbers(
        first, spacing, (codes.DCM.VerticalPixelSpacing, codes.DCM.HorizontalPixelSpacing), _MILLIMETRES
    )
    if len({str(source.get("SliceThickness")) for source in sources}) == 1:
        yield from _numbers(first, "SliceThickness", (codes.DCM.SliceThickness,), _MILLIMETRES)
    yield from _numbers(first, "SpacingBetweenSlices", (codes.DCM.SpacingBetweenSlices,), _MILLIMETRES)
    yield from _numbers(first, "ImageOrientationPatient", _ORIENTATION, _RATIO)
    letters = first.get("PatientOrientation")
    if isinstance(letters, MultiValue) and len(letters) == 2 and "ImageOrientationPatient" not in first:
        for name, letter in zip(
            (codes.DCM.PatientOrientationRow, codes.DCM.PatientOrientationColumn), letters, strict=True
        ):
            if letter:
                yield sr.TextContentItem(name=name, value=letter, relationship_type=_CONTEXT)


def _numbers(header: Dataset, keyword: str, names: Sequence[Code], unit: sr.CodedConcept) -> Iterator[sr.ContentItem]:
    """An item for each value of an element that has as many as there are names; of any other element none."""
    value = header.get(keyword)
    values = list(value) if isinstance(value, MultiValue) else [value]
    if len(values) == len(names) and all(isinstance(each, int | float) and math.isfinite(each) for each in values):
        for name, each in zip(names, values, strict=True):
            number = each if isinstance(each, int) else float(each)
            yield sr.NumContentItem(name=name, value=number, unit=unit, relationship_type=_CONTEXT)
