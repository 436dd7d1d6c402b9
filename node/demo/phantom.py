"""A phantom chest CT as real DICOM files, whose lung volumes are known in closed form.

The shapes are given in LPS millimetres and sampled at the pixels of whatever planes are asked for, so the same patient
can be scanned axially, obliquely or from the feet up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from node.dicom.uid import derive_uid

AIR_HU, LUNG_HU, TISSUE_HU, BONE_HU, COUCH_HU = -1000.0, -850.0, 40.0, 450.0, -200.0
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))  # row and column direction cosines

Points = NDArray[np.float32]


@dataclass(frozen=True)
class Lung:
    """Two half ellipsoids of one elliptic waist: an apex above, a shallower base below."""

    center_mm: tuple[float, float, float]  # of the waist, LPS
    semi_axes_mm: tuple[float, float]  # x, y of the waist
    apex_mm: float
    base_mm: float

    @property
    def volume_ml(self) -> float:
        """Closed form: 2/3 pi a b (apex + base)."""
        a, b = self.semi_axes_mm
        return 2 / 3 * math.pi * a * b * (self.apex_mm + self.base_mm) / 1000

    def contains(self, x: Points, y: Points, z: Points) -> NDArray[np.bool_]:
        """Which points lie inside."""
        dx, dy, dz = x - self.center_mm[0], y - self.center_mm[1], z - self.center_mm[2]
        height = np.where(dz > 0, self.apex_mm, self.base_mm)
        return (dx / self.semi_axes_mm[0]) ** 2 + (dy / self.semi_axes_mm[1]) ** 2 + (dz / height) ** 2 <= 1


RIGHT_LUNG = Lung((-80.0, 0.0, -30.0), (56.0, 82.0), apex_mm=140.0, base_mm=55.0)
LEFT_LUNG = Lung((84.0, 4.0, -30.0), (48.0, 76.0), apex_mm=132.0, base_mm=60.0)


@dataclass(frozen=True)
class Phantom:
    """What was written, and what is known of it."""

    study_uid: str
    series_uid: str
    paths: tuple[Path, ...]
    volumes_ml: dict[str, float]  # by segment name in lower case


def make_chest_phantom(
    folder: Path,
    *,
    slices: int = 110,
    spacing_mm: tuple[float, float, float] = (2.5, 1.5, 1.5),
    shape: tuple[int, int] = (256, 256),
    directions: tuple[tuple[float, float, float], tuple[float, float, float]] = AXIAL,
    feet_first: bool = True,
    seed: int = 0,
) -> Phantom:
    """Write the phantom's slices into `folder`.

    `spacing_mm` is between slices, rows and columns. `directions` are the row and column direction cosines of the
    images; slices follow each other along their cross product, or against it unless `feet_first`. The same arguments
    make the same files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = f"{slices} {spacing_mm} {shape} {directions} {feet_first} {seed}"
    study_uid, series_uid = derive_uid("phantom", key, "study"), derive_uid("phantom", key, "series")
    row, column = (np.array(direction) / np.linalg.norm(direction) for direction in directions)
    normal = np.cross(row, column)
    rng = np.random.default_rng(seed)
    paths = []
    for index in range(slices):
        along = (index - (slices - 1) / 2) * spacing_mm[0] * (1 if feet_first else -1)
        corner = normal * along - row * spacing_mm[2] * (shape[1] - 1) / 2 - column * spacing_mm[1] * (shape[0] - 1) / 2
        hu = _scan(corner, row, column, normal, spacing_mm, shape) + rng.normal(0, 12, shape)
        dataset = _dataset(key, study_uid, series_uid, index, corner, (row, column), spacing_mm, shape)
        dataset.PixelData = np.clip(np.rint(hu + 1024), 0, 4095).astype("<u2").tobytes()
        paths.append(folder / f"IM{index + 1:04d}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    volumes = {"right lung": RIGHT_LUNG.volume_ml, "left lung": LEFT_LUNG.volume_ml}
    return Phantom(study_uid, series_uid, tuple(paths), volumes)


def _scan(
    corner: NDArray[np.float64],
    row: NDArray[np.float64],
    column: NDArray[np.float64],
    normal: NDArray[np.float64],
    spacing_mm: tuple[float, float, float],
    shape: tuple[int, int],
) -> NDArray[np.float64]:
    """One slice in HU: the mean over 2x2x2 points in each voxel, so that borders have partial volume."""
    total = np.zeros(shape)
    for depth in (-0.25, 0.25):
        for down in (-0.25, 0.25):
            for across in (-0.25, 0.25):
                rows = ((np.arange(shape[0]) + down) * spacing_mm[1])[:, None]
                columns = ((np.arange(shape[1]) + across) * spacing_mm[2])[None, :]
                at = corner + normal * depth * spacing_mm[0]
                x, y, z = (
                    (at[axis] + column[axis] * rows + row[axis] * columns).astype(np.float32) for axis in range(3)
                )
                total += _density(x, y, z)
    return total / 8


def _density(x: Points, y: Points, z: Points) -> Points:
    """HU at each point of the patient on the couch."""
    hu = np.full(x.shape, AIR_HU, np.float32)
    hu[(np.abs(y - 128) < 6) & (np.abs(x) < 200)] = COUCH_HU
    hu[(x / 172) ** 2 + (y / 116) ** 2 <= 1] = TISSUE_HU
    hu[x**2 + (y - 82) ** 2 <= 17**2] = BONE_HU  # spine
    hu[(x / 30) ** 2 + ((y + 100) / 7) ** 2 <= 1] = BONE_HU  # sternum
    for lung in (RIGHT_LUNG, LEFT_LUNG):
        hu[lung.contains(x, y, z)] = LUNG_HU
    for start, end, radius in _VESSELS:
        hu[_in_tube(x, y, z, start, end, radius)] = TISSUE_HU
    for start, end, radius in _AIRWAYS:
        hu[_in_tube(x, y, z, start, end, radius + 2)] = TISSUE_HU
    for start, end, radius in _AIRWAYS:
        hu[_in_tube(x, y, z, start, end, radius)] = AIR_HU
    return hu


Tube = tuple[tuple[float, float, float], tuple[float, float, float], float]

# Trachea and main bronchi, with a wall of 2 mm. The bronchi end at the lungs, so the lungs' volumes stay closed forms.
_AIRWAYS: tuple[Tube, ...] = (
    ((0.0, 20.0, 200.0), (0.0, 20.0, 12.0), 9.0),
    ((0.0, 20.0, 12.0), (-18.0, 16.0, -2.0), 6.5),
    ((0.0, 20.0, 12.0), (28.0, 16.0, -6.0), 6.0),
)
# Vessels inside the lungs: they belong to the lung.
_VESSELS: tuple[Tube, ...] = (
    ((-55.0, 5.0, -20.0), (-100.0, -30.0, 20.0), 3.0),
    ((-55.0, 10.0, -30.0), (-95.0, 40.0, -55.0), 2.5),
    ((60.0, 8.0, -25.0), (100.0, -28.0, 15.0), 3.0),
    ((62.0, 12.0, -30.0), (96.0, 40.0, -50.0), 2.5),
)


def _in_tube(
    x: Points, y: Points, z: Points, start: tuple[float, ...], end: tuple[float, ...], radius: float
) -> NDArray[np.bool_]:
    """Which points lie within `radius` of the line from `start` to `end`."""
    ax, ay, az = (last - first for first, last in zip(start, end, strict=True))
    length2 = ax * ax + ay * ay + az * az
    dx, dy, dz = x - start[0], y - start[1], z - start[2]
    along = np.clip((dx * ax + dy * ay + dz * az) / length2, 0, 1)
    return (dx - along * ax) ** 2 + (dy - along * ay) ** 2 + (dz - along * az) ** 2 <= radius**2


def _dataset(
    key: str,
    study_uid: str,
    series_uid: str,
    index: int,
    corner: NDArray[np.float64],
    directions: tuple[NDArray[np.float64], NDArray[np.float64]],
    spacing_mm: tuple[float, float, float],
    shape: tuple[int, int],
) -> Dataset:
    """The CT image (PS3.3 A.3) without its pixels."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = UID(derive_uid("phantom", key, "image", str(index)))
    dataset = Dataset()
    dataset.file_meta = meta
    today = date(2026, 1, 1).strftime("%Y%m%d")
    values = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "StudyDate": today,
        "SeriesDate": today,
        "AcquisitionDate": today,
        "ContentDate": today,
        "StudyTime": "120000",
        "SeriesTime": "120000",
        "AcquisitionTime": "120000",
        "ContentTime": "120000",
        "AccessionNumber": "PHANTOM1",
        "Modality": "CT",
        "Manufacturer": "radnode",
        "ManufacturerModelName": "phantom",
        "ReferringPhysicianName": None,
        "StudyDescription": "Phantom chest",
        "SeriesDescription": "Phantom chest axial"
        if directions[0][0] == 1 and directions[1][1] == 1
        else "Phantom chest",
        "PatientName": "DEMO^PATIENT",
        "PatientID": "RADNODE-PHANTOM",
        "PatientBirthDate": "19700101",
        "PatientSex": "O",
        "BodyPartExamined": "CHEST",
        "SliceThickness": f"{spacing_mm[0]:g}",
        "KVP": "120",
        "ConvolutionKernel": "STANDARD",
        "PatientPosition": "HFS",
        "StudyInstanceUID": study_uid,
        "SeriesInstanceUID": series_uid,
        "StudyID": "1",
        "SeriesNumber": 1,
        "AcquisitionNumber": 1,
        "InstanceNumber": index + 1,
        "ImagePositionPatient": [f"{value:.6g}" for value in corner],
        "ImageOrientationPatient": [f"{value:.8g}" for value in (*directions[0], *directions[1])],
        "FrameOfReferenceUID": derive_uid("phantom", key, "frame of reference"),
        "PositionReferenceIndicator": None,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": shape[0],
        "Columns": shape[1],
        "PixelSpacing": [f"{spacing_mm[1]:g}", f"{spacing_mm[2]:g}"],
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "RescaleIntercept": "-1024",
        "RescaleSlope": "1",
        "RescaleType": "HU",
    }
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset
