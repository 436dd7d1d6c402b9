"""Sliding-window inference that keeps one slab of logits, not a volume of them.

MONAI's `sliding_window_inference` adds up every class over the whole network grid (105 classes of a 239 × 239 × 267
grid: 6.4 GB, and a second copy for what follows). Here the windows run in the same order with the same weights, and
rows that no later window reaches are normalised, reduced (to labels, masks or probabilities) and forgotten at once.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from monai.data.meta_tensor import MetaTensor
from monai.data.utils import compute_importance_map, dense_patch_slices, get_valid_patch_size
from monai.inferers.inferer import SlidingWindowInferer, SlidingWindowInfererAdapt
from monai.utils import PytorchPadMode, convert_data_type, ensure_tuple_rep, fall_back_tuple, look_up_option

from node.errors import ModelError
from node.infer.reduce import NoProbabilities, Reduce, to_labels

_BLOCK_BYTES = 128 * 2**20  # of logits that are reduced at once: a softmax or an argmax makes copies of this size
_T = TypeVar("_T")


class Progress(Protocol):
    """Told after every batch of windows."""

    def __call__(self, done: int, total: int) -> None: ...


class SlabSlidingWindowInferer(SlidingWindowInferer):
    """MONAI's `SlidingWindowInferer` (same arguments, same numbers) with `reduce` applied slab by slab.

    Returns a `MetaTensor` (batch, what `reduce` made of the classes, x, y, z) with the geometry of the input.
    When memory runs out it takes fewer windows at once, then stitches on the CPU, and notes each step in `remarks`.
    """

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        *args: Any,
        reduce: Reduce | None = None,
        beside: Reduce | None = None,
        slab_dim: int | None = 0,
        amp: bool = False,
        on_progress: Progress | None = None,
        **kwargs: Any,
    ):
        """`beside` is a second reduction of the same logits, whose result a run leaves in `kept_beside`, on the CPU;
        None where it raised `NoProbabilities`.

        `slab_dim` is the axis along which slabs are finished; None takes the longest one.

        With 0, MONAI's own window order is kept and so is every rounding. Another axis keeps fewer rows of a long
        volume (273 × 273 × 1200: 105 classes in 3 GB instead of 13 GB) and changes the order of additions only.
        `amp` runs the network under autocast where it runs on CUDA. `buffer_steps`, `buffer_dim` and `progress`
        have no effect: a slab is a buffer, and progress goes to `on_progress`.
        """
        super().__init__(roi_size, *args, **kwargs)
        self.reduce: Reduce = reduce or to_labels()
        self.beside = beside
        self.kept_beside: torch.Tensor | None = None  # (batch, what `beside` made of the classes, x, y, z)
        self.slab_dim = slab_dim
        self.amp = amp
        self.on_progress = on_progress
        self.remarks: list[str] = []

    @classmethod
    def of(
        cls,
        inferer: SlidingWindowInferer,
        reduce: Reduce,
        *,
        beside: Reduce | None = None,
        slab_dim: int | None = 0,
        amp: bool = False,
        on_progress: Progress | None = None,
    ) -> SlabSlidingWindowInferer:
        """The settings (and the cached weight map) of an inferer that a bundle's configuration made.

        `ModelError` for a subclass that does something else, such as `SliceInferer`.
        """
        if type(inferer) not in (SlidingWindowInferer, SlidingWindowInfererAdapt, SlabSlidingWindowInferer):
            raise ModelError(f"the inferer {type(inferer).__name__} cannot be run slab by slab")
        made = cls(inferer.roi_size, reduce=reduce, slab_dim=slab_dim, amp=amp, on_progress=on_progress)
        own = {"reduce": reduce, "slab_dim": slab_dim, "amp": amp, "on_progress": on_progress, "remarks": []}
        own |= {"beside": beside, "kept_beside": None}
        vars(made).update(vars(inferer) | own)
        return made

    def __call__(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run `network` over the windows of `inputs` (batch, channels, x, y[, z]).

        Raises `ModelError` when the network does not return one tensor, `torch.OutOfMemoryError` when one window
        at a time, stitched on the CPU, is still too much.
        """
        self.remarks, self.kept_beside = [], None
        with torch.no_grad():
            return self._infer(inputs, network, *args, **kwargs)

    def _infer(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        plan = self._plan(inputs)
        condition = kwargs.get("condition")
        if condition is not None and condition.shape != inputs.shape:
            raise ValueError(f"condition has shape {tuple(condition.shape)}, inputs {tuple(inputs.shape)}")
        conditions = None if condition is None else self._padded(kwargs.pop("condition"), plan)
        device = torch.device(kwargs.pop("device", self.device) or self._stitching_device(inputs))
        run_device = torch.device(self.sw_device or inputs.device)
        images = self._padded(inputs, plan)
        weights = self._weights(plan, images.dtype, run_device)
        slab = _Slab(plan, self.reduce, self.beside, inputs.shape[0], device, images.dtype)
        batch_size, position = self.sw_batch_size, 0
        windows = [(index, window) for index in range(inputs.shape[0]) for window in plan.windows]
        while position < len(windows):
            batch = windows[position : position + batch_size]
            cuts = [(slice(index, index + 1), slice(None), *window) for index, window in batch]
            output, failure = _attempt(
                partial(self._predict, images, conditions, cuts, weights, run_device, network, args, kwargs)
            )
            if failure is not None:
                if batch_size > 1:
                    batch_size = max(1, min(batch_size, len(batch)) // 2)
                    self._remark(f"Memory ran out: {batch_size} window(s) at a time instead of {self.sw_batch_size}.")
                elif not self._stitch_on_cpu(slab):
                    raise failure
                continue
            if output is None:  # the network's maps differ in size from its windows: MONAI scales them as it stitches
                return self._reduced_at_the_end(inputs, network, args, kwargs, condition)
            for logits, (index, window) in zip(output, batch, strict=True):
                _, failure = _attempt(partial(slab.add, logits, weights, index, window))
                if failure is not None:
                    if not self._stitch_on_cpu(slab):
                        raise failure
                    slab.add(logits, weights, index, window)
            position += len(batch)
            del output
            if self.on_progress is not None:
                self.on_progress(position, len(windows))
        result, self.kept_beside = slab.finish()
        if isinstance(inputs, MetaTensor):
            return MetaTensor(result).copy_meta_from(inputs, copy_attr=False)
        return result

    def _plan(self, inputs: torch.Tensor) -> _Plan:
        """Where the windows lie; raises what MONAI raises on a wrong roi or overlap."""
        size = tuple(int(extent) for extent in inputs.shape[2:])
        if isinstance(self.roi_size, Sequence) and len(self.roi_size) != len(size):
            raise ValueError(f"roi_size {tuple(self.roi_size)} does not fit inputs of shape {tuple(inputs.shape)}")
        overlap = ensure_tuple_rep(self.overlap, len(size))
        if any(not 0 <= part < 1 for part in overlap):
            raise ValueError(f"overlap must be >= 0 and < 1, got {overlap}")
        roi = tuple(int(extent) for extent in fall_back_tuple(self.roi_size, size))
        padded = tuple(max(extent, window) for extent, window in zip(size, roi, strict=True))
        before = tuple((whole - extent) // 2 for whole, extent in zip(padded, size, strict=True))
        interval = tuple(
            window if window == whole else max(1, int(window * (1 - part)))
            for window, whole, part in zip(roi, padded, overlap, strict=True)
        )
        windows = [
            tuple(slice(int(s.start), int(s.stop)) for s in w) for w in dense_patch_slices(padded, roi, interval)
        ]
        slab_dim = padded.index(max(padded)) if self.slab_dim is None else self.slab_dim % len(size)
        windows.sort(key=lambda window: window[slab_dim].start)  # stable: nothing moves along the first axis
        return _Plan(size, roi, padded, before, tuple(windows), slab_dim)

    def _padded(self, inputs: torch.Tensor, plan: _Plan) -> torch.Tensor:
        """`inputs` as a plain tensor, on both sides as large as the window where it was smaller."""
        plain = convert_data_type(inputs, torch.Tensor, wrap_sequence=True)[0]
        pads: list[int] = []
        for size, whole, before in reversed(list(zip(plan.size, plan.padded, plan.before, strict=True))):
            pads += [before, whole - size - before]
        if not any(pads):
            return plain
        return F.pad(plain, pads, mode=str(look_up_option(self.padding_mode, PytorchPadMode).value), value=self.cval)

    def _weights(self, plan: _Plan, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The importance of each voxel of a window, (1, 1, x, y[, z])."""
        valid = get_valid_patch_size(plan.padded, plan.roi)
        if tuple(valid) == plan.roi and self.roi_weight_map is not None:
            weights = self.roi_weight_map
        else:
            weights = compute_importance_map(
                tuple(valid), mode=self.mode, sigma_scale=self.sigma_scale, device=device, dtype=dtype
            )
        weights = convert_data_type(weights, torch.Tensor, device=device, dtype=dtype)[0]
        return weights[None, None] if weights.ndim == len(plan.size) else weights

    def _predict(
        self,
        images: torch.Tensor,
        conditions: torch.Tensor | None,
        cuts: list[tuple[slice, ...]],
        weights: torch.Tensor,
        device: torch.device,
        network: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> torch.Tensor | None:
        """The weighted logits of a batch of windows; None where they are of another size than the windows."""
        data = torch.cat([images[cut] for cut in cuts]).to(device)
        if conditions is not None:
            kwargs = kwargs | {"condition": torch.cat([conditions[cut] for cut in cuts]).to(device)}
        if self.with_coord:
            args = ([list(cut) for cut in cuts], *args)
        autocast = torch.autocast("cuda") if self.amp and device.type == "cuda" else contextlib.nullcontext()
        with autocast:
            output = network(data, *args, **kwargs)
        if isinstance(output, (list, tuple)) and len(output) == 1:
            output = output[0]
        if not isinstance(output, torch.Tensor):
            raise ModelError(
                f"the network returns {type(output).__name__} and not one tensor of logits per window: "
                "its result cannot be reduced while the windows run"
            )
        output = convert_data_type(output, torch.Tensor)[0]
        if output.shape[2:] != data.shape[2:]:
            return None
        if output.untyped_storage().data_ptr() == data.untyped_storage().data_ptr():
            return output * weights
        return output.mul_(weights)  # as MONAI does: half-precision logits stay so, and no copy is made

    def _stitching_device(self, inputs: torch.Tensor) -> torch.device:
        if self.cpu_thresh is not None and inputs.shape[2:].numel() > self.cpu_thresh:
            return torch.device("cpu")
        return inputs.device

    def _stitch_on_cpu(self, slab: _Slab) -> bool:
        if slab.device.type == "cpu":
            return False
        slab.move(torch.device("cpu"))
        self._remark("Memory of the GPU ran out: the windows are put together on the CPU.")
        return True

    def _remark(self, text: str) -> None:
        self.remarks.append(text)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _reduced_at_the_end(
        self,
        inputs: torch.Tensor,
        network: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        condition: torch.Tensor | None,
    ) -> torch.Tensor:
        self.remarks.append("The network's maps differ in size from its windows: all logits are held at once.")
        if condition is not None:
            kwargs = kwargs | {"condition": condition}
        whole = super().__call__(inputs, network, *args, **kwargs)
        if not isinstance(whole, torch.Tensor):
            raise ModelError("the network returns several maps: its result cannot be reduced to labels")
        plain = convert_data_type(whole, torch.Tensor)[0]
        result = torch.stack([self.reduce(image) for image in plain])
        if self.beside is not None:
            with contextlib.suppress(NoProbabilities):
                self.kept_beside = torch.stack([self.beside(image).cpu() for image in plain])
        return MetaTensor(result).copy_meta_from(whole) if isinstance(whole, MetaTensor) else result


@dataclass(frozen=True)
class _Plan:
    size: tuple[int, ...]  # of the input, voxels
    roi: tuple[int, ...]
    padded: tuple[int, ...]  # the input, at least as large as a window
    before: tuple[int, ...]  # voxels that padding put before the first one
    windows: tuple[tuple[slice, ...], ...]  # in the order in which they run
    slab_dim: int  # the spatial axis along which `windows` never step back


class _Slab:
    """The weighted logits of the rows that windows still reach: a ring of one window's depth along `slab_dim`."""

    def __init__(
        self,
        plan: _Plan,
        reduce: Reduce,
        beside: Reduce | None,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.device = device
        self._plan, self._batch, self._dtype = plan, batch, dtype
        self._reduce, self._beside = reduce, beside
        self._depth, self._axis = plan.roi[plan.slab_dim], plan.slab_dim
        self._sums: torch.Tensor | None = None  # (classes, x, y, z), `_depth` rows along the axis
        self._counts: torch.Tensor | None = None  # (1, x, y, z), the weights that were added
        self._result: torch.Tensor | None = None
        self._result_device = device
        self._result_beside: torch.Tensor | None = None
        self._image = 0  # which of the batch
        self._first = 0  # the first row that is not finished

    def move(self, device: torch.device) -> None:
        """Go on on `device`."""
        self.device = device
        self._sums = None if self._sums is None else self._sums.to(device)
        self._counts = None if self._counts is None else self._counts.to(device)

    def add(self, logits: torch.Tensor, weights: torch.Tensor, image: int, window: tuple[slice, ...]) -> None:
        """Add one window (classes, x, y, z). May be called again with the same one when memory ran out in it."""
        if image != self._image:
            self._finish_rows(self._plan.padded[self._axis])
            self._image, self._first = image, 0
        start, stop = window[self._axis].start, window[self._axis].stop
        self._finish_rows(start)
        if self._sums is None or self._counts is None:
            shape = list(self._plan.padded)
            shape[self._axis] = self._depth
            counts = torch.zeros((1, *shape), dtype=self._dtype, device=self.device)
            self._sums = torch.zeros((logits.shape[0], *shape), dtype=self._dtype, device=self.device)
            self._counts = counts
        logits, weights = logits.to(self.device), weights[0].to(self.device)
        for first, last in self._pieces(start, stop):
            part = [slice(None), *window]
            part[self._axis + 1] = slice(first % self._depth, first % self._depth + last - first)
            index = tuple(part)
            self._sums[index] += logits.narrow(self._axis + 1, first - start, last - first)
            self._counts[index] += weights.narrow(self._axis + 1, first - start, last - first)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Everything reduced, in both ways: (batch, channels, x, y, z), without the padding."""
        self._finish_rows(self._plan.padded[self._axis])
        assert self._result is not None  # an image has at least one window
        self._sums = self._counts = None
        return self._result, self._result_beside

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Rows `start` to `stop` in runs that do not cross the ring's end."""
        while start < stop:
            end = min(stop, (start // self._depth + 1) * self._depth)
            yield start, end
            start = end

    def _finish_rows(self, stop: int) -> None:
        """Normalise, reduce and forget the rows up to `stop`."""
        if self._sums is None or self._counts is None:
            return
        row_bytes = self._sums.narrow(self._axis + 1, 0, 1).numel() * self._sums.element_size()
        step = max(1, _BLOCK_BYTES // row_bytes)
        for first, end in self._pieces(self._first, stop):
            for row in range(first, end, step):
                rows = min(step, end - row)
                sums = self._sums.narrow(self._axis + 1, row % self._depth, rows)
                counts = self._counts.narrow(self._axis + 1, row % self._depth, rows)
                sums /= counts
                counts.fill_(1)  # should reducing run out of memory, a second division changes nothing
                self._result = self._keep(self._result, self._reduce(sums), row, rows, self._result_device)
                self._reduce_beside(sums, row, rows)
                sums.zero_()
                counts.zero_()
                self._first = row + rows

    def _reduce_beside(self, sums: torch.Tensor, row: int, rows: int) -> None:
        if self._beside is None:
            return
        try:
            reduced = self._beside(sums)
        except NoProbabilities:
            self._beside = self._result_beside = None
            return
        cpu = torch.device("cpu")  # a second map of all classes would fill a GPU
        self._result_beside = self._keep(self._result_beside, reduced, row, rows, cpu)

    def _keep(
        self, result: torch.Tensor | None, reduced: torch.Tensor, row: int, rows: int, device: torch.device
    ) -> torch.Tensor:
        """The result with the reduced rows (channels, x, y, z) in it, without what is padding."""
        plan, axis = self._plan, self._axis
        if result is None:
            shape = (self._batch, reduced.shape[0], *plan.size)
            result = torch.empty(shape, dtype=reduced.dtype, device=device)
        inside = [slice(before, before + size) for before, size in zip(plan.before, plan.size, strict=True)]
        first, last = max(row, inside[axis].start), min(row + rows, inside[axis].stop)
        if first >= last:
            return result
        inside[axis] = slice(first - row, last - row)
        target = [slice(None)] * len(plan.size)
        target[axis] = slice(first - plan.before[axis], last - plan.before[axis])
        result[(self._image, slice(None), *target)] = reduced[(slice(None), *inside)].to(device)
        return result


def _attempt(work: Callable[[], _T]) -> tuple[_T | None, BaseException | None]:
    """What `work` returns, or the error by which memory ran out, without the frames that hold its tensors."""
    try:
        return work(), None
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not _is_out_of_memory(error):
            raise
        return None, error.with_traceback(None)


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA's error, Python's, that of torch's CPU allocator, and cuDNN's refusal of tensors of 2**31 values."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in ("DefaultCPUAllocator", "canUse32BitIndexMath", "_STATUS_ALLOC_FAILED"))
