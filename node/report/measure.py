"""What is measured of each segment, in a volume or on each frame of a planar image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from node.dicom.volume import Image, Volume
from node.infer.manifest import DIAMETERS, OF_THE_MESH, OF_VOLUMES, PERCENTILES, Manifest, Measurement
from node.infer.results import Labelmap
from node.report.diameters import Diameters, measure_diameters
from node.report.mesh import Box, measure_mesh
from node.report.sr import round_number
from node.report.values import Tally, find_percentiles

_UNITS = {
    Measurement.VOLUME: "mL",
    Measurement.MESH_VOLUME: "mL",
    Measurement.SURFACE_AREA: "mm2",
    Measurement.MAXIMUM_3D_DIAMETER: "mm",
}


@dataclass(frozen=True)
class SegmentMeasurements:
    """The measurements of one segment in a volume, or on one frame of a planar image."""

    number: int  # the label value
    name: str
    voxels: int
    unit: str  # of the image's values
    wanted: tuple[Measurement, ...]  # those that the image can have
    values: Mapping[Measurement, float] = field(default_factory=dict)  # as computed; what has no value has no entry
    diameters: Diameters | None = None
    frame: int | None = None  # index of the frame; None for a volume and for an image of one frame
    calibrated: bool = True  # whether lengths and areas are in millimetres, else in pixels

    @property
    def volume_ml(self) -> float | None:
        """The sum of the voxels; None on a planar image."""
        return self.values.get(Measurement.VOLUME)

    @property
    def mean(self) -> float | None:
        """The mean of the values; None where there are none."""
        return self.values.get(Measurement.MEAN)

    def value(self, measurement: Measurement) -> float | None:
        """One measurement's value, rounded as the SR, the preview and every table say it."""
        value = self.values.get(measurement)
        return None if value is None else round_number(value)

    def unit_of(self, measurement: Measurement) -> str:
        """The unit that people read."""
        if measurement in DIAMETERS or measurement is Measurement.AREA:
            unit = "mm2" if measurement is Measurement.AREA else "mm"
            return unit if self.calibrated else "pixels"
        return _UNITS.get(measurement, self.unit)

    def rows(self) -> list[dict[str, Any]]:
        """One row for people per wanted measurement that has a value."""
        name = self.name if self.frame is None else f"{self.name}, frame {self.frame + 1}"
        return [
            {"segment": name, "measurement": kind.value, "value": value, "unit": self.unit_of(kind)}
            for kind in self.wanted
            if (value := self.value(kind)) is not None
        ]


def measure_segments(source: Volume | Image, labelmap: Labelmap, manifest: Manifest) -> tuple[SegmentMeasurements, ...]:
    """Measure every segment of the manifest: in the whole volume, or on every frame of a planar image that shows it.

    A segment that is nowhere has one entry without voxels. What is not wanted and costs time is not computed; memory
    stays at a few slices, and for percentiles, diameters and meshes at one segment within its bounding box.
    """
    if isinstance(source, Volume):
        return _measure_in_volume(source, labelmap, manifest)
    return tuple(_measure_on_frames(source, labelmap, manifest))


def voxel_volumes_mm3(volume: Volume) -> NDArray[np.float64]:
    """The volume of a voxel of each slice.

    Where spacing varies, a slice is as thick as half the way to each of its neighbours along the normal, and the first
    and the last reach as far out as in. A sheared voxel has the volume of an upright one.
    """
    if volume.positions_lps is None:
        return np.full(volume.array.shape[0], volume.grid.voxel_volume_mm3)
    plane = np.cross(volume.grid.affine_lps[:3, 0], volume.grid.affine_lps[:3, 1])  # as long as a pixel is large, mm2
    steps = np.abs(np.diff(volume.positions_lps @ (plane / np.linalg.norm(plane))))
    outer = np.concatenate([steps[:1], steps, steps[-1:]])
    return (outer[:-1] + outer[1:]) / 2 * float(np.linalg.norm(plane))


def _measure_in_volume(volume: Volume, labelmap: Labelmap, manifest: Manifest) -> tuple[SegmentMeasurements, ...]:
    wanted = tuple(kind for kind in manifest.measurements if kind is not Measurement.AREA)
    tally = Tally(max(manifest.segments), manifest.intensity_range)
    for labels, values, voxel_mm3 in zip(labelmap.array, volume.array, voxel_volumes_mm3(volume), strict=True):
        tally.add(labels, values, float(voxel_mm3))
    by_box = {*PERCENTILES, *DIAMETERS, *OF_THE_MESH} & set(wanted)
    boxes = ndimage.find_objects(labelmap.array) if by_box else []
    measured = []
    for label, segment in sorted(manifest.segments.items()):
        voxels = int(tally.voxels[label])
        values = {Measurement.VOLUME: float(tally.volumes_mm3[label]) / 1000, **tally.of(label)}
        diameters = None
        if by_box and voxels:
            more, diameters = _measure_in_box(volume, labelmap.array, label, boxes[label - 1], manifest)
            values |= more
        measured.append(SegmentMeasurements(label, segment.name, voxels, volume.unit, wanted, values, diameters))
    return tuple(measured)


def _measure_in_box(
    volume: Volume, labels: NDArray[np.uint16], label: int, box: Box, manifest: Manifest
) -> tuple[dict[Measurement, float], Diameters | None]:
    """What is measured of one segment cut out of the volume."""
    wanted = set(manifest.measurements)
    mask = labels[box] == label
    values: dict[Measurement, float] = {}
    if wanted & PERCENTILES.keys():
        values |= find_percentiles(volume.array[box][mask], manifest.measurements, manifest.intensity_range)
    diameters = None
    if wanted & set(DIAMETERS):
        _, row_mm, column_mm = volume.grid.spacing_mm
        diameters = _shift(measure_diameters(mask, (row_mm, column_mm)), box)
        values |= _lengths(diameters)
    if wanted & set(OF_THE_MESH):
        mesh = measure_mesh(volume, mask, box)
        values[Measurement.MESH_VOLUME] = mesh.volume_mm3 / 1000
        values[Measurement.SURFACE_AREA] = mesh.area_mm2
        values[Measurement.MAXIMUM_3D_DIAMETER] = mesh.diameter_mm
    return values, diameters


def _measure_on_frames(image: Image, labelmap: Labelmap, manifest: Manifest) -> Iterator[SegmentMeasurements]:
    """Segment by segment, each frame that shows it."""
    wanted = tuple(kind for kind in manifest.measurements if kind not in OF_VOLUMES)
    calibrated = image.spacing_mm is not None
    spacing = image.spacing_mm or (1.0, 1.0)
    grey = image.array if image.array.ndim == 3 else None
    found: dict[int, list[SegmentMeasurements]] = {label: [] for label in manifest.segments}
    for index, labels in enumerate(labelmap.array):
        values = None if grey is None else grey[index]
        tally = Tally(max(manifest.segments), manifest.intensity_range)
        tally.add(labels, values)
        for label in np.flatnonzero(tally.voxels).tolist():
            mask = labels == label
            measured = {Measurement.AREA: int(tally.voxels[label]) * spacing[0] * spacing[1], **tally.of(label)}
            if values is not None:
                measured |= find_percentiles(values[mask], wanted, manifest.intensity_range)
            diameters = None
            if set(wanted) & set(DIAMETERS):
                rows, columns = ndimage.find_objects(mask.astype(np.uint8))[0]
                box = (slice(index, index + 1), rows, columns)
                diameters = _shift(measure_diameters(mask[None, rows, columns], spacing), box)
                measured |= _lengths(diameters)
            found[label].append(
                SegmentMeasurements(
                    label,
                    manifest.segments[label].name,
                    int(tally.voxels[label]),
                    "",
                    wanted,
                    measured,
                    diameters,
                    index if len(image.frames) > 1 else None,
                    calibrated,
                )
            )
    for label, segment in sorted(manifest.segments.items()):
        nowhere = SegmentMeasurements(
            label, segment.name, 0, "", wanted, {Measurement.AREA: 0.0}, calibrated=calibrated
        )
        yield from found[label] or [nowhere]


def _lengths(diameters: Diameters) -> dict[Measurement, float]:
    return {
        Measurement.LONGEST_DIAMETER: diameters.longest,
        Measurement.PERPENDICULAR_DIAMETER: diameters.perpendicular,
    }


def _shift(diameters: Diameters, box: Box) -> Diameters:
    """The diameters of a part that was cut out, where they lie in the whole."""
    corner = (box[1].start, box[2].start)
    return Diameters(
        diameters.index + box[0].start,
        diameters.longest,
        diameters.longest_line + corner,
        diameters.perpendicular,
        diameters.perpendicular_line + corner,
    )
