"""Many studies under kill -9: `python -m tests.benchmark.chaos --studies 500 --seconds 120 [--database postgresql]`.

PostgreSQL itself is restarted in the middle. Prints what was killed, and fails unless every study ends with exactly one
set of results at the PACS.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

from sqlalchemy import func, select

from node.archive import schema
from node.archive.database import Database
from node.config import load_config
from node.demo.pacs import Orthanc
from tests.chaos import check_results, fast_node, make_studies, under_fire, wait_for_results
from tests.postgresql import postgresql_server
from tests.running_node import RunningNode


def main() -> None:
    """One run, its figures on standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long processes are killed")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1, help="which processes are killed")
    parser.add_argument("--patience", type=float, default=3600.0, metavar="S", help="for the results, after the fire")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="radnode-chaos-")))
        studies = make_studies(folder / "studies", options.studies)
        pacs = stack.enter_context(Orthanc(folder / "orthanc"))
        server = stack.enter_context(postgresql_server()) if options.database == "postgresql" else None
        node = fast_node(folder, pacs.port, database=server.url if server else "sqlite")
        node.config.write_text(f"{node.config.read_text()}workers:  {{count: {options.workers}}}\n")
        stack.callback(node.kill_all)
        node.start()
        begin = time.monotonic()
        half_way = server.restart if server else lambda: None
        fire = under_fire(node, list(studies.values()), options.seconds, seed=options.seed, half_way=half_way)
        killed = ", ".join(f"{name} {count}" for name, count in fire.killed.most_common())
        print(f"{fire.studies} studies, {fire.resent} transfers sent again; {fire.killed.total()} killed: {killed}")
        print(f"all are taken after {time.monotonic() - begin:.0f} s", flush=True)
        wait_for_results(node, len(studies), options.patience)
        print(f"all is done after {time.monotonic() - begin:.0f} s; attempts of a job: {attempts(node)}")
        early = check_results(node, pacs, studies)
        print(f"every study has one SEG and one SR at the PACS; {early} had a job before their last image too")


def attempts(node: RunningNode) -> dict[int, int]:
    """How many jobs took how many attempts."""
    with closing(Database(load_config(node.config).database_url)) as database, database.read() as connection:
        query = select(schema.jobs.c.attempts, func.count()).group_by(schema.jobs.c.attempts)
        return {int(count): int(jobs) for count, jobs in connection.execute(query.order_by(schema.jobs.c.attempts))}


if __name__ == "__main__":
    main()
