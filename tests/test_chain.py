"""From scanner to PACS over real sockets: storescu sends, `radnode serve` works, Orthanc holds the results."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.dataset import Dataset

from node.archive.open import open_archive
from node.config import load_config
from node.demo.pacs import Orthanc, free_port
from tests.running_node import RunningNode, wait_until

PHILIPS = "chest_ct_philips"
SIEMENS = "chest_ct_siemens"
SEG, SR = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.88.34"


def study_uid_of(folder: Path) -> str:
    return str(dcmread(next(folder.rglob("*.dcm")), stop_before_pixels=True).StudyInstanceUID)


def results_in(orthanc: Orthanc, study_uid: str) -> dict[str, Dataset]:
    """The results that the PACS holds, by SOP class; fails when there are two of one kind."""
    found = list(orthanc.instances(study_uid).values())
    by_class = {str(dataset.SOPClassUID): dataset for dataset in found}
    assert len(by_class) == len(found), f"several results of one kind: {[d.SOPClassUID.name for d in found]}"
    return by_class


@pytest.fixture
def node(tmp_path: Path, pacs: Orthanc) -> Iterator[RunningNode]:
    running = RunningNode(tmp_path, pacs.port)
    running.start()
    yield running
    running.kill_all()


@pytest.mark.parametrize("name", [PHILIPS, SIEMENS])
def test_a_chest_ct_comes_back_as_seg_and_sr(
    node: RunningNode, pacs: Orthanc, shared_data: Path, tmp_path: Path, name: str
) -> None:
    study_uid = study_uid_of(shared_data / name)
    node.send(shared_data / name)
    shown = node.wait_for(study_uid, "done")
    assert [job["state"] for job in shown["jobs"]] == ["done"]
    results = results_in(pacs, study_uid)
    assert set(results) == {SEG, SR}
    check_on_the_grid_of_the_ct(results[SEG], shared_data / name, tmp_path)
    story = " / ".join(event["what"] for event in shown["events"])
    for part in ("first instance received from STORESCU", "complete with", "attempt 1 started", "delivered to pacs"):
        assert part in story


def check_on_the_grid_of_the_ct(seg: Dataset, source: Path, tmp_path: Path) -> None:
    """dcmqi reads the SEG; what it reads lies on the grid of the series that the SEG refers to, and left is left."""
    file = tmp_path / "seg.dcm"
    seg.save_as(file)
    out = tmp_path / "seg"
    out.mkdir()
    subprocess.run(["segimage2itkimage", "--inputDICOM", file, "--outputDirectory", out, "-t", "nii"], check=True)
    series_uid = str(seg.ReferencedSeriesSequence[0].SeriesInstanceUID)
    files = [
        path for path in source.rglob("*.dcm") if dcmread(path, stop_before_pixels=True).SeriesInstanceUID == series_uid
    ]
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(files[0].parent), series_uid)
    image = sitk.ReadImage(names)
    segments = [sitk.ReadImage(str(path)) for path in sorted(out.glob("*.nii*"))]
    labels = [str(segment.SegmentLabel) for segment in seg.SegmentSequence]
    assert len(segments) == 2
    centres = []
    for segment in segments:
        # dcmqi leaves out empty slices at the ends: the grid is the CT's, or a part of it.
        assert segment.GetSpacing() == pytest.approx(image.GetSpacing(), abs=1e-4)
        assert segment.GetDirection() == pytest.approx(image.GetDirection(), abs=1e-5)
        index = np.array(image.TransformPhysicalPointToContinuousIndex(segment.GetOrigin()))
        assert index == pytest.approx(np.round(index), abs=1e-3)
        assert segment.GetSize()[:2] == image.GetSize()[:2]
        voxels = np.argwhere(sitk.GetArrayFromImage(segment) > 0)
        litres = len(voxels) * np.prod(segment.GetSpacing()) / 1e6
        assert 0.5 < litres < 5
        centres.append(segment.TransformContinuousIndexToPhysicalPoint(voxels.mean(axis=0)[::-1].tolist())[0])
    by_label = dict(zip(labels, centres, strict=True))
    assert by_label["Left lung"] > by_label["Right lung"]  # LPS: +x is the patient's left


def test_reprocessing_leaves_one_seg_and_one_sr(node: RunningNode, pacs: Orthanc, shared_data: Path) -> None:
    study_uid = study_uid_of(shared_data / SIEMENS)
    node.send(shared_data / SIEMENS)
    node.wait_for(study_uid, "done")
    before = {uid: dataset.to_json() for uid, dataset in pacs.instances(study_uid).items()}
    first = [delivery["delivered"] for delivery in node.json("deliveries", "list")]
    assert "queued" in node.command("reprocess", "--study", study_uid).stdout
    shown = node.wait_for(study_uid, "done")
    assert {uid: dataset.to_json() for uid, dataset in pacs.instances(study_uid).items()} == before
    assert len(before) == 2
    assert all(delivery["state"] == "delivered" for delivery in shown["deliveries"])
    assert len(first) == len(shown["deliveries"]) == 2
    assert [event["what"] for event in shown["events"]].count("seg delivered to pacs") == 2


def test_what_no_route_wants_is_kept_and_disturbs_nothing(node: RunningNode, pacs: Orthanc, shared_data: Path) -> None:
    compressed = shared_data / "compressed"
    options = {"mr_rle": "-xr", "mr_jpegls": "-xt", "mr_jpeg": "-xs", "mr_j2k": "-xv"}
    for folder, option in options.items():
        node.send(compressed / folder, options=[option])
    node.send(shared_data / "abdomen_ct_ge", shared_data / PHILIPS, shared_data / SIEMENS)
    others = [file for file in compressed.iterdir() if file.is_file()]
    subprocess.run(
        ["dcmsend", "-dn", "-nuc", "-nh", "-aet", "STORESCU", "-aec", "RADNODE", "127.0.0.1", str(node.port), *others],
        check=False,  # dcmsend itself cannot send HTJ2K; what it can send must be kept
        capture_output=True,
    )
    for name in (PHILIPS, SIEMENS):
        node.wait_for(study_uid_of(shared_data / name), "done")
    wait_until(
        lambda: not any(s["state"] in ("receiving", "queued", "running") for s in node.json("studies", "list")),
        90,
        "rest",
    )
    studies = {study["study"]: study for study in node.json("studies", "list")}
    unwanted = studies[study_uid_of(compressed / "mr_rle")]
    assert unwanted["state"] == "unwanted"
    assert "Modality" in unwanted["reason"]
    assert "chest CT" in unwanted["reason"]
    # The four MR series are one series in four encodings; dcmsend of DCMTK 3.6.7 cannot send HTJ2K nor deflated frames.
    assert sum(study["instances"] for study in studies.values()) == 64 + 60 + 41 + 4 + 4
    assert all(study["reason"] for study in studies.values() if study["state"] != "done")


@pytest.mark.parametrize("role", ["receive", "schedule", "work", "deliver", "supervisor"])
def test_a_killed_process_costs_nothing(tmp_path: Path, pacs: Orthanc, shared_data: Path, role: str) -> None:
    """kill -9 of one process while the study is on its way, at the moment when that process holds it."""
    node = RunningNode(tmp_path, pacs.port)
    node.start()
    try:
        study_uid = study_uid_of(shared_data / SIEMENS)
        node.send(shared_data / SIEMENS / "soft_kernel_B40f")
        if role in ("work", "supervisor"):
            wait_until(lambda: any(job["state"] == "running" for job in node.json("jobs", "list")), 60, "the job runs")
        node.processes()[role].kill()
        if role == "receive":
            wait_until(lambda: "receive" in node.processes(), 20, "a new receiver")
        if role == "supervisor":
            assert node.process is not None
            node.process.wait(10)
            wait_until(lambda: not node.processes(), 60, "the children of the killed supervisor are gone")
            node.start()
        node.wait_for(study_uid, "done")
        assert set(results_in(pacs, study_uid)) == {SEG, SR}
        wait_until(
            lambda: set(node.processes()) == {"receive", "schedule", "work", "deliver", "supervisor"}, 30, "all run"
        )
        node.send(shared_data / SIEMENS / "lung_kernel_B70f")  # the receiver takes the late series: a new revision
        wait_until(lambda: node.json("studies", "show", study_uid)["study"]["revision"] == 2, 30, "revision 2")
        node.wait_for(study_uid, "done")
    finally:
        node.kill_all()


def test_a_stop_drains_and_a_start_goes_on(node: RunningNode, pacs: Orthanc, shared_data: Path) -> None:
    study_uid = study_uid_of(shared_data / SIEMENS)
    node.send(shared_data / SIEMENS)
    assert node.stop() == 0
    assert node.processes() == {}
    config = load_config(node.config)
    archive = open_archive(config)
    assert archive.study(study_uid).instances == 60
    archive.close()
    node.start()
    node.wait_for(study_uid, "done")
    assert set(results_in(pacs, study_uid)) == {SEG, SR}


def test_a_pacs_that_is_down_gets_the_results_when_it_is_back(tmp_path: Path, shared_data: Path) -> None:
    pacs = Orthanc(tmp_path / "orthanc", free_port())
    node = RunningNode(tmp_path, pacs.port)
    node.start()
    try:
        study_uid = study_uid_of(shared_data / SIEMENS)
        node.send(shared_data / SIEMENS)
        shown = node.wait_for(study_uid, "delivering")
        wait_until(
            lambda: "no DICOM answer" in node.json("studies", "show", study_uid)["reason"],
            20,
            "the reason says what the PACS does",
        )
        with pacs:
            node.wait_for(study_uid, "done")
            assert set(results_in(pacs, study_uid)) == {SEG, SR}
        assert shown["state"] == "delivering"
    finally:
        node.kill_all()
