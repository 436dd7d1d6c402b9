"""Real studies with their results in an Orthanc of the tests' own, where OHIF finds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from node.analyse import Analysis, analyse
from node.commands.run import key_of, plan_study, read_studies
from node.deliver.dimse import Address, StoreSession
from node.demo.pacs import Orthanc
from node.dicom.volume import Volume
from node.infer.model import open_model
from node.infer.package import load_package
from node.infer.results import Boxes
from node.report.findings import measure
from node.report.kinds import SegForm
from node.report.results import Result, make_results
from node.report.rtstruct import make_rtstruct
from node.report.seg import make_seg
from node.report.subject import Subject
from tests.report.cases import CREATED
from tests.report.predictions import DETECTION, detect, make_subject

PACKAGE = Path(__file__).parents[2] / "models" / "ct_lung_reference"
PLUGINS = Path("/usr/share/orthanc/plugins")
PHILIPS, SIEMENS = "chest_ct_philips", "chest_ct_siemens"
MASS = 1  # the class of the radiologists' tumour in `detect`


@dataclass(frozen=True)
class Shown:
    """A volume and a result of it, as OHIF is asked to open them."""

    subject: Subject
    result: Dataset

    @property
    def volume(self) -> Volume:
        """The images."""
        return self.subject.volume

    @property
    def opened(self) -> tuple[str, str, str]:
        """UIDs of the study, of the images' series and of the result's."""
        return self.volume.study_uid, self.volume.series_uid, str(self.result.SeriesInstanceUID)


class Archive:
    """An Orthanc with the studies and what was made of them, each made when it is first asked for."""

    def __init__(self, shared_data: Path, folder: Path):
        assert (PLUGINS / "libOrthancDicomWeb.so").exists(), (
            "Orthanc's DICOMweb is not installed (Debian: apt-get install orthanc-dicomweb)"
        )
        self._shared_data = shared_data
        self._folder = folder
        self.orthanc = Orthanc(
            folder / "orthanc",
            options={
                "Plugins": [str(PLUGINS / "libOrthancDicomWeb.so")],
                "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
                # Orthanc 1.10 (Debian 12) is older than Label Map Segmentation Storage.
                "UnknownSopClassAccepted": True,
            },
        )

    @cached_property
    def philips(self) -> Analysis:
        """The lungs of the Philips chest; images, SEG and SR are stored."""
        analysis = self._analyse(PHILIPS)
        self._store(result.encode() for result in analysis.results)
        return analysis

    @cached_property
    def binary(self) -> Shown:
        """Its BINARY SEG."""
        return _of_kind(self.philips, "seg")

    @cached_property
    def measured(self) -> Shown:
        """Its SR."""
        return _of_kind(self.philips, "sr")

    @cached_property
    def structures(self) -> Shown:
        """Its structure set."""
        (structures,) = make_rtstruct(self.philips.findings)
        result = Result("rtstruct", structures)
        self._store([result.encode()])
        return Shown(self.philips.subject, result.dataset)

    @cached_property
    def labelmap(self) -> Shown:
        """The lungs of the Siemens chest as a LABELMAP SEG."""
        subject = self._analyse(SIEMENS).subject
        result = Result("seg", make_seg(subject, SegForm.LABELMAP))
        self._store([result.encode()])
        return Shown(subject, result.dataset)

    @cached_property
    def boxes(self) -> Shown:
        """The report of the radiologists' tumour and two made-up nodules in the Philips chest."""
        return self._report(dataclasses.replace(detect(self._shared_data), key="boxes"))

    @cached_property
    def mass_without_nodules(self) -> Shown:
        """The same without the nodules: the report says that there are none."""
        subject = self.boxes.subject
        assert isinstance(subject.prediction, Boxes)
        mass = Boxes(tuple(box for box in subject.prediction.boxes if box.label == MASS))
        return self._report(make_subject(subject.volume, subject.sources, mass, DETECTION, "mass"))

    def _report(self, subject: Subject) -> Shown:
        self.philips  # noqa: B018 its images
        (report,) = make_results(measure(subject))
        self._store([report.encode()])
        return Shown(subject, report.dataset)

    def _analyse(self, name: str) -> Analysis:
        """The lungs of a study whose images are stored, as `radnode run` finds them."""
        ((_, headers),) = read_studies(self._shared_data / name).items()
        self._send(headers)
        package = load_package(PACKAGE)
        plans = plan_study(package, headers)
        key = key_of(package, plans)
        with closing(open_model(package, "cpu", in_process=True)) as model:
            return analyse(package, model, plans, key=key, created=CREATED)

    def _store(self, contents: Iterable[bytes]) -> None:
        files = []
        for number, content in enumerate(contents):
            files.append(self._folder / f"result-{number}.dcm")
            files[-1].write_bytes(content)
        self._send(files)

    def _send(self, files: Iterable[Path]) -> None:
        files = list(files)
        address = Address(self.orthanc.ae_title, "127.0.0.1", self.orthanc.port, "RADNODE")
        with StoreSession(address, files) as session:
            for file in files:
                session.send(file)


def slices_that_differ(labels: NDArray[np.uint16]) -> tuple[int, int]:
    """Two slices on which a wrong picture is seen: where left and right differ most, and where the neighbours do."""
    first, second = ((labels == label).sum(axis=(1, 2)).astype(int) for label in (1, 2))
    lopsided = np.abs(first - second)
    changes = np.array([(labels[:-2] != labels[1:-1]).sum(axis=(1, 2)), (labels[1:-1] != labels[2:]).sum(axis=(1, 2))])
    # Of slices that hold much of both: among few pixels, small differences count much.
    much = np.minimum(first, second) > np.minimum(first, second).max() / 4
    share = np.where(much[1:-1], changes.min(axis=0) / np.maximum((first + second)[1:-1], 1), 0)
    return int(np.where(much, lopsided, 0).argmax()), int(share.argmax()) + 1


def _of_kind(analysis: Analysis, kind: str) -> Shown:
    (result,) = (result for result in analysis.results if result.name == kind)
    return Shown(analysis.subject, result.dataset)
