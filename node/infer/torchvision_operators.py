"""Lets torchvision be imported beside a CPU build of torch. Imported for that, before MONAI, which looks for it once.

torchvision's wheels carry compiled operators for one build of torch; beside another its import asks for names that are
not there ("operator torchvision::nms does not exist"). What bundles use of it (architectures) calls none of them.
Needed by lung_nodule_ct_detection, breast_density_classification and pathology_tumor_detection.
"""

from __future__ import annotations

import sys

import torch

try:
    import torchvision  # pyright: ignore[reportMissingImports]  # noqa: F401
except RuntimeError:
    LIBRARY = torch.library.Library("torchvision", "DEF")  # an operator lives as long as the library that defined it
    for operator in ("nms", "qnms"):
        LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the import that failed half-way left behind
except ImportError:  # an optional part: a bundle that needs it says so itself
    pass
