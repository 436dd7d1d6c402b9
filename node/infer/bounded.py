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
from node.infer.reduce import to_labels, to_masks, to_values
from node.infer.sliding import SlabSlidingWindowInferer

Component = dict[str, Any]

_WINDOWS = ("SlidingWindowInferer", "SlidingWindowInfererAdapt")
_RESAMPLES = (  # how such transforms' names begin
    "Spacing", "SpatialResample", "Resample", "Resize", "Zoom", "Rotate", "Affine", "Rand", "Warp", "Grid",
)  # fmt: skip
_PASSES_LABELS = ("KeepLargestConnectedComponent", "RemoveSmallObjects", "FillHoles", "EnsureType", "ToDevice")
_REDUCTIONS = {"labels": to_labels, "masks": to_masks, "values": to_values}


def bound_memory(config: Component) -> bool:
    """Exchange what can be in a parsed inference configuration, in place; whether anything was."""
    post = config.get("postprocessing")
    steps = post.get("transforms") if isinstance(post, dict) else None
    if not isinstance(steps, list) or not all(isinstance(step, dict) and "_target_" in step for step in steps):
        return False
    if not all(isinstance(step.get("_disabled_", False), bool | type(None)) for step in steps):
        return False  # an expression: it is not known yet which steps run
    if not _is_used(config, "inferer") or not _is_used(config, "postprocessing"):
        return False
    live = [step for step in steps if not step.get("_disabled_") and _kind(step) != "EnsureType"]
    if any(_kind(step) == "Invert" and step.get("post_func") is not None for step in live):
        return False  # a function of the values that are inverted
    windowed = isinstance(config.get("inferer"), dict) and _kind(config["inferer"]) in _WINDOWS
    return _argmax_then_invert(config, live, windowed) or _invert_then_decide(config, live, windowed)


def slab_inferer(inferer: SlidingWindowInferer, kind: str, **reduction: Any) -> SlabSlidingWindowInferer:
    """What a configuration's sliding window becomes: the same windows, reduced slab by slab."""
    return SlabSlidingWindowInferer.of(inferer, _REDUCTIONS[kind](**reduction))


def remarks_of(inferer: Any, postprocessing: Any) -> tuple[str, ...]:
    """What the bounded pieces did that the reader of a result should know, such as a step down for lack of memory."""
    pieces = [inferer, *getattr(postprocessing, "transforms", ())]
    return tuple(dict.fromkeys(remark for piece in pieces for remark in getattr(piece, "remarks", ())))


def _argmax_then_invert(config: Component, live: list[Component], windowed: bool) -> bool:
    """[Activationsd] → AsDiscreted(argmax) → (what passes labels on) → Invertd."""
    kinds = [_kind(step) for step in live]
    start = 1 if kinds[:1] == ["Activations"] else 0
    if not windowed or kinds[start : start + 1] != ["AsDiscrete"] or "Invert" not in kinds:
        return False
    decide, invert = live[start], live[kinds.index("Invert")]
    between = kinds[start + 1 : kinds.index("Invert")]
    activation = _activation(live[0]) if start else "none"
    if not _is_argmax(decide) or activation is None or not all(kind in _PASSES_LABELS for kind in between):
        return False
    if not _same_key([*live[:start], decide, invert]):
        return False
    for step in live[: start + 1]:
        step["_disabled_"] = True
    _exchange(invert, "ChunkedInvertd", live)
    invert["nearest_interp"] = True  # a label map that is interpolated linearly invents labels (prostate_mri_anatomy)
    _slab(config, "labels", activation=activation)
    return True


def _invert_then_decide(config: Component, live: list[Component], windowed: bool) -> bool:
    """Activationsd → Invertd → AsDiscreted, or Invertd → [Activationsd] → AsDiscreted."""
    kinds = [_kind(step) for step in live]
    if "Invert" not in kinds:
        return False
    place = kinds.index("Invert")
    invert = live[place]
    before, after = live[:place], live[place + 1 :]
    if [_kind(step) for step in before] not in ([], ["Activations"]) or invert.get("nearest_interp") is True:
        return False
    first = _activation(before[0]) if before else "none"
    second = "none"
    decide = after[0] if after else {}
    if _kind(decide) == "Activations":
        second, decide = _activation(decide), (after[1] if len(after) > 1 else {})
    used = [*before, invert, *after[: after.index(decide) + 1]] if decide in after else []
    if _kind(decide) != "AsDiscrete" or first is None or second not in ("none", "sigmoid") or not _same_key(used):
        return False
    threshold = _threshold(decide)
    if not (_is_argmax(decide) and second == "none") and threshold is None:
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


def _is_used(config: Component, name: str) -> bool:
    """Whether the evaluator takes this part, and not another that the exchange would not reach."""
    evaluator = config.get("evaluator")
    return isinstance(evaluator, dict) and evaluator.get(name) in (f"@{name}", f"$@{name}")


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
    return any(_kind(part).startswith(_RESAMPLES) or not _is_monai(part) for part in components(before))


def _is_monai(component: Component) -> bool:
    target = str(component["_target_"])
    return "." not in target or target.startswith("monai.")


def _slab(config: Component, kind: str, **reduction: Any) -> None:
    config["inferer"] = {
        "_target_": "node.infer.bounded.slab_inferer",
        "inferer": config["inferer"],
        "kind": kind,
        **reduction,
    }


def _exchange(invert: Component, name: str, live: list[Component]) -> None:
    invert["_target_"] = f"node.infer.blockwise.{name}"
    own = [step for step in live[live.index(invert) + 1 :] if step.get("_disabled_") is not True]
    if own:  # what follows was written for MONAI's float32
        invert["dtype"] = torch.float32


def _kind(component: Component) -> str:
    """The transform's name without the letter that says that it works on dictionaries."""
    name = str(component.get("_target_", "")).rpartition(".")[2]
    return name.removesuffix("Dict").rstrip("dD") if name.endswith(("d", "D", "Dict")) else name


def _activation(step: Component) -> str | None:
    """What an Activationsd does; None when that is something that has no twin here."""
    said = {name for name in ("softmax", "sigmoid") if step.get(name) is True}
    odd = [key for key in step if key not in ("_target_", "keys", *said) and step[key]]
    return said.pop() if len(said) == 1 and not odd else None


def _is_argmax(step: Component) -> bool:
    odd = [key for key in step if key not in ("_target_", "keys", "argmax") and step[key] is not None]
    return step.get("argmax") in (True, [True]) and not odd


def _threshold(step: Component) -> float | None:
    odd = [key for key in step if key not in ("_target_", "keys", "threshold") and step[key] is not None]
    value = step.get("threshold")
    if not isinstance(value, int | float) or isinstance(value, bool) or odd:
        return None
    return float(value) if value > 0 else None  # zeros, which an inversion puts around a crop, must stay background


def _same_key(steps: list[Component]) -> bool:
    """Whether every step works on the prediction and nothing else."""
    return all(step.get("keys") in ("pred", ["pred"], "@pred", ["@pred"]) for step in steps)
