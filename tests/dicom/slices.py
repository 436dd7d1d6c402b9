"""Small CT and MR slices as files, of whatever geometry and encoding a test asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

PATIENT = {"PatientName": "Nemo^Secret", "PatientID": "ID-4711", "PatientBirthDate": "19700131"}

Vector = tuple[float, float, float]


def write_series(
    folder: Path,
    array: NDArray[np.int16],
    *,
    row: Vector = (1.0, 0.0, 0.0),
    column: Vector = (0.0, 1.0, 0.0),
    spacing_mm: Vector = (2.0, 1.0, 1.0),
    origin_mm: Vector = (-10.0, -20.0, 30.0),
    descending: bool = False,
    **values: Any,
) -> list[Path]:
    """One file per slice of `array` (slices, rows, columns), along row x column or, `descending`, against it.

    `values` are set in every slice by their DICOM keywords. Instances are named and numbered in the array's order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid(), **PATIENT}
    normal = np.cross(row, column) * (-1 if descending else 1)
    paths = []
    for index, plane in enumerate(array):
        position = np.array(origin_mm) + normal * spacing_mm[0] * index
        header: dict[str, Any] = {
            "SOPClassUID": CTImageStorage,
            "SOPInstanceUID": generate_uid(),
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
            "Modality": "CT",
            "SliceThickness": "99",  # never to be believed
            "FrameOfReferenceUID": "1.2.3",
            "InstanceNumber": len(array) - index,  # nor this
            "ImagePositionPatient": [f"{value:.10g}" for value in position],
            "ImageOrientationPatient": [f"{value:.10g}" for value in (*row, *column)],
            "PixelSpacing": [f"{spacing_mm[1]:.10g}", f"{spacing_mm[2]:.10g}"],
            "RescaleSlope": "1",
            "RescaleIntercept": "0",
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "Rows": plane.shape[0],
            "Columns": plane.shape[1],
            "BitsAllocated": 16,
            "BitsStored": 16,
            "HighBit": 15,
            "PixelRepresentation": 1,
        }
        dataset = Dataset()
        for keyword, value in {**header, **series, **values}.items():
            setattr(dataset, keyword, value)
        dataset.PixelData = plane.astype("<i2").tobytes()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = UID(str(dataset.SOPInstanceUID))
        paths.append(folder / f"{index:03d}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths
