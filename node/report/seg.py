"""Segments as a DICOM Segmentation (PS3.3 A.51, C.8.20)."""

from __future__ import annotations

from datetime import datetime, tzinfo
from typing import Literal

import highdicom as hd
import numpy as np
from highdicom.seg import Segmentation, SegmentDescription
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from node.dicom.codes import LATERALITY, Code
from node.dicom.volume import Image
from node.infer.manifest import Segment
from node.report.colors import segment_colors
from node.report.kinds import Kind
from node.report.slices import drop_geometry, refer_to_sources, stand_ins
from node.report.subject import MANUFACTURER, Subject


def make_seg(subject: Subject, kind: Literal["BINARY", "LABELMAP"] = "BINARY") -> Segmentation:
    """The segmentation of the subject's label map, slice by slice on its source images; empty frames are left out.

    Each frame refers to the one slice or frame that it was made of and lies where that lies; those of planar images lie
    nowhere. The label map must hold at least one labelled voxel.
    """
    labels = sorted(subject.manifest.segments)
    # Segment numbers start at 1 without gaps in a BINARY SEG (PS3.3 C.8.20.2); the label values of the model need not.
    number_of = np.zeros(max(labels) + 1, np.uint16)
    for number, label in enumerate(labels, 1):
        number_of[label] = number
    descriptions = [_describe(subject, number, label) for number, label in enumerate(labels, 1)]
    seg = Segmentation(
        source_images=stand_ins(subject),
        pixel_array=number_of[subject.labelmap.array],
        segmentation_type=kind,
        segment_descriptions=descriptions,
        series_instance_uid=subject.uid("seg", "series"),
        series_number=subject.series_number(Kind.SEG),
        sop_instance_uid=subject.uid("seg"),
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
    if kind == "LABELMAP":
        # Every value of the pixels is described, 0 too (PS3.3 C.8.20.2.3). OHIF takes colours by an item's place, not
        # by its number: with the background in front, each segment would have the colour of the one before.
        background, *segments = seg.SegmentSequence
        seg.SegmentSequence = [*segments, background]
    refer_to_sources(seg, subject)
    if isinstance(subject.source, Image):
        drop_geometry(seg, subject.source, subject.sources[0])
    stamp(seg, subject)
    seg.DimensionOrganizationSequence[0].DimensionOrganizationUID = subject.uid("seg", "dimensions")
    for item in seg.DimensionIndexSequence:
        item.DimensionOrganizationUID = subject.uid("seg", "dimensions")
    return seg


def stamp(dataset: Dataset, subject: Subject) -> None:
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
    modifier = Sequence([coded(LATERALITY[segment.laterality])])
    if segment.anatomic_region:
        description.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = modifier
    else:
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = modifier
