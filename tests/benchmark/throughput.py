"""Studies per second through a node with a model that does next to nothing: `python -m tests.benchmark.throughput`.

Small CTs go by `storescu` over loopback into a whole node, the results to DCMTK's `storescp`. The rate is that of all
studies but the warm-up, from the first instance to the last Success, the quiet period taken off. Beside it: the
processor time of each role, and what the same statements cost the database alone (`tests.benchmark.database`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path

from sqlalchemy import create_engine, func, select

from node.archive import schema
from node.archive.open import open_archive
from node.archive.records import DeliveryState
from node.archive.store import Archive
from node.config import load_config
from tests.benchmark.database import Life
from tests.benchmark.pipeline import cpu_seconds, make_package, make_study, running, send, unfinished
from tests.benchmark.receivers import storescp
from tests.postgresql import running_postgresql
from tests.running_node import wait_until

QUIET_S = 1.0
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=100)
    parser.add_argument("--slices", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--postgresql", action="store_true")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="radnode-benchmark-")))
        url = stack.enter_context(running_postgresql()) if options.postgresql else "sqlite"
        models = make_package(scratch / "models")
        for name, count in (("warm-up", WARM_UP), ("studies", options.studies)):
            for number in range(count):
                make_study(scratch / name / str(number), options.slices, options.rows)
        pacs = stack.enter_context(storescp(scratch / "pacs"))
        settings = f"workers: {{count: {options.workers}, device: cpu}}\n"
        node = stack.enter_context(
            running(scratch / "node", pacs.port, models, quiet=f"{QUIET_S:g}s", database=url, settings=settings)
        )
        archive = stack.enter_context(contextlib.closing(open_archive(load_config(node.config))))
        send(node, scratch / "warm-up")
        wait_until(lambda: not unfinished(archive.database, WARM_UP), 600, "the warm-up is delivered")
        spent, began = cpu_seconds(node), time.time()
        send(node, scratch / "studies")
        sent = time.time()
        wait_until(lambda: not unfinished(archive.database, WARM_UP + options.studies), 3600, "all is delivered")
        used = {role: now - spent[role] for role, now in cpu_seconds(node).items()}
        seconds = last_delivery(archive) - began - QUIET_S
        rate = options.studies / seconds
        on = "PostgreSQL" if options.postgresql else "SQLite"
        print(f"{on}: {rate:.2f} studies/s ({options.studies} in {seconds:.1f} s, sent in {sent - began:.1f} s)")
        print(f"load of the machine: {os.getloadavg()[0]:.1f}")
        print("processor seconds per study:", {role: round(each / options.studies, 3) for role, each in used.items()})
        database_s = database_seconds(scratch / "alone", beside(url), options.slices)
        print(f"the database alone: {1000 * database_s:.1f} ms per study, {database_s * rate:.0%} of the time")


def beside(url: str) -> str:
    """Another database of the same kind, which no node uses."""
    if url == "sqlite":
        return url
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE alone")
    engine.dispose()
    return url.rpartition("/")[0] + "/alone"


def last_delivery(archive: Archive) -> float:
    """When the last result was taken."""
    columns = schema.deliveries.c
    with archive.database.read() as connection:
        found = connection.scalar(
            select(func.max(columns.delivered_at)).where(columns.state == DeliveryState.DELIVERED)
        )
    return float(found or 0)


def database_seconds(folder: Path, url: str, images: int, repeat: int = 20) -> float:
    """What a study's transactions take with nothing else to do, files' syncs included; the median."""
    with contextlib.closing(
        Archive(folder, url if url != "sqlite" else f"sqlite:///{folder / 'radnode.sqlite'}")
    ) as archive:
        life = Life(archive, images)
        times = []
        for _ in range(repeat):
            life.one()
            times.append(sum(step[-1] for step in life.steps.values()))
        return statistics.median(times)


if __name__ == "__main__":
    main()
