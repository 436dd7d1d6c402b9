"""`radnode plan`: how many receivers and worker slots a site needs, by simulation from measured times."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from node.capacity import (
    DAY_S,
    HOSPITAL_DAY,
    Cost,
    Costs,
    Demand,
    ModelCost,
    Plan,
    Servers,
    Stage,
    Volume,
    days_to_simulate,
    hours_profile,
    plan,
    volume_of,
)
from node.commands.models_bench import measure_model
from node.commands.output import print_json, print_table
from node.commands.plan_options import STAGES
from node.commands.run import find_model
from node.errors import NotAllowed, NotFound

# What the stages take on two cores with SQLite: docs/capacity.md says how they were measured, and how to measure yours.
_RECEIVE = Cost(0.0, 0.001)  # 1,000 images/s
_ROUTE = Cost(0.05, 0.004)  # the headers are read
_DELIVER = Cost(0.1)  # an association, two objects
_DATABASE = Cost(0.03, 0.0002)
_JOB = Cost(0.1, 0.004)  # around a model's own stages: leased, headers read again, results made durable
STAGE_COSTS = dict(zip(STAGES, (_RECEIVE, _ROUTE, _DELIVER, _DATABASE, _JOB), strict=True))


@dataclass(frozen=True)
class Measured:
    """A model as `radnode models bench --json` told of it."""

    infer_s: float
    around_s: float  # reading, measuring, report and encoding
    device: str = ""


@dataclass
class Told:
    """What the command line says things take."""

    stages: dict[str, Cost] = field(default_factory=lambda: {str(stage): cost for stage, cost in STAGE_COSTS.items()})
    models: dict[str, Cost] = field(default_factory=dict)


def make_plan(options: Namespace) -> int:
    """Simulate, and tell; 1 when numbers were given with which the goal is missed."""
    shares = dict(options.model)
    told = _told(options.time, shares)
    measured = read_benches(options.bench)
    if options.study is not None:
        for name in shares.keys() - told.models.keys() - measured.keys():
            measured[name] = _measured(
                measure_model(find_model(name, options), options.study, options.device, repeat=3)
            )
    models = [_cost_of(name, share, told, measured, options.overlap) for name, share in shares.items()]
    stages = told.stages
    profile = hours_profile(*options.hours) if options.hours else HOSPITAL_DAY
    demand = Demand(options.studies_per_day, options.images_per_study, profile)
    found = plan(
        demand,
        Costs(stages["receive"], stages["route"], stages["deliver"], stages["database"]),
        models,
        Servers(receive=options.receivers, work=options.slots),
        goal_s=options.goal,
        days=options.days or days_to_simulate(demand, models),
        seed=options.seed,
    )
    volume = volume_of(
        demand,
        image_bytes=options.image_size,
        result_bytes=options.result_size,
        jobs=sum(shares.values()),
        keep_days=options.keep / DAY_S,
    )
    kind = "GPU" if any(measured[name].device.startswith("cuda") for name in shares if name in measured) else "CPU"
    if options.json:
        print_json(_document(options, found, volume, models, kind))
    else:
        _print(options, found, volume, kind)
    return 0 if found.holds else 1


def read_benches(files: Sequence[Path]) -> dict[str, Measured]:
    """Model to its times, from files with the output of `radnode models bench --json`."""
    measured = {}
    for file in files:
        try:
            document = json.loads(file.read_text())
            measured[str(document["model"])] = _measured(document)
        except OSError as error:
            raise NotFound(f"{file} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise NotAllowed(f"{file} is not what `radnode models bench MODEL STUDY --json` prints") from error
    return measured


def next_bottleneck(found: Plan) -> str:
    """A sentence: which stage is full first, and from when on."""
    stage = found.bottleneck
    if stage.busiest_use <= 0:
        return "nothing is busy"
    growth = 1 / stage.busiest_use
    if stage.name == "database" and growth < 1:
        return (
            f"one database is too slow {stage.busiest_use:.1f} times over in the busiest hour: share the studies among "
            f"{_nodes(stage)} nodes with a database each"
        )
    if growth < 1:
        return f"{_name(stage)}: in the busiest hour more comes than is done, and the queue grows until it is over"
    return f"{_name(stage)}: full in the busiest hour at {growth:.1f} times these studies"


def _measured(report: Mapping[str, Any]) -> Measured:
    stages = {row["stage"]: float(row["seconds"]) for row in report["stages"] if row["part_of"] is None}
    infer = stages.pop("infer")
    return Measured(infer, sum(stages.values()), str(report["device"]))


def _cost_of(name: str, share: float, told: Told, measured: Mapping[str, Measured], overlap: bool) -> ModelCost:
    job = told.stages["job"]
    if name in told.models:
        its = told.models[name]
        return ModelCost(name, Cost(its.fixed_s + job.fixed_s, its.image_s + job.image_s), share=share)
    if name not in measured:
        raise NotFound(
            f"nothing says how long {name} takes: measure it (`radnode models bench {name} STUDY --json > FILE`) "
            f"and add --bench FILE, or say it (--time {name}=12)"
        )
    infer, around = Cost(measured[name].infer_s), Cost(measured[name].around_s + job.fixed_s, job.image_s)
    if overlap:  # what is slower holds the slot; a result takes both
        beside, slot = sorted((infer, around), key=lambda cost: cost.fixed_s)
        return ModelCost(name, slot, beside, share)
    return ModelCost(name, Cost(infer.fixed_s + around.fixed_s, around.image_s), share=share)


def _told(times: list[tuple[str, float, float]], shares: Mapping[str, float]) -> Told:
    told = Told()
    for name, fixed_s, image_s in times:
        cost = Cost(fixed_s, image_s)
        if name in shares:
            told.models[name] = cost
        elif name in told.stages:
            told.stages[name] = cost
        else:
            raise NotAllowed(f"--time {name}: expected a model of this plan or one of {', '.join(STAGES)}")
    return told


def _document(options: Namespace, found: Plan, volume: Volume, models: list[ModelCost], kind: str) -> dict[str, Any]:
    return {
        "studies_per_day": options.studies_per_day,
        "images_per_study": options.images_per_study,
        "models": [asdict(model) for model in models],
        "goal_s": found.goal_s,
        "holds": found.holds,
        "receivers": found.stages[0].servers,
        "slots": next(stage.servers for stage in found.stages if stage.name == "work"),
        "slot_kind": kind,
        "stages": [asdict(stage) for stage in found.stages],
        "wait_p50_s": found.wait_p50_s,
        "wait_p95_s": found.wait_p95_s,
        "wait_p95_days_s": list(found.wait_p95_days_s),
        "turnaround_p95_s": found.turnaround_p95_s,
        "simulated": {"days": found.days, "jobs": found.jobs, "seed": options.seed},
        "bottleneck": {"stage": found.bottleneck.name, "sentence": next_bottleneck(found)},
        **asdict(volume),
    }


def _print(options: Namespace, found: Plan, volume: Volume, kind: str) -> None:
    print(
        f"{options.studies_per_day:,.0f} studies a day of {options.images_per_study:,.0f} images, "
        f"{found.jobs:,} jobs in {found.days} simulated day{'s' * (found.days > 1)}\n"
    )
    rows = [
        {
            "stage": _name(stage, kind),
            "number": _nodes(stage) if stage.name == "database" else stage.servers,
            "busy, all day": f"{stage.mean_use:.0%}",
            "in the busiest hour": f"{stage.busiest_use:.0%}",
            "waiting, median": "" if stage.name == "database" else f"{stage.wait_p50_s:.1f} s",
            "95 %": "" if stage.name == "database" else f"{stage.wait_p95_s:.1f} s",
        }
        for stage in found.stages
    ]
    print_table(rows, list(rows[0]), empty="")
    days = f"; by day {min(found.wait_p95_days_s):.1f} to {max(found.wait_p95_days_s):.1f} s" if found.days > 1 else ""
    verdict = "is kept" if found.holds else "is MISSED"
    print(f"\na result waits {found.wait_p50_s:.1f} s (median), {found.wait_p95_s:.1f} s (95 %{days}): "
          f"the goal of {found.goal_s:g} s {verdict}")  # fmt: skip
    print(f"95 % of results are at the PACS {found.turnaround_p95_s:.0f} s after the last image, and the quiet period")
    print(f"next bottleneck: {next_bottleneck(found)}")
    print(
        f"disk: {_size(volume.disk_day_bytes)} a day, {_size(volume.disk_kept_bytes)} in the {options.keep / DAY_S:g} "
        f"days that studies are kept, and {_size(volume.database_kept_bytes)} of database"
    )
    print(
        f"network: {volume.in_mbit_s:,.1f} Mbit/s in on average, {volume.in_busiest_mbit_s:,.1f} in the busiest hour; "
        f"{volume.out_busiest_mbit_s:,.1f} out"
    )


def _nodes(database: Stage) -> int:
    """So many databases are busy seven tenths of the busiest hour."""
    return max(1, -int(-database.busiest_use // 0.7))


def _name(stage: Stage, kind: str = "") -> str:
    names = {
        "receive": "receivers",
        "route": "schedulers",
        "work": f"worker slots ({kind})" if kind else "worker slots",
        "deliver": "deliveries at once, per peer",
        "database": "databases",
    }
    return names[stage.name]


def _size(count: float) -> str:
    for unit in ("MB", "GB", "TB"):
        count /= 1000 if unit != "MB" else 1e6
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:,.1f} PB"
