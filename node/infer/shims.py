"""What bundles of the Model Zoo were written for and today's libraries no longer do, made good without touching a file.

Each piece names the bundle that showed the need (shared survey of 2026, monai 1.6.1, torch 2.13, numpy 2).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import monai.networks.nets
import numpy as np
import torch

_CUDA = re.compile(r"torch\.device\(\s*(['\"])cuda\1\s*\)")


def mend_component(component: dict[str, Any]) -> None:
    """One part of a parsed configuration that names a class, changed in place.

    - `pretrained: true` would download weights when the network is built, only for ours to replace them
      (breast_density_classification, pathology_tumor_detection).
    - `img_size` is no longer an argument of SwinUNETR since MONAI 1.5 (swin_unetr_btcv_segmentation).
    """
    name = str(component["_target_"]).rpartition(".")[2]
    network = getattr(monai.networks.nets, name, None)
    if network is None:
        return
    if component.get("pretrained") is True:
        component["pretrained"] = False
    if "img_size" in component and "img_size" not in inspect.signature(network).parameters:
        del component["img_size"]


def mend_expression(expression: str, device: torch.device) -> str:
    """A configuration's text; a hard-wired `torch.device('cuda')` becomes the device that radnode runs on
    (pancreas_ct_dints_segmentation, multi_organ_segmentation).
    """
    if not expression.startswith("$"):
        return expression
    return _CUDA.sub(lambda match: f"torch.device({match[1]}{device}{match[1]})", expression)


@contextmanager
def mended_libraries() -> Iterator[None]:
    """The libraries as bundles expect them, for as long as one is loaded or run.

    - `numpy.product` went with numpy 2 (valve_landmarks).
    - `torch.load` takes numpy arrays in a checkpoint that is loaded as weights only: plain data, no code
      (the architecture files of the DiNTS bundles).
    """
    missing = not hasattr(np, "product")
    if missing:
        np.product = np.prod  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with torch.serialization.safe_globals(_numpy_types()):
            yield
    finally:
        if missing:
            del np.product  # pyright: ignore[reportAttributeAccessIssue]


def _numpy_types() -> list[Any]:
    from numpy._core import multiarray

    kinds = [
        type(np.dtype(name)) for name in ("bool", "int8", "uint8", "int16", "int32", "int64", "float32", "float64")
    ]
    return [multiarray._reconstruct, multiarray.scalar, np.ndarray, np.dtype, *kinds]  # pyright: ignore
