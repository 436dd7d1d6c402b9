"""What becomes of a model's classes once nothing is added to them: labels, masks, or activated values.

Classes are the first axis, whatever follows. Each function does what MONAI's `Activations` and `AsDiscrete` do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

Reduce = Callable[[torch.Tensor], torch.Tensor]  # (classes, ...) to (channels, ...)


def activate(values: torch.Tensor, activation: str) -> torch.Tensor:
    """`values` (classes first) after "softmax" over the classes, "sigmoid" or "none", as MONAI's `Activations`."""
    if activation == "none":
        return values
    if activation == "sigmoid":
        return torch.sigmoid(values.float())
    if activation == "softmax":
        return torch.softmax(values.float(), dim=0)
    raise ValueError(f"activation {activation!r}: expected none, sigmoid or softmax")


def label_dtype(classes: int) -> torch.dtype:
    """The smallest type that holds the labels 0 to `classes` - 1."""
    return torch.uint8 if classes <= 256 else torch.int16 if classes <= 2**15 else torch.int32


def to_labels(activation: str = "none") -> Reduce:
    """(classes, ...) logits to one channel of labels; of equal values the first class wins, as with `argmax`.

    Softmax keeps the order of the logits but for what it rounds to equal values; name it where the bundle has it.
    """
    return partial(_labels, activation=activation)


def to_masks(activation: str = "sigmoid", threshold: float = 0.5) -> Reduce:
    """(classes, ...) logits to as many masks (uint8, 1 where the activated value is at least `threshold`)."""
    return partial(_masks, activation=activation, threshold=threshold)


def to_values(activation: str = "none", dtype: torch.dtype | None = None) -> Reduce:
    """(classes, ...) logits as they are, activated, in `dtype` (float16 takes half the memory, to about 5e-4)."""
    return partial(_values, activation=activation, dtype=dtype)


def _labels(logits: torch.Tensor, *, activation: str) -> torch.Tensor:
    return activate(logits, activation).argmax(dim=0, keepdim=True).to(label_dtype(logits.shape[0]))


def _masks(logits: torch.Tensor, *, activation: str, threshold: float) -> torch.Tensor:
    return (activate(logits, activation) >= threshold).to(torch.uint8)


def _values(logits: torch.Tensor, *, activation: str, dtype: torch.dtype | None) -> torch.Tensor:
    return activate(logits, activation).to(dtype or logits.dtype)
