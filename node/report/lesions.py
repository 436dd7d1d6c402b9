"""A label whose connected parts are findings of their own: each becomes a segment, numbered by volume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from node.dicom.volume import Image, Volume
from node.infer.manifest import Segment
from node.report.measure import voxel_volumes_mm3
from node.report.parts import find_parts
from node.report.subject import Subject

MOST = 50  # lesions of one label that are segments of their own
_TOUCHING = np.ones((3, 3, 3), bool)  # 26 neighbours
_TOUCHING_ON_FRAME = np.zeros((3, 3, 3), bool)  # 8 neighbours, and none on other frames
_TOUCHING_ON_FRAME[1] = True
_NAME_LENGTH = 64  # SegmentLabel is LO


def split_lesions(subject: Subject) -> Subject:
    """The subject with a label map and a manifest in which every lesion is a segment; itself where none is asked for.

    Of a segment with `each_lesion`, parts that touch (26 neighbours; 8 on each frame of a planar image) are one lesion.
    Lesions are numbered by volume, the largest first, of equal ones the one that comes first in the array; labels are
    numbered anew from 1 in the order of the manifest's, lesions in the place of theirs. Beyond `MOST`, the smaller ones
    share one segment; those below `lesion_min_ml` are left out. Both are said among the prediction's remarks. A segment
    without any lesion stays, with nothing in it.
    """
    manifest, labelmap = subject.manifest, subject.labelmap
    if not any(segment.each_lesion for segment in manifest.segments.values()):
        return subject
    array = np.zeros_like(labelmap.array)
    boxes = ndimage.find_objects(labelmap.array, max_label=max(manifest.segments))
    segments: dict[int, Segment] = {}
    origin: dict[int, int] = {}  # new label to the model's
    lesions: set[int] = set()  # those of the new labels that are one
    remarks: list[str] = []
    for label, segment in sorted(manifest.segments.items()):
        box = boxes[label - 1]
        if box is None or not segment.each_lesion:
            origin[len(segments) + 1] = label
            segments[len(segments) + 1] = segment
            if box is not None:
                array[box][labelmap.array[box] == label] = len(segments)
            continue
        split = _split(subject.source, labelmap.array, label, box, segment)
        array[box] += np.where(split.ranks > 0, split.ranks + len(segments), 0).astype(np.uint16)
        for name in split.names:
            lesions.add(len(segments) + 1)
            origin[len(segments) + 1] = label
            segments[len(segments) + 1] = segment.model_copy(
                update={"name": name, "each_lesion": False, "lesion_min_ml": None}
            )
        remarks += split.remarks
    probabilities = labelmap.probabilities
    prediction = replace(
        labelmap,
        array=array,
        remarks=(*labelmap.remarks, *remarks),
        probabilities=None if probabilities is None else _OfLesions(probabilities, array, origin, lesions),
    )
    return replace(subject, prediction=prediction, manifest=manifest.model_copy(update={"segments": segments}))


@dataclass(frozen=True)
class _Split:
    """One label's lesions."""

    ranks: NDArray[np.uint16]  # in the label's box: 1 for the largest lesion, 0 for what is none
    names: tuple[str, ...]  # of ranks 1, 2, ...; at least one
    remarks: tuple[str, ...]


def _split(
    source: Volume | Image, labels: NDArray[np.uint16], label: int, box: tuple[slice, ...], segment: Segment
) -> _Split:
    touching = _TOUCHING if isinstance(source, Volume) else _TOUCHING_ON_FRAME
    numbers, count = find_parts(labels[box] == label, touching)
    sizes = _sizes(source, numbers, count, box[0])
    order = np.argsort(-sizes, kind="stable")
    remarks = []
    if segment.lesion_min_ml is not None:
        order = order[sizes[order] >= segment.lesion_min_ml * 1000]
        if left_out := count - len(order):
            remarks.append(f"{segment.name}: {_parts(left_out)} below {segment.lesion_min_ml:g} mL left out")
    kept = min(len(order), MOST)
    rank_of = np.zeros(count + 1, np.uint16)
    rank_of[order + 1] = np.minimum(np.arange(1, len(order) + 1), MOST + 1)
    names = [_name(segment.name, f" {rank}") for rank in range(1, kept + 1)] or [segment.name]
    if len(order) > MOST:
        names.append(_name(segment.name, ", smaller"))
        remarks.append(
            f"{segment.name}: {_parts(len(order))} found; the {len(order) - MOST} smallest share the segment "
            f"{names[-1]!r}"
        )
    return _Split(rank_of[numbers], tuple(names), tuple(remarks))


def _sizes(source: Volume | Image, numbers: NDArray[np.int32], count: int, slices: slice) -> NDArray[np.float64]:
    """The volume of each part in mm3, in a planar image its pixels; the first one's first."""
    slice_mm3 = voxel_volumes_mm3(source) if isinstance(source, Volume) else np.ones(source.array.shape[0])
    sizes = np.zeros(count + 1)
    for part, voxel_mm3 in zip(numbers, slice_mm3[slices], strict=True):
        sizes += np.bincount(part.ravel(), minlength=count + 1) * voxel_mm3
    # Sums in another order differ in the last digits: lesions of as many like voxels have one size.
    return np.array([float(f"{size:.9g}") for size in sizes[1:]])


def _name(name: str, suffix: str) -> str:
    return name[: _NAME_LENGTH - len(suffix)] + suffix


def _parts(count: int) -> str:
    return f"{count} lesion{'s' * (count > 1)}"


class _OfLesions(Mapping[int, NDArray[np.uint8]]):
    """The probabilities of lesions: the label's within the lesion and none elsewhere.

    Made when asked for: of fifty lesions at once they would take fifty times the image.
    """

    def __init__(
        self,
        whole: Mapping[int, NDArray[np.uint8]],
        labels: NDArray[np.uint16],
        origin: Mapping[int, int],
        lesions: AbstractSet[int],
    ) -> None:
        self._whole, self._labels, self._lesions = whole, labels, lesions
        self._origin = {label: source for label, source in origin.items() if source in whole}

    def __getitem__(self, label: int) -> NDArray[np.uint8]:
        probability = self._whole[self._origin[label]]
        return np.where(self._labels == label, probability, np.uint8(0)) if label in self._lesions else probability

    def __iter__(self) -> Iterator[int]:
        return iter(self._origin)

    def __len__(self) -> int:
        return len(self._origin)
