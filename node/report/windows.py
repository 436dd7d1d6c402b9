"""The window that an image is shown in, in the values that its modality LUT gives (PS3.3 C.11.1, C.11.2)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from node.dicom.realworld import read_rescale, read_unit, stored_range
from node.dicom.volume import Volume
from node.report.subject import Subject

_HU_RANGE = (-1150.0, 350.0)  # wide enough for lung and soft tissue


class Window(NamedTuple):
    """One window."""

    centre: float
    width: float
    function: str = ""  # VOI LUT Function; "" for the usual one


def read_modality(header: Dataset) -> tuple[float, float, str]:
    """Slope, intercept and the type of what they give (PS3.3 C.11.1)."""
    if "RescaleSlope" not in header and "RescaleIntercept" not in header:
        return 1.0, 0.0, "US"
    kind = header.get("RescaleType") or ("HU" if header.get("Modality") == "CT" else "US")
    return float(header.get("RescaleSlope") or 1), float(header.get("RescaleIntercept") or 0), str(kind)


def read_window(header: Dataset) -> Window | None:
    """The image's first window (PS3.3 C.11.2.1.2); None where it has none that is one."""
    try:
        centre, width = (
            float(value[0] if isinstance(value, MultiValue) else value)
            for value in (header.get("WindowCenter"), header.get("WindowWidth"))
        )
    except Exception:  # pydicom raises many kinds for values that it cannot convert; they count as absent
        return None
    function = str(header.get("VOILUTFunction") or "")
    least = 0 if function in ("LINEAR_EXACT", "SIGMOID") else 1  # C.11.2.1.2.1
    if not np.isfinite((centre, width)).all() or width <= 0 or width < least:
        return None
    return Window(centre, width, function if function in ("LINEAR", "LINEAR_EXACT", "SIGMOID") else "")


def usual_range(subject: Subject) -> tuple[float, float]:
    """Lowest and highest value to show, in the values of the source's array."""
    if isinstance(subject.source, Volume) and subject.source.unit == "HU":
        return _HU_RANGE
    low, high = np.percentile(subject.source.array[:: max(1, len(subject.source.array) // 32)], (1, 99.5))
    return float(low), float(high)


def window_of(subject: Subject, header: Dataset, low: float, high: float) -> Window:
    """A range of the source's values as a window of what the image's modality LUT gives."""
    uid = str(header.SOPInstanceUID)
    rescale = read_rescale(header, uid)
    if isinstance(subject.source, Volume):
        factor = read_unit(subject.sources[0], subject.sources)[1]
        low, high = low / factor, high / factor
    elif header.get("PhotometricInterpretation") == "MONOCHROME1":  # `read_image` has turned it over
        total = sum(rescale.bounds(*stored_range(header)))
        low, high = total - high, total - low
    if rescale.table is None:  # values may come from a real world value mapping, which is no modality LUT
        slope, intercept, _ = read_modality(header)
        low, high = (slope * (value - rescale.intercept) / rescale.slope + intercept for value in (low, high))
    low, high = sorted((low, high))
    width = high - low or 1.0
    # LINEAR is for whole values: half of one off, and one less wide (C.11.2.1.2.1). A PET in SUV spans few of them.
    function = "LINEAR_EXACT" if width < 256 else ""
    return Window(float(f"{(low + high) / 2:.6g}"), float(f"{width:.6g}"), function)
