"""The preview of detections, landmarks and scores, of planar, colour, multi-frame and uneven images."""

from __future__ import annotations

import dataclasses
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture
from pydicom.dataset import Dataset

from node.dicom.volume import Grid, SliceRef, Volume
from node.infer.results import Boxes, Landmark, Landmarks, Prediction, Scores
from node.report.colors import finding_colors, to_rgb
from node.report.findings import measure
from node.report.layout import GAP, HEAD, LARGE, MARGIN, PANEL, WIDTH
from node.report.preview import render_preview
from node.report.sections import show_section
from node.report.subject import Subject
from tests.report.pictures import recorded
from tests.report.predictions import (
    DENSITY,
    DETECTION,
    LANDMARKS,
    classify_breast,
    detect,
    make_subject,
    mark_head,
    read_planar,
)


def panel_of(page: Picture.Image, number: int, *, size: int = PANEL, columns: int = 4) -> np.ndarray:
    left, top = MARGIN + number % columns * (size + GAP), HEAD + number // columns * (size + GAP)
    return np.asarray(page.convert("RGB").crop((left, top, left + size, top + size)), int)


def find_color(pixels: np.ndarray, subject: Subject, label: int) -> np.ndarray:
    """Rows and columns of the pixels in a finding's colour."""
    color = to_rgb(finding_colors(subject.manifest)[label])
    found = np.argwhere(np.abs(pixels - color).sum(axis=2) < 12)
    assert len(found) > 8, f"nothing in {color}"
    return found


def texts_of(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts = recorded(monkeypatch)
    render_preview(measure(subject))
    return texts


@pytest.mark.parametrize("flips", [(False, False, False), (True, False, True), (False, True, True)])
def test_a_rectangle_lies_where_the_box_lies(shared_data: Path, flips: tuple[bool, bool, bool]) -> None:
    """Whichever way the array runs, the mass of the left lung is drawn in its place, as the slice is."""
    subject = detect(shared_data)
    page = render_preview(measure(turned(subject, flips)))
    found = find_color(panel_of(page, 0), subject, 1)
    volume = subject.volume
    box = measure(subject).measurements[0].box  # pyright: ignore[reportAttributeAccessIssue]
    scale = PANEL / (volume.grid.shape[2] * volume.grid.spacing_mm[2])
    corner = volume.grid.affine_lps[:2, 3] - np.array(volume.grid.spacing_mm[:0:-1]) / 2
    known = [(np.array(edge[:2]) - corner) * scale for edge in (box.low_lps, box.high_lps)]
    outline = found[found[:, 1] < known[1][0] + 2]  # its number stands to the right of it
    assert np.allclose(outline.min(axis=0)[::-1], known[0], atol=2.5)
    assert np.allclose(outline.max(axis=0)[::-1], known[1], atol=2.5)


def turned(subject: Subject, flips: tuple[bool, bool, bool]) -> Subject:
    """The same patient as if scanned with array axes that run the other way."""
    array, slices = subject.volume.array, subject.volume.slices
    affine = subject.volume.grid.affine_lps.copy()
    for axis, flip in enumerate(flips):
        if flip:
            array = np.flip(array, axis)
            affine[:3, 3] += affine[:3, 2 - axis] * (array.shape[axis] - 1)
            affine[:3, 2 - axis] *= -1
    grid = Grid(array.shape, affine, "1.2.3")
    slices = slices[::-1] if flips[0] else slices
    return dataclasses.replace(
        subject, source=dataclasses.replace(subject.volume, array=array, grid=grid, slices=slices)
    )


def test_the_table_ranks_boxes_and_says_what_is_missing(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = detect(shared_data)
    texts = texts_of(subject, monkeypatch)
    table = texts[texts.index("Finding") :]
    assert [table[table.index(name) :][:4] for name in ("1  Mass", "2  Nodule", "3  Nodule")] == [
        ["1  Mass", "69.0 x 80.8 x 50.0", "47", "93.0 %"],
        ["2  Nodule", "8.0 x 10.0 x 8.0", "43", "72.0 %"],
        ["3  Nodule", "12.0 x 12.0 x 12.0", "49", "41.0 %"],
    ]
    assert "Threshold of certainty: 30 %" in texts
    assert "AI, NOT VERIFIED - research use only" in texts
    nothing = texts_of(dataclasses.replace(subject, prediction=Boxes(())), monkeypatch)
    assert [nothing[place - 1] for place, text in enumerate(nothing) if text == "not found"] == ["Nodule", "Mass"]
    assert "Analysed: nothing found" in nothing


def test_a_cross_marks_a_landmark(shared_data: Path) -> None:
    subject = mark_head(shared_data)
    page = render_preview(measure(subject))
    assert page.width == WIDTH
    rows, columns = subject.volume.grid.shape[1:]
    spacing = np.array(subject.volume.grid.spacing_mm[1:])
    scale = LARGE / (spacing * (rows, columns)).max()
    for number, label, place in ((0, 2, (150.25, 60.5)), (1, 1, (150.0, 200.75))):
        found = find_color(panel_of(page, number, size=LARGE, columns=2), subject, label)
        middle = LARGE / 2 + (np.array(place) + 0.5 - np.array((rows, columns)) / 2) * spacing * scale
        # The patient's right is at the left edge already: nothing is turned.
        cross = found[(np.abs(found - middle) < 8).all(axis=1)]
        assert np.allclose(cross.mean(axis=0), middle, atol=2)


def test_a_mammogram_stands_beside_its_scores(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = classify_breast(shared_data)
    page = render_preview(measure(subject))
    grey = panel_of(page, 0, size=LARGE)
    assert (grey.std(axis=2) < 3).all()
    assert 0.2 < (grey[:, :, 0] > 60).mean() < 0.6  # the breast, on black
    lengths = []
    for label in range(4):
        found = find_color(np.asarray(page.convert("RGB"), int), subject, label)
        bar = found[found[:, 1] > found[:, 1].min() + 30]
        lengths.append(bar[:, 1].max() - bar[:, 1].min() if len(bar) else 0)
    assert int(np.argmax(lengths)) == 2
    assert lengths[2] == pytest.approx(0.61 * 150, abs=2)
    assert {"Heterogeneously dense", "61.0 %"} <= set(texts_of(subject, monkeypatch))


def test_colour_stays_colour_and_findings_keep_theirs(shared_data: Path) -> None:
    image, headers = read_planar(shared_data / "planar" / "xc_photo.dcm")
    points = Landmarks((Landmark(1, 0, 300, 300), Landmark(3, 0, 100, 500)))
    subject = make_subject(image, headers, points, LANDMARKS)
    page = render_preview(measure(subject))
    shown = panel_of(page, 0, size=LARGE)
    frame = np.asarray(Picture.fromarray(np.asarray(image.array[0], np.uint8)).resize((LARGE, LARGE)), int)
    assert np.abs(shown - frame).mean() < 8
    for label, row in ((1, 300), (3, 100)):
        found = find_color(shown, subject, label)
        assert np.abs(found[:, 0] - (row + 0.5) * LARGE / 600).min() < 2
    stream = BytesIO()
    page.save(stream, "png")
    assert len(stream.getvalue()) < 300_000


def test_frames_say_what_holds_for_them(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, headers = read_planar(shared_data / "planar" / "us_colour_multiframe.dcm")
    count = len(image.frames)
    scores = Scores(tuple({0: number / count, 1: 1 - number / count} for number in range(count)))
    texts = texts_of(make_subject(image, headers, scores, DENSITY), monkeypatch)
    assert {"frame 4: Scattered 90 %", "frame 27: Almost entirely fat 87 %"} <= set(texts)
    assert texts[texts.index("Scattered") + 1 :][:2] == ["15 / 30", "100.0 %"]
    assert texts[texts.index("Extremely dense") + 1] == "no score"


@pytest.mark.parametrize(
    ("prediction", "manifest"),
    [
        (Scores(({0: 0.2, 1: 0.8},)), DENSITY),
        (Landmarks(()), LANDMARKS),
        (Boxes(()), DETECTION),
        (Landmarks((Landmark(1, 2, 5, 5),)), LANDMARKS),
    ],
)
def test_uneven_slices_are_drawn_in_their_true_proportions(prediction: Prediction, manifest: dict[str, object]) -> None:
    """A coronal section of a stack with a gap is as high as the stack, the gap filled with its neighbours."""
    heights = np.array([0.0, 2, 4, 14, 16])
    array = np.zeros((5, 20, 20), np.float32)
    array[3:] = 100
    slices = tuple(SliceRef("1.2.840.10008.5.1.4.1.1.4", f"1.2.{number}") for number in range(1, 6))
    positions = np.column_stack([np.zeros(5), np.zeros(5), heights])
    grid = Grid(array.shape, np.diag([1.0, 1.0, 4.0, 1.0]), "1.2.3")
    volume = Volume(array, grid, slices, "1.9", "1.8", "MR", positions_lps=positions)
    section = show_section(volume, 1, 10)
    assert section.pixels.shape[0] * section.spacing_mm[0] == pytest.approx(18)
    bright = (section.pixels[:, 0] > 0.5).sum() * section.spacing_mm[0]
    assert bright == pytest.approx(8, abs=2)  # half of the gap and two slices
    assert render_preview(measure(make_subject(volume, (Dataset(),), prediction, manifest))).height > HEAD + PANEL


def test_many_findings_fit_on_a_page(shared_data: Path) -> None:
    image, headers = read_planar(shared_data / "planar" / "op_fundus.dcm")
    points = tuple(Landmark(1 + number % 3, 0, 10.0 * number, 700.0) for number in range(150))
    page = render_preview(measure(make_subject(image, headers, Landmarks(points), LANDMARKS)))
    assert page.height <= 1024
