"""The header scan against pydicom: the same identity from the same bytes, however they are cut; and hostile bytes."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from node.dicom.header_scan import HeaderScan
from node.dicom.identity import Identity, read_identity
from node.errors import InstanceRefused

DEFLATED = "1.2.840.10008.1.2.1.99"
NATIVE = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian]

uids = st.lists(st.integers(0, 10**9).map(str), min_size=2, max_size=6).map(lambda parts: "1.2." + ".".join(parts))
texts = st.text(st.characters(codec="latin-1", exclude_characters="\\", min_codepoint=32), max_size=40)


def encode(dataset: Dataset, transfer_syntax: str) -> bytes:
    """The bytes of a data set as they travel in a C-STORE."""
    stream = DicomBytesIO()
    stream.is_little_endian = transfer_syntax != ExplicitVRBigEndian
    stream.is_implicit_VR = transfer_syntax == ImplicitVRLittleEndian
    write_dataset(stream, dataset)
    if transfer_syntax == DEFLATED:
        compressor = zlib.compressobj(wbits=-15)
        return compressor.compress(stream.getvalue()) + compressor.flush()
    return stream.getvalue()


def scan(
    encoded: bytes, transfer_syntax: str, cuts: list[int] | None = None, maximum_inflated_bytes: int = 1 << 24
) -> Identity:
    """Feed `encoded` in pieces of the given lengths, over and over."""
    reader = HeaderScan(transfer_syntax, maximum_inflated_bytes=maximum_inflated_bytes)
    position, turn = 0, 0
    while position < len(encoded):
        size = cuts[turn % len(cuts)] if cuts else len(encoded)
        reader.feed(memoryview(encoded)[position : position + size])
        position, turn = position + size, turn + 1
    return reader.identity()


def minimal() -> Dataset:
    """A data set that has the four UIDs and nothing more."""
    dataset = Dataset()
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.SOPInstanceUID = "1.2.3.4"
    dataset.StudyInstanceUID = "1.2.3"
    dataset.SeriesInstanceUID = "1.2.3.1"
    return dataset


@st.composite
def datasets(draw: st.DrawFn) -> Dataset:
    """Data sets with sequences of defined and undefined length, private and large elements in front of the UIDs."""
    dataset = minimal()
    dataset.SpecificCharacterSet = draw(st.sampled_from(["ISO_IR 100", "ISO_IR 192"]))
    dataset.SOPInstanceUID = draw(uids)
    dataset.StudyInstanceUID = draw(uids)
    dataset.SeriesInstanceUID = draw(uids)
    dataset.PatientID = draw(texts)
    dataset.StudyDescription = draw(texts)
    dataset.Modality = draw(st.sampled_from(["CT", "MR", ""]))
    if draw(st.booleans()):
        dataset.AccessionNumber = draw(st.text("0123456789ABC", max_size=16))
    if draw(st.booleans()):
        dataset.add_new(0x00091001, "UN", draw(st.binary(max_size=500).filter(lambda value: len(value) % 2 == 0)))
    dataset.ReferencedStudySequence = _sequence(draw, 3)
    dataset["ReferencedStudySequence"].is_undefined_length = draw(st.booleans())
    dataset.PixelData = b"\0" * 64
    dataset["PixelData"].VR = "OW"
    return dataset


def _sequence(draw: st.DrawFn, depth: int) -> Sequence:
    items = []
    for _ in range(draw(st.integers(0, 2)) if depth else 0):
        item = Dataset()
        item.ReferencedSOPInstanceUID = draw(uids)
        item.PatientID = "not the patient of the object"
        item.StudyInstanceUID = "9.9.9"
        item.ReferencedSeriesSequence = _sequence(draw, depth - 1)
        item["ReferencedSeriesSequence"].is_undefined_length = draw(st.booleans())
        item.is_undefined_length_sequence_item = draw(st.booleans())
        items.append(item)
    return Sequence(items)


@settings(max_examples=150, deadline=None)
@given(datasets(), st.sampled_from([*NATIVE, DEFLATED]), st.lists(st.integers(1, 700), min_size=1, max_size=5))
def test_reads_what_pydicom_reads(dataset: Dataset, transfer_syntax: str, cuts: list[int]) -> None:
    encoded = encode(dataset, transfer_syntax)
    assert scan(encoded, transfer_syntax, cuts) == read_identity(dataset, transfer_syntax)


@settings(max_examples=300, deadline=None)
@given(datasets(), st.sampled_from([*NATIVE, DEFLATED]), st.data())
def test_damaged_bytes_are_refused_or_read_never_worse(
    dataset: Dataset, transfer_syntax: str, data: st.DataObject
) -> None:
    encoded = bytearray(encode(dataset, transfer_syntax))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        identity = scan(bytes(encoded[: data.draw(st.integers(0, len(encoded)))]), transfer_syntax, [97])
    except InstanceRefused:
        return
    assert identity.study_uid


def test_real_files_read_like_pydicom(shared_data: Path) -> None:
    files = sorted(path for path in shared_data.rglob("*") if path.is_file() and _is_part_10(path))[::7]
    assert len(files) > 50
    for path in files:
        header = dcmread(path, stop_before_pixels=True)
        transfer_syntax = str(header.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian))
        encoded = path.read_bytes()[header.file_meta.FileMetaInformationGroupLength + 144 :]
        try:
            expected = read_identity(header, transfer_syntax)
        except ValueError:  # some of the de-identified files carry hexadecimal UIDs
            with pytest.raises(InstanceRefused):
                scan(encoded, transfer_syntax, [4096])
            continue
        assert scan(encoded, transfer_syntax, [4096]) == expected, path


def _is_part_10(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(144)
    return start[128:132] == b"DICM" and start[132:136] == b"\x02\0\0\0"


@pytest.mark.parametrize("transfer_syntax", NATIVE)
@pytest.mark.parametrize("uid", ["../../etc", "1.2.3\n", "1.2.3\x1b", "1." * 150 + "1", "1..2", "1.02", "", "1.2\\1.3"])
def test_what_is_no_uid_is_refused(transfer_syntax: str, uid: str) -> None:
    dataset = minimal()
    del dataset.SOPInstanceUID
    encoded = bytearray(encode(dataset, transfer_syntax))
    value = uid.encode() + b"\0" * (len(uid) % 2)
    order = ">" if transfer_syntax == ExplicitVRBigEndian else "<"
    if transfer_syntax == ImplicitVRLittleEndian:
        element = struct.pack("<HHL", 0x0008, 0x0018, len(value)) + value
    else:
        element = struct.pack(f"{order}HH2sH", 0x0008, 0x0018, b"UI", len(value)) + value
    alone = Dataset()
    alone.SOPClassUID = dataset.SOPClassUID
    first = encode(alone, transfer_syntax)
    encoded[len(first) : len(first)] = element
    with pytest.raises(InstanceRefused, match="SOP Instance UID"):
        scan(bytes(encoded), transfer_syntax)


def test_deflate_bomb_costs_no_memory() -> None:
    compressor = zlib.compressobj(wbits=-15)
    bomb = compressor.compress(encode(minimal(), ExplicitVRLittleEndian))
    bomb += b"".join(compressor.compress(bytes(1 << 20)) for _ in range(256)) + compressor.flush()
    assert len(bomb) < 300_000
    tracemalloc.start()
    with pytest.raises(InstanceRefused, match="inflates to more than"):
        scan(bomb, DEFLATED, [65536], maximum_inflated_bytes=1 << 26)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_nested_sequences_end_in_a_refusal() -> None:
    level = struct.pack("<HH2sHL", 0x0008, 0x1110, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    with pytest.raises(InstanceRefused, match="nested deeper"):
        scan(level * 5000, ExplicitVRLittleEndian, [1000])


def test_endless_headers_end_in_a_refusal() -> None:
    element = struct.pack("<HHL", 0x0009, 0x1001, 0)
    with pytest.raises(InstanceRefused, match="no series UID"):
        scan(element * 200_000, ImplicitVRLittleEndian, [65536])


def test_large_private_element_in_front_is_skipped_not_kept() -> None:
    dataset = minimal()
    dataset.add_new(0x00091001, "OB", bytes(32 << 20))
    encoded = BytesIO(encode(dataset, ExplicitVRLittleEndian))
    reader = HeaderScan(ExplicitVRLittleEndian, maximum_inflated_bytes=0)
    tracemalloc.start()
    while piece := encoded.read(65536):
        reader.feed(piece)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert reader.identity().series_uid == "1.2.3.1"
