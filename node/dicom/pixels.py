"""The voxels of planned volumes and images: decoded in parallel, in real-world units, one array each."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from node.dicom.assembly import ImagePlan, InputPlan, VolumePlan, shape_of
from node.dicom.decode import OpenInstance, open_instance
from node.dicom.frames import FrameHeaders
from node.dicom.realworld import (
    Rescale,
    Unit,
    clear_unused_bits,
    find_unscaled,
    padding_value,
    read_padding,
    read_rescale,
    read_unit,
    stored_range,
)
from node.dicom.volume import Image, SliceRef, Volume
from node.errors import InputRefused

THREADS = 4

# What models and reports may ask of a series beside its voxels; nothing here names the patient.
ATTRIBUTES = (
    "Manufacturer", "ManufacturerModelName", "BodyPartExamined", "PatientAge", "PatientSex",
    "PatientSize", "PatientWeight", "Laterality", "ImageLaterality", "ViewPosition", "KVP", "ConvolutionKernel",
    "ContrastBolusAgent", "EchoTime", "RepetitionTime", "MagneticFieldStrength",
)  # fmt: skip


def read_input(plan: InputPlan) -> Volume | Image:
    """The volume or the image of `plan`; raises as `read_volume` and `read_image` do."""
    return read_volume(plan) if isinstance(plan, VolumePlan) else read_image(plan)


def read_volume(plan: VolumePlan) -> Volume:
    """The volume of `plan`, float32 (slices, rows, columns), in the modality's unit.

    Each slice is its stored values times its own slope plus its own intercept, or by its own table (PS3.3 C.11.1).
    MONOCHROME1 changes nothing: it is about display, not about values. Padding becomes what `padding_value` says.
    Raises `InputRefused` for a slice that cannot be decoded, naming the instance and its transfer syntax, and for one
    without a rescale among others that have theirs; and, before anything is read, for what `check_memory` refuses.
    """
    unit, factor = read_unit(plan.header, plan.headers)
    check_memory(plan)
    array = np.empty(plan.grid.shape, np.float32)
    headers = _MultiFrames(plan.headers)
    padded: dict[int, float] = {}  # slices with padding, and the smallest measured value of each
    rescales = [Rescale()] * len(array)

    def read_slice(instance: OpenInstance, index: int) -> None:
        ref = plan.slices[index]
        rescales[index] = headers.rescale(instance, ref)
        smallest = _read_frame(instance, ref, rescales[index].scaled(factor), array[index])
        if smallest is not None:
            padded[index] = smallest

    _in_parallel(plan, read_slice)
    _check_scale(rescales, plan)
    _fill(array, padded, unit)
    return Volume(
        array=array,
        grid=plan.grid,
        slices=plan.slices,
        series_uid=plan.series_uid,
        study_uid=plan.study_uid,
        modality=plan.modality,
        unit=unit,
        name=plan.name,
        attributes=_attributes(plan.header),
        positions_lps=plan.positions_lps,
    )


def read_image(plan: ImagePlan) -> Image:
    """The frames of `plan`: RGB of 8 bits where it has colours, else float32, rescaled, and high is bright.

    MONOCHROME1 is turned over within the range of values that its bits allow (PS3.3 C.7.6.3.1.2): a model sees bright
    bone on every radiograph. Padding becomes dark. Raises as `read_volume` does.
    """
    check_memory(plan)
    frames, rows, columns = plan.shape
    colours = np.empty((frames, rows, columns, 3) if plan.colour else 0, np.uint8)
    grey = np.empty(0 if plan.colour else plan.shape, np.float32)
    headers = _MultiFrames(plan.headers)
    padded: dict[int, float] = {}
    rescales = [Rescale()] * frames

    def read_frame(instance: OpenInstance, index: int) -> None:
        ref = plan.frames[index]
        if plan.colour:
            values = instance.rgb(ref.frame or 1)
            if values.shape != (rows, columns, 3):
                raise InputRefused(f"instance {ref.sop_instance_uid} has pixel data of shape {values.shape}")
            colours[index] = values
            return
        rescales[index] = rescale = headers.rescale(instance, ref)
        smallest = _read_frame(instance, ref, rescale, grey[index])
        if instance.header.get("PhotometricInterpretation") == "MONOCHROME1":
            total = np.float32(sum(rescale.bounds(*stored_range(instance.header))))
            np.subtract(total, grey[index], out=grey[index])
            smallest = None if smallest is None else float(np.nanmin(grey[index], initial=total))
        if smallest is not None:
            padded[index] = smallest

    _in_parallel(plan, read_frame)
    _check_scale(rescales, plan)
    if not plan.colour:
        _fill(grey, padded, "")
    return Image(
        array=colours if plan.colour else grey,
        frames=plan.frames,
        series_uid=plan.series_uid,
        study_uid=plan.study_uid,
        modality=plan.modality,
        spacing_mm=image_spacing_mm(plan.header),
        attributes=_attributes(plan.header) | _window(plan.header),
    )


def check_memory(plan: InputPlan, most_bytes: int | None = None) -> None:
    """Raise `InputRefused` before anything is decoded of what takes more than `most_bytes`: half of the machine's.

    The other half is for the model, which has at least a copy.
    """
    most_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if most_bytes is None else most_bytes
    frames, rows, columns = shape_of(plan)
    is_colour = isinstance(plan, ImagePlan) and plan.colour
    need = frames * rows * columns * (3 if is_colour else np.dtype(np.float32).itemsize)
    if need > most_bytes:
        what = "slices" if isinstance(plan, VolumePlan) else "colour frames" if is_colour else "frames"
        raise InputRefused(
            f"its {frames} {what} of {rows} x {columns} pixels take {need / 1e9:.1f} GB of memory, and at most "
            f"{most_bytes / 1e9:.1f} GB (half of what this machine has) are given to one input"
        )


def _check_scale(rescales: Sequence[Rescale], plan: InputPlan) -> None:
    found = find_unscaled(rescales, plan.modality)
    if found is None:
        return
    index, lacks = found
    ref = plan.slices[index]
    frame = "" if ref.frame is None else f"frame {ref.frame} of "
    raise InputRefused(
        f"{frame}instance {ref.sop_instance_uid} has no {' and '.join(sorted(lacks, reverse=True))}, which other "
        "slices or frames have, so what its values mean is not known: have the series sent again"
    )


def _window(header: Dataset) -> dict[str, str]:
    """The display window of a grey image in the values of `read_image`, by keyword; nothing where it says none.

    Of several windows the first counts (PS3.3 C.11.2.1.2). It is turned over with a MONOCHROME1 image.
    """
    try:
        centre, width = (
            float(value[0] if isinstance(value, MultiValue) else value)
            for value in (header.get("WindowCenter"), header.get("WindowWidth"))
        )
    except Exception:  # pydicom raises many kinds for values that it cannot convert; they count as absent
        return {}
    if not np.isfinite((centre, width)).all() or width <= 0:
        return {}
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        centre = float(sum(read_rescale(header, str(header.SOPInstanceUID)).bounds(*stored_range(header)))) - centre
    return {"WindowCenter": f"{centre:.10g}", "WindowWidth": f"{width:.10g}"}


def image_spacing_mm(header: Dataset) -> tuple[float, float] | None:
    """Distance of rows and of columns of a planar image in the patient, as far as it says; None where it does not.

    A projection image has PixelSpacing when someone calibrated it, else ImagerPixelSpacing on the detector, divided by
    the magnification where it is known (PS3.3 10.7.1.3). Ultrasound has regions with deltas in cm (C.8.5.5): they count
    when all regions of two dimensions agree.
    """
    try:
        if spacing := header.get("PixelSpacing") or header.get("NominalScannedPixelSpacing"):
            row_mm, column_mm = (float(value) for value in spacing)
        elif spacing := header.get("ImagerPixelSpacing"):
            magnification = float(header.get("EstimatedRadiographicMagnificationFactor") or 1.0)
            row_mm, column_mm = (float(value) / magnification for value in spacing)
        else:
            regions = {
                (10 * abs(float(region.PhysicalDeltaY)), 10 * abs(float(region.PhysicalDeltaX)))
                for region in header.get("SequenceOfUltrasoundRegions") or ()
                if region.get("RegionSpatialFormat") == 1  # two dimensions: no trace of M-mode or Doppler
                and (region.get("PhysicalUnitsXDirection"), region.get("PhysicalUnitsYDirection")) == (3, 3)  # cm
            }
            if len(regions) != 1:
                return None
            row_mm, column_mm = regions.pop()
    except Exception:  # pydicom raises many kinds for values that it cannot convert; they count as absent
        return None
    spacing_mm = row_mm, column_mm
    return spacing_mm if np.isfinite(spacing_mm).all() and min(spacing_mm) > 0 else None


def _in_parallel(plan: InputPlan, read: Callable[[OpenInstance, int], None]) -> None:
    """Call `read` with every slice's open instance and index; each file is opened once.

    Files are read side by side, or the frames of the only file are. What goes wrong with one is an `InputRefused`.
    """
    paths, slices = plan.paths, plan.slices
    known = {str(header.SOPInstanceUID): header for header in plan.headers}
    indices: dict[Path, list[int]] = {}
    for index, path in enumerate(paths):
        indices.setdefault(path, []).append(index)

    def open_one(path: Path) -> AbstractContextManager[OpenInstance]:
        uid = slices[indices[path][0]].sop_instance_uid
        return open_instance(path, uid, known.get(uid))

    def read_one(instance: OpenInstance, index: int) -> None:
        try:
            read(instance, index)
        except (InputRefused, MemoryError):
            raise
        except Exception as error:  # of as many kinds as there are ways to damage a table or a number
            raise InputRefused(
                f"the values of instance {slices[index].sop_instance_uid} cannot be made of its pixel data: "
                f"{type(error).__name__}"
            ) from error

    def read_file(path: Path) -> None:
        with open_one(path) as instance:
            for index in indices[path]:
                read_one(instance, index)

    with ThreadPoolExecutor(THREADS) as pool:
        if len(indices) > 1:
            list(pool.map(read_file, indices))
        else:
            with open_one(paths[0]) as instance:
                list(pool.map(lambda index: read_one(instance, index), range(len(slices))))


class _MultiFrames:
    """The rescale of single-frame instances and of frames."""

    def __init__(self, headers: Sequence[Dataset]):
        self._headers = {
            str(header.SOPInstanceUID): (header, FrameHeaders(header))
            for header in headers
            if "SharedFunctionalGroupsSequence" in header or "PerFrameFunctionalGroupsSequence" in header
        }

    def rescale(self, instance: OpenInstance, ref: SliceRef) -> Rescale:
        """That of one slice."""
        if ref.frame is None or ref.sop_instance_uid not in self._headers:
            return read_rescale(instance.header, ref.sop_instance_uid)
        header, frames = self._headers[ref.sop_instance_uid]
        own = (header.get("PerFrameFunctionalGroupsSequence") or ())[ref.frame - 1 : ref.frame]
        for groups in (*own, *(header.get("SharedFunctionalGroupsSequence") or ())):
            # Asked for here because a flattened header leaves out a number that is none.
            for item in groups.get("PixelValueTransformationSequence") or ():
                return read_rescale(item, ref.sop_instance_uid)
        return read_rescale(frames[ref.frame], ref.sop_instance_uid)


def _read_frame(instance: OpenInstance, ref: SliceRef, rescale: Rescale, out: NDArray[np.float32]) -> float | None:
    """Write a frame's real-world values to `out`, NaN where it is padding.

    Returns the smallest value that is none (infinity where all are), or None without padding.
    """
    stored = instance.stored(ref.frame or 1)
    if stored.shape != out.shape:
        raise InputRefused(f"instance {ref.sop_instance_uid} has pixel data of shape {stored.shape}")
    padding = read_padding(instance.header)
    # Scanners pad 12-bit images with -2000, too: that is to be seen only before the upper bits are cleared.
    early = padding is not None and not padding.within(*stored_range(instance.header))
    where = padding.find(stored) if padding is not None and early else None
    stored = clear_unused_bits(stored, instance.header)
    if padding is not None and not early:
        where = padding.find(stored)
    rescale.apply(stored, out)
    if not np.isfinite((out.min(), out.max())).all():  # either is NaN where one value is
        raise InputRefused(
            f"the values of instance {ref.sop_instance_uid} are beyond all numbers: its RescaleSlope or "
            "RescaleIntercept is wrong"
        )
    if where is None or not where.any():
        return None
    smallest = float(out.min(where=~where, initial=np.inf))
    out[where] = np.nan
    return smallest


def _fill(array: NDArray[np.float32], padded: dict[int, float], unit: Unit) -> None:
    """Give padded voxels their value; `padded` holds the slices that have any and their smallest other values."""
    if not padded:
        return
    whole = (float(array[index].min()) for index in range(len(array)) if index not in padded)
    smallest = min([*padded.values(), *whole])
    value = padding_value(unit, smallest if np.isfinite(smallest) else 0.0)
    for index in padded:
        array[index][np.isnan(array[index])] = value


def _attributes(header: Dataset) -> dict[str, str]:
    return {keyword: text for keyword in ATTRIBUTES if (text := str(header.get(keyword) or "").strip())}
