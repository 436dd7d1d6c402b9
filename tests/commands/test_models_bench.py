"""`radnode models bench`: stages, memory, and the share that is not the network, of a model that really runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from node.cli import main
from node.commands.models_bench import ResidentMemory, Run, resident_bytes, summarise
from node.memory import give_back
from tests.dicom.slices import write_series
from tests.infer.tiny import MANIFEST, bundle_files, write


def test_stages_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "marker", bundle_files() | {"dicom.yaml": MANIFEST.encode()})
    array = np.zeros((6, 8, 10), np.int16)
    array[1:4, 2:5, 3:9] = 900
    write_series(tmp_path / "study", array)
    command = ["models", "bench", f"{folder}/", "study", "--repeat", "2", "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    stages = {row["stage"]: row for row in told["stages"]}
    assert list(stages) == ["read", "infer", "preprocess", "network", "postprocess", "measure", "report", "encode"]
    assert all(row["seconds"] > 0 for row in stages.values())
    inside = sum(stages[part]["seconds"] for part in ("preprocess", "network", "postprocess"))
    assert inside <= stages["infer"]["seconds"] * 1.01
    assert 0 < told["not_network"] < 1
    assert (told["repeats"], told["inputs"], told["device"]) == (2, {"image": [6, 8, 10]}, "cpu")
    assert told["peak_resident"] > 100_000_000  # torch alone is more
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "marker 0.1.0 on cpu" in out
    assert "median of 2 runs" in out
    assert "of a study's time is not the network" in out


@pytest.mark.parametrize("repeat", ["0", "-1", "x"])
def test_number_of_runs_is_at_least_one(repeat: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["models", "bench", "marker", "study", "--repeat", repeat])
    assert ended.value.code == 2


def test_two_studies_are_not_measured_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "marker", bundle_files() | {"dicom.yaml": MANIFEST.encode()})
    for name in ("one", "two"):
        write_series(tmp_path / "studies" / name, np.zeros((3, 4, 5), np.int16))
    assert main(["models", "bench", f"{folder}/", str(tmp_path / "studies")]) == 1
    assert "holds 2 studies: one is measured at a time" in capsys.readouterr().err


def test_medians_and_peaks_over_the_runs() -> None:
    def run(read: float, infer: float, network: float, resident: int) -> Run:
        seconds = {"read": read, "infer": infer, "network": network}
        return Run(seconds, dict.fromkeys(seconds, resident), {"infer": resident // 2})

    report = summarise([run(10, 10, 5, 100), run(1, 3, 3, 300), run(1, 7, 4, 200)])
    rows = {row["stage"]: row for row in report["stages"]}
    assert [rows[stage]["seconds"] for stage in rows] == [1, 7, 4]
    assert (rows["network"]["part_of"], rows["read"]["part_of"]) == ("infer", None)
    assert (rows["infer"]["resident"], rows["infer"]["cuda"], rows["read"]["cuda"]) == (300, 150, None)
    assert (report["total_s"], report["first_s"], report["peak_resident"]) == (8, 20, 300)
    assert report["not_network"] == pytest.approx(0.5)  # of 0.75, 0.25 and 0.5


def test_model_that_does_not_tell_its_network() -> None:
    report = summarise([Run({"read": 1, "infer": 2}, {"read": 1, "infer": 1}, {})])
    assert report["not_network"] is None


def test_memory_counts_children_and_what_is_gone_again() -> None:
    give_back()  # a command that ran in this process keeps what it freed
    before = resident_bytes()
    child = subprocess.Popen(
        [sys.executable, "-c", "held = bytearray(b'x') * 200_000_000; print(flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with child, ResidentMemory(every_s=0.005) as memory:
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdout.readline()
        assert resident_bytes() > before + 150_000_000
        began = time.monotonic()
        held = np.ones(50_000_000, np.uint64)
        time.sleep(0.1)
        del held
        ended = time.monotonic()
        child.stdin.write(b"\n")
    assert memory.peak(began, ended) > before + 500_000_000
    give_back()
    assert resident_bytes() < before + 300_000_000
    assert memory.peak(ended + 1000, ended + 1001) > 0
