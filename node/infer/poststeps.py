"""The post-processing steps of a bundle's configuration, read as plain data: which they are and what they decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from node.errors import ModelError

Component = dict[str, Any]

PASSES_LABELS = ("KeepLargestConnectedComponent", "RemoveSmallObjects", "FillHoles", "EnsureType", "ToDevice")
_CHANGES_NOTHING = ("EnsureType", "ToDevice", "SaveImage", "DeleteItems", "SelectItems", "Identity")


@dataclass(frozen=True)
class Recipe:
    """How probabilities come of a network's output."""

    before: str  # activation on the network's own grid: "softmax", "sigmoid" or "none"
    after: str  # activation on the source's grid: "sigmoid" or "none"
    assumed: bool  # nobody wrote the softmax: what already adds up to 1 stays as it is
    masks: bool  # whether each class is decided by a threshold, and not the largest one by an argmax


def probability_recipe(config: Component) -> Recipe:
    """The recipe that a parsed inference configuration holds in its post-processing.

    Raises `ModelError` with the reason where the steps say too little, or do what is not known here: a probability that
    is not of the label beside it must not be shown.
    """
    live = _live_steps(config)
    activation: str | None = None
    decision: Component | None = None
    inverted = activated_after = False
    for step in live:
        kind = kind_of(step)
        if kind in _CHANGES_NOTHING:
            continue
        if kind == "Invert":
            if step.get("post_func") is not None:
                raise _unavailable("its inversion applies a function of its own")
            inverted = True
        elif kind == "Activations" and decision is None and activation is None:
            activation, activated_after = activation_of(step), inverted
            if activation is None:
                raise _unavailable("its activation is neither a softmax nor a sigmoid")
        elif kind == "AsDiscrete" and decision is None:
            decision = step
        elif decision is None or kind not in PASSES_LABELS:
            where = "after" if decision else "before"
            raise _unavailable(f"its post-processing has a step {kind} {where} the decision for a label")
        if kind in ("Activations", "AsDiscrete") and not work_on_prediction([step]):
            raise _unavailable(f"its step {kind} works on more than the prediction")
    if decision is None:
        raise _unavailable("its post-processing has no AsDiscreted, which decides for a label")
    without_form = {key: value for key, value in decision.items() if key != "to_onehot"}
    if is_argmax(without_form):
        return Recipe(activation or "softmax", "none", activation is None, masks=False)
    if threshold_of(decision) is None:
        raise _unavailable("its AsDiscreted is neither an argmax nor a threshold above 0")
    if activation == "sigmoid" and activated_after:
        return Recipe("none", "sigmoid", assumed=False, masks=True)
    return Recipe(activation or "none", "none", assumed=False, masks=True)


def _live_steps(config: Component) -> list[Component]:
    post = config.get("postprocessing")
    steps = post.get("transforms") if isinstance(post, dict) else None
    if not isinstance(steps, list) or not all(isinstance(step, dict) and "_target_" in step for step in steps):
        raise _unavailable("its post-processing is no list of steps")
    if not all(isinstance(step.get("_disabled_", False), bool | type(None)) for step in steps):
        raise _unavailable("which of its post-processing steps run is not known before")
    if not is_used(config, "postprocessing"):
        raise _unavailable("its evaluator takes another post-processing")
    return [step for step in steps if not step.get("_disabled_")]


def _unavailable(why: str) -> ModelError:
    return ModelError(f"probabilities are not available for this bundle because {why}: set probabilities to false")


def is_used(config: Component, name: str) -> bool:
    """Whether the evaluator takes this part, and not another that the exchange would not reach."""
    evaluator = config.get("evaluator")
    return isinstance(evaluator, dict) and evaluator.get(name) in (f"@{name}", f"$@{name}")


def kind_of(component: Component) -> str:
    """The transform's name without the letter that says that it works on dictionaries."""
    name = str(component.get("_target_", "")).rpartition(".")[2]
    return name.removesuffix("Dict").rstrip("dD") if name.endswith(("d", "D", "Dict")) else name


def activation_of(step: Component) -> str | None:
    """What an Activationsd does; None when that is something that has no twin here."""
    said = {name for name in ("softmax", "sigmoid") if step.get(name) is True}
    odd = [key for key in step if key not in ("_target_", "keys", *said) and step[key]]
    return said.pop() if len(said) == 1 and not odd else None


def is_argmax(step: Component) -> bool:
    odd = [key for key in step if key not in ("_target_", "keys", "argmax") and step[key] is not None]
    return step.get("argmax") in (True, [True]) and not odd


def threshold_of(step: Component) -> float | None:
    odd = [key for key in step if key not in ("_target_", "keys", "threshold") and step[key] is not None]
    value = step.get("threshold")
    if not isinstance(value, int | float) or isinstance(value, bool) or odd:
        return None
    return float(value) if value > 0 else None  # zeros, which an inversion puts around a crop, must stay background


def work_on_prediction(steps: list[Component]) -> bool:
    """Whether every step works on the prediction and nothing else."""
    return all(step.get("keys") in ("pred", ["pred"], "@pred", ["@pred"]) for step in steps)
