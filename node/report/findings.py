"""What is reported of a prediction, whatever kind it is: the one place that asks for the kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pydicom.dataset import Dataset

from node.infer.results import Boxes, DicomObjects, Labelmap, Landmarks, Scores
from node.report.boxes import BoxFindings
from node.report.kinds import SegForm
from node.report.landmarks import LandmarkFindings
from node.report.outlines import Outline
from node.report.page import Line, Panel
from node.report.scores import ScoreFindings
from node.report.segments import SegmentFindings
from node.report.sr import Group
from node.report.subject import Subject


class Measured(Protocol):
    """One finding with its numbers."""

    def rows(self) -> list[dict[str, Any]]:
        """One row for people per number: segment, measurement, value, unit."""
        ...


class Findings(Protocol):
    """One kind of prediction, measured. Making it raises `OutputRefused` for what is no result of these images."""

    @property
    def subject(self) -> Subject:
        """What it is of."""
        ...

    @property
    def measurements(self) -> Sequence[Measured]:
        """The findings and their numbers."""
        ...

    def segmentation(self, form: SegForm) -> Dataset | None:
        """The segmentation, in a form that the prediction has; None where there is nothing segmented."""
        ...

    def groups(self, seg: Dataset | None) -> list[Group]:
        """The report's measurement groups, at least one; they refer to the segmentation, where there is one."""
        ...

    def panels(self) -> list[Panel]:
        """What the preview shows."""
        ...

    def lines(self) -> list[Line]:
        """What the preview lists."""
        ...

    def key_slices(self) -> list[int]:
        """The slices or frames that matter, by their index in the input's array, the most important first; a few."""
        ...

    def outlines(self) -> list[Outline]:
        """Each finding on each slice or frame that it lies on; none where the findings have no place."""
        ...


def measure(subject: Subject) -> Findings:
    """The findings of the subject's prediction."""
    match subject.prediction:
        case Labelmap():
            return SegmentFindings(subject)
        case Boxes() as boxes:
            return BoxFindings(subject, boxes)
        case Landmarks() as landmarks:
            return LandmarkFindings(subject, landmarks)
        case Scores() as scores:
            return ScoreFindings(subject, scores)
        case DicomObjects():
            raise TypeError("finished objects are no findings of radnode's own")
