"""What is reported of a label map: a SEG, measurements of each segment, sections with the segments drawn over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from node.dicom.volume import Image, Volume
from node.infer.manifest import OF_VALUES, Finding, Measurement
from node.report.kinds import SegForm
from node.report.lesions import split_lesions
from node.report.measure import SegmentMeasurements, measure_segments
from node.report.outlines import MOST_KEY_SLICES, Outline, trace_labels
from node.report.page import Cell, Line, Panel
from node.report.quantities import code_diameters, code_measurements
from node.report.sections import AXIAL_PANELS, show_frames, show_section, spread
from node.report.seg import make_seg, tracking
from node.report.space import add_key_point, key_voxels
from node.report.sr import Described, Group, describe, report_presence, source_region
from node.report.subject import Subject
from node.report.words import CATALOGUE, show_number

_ORGAN = Finding.model_fields["category"].default


class SegmentFindings:
    """The findings of a label map. Its `subject` has a segment per lesion where the manifest asks for it."""

    def __init__(self, subject: Subject):
        self.subject = _say_range(split_lesions(subject))
        self.measurements: Sequence[SegmentMeasurements] = measure_segments(
            self.subject.source, self.subject.labelmap, self.subject.manifest
        )

    def segmentation(self, form: SegForm) -> Dataset | None:
        """The SEG, when anything was found: one without frames is not valid (PS3.3 C.7.6.16)."""
        if not any(measured.voxels for measured in self.measurements):
            return None
        return make_seg(self.subject, form)

    def groups(self, seg: Dataset | None) -> list[Group]:
        """A measurement group per segment that was found, on planar images one per frame that shows it.

        Diameters have a further group with their lines: within a group of a region, measurements have no coordinates of
        their own (TID 1419). Both groups track one finding; other groups have a point where the segment is seen best. A
        segment that was not found is said so.
        """
        numbers = {label: number for number, label in enumerate(sorted(self.subject.manifest.segments), 1)}
        found = [measured for measured in self.measurements if measured.voxels and seg is not None]
        regions: list[Group] = []
        if seg is not None and found:
            frames = _frames_of(seg) if isinstance(self.subject.source, Image) else {}
            regions = [
                _measure_frame(self.subject, numbers[each.number], each, seg, frames)
                if isinstance(self.subject.source, Image)
                else _measure_segment(self.subject, numbers[each.number], each, seg)
                for each in found
            ]
            _add_key_points(self.subject, found, regions)
        lines = [group for measured in found for group in _draw_diameters(self.subject, measured)]
        absent = [
            report_presence(_described(self.subject, measured.number), codes.SCT.Absent)
            for measured in self.measurements
            if not measured.voxels
        ]
        return [*regions, *lines, *absent]

    def panels(self) -> list[Panel]:
        """Axial slices across the segments, then a coronal and a sagittal section through their middle."""
        source, labels = self.subject.source, self.subject.labelmap.array
        occupied = np.flatnonzero(labels.any(axis=(1, 2)))
        first, last = (int(occupied[0]), int(occupied[-1])) if occupied.size else (0, labels.shape[0] - 1)
        if not isinstance(source, Volume):
            return show_frames(source, spread(first, last, AXIAL_PANELS + 2), labels)
        panels = [show_section(source, 0, index, labels) for index in spread(first, last, AXIAL_PANELS)[::-1]]
        for number in {len(panels) // 3, 2 * len(panels) // 3}:
            panels[number] = replace(panels[number], key=True)
        if labels.any():
            weight = labels > 0
            row = int(np.average(np.arange(labels.shape[1]), weights=weight.sum((0, 2))))
            # A column through the larger half, not through the gap between two lungs.
            column = int(np.argmax(weight.sum((0, 1))))
        else:
            row, column = labels.shape[1] // 2, labels.shape[2] // 2
        sections = [show_section(source, 1, row, labels), show_section(source, 2, column, labels)]
        return [*panels, *(replace(section, key=True) for section in sections)]

    def lines(self) -> list[Line]:
        """Each segment with its measurements, of several frames where it is largest; the largest count for most."""
        words = CATALOGUE[self.subject.house.language]
        by_label: dict[int, list[SegmentMeasurements]] = {}
        for measured in self.measurements:
            by_label.setdefault(measured.number, []).append(measured)
        lines = []
        for label, each in by_label.items():
            largest = max(each, key=lambda measured: measured.voxels)
            if not largest.voxels:
                lines.append(Line(label, largest.name, note=words.not_found, found=False))
                continue
            cells = [
                Cell(
                    f"{words.measurement(row['measurement'])} {row['unit']}".strip(),
                    show_number(row["value"], row["unit"]),
                )
                for row in largest.rows()
            ]
            if largest.frame is not None and len(self.subject.source_slices) > 1:
                cells.append(Cell(words.frame, f"{largest.frame + 1} ({len(each)})"))
            lines.append(Line(label, largest.name, tuple(cells), weight=largest.voxels))
        return lines

    def key_slices(self) -> list[int]:
        """Of each segment the slice where it is largest: what is no healthy organ first, then the manifest's order."""
        labels, segments = self.subject.labelmap.array, self.subject.manifest.segments
        size = max(segments) + 1
        pixels = np.stack([np.bincount(slice_.ravel(), minlength=size) for slice_ in labels])
        order = sorted(segments, key=lambda label: (segments[label].category == _ORGAN, label))
        largest = (int(pixels[:, label].argmax()) for label in order if pixels[:, label].any())
        return list(dict.fromkeys(largest))[:MOST_KEY_SLICES]

    def outlines(self) -> list[Outline]:
        """The boundary of each segment's pixels on each slice."""
        numbers = {label: number for number, label in enumerate(sorted(self.subject.manifest.segments), 1)}
        measured = {(each.number, each.frame): each for each in self.measurements}
        outlines = []
        for index, slice_ in enumerate(self.subject.labelmap.array):
            for label, polygons in trace_labels(slice_):
                number = numbers[label]
                each = measured.get((label, None)) or measured[label, index]
                text = each.name
                if Measurement.VOLUME in each.wanted and each.volume_ml is not None:
                    text += f" {show_number(each.volume_ml, 'mL')} mL"
                track = tracking(self.subject, label)
                outlines.append(Outline(index, label, number, each.name, text, track, polygons))
        return outlines


def _say_range(subject: Subject) -> Subject:
    """The subject whose results say which values count, where the manifest limits them."""
    within = subject.manifest.intensity_range
    if within is None or not set(subject.manifest.measurements) & set(OF_VALUES):
        return subject
    unit = subject.source.unit if isinstance(subject.source, Volume) else ""
    said = f"{within[0]:g} to {within[1]:g} {unit}".strip()
    return replace(subject, parameters={**subject.parameters, "intensity range": said})


def _described(subject: Subject, label: int) -> Described:
    """A segment's description with the tracking that its SEG has."""
    identifier, uid = tracking(subject, label)
    described = describe(subject, subject.manifest.segments[label], str(label))
    return {**described, "tracking_identifier": sr.TrackingIdentifier(uid=uid, identifier=identifier)}


def _measure_segment(subject: Subject, number: int, measured: SegmentMeasurements, seg: Dataset) -> Group:
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        **_described(subject, measured.number),
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=seg.SOPClassUID,
            sop_instance_uid=seg.SOPInstanceUID,
            segment_number=number,
            source_series=sr.SourceSeriesForSegmentation(subject.source.series_uid),
        ),
        measurements=list(code_measurements(subject.source, measured)),
    )


def _measure_frame(
    subject: Subject,
    number: int,
    measured: SegmentMeasurements,
    seg: Dataset,
    frames: dict[tuple[int, str, int | None], int],
) -> Group:
    ref = subject.source_slices[measured.frame or 0]
    segment = sr.ReferencedSegmentationFrame(
        sop_class_uid=seg.SOPClassUID,
        sop_instance_uid=seg.SOPInstanceUID,
        frame_number=frames[number, ref.sop_instance_uid, ref.frame],
        segment_number=number,
        source_image=sr.SourceImageForSegmentation(
            ref.sop_class_uid, ref.sop_instance_uid, None if ref.frame is None else [ref.frame]
        ),
    )
    # A reference has either number (PS3.3 10.3), highdicom writes both. A frame of one segment says which it is of.
    (reference,) = segment[0].ReferencedSOPSequence
    if seg.SegmentationType == "LABELMAP":
        del reference.ReferencedFrameNumber
    else:
        del reference.ReferencedSegmentNumber
    return sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        **_described(subject, measured.number),
        referenced_segment=segment,
        measurements=list(code_measurements(subject.source, measured)),
    )


def _add_key_points(subject: Subject, found: Sequence[SegmentMeasurements], groups: Sequence[Group]) -> None:
    """Add to each group where its segment is seen best; not where diameters are drawn, which are shown instead."""
    labels = subject.labelmap.array
    in_volume = isinstance(subject.source, Volume)
    places = key_voxels(labels, [measured.number for measured in found]) if in_volume else {}
    for measured, group in zip(found, groups, strict=True):
        if measured.diameters is not None:
            continue
        if in_volume:
            index, row, column = places[measured.number]
        else:
            index = measured.frame or 0
            _, row, column = key_voxels(labels[index : index + 1], [measured.number])[measured.number]
        add_key_point(group, subject.source_slices[index], row, column)


def _frames_of(seg: Dataset) -> dict[tuple[int, str, int | None], int]:
    """Segment number, and the image and frame that it was made of, to the frame of a SEG (from 1), of whatever form."""
    (shared,) = seg.SharedFunctionalGroupsSequence
    everything = [int(segment.SegmentNumber) for segment in seg.SegmentSequence]
    frames = {}
    for frame, groups in enumerate(seg.PerFrameFunctionalGroupsSequence, 1):
        (source,) = groups.DerivationImageSequence[0].SourceImageSequence
        of = int(source.ReferencedFrameNumber) if "ReferencedFrameNumber" in source else None
        identification = groups if "SegmentIdentificationSequence" in groups else shared
        if "SegmentIdentificationSequence" in identification:
            shown = [int(identification.SegmentIdentificationSequence[0].ReferencedSegmentNumber)]
        else:  # a frame of a label map shows all segments of its slice
            shown = everything
        for number in shown:
            frames[number, str(source.ReferencedSOPInstanceUID), of] = frame
    return frames


def _draw_diameters(subject: Subject, measured: SegmentMeasurements) -> list[Group]:
    """The group (TID 1501) of a segment's diameters with their lines on the slice, where any are wanted."""
    if measured.diameters is None:
        return []
    measurements = code_diameters(measured, source_region(subject.source_slices[measured.diameters.index]))
    return [sr.MeasurementsAndQualitativeEvaluations(**_described(subject, measured.number), measurements=measurements)]
