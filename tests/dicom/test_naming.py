"""What a job calls its inputs: two volumes of one object have two names, and instances as a whole the old ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from node.dicom.assembly import Assembly, assemble_volumes
from node.dicom.header import read_header, scan_folder
from node.dicom.naming import instances_of, name_plan, narrow
from tests.dicom.multiframe import write_multiframe
from tests.dicom.slices import write_series
from tests.dicom.test_images import write_image


def assemble(folder: Path) -> Assembly:
    return assemble_volumes({path: read_header(path) for path in scan_folder(folder).files})


def write_echoes(path: Path, order: list[int]) -> str:
    """Two echoes of four slices each in one object, its frames in the order of these echoes; the object's UID."""
    heights = {1: iter(range(4)), 2: iter(range(4))}
    frames: list[dict[str, Any]] = [
        {"ImagePositionPatient": ["0", "0", str(next(heights[echo]))], "EffectiveEchoTime": float(echo)}
        for echo in order
    ]
    write_multiframe(path, np.zeros((8, 4, 4), np.int16), frames)
    return str(read_header(path).SOPInstanceUID)


@pytest.mark.parametrize(
    ("order", "ranges"),
    [
        ([1, 1, 1, 1, 2, 2, 2, 2], ("1-4", "5-8")),
        ([1, 2, 1, 2, 1, 2, 1, 2], ("1,3,5,7", "2,4,6,8")),
        ([2, 1, 1, 1, 1, 2, 2, 2], ("2-5", "1,6-8")),
    ],
)
def test_volumes_of_one_object_are_named_by_their_frames(
    tmp_path: Path, order: list[int], ranges: tuple[str, str]
) -> None:
    uid = write_echoes(tmp_path / "object.dcm", order)
    assembly = assemble(tmp_path)
    assert [name_plan(plan) for plan in assembly.volumes] == [[f"{uid}#{frames}"] for frames in ranges]
    for plan in assembly.volumes:
        (kept,) = narrow(assembly, name_plan(plan)).volumes
        assert kept is plan
    assert len(narrow(assembly, [uid]).volumes) == 2, "as jobs of earlier versions name them"
    assert not narrow(assembly, [f"{uid}#1-3"]).volumes


def test_whole_instances_are_named_as_they_always_were(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "ct", np.zeros((5, 4, 4), np.int16))
    uids = sorted(str(read_header(path).SOPInstanceUID) for path in paths)
    (volume,) = assemble(tmp_path / "ct").volumes
    assert name_plan(volume) == uids
    frames = [{"ImagePositionPatient": ["0", "0", str(height)]} for height in range(3)]
    write_multiframe(tmp_path / "mr" / "object.dcm", np.zeros((3, 4, 4), np.int16), frames)
    (volume,) = assemble(tmp_path / "mr").volumes
    assert name_plan(volume) == [volume.slices[0].sop_instance_uid]
    (tmp_path / "us").mkdir()
    write_image(tmp_path / "us" / "clip.dcm", bytes(7 * 64 * 48), 7)
    (image,) = assemble(tmp_path / "us").images
    assert name_plan(image) == [image.frames[0].sop_instance_uid]
    assert narrow(assemble(tmp_path / "us"), name_plan(image)).images == (image,)


def test_names_lead_to_their_instances() -> None:
    assert instances_of(["1.3", "1.2#5-8", "1.2#1-4", "1.3"]) == ["1.2", "1.3"]
