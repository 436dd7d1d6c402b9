"""Where models run on this machine."""

from __future__ import annotations

from node.errors import ModelError


def choose_device(wanted: str) -> str:
    """The torch device for `wanted` (auto, cpu, cuda, cuda:N); `ModelError` when an accelerator was named that is not
    there.
    """
    if wanted == "cpu":
        return "cpu"
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return "cuda:0" if count else "cpu"
    index = int(wanted.partition(":")[2] or 0)
    if index >= count:
        raise ModelError(
            f"device {wanted} was asked for, torch sees {count} CUDA devices: see workers.device, or use auto"
        )
    return f"cuda:{index}"
