"""How many receivers and worker slots a site needs: a day's studies simulated through the stages, one after the other.

Pure: random numbers come from the seed, times are seconds. Studies arrive as a Poisson process whose rate follows the
day (`arrivals_of`); each stage is one queue, first come first served, before so many servers (`serve`). The tests hold
these queues against M/M/1, M/D/1, M/M/c and M/D/c.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from node.errors import NotAllowed

Seconds = NDArray[np.float64]

DAY_S: Final = 86400.0
HOUR_S: Final = 3600.0

# Share of a day's studies in each hour: a hospital with an emergency department. An assumption, not a survey: plateau
# from 8 to 16 o'clock with a dip at noon, one study in four outside of 7 to 18. `hours_profile` makes another.
HOSPITAL_DAY: Final = (1.2, 1.0, 0.8, 0.8, 0.9, 1.2, 2.0, 4.5, 7.5, 8.8, 9.0, 8.4,
                       6.6, 7.4, 8.0, 7.4, 6.2, 4.6, 3.6, 3.0, 2.5, 2.0, 1.5, 1.1)  # fmt: skip
OUTSIDE_SHARE: Final = 0.1  # of the studies that come outside of the hours that `hours_profile` is given

_MOST_STUDIES = 1_500_000  # that one simulation holds: some 300 MB and a few seconds
_FRONT_SHARE = 0.05  # of the goal that waiting may take at each stage that is not the workers
_BUSY = 0.9  # how busy a stage that is not the workers may be in its busiest hour
_ROW_BYTES = 1000  # of the database for one instance, its indexes included; measured on SQLite and PostgreSQL


@dataclass(frozen=True)
class Cost:
    """What a stage takes of one server for one study."""

    fixed_s: float = 0.0
    image_s: float = 0.0

    def of(self, images: Seconds) -> Seconds:
        """For studies of so many images."""
        return self.fixed_s + self.image_s * images


@dataclass(frozen=True)
class ModelCost:
    """What one model takes."""

    name: str
    slot: Cost  # that a slot is held
    beside: Cost = Cost()  # that a result takes beside it, in no slot's way
    share: float = 1.0  # of the studies that it runs on


@dataclass(frozen=True)
class Demand:
    """What comes in a day."""

    studies: float  # per day, on average
    images: float  # per study, on average
    profile: Sequence[float] = HOSPITAL_DAY  # 24 weights
    spread: float = 0.5  # coefficient of variation of a study's images


@dataclass(frozen=True)
class Costs:
    """What the stages take beside the models."""

    receive: Cost
    route: Cost
    deliver: Cost  # per result set, of one association to a peer
    database: Cost  # of the one database, not simulated as a queue: only how busy it is


@dataclass(frozen=True)
class Servers:
    """How many there are of each stage; None: as many as it takes."""

    receive: int | None = None
    route: int | None = None
    work: int | None = None
    deliver: int | None = None


@dataclass(frozen=True)
class Stage:
    """One stage of the plan."""

    name: str
    servers: int
    mean_use: float  # share of its servers' time that is work, over the whole day
    busiest_use: float  # in the hour of the day with the most; above 1 it falls behind
    wait_p50_s: float
    wait_p95_s: float


@dataclass(frozen=True)
class Plan:
    """What a simulation found."""

    stages: tuple[Stage, ...]
    wait_p50_s: float  # of a result, in all queues together
    wait_p95_s: float
    wait_p95_days_s: tuple[float, ...]  # the same, day by day
    turnaround_p95_s: float  # from the last image to the last Success, the quiet period aside
    goal_s: float
    jobs: int  # that were simulated
    days: int

    @property
    def holds(self) -> bool:
        """Whether every simulated day kept the goal."""
        return max(self.wait_p95_days_s) <= self.goal_s

    @property
    def bottleneck(self) -> Stage:
        """Which stage is full first when more studies come."""
        return max(self.stages, key=lambda stage: stage.busiest_use)


def hours_profile(first: int, last: int) -> tuple[float, ...]:
    """24 weights: all but `OUTSIDE_SHARE` of the studies come evenly from `first` to `last` o'clock."""
    inside = [first <= hour < last for hour in range(24)]
    if all(inside):
        return (1.0,) * 24
    count = sum(inside)
    return tuple((1 - OUTSIDE_SHARE) / count if each else OUTSIDE_SHARE / (24 - count) for each in inside)


def arrivals_of(demand: Demand, days: int, random: np.random.Generator) -> Seconds:
    """Times, ascending, of a Poisson process whose rate is constant within each hour and repeats each day."""
    weights = np.asarray(demand.profile, float)
    hourly = np.tile(demand.studies * weights / weights.sum(), days)
    counts = random.poisson(hourly)
    return np.sort((np.repeat(np.arange(len(counts)), counts) + random.random(counts.sum())) * HOUR_S)


def serve(arrivals: Seconds, services: Seconds, servers: int) -> Seconds:
    """When each customer's service begins: one queue in the order of `arrivals` (ascending), `servers` alike."""
    if servers == 1:  # Lindley's recursion without a loop
        before = np.concatenate([[0.0], np.cumsum(services)[:-1]])
        return before + np.maximum.accumulate(arrivals - before)
    if servers >= len(arrivals):
        return arrivals.copy()
    free = [0.0] * servers
    begins = np.empty(len(arrivals))
    pairs = zip(arrivals.tolist(), services.tolist(), strict=True)
    for index, (arrival, service) in enumerate(pairs):
        begin = free[0] if free[0] > arrival else arrival
        begins[index] = begin
        heapreplace(free, begin + service)
    return begins


def days_to_simulate(demand: Demand, models: Sequence[ModelCost], most: int = 7) -> int:
    """A week, or less where that would be too many jobs for some seconds of simulation."""
    daily = demand.studies * max(1.0, sum(model.share for model in models))
    return max(1, min(most, int(_MOST_STUDIES / max(daily, 1))))


def plan(
    demand: Demand,
    costs: Costs,
    models: Sequence[ModelCost],
    servers: Servers,
    *,
    goal_s: float,
    days: int,
    seed: int = 1,
) -> Plan:
    """Simulate `days` in a row, and where `servers` leaves a number open find one with which waiting keeps the goal:
    its 95th percentile on every day is at most `goal_s`.

    Receivers, schedulers and deliverers may take a twentieth of the goal each and are busy for nine tenths of their
    busiest hour at most; worker slots take what remains of the goal. The first day begins empty at midnight.
    `NotAllowed` when nothing comes.
    """
    random = np.random.default_rng(seed)
    arrivals = arrivals_of(demand, days, random)
    images = _images_of(demand, len(arrivals), random)
    study, model = np.nonzero(random.random((len(arrivals), len(models))) < [each.share for each in models])
    if not len(study):
        raise NotAllowed("no model ran on any study of the simulated days: plan for more studies per day")
    slot, beside = np.empty(len(study)), np.empty(len(study))
    for number, each in enumerate(models):
        its = model == number
        slot[its], beside[its] = each.slot.of(images[study[its]]), each.beside.of(images[study[its]])
    front_s, none = goal_s * _FRONT_SHARE, np.zeros(len(arrivals))
    clock = _Clock(arrivals, days)
    received = _Passage("receive", arrivals, costs.receive.of(images), none, clock)
    received.go(servers.receive, front_s)
    routed = _Passage("route", received.ends, costs.route.of(images), none, clock)
    routed.go(servers.route, front_s)
    before = (received.waits + routed.waits)[study]
    clock = _Clock(arrivals[study], days)
    worked = _Passage("work", routed.ends[study], slot, before, clock)
    worked.go(servers.work, goal_s - front_s, exact=True)
    delivered = _Passage("deliver", worked.ends + beside, costs.deliver.of(images[study]), np.zeros(len(study)), clock)
    delivered.go(servers.deliver, front_s)
    waits = before + worked.waits + delivered.waits
    written = _Passage("database", arrivals, costs.database.of(images), none, _Clock(arrivals, days))
    return Plan(
        stages=tuple(passage.stage() for passage in (received, routed, worked, delivered, written)),
        wait_p50_s=float(np.percentile(waits, 50)),
        wait_p95_s=float(np.percentile(waits, 95)),
        wait_p95_days_s=tuple(clock.percentiles(waits)),
        turnaround_p95_s=float(np.percentile(delivered.ends - received.ends[study], 95)),
        goal_s=goal_s,
        jobs=len(study),
        days=days,
    )


@dataclass(frozen=True)
class Volume:
    """What a demand means for disks and wires."""

    disk_day_bytes: float  # images and results of a day
    disk_kept_bytes: float  # while studies are kept
    database_kept_bytes: float
    in_mbit_s: float  # over a whole day
    in_busiest_mbit_s: float  # in the busiest hour
    out_busiest_mbit_s: float


def volume_of(demand: Demand, *, image_bytes: float, result_bytes: float, jobs: float, keep_days: float) -> Volume:
    """Of a demand with so many bytes per image and per job's results, and so many jobs per study."""
    came, made = demand.images * image_bytes, jobs * result_bytes
    day = demand.studies * (came + made)
    busiest = max(demand.profile) / sum(demand.profile) * demand.studies / HOUR_S  # studies per second
    return Volume(
        disk_day_bytes=day,
        disk_kept_bytes=day * keep_days,
        database_kept_bytes=demand.studies * keep_days * demand.images * _ROW_BYTES,
        in_mbit_s=demand.studies / DAY_S * came * 8e-6,
        in_busiest_mbit_s=busiest * came * 8e-6,
        out_busiest_mbit_s=busiest * made * 8e-6,
    )


class _Clock:
    """To which day each customer belongs: the one on which it arrived."""

    def __init__(self, arrivals: Seconds, days: int):
        self.days = days
        self._day = np.minimum((arrivals / DAY_S).astype(int), days - 1)

    def percentiles(self, waits: Seconds) -> list[float]:
        """The 95th of each day that anything came on."""
        return [float(np.percentile(waits[self._day == day], 95)) for day in np.unique(self._day)]


class _Passage:
    """Customers at one stage: `ready` when they come to it, in whatever order, having waited `before` elsewhere."""

    def __init__(self, name: str, ready: Seconds, services: Seconds, before: Seconds, clock: _Clock):
        self._name, self._clock, self._before = name, clock, before
        self._order = np.argsort(ready, kind="stable")
        self._ready, self._services = ready, services
        self._load = services.sum() / (clock.days * DAY_S)
        by_hour = np.bincount((ready / HOUR_S).astype(int) % 24, services, 24)
        self._busiest_load = by_hour.max() / (clock.days * HOUR_S)
        self._servers = 1
        self.waits = self._waits = np.zeros(len(ready))
        self._passed = 0

    @property
    def ends(self) -> Seconds:
        """When each leaves."""
        return self._ready + self.waits + self._services

    def go(self, servers: int | None, goal_s: float, *, exact: bool = False) -> None:
        """Pass with so many servers, or with as many as keep waiting so far under the goal on every day: the fewest
        when `exact`, else the fewest that are busy for nine tenths of their busiest hour at most.
        """
        if servers is None:
            # Waiting that no number of servers here could make good is not theirs to make good.
            lost = max(self._clock.percentiles(self._before)) > goal_s
            before = np.zeros_like(self._before) if lost else self._before
            servers = _fewest(
                lambda count: max(self._clock.percentiles(before + self._pass(count))) <= goal_s,
                at_least=max(1, math.ceil(self._load)),
                guess=math.ceil(self._busiest_load / _BUSY),
                exact=exact,
            )
        if servers != self._passed:
            self._pass(servers)
        self._servers, self.waits = servers, self._waits

    def stage(self) -> Stage:
        """What it was like."""
        return Stage(
            self._name,
            self._servers,
            mean_use=float(self._load / self._servers),
            busiest_use=float(self._busiest_load / self._servers),
            wait_p50_s=float(np.percentile(self.waits, 50)),
            wait_p95_s=float(np.percentile(self.waits, 95)),
        )

    def _pass(self, servers: int) -> Seconds:
        order = self._order
        waits = np.empty(len(order))
        waits[order] = serve(self._ready[order], self._services[order], servers) - self._ready[order]
        self._passed, self._waits = servers, waits
        return waits


def _fewest(enough: Callable[[int], bool], *, at_least: int, guess: int, exact: bool) -> int:
    """The smallest number, `at_least` or more, that is enough, or `guess` where that is and need not be `exact`."""
    most = max(at_least, guess)
    too_few, step = at_least - 1, max(1, guess // 32)
    if enough(most):
        while exact and most > at_least:
            lower = max(at_least, most - step)
            if not enough(lower):
                too_few = lower
                break
            most, step = lower, step * 2
    else:
        while True:
            too_few, most, step = most, most + step, step * 2
            if enough(most):
                break
    while exact and most - too_few > 1:
        middle = (most + too_few) // 2
        if enough(middle):
            most = middle
        else:
            too_few = middle
    return most


def _images_of(demand: Demand, studies: int, random: np.random.Generator) -> Seconds:
    """Images of each study: gamma distributed around the average, at least one."""
    if not demand.spread:
        return np.full(studies, demand.images)
    shape = demand.spread**-2
    return np.maximum(random.gamma(shape, demand.images / shape, studies), 1.0)
