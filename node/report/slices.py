"""The source's slices and frames as highdicom takes them, and the references to them as they have to be.

highdicom 0.28 makes a SEG of single-frame images of exactly one orientation, of one multi-frame image with all of its
frames, or of a single frame without geometry. So every slice stands in as a single-frame image of its own, and the SEG
that is made of them is told afterwards which instances and frames they were.
"""

from __future__ import annotations

import numpy as np
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import Tag
from pydicom.uid import CTImageStorage

from node.dicom.candidates import numbers
from node.dicom.frames import FrameHeaders
from node.dicom.uid import derive_uid
from node.dicom.volume import Grid, Image, SliceRef, Volume
from node.report.source import complete_header
from node.report.subject import Subject

_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "NumberOfFrames")
_STACK = "1"
EVEN_MM = 0.1  # how far a slice may stand from where even spacing has it


def stand_ins(subject: Subject) -> tuple[Dataset, ...]:
    """One single-frame header per slice or frame, in their order; the first has the patient and the study too.

    Positions are the source's own, to the letter. A planar image is given a place in space, which `drop_geometry`
    takes away again.
    """
    source = subject.source
    first = complete_header(subject.sources[0], subject.says)
    for keyword in _GROUPS:
        if keyword in first:
            delattr(first, keyword)
    frames = _of_volume(subject, source) if isinstance(source, Volume) else _of_image(source)
    for index, (frame, ref) in enumerate(zip(frames, subject.source_slices, strict=True)):
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID"):
            setattr(frame, keyword, first[keyword].value)
        frame.SOPClassUID = CTImageStorage  # any class without frames: highdicom looks no further
        frame.SOPInstanceUID = _stand_in_uid(ref, index)
        frame.Rows, frame.Columns = source.array.shape[1:3]
    # Elements are replaced, not set: they are the source's own.
    first.update({element.tag: element for element in frames[0]})
    if "SpacingBetweenSlices" not in frames[0] and "SpacingBetweenSlices" in first:
        del first.SpacingBetweenSlices
    return (first, *frames[1:])


def refer_to_sources(seg: Dataset, subject: Subject) -> None:
    """Make a SEG of stand-ins refer to what they stand in for."""
    refs = {_stand_in_uid(ref, index): ref for index, ref in enumerate(subject.source_slices)}
    for groups in seg.PerFrameFunctionalGroupsSequence:
        (item,) = groups.DerivationImageSequence[0].SourceImageSequence
        ref = refs.get(str(item.ReferencedSOPInstanceUID))
        if ref is None:  # segments share the item of their slice
            continue
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = ref.sop_class_uid, ref.sop_instance_uid
        if ref.frame is not None:
            item.ReferencedFrameNumber = ref.frame
    images = []
    for sop_class_uid, sop_instance_uid in dict.fromkeys(
        (ref.sop_class_uid, ref.sop_instance_uid) for ref in subject.source_slices
    ):
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class_uid, sop_instance_uid
        images.append(item)
    seg.SourceImageSequence = images
    (series,) = seg.ReferencedSeriesSequence
    series.ReferencedInstanceSequence = images


def drop_geometry(seg: Dataset, image: Image, header: Dataset) -> None:
    """Take the place in space from a SEG of a planar image, whose frames are known by what they derive from.

    PS3.3 A.51.3 asks for a frame of reference, plane positions and pixel measures where there is no derivation image.
    Frames of one image are told apart by their position in a stack (C.7.6.16.2.2). `header` is the image's.
    """
    for keyword in ("FrameOfReferenceUID", "PositionReferenceIndicator", "DimensionOrganizationType"):
        if keyword in seg:
            delattr(seg, keyword)
    seg.PatientOrientation = header.get("PatientOrientation")  # Type 2C where there is no orientation in space
    (shared,) = seg.SharedFunctionalGroupsSequence
    del shared.PlaneOrientationSequence
    if image.spacing_mm is None:
        del shared.PixelMeasuresSequence
    else:
        (measures,) = shared.PixelMeasuresSequence
        measures.PixelSpacing = [f"{value:.10g}" for value in image.spacing_mm]
        for keyword in ("SliceThickness", "SpacingBetweenSlices"):
            if keyword in measures:
                delattr(measures, keyword)
    positions = {(ref.sop_instance_uid, ref.frame): number for number, ref in enumerate(image.frames, 1)}
    for groups in seg.PerFrameFunctionalGroupsSequence:
        del groups.PlanePositionSequence
        item = groups.DerivationImageSequence[0].SourceImageSequence[0]
        frame = int(item.ReferencedFrameNumber) if "ReferencedFrameNumber" in item else None
        (content,) = groups.FrameContentSequence
        content.StackID = _STACK
        content.InStackPositionNumber = number = positions[str(item.ReferencedSOPInstanceUID), frame]
        # This index is the number itself, not its rank among the frames that are not empty (C.7.6.17.1).
        values = content.DimensionIndexValues
        content.DimensionIndexValues = [*values[:-1], number] if isinstance(values, MultiValue) else number
    for item in seg.DimensionIndexSequence:
        if item.DimensionIndexPointer == Tag("ImagePositionPatient"):
            item.DimensionIndexPointer = Tag("InStackPositionNumber")
            item.FunctionalGroupPointer = Tag("FrameContentSequence")
            item.DimensionDescriptionLabel = "In-Stack Position Number"


def _stand_in_uid(ref: SliceRef, index: int) -> str:
    return derive_uid("stand-in", ref.sop_instance_uid, str(index))


def _of_volume(subject: Subject, volume: Volume) -> list[Dataset]:
    headers = {str(header.SOPInstanceUID): header for header in subject.sources}
    frames = {uid: FrameHeaders(headers[uid]) for uid in {ref.sop_instance_uid for ref in volume.slices if ref.frame}}

    def own(ref: SliceRef) -> Dataset:
        return headers[ref.sop_instance_uid] if ref.frame is None else frames[ref.sop_instance_uid][ref.frame]

    grid, first = volume.grid, own(volume.slices[0])
    step_mm = _step_along_normal(grid)
    thickness_mm = numbers(first, "SliceThickness", 1) or [0.0]
    slices = []
    for ref in volume.slices:
        slice_ = Dataset()
        # Positions without a frame of reference are in a space of their own.
        slice_.FrameOfReferenceUID = grid.frame_of_reference_uid or derive_uid("space", volume.series_uid)
        slice_.ImagePositionPatient = own(ref).ImagePositionPatient
        # Within tolerance the slices have one orientation, and highdicom wants one to the letter.
        slice_.ImageOrientationPatient = first.ImageOrientationPatient
        slice_.PixelSpacing = first.PixelSpacing
        slice_.SliceThickness = f"{thickness_mm[0] if thickness_mm[0] > 0 else step_mm:.10g}"
        if volume.positions_lps is None or _evenly(volume):
            slice_.SpacingBetweenSlices = f"{step_mm:.10g}"
        slices.append(slice_)
    return slices


def _of_image(image: Image) -> list[Dataset]:
    slices = []
    for index in range(len(image.frames)):
        slice_ = Dataset()
        slice_.FrameOfReferenceUID = derive_uid("space", image.series_uid)
        slice_.ImagePositionPatient = [0, 0, index]
        slice_.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        slice_.PixelSpacing = [1, 1]
        slice_.SliceThickness = 1
        slices.append(slice_)
    return slices


def _step_along_normal(grid: Grid) -> float:
    """Distance of neighbouring slices' planes, of a sheared grid too (PS3.3 C.7.6.16.2.1), mm."""
    across, down, step = grid.affine_lps[:3, :3].T
    normal = np.cross(across, down)
    return abs(float(step @ normal)) / float(np.linalg.norm(normal))


def _evenly(volume: Volume) -> bool:
    """Whether a sheared volume's slices follow each other at one distance, as `grid` says."""
    expected = volume.grid.to_lps(np.array([(0, 0, index) for index in range(volume.array.shape[0])]))
    return volume.positions_lps is not None and bool(np.allclose(volume.positions_lps, expected, atol=EVEN_MM))
