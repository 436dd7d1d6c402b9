"""Left and right lung on chest CT by thresholds and connectivity: the classical method, with no trained weights.

Air inside the body is found by threshold, the trachea and main bronchi are grown from the trachea and taken out, and
what remains is told apart into left and right (after Hu, Hoffman and Reinhardt, IEEE Trans Med Imaging 2001, 20:490).
Decisions about what is connected to what are taken on a grid of about 2 mm; the border of the lungs is drawn on the
image's own grid.
"""

from __future__ import annotations

import numpy as np
import torch
from monai.data import affine_to_spacing
from scipy import ndimage
from torch.nn import functional

RIGHT, LEFT = 1, 2

COARSE_MM = 2.0
LUNG_BELOW_HU = -400.0  # half way between lung and soft tissue
OUTSIDE_AIR_BELOW_HU = -920.0  # median of what touches the image's border: air around the patient, not lung
CUT_LUNG_AT_BORDER = 0.25  # of its voxels; the couch's padding lies along the border
GAS_BELOW_HU = -940.0  # median of gas in stomach, bowel and paranasal sinuses, away from their walls
GAS_CORE_MM = 5.0  # from the wall: what partial volume lightens
LUNG_PIECE_ML = 40.0  # smaller pieces of inside air are no lung
LUNG_ML = 150.0  # of the largest piece; below that the image shows no lung
BONE_ABOVE_HU = 200.0
SPINE_WIDTH_MM = 40.0
TRACHEA_OFF_MM = 40.0  # sideways from the spine
TRACHEA_AREA_MM2 = (40.0, 700.0)
AIRWAY_ML = (3.0, 130.0)  # trachea and main bronchi; more means that the growth leaked into the lung
AIRWAY_HU = (-980, -960, -940, -920, -900, -880)
AIRWAY_WALL_MM = 3.0
CLOSING_MM = 8.0  # vessels narrower than twice this are part of the lung


class LungReference(torch.nn.Module):
    """A network in form only: CT in HU and RAS orientation (B, 1, x, y, z) to a label map of the same shape."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """0 background, 1 right lung, 2 left lung, as float32."""
        # Of the input's own type: a MetaTensor keeps the geometry that the bundle's Invertd needs.
        labels = torch.zeros_like(image, dtype=torch.float32)
        for number, case in enumerate(image):
            labels[number, 0] = torch.from_numpy(segment_lungs(case[0], _spacing_mm(image, number)))
        return labels


def segment_lungs(image: torch.Tensor, spacing_mm: np.ndarray) -> np.ndarray:
    """Label map (x, y, z), uint8, of one CT in HU whose axes point right, anterior and superior."""
    plain = image.as_tensor() if hasattr(image, "as_tensor") else image
    fine = plain.detach().cpu().float()
    size = [
        max(1, min(length, round(length * step / COARSE_MM)))
        for length, step in zip(fine.shape, spacing_mm, strict=True)
    ]
    coarse = functional.interpolate(fine[None, None], size=size, mode="area")[0, 0].numpy()
    coarse_mm = spacing_mm * np.array(fine.shape) / np.array(size)
    labels = _segment_coarse(coarse, coarse_mm)
    if not labels.any():
        return np.zeros(fine.shape, np.uint8)
    return _draw_fine(fine.numpy(), labels, coarse_mm)


def _segment_coarse(hu: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """The lungs on the coarse grid, vessels filled; all zero where there are none."""
    voxel_ml = float(np.prod(spacing)) / 1000
    inside = _inside_air(hu)
    middle = _middle(hu, inside, spacing, voxel_ml)
    airway = _airway(hu, inside, middle, spacing, voxel_ml)
    lungs = inside & ~ndimage.binary_dilation(airway, _ball(AIRWAY_WALL_MM, spacing)) if airway.any() else inside
    lungs = _lung_pieces(lungs, hu, spacing, voxel_ml)
    if not lungs.any():
        return np.zeros(hu.shape, np.uint8)
    labels = _sides(lungs, middle, spacing)
    body = ndimage.binary_fill_holes(hu > -300)
    filled = np.zeros_like(labels)
    for side in (RIGHT, LEFT):
        filled[(filled == 0) & _close(labels == side, spacing) & body & ~airway] = side
    filled[labels > 0] = labels[labels > 0]
    return filled


def _inside_air(hu: np.ndarray) -> np.ndarray:
    """Air that is not the air around the patient: that touches the image's sides, all through."""
    air = hu < LUNG_BELOW_HU
    pieces, count = ndimage.label(air)
    edge = np.zeros(count + 1, bool)
    for border in (pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]):
        edge[np.unique(border)] = True
    edge[0] = False
    sides = np.ones(hu.shape, bool)
    sides[1:-1, 1:-1] = False
    for piece in np.flatnonzero(edge):  # a field of view that cuts the lung leaves lung at the border
        where = pieces == piece
        at_border = (where & sides).sum() / where.sum()
        if np.median(hu[where]) >= OUTSIDE_AIR_BELOW_HU and at_border < CUT_LUNG_AT_BORDER:
            edge[piece] = False
    return air & ~edge[pieces]


def _middle(hu: np.ndarray, inside: np.ndarray, spacing: np.ndarray, voxel_ml: float) -> float:
    """The spine's place along the first axis: an image may be cropped, and then its middle is not the patient's.

    Where the bone about the inside air is densest; the middle of the image where there is no bone.
    """
    pieces, _ = ndimage.label(inside)
    large = np.bincount(pieces.ravel()) * voxel_ml >= LUNG_PIECE_ML
    large[0] = False
    around = np.argwhere(large[pieces])
    if not around.size:
        return (hu.shape[0] - 1) / 2
    reach = np.ceil(SPINE_WIDTH_MM / spacing).astype(int)
    low, high = np.maximum(around.min(axis=0) - reach, 0), around.max(axis=0) + reach + 1  # arms stand further off
    low[2], high[2] = around[:, 2].min(), around[:, 2].max() + 1
    profile = (hu[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] > BONE_ABOVE_HU).sum(axis=(1, 2))
    if not profile.any():
        return (hu.shape[0] - 1) / 2
    smooth = ndimage.gaussian_filter1d(profile.astype(float), SPINE_WIDTH_MM / 4 / spacing[0], mode="constant")
    return float(low[0] + np.argmax(smooth))


def _airway(hu: np.ndarray, inside: np.ndarray, middle: float, spacing: np.ndarray, voxel_ml: float) -> np.ndarray:
    """Trachea and main bronchi: grown from the trachea below the highest threshold at which nothing leaks."""
    seed = _trachea_seed(hu, inside, middle, spacing)
    grown = np.zeros(hu.shape, bool)
    if seed is None:
        return grown
    last_ml = 0.0
    for threshold in AIRWAY_HU:
        pieces, _ = ndimage.label(inside & (hu < threshold))
        piece = pieces[seed]
        if piece == 0:
            continue
        where = pieces == piece
        volume_ml = float(where.sum()) * voxel_ml
        leaked = volume_ml > AIRWAY_ML[1] or (last_ml > AIRWAY_ML[0] and volume_ml > 2.0 * last_ml)
        if leaked:
            break
        grown, last_ml = where, volume_ml
    if not grown.any():
        return grown
    # Thin side branches belong to the lung: what an opening of 2 mm removes is given back.
    return ndimage.binary_closing(grown, _ball(2.0, spacing)) & inside


def _trachea_seed(
    hu: np.ndarray, inside: np.ndarray, middle: float, spacing: np.ndarray
) -> tuple[int, int, int] | None:
    """A voxel in the trachea: a small round dark region before the spine that runs on for 2 cm, the highest one."""
    area_mm2 = float(spacing[0] * spacing[1])
    dark = inside & (hu < -850)
    runs: list[list[tuple[int, int, int]]] = []  # that reach the slice above
    for z in range(hu.shape[2] - 1, -1, -1):
        found: list[list[tuple[int, int, int]]] = []
        pieces, _ = ndimage.label(dark[:, :, z])
        for piece, slices in enumerate(ndimage.find_objects(pieces), 1):
            where = pieces[slices] == piece
            area = where.sum() * area_mm2
            width, depth = (where.shape[axis] * spacing[axis] for axis in (0, 1))
            if not TRACHEA_AREA_MM2[0] <= area <= TRACHEA_AREA_MM2[1] or not 0.4 < width / depth < 2.5:
                continue
            if area < 0.45 * width * depth:  # not compact
                continue
            x = slices[0].start + ndimage.center_of_mass(where)[0]
            if abs(x - middle) * spacing[0] > TRACHEA_OFF_MM:
                continue
            inner = np.argwhere(where)
            centre = inner[np.argmin(((inner - inner.mean(axis=0)) ** 2).sum(axis=1))]
            here = (int(slices[0].start + centre[0]), int(slices[1].start + centre[1]), z)
            above = min(runs, key=lambda run: _apart_mm(run[-1], here, spacing), default=None)
            runs_on = above is not None and _apart_mm(above[-1], here, spacing) <= 12
            found.append([*above, here] if above is not None and runs_on else [here])
        runs = found
        if whole := [run for run in runs if len(run) >= 3 and len(run) * spacing[2] >= 20]:
            run = min(whole, key=lambda run: abs(run[-1][0] - middle))
            return run[len(run) // 2]
    return None


def _apart_mm(one: tuple[int, int, int], other: tuple[int, int, int], spacing: np.ndarray) -> float:
    """Distance within the slice."""
    return float(np.hypot((one[0] - other[0]) * spacing[0], (one[1] - other[1]) * spacing[1]))


def _lung_pieces(air: np.ndarray, hu: np.ndarray, spacing: np.ndarray, voxel_ml: float) -> np.ndarray:
    """The pieces of inside air that are lung: large enough, and not as dark throughout as gas."""
    pieces, count = ndimage.label(air)
    if count == 0:
        return np.zeros(air.shape, bool)
    volumes_ml = np.bincount(pieces.ravel(), minlength=count + 1) * voxel_ml
    volumes_ml[0] = 0
    keep = np.zeros(count + 1, bool)
    core = ndimage.distance_transform_edt(air, sampling=spacing) > GAS_CORE_MM
    for piece in np.flatnonzero(volumes_ml >= LUNG_PIECE_ML):
        where = pieces == piece
        inner = where & core
        median = float(np.median(hu[inner if inner.any() else where]))
        gas = median < (GAS_BELOW_HU if volumes_ml[piece] < 800 else -985)
        keep[piece] = not gas
    if not keep.any() or volumes_ml[keep].max() < LUNG_ML:
        return np.zeros(air.shape, bool)
    return keep[pieces]


def _sides(lungs: np.ndarray, middle: float, spacing: np.ndarray) -> np.ndarray:
    """Right and left: by connectivity where the lungs are apart, by a cut at the narrowest contact elsewhere."""
    cores = _two_cores(lungs, spacing)
    labels = np.zeros(lungs.shape, np.uint8)
    if cores is None:  # one lung, or none that can be told apart: by its side of the spine
        pieces, count = ndimage.label(lungs)
        for piece in range(1, count + 1):
            where = pieces == piece
            labels[where] = RIGHT if np.argwhere(where)[:, 0].mean() > middle else LEFT
        return labels
    first, second = cores
    first_is_right = np.argwhere(first)[:, 0].mean() > np.argwhere(second)[:, 0].mean()
    right, left = (first, second) if first_is_right else (second, first)
    # Every voxel goes to the core that it is nearer to: the cut falls in the neck between them.
    to_right = ndimage.distance_transform_edt(~right, sampling=spacing)
    to_left = ndimage.distance_transform_edt(~left, sampling=spacing)
    labels[lungs] = np.where(to_right[lungs] <= to_left[lungs], RIGHT, LEFT)
    # A piece that hangs together with one core alone belongs to it whole.
    pieces, count = ndimage.label(lungs)
    for piece in range(1, count + 1):
        where = pieces == piece
        has_right, has_left = bool((where & right).any()), bool((where & left).any())
        if has_right != has_left:
            labels[where] = RIGHT if has_right else LEFT
    return labels


def _two_cores(lungs: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The lungs eroded until they are two: the largest pieces, the smaller at least a sixth of the larger."""
    depth = ndimage.distance_transform_edt(lungs, sampling=spacing)
    for erosion_mm in (0.0, 2.0, 4.0, 6.0, 9.0, 12.0):
        pieces, count = ndimage.label(depth > erosion_mm)
        if count < 2:
            continue
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        first, second = np.argsort(sizes)[::-1][:2]
        if sizes[second] * 6 < sizes[first]:
            continue
        one, two = pieces == first, pieces == second
        apart = abs(np.argwhere(one)[:, 0].mean() - np.argwhere(two)[:, 0].mean()) * spacing[0]
        if apart > 60:  # beside each other, not one above the other
            return one, two
    return None


def _close(lung: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Vessels and small nodules filled: a closing, then the holes of each axial slice."""
    margin = [int(np.ceil(CLOSING_MM / step)) + 1 for step in spacing]
    padded = np.pad(lung, [(size, size) for size in margin], mode="edge")
    grown = ndimage.distance_transform_edt(~padded, sampling=spacing) <= CLOSING_MM
    closed = ndimage.distance_transform_edt(grown, sampling=spacing) > CLOSING_MM
    closed = closed[tuple(slice(size, -size) for size in margin)] | lung
    for z in range(closed.shape[2]):
        closed[:, :, z] = ndimage.binary_fill_holes(closed[:, :, z])
    return closed


def _draw_fine(hu: np.ndarray, labels: np.ndarray, coarse_mm: np.ndarray) -> np.ndarray:
    """The coarse lungs with their border on the image's own grid, slice by slice."""
    # Inside by more than a coarse voxel everything is lung (vessels too); near the border the threshold decides.
    reach = float(np.max(coarse_mm[:2])) * 1.5
    core, near = np.zeros_like(labels), np.zeros_like(labels)
    for z in range(labels.shape[2]):
        for side in (RIGHT, LEFT):
            mask = labels[:, :, z] == side
            if mask.any():
                core[:, :, z][ndimage.distance_transform_edt(mask, sampling=coarse_mm[:2]) > reach] = side
        distance, nearest = ndimage.distance_transform_edt(
            labels[:, :, z] == 0, sampling=coarse_mm[:2], return_indices=True
        )
        near[:, :, z] = np.where(distance <= reach, labels[:, :, z][tuple(nearest)], 0)
    index = [
        np.minimum((np.arange(fine) * coarse / fine).astype(int), coarse - 1)
        for fine, coarse in zip(hu.shape, labels.shape, strict=True)
    ]
    drawn = np.zeros(hu.shape, np.uint8)
    for z in range(hu.shape[2]):
        here = np.ix_(index[0], index[1])
        allowed = near[:, :, index[2][z]][here]
        certain = core[:, :, index[2][z]][here]
        drawn[:, :, z] = np.where(certain > 0, certain, np.where(hu[:, :, z] < LUNG_BELOW_HU, allowed, 0))
        for side in (RIGHT, LEFT):
            mask = drawn[:, :, z] == side
            if mask.any():
                holes = ndimage.binary_fill_holes(mask) & ~mask
                drawn[:, :, z][holes] = side
    return drawn


def _ball(radius_mm: float, spacing: np.ndarray) -> np.ndarray:
    """A ball as a structuring element on an anisotropic grid."""
    reach = [max(0, int(radius_mm / step)) for step in spacing]
    axes = np.ogrid[tuple(slice(-size, size + 1) for size in reach)]
    distance = sum((axis * step) ** 2 for axis, step in zip(axes, spacing, strict=True))
    return distance <= radius_mm**2 + 1e-6


def _spacing_mm(image: torch.Tensor, number: int) -> np.ndarray:
    """Voxel spacing of one image of the batch; 1 mm where the tensor carries no geometry."""
    affine = getattr(image, "affine", None)
    if affine is None:
        return np.ones(3)
    matrix = torch.as_tensor(affine)
    return np.asarray(affine_to_spacing(matrix[number] if matrix.ndim == 3 else matrix), dtype=float)
