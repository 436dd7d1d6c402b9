"""What becomes of a model's classes once nothing is added to them: labels, masks, or activated values.

Classes are the first axis, whatever follows. Each function does what MONAI's `Activations` and `AsDiscrete` do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

_SLACK = 1e-2  # by which half precision and a blend of windows may miss 0, 1 and their sum
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


def to_certainties(activation: str, *, assumed: bool = False) -> Reduce:
    """(classes, ...) logits to as many probabilities as uint8, 255 for certain.

    With `assumed`, values that are probabilities already, from 0 to 1 and of the sum 1 everywhere, are not activated.
    Raises `NoProbabilities` for what is outside of 0 to 1 once it is activated.
    """
    return partial(_certainties, activation=activation, assumed=assumed)


class NoProbabilities(Exception):
    """Values that are none: the largest or the smallest of them."""


def quantise(values: torch.Tensor) -> torch.Tensor:
    """Probabilities as uint8, 255 for certain; what is not a number is 0."""
    if not values.any():
        return torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    clean = torch.nan_to_num(values)
    low, high = (float(end) for end in clean.aminmax())
    if low < -_SLACK or high > 1 + _SLACK:
        raise NoProbabilities(f"{low:.3g}" if low < -_SLACK else f"{high:.3g}")
    return clean.mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _certainties(logits: torch.Tensor, *, activation: str, assumed: bool) -> torch.Tensor:
    if assumed and _is_normalised(logits):
        return quantise(logits.float())
    return quantise(activate(logits, activation).float())


def _is_normalised(values: torch.Tensor) -> bool:
    if values.shape[0] < 2 or values.amin() < -_SLACK:
        return False
    return bool(((values.float().sum(dim=0) - 1).abs() <= _SLACK).all())


def _labels(logits: torch.Tensor, *, activation: str) -> torch.Tensor:
    return activate(logits, activation).argmax(dim=0, keepdim=True).to(label_dtype(logits.shape[0]))


def _masks(logits: torch.Tensor, *, activation: str, threshold: float) -> torch.Tensor:
    return (activate(logits, activation) >= threshold).to(torch.uint8)


def _values(logits: torch.Tensor, *, activation: str, dtype: torch.dtype | None) -> torch.Tensor:
    return activate(logits, activation).to(dtype or logits.dtype)
