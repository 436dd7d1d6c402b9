"""Where in the patient findings lie: on the slices of a volume, and in its frame of reference."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from highdicom import sr
from numpy.typing import NDArray
from pydicom.sr.codedict import codes

from node.dicom.volume import SliceRef, Volume
from node.infer.results import Box
from node.report.sr import Group, source_region

_TOUCHING_MM = 1e-6  # how near a slice comes to the end of a box that it touches


def add_centre(group: Group, volume: Volume, place_lps: NDArray[np.float64]) -> None:
    """Add where in the patient a finding lies, in the volume's frame of reference (mm), to its group.

    The templates of regions are extensible (TID 1410, 1411) and take a region either on images or in space; a point
    that is called the finding's centre adds to the region and does not compete with it. Where the images have no frame
    of reference there is no space to refer to.
    """
    if volume.grid.frame_of_reference_uid:
        group[0].ContentSequence.append(
            sr.Scoord3DContentItem(
                name=codes.DCM.Center,
                graphic_type=sr.GraphicTypeValues3D.POINT,
                graphic_data=place_lps[None],
                frame_of_reference_uid=volume.grid.frame_of_reference_uid,
                relationship_type=sr.RelationshipTypeValues.CONTAINS,
            )
        )


def add_key_point(group: Group, reference: SliceRef, row: int, column: int) -> None:
    """Add a pixel of the slice that shows a finding best to its group, as CAD geometry does (TID 4021 "Center").

    A group that only refers to a segment has no coordinates, and a viewer that wants some (OHIF) would show nothing of
    the whole report; with a point it goes to that slice and writes the numbers beside it.
    """
    point = sr.ScoordContentItem(
        name=codes.DCM.Center,
        graphic_type=sr.GraphicTypeValues.POINT,
        graphic_data=np.array([[column, row]]) + 0.5,  # counted from the first pixel's corner (PS3.3 C.18.6.1)
        relationship_type=sr.RelationshipTypeValues.CONTAINS,
    )
    point.ContentSequence = sr.ContentSequence([source_region(reference)])
    group[0].ContentSequence.append(point)


def key_voxels(labels: NDArray[np.uint16], wanted: Sequence[int]) -> dict[int, tuple[int, int, int]]:
    """For each wanted label that is there: the slice where it is largest, and its row and column next to its middle."""
    count = max(wanted) + 1
    areas = np.zeros((len(labels), count), np.int64)
    for index, plane in enumerate(labels):
        if plane.any():  # a tenth of the counting
            areas[index] = np.bincount(plane.ravel(), minlength=count)[:count]
    found = {}
    for label in wanted:
        index = int(areas[:, label].argmax())
        if areas[index, label]:
            places = np.argwhere(labels[index] == label)
            row, column = places[((places - places.mean(axis=0)) ** 2).sum(axis=1).argmin()].tolist()
            found[label] = (index, row, column)
    return found


def first_voxels(volume: Volume) -> NDArray[np.float64]:
    """Where the first voxel of each slice lies (slices, 3), LPS mm."""
    if volume.positions_lps is not None:
        return volume.positions_lps
    indices = np.zeros((volume.grid.shape[0], 3))
    indices[:, 2] = np.arange(volume.grid.shape[0])
    return volume.grid.to_lps(indices)


def cut_box(volume: Volume, box: Box) -> dict[int, NDArray[np.float64]]:
    """The outline of a box on each slice that it crosses, the one nearest to its centre first.

    Outlines are (n, 2) columns and rows in pixels, cut off at the image's edges: rectangles on slices along the
    patient's axes, polygons of three to six corners on oblique ones. A box that lies between two slices is outlined on
    the nearer one. Empty for a box that lies outside.
    """
    column, row = volume.grid.affine_lps[:3, 0], volume.grid.affine_lps[:3, 1]
    normal = np.cross(column, row) / np.linalg.norm(np.cross(column, row))
    firsts = first_voxels(volume)
    heights = firsts @ normal
    corners = np.array(list(product(*zip(box.low_lps, box.high_lps, strict=True))))
    centre = np.array(box.centre_lps)
    to_pixels = np.linalg.pinv(np.column_stack([column, row]))
    order = np.argsort(np.abs(heights - centre @ normal), kind="stable")

    def outline(index: int, height: float) -> NDArray[np.float64]:
        section = (_cut(corners, normal, height) - firsts[index]) @ to_pixels.T
        return _clip(section, volume.grid.shape[2], volume.grid.shape[1])

    lowest, highest = (corners @ normal).min(), (corners @ normal).max()
    crossed = [int(index) for index in order if lowest - _TOUCHING_MM <= heights[index] <= highest + _TOUCHING_MM]
    outlines = {index: outline(index, float(heights[index])) for index in crossed}
    outlines = {index: points for index, points in outlines.items() if len(points) >= 3}
    widest_step = float(np.diff(np.sort(heights)).max(initial=volume.grid.spacing_mm[0]))
    nearest, middle = int(order[0]), float(centre @ normal)
    if not outlines and abs(heights[nearest] - middle) <= widest_step / 2 + 1e-6:
        # Between two slices: the section through its middle, seen from the nearer slice.
        points = outline(nearest, middle)
        outlines = {nearest: points} if len(points) >= 3 else {}
    return outlines


def _cut(corners: NDArray[np.float64], normal: NDArray[np.float64], offset: float) -> NDArray[np.float64]:
    """The section of a box (eight corners, each bit of the index one axis) by a plane: its corners in order."""
    sides = corners @ normal - offset
    points = []
    for below in (sides <= _TOUCHING_MM, sides < -_TOUCHING_MM):  # so that both ends of the box are part of it
        for first, axis in product(range(8), range(3)):
            second = first | 1 << axis
            if second != first and below[first] != below[second]:
                part = sides[first] / (sides[first] - sides[second])
                points.append(corners[first] + np.clip(part, 0, 1) * (corners[second] - corners[first]))
        if points:
            break
    found = np.array(points).reshape(-1, 3)
    arms = found - found.mean(axis=0) if points else found
    # Two singular values say how far the section reaches in its plane: in a corner or along an edge there is none.
    if len(points) < 3 or np.linalg.svd(arms, compute_uv=False)[1] < 10 * _TOUCHING_MM:
        return np.empty((0, 3))
    across = arms[0] / np.linalg.norm(arms[0])
    angles = np.arctan2(arms @ np.cross(normal, across), arms @ across)
    return found[np.argsort(angles, kind="stable")]


def _clip(outline: NDArray[np.float64], columns: int, rows: int) -> NDArray[np.float64]:
    """The part of a convex outline that lies on the image (Sutherland and Hodgman 1974)."""
    for axis, limit, sign in ((0, -0.5, 1), (0, columns - 0.5, -1), (1, -0.5, 1), (1, rows - 0.5, -1)):
        kept = []
        inside = sign * (outline[:, axis] - limit)
        for index in range(len(outline)):
            before = index - 1
            if (inside[index] >= 0) != (inside[before] >= 0):
                part = inside[before] / (inside[before] - inside[index])
                kept.append(outline[before] + part * (outline[index] - outline[before]))
            if inside[index] >= 0:
                kept.append(outline[index])
        outline = np.array(kept).reshape(-1, 2)
    return outline
