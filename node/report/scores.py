"""What is reported of a classification: for each class how certain the model is of it, and whether it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code as PydicomCode

from node.dicom.volume import SliceRef, Volume
from node.errors import OutputRefused
from node.infer.results import Scores
from node.report.kinds import SegForm
from node.report.outlines import MOST_KEY_SLICES, Outline
from node.report.page import Cell, Line, Panel
from node.report.sections import show_at, show_frame, show_sections, spread
from node.report.sr import Group, describe, measure_certainty, report_presence
from node.report.subject import Subject
from node.report.words import CATALOGUE

_SHOWN = 8  # frames on the preview


@dataclass(frozen=True)
class MeasuredClass:
    """One class, of the whole input or of one of its frames."""

    label: int
    name: str
    frame: int | None  # index of the frame; None for the whole input
    score: float | None  # None where the model says nothing of the class
    holds: bool  # the class of the highest score, or one at or above `score_min` where several may hold

    def rows(self) -> list[dict[str, Any]]:
        """One row for people, where there is a score."""
        if self.score is None:
            return []
        name = self.name if self.frame is None else f"{self.name}, frame {self.frame + 1}"
        row = {"segment": name, "measurement": "certainty", "value": 100 * self.score, "unit": "%"}
        return [row | {"holds": self.holds}]


class ScoreFindings:
    """The findings of a classifier."""

    def __init__(self, subject: Subject, prediction: Scores):
        self.subject = subject
        count = len(subject.source_slices)
        if len(prediction.values) not in (1, count):
            raise OutputRefused(
                f"the model returned {len(prediction.values)} classifications of an input of {count} frames: expected "
                "one for all or one for each"
            )
        per_frame = len(prediction.values) > 1
        self.measurements: Sequence[MeasuredClass] = [
            measured
            for frame, values in enumerate(prediction.values)
            for measured in _decide(subject, values, frame if per_frame else None, exclusive=prediction.exclusive)
        ]

    def segmentation(self, form: SegForm) -> Dataset | None:
        """None: nothing is segmented."""
        return None

    def groups(self, seg: Dataset | None) -> list[Group]:
        """A group per class of the input. Where each frame was judged: a group per frame and class that holds there,
        and one per class for all the frames that it does not hold for, with the highest certainty among them.
        """
        slices = self.subject.source_slices
        groups: list[Group] = []
        for label in sorted(self.subject.manifest.classes):
            mine = [measured for measured in self.measurements if measured.label == label]
            for measured in mine:
                if measured.holds:
                    seen = () if measured.frame is None else (slices[measured.frame],)
                    groups.append(self._report(codes.SCT.Present, [measured], seen))
            for value, others in (
                (codes.SCT.Absent, [each for each in mine if not each.holds and each.score is not None]),
                (codes.SCT.Undetermined, [each for each in mine if each.score is None]),
            ):
                if others:
                    seen = [slices[each.frame] for each in others if each.frame is not None]
                    groups.append(self._report(value, others, seen))
        return groups

    def _report(self, value: PydicomCode, alike: Sequence[MeasuredClass], seen: Sequence[SliceRef]) -> Group:
        """One group for judgements of one class that are alike."""
        first = alike[0]
        number = None if first.frame is None or len(alike) > 1 else first.frame + 1
        highest = max((measured.score for measured in alike if measured.score is not None), default=None)
        derivation = codes.SCT.Maximum if len(alike) > 1 else None
        track = ("class", str(first.label), value.meaning, str(number))
        return report_presence(
            describe(self.subject, self.subject.meaning(first.label), *track, number=number),
            value,
            certainty=None if highest is None else measure_certainty(highest, derivation),
            seen=seen,
        )

    def panels(self) -> list[Panel]:
        """The image, or frames of it with what holds for each."""
        source = self.subject.source
        if all(measured.frame is None for measured in self.measurements):
            if isinstance(source, Volume):
                return show_sections(source)
            return [show_at(source, index, ()) for index in spread(0, len(source.frames) - 1, _SHOWN)]
        panels = []
        none = CATALOGUE[self.subject.house.language].none
        for index in spread(0, len(self.subject.source_slices) - 1, _SHOWN):
            holding = [
                f"{measured.name} {100 * (measured.score or 0):.0f} %"
                for measured in self.measurements
                if measured.frame == index and measured.holds
            ]
            if isinstance(source, Volume):
                panels.append(show_at(source, index, ()))
            else:
                panels.append(show_frame(source, index, said=", ".join(holding) or none))
        return panels

    def lines(self) -> list[Line]:
        """Each class with its score; where the frames were judged, its highest and how many frames it holds for."""
        words = CATALOGUE[self.subject.house.language]
        frames = len({measured.frame for measured in self.measurements})
        lines = []
        for label, finding in sorted(self.subject.manifest.classes.items()):
            mine = [measured for measured in self.measurements if measured.label == label]
            scores = [measured.score for measured in mine if measured.score is not None]
            holding = sum(measured.holds for measured in mine)
            if not scores:
                lines.append(Line(label, finding.name, note=words.no_score, found=None))
                continue
            cells = () if frames == 1 else (Cell(words.frames, f"{holding} / {frames}"),)
            held = holding > 0
            lines.append(
                Line(label, finding.name, cells, part=max(scores), strong=held, found=held, weight=max(scores))
            )
        return lines

    def key_slices(self) -> list[int]:
        """Where frames were judged, those on which a class holds with the highest certainty: of each class its best
        frame first, so that a frequent class does not hide a rare one.
        """
        ranked: list[tuple[int, float, int]] = []
        for label in self.subject.manifest.classes:
            mine = [
                (-(each.score or 0), each.frame)
                for each in self.measurements
                if each.label == label and each.holds and each.frame is not None
            ]
            ranked += [(place, score, frame) for place, (score, frame) in enumerate(sorted(mine))]
        return list(dict.fromkeys(frame for _, _, frame in sorted(ranked)))[:MOST_KEY_SLICES]

    def outlines(self) -> list[Outline]:
        """None: a class has no place on its frame."""
        return []


def _decide(
    subject: Subject, values: Mapping[int, float], frame: int | None, *, exclusive: bool
) -> list[MeasuredClass]:
    for label, score in values.items():
        name = subject.meaning(label).name
        if not 0 <= score <= 1:
            raise OutputRefused(f"the model returned the score {score:g} for {name}, which is not from 0 to 1")
    if not values:
        raise OutputRefused("the model returned a classification without a score")
    winner = max(sorted(values), key=lambda label: values[label])
    return [
        MeasuredClass(
            label,
            finding.name,
            frame,
            values.get(label),
            label == winner if exclusive else values.get(label, -1.0) >= subject.manifest.score_min,
        )
        for label, finding in sorted(subject.manifest.classes.items())
    ]
