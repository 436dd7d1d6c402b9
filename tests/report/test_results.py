"""What holds for all results of a run: the same job makes the same bytes, another job other objects."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from node import __version__
from node.report.findings import measure
from node.report.house import House
from node.report.kinds import Kind, SegForm, Wanted
from node.report.negative import NoResult
from node.report.no_result import make_no_result
from node.report.rejection import RejectionReason, make_rejection
from node.report.results import Result, make_results
from tests.report.cases import SECOND, Case, dciodvfy_errors, draw_mask, make_case, make_package, run
from tests.report.conftest import CaseOf
from tests.report.geometries import small_subject


def uids_in(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Every UID of a data set with its keyword, at any depth."""
    for element in dataset.iterall():
        if element.VR == "UI":
            for value in [element.value] if isinstance(element.value, str) else element.value:
                yield element.keyword, str(value)


def own_uids(case: Case) -> dict[str, set[str]]:
    """The UIDs that radnode made, by what they are of."""
    found: dict[str, set[str]] = {}
    for kind, file in case.files.items():
        for keyword, uid in uids_in(dcmread(file)):
            if uid.startswith("2.25."):
                found.setdefault(f"{kind} {keyword}", set()).add(uid)
    return found


def test_the_same_job_makes_the_same_bytes(case_of: CaseOf, tmp_path: Path) -> None:
    first = case_of("siemens_ct")
    time.sleep(1.1)  # a clock's seconds would differ
    again = make_case(first.plan, draw_mask(first.plan.grid.shape), tmp_path)
    assert again.files.keys() == {"seg", "sr"}
    for kind, file in again.files.items():
        assert file.read_bytes() == first.files[kind].read_bytes(), kind


def test_another_process_makes_the_same_bytes(case_of: CaseOf, shared_data: Path, tmp_path: Path) -> None:
    """Nothing depends on the process: hash seeds, orders of sets, counters."""
    program = (
        "import sys; from pathlib import Path; from tests.report.cases import *; "
        "plan = plan_series(Path(sys.argv[1]), 'siemens_ct'); "
        "make_case(plan, draw_mask(plan.grid.shape), Path(sys.argv[2]))"
    )
    run("env", "PYTHONHASHSEED=4711", sys.executable, "-W", "ignore", "-c", program, shared_data, tmp_path)
    for kind, file in case_of("siemens_ct").files.items():
        assert (tmp_path / f"{kind}.dcm").read_bytes() == file.read_bytes(), kind


@pytest.mark.parametrize("changed", ["key", "version"])
def test_another_job_or_version_makes_other_uids(case_of: CaseOf, tmp_path: Path, changed: str) -> None:
    first = case_of("siemens_ct")
    mask = draw_mask(first.plan.grid.shape)
    if changed == "key":
        other = make_case(first.plan, mask, tmp_path, key="another job")
    else:  # the job's key holds the package's digest, which a new version changes
        other = make_case(first.plan, mask, tmp_path, key="job of 1.2.4", package=make_package("1.2.4"))
    ours, theirs = own_uids(first), own_uids(other)
    assert ours.keys() == theirs.keys()
    assert {"seg SOPInstanceUID", "seg SeriesInstanceUID", "sr SOPInstanceUID", "sr SeriesInstanceUID"} <= ours.keys()
    assert {"seg TrackingUID", "seg DimensionOrganizationUID", "sr UID"} <= ours.keys()
    for name in ours:
        shared = ours[name] & theirs[name]
        # The observing device is the same for another job of the same version, and radnode is radnode.
        same_device = {first.analysis.subject.device_uid} if changed == "key" and name == "sr UID" else set()
        assert shared == same_device, name


def test_all_uids_are_valid_and_no_two_objects_share_one(case: Case) -> None:
    objects = {kind: dcmread(file) for kind, file in case.files.items()}
    for dataset in objects.values():
        meta = dataset.file_meta
        assert meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
        assert meta.MediaStorageSOPClassUID == dataset.SOPClassUID
        for keyword, uid in [*uids_in(dataset), *uids_in(meta)]:
            assert len(uid) <= 64, keyword
            assert re.fullmatch(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+", uid), (keyword, uid)
    seg, sr = objects["seg"], objects["sr"]
    made = [seg.SOPInstanceUID, seg.SeriesInstanceUID, sr.SOPInstanceUID, sr.SeriesInstanceUID]
    assert len({*made, case.plan.series_uid, case.plan.study_uid}) == 6
    assert seg.StudyInstanceUID == sr.StudyInstanceUID == case.plan.study_uid


def test_files_say_which_software_wrote_them(case_of: CaseOf) -> None:
    for file in case_of("siemens_ct").files.values():
        meta = dcmread(file).file_meta
        assert meta.ImplementationVersionName == f"RADNODE_{__version__}"
        assert meta.ImplementationClassUID.startswith("2.25.")
        run("dcmftest", file)


def test_nothing_found_gives_a_report_and_no_seg(case_of: CaseOf, tmp_path: Path) -> None:
    plan = case_of("siemens_ct").plan
    case = make_case(plan, draw_mask(plan.grid.shape) * 0, tmp_path)
    assert list(case.files) == ["sr"]
    assert not (tmp_path / "seg.dcm").exists()


def test_no_warning_quotes_the_patient_s_name(case_of: CaseOf, capfd: pytest.CaptureFixture[str]) -> None:
    case = case_of("siemens_ct")
    assert case.plan.header.PatientName == "Lung_Dx-A0002"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_results(case.analysis.findings)
    said = " ".join(str(warning.message) for warning in caught) + "".join(capfd.readouterr())
    assert "Lung_Dx" not in said


def test_the_mask_decides_the_bytes(case_of: CaseOf, tmp_path: Path) -> None:
    """The comparison of bytes can fail: one voxel more is another file."""
    first = case_of("siemens_ct")
    mask = draw_mask(first.plan.grid.shape)
    mask[5, 3, 3] = SECOND
    other = make_case(first.plan, mask, tmp_path)
    for kind, file in other.files.items():
        assert file.read_bytes() != first.files[kind].read_bytes()


@pytest.mark.parametrize("character_set", ["", "ISO_IR 100"])
def test_the_site_s_own_words_are_readable_in_every_kind(tmp_path: Path, character_set: str) -> None:
    """Whatever character set the images have: a description in Greek is no row of question marks."""
    subject = small_subject(tmp_path, (6, 32, 32))
    headers = []
    for source in subject.sources:
        header = source[:]
        header.PatientName = "Mueller^A"
        if character_set:
            header.SpecificCharacterSet, header.PatientName = character_set, "Müller^Ä"
        headers.append(header)
    house = House(series_description="KI ungeprüft Λ {kind}", banner="KI ungeprüft Λ")
    subject = dataclasses.replace(subject, sources=tuple(headers), house=house)
    made = [*make_results(measure(subject), Wanted(tuple(Kind), tuple(SegForm)))]
    made += make_no_result(subject, NoResult.FAILED, "kein Λ", Wanted(tuple(Kind)))
    created = datetime(2026, 3, 4, tzinfo=UTC)
    note = make_rejection([header], RejectionReason.QUALITY, created=created, node_version="0", comment="Λ")
    made.append(Result("rejection", note))
    assert {result.kind for result in made} == {*Kind, None}
    for result in made:
        read = dcmread(BytesIO(result.encode()))
        assert "Λ" in str(read), result.name
        assert str(read.PatientName) == headers[0].PatientName, result.name
        assert "ungepr?" not in str(read), result.name


def test_a_report_without_its_segmentation_stands_by_itself(tmp_path: Path) -> None:
    """Its taker has the numbers, the finding, the images and their series; only the outlines are elsewhere."""
    subject = small_subject(tmp_path / "images", (7, 40, 48))
    (result,) = make_results(measure(subject), Wanted((Kind.SR,)))
    file = tmp_path / "sr.dcm"
    file.write_bytes(result.encode())
    assert dciodvfy_errors(file) == set()
    said = run("dsrdump", "+Pl", file)
    images = dcmread(file).CurrentRequestedProcedureEvidenceSequence
    assert {str(header.SOPInstanceUID) for header in subject.sources} <= {
        uid for item in images for _, uid in uids_in(item)
    }
    assert said.count(f'"Source Series for Segmentation")="{subject.source.series_uid}"') == 2
    assert said.count('NUM:(,,"Volume")=') == 2
    assert said.count('CODE:(,,"Finding")=') == 2
    assert said.count('IMAGE:(,,"Source")=(CT image,)') >= len(subject.sources)
