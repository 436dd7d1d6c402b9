"""Which steps of a bundle's configuration have a twin in bounded memory, and the exchange of the one for the other.

Most segmentation bundles end in one of four chains of activation, inversion and discretisation. Where the configuration
is exactly one of them, the sliding window gives labels or probabilities slab by slab (`node.infer.sliding`) and the
inversion runs in blocks (`node.infer.blockwise`), with the same result. Anything else stays as its makers wrote it.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers.inferer import SlidingWindowInferer

from node.infer.inspection import components
from node.infer.poststeps import (
    PASSES_LABELS,
    Component,
    Recipe,
    activation_of,
    is_argmax,
    is_used,
    kind_of,
    threshold_of,
    work_on_prediction,
)
from node.infer.reduce import to_certainties, to_labels, to_masks, to_values
from node.infer.sliding import SlabSlidingWindowInferer

_WINDOWS = ("SlidingWindowInferer", "SlidingWindowInfererAdapt")
_RESAMPLES = (  # how such transforms' names begin
    "Spacing", "SpatialResample", "Resample", "Resize", "Zoom", "Rotate", "Affine", "Rand", "Warp", "Grid",
)  # fmt: skip
_SLAB_INFERER = "node.infer.bounded.slab_inferer"
_REDUCTIONS = {"labels": to_labels, "masks": to_masks, "values": to_values}


def bound_memory(config: Component, recipe: Recipe | None = None) -> bool:
    """Exchange what can be in a parsed inference configuration, in place; whether anything was.

    With `recipe` a sliding window that would return decisions only keeps the probabilities beside them.
    """
    exchanged = _exchange_chain(config)
    inferer = config.get("inferer")
    if exchanged and recipe is not None and isinstance(inferer, dict) and inferer.get("kind") in ("labels", "masks"):
        inferer |= {"beside": recipe.before, "assumed": recipe.assumed}
    return exchanged


def _exchange_chain(config: Component) -> bool:
    post = config.get("postprocessing")
    steps = post.get("transforms") if isinstance(post, dict) else None
    if not isinstance(steps, list) or not all(isinstance(step, dict) and "_target_" in step for step in steps):
        return False
    if not all(isinstance(step.get("_disabled_", False), bool | type(None)) for step in steps):
        return False  # an expression: it is not known yet which steps run
    if not is_used(config, "inferer") or not is_used(config, "postprocessing"):
        return False
    live = [step for step in steps if not step.get("_disabled_") and kind_of(step) != "EnsureType"]
    if any(kind_of(step) == "Invert" and step.get("post_func") is not None for step in live):
        return False  # a function of the values that are inverted
    windowed = isinstance(config.get("inferer"), dict) and kind_of(config["inferer"]) in _WINDOWS
    return _argmax_then_invert(config, live, windowed) or _invert_then_decide(config, live, windowed)


def slab_inferer(
    inferer: SlidingWindowInferer, kind: str, *, beside: str | None = None, assumed: bool = False, **reduction: Any
) -> SlabSlidingWindowInferer:
    """What a configuration's sliding window becomes: the same windows, reduced slab by slab.

    `beside` is the activation of the probabilities that are kept beside what `kind` says, `assumed` as in `Recipe`.
    """
    kept = None if beside is None else to_certainties(beside, assumed=assumed)
    return SlabSlidingWindowInferer.of(inferer, _REDUCTIONS[kind](**reduction), beside=kept)


def applied_activation(config: Component) -> str:
    """What the exchanged sliding window does to the classes that it returns; "none" for one that stayed as it was."""
    inferer = config.get("inferer")
    if not isinstance(inferer, dict) or inferer.get("_target_") != _SLAB_INFERER:
        return "none"
    return str(inferer.get("activation", "none"))


def remarks_of(inferer: Any, postprocessing: Any) -> tuple[str, ...]:
    """What the bounded pieces did that the reader of a result should know, such as a step down for lack of memory."""
    pieces = [inferer, *getattr(postprocessing, "transforms", ())]
    return tuple(dict.fromkeys(remark for piece in pieces for remark in getattr(piece, "remarks", ())))


def _argmax_then_invert(config: Component, live: list[Component], windowed: bool) -> bool:
    """[Activationsd] → AsDiscreted(argmax) → (what passes labels on) → Invertd."""
    kinds = [kind_of(step) for step in live]
    start = 1 if kinds[:1] == ["Activations"] else 0
    if not windowed or kinds[start : start + 1] != ["AsDiscrete"] or "Invert" not in kinds:
        return False
    decide, invert = live[start], live[kinds.index("Invert")]
    between = kinds[start + 1 : kinds.index("Invert")]
    activation = activation_of(live[0]) if start else "none"
    if not is_argmax(decide) or activation is None or not all(kind in PASSES_LABELS for kind in between):
        return False
    if not work_on_prediction([*live[:start], decide, invert]):
        return False
    for step in live[: start + 1]:
        step["_disabled_"] = True
    _exchange(invert, "ChunkedInvertd", live)
    invert["nearest_interp"] = True  # a label map that is interpolated linearly invents labels (prostate_mri_anatomy)
    _slab(config, "labels", activation=activation)
    return True


def _invert_then_decide(config: Component, live: list[Component], windowed: bool) -> bool:
    """Activationsd → Invertd → AsDiscreted, or Invertd → [Activationsd] → AsDiscreted."""
    kinds = [kind_of(step) for step in live]
    if "Invert" not in kinds:
        return False
    place = kinds.index("Invert")
    invert = live[place]
    before, after = live[:place], live[place + 1 :]
    if [kind_of(step) for step in before] not in ([], ["Activations"]) or invert.get("nearest_interp") is True:
        return False
    first = activation_of(before[0]) if before else "none"
    second = "none"
    decide = after[0] if after else {}
    if kind_of(decide) == "Activations":
        second, decide = activation_of(decide), (after[1] if len(after) > 1 else {})
    used = [*before, invert, *after[: after.index(decide) + 1]] if decide in after else []
    if (
        kind_of(decide) != "AsDiscrete"
        or first is None
        or second not in ("none", "sigmoid")
        or not work_on_prediction(used)
    ):
        return False
    threshold = threshold_of(decide)
    if not (is_argmax(decide) and second == "none") and threshold is None:
        return False
    resampled = _may_resample(config, invert)
    for step in used:
        if step is not invert:
            step["_disabled_"] = True
    if windowed and not resampled and second == "none":  # turning and cropping change no value: decide before them
        _exchange(invert, "ChunkedInvertd", live)
        invert["nearest_interp"] = True
        if threshold is None:
            _slab(config, "labels", activation=first)
        else:
            _slab(config, "masks", activation=first, threshold=threshold)
        return True
    _exchange(invert, "ChunkedInvertArgmaxd", live)
    invert |= {"activation": "none" if windowed else first, "activation_after": second}
    if threshold is not None:
        invert["threshold"] = threshold
    if windowed:
        _slab(config, "values", activation=first)
    return True


def _may_resample(config: Component, invert: Component) -> bool:
    """Whether the inversion interpolates, as far as it can be known: a reference, an expression or a transform of the
    bundle's own (spleen_deepedit_annotation adds up lists) may hide anything.
    """
    before = config["preprocessing"]
    if invert.get("transform") not in ("@preprocessing", "$@preprocessing") or not isinstance(before, dict):
        return True
    steps = before.get("transforms")
    if not isinstance(steps, list) or not all(isinstance(step, dict) and "_target_" in step for step in steps):
        return True
    return any(kind_of(part).startswith(_RESAMPLES) or not _is_monai(part) for part in components(before))


def _is_monai(component: Component) -> bool:
    target = str(component["_target_"])
    return "." not in target or target.startswith("monai.")


def _slab(config: Component, kind: str, **reduction: Any) -> None:
    config["inferer"] = {
        "_target_": _SLAB_INFERER,
        "inferer": config["inferer"],
        "kind": kind,
        **reduction,
    }


def _exchange(invert: Component, name: str, live: list[Component]) -> None:
    invert["_target_"] = f"node.infer.blockwise.{name}"
    own = [step for step in live[live.index(invert) + 1 :] if step.get("_disabled_") is not True]
    if own:  # what follows was written for MONAI's float32
        invert["dtype"] = torch.float32
