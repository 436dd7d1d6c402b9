"""`radnode run`: one model on a folder of DICOM files, with no service, no archive and no network."""

from __future__ import annotations

import re
import time
from argparse import Namespace
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from pydicom.dataset import Dataset

from node import memory
from node.commands.output import print_json, print_table
from node.commands.packages import model_paths
from node.dicom.assembly import InputPlan, assemble_volumes
from node.dicom.header import read_header, scan_folder
from node.dicom.naming import name_plan
from node.dicom.selection import select_input
from node.errors import InputRefused, RadnodeError
from node.infer.package import Package, find_package, load_package
from node.queue.jobs import job_key
from node.report.kinds import Wanted

if TYPE_CHECKING:
    from node.analyse import Analysis
    from node.infer.model import DicomModel, Model


def run(options: Namespace) -> int:
    """Run the model on every study in the folder; 1 when none of them gave a result."""
    package = find_model(options.model, options)
    with _Progress(("look for images", "load the model", "read", "infer", "measure", "report")) as progress:
        progress.begin("look for images")
        studies = read_studies(options.path)
        progress.begin("load the model")
        from node.analyse import analyse

        memory.keep_freed()
        outcomes = []
        wanted = Wanted(options.results, (options.seg,))
        with closing(_open_model(package, options)) as model:
            for study_uid, headers in studies.items():
                folder = options.out if len(studies) == 1 else options.out / study_uid
                try:
                    plans = plan_study(package, headers)
                    key = key_of(package, plans)
                    created = datetime.now(UTC)
                    analysis = analyse(
                        package, model, plans, key=key, created=created, wanted=wanted, progress=progress.begin
                    )
                    outcomes.append((study_uid, write_outcome(analysis, folder)))
                except RadnodeError as error:
                    outcomes.append((study_uid, error))
    return _tell(outcomes, package, as_json=options.json)


def _open_model(package: Package, options: Namespace) -> Model | DicomModel:
    """The model as a worker runs it, loaded: a package that cannot be is told once, and not for each study."""
    from node.infer.device import choose_device
    from node.infer.hosted import HostedModel
    from node.infer.model import open_model

    model = open_model(package, choose_device(options.device), in_process=options.in_process)
    if isinstance(model, HostedModel):
        model.load()
    return model


def find_model(name: str, options: Namespace) -> Package:
    """A package by its folder, or by name in the configured model folders."""
    if "/" in name or Path(name, "dicom.yaml").is_file():
        return load_package(Path(name).resolve())
    return find_package(name, model_paths(options.config))


def read_studies(path: Path) -> dict[str, dict[Path, Dataset]]:
    """Study Instance UID to the headers of its instances, for all DICOM files below `path`."""
    if not path.exists():
        raise InputRefused(f"there is no {path}")
    scan = scan_folder(path)
    studies: dict[str, dict[Path, Dataset]] = {}
    with ThreadPoolExecutor(4) as pool:
        for file, header in zip(scan.files, pool.map(read_header, scan.files), strict=True):
            studies.setdefault(str(header.get("StudyInstanceUID", "")), {})[file] = header
    if not studies:
        raise InputRefused(f"no DICOM file was found in {path} ({len(scan.skipped)} other files)")
    return dict(sorted(studies.items()))


def plan_study(package: Package, headers: Mapping[Path, Dataset]) -> dict[str, InputPlan]:
    """The volumes and images that the model takes of a study; `InputRefused` says why there is none."""
    assembly = assemble_volumes(headers)
    return {name: select_input(assembly, wanted).plan for name, wanted in package.manifest.inputs.items()}


def key_of(package: Package, plans: Mapping[str, InputPlan]) -> str:
    """The key that a job of this model on these inputs has: the results are the same objects."""
    return job_key(package.name, package.digest, {name: name_plan(plan) for name, plan in plans.items()})


def write_outcome(analysis: Analysis, folder: Path) -> dict[str, object]:
    """Write the DICOM results and the pictures into `folder`; what the command then tells."""
    from node.report.preview import render_preview

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for result in analysis.results:
        file = folder / f"{result.name}.dcm"
        file.write_bytes(result.encode())
        files.append(str(file))
    if analysis.findings is not None:
        picture = folder / "preview.png"
        render_preview(analysis.findings).save(picture)
        files.append(str(picture))
    return {
        "series": analysis.plan.series_uid,
        "slices": len(analysis.plan.slices),
        "remarks": list(analysis.remarks),
        "measurements": [row for measurement in analysis.measurements for row in measurement.rows()],
        "files": files,
        "seconds": {stage: round(seconds, 2) for stage, seconds in analysis.seconds.items()},
    }


def _tell(outcomes: list[tuple[str, dict[str, object] | RadnodeError]], package: Package, *, as_json: bool) -> int:
    good = [outcome for _, outcome in outcomes if isinstance(outcome, dict)]
    if as_json:
        print_json(
            [
                {"study": uid, "model": package.name, "version": package.version}
                | (outcome if isinstance(outcome, dict) else {"refused": str(outcome)})
                for uid, outcome in outcomes
            ]
        )
        return 0 if good else 1
    for uid, outcome in outcomes:
        print(f"study {uid}")
        if not isinstance(outcome, dict):
            print(f"  {package.name}: {outcome}")
            continue
        print(f"  series {outcome['series']}, {outcome['slices']} slices, {package.name} {package.version}\n")
        print_measurements(outcome["measurements"])  # pyright: ignore[reportArgumentType]
        for remark in outcome["remarks"]:  # pyright: ignore[reportGeneralTypeIssues]
            print(f"\n  {remark}")
        seconds: dict[str, float] = outcome["seconds"]  # pyright: ignore[reportAssignmentType]
        print("\n  " + ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items()))
        for line in _shorten(outcome["files"]):  # pyright: ignore[reportArgumentType]
            print(f"  {line}")
    return 0 if good else 1


def _shorten(files: list[str]) -> list[str]:
    """One line per file, and one for a numbered series such as an overlay's."""
    lines = []
    for _, group in groupby(files, lambda file: re.sub(r"-\d{3}(?=\.dcm$)", "", file)):
        first, *others = group
        lines.append(f"{first} to {Path(others[-1]).name}" if others else first)
    return lines


def print_measurements(rows: list[dict[str, object]]) -> None:
    """A line per finding, a column per measurement."""
    segments: dict[str, dict[str, object]] = {}
    for row in rows:
        line = segments.setdefault(str(row["segment"]), {"segment": row["segment"]})
        column = f"{row['measurement']} [{row['unit']}]" if row["unit"] else str(row["measurement"])
        line[column] = f"{row['value']:.1f}" if isinstance(row["value"], float) else row["value"]
        if "holds" in row:
            line["holds"] = "yes" if row["holds"] else "no"
    columns = list(dict.fromkeys(column for line in segments.values() for column in line))
    print_table(
        [{column: line.get(column, "") for column in columns} for line in segments.values()],
        columns,
        empty="nothing found",
    )


class _Progress(AbstractContextManager["_Progress"]):
    """A progress bar on a terminal, plain lines elsewhere; on standard error, so that output can be piped."""

    def __init__(self, stages: tuple[str, ...]):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._stages = stages
        console = Console(stderr=True)
        self._bar = (
            Progress(TextColumn("{task.description:16}"), BarColumn(), TimeElapsedColumn(), console=console)
            if console.is_terminal
            else None
        )
        self._task = self._bar.add_task(stages[0], total=len(stages)) if self._bar else None
        self._started = time.monotonic()

    def __enter__(self) -> _Progress:
        (self._bar or nullcontext()).__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        if self._bar is not None and self._task is not None:
            if details[0] is None:
                self._bar.update(self._task, completed=len(self._stages), description="done")
            self._bar.__exit__(*details)  # pyright: ignore[reportArgumentType]

    def begin(self, stage: str) -> None:
        """A stage begins."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._stages.index(stage), description=stage)
        else:
            import sys

            print(f"{time.monotonic() - self._started:6.1f} s  {stage}", file=sys.stderr)
