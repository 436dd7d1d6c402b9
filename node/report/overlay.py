"""The slices that hold findings, with the findings drawn in: Secondary Capture images for a PACS that draws nothing.

They are Standard Extended objects (PS3.2 7.3): beside what Secondary Capture has, those of a volume say where in the
patient they lie, so that a viewer scrolls them together with the scan and shows reference lines. Grey values are
windowed as on the page, because the colours leave no others; to measure is a matter of the scan itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture
from PIL import ImageDraw
from pydicom.dataset import Dataset

from node.dicom.candidates import numbers
from node.dicom.frames import flatten_first_frame
from node.dicom.volume import Volume
from node.report.boxes import BoxFindings
from node.report.capture import capture
from node.report.colors import RGB, finding_colors, to_rgb
from node.report.drawing import BLACK, TEXT, draw_marks, fill_labels, to_picture
from node.report.facts import image_numbers, name_slice
from node.report.findings import Findings
from node.report.fonts import load_font, printable, shorten
from node.report.kinds import Kind
from node.report.landmarks import LandmarkFindings
from node.report.layout import WARNING
from node.report.page import Mark
from node.report.sections import grey_range
from node.report.segments import SegmentFindings
from node.report.space import first_voxels
from node.report.subject import Subject
from node.report.words import CATALOGUE

MOST = 100  # images
_MOST_BYTES = 256 * 2**20  # of all their pixels
_LEAST = 512  # pixels of the longer side: smaller images are enlarged by a whole factor, or the text would hide them
_NAMES = 8  # findings named on an image


@dataclass(frozen=True)
class _Drawing:
    """What is drawn over the slices, by the index of the slice or frame."""

    slices: tuple[int, ...]  # that hold findings, ascending
    keys: frozenset[int]  # the one that shows a finding best, of each finding
    marks: Mapping[int, tuple[Mark, ...]]
    names: Mapping[int, tuple[tuple[int, str], ...]]  # label, whose colour it is written in, and name
    labels: NDArray[np.uint16] | None = None


def make_overlay(findings: Findings) -> list[Dataset]:
    """The slices or frames that hold findings as images of one series, in their order; none where nothing was found.

    Of more than `MOST` the key slices of the findings stay, and as many others, evenly spread, as there is room for;
    fewer where the images are so large that their pixels would take more than 256 MiB. `InstanceNumber` is the number
    that report and page give the slice. Scores lie nowhere on an image and have no overlay.
    """
    drawing = _gather(findings)
    return list(_images(findings.subject, drawing)) if drawing else []


def _images(subject: Subject, drawing: _Drawing) -> Iterator[Dataset]:
    source = subject.source
    words = CATALOGUE[subject.house.language]
    colors = {label: to_rgb(color) for label, color in finding_colors(subject.manifest).items()}
    rows, columns = source.array.shape[1:3]
    factor = max(1, -(-_LEAST // max(rows, columns)))
    most = max(1, min(MOST, _MOST_BYTES // (3 * rows * columns * factor**2)))
    chosen = _choose(drawing, most)
    known, shown_range = image_numbers(subject), grey_range(source)
    header = flatten_first_frame(subject.sources[0]) if "NumberOfFrames" in subject.sources[0] else subject.sources[0]
    for index in chosen:
        picture = _draw(subject, drawing, index, factor, colors, shown_range)
        foot = f"{subject.model_name} {subject.model_version}, {name_slice(subject, index, words, known)}"
        if len(chosen) < len(drawing.slices):
            foot += f", {words.shown.format(shown=len(chosen), count=len(drawing.slices))}"
        _annotate(picture, subject.house.banner, foot, drawing.names.get(index, ()), colors)
        image = capture(
            subject,
            picture,
            Kind.OVERLAY,
            uid=subject.uid("overlay", str(index)),
            series_uid=subject.uid("overlay", "series"),
            number=index + 1,
            refs=[subject.source_slices[index]],
            derivation=f"Findings of {subject.model_name} {subject.model_version} drawn over the image",
        )
        if isinstance(source, Volume) and source.grid.frame_of_reference_uid:
            _place(image, source, index, factor, header)
        yield image


def _gather(findings: Findings) -> _Drawing | None:
    match findings:
        case SegmentFindings():
            return _of_segments(findings)
        case BoxFindings():
            marks: dict[int, list[Mark]] = {}
            for box in findings.measurements:
                for index, outline in box.outlines.items():
                    marks.setdefault(index, []).append(Mark(box.box.label, outline[:, ::-1], str(box.rank)))
            names = {str(box.rank): box.name for box in findings.measurements}
            return _of_marks(marks, names, {box.key_slice for box in findings.measurements})
        case LandmarkFindings():
            marks = {}
            for measured in findings.measurements:
                point = measured.point
                place = np.array([[point.row, point.column]])
                marks.setdefault(point.frame, []).append(Mark(point.label, place, str(measured.number)))
            names = {str(measured.number): measured.name for measured in findings.measurements}
            return _of_marks(marks, names, set(marks))
    return None


def _of_segments(findings: SegmentFindings) -> _Drawing | None:
    labels, segments = findings.subject.labelmap.array, findings.subject.manifest.segments
    areas = np.stack([np.bincount(slice_.ravel(), minlength=max(segments) + 1) for slice_ in labels])
    areas[:, 0] = 0
    slices = tuple(np.flatnonzero(areas.any(axis=1)).tolist())
    if not slices:
        return None
    names = {}
    for index in slices:
        largest = np.argsort(-areas[index], kind="stable")[: np.count_nonzero(areas[index])].tolist()
        names[index] = tuple((label, segments[label].name) for label in largest)
    keys = frozenset(int(areas[:, label].argmax()) for label in np.flatnonzero(areas.any(axis=0)))
    return _Drawing(slices, keys, {}, names, labels)


def _of_marks(marks: Mapping[int, list[Mark]], names: Mapping[str, str], keys: set[int]) -> _Drawing | None:
    if not marks:
        return None
    said = {index: tuple((mark.label, f"{mark.name}  {names[mark.name]}") for mark in marks[index]) for index in marks}
    drawn = {index: tuple(marks[index]) for index in marks}
    return _Drawing(tuple(sorted(marks)), frozenset(keys), drawn, said)


def _choose(drawing: _Drawing, most: int) -> list[int]:
    """At most so many of the slices, ascending: the key slices first, then evenly spread ones."""
    if len(drawing.slices) <= most:
        return list(drawing.slices)
    keys = sorted(drawing.keys)
    if len(keys) >= most:
        return _evenly(keys, most)
    others = [index for index in drawing.slices if index not in drawing.keys]
    return sorted([*keys, *_evenly(others, most - len(keys))])


def _evenly(indices: list[int], count: int) -> list[int]:
    return [indices[place] for place in np.linspace(0, len(indices) - 1, count).round().astype(int)]


def _draw(
    subject: Subject,
    drawing: _Drawing,
    index: int,
    factor: int,
    colors: Mapping[int, RGB],
    shown_range: tuple[float, float],
) -> Picture.Image:
    """One slice as it is stored, enlarged by `factor`, with what was found."""
    pixels = subject.source.array[index].astype(np.float32)
    low, high = (0, 255) if pixels.ndim == 3 else shown_range
    picture = to_picture(np.clip((pixels - low) / (high - low), 0, 1))
    size = (picture.width * factor, picture.height * factor)
    picture = picture.resize(size, Picture.Resampling.BICUBIC) if factor > 1 else picture
    if drawing.labels is not None:
        labels = np.kron(drawing.labels[index], np.ones((factor, factor), np.uint16))
        picture = fill_labels(picture, labels, colors)
    draw_marks(picture, drawing.marks.get(index, ()), colors, scale=(factor, factor), weight=_weight(picture))
    return picture


def _weight(picture: Picture.Image) -> float:
    return max(1.0, max(picture.size) / 800)


def _annotate(
    picture: Picture.Image, banner: str, foot: str, names: tuple[tuple[int, str], ...], colors: Mapping[int, RGB]
) -> None:
    """The banner above, the slice below, and at the left what lies on it; outside the corners, where viewers write."""
    draw, weight = ImageDraw.Draw(picture), _weight(picture)
    stroke = round(2 * weight)
    size = round(15 * weight)
    while size > 9 and load_font(size, bold=True).getlength(printable(banner)) > picture.width - 8:
        size -= 1
    middle, font = picture.width / 2, load_font(size, bold=True)
    draw.text(
        (middle, 5), printable(banner), fill=WARNING, font=font, anchor="mt", stroke_width=stroke, stroke_fill=BLACK
    )
    font = load_font(round(13 * weight))
    foot = shorten(foot, font, picture.width - 8)
    place = (middle, picture.height - 5)
    draw.text(place, foot, fill=TEXT, font=font, anchor="mb", stroke_width=stroke, stroke_fill=BLACK)
    lines = [(colors[label], name) for label, name in names[:_NAMES]]
    if len(names) > _NAMES:
        lines.append((TEXT, f"+ {len(names) - _NAMES}"))
    font, step = load_font(round(14 * weight), bold=True), 18 * weight
    for number, (color, name) in enumerate(lines):
        shown = shorten(name, font, picture.width / 3)
        place = (6 * weight, picture.height / 5 + step * number)
        draw.text(place, shown, fill=color, font=font, anchor="lm", stroke_width=stroke, stroke_fill=BLACK)


def _place(image: Dataset, volume: Volume, index: int, factor: int, header: Dataset) -> None:
    """Where the image lies in the patient: Frame of Reference and Image Plane modules (PS3.3 C.7.4.1, C.7.6.2)."""
    affine = volume.grid.affine_lps
    across, down = affine[:3, 0], affine[:3, 1]
    # The first pixel's centre moves towards the corner where pixels are parts of the scan's.
    corner = first_voxels(volume)[index] + (across + down) * (0.5 / factor - 0.5)
    image.FrameOfReferenceUID = volume.grid.frame_of_reference_uid
    image.PositionReferenceIndicator = header.get("PositionReferenceIndicator")
    image.ImagePositionPatient = _decimals(corner)
    directions = [across / np.linalg.norm(across), down / np.linalg.norm(down)]
    image.ImageOrientationPatient = _decimals(np.concatenate(directions))
    image.PixelSpacing = _decimals(np.array(volume.grid.spacing_mm[1:]) / factor)
    thickness = numbers(header, "SliceThickness", 1)
    image.SliceThickness = f"{thickness[0]:.8g}" if thickness else None
    image.PatientOrientation = [_toward(direction) for direction in directions]


def _decimals(values: NDArray[np.float64]) -> list[str]:
    """Values as DS (16 characters at most, PS3.5 6.2); none is a negative zero."""
    return [f"{value + 0.0:.8g}" for value in np.round(values, 9).tolist()]


def _toward(direction: NDArray[np.float64]) -> str:
    """The letter of where a direction leads (PS3.3 C.7.6.1.1.1)."""
    axis = int(np.argmax(np.abs(direction)))
    return ("LPH" if direction[axis] > 0 else "RAF")[axis]
