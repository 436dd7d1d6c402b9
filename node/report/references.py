"""References to the images and frames that a result is of (PS3.3 table 10-3)."""

from __future__ import annotations

from collections.abc import Iterable

from pydicom.dataset import Dataset

from node.dicom.volume import SliceRef


def frames_by_instance(refs: Iterable[SliceRef]) -> dict[tuple[str, str], list[int]]:
    """The frames of each instance, by its SOP class and its UID, in their order; none of an instance without frames."""
    frames: dict[tuple[str, str], list[int]] = {}
    for ref in refs:
        numbers = frames.setdefault((ref.sop_class_uid, ref.sop_instance_uid), [])
        numbers += [] if ref.frame is None else [ref.frame]
    return frames


def refer_to(refs: Iterable[SliceRef]) -> list[Dataset]:
    """An item for each instance, with its frames."""
    items = []
    for (sop_class_uid, sop_instance_uid), numbers in frames_by_instance(refs).items():
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class_uid, sop_instance_uid
        if numbers:
            item.ReferencedFrameNumber = numbers if len(numbers) > 1 else numbers[0]
        items.append(item)
    return items
