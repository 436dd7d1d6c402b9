"""Whatever the headers of readable images hold, their results can be made and written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset

from node.dicom.assembly import assemble_volumes
from node.dicom.header import read_header
from node.dicom.pixels import read_input
from node.dicom.volume import Volume
from node.errors import InputRefused
from node.infer.results import Labelmap
from node.report.findings import measure
from node.report.results import make_results
from node.report.subject import Subject
from tests.dicom.test_damage import VALUES, computed_tomography, damage, multiframe
from tests.report.cases import CREATED, make_package

KEYWORDS = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName", "StudyDescription", "SpecificCharacterSet", "TimezoneOffsetFromUTC",
    "ReferencedStudySequence", "ReferencedPatientSequence", "ReferencedPerformedProcedureStepSequence", "PatientAge",
    "PatientWeight", "PatientSize", "SliceThickness", "SpacingBetweenSlices", "FrameOfReferenceUID", "Modality",
    "PositionReferenceIndicator", "PatientOrientation", "ImageOrientationPatient", "ImagePositionPatient",
    "PixelSpacing", "StudyInstanceUID", "SeriesInstanceUID", "ImagerPixelSpacing", "OtherPatientIDs", "EthnicGroup",
    "PatientComments", "IssuerOfPatientID", "ClinicalTrialSubjectID", "SeriesNumber", "Laterality",
)  # fmt: skip


NAMES = {
    "": "Nemo^Secret",
    "ISO_IR 6": "Nemo^Secret",
    "ISO_IR 100": "M\u00fcller^J\u00fcrgen",
    "GB18030": "Wang^XiaoDong=\u738b^\u5c0f\u4e1c",
    "GBK": "Wang^XiaoDong=\u738b^\u5c0f\u4e1c",
    "\\ISO 2022 IR 87": "Yamada^Tarou=\u5c71\u7530^\u592a\u90ce",
    "\\ISO 2022 IR 149": "Hong^Gildong=\ud64d^\uae38\ub3d9",
    "ISO_IR 192": "Wang^XiaoDong=\u738b^\u5c0f\u4e1c",
}


@pytest.mark.parametrize("character_set", NAMES)
def test_a_name_is_the_same_in_results_whatever_its_character_set(tmp_path: Path, character_set: str) -> None:
    name = NAMES[character_set]
    computed_tomography(tmp_path)
    for path in tmp_path.iterdir():
        dataset = dcmread(path)
        dataset.SpecificCharacterSet = character_set.split("\\") if "\\" in character_set else character_set
        dataset.PatientName = name
        dataset.save_as(path)
    (result, report) = results_of(sorted(tmp_path.iterdir()))
    assert str(result.PatientName) == name
    assert str(report.PatientName) == name


@pytest.mark.parametrize("sex", ["U", "X", "FEMALE", ["M", "F"]])
def test_a_sex_that_dicom_does_not_know_is_left_empty(tmp_path: Path, sex: str | list[str]) -> None:
    computed_tomography(tmp_path)
    for path in tmp_path.iterdir():
        dataset = dcmread(path)
        dataset.PatientSex = sex
        dataset.save_as(path)
    assert [result.PatientSex for result in results_of(sorted(tmp_path.iterdir()))] == ["", ""]


def test_a_modality_of_two_values_makes_results(tmp_path: Path) -> None:
    computed_tomography(tmp_path)
    for path in tmp_path.iterdir():
        dataset = dcmread(path)
        dataset.Modality = ["CT", "PT"]
        dataset.save_as(path)
    assert [result.Modality for result in results_of(sorted(tmp_path.iterdir()))] == ["SEG", "SR"]


@pytest.mark.parametrize("make", [computed_tomography, multiframe])
@settings(max_examples=30, deadline=None)
@given(
    changes=st.lists(
        st.tuples(st.sampled_from(KEYWORDS), st.one_of(st.none(), st.sampled_from(VALUES), st.binary(max_size=12))),
        min_size=1,
        max_size=2,
    )
)
def test_damaged_headers_make_results(make: Callable[[Path], None], changes: list[tuple[str, bytes | None]]) -> None:
    with TemporaryDirectory() as folder:
        make(Path(folder))
        for path in sorted(Path(folder).iterdir()):
            # Last, as what pydicom reads and writes in an unknown character set is no longer what was damaged.
            for keyword, value in sorted(changes, key=lambda change: change[0] == "SpecificCharacterSet"):
                damage(path, keyword, value, 0)
        results_of(sorted(Path(folder).iterdir()))


def results_of(paths: list[Path]) -> list[Dataset]:
    """What is written of the volumes of these files, read again."""
    headers: dict[Path, Dataset] = {}
    for path in paths:
        with suppress(InputRefused):  # a character set that is none can make a file unreadable
            headers[path] = read_header(path)
    assembly = assemble_volumes(headers)
    written: list[Dataset] = []
    for plan in assembly.volumes:
        try:
            source = read_input(plan)
        except InputRefused:
            continue
        assert isinstance(source, Volume)
        package = make_package()
        labels = np.full(source.array.shape, min(package.manifest.segments), np.uint16)
        subject = Subject(
            key="k", created=CREATED, source=source, sources=plan.headers, manifest=package.manifest,
            prediction=Labelmap(labels, source.grid), model_name=package.name,
            model_version=package.version, model_digest=package.digest, node_version="0",
        )  # fmt: skip
        for result in make_results(measure(subject)):
            written.append(dcmread(BytesIO(result.encode())))
            assert written[-1].SOPInstanceUID == result.sop_instance_uid
    return written
