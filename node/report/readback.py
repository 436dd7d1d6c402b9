"""A DICOM SEG back to a label map on the grid of the images that it refers to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydicom.dataset import Dataset

from node.dicom.volume import Image, Volume
from node.errors import InputRefused
from node.infer.results import Labelmap


def read_labelmap(seg: Dataset, source: Volume | Image, labels: Sequence[int]) -> Labelmap:
    """The label map of a BINARY or LABELMAP segmentation (PS3.3 A.51) whose frames refer to slices of `source`.

    `labels` are the model's label values of segments 1, 2 and so on, as `make_seg` numbered them.
    Frames find their slice by the source image that they derive from, never by their order. Raises `InputRefused` for
    a frame that refers to none or to an image outside the source, or has another size.
    """
    slices, grid = (source.slices, source.grid) if isinstance(source, Volume) else (source.frames, None)
    shape = source.array.shape[:3]
    index = {(ref.sop_instance_uid, ref.frame): number for number, ref in enumerate(slices)}
    frames = seg.pixel_array.reshape(int(seg.NumberOfFrames), seg.Rows, seg.Columns)
    if frames.shape[1:] != shape[1:]:
        raise InputRefused(f"the SEG has frames of {frames.shape[1:]}, the image {shape[1:]}")
    labelmap = np.zeros(shape, np.uint16)
    (shared,) = seg.SharedFunctionalGroupsSequence
    for frame, groups in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        number = _slice_of(groups, index)
        if seg.SegmentationType == "LABELMAP":
            labelmap[number] = np.array([0, *labels], np.uint16)[frame]
        else:
            # A SEG of one segment may say so once for all frames.
            identification = groups if "SegmentIdentificationSequence" in groups else shared
            segment = int(identification.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
            labelmap[number][frame > 0] = labels[segment - 1]
    return Labelmap(labelmap, grid)


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
