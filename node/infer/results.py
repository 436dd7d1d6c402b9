"""What a model returns: results in the input's own geometry, and the checks that every result passes.

A prediction is one of five kinds. Labels and classes are the numbers that the manifest gives meanings to.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from node.dicom.volume import Grid
from node.errors import OutputRefused

Certainties = dict[int, NDArray[np.uint8]]  # label to its probabilities on the labels' grid, 255 for certain
_THREADS = min(4, len(os.sched_getaffinity(0)))  # that copy one array
NO_PROBABILITIES = "Probabilities are not available: the network's values are not from 0 to 1."


@dataclass(frozen=True)
class Labelmap:
    """Mutually exclusive labels on the input's own grid."""

    array: NDArray[np.uint16]  # (slices, rows, columns), of a planar image (frames, rows, columns); 0 is background
    grid: Grid | None  # None for a planar image
    input: str = "image"  # the manifest's input whose grid this is
    remarks: tuple[str, ...] = field(default=())  # what the run wants said with the result
    # Label to its probability on the same grid, 255 for certain; None unless asked for and the model has them.
    probabilities: Mapping[int, NDArray[np.uint8]] | None = None


@dataclass(frozen=True)
class Box:
    """One detection: a box along the axes of the patient."""

    label: int  # of the manifest's `classes`
    score: float  # 0 to 1
    low_lps: tuple[float, float, float]  # the corner with the smallest coordinates, mm
    high_lps: tuple[float, float, float]  # the opposite corner, mm

    @property
    def centre_lps(self) -> tuple[float, float, float]:
        """Its middle, mm."""
        x, y, z = ((low + high) / 2 for low, high in zip(self.low_lps, self.high_lps, strict=True))
        return x, y, z


@dataclass(frozen=True)
class Boxes:
    """Detections in patient space, the most probable first; none is a result too."""

    boxes: tuple[Box, ...]
    input: str = "image"
    remarks: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Landmark:
    """One point that the model found on one slice or frame."""

    label: int  # of the manifest's `classes`
    frame: int  # index of the slice or frame in the input's array
    row: float  # in pixels, the centre of the first pixel is (0, 0)
    column: float
    score: float | None = None


@dataclass(frozen=True)
class Landmarks:
    """Points in the pixels of the input's slices or frames."""

    points: tuple[Landmark, ...]
    input: str = "image"
    remarks: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Scores:
    """A classification of the whole input, or of each frame of a planar image."""

    values: tuple[Mapping[int, float], ...]  # class to probability, 0 to 1; one for the input, or one per frame
    exclusive: bool = True  # whether exactly one class holds (softmax) or each by itself (sigmoid)
    input: str = "image"
    remarks: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class DicomObjects:
    """Finished DICOM objects that the model itself wrote, checked and under UIDs of this job; none is a result too."""

    datasets: tuple[Dataset, ...]  # with their file meta information, in an order that the job's repetition gives too
    input: str = "image"  # the manifest's first input: its study is theirs
    record: Mapping[str, Any] = field(default_factory=dict)  # what a mercure module wrote to result.json
    remarks: tuple[str, ...] = field(default=())


Prediction = Labelmap | Boxes | Landmarks | Scores | DicomObjects


def sparse_zeros(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Zeros that take memory only where something else is written: `np.zeros` may clear memory that was used before."""
    size = int(np.prod(shape, dtype=np.int64))
    # A shared mapping, which is the default, would be filled by reading it.
    private = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(private, np.uint8, size).reshape(shape)


def keep_sparse(array: NDArray[Any]) -> NDArray[np.uint8]:
    """A map of probabilities in memory that is taken only where it is not 0: an organ fills a few of a body's slices.

    `array` has values from 0 to 255, which are rounded.
    """
    array = in_order(array)
    sparse = sparse_zeros(array.shape)
    first, stop = filled_slices(array)
    for index in range(first, stop):
        sparse[index] = array[index] if array.dtype == np.uint8 else np.rint(array[index])
    return sparse


def filled_slices(array: NDArray[Any]) -> tuple[int, int]:
    """From and up to which slice a map has values other than 0; (0, 0) where it has none."""
    slices = np.flatnonzero([bool(plane.any()) for plane in array])
    return (int(slices[0]), int(slices[-1]) + 1) if slices.size else (0, 0)


def check_labelmap(
    array: NDArray[np.number], grid: Grid | tuple[int, int, int], labels: Mapping[int, str]
) -> NDArray[np.uint16]:
    """The label map as uint16 when it is one, else `OutputRefused`.

    `grid` is the input's, or the shape of a planar image (frames, rows, columns).
    `labels` are the values that the manifest declares. Refused are: another shape than the grid's, values that are not
    finite or not whole (a label map that was interpolated linearly invents labels), values that the manifest does not
    know, and a map without any background.
    """
    shape = grid.shape if isinstance(grid, Grid) else grid
    if array.shape != shape:
        raise OutputRefused(f"the model returned a map of shape {array.shape}, the input's grid is {shape}")
    labelled = np.empty(array.shape, np.uint16)

    def take(piece: NDArray[Any], place: NDArray[Any]) -> bool:
        with np.errstate(invalid="ignore"):
            whole = piece.astype(np.uint16)
        place[...] = whole
        return bool((whole == piece).all())

    if not all(_by_pieces(take, array, labelled)):
        raise OutputRefused(_explain_values(array))
    check_labels(labelled, labels)
    return labelled


def check_labels(array: NDArray[np.unsignedinteger], labels: Iterable[int]) -> None:
    """Refuse values that are none of `labels`, and a map without any background. It looks at single values only where
    the largest one does not say all: 0.01 s for 400x512x512, `np.unique` 0.8 s.
    """
    declared = sorted(labels)
    highest = int(array.max(initial=0))
    if highest > len(declared) or declared[:highest] != list(range(1, highest + 1)):
        seen: set[int] = set()
        for plane in array:  # a plane at a time, and only where a run of one label begins: bincount wants 64 bits each
            voxels = plane.reshape(-1)
            starts = np.flatnonzero(voxels[1:] != voxels[:-1]) + 1
            seen.update(np.flatnonzero(np.bincount(voxels[starts])).tolist(), voxels[:1].tolist())
        if unknown := sorted(seen - {0, *declared}):
            raise OutputRefused(f"the model returned labels {unknown[:10]} that dicom.yaml does not declare")
    if array.size and array.min() > 0:
        raise OutputRefused("the model marked every voxel of the image: no result is made of that")


def _explain_values(array: NDArray[np.number]) -> str:
    """Why values are no labels (0 to 65535)."""
    if not np.isfinite(array).all():
        return "the model returned values that are not finite (NaN or infinity)"
    values = np.unique(array)
    if (fractional := values[values != np.round(values)]).size:
        return (
            f"the model returned fractional labels (such as {fractional[0]:.3f}): a label map was interpolated "
            "linearly; set the inversion to nearest in dicom.yaml's overrides"
        )
    beyond = [int(value) for value in values if not 0 <= value <= np.iinfo(np.uint16).max]
    return f"the model returned labels {beyond[:10]} that dicom.yaml does not declare"


def in_order(array: NDArray[Any]) -> NDArray[Any]:
    """An array in C order; itself where it is that.

    One whose axes are reversed, as they are between MONAI's (x, y, z) and (slices, rows, columns), is copied piece by
    piece: 0.1 s for 400x512x512 float32, where `np.ascontiguousarray` strides through the memory for 0.9 s.
    """
    if array.ndim != 3 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    ordered = np.empty(array.shape, array.dtype)

    def copy(piece: NDArray[Any], place: NDArray[Any]) -> bool:
        place[...] = piece
        return True

    _by_pieces(copy, array, ordered)
    return ordered


def _by_pieces(
    work: Callable[[NDArray[Any], NDArray[Any]], bool], array: NDArray[Any], result: NDArray[Any]
) -> list[bool]:
    """What `work` says of each piece of `array` and the same piece of `result`, in threads. A piece is one place on the
    axis in the middle of `array`'s memory, in the order of that memory: it fits the processor's cache, whose lines are
    used whole in both arrays.
    """
    order = sorted(range(3), key=lambda axis: -abs(array.strides[axis]))
    forward = tuple(slice(None, None, -1 if array.strides[axis] < 0 else 1) for axis in order)
    here, there = array.transpose(order)[forward], result.transpose(order)[forward]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda index: work(here[:, index], there[:, index]), range(here.shape[1])))
