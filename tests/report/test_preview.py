"""The preview page: small, readable, the right way round, in the SEG's colours, without the patient."""

from __future__ import annotations

import dataclasses
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

from node.dicom.volume import Grid, Volume
from node.infer.manifest import Manifest
from node.infer.results import Labelmap
from node.report.colors import segment_colors, to_rgb
from node.report.findings import measure
from node.report.preview import GAP, MARGIN, PANEL, render_preview
from node.report.segments import show_number
from node.report.subject import Subject
from tests.report.cases import FIRST, MANIFEST, SECOND, Case
from tests.report.conftest import CaseOf

HEAD = 96  # pixels above the first row of panels


def page_of(case: Case, **changes: object) -> Image.Image:
    subject = dataclasses.replace(case.analysis.subject, **changes)  # pyright: ignore[reportArgumentType]
    return render_preview(measure(subject))


def panel(page: Image.Image, number: int) -> np.ndarray:
    """The pixels of one of the eight panels."""
    left, top = MARGIN + number % 4 * (PANEL + GAP), HEAD + number // 4 * (PANEL + GAP)
    return np.asarray(page.convert("RGB").crop((left, top, left + PANEL, top + PANEL)), int)


def center_of(pixels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Mean row and column of the outline in a colour."""
    where = np.argwhere(np.abs(pixels - color).sum(axis=2) < 12)
    assert len(where) > 20, f"no outline in {color}"
    return where.mean(axis=0)


def turned(subject: Subject, flips: tuple[bool, bool, bool]) -> Subject:
    """The same patient and mask as if scanned with array axes that run the other way."""
    array, labels = subject.volume.array, subject.labelmap.array
    affine = subject.volume.grid.affine_lps.copy()
    for axis, flip in enumerate(flips):
        if flip:
            array, labels = np.flip(array, axis), np.flip(labels, axis)
            affine[:3, 3] += affine[:3, 2 - axis] * (array.shape[axis] - 1)
            affine[:3, 2 - axis] *= -1
    grid = Grid(subject.volume.grid.shape, affine, subject.volume.grid.frame_of_reference_uid)
    volume: Volume = dataclasses.replace(subject.volume, array=array, grid=grid)
    return dataclasses.replace(subject, source=volume, prediction=Labelmap(labels, grid))


def two_sides(case: Case) -> Subject:
    """A mask with a small ball high in the patient's front right and a large one low in the back left."""
    volume = case.volume
    index = np.indices(volume.grid.shape, np.float32)
    across, down, up = (np.tensordot(volume.grid.affine_lps[a, 2::-1], index, 1) for a in range(3))
    x, y, z = (axis - axis.mean() for axis in (across, down, up))
    labels = np.zeros(volume.grid.shape, np.uint16)
    labels[(x + 60) ** 2 + (y + 40) ** 2 + (z - 20) ** 2 < 60**2] = FIRST  # LPS: -x is the patient's right
    labels[(x - 70) ** 2 + (y - 40) ** 2 + (z + 20) ** 2 < 66**2] = SECOND
    return dataclasses.replace(case.analysis.subject, prediction=Labelmap(labels, volume.grid))


@pytest.mark.parametrize(
    "flips", [(False, False, False), (True, False, False), (False, True, True), (True, True, True)]
)
def test_right_is_left_front_is_up_and_head_is_up(case_of: CaseOf, flips: tuple[bool, bool, bool]) -> None:
    """Standard radiological display, whichever way the array runs."""
    case = case_of("philips_ct")
    subject = turned(two_sides(case), flips)
    page = render_preview(measure(subject))
    colors = {label: to_rgb(color) for label, color in segment_colors(subject.manifest).items()}
    axial = panel(page, 2)
    assert (center_of(axial, colors[FIRST]) < center_of(axial, colors[SECOND])).all()
    coronal = panel(page, 6)
    assert (center_of(coronal, colors[FIRST]) < center_of(coronal, colors[SECOND])).all()


def test_the_png_is_small_and_opens(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "preview.png"
    page_of(case).save(file)
    assert file.stat().st_size < 300_000
    with Image.open(file) as picture:
        picture.load()
        assert picture.size == (2 * MARGIN + 4 * PANEL + 3 * GAP, HEAD + 2 * (PANEL + GAP) + 44 + 60)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_the_real_lungs_fit_into_300_kb(case_of: CaseOf) -> None:
    """Noise is what makes a PNG large: the sharpest kernel that we have, a mask over most of the chest."""
    case = case_of("philips_ct")
    labels = np.where(case.volume.array > -1100, FIRST, 0).astype(np.uint16)
    stream = BytesIO()
    page_of(case, prediction=Labelmap(labels, case.volume.grid)).save(stream, "png")
    assert len(stream.getvalue()) < 300_000


def drawn_texts(case: Case, monkeypatch: pytest.MonkeyPatch, **changes: object) -> str:
    texts: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def record(self: ImageDraw.ImageDraw, place: tuple[float, float], text: str, *rest: object, **more: object) -> None:
        texts.append(text)
        draw(self, place, text, *rest, **more)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    page_of(case, **changes)
    return "\n".join(texts)


def test_the_text_says_what_it_is_and_not_who(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn_texts(case, monkeypatch)
    assert "AI, NOT VERIFIED" in text
    assert "synthetic 1.2.3" in text
    for measured in case.measurements:
        volume, mean = (show_number(row["value"]) for row in measured.rows()[:2])
        assert f"{measured.name}:  volume {volume} mL   mean {mean}" in text
    header = case.plan.header
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "StudyDate"):
        value = str(header.get(keyword) or "")
        assert not value or value not in text, keyword


def test_an_empty_mask_still_makes_a_page(case_of: CaseOf, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("siemens_ct")
    empty = Labelmap(np.zeros_like(case.labels), case.volume.grid)
    assert drawn_texts(case, monkeypatch, prediction=empty).count("not found") == 2


def test_many_segments_have_a_palette(case_of: CaseOf) -> None:
    case = case_of("siemens_ct")
    one = MANIFEST["segments"][SECOND]
    manifest = Manifest.model_validate(MANIFEST | {"segments": dict.fromkeys(range(1, 301), one)})
    page_of(case, manifest=manifest)


def test_cielab_is_that_of_d50() -> None:
    """Against LittleCMS: sRGB to Lab with the profile connection space's white point (PS3.3 C.10.7.1.1)."""
    transform = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB", 5000), "RGB", "LAB"
    )
    for lab in [(72.0, -22.0, -32.0), (76.0, 18.0, 62.0), *segment_colors(Manifest.model_validate(MANIFEST)).values()]:
        swatch = ImageCms.applyTransform(Image.new("RGB", (1, 1), to_rgb(lab)), transform)
        assert swatch is not None
        lightness, a, b = np.asarray(swatch)[0, 0].astype(int)
        signed = [value - 256 if value > 127 else value for value in (a, b)]
        assert [lightness * 100 / 255, *signed] == pytest.approx(lab, abs=1.6)
