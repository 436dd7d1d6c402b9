"""All result objects of one run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

from pydicom.dataset import Dataset
from pydicom.uid import UID

from node.dicom.uid import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION
from node.report.findings import Findings
from node.report.sr import make_sr


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
        buffer = BytesIO()
        self.write(buffer)
        return buffer.getvalue()

    def write(self, file: BinaryIO) -> None:
        """Write the DICOM file to an open one; the pixels of a large SEG are made meanwhile and never held."""
        meta = self.dataset.file_meta  # pyright: ignore[reportAttributeAccessIssue]
        meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
        meta.ImplementationVersionName = IMPLEMENTATION_VERSION
        self.dataset.save_as(file, enforce_file_format=True)


def make_results(findings: Findings) -> tuple[Result, ...]:
    """The objects of a run: what its kind of findings has, such as a SEG, and the SR."""
    with quietly():
        objects = findings.objects()
        report = make_sr(findings.subject, findings.groups(objects), about=list(objects.values()))
    return (*(Result(kind, dataset) for kind, dataset in objects.items()), Result("sr", report))


@contextmanager
def quietly() -> Iterator[None]:
    """Without highdicom's warning that quotes the patient's name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The string ")
        yield
