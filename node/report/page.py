"""What a page is made of: panels that show an image with marks over it, and lines of a table. Types only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Mark:
    """Something drawn over an image: an outline of three points or more, or one point with a name."""

    label: int  # of the finding, which has a colour
    points: NDArray[np.float64]  # (n, 2) row and column in pixels of the panel, (0, 0) is the first one's centre
    name: str = ""


@dataclass(frozen=True)
class Caption:
    """What a panel shows, put into words where it is drawn."""

    what: Literal["slice", "frame", "axial", "sagittal", "coronal"]
    index: int | None = None  # of the slice or frame, from 0
    enlarged: bool = False
    said: str = ""  # of it, such as the class that holds for a frame


@dataclass(frozen=True)
class Panel:
    """One image as it is shown."""

    pixels: NDArray[np.float32]  # (rows, columns) grey or (rows, columns, 3) RGB, 0 to 1
    spacing_mm: tuple[float, float]  # down, across
    caption: Caption | None  # None for a single image
    edges: tuple[str, str] = ("", "")  # letters of the left and the upper edge (PS3.3 C.7.6.1.1.1)
    labels: NDArray[np.uint16] | None = None  # (rows, columns)
    marks: tuple[Mark, ...] = ()
    key: bool = False  # stays where there is no room for all


@dataclass(frozen=True)
class Cell:
    """One number of a line, under its head."""

    head: str
    text: str


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    label: int  # whose colour stands before it
    text: str
    cells: tuple[Cell, ...] = ()
    note: str = ""  # in place of numbers, such as that nothing was found; it stays where there is no room for all lines
    part: float | None = None  # 0 to 1, drawn as a bar
    strong: bool = False  # what the model decided for
    found: bool | None = True  # whether it was found; None where the model says nothing of it
    weight: float = 0.0  # where there is no room for all, the heavier stay
