"""What a viewer's picture should hold, computed from the voxels and the volume's own geometry alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from node.dicom.volume import Volume
from tests.viewer.ohif import Viewer

COLOURED = 24  # how far apart the channels of a pixel are that is no grey


def image_points(volume: Volume, index: int, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (n, 2) of a slice, column and row of pixel centres, in the patient (n, 3), LPS mm."""
    return volume.grid.to_lps(np.column_stack([points, np.full(len(points), index)]))


class Screen:
    """Where the pixels of a volume's slice lie in a picture of the viewer; nearest pixel."""

    def __init__(self, viewer: Viewer, volume: Volume, index: int):
        self.pixels = viewer.pixels()
        corners = np.array([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]])
        origin, along, down = viewer.place(image_points(volume, index, corners))
        to_screen = np.column_stack([along - origin, down - origin]) / 100
        y, x = np.mgrid[: self.pixels.shape[0], : self.pixels.shape[1]]
        # A pixel has the colour of its centre.
        places = np.stack([x + 0.5 - origin[0], y + 0.5 - origin[1]], axis=-1) @ np.linalg.inv(to_screen).T
        columns, rows = np.round(places[..., 0]).astype(int), np.round(places[..., 1]).astype(int)
        self.inside = (rows >= 0) & (rows < volume.array.shape[1]) & (columns >= 0) & (columns < volume.array.shape[2])
        self._from = rows[self.inside], columns[self.inside]

    def draw(self, plane: NDArray[Any]) -> NDArray[Any]:
        """A plane of values on the slice's grid as it should lie in the picture, zero around it."""
        drawn = np.zeros(self.inside.shape, plane.dtype)
        drawn[self.inside] = plane[self._from]
        return drawn


def find_colours(pixels: NDArray[np.uint8], colours: dict[int, tuple[int, int, int]]) -> NDArray[np.uint16]:
    """The label whose colour each coloured pixel is nearest to in hue; 0 for greys."""
    values = pixels.astype(float)
    tint = values - values.mean(axis=-1, keepdims=True)
    wanted = np.array([np.array(colour) - np.mean(colour) for colour in colours.values()])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    labels = np.array(list(colours))[(tint @ wanted.T).argmax(axis=-1)]
    return np.where(np.ptp(values, axis=-1) > COLOURED, labels, 0).astype(np.uint16)


def overlap(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Intersection over union; 0 where both are empty."""
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 0.0
