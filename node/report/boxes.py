"""What is reported of detections: a group per box, ranked by score, with its outline on every slice that it crosses.

TID 1411 lets a volumetric finding be a segment, image regions or a volume surface. The outlines are image regions
(SCOORD, a closed polyline each): they are exactly the box that the model gave, where an ELLIPSOID would round its
corners off, and they are what viewers draw (OHIF draws POINT, POLYLINE, CIRCLE and ELLIPSE, the first of each group,
and neither POLYGON nor ELLIPSOID; so the key slice comes first). The box's centre as a point in space (SCOORD3D) and
its extents in mm say the same without the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from highdicom import sr
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from node.dicom.volume import Volume
from node.errors import OutputRefused
from node.infer.results import Box, Boxes
from node.report.kinds import SegForm
from node.report.outlines import MOST_KEY_SLICES, Outline
from node.report.page import Cell, Line, Mark, Panel
from node.report.sections import show_section, show_sections, zoom
from node.report.space import add_centre, cut_box
from node.report.sr import (
    Group,
    describe,
    identify_finding,
    measure_certainty,
    report_absent,
    round_number,
    source_region,
)
from node.report.subject import Subject
from node.report.words import CATALOGUE, show_number

_EXTENTS = (  # along x, y and z of the patient (CID 7470)
    ("width", codes.SCT.Width),
    ("depth", codes.SCT.Depth),
    ("height", codes.DCM.Height),
)
_SHOWN = 4  # boxes on the preview, each as a slice and enlarged


@dataclass(frozen=True)
class MeasuredBox:
    """One detection on the slices of its volume."""

    rank: int  # 1 for the most probable
    box: Box
    name: str
    size_mm: tuple[float, float, float]  # along x, y and z of the patient
    key_slice: int  # index of the slice nearest to its centre
    outlines: dict[int, NDArray[np.float64]]  # slice to (n, 2) column and row in pixels; the key slice first

    def rows(self) -> list[dict[str, Any]]:
        """One row for people per number."""
        name = f"{self.name} {self.rank}"
        rows: list[dict[str, Any]] = [
            {"segment": name, "measurement": "certainty", "value": 100 * self.box.score, "unit": "%"},
            {"segment": name, "measurement": "slice", "value": self.key_slice + 1, "unit": ""},
        ]
        for (kind, _), size in zip(_EXTENTS, self.size_mm, strict=True):
            rows.append({"segment": name, "measurement": kind, "value": size, "unit": "mm"})
        return rows


class BoxFindings:
    """The findings of a detector: its boxes at or above the manifest's `score_min`."""

    def __init__(self, subject: Subject, prediction: Boxes):
        self.subject = subject
        volume = subject.volume
        for box in prediction.boxes:
            _check(subject, box)
        found = sorted(
            (box for box in prediction.boxes if box.score >= subject.manifest.score_min),
            key=lambda box: (-box.score, box.label, box.low_lps),
        )
        self.measurements: Sequence[MeasuredBox] = [
            _measure(volume, rank, box, subject.meaning(box.label).name) for rank, box in enumerate(found, 1)
        ]

    def segmentation(self, form: SegForm) -> Dataset | None:
        """None: nothing is segmented."""
        return None

    def groups(self, seg: Dataset | None) -> list[Group]:
        """A group per box, then a statement per class of which none was found."""
        reported = [_report(self.subject, measured) for measured in self.measurements]
        return [*reported, *report_absent(self.subject, {measured.box.label for measured in self.measurements})]

    def panels(self) -> list[Panel]:
        """The key slices of the first boxes, each as a whole and enlarged, with every box that lies on them."""
        volume = self.subject.volume
        if not self.measurements:
            return show_sections(volume)
        panels = []
        for measured in self.measurements[:_SHOWN]:
            marks = {
                other.rank: Mark(other.box.label, other.outlines[measured.key_slice][:, ::-1], str(other.rank))
                for other in self.measurements
                if measured.key_slice in other.outlines
            }
            panel = show_section(volume, 0, measured.key_slice, marks=tuple(marks.values()))
            own = next(mark for mark in panel.marks if mark.name == str(measured.rank))
            panels += [panel, zoom(panel, own)]
        return panels

    def lines(self) -> list[Line]:
        """The boxes by rank, then the classes of which none was found."""
        words = CATALOGUE[self.subject.house.language]
        lines = [
            Line(
                measured.box.label,
                f"{measured.rank}  {measured.name}",
                (
                    Cell(f"{words.size} mm", " x ".join(show_number(size, "mm") for size in measured.size_mm)),
                    Cell(words.slice, str(measured.key_slice + 1)),
                ),
                part=measured.box.score,
                weight=-measured.rank,
            )
            for measured in self.measurements
        ]
        found = {measured.box.label for measured in self.measurements}
        absent = [
            Line(label, finding.name, note=words.not_found, found=False)
            for label, finding in sorted(self.subject.manifest.classes.items())
            if label not in found
        ]
        return [*lines, *absent]

    def key_slices(self) -> list[int]:
        """The slice nearest to the centre of each box, by rank."""
        return list(dict.fromkeys(measured.key_slice for measured in self.measurements))[:MOST_KEY_SLICES]

    def outlines(self) -> list[Outline]:
        """Each box on the slices that it crosses."""
        outlines = []
        for measured in self.measurements:
            label, rank = measured.box.label, measured.rank
            track = identify_finding(self.subject, self.subject.meaning(label), "box", str(rank), number=rank)
            text = f"{rank} {measured.name} {100 * measured.box.score:.0f} %"
            for index, polygon in sorted(measured.outlines.items()):
                outlines.append(Outline(index, label, rank, measured.name, text, track, (polygon,)))
        return outlines


def _report(subject: Subject, measured: MeasuredBox) -> Group:
    group = sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        **describe(subject, subject.meaning(measured.box.label), "box", str(measured.rank), number=measured.rank),
        referenced_regions=[
            sr.ImageRegion(
                graphic_type=sr.GraphicTypeValues.POLYLINE,
                # SCOORD counts from the first pixel's corner (PS3.3 C.18.6.1); the last point closes the outline.
                graphic_data=np.vstack([outline, outline[:1]]) + 0.5,
                source_image=source_region(subject.source_slices[index]),
            )
            for index, outline in measured.outlines.items()
        ],
        measurements=[
            measure_certainty(measured.box.score),
            *(
                sr.Measurement(concept, value=round_number(size), unit=codes.UCUM.Millimeter)
                for (_, concept), size in zip(_EXTENTS, measured.size_mm, strict=True)
            ),
        ],
    )
    add_centre(group, subject.volume, np.array(measured.box.centre_lps))
    return group


def _check(subject: Subject, box: Box) -> None:
    """`OutputRefused` for a box without a meaning, an extent or a score."""
    subject.meaning(box.label)
    x, y, z = _extents(box)
    if not (0 <= box.score <= 1 and min(x, y, z) > 0 and np.isfinite((x, y, z)).all()):
        raise OutputRefused(f"the model returned a box of {x:g} x {y:g} x {z:g} mm with the score {box.score:g}")


def _extents(box: Box) -> tuple[float, float, float]:
    x, y, z = (high - low for low, high in zip(box.low_lps, box.high_lps, strict=True))
    return x, y, z


def _measure(volume: Volume, rank: int, box: Box, name: str) -> MeasuredBox:
    x, y, z = _extents(box)
    outlines = cut_box(volume, box)
    if not outlines:
        raise OutputRefused(
            f"the model returned a box around {', '.join(f'{value:.1f}' for value in box.centre_lps)} mm, which lies "
            "outside of the image"
        )
    return MeasuredBox(rank, box, name, (x, y, z), next(iter(outlines)), outlines)
