"""The inverse of MONAI's resampling, computed over blocks of its result: same coordinates, same values, bit by bit."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
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

    def blocks(self, values: torch.Tensor, block_bytes: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of the result along its first axis, with their values (channels, rows, y, z) in float32."""
        values = values.to(self.dtype)[None]
        theta = to_norm_affine(
            self.xform[None].to(values), values.shape[2:], self.size, align_corners=self.align_corners
        )
        reverse = [2, 1, 0]
        theta[:, :3] = theta[:, reverse]
        theta[:, :, :3] = theta[:, :, reverse]
        axes = [_axis_coordinates(extent, self.align_corners, values) for extent in self.size]
        # torch samples volumes on one core per batch item: the rows of a block become a batch.
        parts = 1 if values.is_cuda else max(1, torch.get_num_threads())
        row_bytes = self.size[1] * self.size[2] * (7 + 2 * values.shape[1]) * values.element_size()
        for rows in row_blocks(self.size[0], row_bytes, block_bytes, parts):
            count = rows.stop - rows.start
            batch = parts if count % parts == 0 else 1
            base = torch.ones((count, *self.size[1:], 4), dtype=values.dtype, device=values.device)
            base[..., 0] = axes[2]
            base[..., 1] = axes[1][:, None]
            base[..., 2] = axes[0][rows, None, None]
            grid = base.view(1, -1, 4).bmm(theta[:, :3].transpose(1, 2))
            del base
            sampled = F.grid_sample(
                values.expand(batch, *values.shape[1:]),
                grid.view(batch, count // batch, *self.size[1:], 3),
                mode=self.mode,
                padding_mode=self.padding,
                align_corners=self.align_corners,
            ).to(torch.float32)
            yield rows, sampled.transpose(0, 1).reshape(values.shape[1], count, *self.size[1:])


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
