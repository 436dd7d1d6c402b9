"""Where models run: what was asked for, or a sentence; never silently elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from node.errors import ModelError
from node.infer.device import choose_device


@pytest.mark.parametrize(
    ("wanted", "count", "expected"),
    [
        ("cpu", 0, "cpu"),
        ("cpu", 2, "cpu"),
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cuda", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_device_by_what_there_is(monkeypatch: pytest.MonkeyPatch, wanted: str, count: int, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert choose_device(wanted) == expected
    torch.device(expected)


@pytest.mark.parametrize(("wanted", "count"), [("cuda", 0), ("cuda:1", 1), ("cuda:7", 2)])
def test_accelerator_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, wanted: str, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ModelError, match=f"device {wanted} was asked for, torch sees {count} CUDA devices"):
        choose_device(wanted)


def test_cpu_needs_no_torch() -> None:
    code = (
        "import sys; from node.infer.device import choose_device; choose_device('cpu'); print('torch' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert ran.stdout.strip() == "False"
