"""Cine MR of one place: an image of frames in the order of time, and never what could be a volume."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import MRImageStorage

from node.dicom.assembly import Assembly, ImagePlan, assemble_volumes
from node.dicom.header import read_header, scan_folder
from node.dicom.pixels import read_image
from node.dicom.selection import select_input
from node.errors import InputRefused
from node.infer.manifest import Input
from tests.dicom.multiframe import write_multiframe
from tests.dicom.slices import write_series

FRAMES = 7
LONG_AXES = {  # row and column directions
    "2ch": ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0)),
    "3ch": ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0)),
    "4ch": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
}


def assemble(folder: Path, shuffle: int = 0) -> Assembly:
    headers = [(path, read_header(path)) for path in scan_folder(folder).files]
    random.Random(shuffle).shuffle(headers)
    return assemble_volumes(dict(headers))


def block(first: int, frames: int = FRAMES) -> np.ndarray:
    return np.broadcast_to(np.arange(first, first + frames, dtype=np.int16)[:, None, None], (frames, 4, 6))


def write_cine(folder: Path, first: int = 0, frames: int = FRAMES, **values: Any) -> list[Path]:
    """Single frames at one place, each of one value; the sender numbered them anyhow."""
    paths = write_series(
        folder, block(first, frames),
        **{
            "SOPClassUID": MRImageStorage, "Modality": "MR", "SeriesInstanceUID": "1.2.3.4",
            "StudyInstanceUID": "1.2.3", "ImagePositionPatient": ["1", "2", "3"], **values,
        },
    )  # fmt: skip
    change(paths, "TriggerTime", [f"{31.5 * frame:.1f}" for frame in range(frames)])
    return paths


def change(paths: list[Path], keyword: str, values: list[Any]) -> None:
    for path, value in zip(paths, values, strict=True):
        dataset = dcmread(path)
        setattr(dataset, keyword, value)
        dataset.save_as(path)


def seen(plan: ImagePlan) -> list[float]:
    """The value of each frame, in the image's order."""
    array = read_image(plan).array
    assert array.shape == (len(plan.frames), 4, 6)
    return [float(frame[0, 0]) for frame in array]


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("TriggerTime", [f"{31.5 * frame:.1f}" for frame in range(FRAMES)]),
        ("TemporalPositionIdentifier", list(range(5, 5 + FRAMES))),
        ("AcquisitionTime", [f"12000{frame}.5" for frame in range(FRAMES)]),
    ],
)
def test_single_frames_of_one_place_are_an_image_in_the_order_of_time(
    tmp_path: Path, keyword: str, values: list[Any]
) -> None:
    paths = write_cine(tmp_path)
    change(paths, "TriggerTime", ["0"] * FRAMES)
    change(paths, keyword, values)
    for shuffle in range(3):
        assembly = assemble(tmp_path, shuffle)
        (plan,) = assembly.images
        assert not assembly.refusals
        assert not assembly.volumes
        assert plan.paths == tuple(paths)
        assert seen(plan) == list(range(FRAMES))
    (plan,) = assemble(tmp_path).images
    image = read_image(plan)
    assert image.spacing_mm == (1.0, 1.0)
    assert [str(header.SOPInstanceUID) for header in plan.headers] == [ref.sop_instance_uid for ref in image.frames]
    assert [ref.frame for ref in image.frames] == [None] * FRAMES


def test_views_of_one_series_are_candidates_each(tmp_path: Path) -> None:
    for number, (view, (row, column)) in enumerate(LONG_AXES.items()):
        write_cine(tmp_path / view, 10 * number, row=row, column=column)
    images = assemble(tmp_path).images
    assert [plan.name for plan in images] == ["image 1", "image 2", "image 3"]
    assert sorted(seen(plan) for plan in images) == [
        list(range(10 * number, 10 * number + FRAMES)) for number in range(3)
    ]
    choice = select_input(assemble(tmp_path), Input(kind="image"))
    assert isinstance(choice.plan, ImagePlan)
    # The worker has the instances of the chosen one alone.
    (again,) = assemble_volumes({path: read_header(path) for path in choice.plan.paths}).images
    assert again.frames == choice.plan.frames


def test_parallel_places_that_make_no_volume_are_candidates_each(tmp_path: Path) -> None:
    """Uneven, and of different numbers of frames: no volume whichever way."""
    for height, frames in ((0, 5), (8, 6), (40, 7)):
        write_cine(tmp_path / str(height), height, frames, ImagePositionPatient=["0", "0", str(height)])
    assembly = assemble(tmp_path)
    assert not assembly.volumes
    assert not assembly.refusals
    assert sorted(seen(plan)[0] for plan in assembly.images) == [0, 8, 40]


def test_a_gap_between_places_leaves_cines(tmp_path: Path) -> None:
    for height in (0, 8, 40):
        write_cine(tmp_path / str(height), height, ImagePositionPatient=["0", "0", str(height)])
    assembly = assemble(tmp_path)
    assert (len(assembly.volumes), len(assembly.refusals), len(assembly.images)) == (0, 0, 3)


def test_a_stack_of_cines_stays_a_volume_for_each_phase(tmp_path: Path) -> None:
    for height in (0, 8, 16):
        write_cine(tmp_path / str(height), ImagePositionPatient=["0", "0", str(height)])
    assembly = assemble(tmp_path)
    assert [plan.name for plan in assembly.volumes] == [f"phase {phase}" for phase in range(1, FRAMES + 1)]
    assert not assembly.images


def test_slices_that_are_left_of_volumes_are_no_cine(tmp_path: Path) -> None:
    for height in (0, 8, 16):
        frames = FRAMES - (height == 8)
        write_cine(tmp_path / str(height), 0, frames, ImagePositionPatient=["0", "0", str(height)])
    assembly = assemble(tmp_path)
    assert len(assembly.volumes) == FRAMES - 1
    assert not assembly.images
    (refusal,) = assembly.refusals
    assert refusal.sentence == "it has 2 of the 3 slices that the series' other volumes have"


def test_magnitude_and_velocity_are_a_cine_each(tmp_path: Path) -> None:
    for number, kind in enumerate("MP"):
        write_cine(tmp_path / kind, 10 * number, ImageType=["ORIGINAL", "PRIMARY", kind])
    images = assemble(tmp_path).images
    assert sorted(seen(plan)[0] for plan in images) == [0, 10]


def test_frames_of_one_object_are_a_cine(tmp_path: Path) -> None:
    frames = [
        {"ImagePositionPatient": ["0", "0", "0"], "TemporalPositionIndex": FRAMES - index} for index in range(FRAMES)
    ]
    write_multiframe(tmp_path / "object.dcm", block(0), frames)
    (plan,) = assemble(tmp_path).images
    assert [ref.frame for ref in plan.frames] == list(range(FRAMES, 0, -1))
    assert seen(plan) == list(range(FRAMES - 1, -1, -1))


@pytest.mark.parametrize(
    ("frames", "values"),
    [
        (FRAMES, {"TriggerTime": ["0"] * FRAMES}),  # nothing says when
        (FRAMES, {"InversionTime": [100 * frame for frame in range(FRAMES)]}),  # a relaxation map's images
        (FRAMES, {"EchoTime": [2 * frame for frame in range(FRAMES)]}),
        (FRAMES, {"TriggerTime": ["0", "0", *(str(40 * frame) for frame in range(1, FRAMES - 1))]}),
        (FRAMES, {"ImagePositionPatient": [[str(2 * frame), "0", "3"] for frame in range(FRAMES)]}),  # it moves
        (FRAMES, {"Modality": ["CT"] * FRAMES}),  # a bolus tracking
        (2, {}),  # a repetition
    ],
)
def test_what_time_does_not_tell_apart_is_refused_as_before(
    tmp_path: Path, frames: int, values: dict[str, list[Any]]
) -> None:
    paths = write_cine(tmp_path, 0, frames)
    for keyword, each in values.items():
        change(paths, keyword, each)
    assembly = assemble(tmp_path)
    assert not assembly.images
    (refusal,) = assembly.refusals
    assert refusal.sentence.startswith(f"all {frames} slices lie at one place")


def test_a_frame_without_a_rescale_among_others_is_refused(tmp_path: Path) -> None:
    paths = write_cine(tmp_path, RescaleSlope="2")
    dataset = dcmread(paths[3])
    del dataset.RescaleSlope, dataset.RescaleIntercept
    dataset.save_as(paths[3])
    (plan,) = assemble(tmp_path).images
    with pytest.raises(InputRefused, match=f"instance {dataset.SOPInstanceUID} has no RescaleSlope"):
        read_image(plan)
