"""Files read as far as their pixels, and folders searched for them."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread

from node.dicom.assembly import assemble_volumes
from node.dicom.header import read_header, scan_folder
from node.dicom.pixels import read_input
from node.dicom.selection import select_input
from node.errors import InputRefused
from node.infer.manifest import Input
from tests.dicom.slices import PATIENT, write_series


def test_header_is_all_but_the_pixels(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path, np.zeros((1, 8, 8), np.int16))
    header, whole = read_header(path), dcmread(path)
    assert "PixelData" not in header
    del whole.PixelData
    assert header == whole


def test_folder_is_searched_for_instances_and_nothing_else(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "b" / "deep", np.zeros((2, 4, 4), np.int16))
    paths += write_series(tmp_path / "a", np.zeros((2, 4, 4), np.int16))
    bare = dcmread(paths[0])
    bare.preamble = None
    del bare.file_meta
    bare.save_as(tmp_path / "bare", implicit_vr=True, little_endian=True)
    others = {
        "DICOMDIR": paths[0].read_bytes(),
        "short": b"DICM",
        "empty": b"",
        "text.txt": b"0" * 500,
        "like one": b"\x08\x00" + b"\xff" * 500,
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "loop").symlink_to(tmp_path)
    scan = scan_folder(tmp_path)
    assert set(scan.files) == {*paths, tmp_path / "bare"}
    assert {path.name for path in scan.skipped} == set(others)
    assert scan == scan_folder(tmp_path)
    assert scan_folder(paths[0]).files == (paths[0],)
    assert scan_folder(tmp_path / "text.txt").files == ()


def test_file_that_cannot_be_read_is_named_without_its_folder(tmp_path: Path) -> None:
    """A folder is often called after its patient."""
    with pytest.raises(InputRefused) as refusal:
        read_header(tmp_path / "NEMO_SECRET" / "absent.dcm")
    assert str(refusal.value) == "absent.dcm cannot be read: No such file or directory"


def test_element_that_cannot_be_read_is_absent(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path, np.zeros((1, 8, 8), np.int16))
    content = path.read_bytes()
    assert content.count(b"\x18\x00\x50\x00DS") == 1
    path.write_bytes(content.replace(b"\x18\x00\x50\x00DS", b"\x18\x00\x50\x00D\x00"))  # no VR at all
    with pytest.raises(NotImplementedError):
        _ = dcmread(path).SliceThickness
    header = read_header(path)
    assert "SliceThickness" not in header
    assert header.Rows == 8


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, over elements of no known VR
@given(
    cut=st.integers(0, 1400),
    damage=st.dictionaries(st.integers(132, 1250), st.integers(0, 255), max_size=6),
)
@settings(max_examples=150, deadline=None)
def test_damaged_file_is_a_header_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, cut: int, damage: dict[int, int]
) -> None:
    """Whatever bytes a sender sends: no other exception, here or where volumes are made and chosen of it."""
    paths = write_series(tmp_path_factory.mktemp("series"), np.zeros((3, 8, 8), np.int16))
    content = bytearray(paths[1].read_bytes())
    for at, value in damage.items():
        content[min(at, len(content) - 1)] = value
    paths[1].write_bytes(content[:cut] if cut < 1200 else content)
    headers = {}
    for path in paths:
        try:
            headers[path] = read_header(path)
        except InputRefused as error:
            sentence = str(error)  # names the file, quotes nothing of it
            assert sentence.startswith("001.dcm is damaged: ")
    assembly = assemble_volumes(headers)
    with contextlib.suppress(InputRefused):
        read_input(select_input(assembly, Input.model_validate({"when": {"Modality": "CT"}})).plan)
    assert not any(text in refusal.sentence for refusal in assembly.refusals for text in PATIENT.values())


def test_values_beyond_their_length_are_no_reason_to_warn(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path, np.zeros((1, 8, 8), np.int16))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"PN" + len(PATIENT["PatientName"]).to_bytes(2, "little"), b"LO\x0c\x00", 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for element in read_header(path):
            _ = element.value


def test_voxels_are_the_same_with_and_without_the_place_of_the_pixels(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(-1000, 1000, (3, 8, 9), np.int16)
    paths = write_series(tmp_path, array)
    headers = {path: read_header(path) for path in paths}
    plan = select_input(assemble_volumes(headers), Input()).plan
    for path, header in headers.items():
        assert header.pixel_place[0] == path
    found = read_input(plan).array
    for header in headers.values():
        header.pixel_place = None
    assert np.array_equal(read_input(plan).array, found)


def test_a_header_that_lacks_what_cannot_be_read_does_not_stand_for_its_file(tmp_path: Path) -> None:
    """Its rescale would be missing without a word: the file is read again, and refused."""
    paths = write_series(tmp_path, np.zeros((3, 8, 8), np.int16), RescaleSlope="1.00")
    for path in paths:
        path.write_bytes(path.read_bytes().replace(b"DS\x04\x001.00", b"FD\x04\x001.00"))
    headers = {path: read_header(path) for path in paths}
    assert all(header.pixel_place is None and "RescaleSlope" not in header for header in headers.values())
    plan = select_input(assemble_volumes(headers), Input()).plan
    with pytest.raises(InputRefused, match="RescaleSlope"):
        read_input(plan)
