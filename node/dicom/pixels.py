"""The voxels of a planned volume: decoded in parallel, rescaled, one float array."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import UID, ImplicitVRLittleEndian

from node.dicom.assembly import VolumePlan
from node.dicom.identity import is_uid
from node.dicom.volume import Volume
from node.errors import InputRefused

THREADS = 4


def read_volume(plan: VolumePlan) -> Volume:
    """The volume of `plan`, float32, in the modality's unit.

    Each slice is its stored values times its own slope plus its own intercept (PS3.3 C.11.1).
    Raises `InputRefused` for a slice that cannot be decoded, naming its transfer syntax.
    """
    array = np.empty(plan.grid.shape, np.float32)

    def read_slice(index: int) -> None:
        array[index] = _read_slice(plan, index)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read_slice, range(len(plan.paths))))
    unit = _unit(plan.header)
    return Volume(array, plan.grid, plan.slices, plan.series_uid, plan.study_uid, plan.modality, unit, plan.name)


def _unit(header: Dataset) -> Literal["HU", "SUVbw", "Bq/ml", ""]:
    """What the rescaled values are (PS3.3 C.8.2.1, C.8.9.1); GML without SUVType is SUV by body weight."""
    match header.get("Modality"), header.get("RescaleType") or "HU", header.get("Units"), header.get("SUVType") or "BW":
        case "CT", "HU", _, _:
            return "HU"
        case "PT", _, "GML", "BW":
            return "SUVbw"
        case "PT", _, "BQML", _:
            return "Bq/ml"
    return ""


def _read_slice(plan: VolumePlan, index: int) -> NDArray[np.float32]:
    try:
        dataset = dcmread(plan.paths[index], force=True)
        if (
            "TransferSyntaxUID" not in dataset.file_meta
        ):  # files without file meta information are implicit VR (PS3.5 10)
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        stored = dataset.pixel_array
    except Exception as error:  # the decoders raise many kinds
        syntax = getattr(plan.headers[index].get("file_meta", None), "TransferSyntaxUID", None)
        # What is no UID may be any text of a damaged file.
        name = syntax.name if isinstance(syntax, UID) and is_uid(syntax) else "an unknown transfer syntax"
        uid = plan.slices[index].sop_instance_uid
        raise InputRefused(
            f"the pixel data of instance {uid} ({name}) cannot be decoded: {type(error).__name__}"
        ) from error
    if stored.shape != plan.grid.shape[1:]:
        raise InputRefused(f"instance {plan.slices[index].sop_instance_uid} has pixel data of shape {stored.shape}")
    try:
        slope = float(dataset.get("RescaleSlope") or 1.0)
        intercept = float(dataset.get("RescaleIntercept") or 0.0)
    except Exception:  # as many kinds as pydicom has converters
        slope = intercept = np.nan
    if not np.isfinite((slope, intercept)).all():
        raise InputRefused(
            f"RescaleSlope or RescaleIntercept of instance {plan.slices[index].sop_instance_uid} is no number"
        )
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
