"""The image library of a report (PS3.16 TID 1600): described once for all images of a group, whatever they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from highdicom import sr
from pydicom.dataset import Dataset
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


def describe_images(sources: Sequence[Dataset]) -> sr.ContainerContentItem:
    """The library of these images: what they share once, for their group (TID 1601), and a reference to each.

    What a header lacks is left out (TID 1602, 1603 and 1604 make it optional): planar images have no place in the
    patient, and multi-frame images say it frame by frame. What an image's position is, the image itself says.
    """
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
    library = sr.ContainerContentItem(name=codes.DCM.ImageLibrary, relationship_type=sr.RelationshipTypeValues.CONTAINS)
    library.ContentSequence = sr.ContentSequence([group])
    return library


def _shared(sources: Sequence[Dataset]) -> Iterator[sr.ContentItem]:
    first = sources[0]
    modality = next((code for code in codes.cid29.concepts.values() if code.value == first.get("Modality")), None)
    if modality is not None:
        yield sr.CodeContentItem(name=codes.DCM.Modality, value=modality, relationship_type=_CONTEXT)
    if frame := first.get("FrameOfReferenceUID"):
        yield sr.UIDRefContentItem(name=codes.DCM.FrameOfReferenceUID, value=frame, relationship_type=_CONTEXT)
    for name, keyword in ((codes.DCM.PixelDataRows, "Rows"), (codes.DCM.PixelDataColumns, "Columns")):
        yield from _number(name, first.get(keyword), _PIXELS)
    spacing = first.get("PixelSpacing") or first.get("ImagerPixelSpacing") or (None, None)
    yield from _number(codes.DCM.HorizontalPixelSpacing, spacing[1], _MILLIMETRES)
    yield from _number(codes.DCM.VerticalPixelSpacing, spacing[0], _MILLIMETRES)
    if len({source.get("SliceThickness") for source in sources}) == 1:
        yield from _number(codes.DCM.SliceThickness, first.get("SliceThickness"), _MILLIMETRES)
    yield from _number(codes.DCM.SpacingBetweenSlices, first.get("SpacingBetweenSlices"), _MILLIMETRES)
    for name, value in zip(_ORIENTATION, first.get("ImageOrientationPatient") or (), strict=False):
        yield from _number(name, value, _RATIO)
    for name, letters in zip(
        (codes.DCM.PatientOrientationRow, codes.DCM.PatientOrientationColumn),
        first.get("PatientOrientation") or (),
        strict=False,
    ):
        if letters and "ImageOrientationPatient" not in first:
            yield sr.TextContentItem(name=name, value=letters, relationship_type=_CONTEXT)


def _number(name: Code, value: object, unit: sr.CodedConcept) -> Iterator[sr.ContentItem]:
    if value is not None and value != "":
        number = float(value)  # pyright: ignore[reportArgumentType]
        yield sr.NumContentItem(name=name, value=number, unit=unit, relationship_type=_CONTEXT)
