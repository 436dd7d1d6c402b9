"""A DICOM SEG back to a label map on the grid of the images that it refers to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels import iter_pixels

from node.dicom.volume import Image, Volume
from node.errors import InputRefused
from node.infer.results import Labelmap


def read_labelmap(seg: Dataset, source: Volume | Image, labels: Sequence[int]) -> Labelmap:
    """The label map of a segmentation of any form (PS3.3 A.51, A.90) whose frames refer to slices of `source`.

    `labels` are the model's label values of segments 1, 2 and so on, as `make_seg` numbered them. Of a FRACTIONAL one
    a voxel is of the segment that is at least half there, and most of all where several are.
    Frames find their slice by the source image that they derive from, never by their order. Raises `InputRefused` for
    a frame that refers to none or to an image outside the source, or has another size.
    """
    slices, grid = (source.slices, source.grid) if isinstance(source, Volume) else (source.frames, None)
    shape = source.array.shape[:3]
    index = {(ref.sop_instance_uid, ref.frame): number for number, ref in enumerate(slices)}
    if (seg.Rows, seg.Columns) != shape[1:]:
        raise InputRefused(f"the SEG has frames of {(seg.Rows, seg.Columns)}, the image {shape[1:]}")
    labelmap = np.zeros(shape, np.uint16)
    (shared,) = seg.SharedFunctionalGroupsSequence
    form = seg.SegmentationType
    # The fraction that is the segment's at each voxel; of a BINARY one all or nothing.
    strongest = np.zeros(shape, np.uint8) if form == "FRACTIONAL" else None
    half = (int(seg.MaximumFractionalValue) + 1) // 2 if form == "FRACTIONAL" else 1
    for frame, groups in zip(_frames(seg), seg.PerFrameFunctionalGroupsSequence, strict=True):
        number = _slice_of(groups, index)
        if form == "LABELMAP":
            labelmap[number] = np.array([0, *labels], np.uint16)[frame]
            continue
        # A SEG of one segment may say so once for all frames.
        identification = groups if "SegmentIdentificationSequence" in groups else shared
        segment = int(identification.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        inside = frame >= half
        if strongest is not None:
            inside &= frame > strongest[number]
            strongest[number][inside] = frame[inside]
        labelmap[number][inside] = labels[segment - 1]
    return Labelmap(labelmap, grid)


def _frames(seg: Dataset) -> Iterable[NDArray[np.integer]]:
    """The frames (rows, columns) one by one: a hundred segments of a long CT are gigabytes of unpacked bits."""
    if seg.BitsAllocated == 1 and seg.Rows * seg.Columns % 8:
        # pydicom 3.0 finds single frames of bits only where they start with a byte.
        return seg.pixel_array.reshape(int(seg.NumberOfFrames), seg.Rows, seg.Columns)
    return iter_pixels(seg, raw=True)


def _slice_of(groups: Dataset, index: dict[tuple[str, int | None], int]) -> int:
    """The array index of the slice or frame that a frame derives from."""
    derivations = groups.get("DerivationImageSequence") or ()
    sources = [source for derivation in derivations for source in derivation.get("SourceImageSequence") or ()]
    if len(sources) != 1:
        raise InputRefused(f"a frame of the SEG refers to {len(sources)} images, not to one")
    uid = str(sources[0].ReferencedSOPInstanceUID)
    frame = sources[0].get("ReferencedFrameNumber")
    # A single-frame instance may be referred to as its frame 1.
    for place in ((uid, None if frame is None else int(frame)), (uid, None)):
        if place in index:
            return index[place]
    raise InputRefused(f"the SEG refers to image {uid}, which is not in the volume")
