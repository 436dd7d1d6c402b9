"""The queues of the simulation against queueing theory, and the plans that come of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.capacity import (
    DAY_S,
    HOSPITAL_DAY,
    HOUR_S,
    Cost,
    Costs,
    Demand,
    ModelCost,
    Plan,
    Servers,
    arrivals_of,
    days_to_simulate,
    hours_profile,
    plan,
    serve,
    volume_of,
)
from node.errors import NotAllowed

CUSTOMERS = 400_000
NOTHING = Costs(Cost(), Cost(), Cost(), Cost())


def mean_wait(services: np.ndarray, load: float, servers: int) -> float:
    """Of a Poisson stream to so many servers, each busy for the share `load`, in mean service times."""
    random = np.random.default_rng(7)
    arrivals = np.cumsum(random.exponential(1 / (load * servers), len(services)))
    return float(np.mean(serve(arrivals, services, servers) - arrivals))


def erlang_c(load: float, servers: int) -> float:
    """The probability of waiting in M/M/c."""
    offered = load * servers
    none_free = offered**servers / math.factorial(servers) / (1 - load)
    return none_free / (sum(offered**k / math.factorial(k) for k in range(servers)) + none_free)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_server_with_exponential_services_is_m_m_1(load: float) -> None:
    services = np.random.default_rng(3).exponential(1.0, CUSTOMERS)
    assert mean_wait(services, load, 1) == pytest.approx(load / (1 - load), rel=0.05)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_server_with_constant_services_is_m_d_1(load: float) -> None:
    assert mean_wait(np.ones(CUSTOMERS), load, 1) == pytest.approx(load / (2 * (1 - load)), rel=0.04)


@pytest.mark.parametrize(("load", "servers"), [(0.5, 2), (0.7, 5), (0.8, 10), (0.8, 40)])
def test_many_servers_with_exponential_services_are_m_m_c(load: float, servers: int) -> None:
    services = np.random.default_rng(3).exponential(1.0, CUSTOMERS)
    expected = erlang_c(load, servers) / (servers * (1 - load))
    assert mean_wait(services, load, servers) == pytest.approx(expected, rel=0.06)


def test_many_servers_with_constant_services_are_m_d_c() -> None:
    """Against Cosmetatos' approximation (Management Science 22, 1975), itself good to a few per cent."""
    load, servers = 0.8, 5
    m_m_c = erlang_c(load, servers) / (servers * (1 - load))
    correction = 1 + (1 - load) * (servers - 1) * (math.sqrt(4 + 5 * servers) - 2) / (16 * load * servers)
    assert mean_wait(np.ones(CUSTOMERS), load, servers) == pytest.approx(m_m_c / 2 * correction, rel=0.05)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=40), st.integers(1, 5))
def test_who_waits_waits_for_the_first_server_that_is_free(customers: list[tuple[int, int]], servers: int) -> None:
    arrivals = np.sort(np.array([arrival for arrival, _ in customers], float))
    services = np.array([service for _, service in customers], float)
    begins = serve(arrivals, services, servers)
    assert (begins >= arrivals).all()
    assert (np.diff(begins) >= 0).all()  # first come, first served
    for index, begin in enumerate(begins):
        busy = np.sum((begins[:index] <= begin) & (begins[:index] + services[:index] > begin))
        assert busy < servers
        if begin > arrivals[index]:  # it began in the moment in which somebody left
            assert np.isclose(begins[:index] + services[:index], begin).any()


def test_arrivals_follow_the_day() -> None:
    arrivals = arrivals_of(Demand(24_000, 1, hours_profile(7, 19)), 5, np.random.default_rng(1))
    assert len(arrivals) == pytest.approx(5 * 24_000, rel=0.02)
    assert (np.diff(arrivals) >= 0).all()
    hours = (arrivals % DAY_S / HOUR_S).astype(int)
    inside = np.mean((hours >= 7) & (hours < 19))
    assert inside == pytest.approx(0.9, abs=0.01)
    assert len(HOSPITAL_DAY) == 24
    assert sum(HOSPITAL_DAY) == pytest.approx(98, abs=3)


def small(servers: Servers, studies: float = 2000, goal_s: float = 60, days: int = 5, costs: Costs = NOTHING) -> Plan:
    return plan(Demand(studies, 100), costs, [ModelCost("lungs", Cost(30.0))], servers, goal_s=goal_s, days=days)


def test_the_fewest_slots_that_keep_the_goal() -> None:
    found = small(Servers())
    slots = found.stages[2].servers
    assert found.holds
    assert slots > 1
    assert not small(Servers(work=slots - 1)).holds
    assert small(Servers(work=slots)) == found  # the same seed, the same days
    assert small(Servers(), goal_s=1).stages[2].servers > slots
    assert found.bottleneck.name == "work"


def test_a_full_receiver_is_the_bottleneck_and_no_slots_make_it_good() -> None:
    costs = Costs(Cost(0, 0.9), Cost(), Cost(), Cost())  # 90 s a study: full at 960 a day
    found = small(Servers(receive=1), costs=costs)
    assert not found.holds
    assert found.bottleneck.name == "receive"
    assert found.bottleneck.busiest_use > 1
    assert found.stages[2].servers < 20
    enough = small(Servers(), costs=costs)
    assert enough.holds
    assert enough.stages[0].busiest_use <= 0.9


def test_what_is_beside_a_slot_delays_and_fills_nothing() -> None:
    demand = Demand(2000, 100)
    within = plan(demand, NOTHING, [ModelCost("m", Cost(10.0))], Servers(work=2), goal_s=60, days=2)
    beside = plan(demand, NOTHING, [ModelCost("m", Cost(10.0), Cost(5.0))], Servers(work=2), goal_s=60, days=2)
    assert beside.stages[2] == within.stages[2]
    assert beside.turnaround_p95_s == pytest.approx(within.turnaround_p95_s + 5, abs=1e-6)


def test_models_run_on_their_share_of_the_studies() -> None:
    models = [ModelCost("all", Cost(1.0)), ModelCost("few", Cost(1.0), share=0.1)]
    found = plan(Demand(20_000, 1), NOTHING, models, Servers(), goal_s=60, days=3)
    assert found.jobs == pytest.approx(3 * 22_000, rel=0.02)
    assert days_to_simulate(Demand(1_000_000, 400), models) == 1
    assert days_to_simulate(Demand(100, 400), models) == 7


def test_nothing_to_plan_for_is_said() -> None:
    with pytest.raises(NotAllowed, match="more studies"):
        plan(Demand(0.0001, 1), NOTHING, [ModelCost("m", Cost(1.0))], Servers(), goal_s=60, days=1)


def test_disks_and_wires() -> None:
    demand = Demand(1000, 100, (1.0,) * 24)
    volume = volume_of(demand, image_bytes=500_000, result_bytes=1_000_000, jobs=2, keep_days=7)
    assert volume.disk_day_bytes == 1000 * (100 * 500_000 + 2 * 1_000_000)
    assert volume.disk_kept_bytes == 7 * volume.disk_day_bytes
    assert volume.in_mbit_s == pytest.approx(1000 * 100 * 500_000 * 8 / 86400 / 1e6)
    assert volume.in_busiest_mbit_s == pytest.approx(volume.in_mbit_s)
    assert volume.out_busiest_mbit_s == pytest.approx(1000 * 2e6 * 8 / 86400 / 1e6)
