"""What a model sees of its inputs, regular and on one grid where it wants that, and its prediction where it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from node.dicom.regrid import carry_back, make_regular, register_onto, resample_onto, slice_positions
from node.dicom.volume import Image, Volume
from node.errors import InputRefused
from node.infer.manifest import Manifest
from node.infer.results import Labelmap, Landmark, Landmarks, Prediction, keep_sparse
from node.infer.saliency import Saliency


def inputs_as_seen(sources: Mapping[str, Volume | Image], manifest: Manifest) -> dict[str, Volume | Image]:
    """Every volume regular; those that the manifest wants `onto_first` on the grid of the first input.

    Raises `InputRefused` where an input lies in another frame of reference than the first and may not be registered, or
    where the registration failed.
    """
    seen = {name: make_regular(source) if isinstance(source, Volume) else source for name, source in sources.items()}
    first = seen[next(iter(manifest.inputs))]
    for name, wanted in manifest.inputs.items():
        source = seen[name]
        if not wanted.onto_first or source is first:
            continue
        if not isinstance(source, Volume) or not isinstance(first, Volume):
            raise InputRefused(f"input {name!r} is to be brought onto the first one's grid, and one of them is planar")
        here = first.grid.frame_of_reference_uid
        if wanted.registered and (not here or here != source.grid.frame_of_reference_uid):
            seen[name] = register_onto(source, first)
        else:
            seen[name] = resample_onto(source, first.grid)
    return seen


def prediction_as_sent(prediction: Prediction, seen: Volume | Image, source: Volume | Image) -> Prediction:
    """A prediction about `seen` in the slices of `source`, exactly: labels by the nearest voxel, probabilities
    by those around it, points by their place.

    Boxes stand in patient space and scores nowhere: they stay as they are.
    """
    if seen is source or not isinstance(seen, Volume) or not isinstance(source, Volume):
        return prediction
    remark = (
        "The slices as sent make no regular grid (gantry tilt or changing spacing): the model saw them resampled to "
        f"{seen.grid.shape[0]} slices of {seen.grid.spacing_mm[0]:.2f} mm."
    )
    prediction = replace(prediction, remarks=(*prediction.remarks, remark))
    match prediction:
        case Labelmap():
            array = carry_back(prediction.array, seen.grid, source)
            found = prediction.probabilities
            certain = None if found is None else {label: _blend(one, seen, source) for label, one in found.items()}
            return replace(prediction, array=array, grid=source.grid, probabilities=certain)
        case Landmarks():
            return replace(prediction, points=tuple(_carry(point, seen, source) for point in prediction.points))
        case _:
            return prediction


def saliency_as_sent(saliency: Saliency, seen: Volume | Image, source: Volume | Image) -> Saliency:
    """What the scores about `seen` came from in the slices of `source`; blended where these make no regular grid."""
    if seen is source or not isinstance(seen, Volume) or not isinstance(source, Volume):
        return saliency
    parts = [replace(part, drops=carry_back(part.drops, seen.grid, source, order=1)) for part in saliency.parts]
    return replace(saliency, parts=tuple(parts))


def _blend(values: NDArray[np.uint8], seen: Volume, source: Volume) -> NDArray[np.uint8]:
    if not values.any():
        return np.zeros(source.array.shape, np.uint8)
    return keep_sparse(carry_back(values, seen.grid, source, order=1))


def _carry(point: Landmark, seen: Volume, source: Volume) -> Landmark:
    """The point on the slice of `source` that its place is nearest to."""
    place = seen.grid.to_lps(np.array([[point.column, point.row, point.frame]]))[0]
    across, down = source.grid.affine_lps[:3, 0], source.grid.affine_lps[:3, 1]
    normal = np.cross(across, down)
    positions = slice_positions(source)
    frame = int(np.abs((positions - place) @ normal).argmin())
    offset = place - positions[frame]
    return replace(
        point, frame=frame, row=float(offset @ down / (down @ down)), column=float(offset @ across / (across @ across))
    )
