"""Findings as an RT Structure Set (PS3.3 A.19.3), for treatment planning systems, which read neither SEG nor SR.

The object is in implicit VR: contours of more than 65,534 bytes, which large organs have, do not fit into a DS of
explicit VR (PS3.5 7.1.2), and would become UN there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import highdicom as hd
import numpy as np
from highdicom.base import SOPClass
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage

from node.dicom.codes import LATERALITY
from node.dicom.volume import Volume
from node.infer.manifest import Finding
from node.report.colors import finding_colors, to_rgb
from node.report.findings import Findings
from node.report.kinds import Kind
from node.report.outlines import Outline, Polygon, area
from node.report.references import refer_to
from node.report.seg import coded, stamp
from node.report.source import complete_header
from node.report.space import first_voxels
from node.report.subject import MANUFACTURER, Subject

_STUDY = "1.2.840.10008.3.1.2.3.1"  # Detached Study Management: what structure sets refer to a study as (PS3.3 C.8.8.5)
_ANATOMICAL_STRUCTURE = ("91723000", "123037004")  # SCT, Segmented Property Category (PS3.16 CID 7150)
_CONTOUR_DATA = Tag("ContourData")
_CHANNEL = 0.25  # of a pixel: beside the edges of pixels, and beside their centres


def make_rtstruct(findings: Findings) -> list[Dataset]:
    """The structure set of a run: a region of interest for each finding, with its boundary on each slice, in mm (LPS).

    Contours follow pixel edges, so that a voxel belongs to a region when its centre lies within; a hole is joined to
    what is around it by a channel of no width (keyhole, PS3.3 C.8.8.6.3). Points are regions of one point. There is
    none of what has no place in space, planar images and volumes without a frame of reference, and of no findings.
    """
    subject = findings.subject
    if not isinstance(subject.source, Volume) or not subject.source.grid.frame_of_reference_uid:
        return []
    regions: dict[int, list[Outline]] = {}
    for outline in findings.outlines():
        regions.setdefault(outline.number, []).append(outline)
    if not regions:
        return []
    return [_make_set(subject, subject.source, dict(sorted(regions.items())))]


def join_holes(polygons: Sequence[Polygon]) -> list[Polygon]:
    """The outer boundaries of a mask that was traced (`outlines.trace`), its holes joined to them.

    From the upper edge of each hole a channel goes up to the next edge above it, which is that of the outer boundary or
    of another hole. What lies within them, by whatever rule of filling, is the mask.
    """
    rings: list[list[tuple[float, float]]] = [[(x, y) for x, y in polygon.tolist()] for polygon in polygons]
    holes = [number for number, polygon in enumerate(polygons) if area(polygon) < 0]
    if not holes:
        return list(polygons)
    begins = np.concatenate(polygons)
    ends = np.concatenate([np.roll(polygon, -1, axis=0) for polygon in polygons])
    of_ring = np.repeat(np.arange(len(polygons)), [len(polygon) for polygon in polygons])
    place = np.concatenate([np.arange(len(polygon)) for polygon in polygons])
    is_level = begins[:, 1] == ends[:, 1]
    left, right = np.minimum(begins[:, 0], ends[:, 0]), np.maximum(begins[:, 0], ends[:, 0])
    joints: dict[int, list[tuple[int, float, float, int]]] = {}
    # The lowest first: what is joined to a hole lies below it, and is complete when the hole is joined itself.
    for hole in sorted(holes, key=lambda number: -rings[number][0][1]):
        first_x, top = rings[hole][0]  # the upper edge leads from the last corner to the first
        x = first_x + _CHANNEL
        above = np.flatnonzero(is_level & (left < x) & (x < right) & (begins[:, 1] < top))
        edge = above[np.argmax(begins[above, 1])]
        joints.setdefault(int(of_ring[edge]), []).append((int(place[edge]), x, float(begins[edge, 1]), hole))
    joined: dict[int, list[tuple[float, float]]] = {}
    for number in [*sorted(holes, key=lambda number: -rings[number][0][1]), *(set(range(len(rings))) - set(holes))]:
        joined[number] = _insert(rings[number], joints.get(number, []), rings, joined)
    return [np.array(joined[number]) for number in range(len(rings)) if number not in holes]


def _insert(
    ring: list[tuple[float, float]],
    joints: list[tuple[int, float, float, int]],
    rings: list[list[tuple[float, float]]],
    joined: dict[int, list[tuple[float, float]]],
) -> list[tuple[float, float]]:
    """A ring with holes at its edges: the edge's number, where on it the channel begins (x, y), and the hole."""
    points: list[tuple[float, float]] = []
    for number, corner in enumerate(ring):
        points.append(corner)
        here = [joint for joint in joints if joint[0] == number]
        for _, x, y, hole in sorted(here, key=lambda joint: abs(joint[1] - corner[0])):
            top = rings[hole][0][1]
            points += [(x, y), (x, top), *joined[hole], (x, top), (x, y)]
    return points


def _make_set(subject: Subject, volume: Volume, regions: dict[int, list[Outline]]) -> Dataset:
    header = complete_header(subject.sources[0], subject.says)
    structures = SOPClass(
        study_instance_uid=str(header.StudyInstanceUID),
        series_instance_uid=subject.uid("rtstruct", "series"),
        series_number=subject.series_number(Kind.RTSTRUCT),
        sop_instance_uid=subject.uid("rtstruct"),
        sop_class_uid=RTStructureSetStorage,
        instance_number=1,
        modality="RTSTRUCT",
        manufacturer=MANUFACTURER,
        manufacturer_model_name=f"{subject.model_name} {subject.model_version}"[:64],
        software_versions=f"radnode {subject.node_version}",
        device_serial_number=subject.model_digest[:16],
        transfer_syntax_uid=ImplicitVRLittleEndian,
        series_description=subject.series_description(Kind.RTSTRUCT),
        specific_character_set=header.get("SpecificCharacterSet"),
    )
    structures.copy_patient_and_study_information(header)
    stamp(structures, subject)
    structures.OperatorsName = None
    structures.FrameOfReferenceUID = volume.grid.frame_of_reference_uid
    structures.PositionReferenceIndicator = None
    structures.StructureSetLabel = "AI_UNVERIFIED"
    structures.StructureSetName = subject.series_description(Kind.RTSTRUCT)
    structures.StructureSetDescription = f"{subject.house.banner}. {subject.model_name} {subject.model_version}"
    structures.StructureSetDate, structures.StructureSetTime = structures.ContentDate, structures.ContentTime
    del structures.ContentDate, structures.ContentTime  # of no module of structure sets
    structures.ApprovalStatus = "UNAPPROVED"
    structures.ReferencedFrameOfReferenceSequence = [_refer_to_frame(volume, structures.StudyInstanceUID)]
    names = _name(regions)
    structures.StructureSetROISequence = [
        _describe(subject, volume, number, names[number], outlines[0]) for number, outlines in regions.items()
    ]
    colors = finding_colors(subject.manifest)
    structures.ROIContourSequence = [
        _draw(volume, number, to_rgb(colors[outlines[0].label]), outlines) for number, outlines in regions.items()
    ]
    meanings = {**subject.manifest.classes, **subject.manifest.segments}
    structures.RTROIObservationsSequence = [
        _observe(meanings[outlines[0].label], number) for number, outlines in regions.items()
    ]
    return structures


def _refer_to_frame(volume: Volume, study_uid: str) -> Dataset:
    series = Dataset()
    series.SeriesInstanceUID = volume.series_uid
    series.ContourImageSequence = refer_to(volume.slices)
    study = Dataset()
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = _STUDY, study_uid
    study.RTReferencedSeriesSequence = [series]
    frame = Dataset()
    frame.FrameOfReferenceUID = volume.grid.frame_of_reference_uid
    frame.RTReferencedStudySequence = [study]
    return frame


def _name(regions: dict[int, list[Outline]]) -> dict[int, str]:
    """The regions' names, no two of which are the same: planning systems tell regions by them."""
    names = {number: outlines[0].name for number, outlines in regions.items()}
    once = {name for name in names.values() if list(names.values()).count(name) == 1}
    return {number: name if name in once else f"{name[:58]} {number}" for number, name in names.items()}


def _describe(subject: Subject, volume: Volume, number: int, name: str, outline: Outline) -> Dataset:
    item = Dataset()
    item.ROINumber = number
    item.ReferencedFrameOfReferenceUID = volume.grid.frame_of_reference_uid
    item.ROIName = name
    item.ROIDescription = outline.text
    item.ROIGenerationAlgorithm = "AUTOMATIC"
    item.ROIGenerationDescription = f"{subject.model_name} {subject.model_version}"[:64]
    item.ROIDerivationAlgorithmIdentificationSequence = hd.AlgorithmIdentificationSequence(
        name=subject.model_name,
        version=subject.model_version,
        family=coded(subject.manifest.algorithm_family),
        parameters=subject.algorithm_parameters(),
    )
    return item


def _draw(volume: Volume, number: int, color: tuple[int, int, int], outlines: Sequence[Outline]) -> Dataset:
    item = Dataset()
    item.ReferencedROINumber = number
    item.ROIDisplayColor = list(color)
    item.ContourSequence = list(_contours(volume, outlines))
    return item


def _contours(volume: Volume, outlines: Sequence[Outline]) -> Iterator[Dataset]:
    firsts = first_voxels(volume)
    steps = volume.grid.affine_lps[:3, :2]  # along a row and along a column, mm
    for outline in outlines:
        images = refer_to([volume.slices[outline.index]])
        rings = join_holes(outline.polygons)
        if outline.point is not None:
            rings.append(np.array([outline.point]))
        for ring in rings:
            contour = Dataset()
            contour.ContourImageSequence = images
            contour.ContourGeometricType = "POINT" if len(ring) == 1 else "CLOSED_PLANAR"
            contour.NumberOfContourPoints = len(ring)
            contour[_CONTOUR_DATA] = _encode(firsts[outline.index] + ring @ steps.T)
            yield contour


def _encode(points: NDArray[np.float64]) -> RawDataElement:
    """Contour Data as a file has it: decimal strings, to 0.1 micrometres; pydicom takes seconds for a million."""
    text = "\\".join(f"{value:.4f}".rstrip("0").rstrip(".") for value in points.ravel().tolist())
    value = text.encode() + b" " * (len(text) % 2)
    return RawDataElement(_CONTOUR_DATA, "DS", len(value), value, 0, is_implicit_VR=True, is_little_endian=True)


def _observe(finding: Finding, number: int) -> Dataset:
    item = Dataset()
    item.ObservationNumber = item.ReferencedROINumber = number
    item.RTROIInterpretedType = "ORGAN" if finding.category.value in _ANATOMICAL_STRUCTURE else None
    item.ROIInterpreter = None
    item.RTROIIdentificationCodeSequence = [coded(finding.type)]
    if finding.laterality is not None and not finding.anatomic_region:
        modifier = coded(LATERALITY[finding.laterality])
        item.RTROIIdentificationCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    return item
