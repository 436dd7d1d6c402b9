"""Whatever the attributes of an image hold, what comes of it is a volume, an image or a sentence."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filewriter import dcmwrite
from pydicom.tag import BaseTag, Tag
from pydicom.uid import DigitalXRayImageStorageForPresentation

from node.dicom.assembly import assemble_volumes
from node.dicom.header import read_header
from node.dicom.pixels import read_input
from node.dicom.selection import select_input
from node.dicom.volume import Image, Volume
from node.errors import InputRefused
from node.infer.manifest import Input, Rank
from node.route import representative_header
from tests.dicom.multiframe import write_multiframe
from tests.dicom.slices import write_series
from tests.dicom.test_suv import pet

# Raw values that scanners and faulty networks were seen to send, and worse ones.
VALUES = (
    b"", b"0 ", b"-1", b"1e400 ", b"inf ", b"nan ", b"\\\\", b"1\\2\\3 ", b"Nemo^Secret ", b"\xff\xff\xff\xff", b"\0\0",
    b"\0\0\0\0", b"\x10", b"1\\\\1", b"99999999999999999999", b"-0.5",
)  # fmt: skip
KEYWORDS = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "ImageType", "Modality", "Rows",
    "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit", "PixelSpacing",
    "ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept", "RescaleType",
    "ModalityLUTSequence", "RealWorldValueMappingSequence", "WindowCenter", "WindowWidth", "InstanceNumber",
    "EchoTime", "TriggerTime", "AcquisitionDate", "AcquisitionTime", "AcquisitionDateTime", "SeriesDate", "SeriesTime",
    "PatientWeight", "PatientAge", "Units", "SUVType", "DecayCorrection", "CorrectedImage", "TimezoneOffsetFromUTC",
    "RadiopharmaceuticalInformationSequence", "ConvolutionKernel", "ContrastBolusAgent", "ContrastBolusAgentSequence",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "DimensionIndexSequence", "StackID",
    "DimensionIndexValues", "ImagerPixelSpacing", "EstimatedRadiographicMagnificationFactor",
    "SequenceOfUltrasoundRegions", "SeriesDescription", "VolumeBasedCalculationTechnique", "DiffusionBValue",
)  # fmt: skip

ARRAY = np.arange(4 * 4 * 4, dtype=np.int16).reshape(4, 4, 4)


def computed_tomography(folder: Path) -> None:
    write_series(folder, ARRAY, PixelPaddingValue=-2)


def positron_emission(folder: Path) -> None:
    write_series(folder, ARRAY, **pet())


def radiograph(folder: Path) -> None:
    write_series(
        folder, ARRAY[:1], SOPClassUID=DigitalXRayImageStorageForPresentation, Modality="DX",
        PhotometricInterpretation="MONOCHROME1", WindowCenter="20", WindowWidth="30", PixelPaddingValue=5,
    )  # fmt: skip
    for path in folder.iterdir():
        dataset = dcmread(path)
        del dataset.ImagePositionPatient
        dataset.save_as(path)


def multiframe(folder: Path) -> None:
    frames = [
        {"ImagePositionPatient": [0, 0, height], "EffectiveEchoTime": 3.0, "RescaleSlope": "2", "RescaleIntercept": "1"}
        for height in range(4)
    ]
    shared = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1, 1]}
    write_multiframe(folder / "0.dcm", ARRAY, frames, shared=shared, Modality="MR")


def tags(dataset: Dataset, keyword: str) -> list[tuple[Dataset, BaseTag]]:
    """Every place of an attribute, within sequences too; the top where it is nowhere."""
    tag = Tag(keyword)
    found = [(dataset, tag)] if tag in dataset else []
    for other in list(dataset.keys()):
        with suppress(Exception):  # an earlier damage
            if dataset[other].VR == "SQ":
                found += [place for item in dataset[other].value for place in tags(item, keyword) if tag in place[0]]
    return found or [(dataset, tag)]


def damage(path: Path, keyword: str, value: bytes | None, place: int) -> None:
    """Give one place of an attribute these bytes, whatever they mean there; without any, take it away."""
    if keyword == "SpecificCharacterSet":
        _damage_character_set(path, value or b"")
        return
    dataset = dcmread(path)
    places = tags(dataset, keyword)
    owner, tag = places[place % len(places)]
    if value is None:
        if tag in owner:
            del owner[tag]
    else:
        owner._dict[tag] = RawDataElement(tag, dictionary_VR(tag)[:2], len(value), value, 0, False, True)
    dcmwrite(path, dataset)


def _damage_character_set(path: Path, value: bytes) -> None:
    """Put it before all else in the data set, byte by byte: pydicom writes none that it does not know."""
    content = path.read_bytes()
    start = 144 + int.from_bytes(content[140:144], "little")  # the file meta information and its length (PS3.10 7.1)
    rest = content[start:]
    if rest.startswith(b"\x08\0\5\0"):
        rest = rest[8 + int.from_bytes(rest[6:8], "little") :]
    path.write_bytes(content[:start] + b"\x08\0\5\0CS" + len(value).to_bytes(2, "little") + value + rest)


def look_at(paths: list[Path]) -> list[Volume | Image]:
    """All that is done with headers and voxels before a model sees them."""
    headers: dict[Path, Dataset] = {}
    for path in paths:
        with suppress(InputRefused):
            headers[path] = read_header(path)
    if headers:
        representative_header(headers.values())
    assembly = assemble_volumes(headers)
    for wanted in (Input(rank=tuple(Rank)), Input(kind="image", rank=tuple(Rank))):
        with suppress(InputRefused):
            select_input(assembly, wanted)
    read: list[Volume | Image] = []
    for plan in (*assembly.volumes, *assembly.images):
        with suppress(InputRefused):
            read.append(read_input(plan))
    return read


@pytest.mark.parametrize("make", [computed_tomography, positron_emission, radiograph, multiframe])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(
            st.sampled_from(KEYWORDS),
            st.one_of(st.none(), st.sampled_from(VALUES), st.binary(max_size=12)),
            st.integers(0, 3),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_damaged_attributes_give_voxels_or_a_sentence(
    make: Callable[[Path], None], changes: list[tuple[str, bytes | None, int]]
) -> None:
    with TemporaryDirectory() as folder:
        make(Path(folder))
        paths = sorted(Path(folder).iterdir())
        for keyword, value, place in changes:
            damage(paths[place % len(paths)], keyword, value, place)
        for seen in look_at(paths):
            assert np.isfinite(seen.array).all()
