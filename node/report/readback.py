"""A DICOM SEG back to a label map on the grid of the images that it refers to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydicom.dataset import Dataset

from node.dicom.volume import Volume
from node.errors import InputRefused
from node.infer.results import Labelmap


def read_labelmap(seg: Dataset, volume: Volume, labels: Sequence[int]) -> Labelmap:
    """The label map of a BINARY or LABELMAP segmentation (PS3.3 A.51) whose frames refer to slices of `volume`.

    `labels` are the model's label values of segments 1, 2 and so on, as `make_seg` numbered them.
    Frames find their slice by the source image that they derive from, never by their order. Raises `InputRefused` for
    a frame that refers to an image outside the volume, or has another size.
    """
    index = {(ref.sop_instance_uid, ref.frame): number for number, ref in enumerate(volume.slices)}
    frames = np.atleast_3d(seg.pixel_array) if seg.NumberOfFrames == 1 else seg.pixel_array
    frames = frames.reshape(int(seg.NumberOfFrames), seg.Rows, seg.Columns)
    if frames.shape[1:] != volume.grid.shape[1:]:
        raise InputRefused(f"the SEG has frames of {frames.shape[1:]}, the image {volume.grid.shape[1:]}")
    labelmap = np.zeros(volume.grid.shape, np.uint16)
    for frame, groups in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        source = groups.DerivationImageSequence[0].SourceImageSequence[0]
        uid = str(source.ReferencedSOPInstanceUID)
        number = index.get((uid, None))
        if number is None and "ReferencedFrameNumber" in source:
            number = index.get((uid, int(source.ReferencedFrameNumber)))
        if number is None:
            raise InputRefused(f"the SEG refers to image {uid}, which is not in the volume")
        if seg.SegmentationType == "LABELMAP":
            labelmap[number] = np.array([0, *labels], np.uint16)[frame]
        else:
            segment = int(groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
            labelmap[number][frame > 0] = labels[segment - 1]
    return Labelmap(labelmap, volume.grid)
