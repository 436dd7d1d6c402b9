"""What is written on pictures, and what others read of the DICOM objects that they become."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydicom.dataset import Dataset

from node.report.results import Result
from tests.report.cases import run


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are drawn from now on, in their order."""
    texts: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def record(self: ImageDraw.ImageDraw, place: tuple[float, float], text: str, *rest: object, **more: object) -> None:
        if self.im.size[0] > 100:  # not a letter that is drawn to see whether the font has it
            texts.append(text)
        draw(self, place, text, *rest, **more)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return texts


def write(dataset: Dataset, file: Path) -> Path:
    """The object as a file."""
    file.write_bytes(Result("picture", dataset).encode())
    return file


def errors_of(file: Path) -> list[str]:
    """The errors that dciodvfy finds in a Secondary Capture image."""
    done = subprocess.run(["dciodvfy", "-new", str(file)], capture_output=True, text=True, timeout=120, check=False)
    said = (done.stdout + done.stderr).splitlines()
    assert "SCImage" in said, said
    errors = [re.sub(r" = <.*?>", "", line) for line in said if line.startswith("Error")]
    assert bool(errors) == bool(done.returncode), said
    return errors


def decoded(file: Path) -> NDArray[np.uint8]:
    """The pixels as DCMTK's dcm2pnm reads them, (rows, columns, 3)."""
    picture = file.with_suffix(".ppm")
    run("dcm2pnm", "+op", file, picture)
    with Image.open(picture) as opened:
        return np.asarray(opened.convert("RGB"))
