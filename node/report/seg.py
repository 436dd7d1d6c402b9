"""Segments as a DICOM Segmentation (PS3.3 A.51, C.8.20)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, tzinfo

import highdicom as hd
import numpy as np
from highdicom.seg import Segmentation, SegmentDescription
from numpy.typing import NDArray
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.multival import MultiValue
from pydicom.uid import ExplicitVRLittleEndian

from node.dicom.codes import LATERALITY, Code
from node.dicom.volume import Image
from node.errors import OutputRefused
from node.infer.manifest import Segment
from node.report.colors import segment_colors
from node.report.encoded import encode_items, with_encoded
from node.report.kinds import Kind, SegForm
from node.report.seg_frames import (
    Masks,
    Numbers,
    Place,
    Planes,
    Probabilities,
    count_bytes,
    join_items,
    order_frames,
    stream_pixels,
)
from node.report.slices import drop_geometry, refer_to_sources, stand_ins
from node.report.subject import MANUFACTURER, Dated, Subject

_LONGEST = 0xFFFFFFFE  # bytes of a value of 32-bit length (PS3.5 7.1.1)


def make_seg(subject: Subject, form: SegForm = SegForm.BINARY) -> FileDataset:
    """The segmentation of the subject's label map, slice by slice on its source images; empty frames are left out.

    Each frame refers to the one slice or frame that it was made of and lies where that lies; those of planar images lie
    nowhere. Segments are numbered from 1 in the order of the model's label values, whatever the form. The label map
    must hold at least one labelled voxel. The value of Pixel Data is a stream, made of the label map while it is read.

    Raises `OutputRefused` for a fractional segmentation of a model that gave no probabilities, and for one of no frame
    or of more pixels than a data element can hold.
    """
    labels = sorted(subject.manifest.segments)
    planes = _planes(subject, form, labels)
    if not planes.present.any():  # NumberOfFrames is at least 1 (PS3.3 C.7.6.6)
        raise OutputRefused(f"{subject.model_name} found nothing of which a {form.upper()} segmentation could be made")
    seg = _outline(subject, form, planes.present, labels)
    refer_to_sources(seg, subject)
    index = {(ref.sop_instance_uid, ref.frame): number for number, ref in enumerate(subject.source_slices)}
    slices = [index[_source_of(groups)] for groups in seg.PerFrameFunctionalGroupsSequence]
    ranks = [int(_last(groups)) for groups in seg.PerFrameFunctionalGroupsSequence]
    if isinstance(subject.source, Image):
        drop_geometry(seg, subject.source, subject.sources[0])
    stamp(seg, subject)
    seg.DimensionOrganizationSequence[0].DimensionOrganizationUID = _uid(subject, form, "dimensions")
    for item in seg.DimensionIndexSequence:
        item.DimensionOrganizationUID = _uid(subject, form, "dimensions")
    places = order_frames(planes.present, [slice_ for _, slice_ in sorted(zip(ranks, slices, strict=True))])
    if count_bytes(planes, len(places)) > _LONGEST:
        raise OutputRefused(
            f"a {form.upper()} segmentation of {len(places)} frames of {planes.pixels} pixels does not fit into one "
            "object (4 GiB, PS3.5 7.1): let the route send a LABELMAP one"
        )
    return _fill(seg, subject, slices, planes, places)


def _planes(subject: Subject, form: SegForm, labels: Sequence[int]) -> Planes:
    labelmap = subject.labelmap
    match form:
        case SegForm.BINARY:
            return Masks(labelmap.array, labels)
        case SegForm.LABELMAP:
            return Numbers(labelmap.array, labels)
        case SegForm.FRACTIONAL:
            if not labelmap.probabilities:
                raise OutputRefused(
                    f"{subject.model_name} gave no probabilities, of which a FRACTIONAL segmentation is made: let the "
                    "route send a BINARY or LABELMAP one"
                )
            return Probabilities(labelmap.probabilities, labels)


def _outline(subject: Subject, form: SegForm, present: NDArray[np.bool_], labels: Sequence[int]) -> Segmentation:
    """The segmentation as highdicom makes it of one pixel and one frame per slice that has any, of its first segment.

    All but the frames, their number and their size is as it would be of the whole.
    """
    images = stand_ins(subject)
    for image in images:
        image.Rows = image.Columns = 1
    first = np.where(present.any(axis=1), present.argmax(axis=1) + 1, 0).astype(np.uint16)
    seg = Segmentation(
        source_images=images,
        pixel_array=first[:, None, None],
        segmentation_type=form.upper(),
        segment_descriptions=[_describe(subject, number, label) for number, label in enumerate(labels, 1)],
        series_instance_uid=_uid(subject, form, "series"),
        series_number=subject.series_number(Kind.SEG),
        sop_instance_uid=_uid(subject, form),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=f"{subject.model_name} {subject.model_version}"[:64],
        software_versions=f"radnode {subject.node_version}",
        device_serial_number=subject.model_digest[:16],
        content_label="AI_UNVERIFIED",
        content_description=subject.series_description(Kind.SEG),
        content_creator_name="radnode^AI",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        omit_empty_frames=True,
        series_description=subject.series_description(Kind.SEG),
    )
    if form is SegForm.FRACTIONAL and len(labels) > 1:
        seg.SegmentsOverlap = "UNDEFINED"  # as highdicom says of probabilities; the outline is of a label map
    if form is SegForm.LABELMAP:
        # Every value of the pixels is described, 0 too (PS3.3 C.8.20.2.3). OHIF takes colours by an item's place, not
        # by its number: with the background in front, each segment would have the colour of the one before.
        background, *segments = seg.SegmentSequence
        seg.SegmentSequence = [*segments, background]
    return seg


def _fill(
    outline: Dataset, subject: Subject, slices: Sequence[int], planes: Planes, places: Sequence[Place]
) -> FileDataset:
    """The outline with all frames in place of its own, which are those of `slices`."""
    character_set = outline.get("SpecificCharacterSet")
    templates = [encode_items([groups], character_set) for groups in outline.PerFrameFunctionalGroupsSequence]
    seg = with_encoded(
        outline,
        {
            "SegmentSequence": encode_items(outline.SegmentSequence, character_set),
            "PerFrameFunctionalGroupsSequence": join_items(dict(zip(slices, templates, strict=True)), places),
        },
    )
    seg.NumberOfFrames = len(places)
    seg.Rows, seg.Columns = subject.source.array.shape[1:3]
    pixels = seg["PixelData"]
    seg[pixels.tag] = DataElement(pixels.tag, pixels.VR, stream_pixels(planes, places))
    return seg


def _uid(subject: Subject, form: SegForm, *parts: str) -> str:
    """A UID of a segmentation or its part; each form is an object and a series of its own."""
    return subject.uid("seg", *parts) if form is SegForm.BINARY else subject.uid("seg", form.value, *parts)


def _source_of(groups: Dataset) -> tuple[str, int | None]:
    (item,) = groups.DerivationImageSequence[0].SourceImageSequence
    return str(item.ReferencedSOPInstanceUID), item.get("ReferencedFrameNumber")


def _last(groups: Dataset) -> int:
    """The rank of a frame's slice among those of the object."""
    values = groups.FrameContentSequence[0].DimensionIndexValues
    return values[-1] if isinstance(values, MultiValue) else values


def stamp(dataset: Dataset, subject: Dated) -> None:
    """Dates of the job in place of the clock's, so that the same job makes the same bytes.

    An offset from UTC holds for every time of a data set (PS3.3 C.12.1.1.8), the study's copied ones too. So the job's
    time is written in the offset of the source images; where they state none, in this machine's time zone without any.
    """
    offset = str(subject.sources[0].get("TimezoneOffsetFromUTC") or "").strip()
    there = subject.created.astimezone(_time_zone(offset))
    date, time = there.strftime("%Y%m%d"), there.strftime("%H%M%S.%f")
    for keyword in ("InstanceCreationDate", "ContentDate", "SeriesDate"):
        setattr(dataset, keyword, date)
    for keyword in ("InstanceCreationTime", "ContentTime", "SeriesTime"):
        setattr(dataset, keyword, time)
    for item in dataset.get("ContributingEquipmentSequence", ()):
        if "ContributionDateTime" in item:  # highdicom's own entry
            item.ContributionDateTime = there.strftime("%Y%m%d%H%M%S.%f%z")
    if _time_zone(offset):
        dataset.TimezoneOffsetFromUTC = offset
    elif "TimezoneOffsetFromUTC" in dataset:
        del dataset.TimezoneOffsetFromUTC


def _time_zone(offset: str) -> tzinfo | None:
    """The time zone of `&ZZXX`; None where it is none."""
    try:
        return datetime.strptime(offset, "%z").tzinfo if len(offset) == 5 else None
    except ValueError:
        return None


def coded(code: Code) -> hd.sr.CodedConcept:
    """A code as highdicom wants it."""
    return hd.sr.CodedConcept(code.value, code.scheme, code.meaning)


def tracking(subject: Subject, label: int) -> tuple[str, str]:
    """Tracking ID and UID of a segment, the same in SEG and SR."""
    return f"{subject.model_name} {subject.manifest.segments[label].name}"[:64], subject.uid("track", str(label))


def _describe(subject: Subject, number: int, label: int) -> SegmentDescription:
    segment = subject.manifest.segments[label]
    identifier, uid = tracking(subject, label)
    description = SegmentDescription(
        segment_number=number,
        segment_label=segment.name,
        segmented_property_category=coded(segment.category),
        segmented_property_type=coded(segment.type),
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=subject.model_name,
            version=subject.model_version,
            family=coded(subject.manifest.algorithm_family),
            parameters=subject.algorithm_parameters(),
        ),
        tracking_uid=uid,
        tracking_id=identifier,
        anatomic_regions=[coded(segment.anatomic_region)] if segment.anatomic_region else None,
        display_color=hd.color.CIELabColor(*segment_colors(subject.manifest)[label]),
    )
    _add_laterality(description, segment)
    return description


def _add_laterality(description: SegmentDescription, segment: Segment) -> None:
    """Laterality (CID 244) modifies the region of a finding, else the type that names the organ (PS3.3 C.8.20.2)."""
    if segment.laterality is None:
        return
    modifier = [coded(LATERALITY[segment.laterality])]
    if segment.anatomic_region:
        description.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = modifier
    else:
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = modifier
