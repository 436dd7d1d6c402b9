"""What a volume in patient space and a planar image are: the grid, the voxels and the slices or frames they came from.

Types only. `node.dicom.assembly` plans volumes and images from instances, `node.dicom.pixels` reads their voxels,
`node.dicom.regrid` makes irregular volumes regular; `node.infer` and `node.report` use them.
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

    def to_lps(self, indices: NDArray[np.floating]) -> Affine:
        """LPS millimetres (n, 3) of (column, row, slice) indices (n, 3), fractions of voxels included."""
        return np.asarray(indices, np.float64) @ self.affine_lps[:3, :3].T + self.affine_lps[:3, 3]


@dataclass(frozen=True)
class SliceRef:
    """The instance (and frame) that a slice of the volume came from."""

    sop_class_uid: str
    sop_instance_uid: str
    frame: int | None = None  # 1-based frame number in a multi-frame instance, None in a single-frame one


@dataclass(frozen=True)
class Volume:
    """Voxels in real-world units as they were acquired, with the slices that they came from.

    Most volumes lie on a regular, orthogonal grid, and `grid` says all. A sheared stack (gantry tilt) or one of varying
    spacing has `positions_lps` too: then `grid` is exact for the shear and nominal (the mean step) for the spacing, and
    `node.dicom.regrid` makes the regular volume that a model sees.
    """

    array: NDArray[np.float32]  # (slices, rows, columns), rescaled
    grid: Grid
    slices: tuple[SliceRef, ...]  # one per array slice, in the array's order
    series_uid: str
    study_uid: str
    modality: str
    unit: Literal["HU", "SUVbw", "Bq/ml", ""] = ""  # "" when the values are arbitrary (MR)
    name: str = ""  # what tells this volume from others of its series; "" for the only one
    attributes: dict[str, str] = field(default_factory=dict)  # DICOM keyword to text, of the series
    positions_lps: Affine | None = None  # (slices, 3): centre of each slice's first voxel; None for a regular volume

    @property
    def is_regular(self) -> bool:
        """Whether `grid` is orthogonal and places every slice."""
        return self.positions_lps is None


@dataclass(frozen=True)
class Image:
    """Frames of one planar instance (CR, DX, MG, OP, XC, ES, US, SM tiles), which has no place in patient space."""

    array: NDArray[np.float32] | NDArray[np.uint8]  # (frames, rows, columns) grey, rescaled, high is bright; or
    # (frames, rows, columns, 3) RGB of 8 bits
    frames: tuple[SliceRef, ...]  # one per frame
    series_uid: str
    study_uid: str
    modality: str
    spacing_mm: tuple[float, float] | None = None  # between rows, between columns; None where it is not known
    attributes: dict[str, str] = field(default_factory=dict)
