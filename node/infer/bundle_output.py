"""What a bundle's evaluator returned, as one of radnode's predictions in the input's own geometry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from numpy.typing import NDArray

from node.dicom.volume import Image, Volume
from node.errors import OutputRefused
from node.infer.manifest import Manifest
from node.infer.presented import to_grid
from node.infer.results import Box, Boxes, Landmark, Landmarks, Scores

Item = Mapping[str, Any]


def read_labels(item: Item, manifest: Manifest, seen: Any, source: Volume | Image) -> NDArray[np.number]:
    """The labels on the volume's grid (slices, rows, columns), or on an image's frame (rows, columns).

    Several channels are one-hot. A prediction without geometry lies where the image lay that the network saw (`seen`):
    MONAI's Invertd passes such a one by. `OutputRefused` where its size fits neither that image nor the source.
    """
    prediction = item[manifest.output]
    tensor = prediction if isinstance(prediction, torch.Tensor) else torch.as_tensor(np.asarray(prediction))
    dimensions = 3 if isinstance(source, Volume) else 2
    if tensor.ndim == dimensions:
        tensor = tensor[None]
    if tensor.shape[0] > 1:
        tensor = tensor.argmax(dim=0, keepdim=True)
    for value in manifest.background:
        tensor = torch.where(tensor == value, torch.zeros_like(tensor), tensor)
    labels = place_map(tensor, seen, source)
    if isinstance(source, Volume) and tensor.any() and not labels.any():
        raise OutputRefused("the model's labels lie outside the image: what it returned has another place in space")
    return labels


def place_map(
    tensor: torch.Tensor, seen: Any, source: Volume | Image, mode: Literal["nearest", "bilinear"] = "nearest"
) -> NDArray[np.number]:
    """A map (1, x, y[, z]) on the volume's grid (slices, rows, columns), or on an image's frame (rows, columns).

    `mode` says what becomes of it where it must be resampled. `OutputRefused` as in `read_labels`.
    """
    found = tuple(tensor.shape[1:])
    if isinstance(source, Image):
        wanted = source.array.shape[2:0:-1]
        if found != wanted:
            raise OutputRefused(f"the model returned a map of shape {found}, the image is {wanted} (columns, rows)")
        return np.ascontiguousarray(_numbers(tensor)[0].T)
    wanted = tuple(reversed(source.grid.shape))
    if found not in (wanted, tuple(getattr(seen, "shape", ()))[1:]):
        raise OutputRefused(f"the model returned a map of shape {found}, the input's grid is {wanted} (x, y, z)")
    if not _has_place(tensor):
        seen_here = isinstance(seen, MetaTensor) and tuple(seen.shape[1:]) == found
        affine = seen.affine if seen_here else torch.as_tensor(source.grid.affine_ras)
        tensor = MetaTensor(torch.as_tensor(_numbers(tensor)), affine=affine)
    return to_grid(tensor[0], source, mode)  # pyright: ignore[reportArgumentType]


def _has_place(tensor: torch.Tensor) -> bool:
    """Whether a tensor says where it lies: MONAI gives one that never knew the identity, which is no scan's place."""
    return isinstance(tensor, MetaTensor) and not np.array_equal(np.asarray(tensor.affine), np.eye(4))


def read_boxes(item: Item, manifest: Manifest, seen: Any, name: str) -> Boxes:
    """The detections at or above the manifest's score, the most probable first, as boxes along the patient's axes.

    Boxes in the voxels of an oblique image become the boxes around their eight corners.
    """
    keys = manifest.boxes
    box, label, score = (_numbers(item[key]).astype(np.float64) for key in (keys.box, keys.label, keys.score))
    box, label, score = box.reshape(-1, 6), label.reshape(-1), score.reshape(-1)
    if not len(box) == len(label) == len(score):
        raise OutputRefused(f"the model returned {len(box)} boxes, {len(label)} classes and {len(score)} scores")
    if not np.isfinite(box).all() or not np.isfinite(score).all():
        raise OutputRefused("the model returned boxes or scores that are not finite (NaN or infinity)")
    if unknown := sorted({int(value) for value in label} - set(manifest.classes)):
        raise OutputRefused(f"the model returned classes {unknown[:10]} that dicom.yaml does not declare")
    low, high = box[:, :3], box[:, 3:]
    if keys.mode == "cccwhd":
        low, high = box[:, :3] - box[:, 3:] / 2, box[:, :3] + box[:, 3:] / 2
    if keys.space == "image":
        low, high = _around(low, high, _affine_of(seen))
    order = np.argsort(-score, kind="stable")
    return Boxes(
        tuple(
            Box(int(label[index]), float(score[index]), _triple(low[index]), _triple(high[index]))
            for index in order
            if score[index] >= manifest.score_min
        ),
        name,
    )


def read_scores(items: Sequence[Item], manifest: Manifest, name: str) -> Scores:
    """A probability per class of the manifest, of the input or of each of its frames."""
    values: list[dict[int, float]] = []
    for item in items:
        raw = torch.as_tensor(_numbers(item[manifest.output]).astype(np.float64)).reshape(-1)
        if not torch.isfinite(raw).all():
            raise OutputRefused("the model returned scores that are not finite (NaN or infinity)")
        if manifest.activation == "softmax":
            raw = raw.softmax(0)
        elif manifest.activation == "sigmoid":
            raw = raw.sigmoid()
        if len(raw) == 1 and set(manifest.classes) == {0, 1}:  # one output for two classes: the probability of class 1
            raw = torch.stack([1 - raw[0], raw[0]])
        if max(manifest.classes) >= len(raw):
            raise OutputRefused(f"the model returned {len(raw)} scores; classes go up to {max(manifest.classes)}")
        if raw.min() < -1e-6 or raw.max() > 1 + 1e-6:
            raise OutputRefused(
                f"the model returned scores from {raw.min():.3g} to {raw.max():.3g}, which are no probabilities: see "
                "activation in dicom.yaml"
            )
        values.append({number: float(raw[number].clamp(0, 1)) for number in manifest.classes})
    return Scores(tuple(values), manifest.exclusive, name)


def read_landmarks(item: Item, manifest: Manifest, source: Volume | Image, name: str) -> Landmarks:
    """Points as (frames, 2, landmarks) or (2, landmarks) of column and row, on every frame."""
    raw = _numbers(item[manifest.output]).astype(np.float64)
    raw = raw[None] if raw.ndim == 2 else raw
    frames = source.array.shape[0]
    if raw.ndim != 3 or raw.shape[:2] != (frames, 2) or raw.shape[2] <= max(manifest.classes):
        raise OutputRefused(
            f"the model returned points of shape {raw.shape}; expected ({frames} frames, 2, more than "
            f"{max(manifest.classes)} landmarks)"
        )
    if not np.isfinite(raw).all():
        raise OutputRefused("the model returned points that are not finite (NaN or infinity)")
    rows, columns = source.array.shape[1:3]
    points = []
    for frame in range(frames):
        for number in manifest.classes:
            column, row = raw[frame, :, number]
            inside = 0 <= column <= columns - 1 and 0 <= row <= rows - 1  # what is not in the image is set outside it
            if inside and (not manifest.absent_within_px or np.hypot(column, row) > manifest.absent_within_px):
                points.append(Landmark(number, frame, float(row), float(column)))
    return Landmarks(tuple(points), name)


def _around(
    low: NDArray[np.float64], high: NDArray[np.float64], affine_ras: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Boxes (n, 3) of voxel indices as the boxes in LPS millimetres around their eight corners."""
    affine_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine_ras
    choice = np.array(np.meshgrid([0, 1], [0, 1], [0, 1])).reshape(3, 8).T
    corners = np.where(choice[None], high[:, None], low[:, None]) @ affine_lps[:3, :3].T + affine_lps[:3, 3]
    return corners.min(axis=1), corners.max(axis=1)


def _affine_of(seen: Any) -> NDArray[np.float64]:
    if not isinstance(seen, MetaTensor):
        raise OutputRefused("the image that the model's boxes lie in has no geometry: see boxes.space in dicom.yaml")
    return np.asarray(seen.affine, np.float64)


def _triple(values: NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in values)
    return x, y, z


def _numbers(value: Any) -> NDArray[np.number]:
    if isinstance(value, MetaTensor):
        value = value.as_tensor()
    return value.detach().float().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
