"""The reports of the real series, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.report.cases import SERIES, Case, draw_mask, make_case, plan_series

CaseOf = Callable[[str], Case]


@pytest.fixture(scope="session")
def case_of(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> CaseOf:
    """Gives the report of a series by its name in `SERIES`."""
    made: dict[str, Case] = {}

    def give(name: str) -> Case:
        if name not in made:
            plan = plan_series(shared_data, name)
            made[name] = make_case(plan, draw_mask(plan.grid.shape), tmp_path_factory.mktemp(name))
        return made[name]

    return give


@pytest.fixture(params=SERIES)
def case(case_of: CaseOf, request: pytest.FixtureRequest) -> Case:
    """The report of each series in turn."""
    return case_of(request.param)
