"""`radnode demo` end to end: phantom, node, PACS, results, and nothing left behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
from PIL import Image
from pydicom import dcmread

from node.demo.pacs import FolderPacs
from node.demo.phantom import LEFT_LUNG, RIGHT_LUNG

ROOT = Path(__file__).parents[2]


def processes_marked(mark: str) -> list[list[str]]:
    """Command lines of running processes whose environment holds a mark: all that the demonstration started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DEMO_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.cmdline())
        except psutil.Error:
            continue
    return found


def test_the_demonstration_measures_its_phantom_and_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    # `Orthanc.program` also looks into /usr/sbin and the like: the stand-in says that there is none.
    program = (
        "import sys; from node.demo.pacs import Orthanc; Orthanc.program = staticmethod(lambda: None); "
        "from node.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, "demo", "--out", str(out)],
        cwd=ROOT, env=os.environ | {"DEMO_MARK": str(out)}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"PACS: {FolderPacs.name}" in done.stdout
    held = {dataset.Modality: dataset for dataset in map(dcmread, (out / "pacs" / "objects").glob("*.dcm"))}
    assert held.keys() == {"SEG", "SR"}
    for kind, dataset in (("seg", held["SEG"]), ("sr", held["SR"])):
        assert dcmread(out / "results" / f"{kind}.dcm").SOPInstanceUID == dataset.SOPInstanceUID
    said = dict(re.findall(r"^(Right lung|Left lung) +([\d.]+) +[\d.]+ +[+-][\d.]+ %", done.stdout, re.MULTILINE))
    by_name = {"Right lung": RIGHT_LUNG, "Left lung": LEFT_LUNG}
    assert said.keys() == by_name.keys()
    voxel_ml = 2.5 * 1.5 * 1.5 / 1000
    voxels = {segment.SegmentLabel: 0 for segment in held["SEG"].SegmentSequence}
    labels = [segment.SegmentLabel for segment in held["SEG"].SegmentSequence]
    for frame, groups in zip(held["SEG"].pixel_array, held["SEG"].PerFrameFunctionalGroupsSequence, strict=True):
        voxels[labels[groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber - 1]] += int((frame > 0).sum())
    for name, lung in by_name.items():
        assert abs(float(said[name]) / lung.volume_ml - 1) < 0.02, f"{name}: {said[name]} mL, known {lung.volume_ml}"
        assert abs(voxels[name] * voxel_ml - float(said[name])) < 0.1
    with Image.open(out / "results" / "preview.png") as picture:
        picture.load()
    deadline = time.monotonic() + 10  # what was told to end may take a moment
    while (left := processes_marked(str(out))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
