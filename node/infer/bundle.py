"""MONAI Bundles as published, run from memory: our volume replaces their dataset, their prediction no file.

The bundle's own evaluator runs (not a copy of what it does), so whatever its makers configured between loader and
post-processing happens. `node.infer.bundle_config` exchanges what reads and writes files, `node.infer.presented` is
what the bundle sees, `node.infer.bundle_output` reads what it returns.
"""

from __future__ import annotations

import node.infer.torchvision_operators  # noqa: F401 - before MONAI

# isort: split
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from numpy.typing import NDArray

from node.dicom.volume import Image, Volume
from node.errors import ModelError, OutputRefused
from node.infer.bounded import applied_activation, bound_memory, remarks_of
from node.infer.bundle_config import load_weights, output_transform, parse_bundle
from node.infer.bundle_output import Item, read_boxes, read_labels, read_landmarks, read_scores
from node.infer.failures import explained
from node.infer.manifest import Manifest, Task
from node.infer.poststeps import probability_recipe
from node.infer.presented import MemoryReader
from node.infer.probabilities import ProbabilityTap, stack_frames
from node.infer.results import NO_PROBABILITIES, Certainties, Labelmap, Prediction, check_labelmap
from node.infer.shims import mended_libraries
from node.infer.sources import sources_of, tell_of


class BundleModel:
    """One bundle, loaded once and run as often as wanted, by one thread at a time."""

    def __init__(self, folder: Path, manifest: Manifest, device: str):
        """Load the bundle and its weights; `ModelError` says what is missing or raised."""
        self._folder = folder.absolute()
        self._manifest = manifest
        self._device = torch.device(device)
        self._memory = MemoryReader(manifest.inputs)
        self._modules: dict[str, ModuleType] = {}
        self._clock = _Clock(self._device)
        self._pieces: tuple[Any, Any] = (None, None)  # its inferer and its post-processing
        self._tap: ProbabilityTap | None = None  # where probabilities are wanted
        self._finish: Any = None  # what a saving handler of the bundle would have done to the output
        self._evaluator: Any = self._load()

    @property
    def seconds(self) -> dict[str, float]:
        """Of the last run, in `preprocess`, `network` and `postprocess`."""
        return self._clock.seconds

    def predict(self, inputs: Mapping[str, Volume | Image]) -> Prediction:
        """Run on `inputs` (one per input of the manifest); the prediction is in the first input's own geometry.

        Raises `ModelError` when the bundle raises, `OutputRefused` when what it returns is no such prediction.
        """
        name, manifest = next(iter(self._manifest.inputs)), self._manifest
        self._check_kinds(inputs)
        if self._evaluator is None:
            self._evaluator = self._load()
        self._memory.sources = dict(inputs)
        self._clock.start()
        done = False
        try:
            with self._running("run"), torch.inference_mode():
                prediction = self._predict(inputs[name], name, manifest)
            done = True
        finally:
            self._memory.sources = {}
            self._evaluator.state.output = None  # the next study must not wait with this one's memory
            self._evaluator.state.batch = None
            if not done:  # an ignite engine that raised never runs again: the next study loads the bundle afresh
                self._evaluator = None
        self._clock.stop()
        return prediction

    def close(self) -> None:
        """Let go of the network and of the bundle's own modules."""
        self._evaluator = self._finish = self._tap = None
        self._pieces = (None, None)
        self._modules.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _predict(self, source: Volume | Image, name: str, manifest: Manifest) -> Prediction:
        match manifest.task:
            case Task.SEGMENTATION if isinstance(source, Volume):
                array, found = self._labels(source, None)
                labels = check_labelmap(array, source.grid, manifest.label_names)
                return self._labelmap(Labelmap(labels, source.grid, name, self._remarks()), found)
            case Task.SEGMENTATION if isinstance(source, Image):
                frames = [self._labels(source, frame) for frame in range(len(source.frames))]
                array = np.stack([labels for labels, _ in frames])
                labels = check_labelmap(array, array.shape, manifest.label_names)
                return self._labelmap(Labelmap(labels, None, name), stack_frames([found for _, found in frames]))
            case Task.DETECTION:
                item = self._run(None)
                return read_boxes(item, manifest, self._seen(item), name)
            case Task.CLASSIFICATION:
                frames = range(len(source.frames)) if isinstance(source, Image) else (None,)
                return read_scores([self._run(frame) for frame in frames], manifest, name)
            case _:
                return read_landmarks(self._run(None), manifest, source, name)

    def _labels(self, source: Volume | Image, frame: int | None) -> tuple[NDArray[np.number], Certainties]:
        item = self._run(frame)
        labels = read_labels(item, self._manifest, self._seen(item), source)
        return labels, self._tap.give(self._seen(item), source) if self._tap else {}

    def _labelmap(self, labelmap: Labelmap, found: Certainties) -> Labelmap:
        if self._tap is None:
            return labelmap
        if not found:
            return replace(labelmap, remarks=(*labelmap.remarks, NO_PROBABILITIES))
        return replace(labelmap, probabilities=found)

    def _run(self, frame: int | None) -> Item:
        """One run of the bundle's evaluator, and the item that came out of its post-processing."""
        self._memory.frame = frame
        self._evaluator.run()
        output = self._evaluator.state.output
        if self._finish is not None:
            output = self._finish(output)
        item = output[0] if isinstance(output, Sequence) else output
        wanted = self._manifest.boxes.box if self._manifest.task is Task.DETECTION else self._manifest.output
        if wanted not in item:
            field = "boxes" if self._manifest.task is Task.DETECTION else "output"
            raise ModelError(
                f"model {self._folder.name} returned no {wanted!r} (there are {', '.join(sorted(map(str, item)))}): "
                f"see {field} in dicom.yaml"
            )
        return item

    def _remarks(self) -> tuple[str, ...]:
        return remarks_of(*self._pieces)

    def _seen(self, item: Item) -> Any:
        return item.get(next(iter(self._manifest.data_keys)), item.get("image"))

    def _check_kinds(self, inputs: Mapping[str, Volume | Image]) -> None:
        for name, wanted in self._manifest.inputs.items():
            if isinstance(inputs[name], Image) != (wanted.kind == "image"):
                raise ModelError(
                    f"model {self._folder.name} takes {wanted.kind}s as {name!r}: see inputs in dicom.yaml"
                )

    @contextmanager
    def _running(self, doing: str) -> Iterator[None]:
        with (
            explained(self._folder.name, doing, partial(tell_of, self._folder)),
            sources_of(self._folder, self._modules),
            mended_libraries(),
        ):
            yield

    def _load(self) -> Any:
        """The bundle's evaluator, with its weights."""
        with self._running("be loaded"):
            parser = parse_bundle(self._folder, self._manifest, self._device, self._memory)
            recipe = probability_recipe(parser.get()) if self._manifest.probabilities else None
            if self._manifest.task is Task.SEGMENTATION:
                bound_memory(parser.get(), recipe)
            load_weights(parser, self._folder, self._device)
            evaluator = parser.get_parsed_content("evaluator", instantiate=True)
            self._finish = output_transform(parser)
            self._pieces = (evaluator.inferer, parser.get_parsed_content("postprocessing", default=None))
            if self._manifest.task is Task.SEGMENTATION:
                evaluator.add_event_handler(IterationEvents.FORWARD_COMPLETED, _check_extent)
            if recipe is not None:
                applied = applied_activation(parser.get())
                self._tap = ProbabilityTap(recipe, applied, self._pieces[1], self._manifest)
                evaluator.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._tap.keep)
            self._clock.watch(evaluator)
            return evaluator


class _Clock:
    """Seconds of a run: until the network has its input, until it has answered, and until the prediction is there."""

    def __init__(self, device: torch.device):
        self._device = device
        self._last = 0.0
        self.seconds: dict[str, float] = {}

    def watch(self, evaluator: Any) -> None:
        evaluator.add_event_handler(Events.ITERATION_STARTED, lambda _: self._add("preprocess"))
        evaluator.add_event_handler(IterationEvents.FORWARD_COMPLETED, lambda _: self._add("network"))

    def start(self) -> None:
        self.seconds = dict.fromkeys(("preprocess", "network", "postprocess"), 0.0)
        self._last = time.monotonic()

    def stop(self) -> None:
        self._add("postprocess")

    def _add(self, stage: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.monotonic()
        self.seconds[stage] += now - self._last
        self._last = now


def _check_extent(evaluator: Any) -> None:
    """Refuse what the network itself returned when it does not cover the image that it saw, voxel by voxel.

    A tensor that was cut or strided keeps the affine of its image, and an inversion would put it in the wrong place.
    """
    output = evaluator.state.output
    prediction, image = output.get("pred"), output.get("image")
    if not isinstance(prediction, torch.Tensor) or not isinstance(image, torch.Tensor):
        return
    if prediction.ndim != image.ndim or prediction.shape[2:] != image.shape[2:]:
        raise OutputRefused(
            f"the model returned a map of shape {tuple(prediction.shape)} for an image of shape {tuple(image.shape)}"
        )
