"""The probabilities of a bundle's labels: taken between its network and its post-processing, brought to its input.

The bundle itself runs as it would without them. What its network returned is kept as one byte per class and voxel, and
one class at a time goes back to the source's grid with linear interpolation, in blocks, where its labels are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.post.dictionary import Invertd

from node.dicom.volume import Image, Volume
from node.infer.blockwise import ChunkedInvertd, InvertCertaintiesd
from node.infer.bundle_output import place_map
from node.infer.manifest import Manifest
from node.infer.poststeps import Recipe
from node.infer.reduce import NoProbabilities, activate, quantise, to_certainties
from node.infer.resampling import row_blocks
from node.infer.results import Certainties, keep_sparse
from node.infer.sliding import SlabSlidingWindowInferer

_BLOCK_BYTES = 256 * 2**20  # of a network's output that is activated at once
NOT_FROM_0_TO_1 = (
    "Probabilities are not available: the network's values are not from 0 to 1, nor does it say what they are."
)


class ProbabilityTap:
    """What stands behind a bundle's network and keeps what it returned until the labels are made."""

    def __init__(self, recipe: Recipe, applied: str, postprocessing: Any, manifest: Manifest):
        """`applied` is the activation that the inferer has done already, `postprocessing` the bundle's own steps."""
        self._recipe = recipe
        self._before = "none" if applied == recipe.before else recipe.before
        self._labels = [label for label in manifest.segments if label not in manifest.background]
        steps = getattr(postprocessing, "transforms", ())
        self._inversion = next((step for step in steps if isinstance(step, Invertd)), None)
        self._kept: torch.Tensor | None = None  # (classes, x, y[, z]): uint8, or values to be activated at the end

    def keep(self, evaluator: Any) -> None:
        """Called when the network has answered, before any post-processing changes its answer in place."""
        self._kept = None
        inferer = evaluator.inferer
        if isinstance(inferer, SlabSlidingWindowInferer) and inferer.beside is not None:
            kept, inferer.kept_beside = inferer.kept_beside, None
            self._kept = None if kept is None else kept[0]
            return
        output = evaluator.state.output.get("pred")
        if not isinstance(output, torch.Tensor):
            return
        values = (output.as_tensor() if isinstance(output, MetaTensor) else output)[0]
        if self._recipe.after != "none":
            self._kept = values
            return
        kept = torch.empty(values.shape, dtype=torch.uint8)
        reduce = to_certainties(self._before, assumed=self._recipe.assumed)
        try:
            for rows in row_blocks(values.shape[1], values[:, :1].numel() * 12, _BLOCK_BYTES):
                kept[:, rows] = reduce(values[:, rows]).cpu()
        except NoProbabilities:
            return
        self._kept = kept

    def give(self, seen: Any, source: Volume | Image) -> Certainties:
        """The probabilities of the labels on the source's grid (slices, rows, columns), or a frame's (rows, columns).

        `seen` is the image as the network saw it. Empty where the network returned none. What was kept is forgotten.
        """
        kept, self._kept = self._kept, None
        if kept is None or not isinstance(seen, MetaTensor):
            return {}
        found: Certainties = {}
        for label in self._labels:
            channel = 0 if self._recipe.masks and kept.shape[0] == 1 and label == 1 else label
            if channel >= kept.shape[0] or (channel == 0 and kept.shape[0] > 1):
                continue
            values = self._inverted(kept[channel : channel + 1], seen)
            found[label] = keep_sparse(place_map(values, seen, source, "bilinear"))
        return found

    def _inverted(self, values: torch.Tensor, seen: MetaTensor) -> torch.Tensor:
        """One class (1, x, y[, z]) as uint8 on the grid that `seen` came from, or on its own where nothing inverts."""
        if values.dtype == torch.uint8 and self._inversion is None:
            return MetaTensor(values, affine=seen.affine)
        values = values.float() / 255 if values.dtype == torch.uint8 else values.float()
        if self._inversion is None:
            return MetaTensor(quantise(activate(values, self._recipe.after)), affine=seen.affine)
        transform: Any = self._inversion.transform
        if isinstance(self._inversion, ChunkedInvertd):
            transform = self._inversion.original
        # Values on the device of the image, as the bundle inverts them.
        part = MetaTensor(values.to(seen.device), affine=seen.affine)
        key = str(self._inversion.orig_keys[0])  # by which the bundle's preprocessing knows its image
        return InvertCertaintiesd("pred", transform, orig_keys=key, after=self._recipe.after)(
            {"pred": part, key: seen}
        )["pred"]


def stack_frames(frames: list[Certainties]) -> Certainties:
    """The maps of frames (rows, columns) as maps of all of them, for the labels that every frame has."""
    labels = set.intersection(*(set(frame) for frame in frames)) if frames else set[int]()
    return {label: np.stack([frame[label] for frame in frames]) for label in sorted(labels)}
