"""Inverting a network's result to the source grid without holding every class there.

MONAI's `Invertd` resamples all classes to the source grid in float64, with three coordinates per voxel (512 × 512 ×
600: 1.3 GB per class and 3.8 GB of coordinates), before `AsDiscreted` takes the largest. Here a few classes at a time
go through the bundle's own inverse, its resampling step runs over blocks of the source grid, and only the best value
so far and its label are kept. The numbers are MONAI's: the same coordinates, the same interpolation, the same float32.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.compose import Compose
from monai.transforms.inverse import InvertibleTransform
from monai.transforms.post.dictionary import Invertd
from monai.utils import TraceKeys

from node.infer.reduce import activate, label_dtype, quantise
from node.infer.resampling import Resampling, part_of, resampler_of, row_blocks

_CLASS_BYTES = 512 * 2**20  # of the classes that are resampled together, in the type that resampling computes in
_BLOCK_BYTES = 256 * 2**20  # of the coordinates and values of one block of the source grid

# Inverses that only move voxels, cut them off or put zeros beside them: taking the largest class before them or after
# them gives the same labels, for zeros in every class are label 0.
_CROPPING = frozenset(("Crop", "SpatialCrop", "CenterSpatialCrop", "CropForeground", "ResizeWithPadOrCrop"))  # zeros
_MOVING = _CROPPING | {"Orientation", "Flip", "Rotate90", "Pad", "SpatialPad", "BorderPad", "DivisiblePad"}
# Inverses that treat every channel by itself, so that a few of them may go through at a time.
_BY_CHANNEL = _MOVING | {"SpatialResample", "Resize", "Zoom", "Rotate", "Affine"}


@dataclass(frozen=True)
class Reduction:
    """What becomes of the classes; `labels` and `masks` as in MONAI's `AsDiscrete(argmax=)` and `(threshold=)`."""

    # "labels", "masks", or the classes themselves: "values" (float32), "kept" (in their type), "certainties" (as uint8,
    # 255 for 1).
    kind: str
    after: str = "none"  # activation of the values on the source grid: "none" or "sigmoid"
    threshold: float = 0.5  # masks are 1 where the value is at least this


class ChunkedInvertd(Invertd):
    """MONAI's `Invertd` in bounded memory: same arguments, same values, for label maps with `nearest_interp=True`.

    Labels keep their integer type; other values are float32. `remarks` says when a preprocessing that is not known
    here made it necessary to invert all channels at once.
    """

    def __init__(
        self,
        keys: Any,
        transform: InvertibleTransform,
        *args: Any,
        dtype: torch.dtype | None = None,
        class_bytes: int = _CLASS_BYTES,
        block_bytes: int = _BLOCK_BYTES,
        **kwargs: Any,
    ):
        """`dtype` of the result (the smallest that holds it by default); the two sizes bound the working memory."""
        super().__init__(keys, transform, *args, **kwargs)
        self.dtype = dtype
        self.remarks: list[str] = []
        kind = "kept" if all(self.nearest_interp) else "values"
        self._inverse = _ReducedInverse(transform, Reduction(kind), class_bytes, block_bytes, self.remarks)
        self.transform = self._inverse  # what Invertd's own __call__ inverts by

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.remarks.clear()
        item = super().__call__(data)
        if self.dtype is not None:
            for key in self.key_iterator(item):
                item[key] = item[key].to(self.dtype)
        return item

    @property
    def original(self) -> InvertibleTransform:
        """The preprocessing whose inverse this is."""
        return self._inverse.original


class InvertCertaintiesd(ChunkedInvertd):
    """Probabilities (0 to 1) on the network's grid to probabilities on the source's as uint8, 255 for certain."""

    def __init__(self, keys: Any, transform: InvertibleTransform, *, orig_keys: str, after: str = "none"):
        """`after` is the activation on the source's grid, for values that were interpolated before it."""
        super().__init__(keys, transform, orig_keys=orig_keys, nearest_interp=False)
        self._inverse.reduction = Reduction("certainties", after)


class ChunkedInvertArgmaxd(ChunkedInvertd):
    """[`Activationsd`] → `Invertd` → [`Activationsd`] → `AsDiscreted` as one step, or argmax → `Invertd`(nearest).

    Of equal values the first class wins, as with `argmax`; a NaN wins over every number, as with `argmax`.
    """

    def __init__(
        self,
        keys: Any,
        transform: InvertibleTransform,
        *args: Any,
        activation: str = "none",
        activation_after: str = "none",
        threshold: float | None = None,
        argmax_first: bool = False,
        **kwargs: Any,
    ):
        """`threshold` gives one mask per class (uint8) in place of labels.

        `activation` (none, softmax, sigmoid) is applied before the inversion, in place, `activation_after` (none,
        sigmoid) after it. `argmax_first` takes the labels on the network's grid. `ValueError` where these contradict.
        """
        super().__init__(keys, transform, *args, **kwargs)
        if activation not in ("none", "softmax", "sigmoid") or activation_after not in ("none", "sigmoid"):
            raise ValueError(f"activation {activation!r} before and {activation_after!r} after the inversion")
        if argmax_first and (threshold is not None or activation_after != "none"):
            raise ValueError("labels that were taken before the inversion can be neither activated nor thresholded")
        if argmax_first and not all(self.nearest_interp):
            raise ValueError("labels cannot be interpolated: argmax_first needs nearest_interp=True")
        self.activation = activation
        self.argmax_first = argmax_first
        kind = "kept" if argmax_first else "labels" if threshold is None else "masks"
        self._inverse.reduction = Reduction(kind, activation_after, 0.5 if threshold is None else threshold)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key, orig_key in self.key_iterator(item, self.orig_keys):
            values = item[key] if isinstance(item[key], torch.Tensor) else torch.as_tensor(np.asarray(item[key]))
            if values.is_inference() and not torch.is_inference_mode_enabled():
                values = values.clone()
            _activate_in_place(values, self.activation, self._inverse.block_bytes)
            if self.argmax_first:
                values = self._inverse.reduced(values, Reduction("labels"))
            elif not _is_inverted(item, key, orig_key):  # Invertd warns and passes it by
                values = self._inverse.reduced(values, self._inverse.reduction)
            item[key] = values
        return super().__call__(item)


def invert_argmax(
    values: MetaTensor,
    image: MetaTensor,
    transform: InvertibleTransform,
    *,
    activation: str = "none",
    threshold: float | None = None,
    nearest: bool = False,
) -> MetaTensor:
    """Labels (1, x, y, z) of `values` (classes, x, y, z) on the grid that `image` had before `transform`.

    `image` is what `transform` made of the source: it tells how to go back. With `threshold`, masks (classes, ...).
    `transform` works on the key "image".
    """
    invert = ChunkedInvertArgmaxd(
        "pred", transform, orig_keys="image", nearest_interp=nearest, activation=activation, threshold=threshold
    )
    return invert({"pred": values, "image": image})["pred"]


def _is_inverted(item: Mapping[Hashable, Any], key: Hashable, orig_key: Hashable) -> bool:
    """Whether MONAI's Invertd knows how to invert this item, or passes it by with a warning."""
    wanted = orig_key if isinstance(item[key], MetaTensor) else InvertibleTransform.trace_key(orig_key)
    return wanted in item


def _activate_in_place(values: torch.Tensor, activation: str, block_bytes: int) -> None:
    if activation == "none":
        return
    plain = values.as_tensor() if isinstance(values, MetaTensor) else values
    for rows in row_blocks(plain.shape[1], plain[:, :1].numel() * 8, block_bytes):
        plain[:, rows] = activate(plain[:, rows], activation).to(plain.dtype)


class _ReducedInverse(Compose):
    """The inverse of a preprocessing that returns the reduced classes in place of the classes."""

    def __init__(
        self,
        transform: InvertibleTransform,
        reduction: Reduction,
        class_bytes: int,
        block_bytes: int,
        remarks: list[str],
    ):
        super().__init__(list(transform.transforms) if type(transform) is Compose else [transform])
        self.reduction = reduction
        self.block_bytes = block_bytes
        self._class_bytes = class_bytes
        self.original = transform
        self._remarks = remarks

    def inverse(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        """Invert the one tensor (classes, x, y, z) in `data`, whose trace says what was applied to the image."""
        ((key, tensor),) = data.items()
        self._raise_if_not_invertible(data)
        traced = _names(tensor)
        if not _BY_CHANNEL.issuperset(traced):
            unknown = ", ".join(sorted(set(traced) - _BY_CHANNEL))
            self._remarks.append(f"all classes are inverted at once: the inverse of {unknown} may mix them")
            return {key: self._invert_chunks(key, tensor, max(1, tensor.shape[0]))}
        steps = [step for step in reversed(self.flatten().transforms) if isinstance(step, InvertibleTransform)]
        found = self._find_resampling(key, tensor, steps)
        if found is None:
            return {key: self._invert_chunks(key, tensor, max(1, self._class_bytes // (8 * tensor[0].numel())))}
        return {key: self._invert_blocks(key, tensor, steps, found)}

    def reduced(self, values: torch.Tensor, reduction: Reduction) -> torch.Tensor:
        """`values` (classes, ...) reduced where they lie."""
        result = _Result(reduction, values.shape, values)
        plain = values.as_tensor() if isinstance(values, MetaTensor) else values
        for rows in row_blocks(values.shape[1], plain[:, :1].numel() * 12, self.block_bytes):
            result.update(0, rows, plain[:, rows])
        if isinstance(values, MetaTensor):
            return MetaTensor(result.values).copy_meta_from(values)
        return result.values

    def _find_resampling(self, key: Hashable, tensor: MetaTensor, steps: Sequence[Any]) -> int | None:
        """The place in `steps` of the one resampling that can run by blocks; their number where none is needed.

        None when the inverse holds another interpolation, or zeros that come in after it would pass the threshold.
        """
        probe = part_of(tensor, slice(0, 1))
        for place, step in enumerate(steps):
            resampler = resampler_of(step, key)
            if resampler is not None:
                resampling = Resampling.of(probe, resampler)
                if resampling is None:
                    return None
                if not resampling.unchanged:
                    names = _names(probe)
                    names.remove("SpatialResample")
                    return place if self._may_follow(names) else None
            probe = step.inverse({key: probe})[key]
            if not isinstance(probe, MetaTensor):
                return None
        left = [name for name in _names(tensor) if name != "SpatialResample"]  # which all change nothing
        return len(steps) if self._may_follow(left) else None

    def _may_follow(self, operations: Sequence[str]) -> bool:
        """Whether the inverse of these gives the same on reduced classes as on classes."""
        if not _MOVING.issuperset(operations):
            return False
        zero = float(activate(torch.zeros(1), self.reduction.after))
        cropped = not _CROPPING.isdisjoint(operations)
        if self.reduction.kind == "masks":
            return not (cropped and zero >= self.reduction.threshold)
        return self.reduction.kind == "labels" or not cropped or zero == 0

    def _invert_chunks(self, key: Hashable, tensor: MetaTensor, size: int) -> MetaTensor:
        """A few classes at a time through the preprocessing's own inverse."""
        result: _Result | None = None
        inverted = tensor
        for first in range(0, tensor.shape[0], size):
            part = self.original.inverse({key: part_of(tensor, slice(first, first + size))})[key]
            inverted = part if isinstance(part, MetaTensor) else MetaTensor(torch.as_tensor(part))
            plain = inverted.as_tensor()
            result = result or _Result(self.reduction, (tensor.shape[0], *plain.shape[1:]), tensor, plain.device)
            for rows in row_blocks(plain.shape[1], plain[:, :1].numel() * 12, self.block_bytes):
                result.update(first, rows, plain[:, rows])
        assert result is not None  # a result has at least one class
        return MetaTensor(result.values).copy_meta_from(inverted)

    def _invert_blocks(self, key: Hashable, tensor: MetaTensor, steps: Sequence[Any], place: int) -> MetaTensor:
        """Resample by blocks and reduce at once; only reduced classes go through the steps after it."""
        if place == len(steps):
            out = self.reduced(tensor, self.reduction)
            assert isinstance(out, MetaTensor)
        else:
            out = self._resampled(key, tensor, steps, place)
        kept = out.dtype
        for step in steps[place + 1 :] if place < len(steps) else steps:
            out = step.inverse({key: out})[key]
        return out.to(kept)  # pyright: ignore[reportReturnType] -- `to` keeps the class

    def _resampled(self, key: Hashable, tensor: MetaTensor, steps: Sequence[Any], place: int) -> MetaTensor:
        resampler = resampler_of(steps[place], key)
        assert resampler is not None
        result: _Result | None = None
        meta: Any = None
        first, count = 0, 1  # the first class alone tells how large the others will be
        while first < tensor.shape[0]:
            part = part_of(tensor, slice(first, first + count))
            for step in steps[:place]:
                part = step.inverse({key: part})[key]
            resampling = Resampling.of(part, resampler)
            assert resampling is not None  # `_find_resampling` had it for the first class
            if result is None:
                count = resampling.classes_at_once(part.shape[1:], self._class_bytes, self.block_bytes)
                meta = resampling.meta(part)
                shape = (tensor.shape[0], *resampling.size)
                result = _Result(self.reduction, shape, tensor)
                if count > 1 and tensor.shape[0] > 1:
                    continue
            for rows, values in resampling.blocks(part.as_tensor(), self.block_bytes):
                result.update(first, rows, values)
            first += len(part)
        assert result is not None  # a result has at least one class
        return MetaTensor(result.values).copy_meta_from(meta)


class _Result:
    """The reduced classes on a grid, as far as they are known."""

    def __init__(
        self,
        reduction: Reduction,
        shape: Sequence[int],
        source: torch.Tensor,
        device: torch.device | None = None,
    ):
        """`shape` is (classes, x, y, z) of the result's grid; `source` tells the type of labels that stay labels."""
        self._reduction = reduction
        self._best: torch.Tensor | None = None  # the largest value so far, (x, y, z)
        self._classes = shape[0]
        device = device or source.device
        if reduction.kind == "labels":
            self.values = torch.zeros((1, *shape[1:]), dtype=label_dtype(shape[0]), device=device)
        elif reduction.kind in ("masks", "certainties"):
            self.values = torch.zeros(tuple(shape), dtype=torch.uint8, device=device)
        else:
            whole = reduction.kind == "kept" and not source.is_floating_point()
            dtype = source.dtype if whole else torch.float32
            self.values = torch.zeros(tuple(shape), dtype=dtype, device=device)

    def update(self, first: int, rows: slice, values: torch.Tensor) -> None:
        """Take in `values` (some classes from number `first` on, rows, y, z)."""
        values = activate(values, self._reduction.after)
        if self._reduction.kind == "masks":
            self.values[first : first + len(values), rows] = values >= self._reduction.threshold
            return
        if self._reduction.kind == "certainties":
            self.values[first : first + len(values), rows] = quantise(values)
            return
        if self._reduction.kind in ("values", "kept"):
            self.values[first : first + len(values), rows] = values.to(self.values.dtype)
            return
        best, winner = values.max(dim=0)
        winner += first
        labels = self.values[0, rows]
        if len(values) == self._classes:
            labels.copy_(winner)
            return
        if self._best is None:
            self._best = torch.empty(self.values.shape[1:], dtype=values.dtype, device=values.device)
        known = self._best[rows]
        if first == 0:
            known.copy_(best)
            labels.copy_(winner)
            return
        better = (best > known) | (best.isnan() & ~known.isnan())
        known.copy_(torch.where(better, best, known))
        labels.copy_(torch.where(better, winner, labels))


def _names(tensor: MetaTensor) -> list[str]:
    """What was applied, in order."""
    return [str(operation[TraceKeys.CLASS_NAME]) for operation in tensor.applied_operations]
