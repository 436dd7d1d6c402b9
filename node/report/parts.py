"""The connected parts of a mask."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def find_parts(mask: NDArray[np.bool_], touching: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """The number of each voxel's part, from 1 in the array's order and 0 for what is none, and how many there are.

    `touching` says which of a voxel's neighbours, itself in the middle, are of its part.
    """
    numbers = np.zeros(mask.shape, np.int32)
    count = cast("int", ndimage.label(mask, touching, output=numbers))  # with an output it returns the count alone
    return numbers, count
