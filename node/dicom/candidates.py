"""What each instance of a series can be: slices of a volume, a planar image, or neither, with the reason.

A frame with a position, an orientation and a pixel spacing in the patient (PS3.3 C.7.6.2, C.7.6.16.2) is a slice.
Localizers, screen saves, dose pages, projections and colour maps are left aside: their values are not those of the
tissue at their places. Reformats (MPR) and other DERIVED images stay: vendors mark ordinary reconstructions so, and a
reformat's values are those of the tissue, interpolated. A package whose model must not see them says so in `when`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydicom import uid as uids
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import Tag
from pydicom.uid import UID

from node.dicom.frames import FrameHeaders, flatten_first_frame
from node.dicom.identity import is_uid
from node.dicom.volume import SliceRef

FRAMES_MAX = 1_000_000  # a whole slide has some 100,000 tiles; more is a damaged number
PERPENDICULAR_TOLERANCE = 1e-2  # of products of directions

_NOT_IMAGES = ("LOCALIZER", "SCOUT", "SCREEN SAVE", "DOSE_INFO")
_NOT_IMAGES_OF_SIEMENS = (" TOP", " PROT")  # endings: CT_SOM5 TOP, CT_SOM5 PROT
_NOT_SLIDES = ("LABEL", "OVERVIEW", "THUMBNAIL")  # PS3.3 C.8.12.4.1.1
# Values of ImageType and of VolumeBasedCalculationTechnique (PS3.3 C.8.16.2.1.4) of what is no cut through the body.
_PROJECTIONS = (
    "PROJECTION IMAGE", "MIP", "MINIP", "MAX_IP", "MIN_IP", "MAX IP", "MIN IP", "CSA MIP", "PJN", "VRT", "SSD",
    "VOLUME_RENDER", "VOLUME RENDER", "SURFACE_RENDER", "CURVED_MPR",
)  # fmt: skip

_RESULTS = (
    uids.SegmentationStorage,
    UID("1.2.840.10008.5.1.4.1.1.66.7"),  # Label Map Segmentation Storage
    uids.ParametricMapStorage,
    uids.RTDoseStorage,
)
# Classes whose images are cuts through the body: without their place they are nothing, alone they make no volume.
_CROSS_SECTIONAL = (
    uids.CTImageStorage,
    uids.EnhancedCTImageStorage,
    uids.LegacyConvertedEnhancedCTImageStorage,
    uids.MRImageStorage,
    uids.EnhancedMRImageStorage,
    uids.EnhancedMRColorImageStorage,
    uids.LegacyConvertedEnhancedMRImageStorage,
    uids.PositronEmissionTomographyImageStorage,
    uids.EnhancedPETImageStorage,
    uids.LegacyConvertedEnhancedPETImageStorage,
    uids.XRay3DAngiographicImageStorage,
    uids.XRay3DCraniofacialImageStorage,
    uids.BreastTomosynthesisImageStorage,
)

NO_POSITION = "it has no position in the patient (ImagePositionPatient, ImageOrientationPatient)"


@dataclass(frozen=True, eq=False)
class Slice:
    """One frame with a place in the patient."""

    path: Path
    instance: Dataset  # the header as it was sent
    header: Dataset  # the same, or that of the frame in a multi-frame instance, flattened
    frame: int | None  # as in `SliceRef`
    position_lps: tuple[float, ...]  # of the first voxel's centre
    orientation: tuple[float, ...]  # direction cosines of a row, then of a column
    spacing_mm: tuple[float, ...]  # between rows, between columns
    size: tuple[int, int]  # rows, columns

    @property
    def ref(self) -> SliceRef:
        return SliceRef(str(self.instance.SOPClassUID), str(self.instance.SOPInstanceUID), self.frame)


@dataclass(frozen=True)
class Planar:
    """One instance without a place in the patient, or frames that all have the same."""

    paths: tuple[Path, ...]  # one per frame
    instances: tuple[Dataset, ...]  # as they were sent, in the order of their first frames
    header: Dataset  # of the first frame, and what its instance says
    frames: tuple[SliceRef, ...]
    colour: bool


@dataclass
class Candidates:
    """The members of one series, sorted out."""

    slices: list[Slice] = field(default_factory=list)
    images: list[Planar] = field(default_factory=list)
    aside: dict[str, list[Dataset]] = field(default_factory=dict)  # reason to instances

    def leave(self, reason: str, header: Dataset) -> None:
        """Leave an instance, or a frame of it, aside."""
        instances = self.aside.setdefault(reason, [])
        if not instances or instances[-1] is not header:  # one instance's frames come one after the other
            instances.append(header)


def sort_out(members: Iterable[tuple[Path, Dataset]]) -> Candidates:
    """What the instances of one series are."""
    candidates = Candidates()
    for path, header in members:
        if reason := _no_image(header):
            candidates.leave(reason, header)
        elif header.SOPClassUID in _CROSS_SECTIONAL:
            _add_slices(candidates, path, header)
        else:
            _add_image(candidates, path, header)
    return candidates


def _no_image(header: Dataset) -> str:
    if not numbers(header, "Rows", 1) or not numbers(header, "Columns", 1):
        return f"{class_name(header)} is no image"
    if min(numbers(header, "Rows", 1) + numbers(header, "Columns", 1)) < 1:
        return "it has no rows or no columns"
    if not header.get("SOPInstanceUID") or not header.get("SOPClassUID"):
        return "it has no SOPInstanceUID or no SOPClassUID"
    # A damaged UID may have two values.
    if not all(isinstance(header.get(keyword) or None, str) for keyword in ("StudyInstanceUID", "SeriesInstanceUID")):
        return "it has no StudyInstanceUID or no SeriesInstanceUID"
    if header.SOPClassUID in _RESULTS:
        return f"{class_name(header)} is a result, no image"
    if _frame_count(header) > FRAMES_MAX:
        return f"it announces {_frame_count(header)} frames: NumberOfFrames is damaged"
    return _said_by_type(header, _NOT_SLIDES if header.SOPClassUID == uids.VLWholeSlideMicroscopyImageStorage else ())


def _said_by_type(header: Dataset, others: tuple[str, ...]) -> str:
    for kind in _kinds(header):
        if kind in _NOT_IMAGES or kind in others or kind.endswith(_NOT_IMAGES_OF_SIEMENS):
            return f"ImageType says {_shown(kind)}"
    return ""


def _add_slices(candidates: Candidates, path: Path, header: Dataset) -> None:
    for frame, flat in _frames(header):
        found = _slice(path, header, frame, flat)
        if isinstance(found, Slice):
            candidates.slices.append(found)
        else:
            candidates.leave(found, header)


def _add_image(candidates: Candidates, path: Path, header: Dataset) -> None:
    """Slices too where frames of another class have places and show values: an optical coherence tomography, exports
    as secondary captures. A single one stays an image."""
    if "PerFrameFunctionalGroupsSequence" in header or numbers(header, "ImagePositionPatient", 3):
        found = [_slice(path, header, frame, flat) for frame, flat in _frames(header)]
        if len(found) > 1 and all(isinstance(slice_, Slice) for slice_ in found):
            candidates.slices.extend(slice_ for slice_ in found if isinstance(slice_, Slice))
            return
    grouped = _is_grouped(header)
    count = _frame_count(header)
    class_uid, instance_uid = str(header.SOPClassUID), str(header.SOPInstanceUID)
    several = grouped or count > 1
    refs = tuple(SliceRef(class_uid, instance_uid, frame if several else None) for frame in range(1, count + 1))
    flat = flatten_first_frame(header) if grouped else header
    candidates.images.append(Planar((path,) * count, (flat,), flat, refs, _is_colour(header)))


def _frames(header: Dataset) -> Iterable[tuple[int | None, Dataset]]:
    if _is_grouped(header) or _frame_count(header) > 1:
        return FrameHeaders(header).items()
    return [(None, header)]


def _slice(path: Path, instance: Dataset, frame: int | None, header: Dataset) -> Slice | str:
    """A frame's place in the patient, or why it has none."""
    if reason := _said_by_type(header, ()):
        return reason
    technique = str(value_of(header, "VolumeBasedCalculationTechnique") or "").upper()
    if found := next((kind for kind in (*_kinds(header), technique) if kind in _PROJECTIONS), ""):
        return f"it is a projection or a rendering, no slice (ImageType says {found})"
    if _is_colour(header):
        return "it is a colour image of slices, which holds no measured values"
    position = numbers(header, "ImagePositionPatient", 3)
    orientation = numbers(header, "ImageOrientationPatient", 6)
    spacing = numbers(header, "PixelSpacing", 2)
    if not position or not orientation:
        return NO_POSITION
    row, column = orientation[:3], orientation[3:]
    if max(abs(_dot(row, row) - 1), abs(_dot(column, column) - 1), abs(_dot(row, column))) > PERPENDICULAR_TOLERANCE:
        return "ImageOrientationPatient is no pair of perpendicular directions"
    if frame is not None and "PerFrameFunctionalGroupsSequence" not in instance and _frame_count(instance) > 1:
        return f"its {_frame_count(instance)} frames have no positions of their own"
    if min(spacing, default=0) <= 0:
        return "it has no PixelSpacing"
    size = (int(header.Rows), int(header.Columns))
    return Slice(path, instance, header, frame, tuple(position), tuple(orientation), tuple(spacing), size)


def _dot(first: list[float], second: list[float]) -> float:
    return sum(one * other for one, other in zip(first, second, strict=True))


_tag_of = cache(Tag)


def value_of(header: Dataset, keyword: str) -> object:
    """The element's value, None where there is none; a third of what `Dataset.get` costs, and asked 100,000 times."""
    tag, tags = _tag_of(keyword), header.keys()
    return header[tag].value if tag in tags else None


def numbers(header: Dataset, keyword: str, count: int) -> list[float]:
    """The element's values when they are `count` finite numbers; else an empty list."""
    try:
        value = value_of(header, keyword)
        if value is None:
            return []
        parts: list[Any] = list(value) if isinstance(value, MultiValue | list) else [value]
        found = [float(part) for part in parts]
    except Exception:  # pydicom raises many kinds for a value that it cannot convert; the element then counts as absent
        return []
    return found if len(found) == count and all(map(math.isfinite, found)) else []


def class_name(header: Dataset) -> str:
    """The name of the header's SOP class."""
    uid = header.get("SOPClassUID")
    # A damaged length can make any text of the file part of the value: only what is a UID is shown.
    return UID(uid).name if isinstance(uid, str) and is_uid(uid) else "an unknown SOP class"


def _is_grouped(header: Dataset) -> bool:
    return "SharedFunctionalGroupsSequence" in header or "PerFrameFunctionalGroupsSequence" in header


def _is_colour(header: Dataset) -> bool:
    return (
        numbers(header, "SamplesPerPixel", 1) > [1.0]
        or value_of(header, "PhotometricInterpretation") == "PALETTE COLOR"
    )


def _frame_count(header: Dataset) -> int:
    return max(1, int((numbers(header, "NumberOfFrames", 1) or [1])[0]))


def _kinds(header: Dataset) -> list[str]:
    """The values of ImageType; the standard asks for two at least, scanners also send one."""
    value = value_of(header, "ImageType") or ()
    parts = value if isinstance(value, MultiValue | list | tuple) else (value,)
    return [str(kind).upper() for kind in parts]


def _shown(kind: str) -> str:
    return kind if kind in (*_NOT_IMAGES, *_NOT_SLIDES) else kind.rpartition(" ")[2]
