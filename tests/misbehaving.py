"""Studies that are the end of their model's process, and models that are no good, beside good ones of both."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path

from pydicom import dcmread

from tests.benchmark.pipeline import make_study
from tests.infer.tiny import MANIFEST, bundle_files, write
from tests.running_node import RunningNode

NETWORK = """\
import ctypes
import time

import torch


class Threshold(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.limit = torch.nn.Parameter(torch.tensor(1e9))

    def forward(self, image):
        sign = int(image.max())
        if sign == 2001:
            ctypes.string_at(0)
        if sign == 2002:
            time.sleep(600)
        if sign == 2003:
            held = []
            while True:
                held.append(torch.ones(25_000_000))
        if sign == 2004:
            time.sleep(2)
        return (image > self.limit).to(torch.float32)
"""
TIMEOUT_S = 6
MEMORY_BYTES = 1_500_000_000
SETTINGS = f"workers: {{count: 2, device: cpu, memory: {MEMORY_BYTES // 10**6}MB}}\n"
ROUTES = (
    "[{name: CT, when: {Modality: CT, SeriesDescription: fine}, run: [marker], send_to: [pacs]}, "
    "{name: other, when: {Modality: CT, SeriesDescription: other}, run: [not_a_number], send_to: [pacs]}]"
)


class Sign(IntEnum):
    """The brightest voxel of a study, and what `marker` makes of it."""

    FINE = 1000
    CRASH = 2001  # its process crashes
    HANG = 2002  # it never answers
    MEMORY = 2003  # it takes memory without end
    SLOW = 2004  # nothing is wrong but that it takes two seconds


def make_models(folder: Path) -> Path:
    """`marker`, which does as a study says, and `not_a_number`, whose weights are NaN."""
    manifest = f"{MANIFEST}timeout_s: {TIMEOUT_S}\n".encode()
    write(folder / "marker", bundle_files(network=NETWORK) | {"dicom.yaml": manifest})
    write(folder / "not_a_number", bundle_files(limit=float("nan")) | {"dicom.yaml": manifest})
    return folder


def make_signed(folder: Path, sign: Sign, *, description: str = "fine") -> str:
    """A study with this sign; its UID. With the description `other` it goes to `not_a_number`."""
    make_study(folder, 5, 64, value=sign, SeriesDescription=description)
    return str(dcmread(next(folder.iterdir()), stop_before_pixels=True).StudyInstanceUID)


def misbehaving_node(folder: Path, pacs_port: int) -> RunningNode:
    """A node of two workers with these models."""
    folder.mkdir(parents=True, exist_ok=True)
    node = RunningNode(folder, pacs_port, quiet="1s", routes=ROUTES, models=make_models(folder / "models"))
    node.config.write_text(node.config.read_text() + SETTINGS)
    return node
