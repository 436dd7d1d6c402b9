"""What studies that kill or hang their model cost the others: `python -m tests.benchmark.poison [--studies 60]`.

Two workers, good studies with and without one of each kind of bad ones among them, in turn; the rate is that of the
good ones, from the first image to the last of their results at the PACS. Prints the ratio of the two.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

from sqlalchemy import func, select

from node.archive import schema
from node.archive.open import open_archive
from node.archive.records import DeliveryState
from node.archive.store import Archive
from node.config import load_config
from tests.benchmark.pipeline import send
from tests.benchmark.receivers import storescp
from tests.misbehaving import Sign, make_signed, misbehaving_node
from tests.running_node import wait_until

BAD = (Sign.CRASH, Sign.HANG, Sign.MEMORY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(options.repeat):
        for disturbed, measured in rates.items():
            measured.append(rate(options.studies, disturbed=disturbed))
            what = "with bad ones among them" if disturbed else "undisturbed"
            print(f"{what}: {measured[-1]:.2f} good studies/s, load {os.getloadavg()[0]:.1f}", flush=True)
    ratio = statistics.median(rates[True]) / statistics.median(rates[False])
    print(f"disturbed / undisturbed: {ratio:.2f} (goal 0.8)")


def rate(count: int, *, disturbed: bool) -> float:
    """Good studies per second."""
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="radnode-benchmark-")))
        warm = {make_signed(scratch / "warm-up" / str(number), Sign.FINE) for number in range(4)}
        good = {make_signed(scratch / "studies" / f"{number:03d}", Sign.FINE) for number in range(count)}
        for number, sign in enumerate(BAD if disturbed else ()):  # among the first, the middle ones and the last
            make_signed(scratch / "studies" / f"{number * count // len(BAD):03d}b", sign)
        if disturbed:
            make_signed(scratch / "studies" / f"{count // 2:03d}n", Sign.FINE, description="other")
        pacs = stack.enter_context(storescp(scratch / "pacs"))
        node = misbehaving_node(scratch / "node", pacs.port)
        stack.callback(node.kill_all)
        node.start()
        archive = stack.enter_context(contextlib.closing(open_archive(load_config(node.config))))
        send(node, scratch / "warm-up")
        wait_until(lambda: delivered(archive, warm)[0] == len(warm), 120, "the warm-up is delivered")
        began = time.time()
        send(node, scratch / "studies")
        wait_until(lambda: delivered(archive, good)[0] == len(good), 1200, "the good studies are delivered")
        return count / (delivered(archive, good)[1] - began)


def delivered(archive: Archive, studies: Collection[str]) -> tuple[int, float]:
    """How many of these have both of their results delivered, and when the last was."""
    columns = schema.deliveries.c
    query = (
        select(schema.studies.c.study_uid, func.count(), func.max(columns.delivered_at))
        .select_from(schema.deliveries.join(schema.results).join(schema.jobs).join(schema.studies))
        .where(columns.state == DeliveryState.DELIVERED, schema.results.c.kind.in_(("seg", "sr")))
        .group_by(schema.studies.c.study_uid)
    )
    with archive.database.read() as connection:
        done = [at for uid, count, at in connection.execute(query) if uid in studies and count == 2]
    return len(done), max(done, default=0.0)


if __name__ == "__main__":
    main()
