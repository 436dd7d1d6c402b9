"""What a regular volume in patient space is: the grid, its voxels and the slices that they came from.

Types only. `node.dicom.assembly` makes volumes from instances; `node.infer` and `node.report` use them.
Coordinates are the DICOM patient coordinate system, LPS (+x to the patient's left, +y to posterior, +z to superior;
PS3.3 C.7.6.2.1.1), in millimetres, at voxel centres.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Affine = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """A regular grid of voxels in patient space.

    `affine_lps` (4x4) maps (column, row, slice) indices to LPS millimetres of the voxel's centre.
    """

    shape: tuple[int, int, int]  # slices, rows, columns: the order of arrays
    affine_lps: Affine
    frame_of_reference_uid: str

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxel centres in the order of arrays: between slices, rows, columns."""
        column, row, slice_ = np.linalg.norm(self.affine_lps[:3, :3], axis=0)
        return float(slice_), float(row), float(column)

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel; right for a sheared grid too."""
        return float(abs(np.linalg.det(self.affine_lps[:3, :3])))

    @property
    def affine_ras(self) -> Affine:
        """The same mapping in RAS, as NIfTI and MONAI's MetaTensor want it."""
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.affine_lps


@dataclass(frozen=True)
class SliceRef:
    """The instance (and frame) that a slice of the volume came from."""

    sop_class_uid: str
    sop_instance_uid: str
    frame: int | None = None  # 1-based frame number in a multi-frame instance, None in a single-frame one


@dataclass(frozen=True)
class Volume:
    """Voxels in real-world units on a regular grid, with the slices that they came from."""

    array: NDArray[np.float32]  # (slices, rows, columns), rescaled
    grid: Grid
    slices: tuple[SliceRef, ...]  # one per array slice, in the array's order
    series_uid: str
    study_uid: str
    modality: str
    unit: Literal["HU", "SUVbw", "Bq/ml", ""] = ""  # "" when the values are arbitrary (MR)
    name: str = ""  # what tells this volume from others of its series; "" for the only one
    attributes: dict[str, str] = field(default_factory=dict)  # DICOM keyword to text, of the series
