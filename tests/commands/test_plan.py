"""`radnode plan`: what it reads, what it tells, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from node.cli import main

PLAN = ["plan", "--studies-per-day", "2000", "--images-per-study", "100"]


def bench_file(folder: Path, name: str, infer_s: float, around_s: float, device: str = "cuda") -> str:
    """What `models bench --json` prints, as far as a plan reads it."""
    rows = [("read", None, around_s), ("infer", None, infer_s), ("network", "infer", infer_s / 2)]
    stages = [{"stage": stage, "part_of": part, "seconds": seconds} for stage, part, seconds in rows]
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"model": name, "device": device, "stages": stages}))
    return str(path)


def told(capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    main([*PLAN, *options, "--json"])
    return json.loads(capsys.readouterr().out)


def test_slots_for_measured_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "lungs", "--bench", bench_file(tmp_path, "lungs", 20, 10), "--days", "2"]
    assert main([*PLAN, *options]) == 0
    out = capsys.readouterr().out
    for part in (
        "2,000 studies a day",
        "worker slots (GPU)",
        "the goal of 60 s is kept",
        "next bottleneck: worker slots",
    ):
        assert part in out
    alone = told(capsys, *options, "--no-overlap")
    assert (alone["holds"], alone["slot_kind"], alone["simulated"]["days"]) == (True, "GPU", 2)
    assert alone["models"][0]["slot"]["fixed_s"] == pytest.approx(30.1)
    overlapping = told(capsys, *options)
    assert overlapping["models"][0]["slot"]["fixed_s"] == 20
    assert overlapping["models"][0]["beside"]["fixed_s"] == pytest.approx(10.1)
    assert overlapping["wait_p95_s"] < alone["wait_p95_s"]
    assert told(capsys, *options) == overlapping


def test_too_few_slots_are_told_and_fail(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "lungs", "--time", "lungs=30", "--slots", "1", "--days", "1"]
    assert main([*PLAN, *options]) == 1
    out = capsys.readouterr().out
    assert "the goal of 60 s is MISSED" in out
    assert "in the busiest hour more comes than is done" in out


def test_a_database_that_cannot_keep_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "--model", "m", "--time", "m=1", "--time", "database=90+0/image", "--days", "1")
    assert found["bottleneck"]["stage"] == "database"
    assert "nodes with a database each" in found["bottleneck"]["sentence"]


def test_a_model_is_measured_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    from tests.dicom.slices import write_series
    from tests.infer.tiny import MANIFEST, bundle_files, write

    folder = write(tmp_path / "marker", bundle_files() | {"dicom.yaml": MANIFEST.encode()})
    array = np.zeros((6, 8, 10), np.int16)
    array[2:4] = 900
    write_series(tmp_path / "study", array)
    found = told(capsys, "--model", f"{folder}/", "--study", str(tmp_path / "study"), "--device", "cpu", "--days", "1")
    assert found["models"][0]["slot"]["fixed_s"] > 0.1
    assert found["slot_kind"] == "CPU"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--model", "lungs"], "nothing says how long lungs takes"),
        (["--model", "lungs", "--time", "lungs=1", "--time", "paint=1"], "expected a model of this plan or one of"),
        (["--model", "lungs", "--bench", "none.json"], "none.json cannot be read"),
        (["--model", "lungs", "--bench", __file__], "is not what `radnode models bench"),
    ],
)
def test_what_is_missing_is_said(options: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, *options]) == 1
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "lungs=2"], ["--model", "=1"], ["--time", "lungs"], ["--time", "lungs=fast"], ["--goal", "60"],
        ["--goal", "0s"], ["--hours", "19-7"], ["--hours", "7-25"], ["--slots", "0"], ["--images-per-study", "-1"],
    ],
)  # fmt: skip
def test_wrong_words_are_wrong_use(options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*PLAN, *options])
    assert ended.value.code == 2
