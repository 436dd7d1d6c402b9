"""A volume or a frame as a bundle sees it: MONAI's axes and affine, turned and resampled where its manifest says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import nibabel
import numpy as np
import torch
from monai.data.image_reader import ImageReader
from monai.data.meta_tensor import MetaTensor
from monai.transforms.spatial.array import Spacing, SpatialResample
from numpy.typing import NDArray

from node.dicom.volume import Image, Volume
from node.errors import ModelError, OutputRefused
from node.infer.manifest import Input
from node.infer.results import in_order


@dataclass(frozen=True)
class Presented:
    """An array in MONAI's order with its affine."""

    array: NDArray[Any]  # (x, y, z); of a frame (x, y) or, in colour, (x, y, channel); of all frames (x, y, 1, t)
    affine_ras: NDArray[np.float64]
    channel_dim: int | float  # of `array`; NaN where it has no channels, as MONAI's readers say it


def present(source: Volume | Image, wanted: Input, frame: int | None) -> Presented:
    """`source` as its manifest's input wants it; `frame` chooses one of an image's, None gives all as (x, y, 1, t)."""
    if isinstance(source, Image):
        return _present_image(source, wanted, frame)
    array, affine = source.array.transpose(2, 1, 0), source.grid.affine_ras
    if wanted.orientation:
        turn = _turn(affine, wanted.orientation)
        shape = array.shape
        array = nibabel.orientations.apply_orientation(array, turn)
        affine = affine @ nibabel.orientations.inv_ornt_aff(turn, shape)
    if wanted.spacing_mm:
        resample = Spacing(pixdim=wanted.spacing_mm, mode="bilinear", padding_mode="border")
        tensor = resample(
            MetaTensor(torch.as_tensor(np.ascontiguousarray(array))[None], affine=torch.as_tensor(affine))
        )
        array, affine = np.asarray(tensor)[0], np.asarray(tensor.affine, np.float64)  # pyright: ignore
    return Presented(in_order(array), affine, float("nan"))


def to_grid(
    tensor: MetaTensor, reference: Volume, mode: Literal["nearest", "bilinear"] = "nearest"
) -> NDArray[np.number]:
    """A map (x, y, z) wherever it lies, as (slices, rows, columns) on the reference's grid: by turning where that is
    enough, which is exact, else by the nearest voxel or between them; background outside. Its voxels lie in memory as
    they came (`node.infer.results.in_order`).
    """
    shape = reference.grid.shape[::-1]
    affine = np.asarray(tensor.affine, np.float64)
    if tuple(tensor.shape) == shape and np.allclose(affine, reference.grid.affine_ras, atol=1e-3):
        return _plain(tensor).transpose(2, 1, 0)
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.io_orientation(affine), nibabel.orientations.io_orientation(reference.grid.affine_ras)
    )
    turned = affine @ nibabel.orientations.inv_ornt_aff(turn, tuple(tensor.shape))
    array = _plain(tensor)
    if np.allclose(turned, reference.grid.affine_ras, atol=1e-3):
        array = nibabel.orientations.apply_orientation(array, turn)
        if array.shape == shape:
            return array.transpose(2, 1, 0)
    resample = SpatialResample(mode=mode, padding_mode="zeros")
    there = resample(tensor[None], dst_affine=torch.as_tensor(reference.grid.affine_ras), spatial_size=shape)
    return _plain(there)[0].transpose(2, 1, 0)  # pyright: ignore[reportArgumentType]


class MemoryReader(ImageReader):
    """MONAI's image reader for what lies in memory: a name in place of a path, and never a file."""

    def __init__(self, inputs: Mapping[str, Input]) -> None:
        self._inputs = inputs
        self.sources: Mapping[str, Volume | Image] = {}
        self.frame: int | None = None  # which frame of an image is read

    def verify_suffix(self, filename: Any) -> bool:
        return True

    def read(self, data: Any, **kwargs: Any) -> list[Presented]:
        names = [data] if isinstance(data, str) else [str(name) for name in data]
        return [present(self.sources[name], self._inputs[name], self.frame) for name in names]

    def get_data(self, img: Sequence[Presented]) -> tuple[NDArray[Any], dict[str, Any]]:
        """The array, several inputs as channels in front, with the affine in RAS as MONAI has it."""
        first = img[0]
        for other in img[1:]:
            if other.array.shape != first.array.shape or not np.allclose(other.affine_ras, first.affine_ras, atol=1e-3):
                raise ModelError(
                    "the inputs that the bundle reads as channels lie on different grids: see onto_first in dicom.yaml"
                )
        several = len(img) > 1
        metadata = {
            "affine": first.affine_ras,
            "original_affine": first.affine_ras.copy(),
            "spatial_shape": np.array(first.array.shape[: 2 if first.channel_dim == -1 else None]),
            "space": "RAS",
            "original_channel_dim": 0 if several else first.channel_dim,
        }
        return (np.stack([one.array for one in img]) if several else first.array), metadata

    def tensor(self, name: str) -> MetaTensor:
        """An input for a bundle that loads nothing itself, channels first."""
        shown = present(self.sources[name], self._inputs[name], self.frame)
        array = np.moveaxis(shown.array, -1, 0) if shown.channel_dim == -1 else shown.array[None]
        return MetaTensor(torch.as_tensor(np.ascontiguousarray(array)), affine=torch.as_tensor(shown.affine_ras))


def _present_image(image: Image, wanted: Input, frame: int | None) -> Presented:
    if frame is None:
        if image.array.ndim == 4:
            raise ModelError("the model takes frames over time of a grey image, not of a colour one")
        return Presented(image.array.transpose(2, 1, 0)[:, :, None], np.eye(4), float("nan"))
    array = image.array[frame]
    if array.ndim == 3:
        return Presented(array.transpose(1, 0, 2), np.eye(4), -1)
    if wanted.rgb:
        return Presented(np.repeat(_to_display(image, array).T[..., None], 3, axis=2), np.eye(4), -1)
    return Presented(array.T, np.eye(4), float("nan"))


def _to_display(image: Image, array: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey values through the image's own window (PS3.3 C.11.2.1.2), else from the darkest to the brightest."""
    try:
        centre, width = float(image.attributes["WindowCenter"]), float(image.attributes["WindowWidth"])
    except (KeyError, ValueError):
        centre = width = 0.0
    low, high = centre - width / 2, centre + width / 2
    if width <= 0:
        low, high = float(array.min()), float(array.max())
    scaled = (array.astype(np.float32) - low) * (255.0 / max(high - low, 1e-6))
    return np.clip(np.round(scaled), 0, 255).astype(np.uint8)


def _turn(affine: NDArray[np.float64], orientation: str) -> NDArray[np.float64]:
    return nibabel.orientations.ornt_transform(
        nibabel.orientations.io_orientation(affine), nibabel.orientations.axcodes2ornt(tuple(orientation))
    )


def _plain(tensor: Any) -> NDArray[np.number]:
    if isinstance(tensor, MetaTensor):
        tensor = tensor.as_tensor()
    if not isinstance(tensor, torch.Tensor):
        raise OutputRefused(f"the model returned {type(tensor).__name__}, not a map")
    return tensor.detach().cpu().numpy()
