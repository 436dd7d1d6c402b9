"""All result objects of one run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

from pydicom.dataset import Dataset
from pydicom.uid import UID

from node.dicom.uid import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION
from node.report.measure import SegmentMeasurements
from node.report.seg import make_seg
from node.report.sr import make_sr
from node.report.subject import Subject


@dataclass(frozen=True)
class Result:
    """One DICOM object."""

    kind: str  # seg, sr
    dataset: Dataset

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
        meta = self.dataset.file_meta  # pyright: ignore[reportAttributeAccessIssue]
        meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
        meta.ImplementationVersionName = IMPLEMENTATION_VERSION
        buffer = BytesIO()
        self.dataset.save_as(buffer, enforce_file_format=True)
        return buffer.getvalue()


def make_results(subject: Subject, measurements: Sequence[SegmentMeasurements]) -> tuple[Result, ...]:
    """The SEG (when anything was found) and the SR of a run."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The string ")  # highdicom quotes the patient's name
        return _make_results(subject, measurements)


def _make_results(subject: Subject, measurements: Sequence[SegmentMeasurements]) -> tuple[Result, ...]:
    if not any(measured.voxels for measured in measurements):
        return (Result("sr", make_sr(subject, measurements, None)),)
    seg = make_seg(subject)
    return Result("seg", seg), Result("sr", make_sr(subject, measurements, seg))
