"""What is reported of landmarks: a group per point, on its slice or frame and, in a volume, in the patient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from highdicom import sr
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from node.dicom.volume import Volume
from node.errors import OutputRefused
from node.infer.results import Landmark, Landmarks
from node.report.kinds import SegForm
from node.report.outlines import MOST_KEY_SLICES, Outline
from node.report.page import Cell, Line, Mark, Panel
from node.report.sections import show_at, show_frames, show_sections, spread
from node.report.space import add_centre, first_voxels
from node.report.sr import Group, describe, identify_finding, measure_certainty, report_absent, source_region
from node.report.subject import Subject
from node.report.words import CATALOGUE, show_number

_SHOWN = 8  # slices or frames on the preview


@dataclass(frozen=True)
class MeasuredLandmark:
    """One point, with its place in the patient where there is one."""

    number: int  # from 1, in the order of the classes and frames
    point: Landmark
    name: str
    place_lps: tuple[float, float, float] | None  # mm

    def rows(self) -> list[dict[str, Any]]:
        """One row for people per number."""
        values: list[tuple[str, float, str]] = [("slice or frame", self.point.frame + 1, "")]
        values += [("column", self.point.column, "px"), ("row", self.point.row, "px")]
        if self.place_lps is not None:
            values += [(axis, value, "mm") for axis, value in zip("xyz", self.place_lps, strict=True)]
        if self.point.score is not None:
            values.append(("certainty", 100 * self.point.score, "%"))
        name = f"{self.name} {self.number}"
        return [{"segment": name, "measurement": kind, "value": value, "unit": unit} for kind, value, unit in values]


class LandmarkFindings:
    """The findings of a model that finds points; those with a score below the manifest's `score_min` are left out."""

    def __init__(self, subject: Subject, prediction: Landmarks):
        self.subject = subject
        for point in prediction.points:
            _check(subject, point)
        found = sorted(
            (point for point in prediction.points if point.score is None or point.score >= subject.manifest.score_min),
            key=lambda point: (point.label, point.frame, point.row, point.column),
        )
        self.measurements: Sequence[MeasuredLandmark] = [
            MeasuredLandmark(number, point, subject.meaning(point.label).name, _locate(subject, point))
            for number, point in enumerate(found, 1)
        ]

    def segmentation(self, form: SegForm) -> Dataset | None:
        """None: nothing is segmented."""
        return None

    def groups(self, seg: Dataset | None) -> list[Group]:
        """A group per point, then a statement per class of which none was found."""
        reported = [_report(self.subject, measured) for measured in self.measurements]
        return [*reported, *report_absent(self.subject, {measured.point.label for measured in self.measurements})]

    def panels(self) -> list[Panel]:
        """The slices or frames that have points, evenly chosen where they are many."""
        marks: dict[int, list[Mark]] = {}
        for measured in self.measurements:
            point = measured.point
            place = np.array([[point.row, point.column]])
            marks.setdefault(point.frame, []).append(Mark(point.label, place, str(measured.number)))
        source = self.subject.source
        if not marks:
            if isinstance(source, Volume):
                return show_sections(source)
            return show_frames(source, spread(0, len(source.frames) - 1, _SHOWN))
        frames = sorted(marks)
        chosen = [frames[index] for index in spread(0, len(frames) - 1, _SHOWN)]
        return [show_at(source, frame, marks[frame]) for frame in chosen]

    def lines(self) -> list[Line]:
        """The points, then the classes of which none was found."""
        words = CATALOGUE[self.subject.house.language]
        frame = words.slice if isinstance(self.subject.source, Volume) else words.frame
        lines = []
        for measured in self.measurements:
            point = measured.point
            cells = [Cell(f"{words.column} px", show_number(point.column, "px"))]
            cells.append(Cell(f"{words.row} px", show_number(point.row, "px")))
            if len(self.subject.source_slices) > 1:
                cells.insert(0, Cell(frame, str(point.frame + 1)))
            name = f"{measured.number}  {measured.name}"
            lines.append(Line(point.label, name, tuple(cells), part=point.score, weight=-measured.number))
        found = {measured.point.label for measured in self.measurements}
        absent = [
            Line(label, finding.name, note=words.not_found, found=False)
            for label, finding in sorted(self.subject.manifest.classes.items())
            if label not in found
        ]
        return [*lines, *absent]

    def key_slices(self) -> list[int]:
        """The slices or frames of the points, those of the highest score first."""
        ranked = sorted(self.measurements, key=lambda measured: -(measured.point.score or 0))
        return list(dict.fromkeys(measured.point.frame for measured in ranked))[:MOST_KEY_SLICES]

    def outlines(self) -> list[Outline]:
        """The points."""
        outlines = []
        for measured in self.measurements:
            point, number = measured.point, measured.number
            track = identify_finding(
                self.subject, self.subject.meaning(point.label), "point", str(number), number=number
            )
            text = f"{number} {measured.name}" + ("" if point.score is None else f" {100 * point.score:.0f} %")
            place = (point.column, point.row)
            outlines.append(Outline(point.frame, point.label, number, measured.name, text, track, point=place))
        return outlines


def _report(subject: Subject, measured: MeasuredLandmark) -> Group:
    point = measured.point
    group = sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        **describe(subject, subject.meaning(point.label), "point", str(measured.number), number=measured.number),
        referenced_region=sr.ImageRegion(
            graphic_type=sr.GraphicTypeValues.POINT,
            # SCOORD counts from the first pixel's corner (PS3.3 C.18.6.1).
            graphic_data=np.array([[point.column + 0.5, point.row + 0.5]]),
            source_image=source_region(subject.source_slices[point.frame]),
        ),
        measurements=None if point.score is None else [measure_certainty(point.score)],
    )
    if isinstance(subject.source, Volume) and measured.place_lps is not None:
        add_centre(group, subject.source, np.array(measured.place_lps))
    return group


def _check(subject: Subject, point: Landmark) -> None:
    """`OutputRefused` for a point that is not on the image, or whose class or score mean nothing."""
    subject.meaning(point.label)
    frames, rows, columns = subject.source.array.shape[:3]
    on_image = 0 <= point.frame < frames and -0.5 <= point.row <= rows - 0.5 and -0.5 <= point.column <= columns - 0.5
    if not on_image:
        raise OutputRefused(
            f"the model returned a point at column {point.column:g}, row {point.row:g} of frame {point.frame + 1}, "
            f"which lies outside of the {frames} frames of {rows} rows and {columns} columns"
        )
    if point.score is not None and not 0 <= point.score <= 1:
        raise OutputRefused(f"the model returned a point with the score {point.score:g}, which is not from 0 to 1")


def _locate(subject: Subject, point: Landmark) -> tuple[float, float, float] | None:
    if not isinstance(subject.source, Volume):
        return None
    affine = subject.source.grid.affine_lps
    place: NDArray[np.float64] = (
        first_voxels(subject.source)[point.frame] + affine[:3, 0] * point.column + affine[:3, 1] * point.row
    )
    return float(place[0]), float(place[1]), float(place[2])
