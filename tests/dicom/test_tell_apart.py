"""Several volumes in one series: told apart by what differs, named by it, and never mixed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import MRImageStorage

from node.dicom.assembly import Assembly, assemble_volumes
from node.dicom.header import read_header, scan_folder
from node.dicom.pixels import read_volume
from tests.dicom.multiframe import write_multiframe
from tests.dicom.slices import write_series

SERIES: dict[str, Any] = {"SeriesInstanceUID": "1.2.3.4", "StudyInstanceUID": "1.2.3"}
SLICES = 5


def assemble(folder: Path, shuffle: int = 0) -> Assembly:
    headers = [(path, read_header(path)) for path in scan_folder(folder).files]
    random.Random(shuffle).shuffle(headers)
    return assemble_volumes(dict(headers))


def block(value: int, slices: int = SLICES) -> np.ndarray:
    return np.full((slices, 4, 4), value, np.int16)


def times(count: int, first: int = 0) -> list[str]:
    return [f"{120000 + first + number:06d}" for number in range(count)]


def change(paths: Sequence[Path], keyword: str, values: Sequence[Any]) -> None:
    for path, value in zip(paths, values, strict=True):
        dataset = dcmread(path)
        setattr(dataset, keyword, value)
        dataset.save_as(path)


# What the volumes of a series differ in, in the order of the volumes, and their names.
CLASSIC: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "echoes": ([{"EchoTime": "5"}, {"EchoTime": "10"}, {"EchoTime": "100"}], ["echo 1", "echo 2", "echo 3"]),
    "echo numbers": ([{"EchoNumbers": "1"}, {"EchoNumbers": "2"}], ["echo 1", "echo 2"]),
    "cardiac phases": (
        [{"NominalPercentageOfCardiacPhase": 5.0}, {"NominalPercentageOfCardiacPhase": 70.0}],
        ["phase 5 %", "phase 70 %"],
    ),
    "time": ([{"TemporalPositionIdentifier": str(number)} for number in (1, 2, 10)], ["time 1", "time 2", "time 3"]),
    "b-values": ([{"DiffusionBValue": 0.0}, {"DiffusionBValue": 1000.0}], ["b 0", "b 1000"]),
    "kernels": (
        [{"ConvolutionKernel": "B40f"}, {"ConvolutionKernel": ["I70f", "3"]}],
        ["kernel B40f", "kernel I70f 3"],
    ),
    "magnitude and phase": (
        [{"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"]}, {"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}],
        ["M", "P"],
    ),
    "maps": (
        [{"ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", kind]} for kind in ("ADC", "FA", "TRACEW")],
        ["ADC", "FA", "TRACEW"],
    ),
    "acquisitions": ([{"AcquisitionNumber": "2"}, {"AcquisitionNumber": "3"}], ["acquisition 2", "acquisition 3"]),
    "tube voltages": ([{"KVP": "80"}, {"KVP": "140"}], ["80 kV", "140 kV"]),
    "inversions": ([{"InversionTime": "100"}, {"InversionTime": "900"}], ["inversion 100 ms", "inversion 900 ms"]),
    # Of attributes that differ alike, the one that says what the image is names it.
    "echoes with acquisitions": (
        [{"EchoTime": "5", "AcquisitionNumber": "2"}, {"EchoTime": "10", "AcquisitionNumber": "1"}],
        ["echo 1", "echo 2"],
    ),
    "echoes of magnitude and phase": (
        [{"EchoTime": echo, "ImageType": ["ORIGINAL", "PRIMARY", kind]} for kind in ("M", "P") for echo in ("5", "10")],
        ["M echo 1", "M echo 2", "P echo 1", "P echo 2"],
    ),
    "a value and none": ([{}, {"DiffusionBValue": 1000.0}], ["volume 1", "volume 2 b 1000"]),
    "directions": (
        [
            {"DiffusionBValue": b, "DiffusionGradientOrientation": direction}
            for b in (1000.0, 2000.0)
            for direction in ([0.0, 0.6, 0.8], [1.0, 0.0, 0.0])
        ]
        + [{"DiffusionBValue": 0.0}],
        ["b 1000 direction 1", "b 1000 direction 2", "b 2000 direction 3", "b 2000 direction 4", "b 0"],
    ),
}


@pytest.mark.parametrize("what", CLASSIC)
def test_volumes_of_single_frames(tmp_path: Path, what: str) -> None:
    differences, names = CLASSIC[what]
    for number, values in enumerate(differences):
        write_series(tmp_path / str(number), block(number), **{**SERIES, **values})
    assembly = assemble(tmp_path)
    assert not assembly.refusals
    assert [plan.name for plan in assembly.volumes] == names
    for number, plan in enumerate(assembly.volumes):
        assert plan.grid.shape == (SLICES, 4, 4)
        assert {path.parent.name for path in plan.paths} == {str(number)}
        for keyword, value in differences[number].items():
            assert plan.header[keyword].value == element_value(keyword, value)
    for shuffle in range(1, 4):
        again = assemble(tmp_path, shuffle)
        assert [(plan.name, plan.paths) for plan in again.volumes] == [
            (plan.name, plan.paths) for plan in assembly.volumes
        ]


def element_value(keyword: str, value: Any) -> Any:
    dataset = Dataset()
    setattr(dataset, keyword, value)
    return dataset[keyword].value


def test_alike_differences_without_repeated_places_tell_nothing_apart(tmp_path: Path) -> None:
    """A scan in steps has an acquisition for every few slices, and is one volume all the same."""
    paths = write_series(tmp_path, block(0, 10))
    change(paths, "AcquisitionNumber", [index // 2 for index in range(10)])
    (plan,) = assemble(tmp_path).volumes
    assert (plan.grid.shape[0], plan.name) == (10, "")


def test_phases_whose_trigger_times_differ_from_slice_to_slice(tmp_path: Path) -> None:
    """A cine of a heart whose beats differ: the n-th trigger time of each slice is the n-th phase."""
    for phase in range(3):
        paths = write_series(tmp_path / str(phase), block(phase), **SERIES)
        change(paths, "TriggerTime", [f"{phase * (40 + 9 * index):.1f}" for index in range(SLICES)])
    volumes = assemble(tmp_path).volumes
    assert [plan.name for plan in volumes] == ["phase 1", "phase 2", "phase 3"]
    for phase, plan in enumerate(volumes):
        assert (read_volume(plan).array == phase).all()


@pytest.mark.parametrize("keyword", ["AcquisitionTime", "ContentTime"])
def test_repetitions_known_by_their_times_alone(tmp_path: Path, keyword: str) -> None:
    for number in range(3):
        paths = write_series(tmp_path / str(number), block(number), **SERIES)
        change(paths, keyword, times(SLICES, number * SLICES)[:: -1 if number == 1 else 1])
    volumes = assemble(tmp_path).volumes
    assert [plan.name for plan in volumes] == ["time 1", "time 2", "time 3"]
    for number, plan in enumerate(volumes):
        assert (read_volume(plan).array == number).all()


def test_times_that_overlap_tell_nothing_apart(tmp_path: Path) -> None:
    """Two breath-holds whose slices were made in turn cannot be known by their order."""
    for number in range(2):
        paths = write_series(tmp_path / str(number), block(number), **SERIES)
        change(paths, "ContentTime", times(SLICES, 2 * number))
    assembly = assemble(tmp_path)
    assert not assembly.volumes
    (refusal,) = assembly.refusals
    assert refusal.sentence.startswith("5 of 10 slices lie where another one lies, and no attribute tells them apart")
    assert len(refusal.sop_instance_uids) == 10


def test_a_stopped_repetition_is_refused_and_the_others_stay(tmp_path: Path) -> None:
    for number in range(4):
        paths = write_series(
            tmp_path / str(number), block(number), TemporalPositionIdentifier=str(number + 1), **SERIES
        )
        if number == 3:
            paths[-1].unlink()
    assembly = assemble(tmp_path)
    assert [plan.name for plan in assembly.volumes] == ["time 1", "time 2", "time 3"]
    (refusal,) = assembly.refusals
    assert refusal.sentence == "it has 4 of the 5 slices that the series' other volumes have"
    assert len(refusal.sop_instance_uids) == 4


def test_two_acquisitions_of_different_extents(tmp_path: Path) -> None:
    write_series(tmp_path / "a", block(0, 8), AcquisitionNumber="1", **SERIES)
    write_series(tmp_path / "b", block(1, 5), AcquisitionNumber="2", **SERIES)
    assert [(plan.name, plan.grid.shape[0]) for plan in assemble(tmp_path).volumes] == [
        ("acquisition 1", 8),
        ("acquisition 2", 5),
    ]


def test_a_gap_in_one_of_two_acquisitions_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "a", block(0, 8), AcquisitionNumber="1", **SERIES)
    write_series(tmp_path / "b", block(1, 8), AcquisitionNumber="2", **SERIES)[3].unlink()
    assembly = assemble(tmp_path)
    assert [plan.name for plan in assembly.volumes] == ["acquisition 1"]
    assert assembly.refusals[0].sentence.startswith("a slice is missing: 4.00 mm between slices 3 and 4 of 7")


def test_two_breath_holds_between_each_other(tmp_path: Path) -> None:
    """No place is taken twice, but together the slices stand unevenly: two volumes, not one of both."""
    write_series(tmp_path / "a", block(0, 8), AcquisitionNumber="1", **SERIES)
    write_series(tmp_path / "b", block(1, 8), AcquisitionNumber="2", origin_mm=(-10, -20, 30.7), **SERIES)
    volumes = assemble(tmp_path).volumes
    assert [plan.name for plan in volumes] == ["acquisition 1", "acquisition 2"]
    assert all(plan.positions_lps is None for plan in volumes)


def test_two_reconstructions_of_different_pixels(tmp_path: Path) -> None:
    write_series(tmp_path / "a", block(0), spacing_mm=(2, 0.5, 0.5), **SERIES)
    write_series(tmp_path / "b", block(1), spacing_mm=(2, 1, 1), **SERIES)
    assert [(plan.name, plan.grid.spacing_mm[1]) for plan in assemble(tmp_path).volumes] == [
        ("pixels of 0.5 0.5 mm", 0.5),
        ("pixels of 1.0 1.0 mm", 1.0),
    ]


PRIVATE: dict[str, Callable[[Dataset, float], object]] = {
    "siemens": lambda header, b: header.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(
        0x0C, "IS", str(int(b))
    ),
    "philips": lambda header, b: header.private_block(0x2001, "Philips Imaging DD 001", create=True).add_new(
        0x03, "FL", b
    ),
    "ge": lambda header, b: header.private_block(0x0043, "GEMS_PARM_01", create=True).add_new(
        0x39, "IS", [str(int(b) + 10**9), "8", "0", "0"]
    ),
}


@pytest.mark.parametrize("maker", PRIVATE)
def test_b_values_of_the_makers(tmp_path: Path, maker: str) -> None:
    for b in (0.0, 800.0):
        for path in write_series(tmp_path / str(b), block(int(b)), **SERIES):
            dataset = dcmread(path)
            PRIVATE[maker](dataset, b)
            dataset.save_as(path)
    volumes = assemble(tmp_path).volumes
    assert [plan.name for plan in volumes] == ["b 0", "b 800"]
    assert [int(read_volume(plan).array.max()) for plan in volumes] == [0, 800]


# -- Enhanced objects ----------------------------------------------------------------------------------------------

ENHANCED: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "one volume": ([{}], [""]),
    "echoes": ([{"EffectiveEchoTime": 5.0}, {"EffectiveEchoTime": 12.5}], ["echo 1", "echo 2"]),
    "b-values": (
        [{"DiffusionBValue": 0.0, "DiffusionDirectionality": "NONE"}]
        + [
            {"DiffusionBValue": 1000.0, "DiffusionDirectionality": "DIRECTIONAL", "DiffusionGradientOrientation": each}
            for each in ([0.0, 0.6, 0.8], [1.0, 0.0, 0.0])
        ],
        ["b 0", "b 1000 direction 1", "b 1000 direction 2"],
    ),
    "time": ([{"TemporalPositionIndex": number} for number in (1, 2, 3)], ["time 1", "time 2", "time 3"]),
    "phases": (
        [{"NominalPercentageOfCardiacPhase": value} for value in (0.0, 50.0)],
        ["phase 0 %", "phase 50 %"],
    ),
    "stacks": ([{"StackID": "1"}, {"StackID": "2"}], ["stack 1", "stack 2"]),
    "components": (
        [{"ComplexImageComponent": "MAGNITUDE"}, {"ComplexImageComponent": "PHASE"}],
        ["magnitude", "phase"],
    ),
    "types": (
        [{"FrameType": ["ORIGINAL", "PRIMARY", "M", "NONE"]}, {"FrameType": ["DERIVED", "PRIMARY", "T2 MAP", "NONE"]}],
        ["DERIVED T2 MAP", "ORIGINAL M"],
    ),
    "acquisitions": (
        [{"FrameAcquisitionNumber": 1}, {"FrameAcquisitionNumber": 2}],
        ["acquisition 1", "acquisition 2"],
    ),
}  # fmt: skip


@given(shuffle=st.integers(0, 2**32 - 1), what=st.sampled_from(sorted(ENHANCED)))
@settings(max_examples=40, deadline=None)
def test_volumes_of_frames_in_any_order(tmp_path_factory: pytest.TempPathFactory, shuffle: int, what: str) -> None:
    differences, names = ENHANCED[what]
    frames = [
        ({"ImagePositionPatient": ["0", "0", f"{3 * index}"], **values}, 10 * number + index)
        for number, values in enumerate(differences)
        for index in range(SLICES)
    ]
    random.Random(shuffle).shuffle(frames)
    array = np.array([np.full((4, 4), value, np.int16) for _, value in frames])
    folder = tmp_path_factory.mktemp("enhanced")
    write_multiframe(folder / "all.dcm", array, [frame for frame, _ in frames])
    assembly = assemble(folder)
    assert not assembly.refusals
    assert sorted(plan.name for plan in assembly.volumes) == sorted(names)
    found = []
    for plan in assembly.volumes:
        assert plan.grid.spacing_mm == pytest.approx((3, 1, 1))
        assert len(plan.headers) == 1
        assert [frames[(ref.frame or 0) - 1][1] % 10 for ref in plan.slices] == list(range(SLICES))
        values = read_volume(plan).array[:, 0, 0]
        assert np.array_equal(np.diff(values), np.ones(SLICES - 1))  # of one volume, in its order
        found.append(int(values[0]) // 10)
    assert sorted(found) == list(range(len(names)))


def test_dimensions_that_only_the_object_knows(tmp_path: Path) -> None:
    frames = [
        {"ImagePositionPatient": ["0", "0", f"{index}"], "DimensionIndexValues": [index + 1, number]}
        for number in (1, 2)
        for index in range(SLICES)
    ]
    write_multiframe(
        tmp_path / "all.dcm",
        np.zeros((len(frames), 4, 4), np.int16),
        frames,
        dimensions=["InStackPositionNumber", "MRVelocityEncodingSequence"],
    )
    assert [plan.name for plan in assemble(tmp_path).volumes] == [
        "mr velocity encoding sequence 1",
        "mr velocity encoding sequence 2",
    ]


def test_an_object_for_each_volume(tmp_path: Path) -> None:
    frames = [{"ImagePositionPatient": ["0", "0", f"{index}"]} for index in range(SLICES)]
    for number in (10, 9):
        write_multiframe(tmp_path / f"{number}.dcm", block(number), frames, InstanceNumber=number)
    volumes = assemble(tmp_path).volumes
    assert [plan.name for plan in volumes] == ["object 1", "object 2"]
    assert [int(read_volume(plan).array.max()) for plan in volumes] == [9, 10]


def test_frames_that_nothing_tells_apart_are_refused_by_number(tmp_path: Path) -> None:
    frames = [{"ImagePositionPatient": ["0", "0", f"{index % SLICES}"]} for index in range(2 * SLICES)]
    path = write_multiframe(tmp_path / "all.dcm", np.zeros((10, 4, 4), np.int16), frames)
    (refusal,) = assemble(tmp_path).refusals
    uid = read_header(path).SOPInstanceUID
    assert refusal.sentence == (
        "5 of 10 slices lie where another one lies, and no attribute tells them apart: at 0.00 mm along the normal "
        f"{uid} frame 1, {uid} frame 6"
    )
    assert refusal.sop_instance_uids == (uid,)


def test_stacks_of_other_orientations_are_named_by_their_stacks(tmp_path: Path) -> None:
    sagittal = {"ImageOrientationPatient": ["0", "1", "0", "0", "0", "-1"]}
    frames = [{"ImagePositionPatient": ["0", "0", f"{index}"], "StackID": "axial"} for index in range(3)]
    frames += [{"ImagePositionPatient": [f"{index}", "0", "0"], "StackID": "2", **sagittal} for index in range(4)]
    write_multiframe(tmp_path / "all.dcm", np.zeros((7, 4, 4), np.int16), frames)
    assert [(plan.name, plan.grid.shape[0]) for plan in assemble(tmp_path).volumes] == [
        ("stack axial", 3),
        ("stack 2", 4),
    ]


def test_conditions_see_the_frames_own_attributes(tmp_path: Path) -> None:
    frames = [
        {"ImagePositionPatient": ["0", "0", f"{index}"], "EffectiveEchoTime": echo, "RescaleSlope": "2"}
        for echo in (5.0, 80.0)
        for index in range(SLICES)
    ]
    write_multiframe(tmp_path / "all.dcm", np.zeros((10, 4, 4), np.int16), frames)
    first, second = assemble(tmp_path).volumes
    assert (first.header.EchoTime, second.header.EchoTime, second.header.RescaleSlope) == (5, 80, 2)
    assert "PerFrameFunctionalGroupsSequence" in first.headers[0]
    assert "PerFrameFunctionalGroupsSequence" not in first.header


def test_more_orientations_than_any_acquisition_has_are_refused_together(tmp_path: Path) -> None:
    def header(index: int) -> Dataset:
        angle = index * np.pi / 400
        dataset = Dataset()
        dataset.SOPClassUID, dataset.SOPInstanceUID = MRImageStorage, f"1.2.{index + 1}"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2", "1.3"
        dataset.Rows = dataset.Columns = 4
        dataset.PixelSpacing, dataset.ImagePositionPatient = [1, 1], [0, 0, index]
        dataset.ImageOrientationPatient = [float(f"{value:.8f}") for value in (np.cos(angle), np.sin(angle), 0)] + [
            0, 0, 1,
        ]  # fmt: skip
        return dataset

    assembly = assemble_volumes({Path(str(index)): header(index) for index in range(300)})
    (refusal,) = assembly.refusals
    assert refusal.sentence == "its slices have more than 256 orientations or sizes"
    assert len(refusal.sop_instance_uids) == 300
    assert len(assemble_volumes({Path(str(index)): header(index) for index in range(200)}).refusals) == 1
