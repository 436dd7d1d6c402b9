"""Frames as single-frame headers: the real enhanced objects, and what every macro must do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from node.dicom.frames import FrameHeaders, frame_header
from node.dicom.header import read_header

XA30 = "enhanced/mr_siemens_xa30/In"


def item(**values: Any) -> Dataset:
    """A data set of these keywords; a data set as a value becomes a sequence of one item."""
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, Sequence([value]) if isinstance(value, Dataset) else value)
    return dataset


def multiframe(*frames: Dataset, shared: Dataset | None = None, **values: Any) -> Dataset:
    header = item(SOPInstanceUID="1.2.3", Modality="MR", NumberOfFrames=str(len(frames)), **values)
    header.SharedFunctionalGroupsSequence = Sequence([shared or Dataset()])
    header.PerFrameFunctionalGroupsSequence = Sequence(frames)
    return header


def test_frame_of_a_siemens_field_map(shared_data: Path) -> None:
    (path,) = (shared_data / XA30 / "9_gre_field_mapping").iterdir()
    header = read_header(path)
    frame = frame_header(header, 33)
    assert list(frame.ImageType) == ["ORIGINAL", "PRIMARY", "P", "NONE"]
    assert [float(value) for value in frame.ImagePositionPatient] == [-108, -106.928, 98.1508]
    assert [float(value) for value in frame.ImageOrientationPatient] == [1, 0, 0, 0, 0.998141, -0.060947]
    assert [float(value) for value in frame.PixelSpacing] == [3.375, 3.375]
    assert (frame.RescaleSlope, frame.RescaleIntercept, frame.RescaleType) == (2, -4096, "US")
    assert (frame.WindowCenter, frame.WindowWidth) == (-198, 4576)
    assert (frame.EchoTime, frame.EffectiveEchoTime, frame.RepetitionTime) == (12.46, 12.46, 600)
    assert (frame.StackID, frame.InStackPositionNumber, frame.TemporalPositionIdentifier) == ("1", 33, 1)
    assert (frame.AcquisitionDate, frame.AcquisitionTime, frame.AcquisitionNumber) == ("20220711", "120942.772500", 1)
    assert (frame.SOPInstanceUID, frame.Rows, frame.Modality) == (header.SOPInstanceUID, 64, "MR")
    assert frame.file_meta.TransferSyntaxUID == header.file_meta.TransferSyntaxUID
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "NumberOfFrames"):
        assert keyword not in frame
        assert keyword in header


def test_frames_of_a_ct_perfusion_map_share_what_is_shared(shared_data: Path) -> None:
    header = read_header(shared_data / "enhanced" / "eCT_Supplemental.dcm")
    first, second = FrameHeaders(header).values()
    assert first.ImagePositionPatient != second.ImagePositionPatient
    assert first["PixelSpacing"] is second["PixelSpacing"]
    assert list(first.ImageType) == ["DERIVED", "PRIMARY", "PERFUSION", "RCBF"]
    assert first.RealWorldValueMappingSequence[0].LUTLabel == "RCBF"
    assert first.ContrastBolusAgentAdministered == "YES"
    assert (first.RescaleIntercept, first.RescaleSlope) == (-1024, 1)


def test_own_goes_before_shared_before_the_object() -> None:
    header = multiframe(
        item(PixelMeasuresSequence=item(PixelSpacing=["1", "2"]), MRDiffusionSequence=item(DiffusionBValue=1000.0)),
        item(PixelMeasuresSequence=item(PixelSpacing=None)),
        shared=item(PixelMeasuresSequence=item(PixelSpacing=["3", "4"]), MREchoSequence=item(EffectiveEchoTime=5.0)),
        PixelSpacing=["5", "6"],
        EchoTime="7",
        KVP="80",
    )
    first, second = FrameHeaders(header).values()
    assert (first.PixelSpacing, second.PixelSpacing) == ([1, 2], [3, 4])
    assert (first.DiffusionBValue, "DiffusionBValue" in second) == (1000, False)
    assert (first.EchoTime, second.EchoTime, second.KVP) == (5, 5, 80)
    with pytest.raises(KeyError):
        frame_header(header, 3)
    with pytest.raises(KeyError):
        frame_header(header, 0)


def test_macros_under_the_names_of_single_frames() -> None:
    (frame,) = FrameHeaders(
        multiframe(
            item(
                MRImageFrameTypeSequence=item(FrameType=["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]),
                MRModifierSequence=item(InversionTimes=[900.0]),
                MRDiffusionSequence=item(
                    DiffusionDirectionality="DIRECTIONAL",
                    DiffusionGradientDirectionSequence=item(DiffusionGradientOrientation=[0.0, 0.6, 0.8]),
                ),
                CardiacSynchronizationSequence=item(
                    NominalPercentageOfCardiacPhase=70.0, NominalCardiacTriggerDelayTime=512.5
                ),
                CTExposureSequence=item(ExposureTimeInms=500.4, XRayTubeCurrentInmA=200.0, ExposureInmAs=100.0),
                CTReconstructionSequence=item(ConvolutionKernel="B40f"),
                FrameContentSequence=item(
                    FrameAcquisitionDateTime="20240102030405.5+0100", FrameAcquisitionNumber=7, TemporalPositionIndex=3
                ),
                MREchoSequence=item(EffectiveEchoTime=1 / 3),
            ),
            ImageType=["MIXED", "PRIMARY", "DIFFUSION", "MIXED"],
        )
    ).values()
    assert list(frame.ImageType) == ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]
    assert list(frame.DiffusionGradientOrientation) == [0, 0.6, 0.8]
    assert (frame.InversionTime, frame.TriggerTime, frame.NominalPercentageOfCardiacPhase) == (900, 512.5, 70)
    assert (frame.ExposureTime, frame.XRayTubeCurrent, frame.Exposure) == (500, 200, 100)
    assert frame.ConvolutionKernel == "B40f"
    assert (frame.AcquisitionDate, frame.AcquisitionTime) == ("20240102", "030405.5")
    assert (frame.AcquisitionNumber, frame.TemporalPositionIdentifier) == (7, 3)
    assert str(frame.EchoTime) == "0.3333333333"


def test_legacy_converted_attributes_replace_nothing() -> None:
    header = multiframe(
        item(
            UnassignedPerFrameConvertedAttributesSequence=item(TriggerTime="12", EchoTime="99"),
            ConversionSourceAttributesSequence=item(ReferencedSOPInstanceUID="1.2.3.4"),
            MREchoSequence=item(EffectiveEchoTime=5.0),
        ),
        shared=item(UnassignedSharedConvertedAttributesSequence=item(Modality="XX", PatientID="other", KVP="120")),
        PatientID="this",
    )
    frame = frame_header(header, 1)
    assert (frame.TriggerTime, frame.EchoTime, frame.KVP) == (12, 5, 120)
    assert (frame.Modality, frame.PatientID, frame.SOPInstanceUID) == ("MR", "this", "1.2.3")
    assert frame.ConversionSourceAttributesSequence[0].ReferencedSOPInstanceUID == "1.2.3.4"


def test_damaged_groups_leave_what_can_be_read() -> None:
    header = multiframe(item(PlanePositionSequence=item(ImagePositionPatient=["1", "2", "3"])), Columns=8)
    header.NumberOfFrames = "2"
    first, second = FrameHeaders(header).values()
    assert list(first.ImagePositionPatient) == [1, 2, 3]
    assert "ImagePositionPatient" not in second
    assert second.Columns == 8


def test_ultrasound_clip_has_frames_without_groups(shared_data: Path) -> None:
    header = read_header(shared_data / "planar" / "us_colour_multiframe.dcm")
    frames = FrameHeaders(header)
    assert len(frames) == int(header.NumberOfFrames) > 1
    assert frames[len(frames)].Modality == "US"
