"""Many studies under kill -9: `python -m tests.benchmark.chaos --studies 500 --seconds 120 [--database postgresql]`.

Prints what was killed, and fails unless every study ends with exactly one set of results at the PACS.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from node.demo.pacs import Orthanc
from tests.chaos import QUIET, make_studies, under_fire, wait_for_results
from tests.postgresql import running_postgresql
from tests.running_node import RunningNode
from tests.test_chain import SEG, SR


def main() -> None:
    """One run, its figures on standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long processes are killed")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--seed", type=int, default=1, help="which processes are killed")
    parser.add_argument("--patience", type=float, default=3600.0, metavar="S", help="for the results, after the fire")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="radnode-chaos-")))
        studies = make_studies(folder / "studies", options.studies)
        pacs = stack.enter_context(Orthanc(folder / "orthanc"))
        url = stack.enter_context(running_postgresql()) if options.database == "postgresql" else "sqlite"
        node = RunningNode(folder, pacs.port, quiet=QUIET, database=url)
        stack.callback(node.kill_all)
        node.start()
        begin = time.monotonic()
        fire = under_fire(node, studies, options.seconds, seed=options.seed)
        print(f"{fire.studies} studies sent, {fire.resent} transfers again; killed: {dict(fire.killed)}", flush=True)
        wait_for_results(pacs, studies, {SEG, SR}, options.patience)
        print(f"every study has one SEG and one SR at the PACS, {time.monotonic() - begin:.0f} s after the first image")


if __name__ == "__main__":
    main()
