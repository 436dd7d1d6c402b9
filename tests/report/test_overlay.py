"""The overlay's images: valid, where the slices lie, with the findings where the prediction has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset

from node.dicom.volume import Grid, SliceRef, Volume
from node.infer.results import Box, Boxes, Labelmap, Landmark, Landmarks
from node.report import overlay
from node.report.colors import finding_colors, to_rgb
from node.report.findings import measure
from node.report.house import House
from node.report.kinds import Kind
from node.report.overlay import make_overlay
from node.report.results import Result
from node.report.subject import Subject
from tests.report.cases import FIRST, MANIFEST, SECOND
from tests.report.pictures import decoded, errors_of, recorded, write
from tests.report.predictions import DETECTION, classify_breast, detect, make_subject, mark_head
from tests.report.test_summary import detect_nothing, judge_frames, mark_photo, segment, segment_nothing


def phantom(slices: int, size: int = 64, step_mm: float = 2.0) -> tuple[Volume, tuple[Dataset, ...]]:
    """A volume of so many slices and their headers, from the head down and oblique."""
    turn = np.deg2rad(20)
    across = np.array([np.cos(turn), np.sin(turn), 0])
    down = np.array([-np.sin(turn), np.cos(turn), 0])
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([0.8 * across, 0.8 * down, [0, 0, -step_mm]])
    affine[:3, 3] = (-30, -40, 500)
    grid = Grid((slices, size, size), affine, "1.2.3")
    refs = tuple(SliceRef("1.2.840.10008.5.1.4.1.1.2", f"1.2.4.{number}") for number in range(1, slices + 1))
    array = np.random.default_rng(1).normal(0, 300, grid.shape).astype(np.float32)
    headers = []
    for number, ref in enumerate(refs, 1):
        header = Dataset()
        header.SOPClassUID, header.SOPInstanceUID = ref.sop_class_uid, ref.sop_instance_uid
        header.StudyInstanceUID, header.SeriesInstanceUID, header.Modality = "1.2.5", "1.2.6", "CT"
        header.InstanceNumber, header.SliceThickness = number, "2"
        header.PatientName, header.PatientID = "Doe^Jane", "1"
        headers.append(header)
    return Volume(array, grid, refs, "1.2.6", "1.2.5", "CT", unit="HU"), tuple(headers)


def segment_phantom(slices: int, size: int = 64) -> Subject:
    volume, headers = phantom(slices, size)
    labels = np.zeros(volume.grid.shape, np.uint16)
    labels[:, 20:30, 22:34] = FIRST
    labels[7, 20:31, 22:34] = FIRST  # its largest
    labels[slices - 3, 40:44, 8:14] = SECOND
    return make_subject(volume, headers, Labelmap(labels, volume.grid), MANIFEST)


MAKERS: tuple[Callable[[Path], Subject], ...] = (segment, detect, mark_head, mark_photo)


@pytest.mark.parametrize("made", MAKERS)
def test_every_kind_makes_valid_images_that_others_read(
    shared_data: Path, tmp_path: Path, made: Callable[[Path], Subject]
) -> None:
    subject = made(shared_data)
    images = make_overlay(measure(subject))
    assert images
    assert len({image.SOPInstanceUID for image in images}) == len(images)
    for image in (images[0], images[len(images) // 2]):
        index = image.InstanceNumber - 1
        assert image.SOPInstanceUID == subject.uid("overlay", str(index))
        assert image.SeriesInstanceUID == subject.uid("overlay", "series")
        assert image.SeriesNumber == subject.series_number(Kind.OVERLAY)
        assert image.Modality == "OT"
        (source,) = image.SourceImageSequence
        assert source.ReferencedSOPInstanceUID == subject.source_slices[index].sop_instance_uid
        file = write(image, tmp_path / "overlay.dcm")
        assert not errors_of(file)
        assert (decoded(file) == image.pixel_array).all()


@pytest.mark.parametrize("made", [segment_nothing, detect_nothing, classify_breast, judge_frames])
def test_where_nothing_can_be_shown_there_is_none(shared_data: Path, made: Callable[[Path], Subject]) -> None:
    assert make_overlay(measure(made(shared_data))) == []


@pytest.mark.parametrize("made", MAKERS)
def test_the_same_findings_are_the_same_bytes(shared_data: Path, made: Callable[[Path], Subject]) -> None:
    first, second = (
        [Result("overlay", image).encode() for image in make_overlay(measure(made(shared_data)))[:3]] for _ in range(2)
    )
    assert first == second


def test_it_lies_where_its_slice_lies(shared_data: Path) -> None:
    subject = segment(shared_data)
    headers = {header.SOPInstanceUID: header for header in subject.sources}
    for image in make_overlay(measure(subject))[::9]:
        source = headers[image.SourceImageSequence[0].ReferencedSOPInstanceUID]
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            assert np.allclose(image.get(keyword), source.get(keyword), atol=1e-4), keyword
        assert image.FrameOfReferenceUID == source.FrameOfReferenceUID
        assert image.SliceThickness == source.SliceThickness
        assert (image.Rows, image.Columns) == (source.Rows, source.Columns)
        assert list(image.PatientOrientation) == ["L", "P"]


def test_an_enlarged_slice_has_the_same_corner_in_the_patient() -> None:
    """The outer corners of the enlarged image are those of the slice."""
    subject = segment_phantom(12)
    grid = subject.volume.grid
    for image in make_overlay(measure(subject)):
        index = image.InstanceNumber - 1
        assert (image.Rows, image.Columns) == (512, 512)
        position = np.array(image.ImagePositionPatient, float)
        steps = (
            np.array(image.ImageOrientationPatient, float).reshape(2, 3) * np.array(image.PixelSpacing, float)[:, None]
        )
        for corner in ((-0.5, -0.5), (63.5, -0.5), (63.5, 63.5)):
            known = grid.to_lps(np.array([(*corner, index)]))[0]
            mine = position + (np.array(corner) * 8 + 3.5) @ steps
            assert np.allclose(mine, known, atol=1e-4)


def test_segments_are_coloured_where_the_label_map_has_them() -> None:
    subject = segment_phantom(12)
    colors = {label: np.array(to_rgb(color)) for label, color in finding_colors(subject.manifest).items()}
    for image in make_overlay(measure(subject)):
        labels = subject.labelmap.array[image.InstanceNumber - 1]
        pixels = image.pixel_array[::8, ::8].astype(int)  # of each pixel of the slice its first one
        hue = pixels - pixels.mean(axis=2, keepdims=True)
        for label in np.unique(labels[labels > 0]):
            inside = hue[labels == label].mean(axis=0)
            color = colors[int(label)] - colors[int(label)].mean()
            assert inside @ color / np.linalg.norm(inside) / np.linalg.norm(color) > 0.95
            rows, columns = np.nonzero(labels == label)
            corner = image.pixel_array[rows.min() * 8, columns.min() * 8]
            assert (corner == colors[int(label)]).all()  # the outline is in the very colour
        assert (np.abs(hue[32:60, 40:60]) < 1).all()  # background is grey
        assert pixels[32:60, 40:60].std() > 20


def test_boxes_and_points_lie_where_they_were_found(shared_data: Path) -> None:
    subject = detect(shared_data)
    findings = measure(subject)
    images = {image.InstanceNumber - 1: image for image in make_overlay(findings)}
    mass = findings.measurements[0]
    color = to_rgb(finding_colors(subject.manifest)[1])
    assert set(mass.outlines) <= set(images)  # pyright: ignore[reportAttributeAccessIssue]
    for index, outline in mass.outlines.items():  # pyright: ignore[reportAttributeAccessIssue]
        found = np.argwhere((images[index].pixel_array == color).all(axis=2))
        low, high = outline.min(axis=0)[::-1], outline.max(axis=0)[::-1]
        edges = found[(found[:, 0] > low[0] + 30) & (found[:, 1] < high[1] + 3) & (found[:, 1] > low[1] - 3)]
        assert abs(edges[:, 0].max() - high[0]) < 2.5
        assert abs(edges[:, 1].min() - low[1]) < 2.5
        assert abs(edges[:, 1].max() - high[1]) < 2.5
    subject = mark_head(shared_data)
    for image in make_overlay(measure(subject)):
        (point,) = (
            each.point
            for each in measure(subject).measurements
            if each.point.frame == image.InstanceNumber - 1  # pyright: ignore[reportAttributeAccessIssue]
        )
        center = np.array([point.row + 0.5, point.column + 0.5]) * 2  # enlarged
        found = np.argwhere((image.pixel_array == to_rgb(finding_colors(subject.manifest)[point.label])).all(axis=2))
        cross = found[(np.abs(found - center) < 9).all(axis=1)]
        assert np.allclose(cross.mean(axis=0), center, atol=2)


def test_of_many_slices_the_key_slices_stay_and_the_others_are_spread() -> None:
    subject = segment_phantom(250, 24)
    labels = np.zeros(subject.volume.grid.shape, np.uint16)
    labels[:240, 4:14, 2:14] = FIRST
    labels[7, 4:16, 2:14] = FIRST
    labels[247, 18:22, 4:10] = SECOND
    subject = dataclasses.replace(subject, prediction=Labelmap(labels, subject.volume.grid))
    numbers = [image.InstanceNumber for image in make_overlay(measure(subject))]
    assert len(numbers) == overlay.MOST == len(set(numbers))
    assert numbers == sorted(numbers)
    assert {8, 248} <= set(numbers)
    assert set(np.diff(numbers)) <= {1, 2, 3, 8}  # 8: from the last slice of the one to the other


def test_large_images_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlay, "_MOST_BYTES", 5 * 3 * 512 * 512)
    volume, headers = phantom(40)
    corner = volume.grid.to_lps(np.array([(10.0, 10.0, 30.0)]))[0]
    low, high = (tuple((corner + shift).tolist()) for shift in ((-4, -4, -6), (4, 4, 6)))
    points = Landmarks(tuple(Landmark(1, number, 20, 20) for number in range(40)))
    manifest = DETECTION | {"task": "landmarks"}
    assert len(make_overlay(measure(make_subject(volume, headers, points, manifest)))) == 5
    boxes = make_subject(volume, headers, Boxes((Box(1, 0.9, low, high),)), DETECTION)
    numbers = [image.InstanceNumber for image in make_overlay(measure(boxes))]
    assert len(numbers) == 5
    assert 31 in numbers


def test_every_image_carries_the_banner_and_says_which_slice_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = dataclasses.replace(segment_phantom(9), house=House(language="de", banner="NUR FORSCHUNG"))
    texts = recorded(monkeypatch)
    images = make_overlay(measure(subject))
    assert texts.count("NUR FORSCHUNG") == len(images) == 9
    assert "synthetic 1.2.3, Schicht 3 (Bild 3)" in texts
    assert texts.count("Right lung") == 9
    assert texts.count("Nodule") == 1
    assert not [text for text in texts if "Doe" in text]


def test_without_a_frame_of_reference_it_lies_nowhere(tmp_path: Path) -> None:
    subject = segment_phantom(9)
    grid = dataclasses.replace(subject.volume.grid, frame_of_reference_uid="")
    subject = dataclasses.replace(
        subject,
        source=dataclasses.replace(subject.volume, grid=grid),
        prediction=Labelmap(subject.labelmap.array, grid),
    )
    image = make_overlay(measure(subject))[0]
    assert "ImagePositionPatient" not in image
    assert not errors_of(write(image, tmp_path / "overlay.dcm"))
