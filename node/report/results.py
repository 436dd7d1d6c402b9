"""All result objects of one run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

from pydicom.dataset import Dataset
from pydicom.uid import UID

from node.dicom.uid import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION
from node.infer.results import Labelmap
from node.report.findings import Findings
from node.report.gsps import make_gsps
from node.report.keys import make_keys
from node.report.kinds import Kind, SegForm, Wanted
from node.report.overlay import make_overlay
from node.report.parametric import make_maps, make_saliency_maps
from node.report.quiet import quietly
from node.report.rtstruct import make_rtstruct
from node.report.sr import make_sr
from node.report.subject import Subject
from node.report.summary import make_summary


@dataclass(frozen=True)
class Result:
    """One DICOM object."""

    name: str  # of its file and in lists: seg, sr, overlay-001
    dataset: Dataset
    kind: Kind | None = None  # None for what the model made itself
    forms: Collection[SegForm] = ()  # for whom it is: takers of these forms of segmentation; none: for all

    @property
    def sop_instance_uid(self) -> str:
        """Its UID."""
        return str(self.dataset.SOPInstanceUID)

    @property
    def sop_class_uid(self) -> str:
        """Its SOP class."""
        return str(self.dataset.SOPClassUID)

    def encode(self) -> bytes:
        """The DICOM file (PS3.10): the same bytes for the same object."""
        buffer = BytesIO()
        self.write(buffer)
        return buffer.getvalue()

    def write(self, file: BinaryIO) -> None:
        """Write the DICOM file to an open one; the pixels of a large SEG are made meanwhile and never held."""
        meta = self.dataset.file_meta  # pyright: ignore[reportAttributeAccessIssue]
        meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
        meta.ImplementationVersionName = IMPLEMENTATION_VERSION
        self.dataset.save_as(file, enforce_file_format=True)


# The kinds beside SEG and SR, which need each other: each from the findings alone, in the order in which they are sent.
_FURTHER: dict[Kind, Callable[[Findings], list[Dataset]]] = {
    Kind.SUMMARY: lambda findings: [make_summary(findings)],
    Kind.OVERLAY: make_overlay,
    Kind.MAP: lambda findings: _make_maps(findings.subject),
    Kind.KEYS: lambda findings: _if_any(make_keys(findings, {})),
    Kind.GSPS: make_gsps,
    Kind.RTSTRUCT: make_rtstruct,
}


def make_results(findings: Findings, wanted: Wanted | None = None) -> tuple[Result, ...]:
    """The objects of a run, those first to which others refer."""
    wanted = wanted or Wanted()
    with quietly():
        return tuple(_make(findings, wanted))


def _make(findings: Findings, wanted: Wanted) -> Iterator[Result]:
    if Kind.SEG in wanted.kinds or Kind.SR in wanted.kinds:
        for form, takers in _forms(findings.subject, wanted).items():
            results = list(_make_report(findings, form, takers, wanted))
            yield from results
            if not results or not results[0].forms:  # nothing is segmented: one report for all
                break
    for kind, make in _FURTHER.items():
        if kind in wanted.kinds:
            datasets = make(findings)
            for number, dataset in enumerate(datasets, 1):
                yield Result(str(kind) if len(datasets) == 1 else f"{kind}-{number:03d}", dataset, kind)


def _if_any(dataset: Dataset | None) -> list[Dataset]:
    return [] if dataset is None else [dataset]


def _make_maps(subject: Subject) -> list[Dataset]:
    """The probabilities of a segmentation, or what a classifier's scores came from, whichever there is."""
    if isinstance(subject.prediction, Labelmap):
        return make_maps(subject)
    return [] if subject.saliency is None else make_saliency_maps(subject, subject.saliency)


def _forms(subject: Subject, wanted: Wanted) -> dict[SegForm, list[SegForm]]:
    """The forms to make, each with those whose takers get it: whoever takes probabilities gets a plain segmentation
    of a model that gives none.
    """
    prediction = subject.prediction
    fractional = isinstance(prediction, Labelmap) and prediction.probabilities is not None
    forms: dict[SegForm, list[SegForm]] = {}
    for form in wanted.forms:
        made = SegForm.BINARY if form is SegForm.FRACTIONAL and not fractional else form
        forms.setdefault(made, []).append(form)
    return forms


def _make_report(findings: Findings, form: SegForm, takers: list[SegForm], wanted: Wanted) -> Iterator[Result]:
    """The SEG in one form and the report that refers to it; the report alone of findings that are no segments."""
    seg = findings.segmentation(form)
    suffix = "" if seg is None or form is SegForm.BINARY else f"-{form}"
    served = () if seg is None else takers
    if seg is not None and Kind.SEG in wanted.kinds:
        yield Result(f"seg{suffix}", seg, Kind.SEG, served)
    if Kind.SR in wanted.kinds:
        about = [] if seg is None else [seg]
        report = make_sr(findings.subject, findings.groups(seg), about=about, name=f"sr{suffix}")
        yield Result(f"sr{suffix}", report, Kind.SR, served)
