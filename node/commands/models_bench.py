"""`radnode models bench`: how long each stage of a model's run takes on a study of yours, and how much memory."""

from __future__ import annotations

import os
import platform
import statistics
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node.commands.output import print_json, print_table
from node.commands.run import find_model, key_of, plan_study, read_studies
from node.dicom.assembly import shape_of
from node.errors import InputRefused
from node.infer.package import Package
from node.memory import keep_freed

if TYPE_CHECKING:
    from node.analyse import Analysis
    from node.dicom.assembly import InputPlan
    from node.infer.model import DicomModel, Model

_INSIDE = ("preprocess", "network", "postprocess")  # parts of `infer`, as the model itself times them
_NOTES = (
    "resident is the most memory of this process and its children while the stage ran, read every 20 ms: a shorter "
    "peak is missed, and pages that two processes share count twice",
    "what a run frees is kept for the next one, as in a worker: a stage's resident memory holds that of those before",
    "the parts of infer follow one another in the order shown; infer holds what is between them too",
)


@dataclass(frozen=True)
class Run:
    """One run, from the files to the encoded results."""

    seconds: dict[str, float]  # per stage, in order; of `_INSIDE` too where the model tells
    resident: dict[str, int]  # bytes, the most while the stage ran
    cuda: dict[str, int]  # bytes, the most that torch had allocated on the device; empty without one

    @property
    def total_s(self) -> float:
        return sum(value for stage, value in self.seconds.items() if stage not in _INSIDE)


def bench(options: Namespace) -> int:
    """Run the model several times on the one study in the folder, and print medians."""
    keep_freed()
    report = measure_model(find_model(options.name, options), options.path, options.device, repeat=options.repeat)
    if options.json:
        print_json(report | {"notes": list(_NOTES)})
    else:
        _print(report)
    return 0


def measure_model(package: Package, study: Path, device: str, *, repeat: int) -> dict[str, Any]:
    """Medians of `repeat` runs of a model on the one study in a folder, as `--json` prints them."""
    plans = plan_study(package, _one_study(study))
    from node.infer.device import choose_device
    from node.infer.model import load_model

    device = choose_device(device)
    with ResidentMemory() as memory:
        began = time.monotonic()
        model = load_model(package, device)
        loaded = time.monotonic()
        load = {"seconds": loaded - began, "resident": memory.peak(began, loaded)}
        runs = [measure(package, model, plans, memory, device) for _ in range(repeat)]
    model.close()
    return summarise(runs) | {
        "model": package.name,
        "version": package.version,
        "device": device,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "inputs": {name: list(shape_of(plan)) for name, plan in plans.items()},
        "load": load,
    }


def measure(
    package: Package, model: Model | DicomModel, plans: Mapping[str, InputPlan], memory: ResidentMemory, device: str
) -> Run:
    """One run, timed."""
    from node.analyse import analyse

    begins: list[tuple[str, float]] = []
    cuda = _CudaPeaks(device)

    def begin(stage: str) -> None:
        cuda.end(begins[-1][0] if begins else "")
        begins.append((stage, time.monotonic()))

    analysis = analyse(package, model, plans, key=key_of(package, plans), created=datetime.now(UTC), progress=begin)
    begin("encode")
    for result in analysis.results:
        result.encode()
    begin("")
    return _gather(analysis, getattr(model, "seconds", {}), begins, memory, cuda.bytes)


def _gather(
    analysis: Analysis,
    inside: Mapping[str, float],
    begins: list[tuple[str, float]],
    memory: ResidentMemory,
    cuda: dict[str, int],
) -> Run:
    seconds: dict[str, float] = {}
    resident: dict[str, int] = {}
    for (stage, began), (_, ended) in pairwise(begins):
        seconds[stage] = analysis.seconds.get(stage, ended - began)
        resident[stage] = memory.peak(began, ended)
        if stage == "infer":
            place = began
            for part in _INSIDE:
                if part in inside:
                    seconds[part] = inside[part]
                    resident[part] = memory.peak(place, place + inside[part])
                    place += inside[part]
    return Run(seconds, resident, cuda)


def summarise(runs: list[Run]) -> dict[str, Any]:
    """Medians over the runs, and the share of the time that is not the network."""
    stages = list(runs[0].seconds)
    rows = [
        {
            "stage": stage,
            "part_of": "infer" if stage in _INSIDE else None,
            "seconds": statistics.median(run.seconds[stage] for run in runs),
            "resident": max(run.resident[stage] for run in runs),
            "cuda": max((run.cuda[stage] for run in runs if stage in run.cuda), default=None),
        }
        for stage in stages
    ]
    outside = [1 - run.seconds["network"] / run.total_s for run in runs if "network" in run.seconds and run.total_s]
    return {
        "repeats": len(runs),
        "stages": rows,
        "total_s": statistics.median(run.total_s for run in runs),
        "first_s": runs[0].total_s,
        "not_network": statistics.median(outside) if outside else None,
        "peak_resident": max(max(run.resident.values()) for run in runs),
    }


def _one_study(path: Path) -> dict[Path, Any]:
    studies = read_studies(path)
    if len(studies) != 1:
        raise InputRefused(f"{path} holds {len(studies)} studies: one is measured at a time, give its folder")
    return next(iter(studies.values()))


def _print(report: Mapping[str, Any]) -> None:
    shapes = "; ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in report["inputs"].items())
    print(f"{report['model']} {report['version']} on {report['device']} ({report['machine']}), {shapes}")
    load = report["load"]
    rows = [{"stage": "load, once", "seconds": load["seconds"], "resident": load["resident"], "cuda": None}]
    rows += [row | {"stage": ("  " if row["part_of"] else "") + row["stage"]} for row in report["stages"]]
    rows.append({"stage": "a study", "seconds": report["total_s"], "resident": report["peak_resident"], "cuda": None})
    print_table(
        [
            {
                "stage": row["stage"],
                "seconds": f"{row['seconds']:9.3f}",
                "resident": f"{row['resident'] / 1e9:6.2f} GB",
                "cuda": "" if row["cuda"] is None else f"{row['cuda'] / 1e9:6.2f} GB",
            }
            for row in rows
        ],
        ["stage", "seconds", "resident"] + (["cuda"] if any(row["cuda"] is not None for row in rows) else []),
        empty="",
    )
    first = f"; the first took {report['first_s']:.2f} s" if report["repeats"] > 1 else ""
    print(f"\nmedian of {report['repeats']} run{'s' * (report['repeats'] > 1)}{first}")
    if report["not_network"] is None:
        print("the model does not say how long its network took")
    else:
        print(f"{report['not_network']:.0%} of a study's time is not the network")
    for note in _NOTES:
        print(f"note: {note}")


class ResidentMemory(AbstractContextManager["ResidentMemory"]):
    """The resident memory of this process and its descendants, sampled by a thread for as long as it is open."""

    def __init__(self, every_s: float = 0.02):
        self._every_s = every_s
        self._samples: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="resident memory", daemon=True)

    def __enter__(self) -> ResidentMemory:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        self._thread.join()

    def peak(self, began: float, ended: float) -> int:
        """The most bytes between two times of `time.monotonic`; now, where no sample fell between them."""
        found = [value for moment, value in self._samples if began <= moment <= ended]
        return max(found, default=0) or resident_bytes()

    def _sample(self) -> None:
        while not self._stop.wait(self._every_s):
            self._samples.append((time.monotonic(), resident_bytes()))


def resident_bytes() -> int:
    """Of this process and all that descend from it (proc(5), statm)."""
    return sum(map(_resident_of, _family(os.getpid())))


def _family(process: int) -> Iterable[int]:
    yield process
    try:
        for task in os.listdir(f"/proc/{process}/task"):
            children = Path(f"/proc/{process}/task/{task}/children").read_text()
            for child in children.split():
                yield from _family(int(child))
    except OSError:
        return  # it has just ended


def _resident_of(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


class _CudaPeaks:
    """The most that torch had allocated on the device, stage by stage."""

    def __init__(self, device: str):
        self.bytes: dict[str, int] = {}
        self._read: Callable[[], int] | None = None
        self._reset: Callable[[], None] = lambda: None
        if device.startswith("cuda"):
            import torch

            self._read = lambda: torch.cuda.max_memory_allocated(device)
            self._reset = lambda: torch.cuda.reset_peak_memory_stats(device)

    def end(self, stage: str) -> None:
        """A stage ends, and the next begins."""
        if self._read is not None:
            if stage:
                self.bytes[stage] = self._read()
            self._reset()
