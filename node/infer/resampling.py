"""The inverse of MONAI's resampling, computed over blocks of its result: same coordinates and, in float32, same values.

Between grids with parallel axes (after `Orientation` and `Spacing` they always are) it goes axis by axis: half the CPU
time of torch's `grid_sample` with ten classes, a seventh with one, and no coordinates of every voxel.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config.deviceconfig import USE_COMPILED
from monai.data.meta_tensor import MetaTensor
from monai.data.utils import AFFINE_TOL, to_affine_nd
from monai.networks.utils import to_norm_affine
from monai.transforms.inverse import TraceableTransform
from monai.transforms.spatial.array import SpatialResample
from monai.transforms.spatial.dictionary import Spacingd, SpatialResampled
from monai.transforms.utils import resolves_modes
from monai.utils import TraceKeys, get_torch_dtype_from_string

_ROWS = 12  # of the result at a time at least: between two blocks a row of the input is sampled twice
_STRAIGHT = 1e-9  # share of an axis by which another one may lean into it; rounding leaves about 1e-16


@dataclass(frozen=True)
class Resampling:
    """The inverse of one `SpatialResample`, as `monai.transforms.spatial.functional.spatial_resample` computes it."""

    xform: torch.Tensor  # 4 × 4, voxels of the result to voxels of the input
    size: tuple[int, int, int]  # of the result
    mode: str  # torch's own words
    padding: str
    align_corners: bool
    dtype: torch.dtype  # in which values and coordinates are computed
    unchanged: bool  # the two grids are the same: MONAI returns its input
    info: Any

    @classmethod
    def of(cls, tensor: MetaTensor, resampler: SpatialResample) -> Resampling | None:
        """What the trace of `tensor` says of `resampler`; None where it cannot be run by blocks (splines, 2D)."""
        traced = part_of(tensor, slice(0, 1))
        info = resampler.pop_transform(traced)
        extra = info[TraceKeys.EXTRA_INFO]
        size = tuple(int(extent) for extent in info[TraceKeys.ORIG_SIZE])
        if isinstance(extra["mode"], int) or USE_COMPILED or tensor.ndim != 4 or len(size) != 3:
            return None
        source = to_affine_nd(3, np.asarray(tensor.affine, dtype=np.float64))
        target = to_affine_nd(3, np.asarray(extra["src_affine"], dtype=np.float64))
        xform = np.linalg.solve(source, target)
        same_size = size == tuple(tensor.shape[1:])
        unchanged = same_size and (
            np.allclose(source, target, atol=AFFINE_TOL) or np.allclose(xform, np.eye(4), atol=AFFINE_TOL)
        )
        _, mode, padding, _ = resolves_modes(extra["mode"], extra["padding_mode"])
        align = extra["align_corners"]
        return cls(
            torch.as_tensor(xform),
            size,
            str(mode),
            str(padding),
            bool(align) if align != TraceKeys.NONE else False,
            get_torch_dtype_from_string(extra["dtype"]),
            bool(unchanged),
            traced,
        )

    def meta(self, tensor: MetaTensor) -> Any:
        """The metadata of the result: the affine moves on, and the trace ends before this resampling."""
        return TraceableTransform.track_transform_meta(
            self.info, sp_size=self.size, affine=self.xform, orig_size=tuple(tensor.shape[1:]), transform_info={}
        )

    def classes_at_once(self, extent: Sequence[int], class_bytes: int, block_bytes: int) -> int:
        """How many classes on a grid of `extent` voxels to resample together within these limits."""
        voxels = math.prod(extent)
        if self._is_straight(self._theta(extent, torch.device("cpu"))):
            return max(1, min(class_bytes // (4 * voxels), block_bytes // (_ROWS * self._row_bytes(extent[0]))))
        return max(1, class_bytes // (8 * voxels))

    def blocks(self, values: torch.Tensor, block_bytes: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of the result along its first axis, with their values (channels, rows, y, z) in float32."""
        theta = self._theta(values.shape[1:], values.device)
        axes = [_axis_coordinates(extent, self.align_corners, theta) for extent in self.size]
        if self._is_straight(theta):
            samples = [self._samples(axis, theta[0], axes[axis], values.shape[axis + 1]) for axis in range(3)]
            yield from self._along_axes(values, samples, block_bytes)
        else:
            yield from self._by_grid(values.to(self.dtype), theta, axes, block_bytes)

    def _theta(self, extent: Sequence[int], device: torch.device) -> torch.Tensor:
        """(1, 4, 4): normalised coordinates of the result to those of the input, axes in order x, y, z."""
        return to_norm_affine(self.xform[None].to(device, self.dtype), extent, self.size, self.align_corners)

    def _is_straight(self, theta: torch.Tensor) -> bool:
        """Whether the axes of both grids are parallel, so that each can be sampled by itself.

        Nearest neighbours change with the last bit of a coordinate; sums do not, for they are rounded to float32.
        """
        tilt = float((theta[0, :3, :3] - theta[0, :3, :3].diag().diag()).abs().max())
        return self.padding in ("border", "zeros") and tilt <= (0 if self.mode == "nearest" else _STRAIGHT)

    def _samples(self, axis: int, theta: torch.Tensor, coordinates: torch.Tensor, extent: int) -> _Samples:
        """Which voxels of an axis of `extent` give each voxel of the result, as `grid_sample` chooses them."""
        base = coordinates.new_zeros((coordinates.numel(), 4))
        base[:, axis], base[:, 3] = coordinates, 1
        place = base @ theta[axis]
        place = (place + 1) / 2 * (extent - 1) if self.align_corners else ((place + 1) * extent - 1) / 2
        if self.padding == "border":
            place = place.clamp(0, extent - 1)
        lower = place.round() if self.mode == "nearest" else place.floor()
        lower_share = torch.ones_like(place) if self.mode == "nearest" else lower + 1 - place
        upper = lower + 1
        upper_share = torch.zeros_like(place) if self.mode == "nearest" else place - lower
        lower_share[(lower < 0) | (lower >= extent)] = 0  # what lies outside is 0
        upper_share[(upper < 0) | (upper >= extent)] = 0
        return _Samples(lower.clamp(0, extent - 1).long(), upper.clamp(0, extent - 1).long(), lower_share, upper_share)

    def _along_axes(
        self, values: torch.Tensor, samples: list[_Samples], block_bytes: int
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """One axis after the other: between grids with parallel axes that gives the same values."""
        x, y, z = samples
        row_bytes = values.shape[0] * self._row_bytes(values.shape[1])
        for rows in row_blocks(self.size[0], row_bytes, block_bytes):
            shape = (values.shape[0], rows.stop - rows.start, *self.size[1:])
            lower, upper = x.lower[rows].tolist(), x.upper[rows].tolist()
            slab = values[:, min(lower) : max(upper) + 1]
            # What is 0 stays 0: most of a class of many is, and only the rest of it is sampled.
            across, along = y.of(_filled(slab, 2)), z.of(_filled(slab, 3))
            if across.stop == across.start or along.stop == along.start:
                yield rows, torch.zeros(shape, dtype=torch.float32, device=values.device)
                continue
            whole = (across.stop - across.start, along.stop - along.start) == tuple(self.size[1:])
            make = torch.empty if whole else torch.zeros
            result = make(shape, dtype=torch.float32, device=values.device)
            slab = _sampled(_sampled(slab.to(self.dtype), z.part(along), 3, self.mode), y.part(across), 2, self.mode)
            for row, (below, above) in enumerate(zip(lower, upper, strict=True)):
                mixed = slab[:, below - min(lower)] * x.lower_share[rows.start + row]
                if self.mode != "nearest":
                    mixed.addcmul_(slab[:, above - min(lower)], x.upper_share[rows.start + row])
                result[:, row, across, along] = mixed
            yield rows, result

    def _row_bytes(self, extent: int) -> int:
        """Memory for one row of the result, for one class, from an input of `extent` rows."""
        depth = max(1.0, extent / self.size[0])
        return int(self.size[1] * self.size[2] * (8 + 24 * depth))

    def _by_grid(
        self, values: torch.Tensor, theta: torch.Tensor, axes: list[torch.Tensor], block_bytes: int
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """By torch's own `grid_sample`, with the coordinates that `affine_grid` would give."""
        reverse = [2, 1, 0]
        theta = theta[:, :3].clone()
        theta[:, :3] = theta[:, reverse]
        theta[:, :, :3] = theta[:, :, reverse]
        # torch samples volumes on one core per batch item: the rows of a block become a batch.
        parts = 1 if values.is_cuda else max(1, torch.get_num_threads())
        row_bytes = self.size[1] * self.size[2] * (7 + 2 * values.shape[0]) * values.element_size()
        for rows in row_blocks(self.size[0], row_bytes, block_bytes, parts):
            count = rows.stop - rows.start
            batch = parts if count % parts == 0 else 1
            base = torch.ones((count, *self.size[1:], 4), dtype=values.dtype, device=values.device)
            base[..., 0] = axes[2]
            base[..., 1] = axes[1][:, None]
            base[..., 2] = axes[0][rows, None, None]
            grid = base.view(1, -1, 4).bmm(theta.transpose(1, 2))
            del base
            sampled = F.grid_sample(
                values.expand(batch, *values.shape),
                grid.view(batch, count // batch, *self.size[1:], 3),
                mode=self.mode,
                padding_mode=self.padding,
                align_corners=self.align_corners,
            ).to(torch.float32)
            yield rows, sampled.transpose(0, 1).reshape(values.shape[0], count, *self.size[1:])


@dataclass(frozen=True)
class _Samples:
    """For each voxel of the result along one axis: two voxels of the input and their shares."""

    lower: torch.Tensor
    upper: torch.Tensor
    lower_share: torch.Tensor
    upper_share: torch.Tensor

    def of(self, filled: tuple[int, int]) -> slice:
        """The voxels of the result that any of the input's from and up to `filled` has a share in."""
        first, stop = filled
        places = ((self.upper >= first) & (self.lower < stop)).nonzero()
        if first == stop or not len(places):
            return slice(0, 0)
        return slice(int(places[0]), int(places[-1]) + 1)

    def part(self, chosen: slice) -> _Samples:
        """Those of some voxels of the result."""
        return _Samples(*(each[chosen] for each in (self.lower, self.upper, self.lower_share, self.upper_share)))


def _filled(values: torch.Tensor, axis: int) -> tuple[int, int]:
    """From and up to where along an axis `values` (channels, x, y, z) have anything but 0."""
    places = (values != 0).any(dim=0).any(dim=0).any(dim=3 - axis).nonzero()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def _sampled(values: torch.Tensor, samples: _Samples, axis: int, mode: str) -> torch.Tensor:
    """`values` (channels, x, y, z) sampled along axis 2 or 3."""
    shape = (-1,) + (1,) * (3 - axis)
    mixed = values.index_select(axis, samples.lower).mul_(samples.lower_share.view(shape))
    if mode == "nearest":
        return mixed
    return mixed.addcmul_(values.index_select(axis, samples.upper), samples.upper_share.view(shape))


def _axis_coordinates(extent: int, align_corners: bool, like: torch.Tensor) -> torch.Tensor:
    """The normalised coordinates of the voxels of one axis, as torch's `affine_grid` has them."""
    if extent <= 1:
        return like.new_zeros(1)
    steps = torch.linspace(-1, 1, extent, dtype=like.dtype, device=like.device)
    return steps if align_corners else steps * (extent - 1) / extent


def resampler_of(step: Any, key: Hashable) -> SpatialResample | None:
    """The resampler of a step that resamples `key`."""
    if type(step) is Spacingd and key in step.keys:
        return step.spacing_transform.sp_resample
    if type(step) is SpatialResampled and key in step.keys:
        return step.sp_transform
    return None


def row_blocks(rows: int, row_bytes: int, block_bytes: int, multiple: int = 1) -> Iterator[slice]:
    """`rows` in runs of at most `block_bytes`, of a `multiple` of rows where possible."""
    step = max(1, block_bytes // max(1, row_bytes))
    step = max(multiple, step // multiple * multiple)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def part_of(tensor: MetaTensor, channels: slice) -> MetaTensor:
    """Some channels with metadata and a trace of their own, which an inverse then takes apart."""
    return MetaTensor(
        tensor.as_tensor()[channels],
        meta=deepcopy(tensor.meta),
        applied_operations=deepcopy(tensor.applied_operations),
    )
