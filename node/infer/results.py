"""What a model returns: results in the input's own geometry, and the checks that every result passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from node.dicom.volume import Grid
from node.errors import OutputRefused


@dataclass(frozen=True)
class Labelmap:
    """Mutually exclusive labels on the input's own grid."""

    array: NDArray[np.uint16]  # (slices, rows, columns); 0 is background
    grid: Grid
    input: str = "image"  # the manifest's input whose grid this is
    remarks: tuple[str, ...] = field(default=())  # what the run wants said with the result


def check_labelmap(array: NDArray[np.number], grid: Grid, labels: Mapping[int, str]) -> NDArray[np.uint16]:
    """The label map as uint16 when it is one, else `OutputRefused`.

    `labels` are the values that the manifest declares. Refused are: another shape than the grid's, values that are not
    finite or not whole (a label map that was interpolated linearly invents labels), values that the manifest does not
    know, and a map without any background.
    """
    if array.shape != grid.shape:
        raise OutputRefused(f"the model returned a map of shape {array.shape}, the input's grid is {grid.shape}")
    if not np.isfinite(array).all():
        raise OutputRefused("the model returned values that are not finite (NaN or infinity)")
    values = np.unique(array)
    if (fractional := values[values != np.round(values)]).size:
        raise OutputRefused(
            f"the model returned fractional labels (such as {fractional[0]:.3f}): a label map was interpolated "
            "linearly; set the inversion to nearest in dicom.yaml's overrides"
        )
    unknown = sorted({int(value) for value in values} - {0, *labels})
    if unknown:
        raise OutputRefused(f"the model returned labels {unknown[:10]} that dicom.yaml does not declare")
    if 0 not in values:
        raise OutputRefused("the model marked every voxel of the image: no result is made of that")
    return array.astype(np.uint16)
