"""Small enhanced multi-frame objects as files: any geometry, any dimensions, frames in any order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid

from tests.dicom.slices import PATIENT

# Where the attributes of a frame stand (PS3.3 C.7.6.16, C.8.13).
MACROS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "EffectiveEchoTime": "MREchoSequence",
    "FlipAngle": "MRTimingAndRelatedParametersSequence",
    "InversionTimes": "MRModifierSequence",
    "DiffusionBValue": "MRDiffusionSequence",
    "DiffusionDirectionality": "MRDiffusionSequence",
    "DiffusionGradientOrientation": "MRDiffusionSequence",
    "FrameType": "MRImageFrameTypeSequence",
    "ComplexImageComponent": "MRImageFrameTypeSequence",
    "NominalPercentageOfCardiacPhase": "CardiacSynchronizationSequence",
    "ConvolutionKernel": "CTReconstructionSequence",
    "StackID": "FrameContentSequence",
    "InStackPositionNumber": "FrameContentSequence",
    "TemporalPositionIndex": "FrameContentSequence",
    "FrameAcquisitionNumber": "FrameContentSequence",
    "FrameAcquisitionDateTime": "FrameContentSequence",
    "DimensionIndexValues": "FrameContentSequence",
}


def write_multiframe(
    path: Path,
    array: NDArray[np.int16],
    frames: Sequence[dict[str, Any]],
    *,
    shared: dict[str, Any] | None = None,
    dimensions: Sequence[str] = (),
    **values: Any,
) -> Path:
    """One enhanced object of `array` (frames, rows, columns), each frame with its attributes by DICOM keywords.

    Attributes go into their macros. `dimensions` are the keywords that the frames' DimensionIndexValues refer to.
    `values` are set at the top.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {
        "SOPClassUID": EnhancedMRImageStorage,
        "SOPInstanceUID": generate_uid(),
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "ImageType": ["ORIGINAL", "PRIMARY", "OTHER", "NONE"],
        "Modality": "MR",
        "FrameOfReferenceUID": "1.2.3",
        "InstanceNumber": 1,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "NumberOfFrames": str(len(array)),
        "Rows": array.shape[1],
        "Columns": array.shape[2],
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        **PATIENT,
    }
    dataset = Dataset()
    for keyword, value in {**header, **values}.items():
        setattr(dataset, keyword, value)
    whole = {"PixelSpacing": ["1", "1"], "ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"]}
    dataset.SharedFunctionalGroupsSequence = Items([_groups({**whole, **(shared or {})})])
    dataset.PerFrameFunctionalGroupsSequence = Items([_groups(frame) for frame in frames])
    if dimensions:
        dataset.DimensionIndexSequence = Items([_item(DimensionIndexPointer=_tag(keyword)) for keyword in dimensions])
    dataset.PixelData = array.astype("<i2").tobytes()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = UID(str(dataset.SOPClassUID))
    dataset.file_meta.MediaStorageSOPInstanceUID = UID(str(dataset.SOPInstanceUID))
    dataset.save_as(path, enforce_file_format=True)
    return path


def _groups(values: dict[str, Any]) -> Dataset:
    macros: dict[str, Dataset] = {}
    for keyword, value in values.items():
        macro = macros.setdefault(MACROS[keyword], Dataset())
        if keyword == "DiffusionGradientOrientation":
            macro.DiffusionGradientDirectionSequence = Items([_item(**{keyword: value})])
        else:
            setattr(macro, keyword, value)
    groups = Dataset()
    for name, macro in macros.items():
        setattr(groups, name, Items([macro]))
    return groups


def _item(**values: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def _tag(keyword: str) -> int:
    tag = tag_for_keyword(keyword)
    assert tag is not None
    return tag
