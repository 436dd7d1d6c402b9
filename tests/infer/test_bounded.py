"""Which configurations are exchanged for their twins in bounded memory, and which must stay as they were written."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from node.infer.bounded import bound_memory

SOFTMAX = {"_target_": "Activationsd", "keys": "pred", "softmax": True}
SIGMOID = {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}
ARGMAX = {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}
HALF = {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}
LARGEST = {"_target_": "KeepLargestConnectedComponentd", "keys": "pred", "applied_labels": [1]}
INVERT = {
    "_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image", "nearest_interp": False,
}  # fmt: skip
ORIENTATION = {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"}
SPACING = {"_target_": "Spacingd", "keys": "image", "pixdim": [2, 2, 2]}


def bundle(*steps: dict[str, Any], before: Any = (ORIENTATION,), **parts: Any) -> dict[str, Any]:
    """A segmentation bundle with these post-processing steps."""
    return deepcopy(
        {
            "preprocessing": {"_target_": "Compose", "transforms": before if isinstance(before, str) else list(before)},
            "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [8, 8, 8]},
            "postprocessing": {"_target_": "Compose", "transforms": list(steps)},
            "evaluator": {"inferer": "@inferer", "postprocessing": "@postprocessing"},
        }
        | parts
    )


def inversion_of(config: dict[str, Any]) -> str:
    """The name of what inverts, after the exchange."""
    bound_memory(config)
    (found,) = (
        step["_target_"].rpartition(".")[2]
        for step in config["postprocessing"]["transforms"]
        if "Invert" in step["_target_"]
    )
    return found


@pytest.mark.parametrize(
    ("steps", "kind"),
    [
        ((SOFTMAX, ARGMAX, INVERT), "labels"),
        ((ARGMAX, LARGEST, INVERT), "labels"),
        ((SOFTMAX, INVERT, ARGMAX), "labels"),
        ((SIGMOID, INVERT, HALF), "masks"),
        ((INVERT | {"keys": ["pred"]}, ARGMAX | {"keys": ["pred"], "argmax": [True]}), "labels"),
        ((SOFTMAX, INVERT | {"_disabled_": True}, INVERT, ARGMAX), "labels"),
    ],
)
def test_known_chains_are_exchanged(steps: tuple[dict[str, Any], ...], kind: str) -> None:
    config = bundle(*steps)
    assert bound_memory(config)
    assert config["inferer"]["_target_"] == "node.infer.bounded.slab_inferer"
    assert config["inferer"]["kind"] == kind


UNKNOWN = {
    "a step that may or may not run": bundle(SIGMOID, LARGEST | {"_disabled_": "$not @largest"}, INVERT, HALF),
    "a decision that may not be made": bundle(SOFTMAX, INVERT, ARGMAX | {"_disabled_": "@soft"}),
    "a function after the inversion": bundle(SOFTMAX, INVERT | {"post_func": "$lambda x: x[:2]"}, ARGMAX),
    "a function after inverted labels": bundle(ARGMAX, INVERT | {"post_func": "$torch.nn.Softmax(dim=0)"}),
    "two activations, one by a reference": bundle(SOFTMAX | {"sigmoid": "@multilabel"}, INVERT, HALF),
    "another inferer": bundle(SIGMOID, INVERT, HALF, evaluator={"inferer": "@o", "postprocessing": "@postprocessing"}),
    "another post-processing": bundle(SIGMOID, INVERT, HALF, evaluator={"inferer": "@inferer", "postprocessing": "@o"}),
    "one-hot": bundle(INVERT, ARGMAX | {"to_onehot": 3}),
    "two keys": bundle(*({**step, "keys": ["pred", "label"]} for step in (SIGMOID, INVERT, HALF))),
    "a threshold that background passes": bundle(INVERT, HALF | {"threshold": 0}),
}


@pytest.mark.parametrize("config", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_exactly_such_a_chain_stays(config: dict[str, Any]) -> None:
    before = deepcopy(config)
    assert not bound_memory(config)
    assert config == before


@pytest.mark.parametrize(
    "config",
    [
        bundle(SIGMOID, INVERT, HALF, before=(ORIENTATION, SPACING)),
        bundle(SIGMOID, INVERT, HALF, before=(ORIENTATION, {"_target_": "SpatialResampled", "keys": "image"})),
        bundle(SIGMOID, INVERT, HALF, before=(ORIENTATION, {"_target_": "scripts.own.Shrinkd", "keys": "image"})),
        bundle(SIGMOID, INVERT, HALF, before="$@orientation + @spacing"),
        bundle(SIGMOID, INVERT, HALF, before=(ORIENTATION, "@spacing")),
        bundle(SIGMOID, INVERT | {"transform": "@spatial"}, HALF),
        bundle(SIGMOID, INVERT, HALF, preprocessing="@other"),
    ],
    ids=["spacing", "resampling", "the bundle's own", "an expression", "a reference", "another transform", "elsewhere"],
)
def test_probabilities_are_interpolated_before_the_decision_unless_nothing_is_resampled(config: dict[str, Any]) -> None:
    assert inversion_of(config) == "ChunkedInvertArgmaxd"
    assert config["inferer"]["kind"] == "values"


def test_where_nothing_is_resampled_the_decision_comes_first() -> None:
    assert inversion_of(bundle(SIGMOID, INVERT, HALF)) == "ChunkedInvertd"
