"""Checkpoints read as weights only: nothing in them is run."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

from node.errors import ModelError

_HEADER_MAX = 100_000_000  # bytes, as safetensors itself has it


def count_weights(path: Path) -> tuple[int, int]:
    """How many tensors a checkpoint holds, and how many values in all.

    Safetensors, whatever the file is called, are read by their header; anything else by torch with `weights_only`.
    Raises `ModelError` for a file that is damaged, holds code or no tensors, or has values that are not finite.
    """
    try:
        header = _read_header(path)
    except OSError as reason:
        raise ModelError(f"cannot be read ({reason.strerror})") from None
    shapes = _check_header(header, path.stat().st_size) if header is not None else _load_shapes(path)
    if not shapes:
        raise ModelError("holds no tensors")
    return len(shapes), sum(math.prod(shape) for shape in shapes)


def _read_header(path: Path) -> tuple[int, dict[str, Any]] | None:
    """Where the tensors of a safetensors file begin, and what it says of them; None for another kind of file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_HEADER_MAX, path.stat().st_size - 8) or file.read(1) != b"{":
            return None
        file.seek(8)
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return None
    return (8 + length, header) if isinstance(header, dict) else None


def _check_header(found: tuple[int, dict[str, Any]], size: int) -> list[tuple[int, ...]]:
    begin, header = found
    shapes: list[tuple[int, ...]] = []
    end = 0
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                shapes.append(tuple(map(int, entry["shape"])))
                end = max(end, int(entry["data_offsets"][1]))
    except (KeyError, TypeError, ValueError, IndexError):
        raise ModelError("has a damaged safetensors header") from None
    if begin + end != size:
        raise ModelError(f"has {size:,} bytes, its safetensors header stands for {begin + end:,}: it is damaged")
    return shapes


def _load_shapes(path: Path) -> list[tuple[int, ...]]:
    import pickle

    import torch

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as opened:
            if any(name.endswith("/constants.pkl") for name in opened.namelist()):
                raise ModelError("is a TorchScript program, not a checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(f"holds more than weights, and is not loaded: {first}") from None
    except Exception as error:  # torch raises what a damaged file happens to lead to
        first = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(f"cannot be loaded: {type(error).__name__}: {first}") from None
    tensors = list(_tensors(state, torch.Tensor))
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"has values in {name or 'its tensor'} that are not finite")
    return [tuple(tensor.shape) for _, tensor in tensors]


def _tensors(state: Any, kind: type, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(state, kind):
        return [(name, state)]
    if isinstance(state, dict):
        return [found for key, value in state.items() for found in _tensors(value, kind, f"{name}.{key}".lstrip("."))]
    if isinstance(state, list | tuple):
        return [found for value in state for found in _tensors(value, kind, name)]
    return []
