"""Where a classifier's score came from: occlusion sensitivity (Zeiler and Fergus, ECCV 2014) through the model itself.

Patch after patch of the image is covered and the model asked again. The map is by how much the score of the class that
won drops when a place is covered: high where the model looked, below 0 where covering made it more certain. It needs no
gradients and nothing of the model but its answers, so it holds for every adapter and for models in confined processes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from node.dicom.volume import Image, Volume
from node.errors import ModelError, OutputRefused
from node.infer.manifest import Explanation, Manifest
from node.infer.model import Model
from node.infer.results import Scores

Sources = Mapping[str, Volume | Image]
Extent = tuple[int, ...]  # slices, rows, columns; rows, columns


@dataclass(frozen=True)
class Explained:
    """The score of one class, of the whole input or of one of its frames, and where it came from."""

    label: int  # the class of the highest score
    score: float  # 0 to 1, of the image as it is
    frame: int | None  # index of the frame; None for the whole input
    drops: NDArray[np.float32]  # by how much the score drops, -1 to 1: (slices, rows, columns), of a frame (1, ...)


@dataclass(frozen=True)
class Saliency:
    """What the scores of one input came from."""

    parts: tuple[Explained, ...]  # one for the whole input, or one for each frame that was explained
    patches: Extent  # how many were covered along each axis
    fill: str  # what stood in their place
    runs: int  # of the model
    input: str = "image"
    remarks: tuple[str, ...] = field(default=())


def explain_scores(
    model: Model,
    inputs: Sources,
    prediction: Scores,
    manifest: Manifest,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Saliency:
    """Cover the inputs that `model` saw patch by patch and ask it again, in the same order every time.

    `inputs` are those of `predict`, every volume regular; the map is on the first one's grid. Where others have its
    shape they are covered in the same place, for they are channels of one picture. Of an image judged frame by frame
    the frames of the highest scores are explained, each by itself. `progress` is told how many of the runs are done;
    what it raises ends the work, as a lost lease should.

    Raises `ModelError` where the model fails or the manifest's time is over, `OutputRefused` where it gives no scores:
    the prediction itself is as good as before, and the caller reports it without a map.
    """
    settings = manifest.saliency or Explanation()
    source = inputs[prediction.input]
    frames = _chosen(prediction, source, settings.frames)
    extent = source.array.shape[:3] if None in frames else source.array.shape[1:3]
    counts = _counts(extent, settings.patches, max(4, settings.runs_max // len(frames)))
    total = int(np.prod(counts)) * len(frames)
    deadline = time.monotonic() + settings.timeout_s
    done = 0

    def ask(covered: Sources, label: int) -> float:
        nonlocal done
        if time.monotonic() > deadline:
            raise ModelError(
                f"the map of what the score came from was given up after {settings.timeout_s:g} s, {done} of {total} "
                "runs: set saliency.patches or saliency.runs_max in dicom.yaml lower"
            )
        score = _score(model.predict(covered), label)
        done += 1
        progress(done, total)
        return score

    parts = []
    for frame in frames:
        values = prediction.values[frame or 0]
        label = max(sorted(values), key=lambda number: values[number])
        asked = inputs if frame is None else _one_frame(inputs, frame, len(source.array))
        drops = _drops(asked, prediction.input, counts, settings, lambda covered, label=label: ask(covered, label))
        grown = _grow(drops, extent)
        whole = grown if frame is None else grown[None]
        parts.append(Explained(label, float(values[label]), frame, values[label] - whole))
    remarks = ()
    if counts != tuple(min(settings.patches, size) for size in extent):
        wanted, made = (" x ".join(map(str, each)) for each in ([settings.patches] * len(extent), counts))
        remarks = (f"What the score came from was looked for in {made} patches, not {wanted}: see saliency.runs_max.",)
    return Saliency(tuple(parts), counts, settings.fill, total, prediction.input, remarks)


def _chosen(prediction: Scores, source: Volume | Image, most: int) -> list[int | None]:
    """The frames of the highest scores in their order; None alone for a judgement of the whole input."""
    if not isinstance(source, Image) or len(prediction.values) != source.array.shape[0]:
        return [None]
    best = [max(values.values(), default=0.0) for values in prediction.values]
    return [*sorted(sorted(range(len(best)), key=lambda frame: (-best[frame], frame))[:most])]


def _counts(extent: Extent, patches: int, runs_max: int) -> Extent:
    """Patches along each axis: as many as wanted, fewer where the axis or the runs do not allow them."""
    counts = [min(patches, size) for size in extent]
    while np.prod(counts) > runs_max and max(counts) > 1:
        counts[counts.index(max(counts))] -= 1
    return tuple(counts)


def _drops(
    inputs: Sources,
    first: str,
    counts: Extent,
    settings: Explanation,
    ask: Callable[[Sources], float],
) -> NDArray[np.float32]:
    """The score of the inputs with each patch covered, by patch."""
    shape = inputs[first].array.shape[:3]
    scores = np.empty(counts, np.float32)
    together = [name for name, each in inputs.items() if each.array.shape[:3] == shape]
    copies = {name: replace(inputs[name], array=inputs[name].array.copy()) for name in together}
    covered = {**inputs, **copies}
    for place, patch in _patches(shape, counts):
        kept = {name: copies[name].array[patch].copy() for name in together}
        for name in together:
            copies[name].array[patch] = _filling(inputs[name].array, patch, settings.fill)
        scores[place] = ask(covered)
        for name in together:
            copies[name].array[patch] = kept[name]
    return scores


def _patches(shape: Extent, counts: Extent) -> Iterator[tuple[Extent, tuple[slice, ...]]]:
    """The place of each patch in the grid of them, and its voxels: twice as wide as the step from one to the next."""
    axes: list[Sequence[slice]] = [[slice(None)]] * (len(shape) - len(counts))  # the one frame
    for size, count in zip(shape[len(shape) - len(counts) :], counts, strict=True):
        edges = np.rint(np.linspace(0, size, count + 2)).astype(int)
        axes.append([slice(int(edges[i]), max(int(edges[i + 2]), int(edges[i]) + 1)) for i in range(count)])
    for place in itertools.product(*(range(count) for count in counts)):
        index = (0,) * (len(shape) - len(counts)) + place
        yield place, tuple(axis[number] for axis, number in zip(axes, index, strict=True))


def _filling(array: NDArray[np.generic], patch: tuple[slice, ...], fill: str) -> NDArray[np.generic]:
    """What covers a patch: the mean of the voxels around it, as wide as half of it, or the image's smallest value.

    Of a colour image one value for each channel.
    """
    axes = tuple(range(len(patch)))
    if fill == "background":
        return array.min(axis=axes)
    wider = []
    for axis, part in enumerate(patch):
        start, stop, _ = part.indices(array.shape[axis])
        margin = max(1, (stop - start) // 4)
        wider.append(slice(max(0, start - margin), min(array.shape[axis], stop + margin)))
    around, inside = array[tuple(wider)], array[patch]
    count = np.prod(around.shape[: len(axes)]) - np.prod(inside.shape[: len(axes)])
    if count == 0:  # the patch is the whole image
        return array.mean(axis=axes).astype(array.dtype)
    total = around.sum(axis=axes, dtype=np.float64) - inside.sum(axis=axes, dtype=np.float64)
    return (total / count).astype(array.dtype)


def _grow(scores: NDArray[np.float32], extent: Extent) -> NDArray[np.float32]:
    """Values at the patches' middles on every voxel: linear between them, level beyond the outermost."""
    grown = scores
    for axis, (count, size) in enumerate(zip(scores.shape, extent, strict=True)):
        middles = (np.arange(count) + 1) * size / (count + 1) - 0.5
        place = np.interp(np.arange(size), middles, np.arange(count))
        low = np.minimum(place.astype(int), max(count - 2, 0))
        share = (place - low).astype(np.float32).reshape([-1 if other == axis else 1 for other in range(len(extent))])
        upper = np.minimum(low + 1, count - 1)
        grown = np.take(grown, low, axis) * (1 - share) + np.take(grown, upper, axis) * share
    return grown.astype(np.float32)


def _one_frame(inputs: Sources, frame: int, count: int) -> Sources:
    """One frame of each image that has `count` of them as an image of its own."""
    return {
        name: replace(each, array=each.array[frame : frame + 1], frames=each.frames[frame : frame + 1])
        if isinstance(each, Image) and len(each.array) == count
        else each
        for name, each in inputs.items()
    }


def _score(prediction: object, label: int) -> float:
    if not isinstance(prediction, Scores) or len(prediction.values) != 1 or label not in prediction.values[0]:
        raise OutputRefused("the model gave another kind of answer when a part of its image was covered")
    return float(prediction.values[0][label])
