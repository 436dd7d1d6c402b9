"""Bare networks (TorchScript, torch.export): what `network` in `dicom.yaml` says happens before and after them.

The steps are MONAI's own transforms and inferers, in this order: orientation, spacing, intensity, size; the network,
as a whole or in windows; activation; back onto the input's grid; the decision for a label. Deciding on the input's grid
keeps the outline as sharp as the input is; each class goes back alone, so that one of them at a time lies there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.inferers.inferer import Inferer, SimpleInferer, SliceInferer, SlidingWindowInferer
from monai.transforms.compose import Compose
from monai.transforms.croppad.dictionary import ResizeWithPadOrCropd
from monai.transforms.intensity.dictionary import (
    ClipIntensityPercentilesd,
    NormalizeIntensityd,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
)
from monai.transforms.post.dictionary import Invertd
from monai.transforms.spatial.dictionary import Orientationd, Resized, Spacingd
from monai.transforms.transform import MapTransform
from numpy.typing import NDArray

from node.dicom.volume import Grid, Image, Volume
from node.errors import InputRefused, ModelError, OutputRefused
from node.infer.exported import LoadedNetwork, load_exported, load_torchscript
from node.infer.failures import explained
from node.infer.manifest import Manifest, Task
from node.infer.packagings import Adapter, IntensityStep, Network
from node.infer.reduce import NoProbabilities, quantise
from node.infer.results import NO_PROBABILITIES, Certainties, Labelmap, Scores, check_labelmap, in_order, keep_sparse


class NetworkModel:
    """One bare network, loaded once and run as often as wanted, by one thread at a time."""

    def __init__(self, folder: Path, manifest: Manifest, device: str):
        """Load the network; `ModelError` says what is wrong with its file or does not fit `dicom.yaml`."""
        if manifest.network is None:
            raise ModelError(f"model {folder.name}: dicom.yaml has no network")
        self._name, self._manifest, self._settings = folder.name, manifest, manifest.network
        self._device = torch.device(device)
        load = load_torchscript if manifest.adapter is Adapter.TORCHSCRIPT else load_exported
        self._network: LoadedNetwork | None = load(folder.name, folder / self._settings.file, device)
        _check_shape(folder.name, self._network.shape, self._settings, manifest)

    def predict(self, inputs: Mapping[str, Volume | Image]) -> Labelmap | Scores:
        """Run on `inputs`, which become the channels in the manifest's order.

        Raises `InputRefused` for inputs that do not fit each other or the network, `ModelError` when the network fails,
        `OutputRefused` when what it returned is no result.
        """
        names = list(self._manifest.inputs)
        images = [inputs[name] for name in names]
        if volumes := [image for image in images if isinstance(image, Volume)]:
            if len(volumes) != len(images):
                raise InputRefused("the model takes volumes only, and was given a planar image")
            return self._predict_volume(names[0], volumes)
        return self._predict_frames(names[0], [image for image in images if isinstance(image, Image)])

    def close(self) -> None:
        """Let go of the network and its memory."""
        self._network = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _predict_volume(self, name: str, volumes: Sequence[Volume]) -> Labelmap | Scores:
        grid = volumes[0].grid
        for other in volumes[1:]:
            if other.grid.shape != grid.shape or not np.allclose(other.grid.affine_lps, grid.affine_lps, atol=1e-3):
                raise InputRefused("the inputs lie on different grids: set onto_first for all but the first of them")
        with explained(self._name, "run"), torch.inference_mode():
            array = np.stack([in_order(volume.array.transpose(2, 1, 0)) for volume in volumes])
            image = MetaTensor(torch.as_tensor(array), affine=torch.as_tensor(grid.affine_ras))
            steps = _volume_steps(self._settings)
            if self._manifest.task is Task.CLASSIFICATION:
                seen = _apply(steps, image)
                return Scores((self._score(seen),), _is_exclusive(self._settings), name)
            labels, found = self._segment(steps, image)
        checked = check_labelmap(labels.transpose(2, 1, 0), grid, self._manifest.label_names)
        certain = (
            None if found is None else {label: keep_sparse(one.transpose(2, 1, 0)) for label, one in found.items()}
        )
        return self._labelmap(Labelmap(checked, grid, name, probabilities=certain))

    def _predict_frames(self, name: str, images: Sequence[Image]) -> Labelmap | Scores:
        shape = images[0].array.shape[:3]
        if any(image.array.shape[:3] != shape for image in images):
            raise InputRefused("the inputs have different numbers of frames, rows or columns")
        steps = [*_intensity_steps(self._settings.intensity), *_size_steps(self._settings)]
        scores: list[Mapping[int, float]] = []
        labels: list[NDArray[np.int64]] = []
        found: list[Certainties | None] = []
        with explained(self._name, "run"), torch.inference_mode():
            for frame in range(shape[0]):
                array = np.concatenate([_channels(image.array[frame], self._settings) for image in images])
                image = MetaTensor(torch.as_tensor(array.transpose(0, 2, 1) if self._settings.transpose else array))
                if self._manifest.task is Task.CLASSIFICATION:
                    scores.append(self._score(_apply(steps, image)))
                else:
                    segmented, certain = self._segment(steps, image)
                    labels.append(segmented.T if self._settings.transpose else segmented)
                    found.append(certain)
        if self._manifest.task is Task.CLASSIFICATION:
            return Scores(tuple(scores), _is_exclusive(self._settings), name)
        frames = Grid((shape[0], shape[1], shape[2]), np.eye(4), "")  # for the check: frames have no place in space
        checked = check_labelmap(np.stack(labels), frames, self._manifest.label_names)
        return self._labelmap(Labelmap(checked, None, name, probabilities=self._stacked(found)))

    def _labelmap(self, labelmap: Labelmap) -> Labelmap:
        """With a remark where probabilities are wanted and there are none."""
        if labelmap.probabilities is not None or not self._manifest.probabilities:
            return labelmap
        return replace(labelmap, remarks=(*labelmap.remarks, NO_PROBABILITIES))

    def _stacked(self, frames: Sequence[Certainties | None]) -> Certainties | None:
        """The probabilities of frames, each in the network's order of axes, as those of all of them."""
        if any(frame is None for frame in frames):
            return None
        turn = (0, 2, 1) if self._settings.transpose else (0, 1, 2)
        return {
            label: np.stack([frame[label] for frame in frames if frame is not None]).transpose(turn)
            for label in frames[0] or ()
        }

    def _segment(
        self, steps: Sequence[MapTransform], image: MetaTensor
    ) -> tuple[NDArray[np.int64], Certainties | None]:
        """The labels of `image` (channels first) on its own grid, in its own order of axes, and their probabilities
        where they are wanted and the network's values are some.
        """
        seen = _apply(steps, image)
        activated = self._activate(self._infer(seen), seen)
        return self._labels(steps, image, seen, activated), self._certainties(steps, seen, activated)

    def _certainties(
        self, steps: Sequence[MapTransform], seen: MetaTensor, activated: torch.Tensor
    ) -> Certainties | None:
        if not self._manifest.probabilities:
            return None
        first = 1 if self._settings.decision == "threshold" else 0  # the label of the first channel
        found: Certainties = {}
        for label in self._manifest.segments:
            if not 0 <= label - first < activated.shape[0]:
                continue
            try:
                values = quantise(activated[label - first : label - first + 1])
            except NoProbabilities:
                return None
            returned = _return(steps, values.float(), seen, nearest=False)[0]
            found[label] = np.rint(returned).clip(0, 255).astype(np.uint8)
        return found

    def _labels(
        self, steps: Sequence[MapTransform], image: MetaTensor, seen: MetaTensor, activated: torch.Tensor
    ) -> NDArray[np.int64]:
        settings = self._settings
        if settings.decision == "argmax" and activated.shape[0] < 2:
            raise OutputRefused("the network returned one channel, which an argmax says nothing of: use a threshold")
        if settings.decision == "threshold":
            activated = activated - settings.threshold  # what lies outside a crop comes back as 0: no label
        resampled = settings.spacing_mm is not None or (settings.size is not None and settings.fit == "resize")
        if not resampled or settings.back == "nearest":
            decided = _decide(activated, settings)[None].to(torch.float32)
            return _return(steps, decided, seen, nearest=True)[0].astype(np.int64)
        best = np.zeros(image.shape[1:], np.float32)  # of "no label", where a threshold decides
        labels = np.zeros(image.shape[1:], np.int64)
        for channel in range(activated.shape[0]):
            value = _return(steps, activated[channel : channel + 1], seen, nearest=False)[0]
            if settings.decision == "argmax" and channel == 0:
                best = value
                continue
            better = value > best
            labels[better] = channel if settings.decision == "argmax" else channel + 1
            np.copyto(best, value, where=better)
        return labels

    def _infer(self, seen: MetaTensor) -> torch.Tensor:
        """What the network returns for the image that it sees: (channels, ...), on the CPU."""
        if self._network is None:
            raise ModelError(f"model {self._name} was closed")
        inferer = _make_inferer(self._settings, seen, self._device)
        single = isinstance(inferer, SimpleInferer)
        batch = seen.as_tensor()[None]
        output: Any = inferer(batch.to(self._device) if single else batch, self._run)
        if not isinstance(output, torch.Tensor):
            raise OutputRefused(f"the network returned {type(output).__name__}; expected one tensor")
        return output.detach().to("cpu", torch.float32)[0]

    def _run(self, window: torch.Tensor) -> Any:
        assert self._network is not None
        output = self._network.run(window.as_tensor() if isinstance(window, MetaTensor) else window)
        if self._manifest.task is not Task.SEGMENTATION or not isinstance(output, torch.Tensor):
            return output
        # MONAI stretches what is smaller than its window, and would stretch what a network returns without its border.
        if output.ndim != window.ndim or output.shape[2:] != window.shape[2:]:
            raise OutputRefused(
                f"the network returned a map of shape {tuple(output.shape)} for an image of {tuple(window.shape)}"
            )
        return output

    def _activate(self, output: torch.Tensor, seen: MetaTensor) -> torch.Tensor:
        if output.ndim != seen.ndim or output.shape[1:] != seen.shape[1:]:
            raise OutputRefused(
                f"the network returned a map of shape {tuple(output.shape)} for an image of shape {tuple(seen.shape)}"
            )
        return _activate(output, self._settings)

    def _score(self, seen: MetaTensor) -> dict[int, float]:
        """The probability of each class that the manifest knows."""
        output = self._infer(seen)
        if output.ndim != 1:
            raise OutputRefused(f"the network returned shape {tuple(output.shape)}; expected one number for each class")
        values = [float(value) for value in _activate(output, self._settings)]
        if len(values) == 1:  # the network speaks of one class only: 1; class 0 is that it does not hold
            values = [1 - values[0], values[0]]
        if unknown := [label for label in self._manifest.classes if label >= len(values)]:
            raise OutputRefused(f"the network returned {len(values)} classes; dicom.yaml declares class {unknown[0]}")
        if wrong := [value for value in values if not -1e-6 <= value <= 1 + 1e-6]:  # NaN is neither
            raise OutputRefused(f"the network returned {wrong[0]:.3g} as a probability: see activation in dicom.yaml")
        return {label: min(max(values[label], 0.0), 1.0) for label in self._manifest.classes}


# -- Before the network ------------------------------------------------------------------------------------------------


def _check_shape(name: str, shape: tuple[int | None, ...] | None, settings: Network, manifest: Manifest) -> None:
    """Refuse a window or size of `dicom.yaml` that an exported network of fixed shape cannot take."""
    if shape is None:
        return
    file = settings.file
    if len(shape) != settings.dimensions + 2:
        raise ModelError(f"model {name}: {file} takes {len(shape) - 2} dimensions; see network.dimensions")
    if shape[0] not in (1, None):
        raise ModelError(f"model {name}: {file} was exported for {shape[0]} images at once; export it for 1")
    planar = any(wanted.kind == "image" for wanted in manifest.inputs.values())
    channels = len(manifest.inputs) * (3 if planar and settings.rgb else 1)
    if shape[1] not in (channels, None):
        raise ModelError(f"model {name}: {file} takes {shape[1]} channels; dicom.yaml gives it {channels}")
    given = settings.roi or settings.size or (None,) * settings.dimensions
    if any(fixed is not None and fixed != size for fixed, size in zip(shape[2:], given, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape[2:])
        field = "network.roi" if manifest.task is Task.SEGMENTATION else "network.size"
        raise ModelError(f"model {name}: {file} was exported for images of [{wanted}] only; set {field} to that")


def _volume_steps(settings: Network) -> list[MapTransform]:
    labels = (("L", "R"), ("P", "A"), ("I", "S"))
    steps: list[MapTransform] = [Orientationd("image", axcodes=settings.orientation, labels=labels)]
    if settings.spacing_mm is not None:
        steps.append(Spacingd("image", pixdim=settings.spacing_mm, mode="bilinear", padding_mode="border"))
    return [*steps, *_intensity_steps(settings.intensity), *_size_steps(settings)]


def _intensity_steps(steps: Sequence[IntensityStep]) -> list[MapTransform]:
    transforms: list[MapTransform] = []
    for step in steps:
        low, high = step.to
        if step.clip is not None:
            transforms.append(ScaleIntensityRanged("image", *step.clip, *step.clip, clip=True))
        elif step.scale is not None:
            transforms.append(ScaleIntensityRanged("image", *step.scale, low, high, clip=False))
        elif step.clip_percentiles is not None:
            transforms.append(ClipIntensityPercentilesd("image", *step.clip_percentiles, channel_wise=True))
        elif step.scale_percentiles is not None:
            stretch = ScaleIntensityRangePercentilesd("image", *step.scale_percentiles, low, high, channel_wise=True)
            transforms.append(stretch)
        elif step.normalise is not None:
            transforms.append(NormalizeIntensityd("image", nonzero=step.normalise == "nonzero", channel_wise=True))
        elif step.mean is not None and step.standard_deviation is not None:
            means, deviations = np.array(step.mean), np.array(step.standard_deviation)
            transforms.append(NormalizeIntensityd("image", means, deviations, channel_wise=True))
    return transforms


def _size_steps(settings: Network) -> list[MapTransform]:
    if settings.size is None:
        return []
    if settings.fit == "resize":
        mode = "bilinear" if len(settings.size) == 2 else "trilinear"
        return [Resized("image", spatial_size=settings.size, mode=mode)]
    return [ResizeWithPadOrCropd("image", spatial_size=settings.size)]


def _channels(frame: NDArray[Any], settings: Network) -> NDArray[np.float32]:
    """A frame (rows, columns) or (rows, columns, 3) as (channels, rows, columns)."""
    if frame.ndim == 3 and not settings.rgb:
        raise InputRefused("the image is in colour, and the network takes grey images: see rgb in dicom.yaml")
    array = np.moveaxis(frame, -1, 0) if frame.ndim == 3 else frame[None]
    if settings.rgb and array.shape[0] == 1:
        array = np.repeat(array, 3, axis=0)
    return np.ascontiguousarray(array, np.float32)


def _apply(steps: Sequence[MapTransform], image: MetaTensor) -> MetaTensor:
    if not steps:
        return image
    return Compose(steps)({"image": image})["image"]  # pyright: ignore[reportReturnType, reportCallIssue, reportArgumentType]


# -- The network and after it ------------------------------------------------------------------------------------------


def _make_inferer(settings: Network, seen: MetaTensor, device: torch.device) -> Inferer:
    """Windows of one at a time: an exported network may be bound to that."""
    windows: dict[str, Any] = {
        "sw_batch_size": 1,
        "overlap": settings.overlap,
        "mode": settings.blending,
        "sw_device": device,
        "device": torch.device("cpu"),  # every class of the whole image: in the machine's memory, not the GPU's
    }
    if settings.dimensions == 2 and seen.ndim == 4:
        return SliceInferer(spatial_dim=2, roi_size=settings.roi or tuple(seen.shape[1:3]), **windows)
    if settings.roi is None:
        return SimpleInferer()
    return SlidingWindowInferer(roi_size=settings.roi, **windows)


def _activate(output: torch.Tensor, settings: Network) -> torch.Tensor:
    if not torch.isfinite(output).all():
        raise OutputRefused("the network returned values that are not finite (NaN or infinity)")
    if settings.activation == "softmax":
        if output.shape[0] < 2:
            raise OutputRefused("the network returned one channel, of which a softmax is always 1: use sigmoid")
        return torch.softmax(output, dim=0)
    return torch.sigmoid(output) if settings.activation == "sigmoid" else output


def _is_exclusive(settings: Network) -> bool:
    return settings.activation == "softmax" or (settings.activation == "none" and settings.decision == "argmax")


def _decide(activated: torch.Tensor, settings: Network) -> torch.Tensor:
    """The label at each place; a threshold was subtracted before."""
    if settings.decision == "argmax":
        return activated.argmax(dim=0)
    best, channel = activated.max(dim=0)
    return torch.where(best > 0, channel + 1, 0)


def _return(steps: Sequence[MapTransform], result: torch.Tensor, seen: MetaTensor, *, nearest: bool) -> NDArray[Any]:
    """A map on the grid that the network saw, (channels, ...), on the grid that the image came from."""
    if not steps:
        return result.numpy()
    inverse = Invertd("pred", transform=Compose(steps), orig_keys="image", nearest_interp=nearest, to_tensor=True)
    returned = inverse({"image": seen, "pred": MetaTensor(result, affine=seen.affine)})["pred"]
    return (returned.as_tensor() if isinstance(returned, MetaTensor) else returned).cpu().numpy()
