"""What radnode adds to a network's own time: `python -m tests.benchmark.overhead [--slices 400] [--repeat 3]`.

A CT goes by `storescu` over loopback into a whole node with a one-label model, and the results to an Orthanc. Counted
is from the last image to the last result's Success, the quiet period taken off; the same study by `models bench` says
what of that the network itself took. The first study finds the model cold and is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from node.archive.open import open_archive
from node.archive.store import Archive
from node.config import load_config
from node.deliver.dimse import Address, StoreSession
from node.demo.pacs import Orthanc
from tests.benchmark.pipeline import Story, cpu_seconds, make_package, make_study, running, send, story_of, unfinished
from tests.benchmark.receivers import CHECKOUT
from tests.running_node import wait_until

QUIET_S = 1.0


@dataclass(frozen=True)
class Overhead:
    """Seconds of one study, stage by stage; they add up to `total`."""

    complete: float  # from the last image, without the quiet period, to the queued job: noticed, headers read, routed
    claim: float  # until a worker has it
    work: float  # until its results are durable
    deliver: float  # until the PACS has said Success for the last of them

    @property
    def total(self) -> float:
        return self.complete + self.claim + self.work + self.deliver


def overhead_of(story: Story) -> Overhead:
    """Of the only study of an archive, or the last."""
    return Overhead(
        story.routed_at - story.last_received_at - QUIET_S,
        story.started_at - story.routed_at,
        story.finished_at - story.started_at,
        story.delivered_at - story.finished_at,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=400)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, help="the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="radnode-benchmark-") as name:
        scratch = Path(name)
        models = make_package(scratch / "models")
        studies = [make_study(scratch / "in" / str(n), options.slices, options.rows) for n in range(options.repeat + 1)]
        found: list[Overhead] = []
        with (
            Orthanc(scratch / "orthanc") as pacs,
            running(scratch / "node", pacs.port, models, quiet=f"{QUIET_S:g}s") as node,
        ):
            archive = open_archive(load_config(node.config))
            for count, study in enumerate(studies, 1):
                spent = cpu_seconds(node)
                send(node, study)
                wait_until(lambda n=count: not unfinished(archive.database, n), 300, "the results are delivered")
                story = story_of(archive.database)
                found.append(overhead_of(story))
                used = ", ".join(f"{role} {now - spent[role]:.2f}" for role, now in cpu_seconds(node).items())
                print(f"processor seconds: {used}")
                print(f"{'cold' if count == 1 else 'warm'}: {found[-1].total:.2f} s: {found[-1]}; {story.job_story}")
            sent_s = transmission_seconds(archive, pacs.port)
            archive.close()
        network_s = network_seconds(models / "marker", studies[0])
    report = {
        stage: statistics.median(getattr(one, stage) for one in found[1:])
        for stage in ("complete", "claim", "work", "deliver", "total")
    }
    report |= {"network": network_s, "transmission": sent_s, "cold_total": found[0].total}
    report["overhead"] = report["total"] - network_s
    report["beside_transmission"] = report["overhead"] - sent_s
    for stage, seconds in report.items():
        print(f"{stage:20} {seconds:8.3f} s")
    if options.out:
        options.out.write_text(
            json.dumps({"load": os.getloadavg()[0], **vars(options) | {"out": None}, **report}, indent=2)
        )


def network_seconds(package: Path, study: Path) -> float:
    """What the network itself takes, by `radnode models bench`."""
    command = [
        sys.executable,
        "-m",
        "node.cli",
        "models",
        "bench",
        f"{package}/",
        str(study),
        "--repeat",
        "2",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT)
    stages = {row["stage"]: row["seconds"] for row in json.loads(done.stdout)["stages"]}
    print("models bench:", ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in stages.items()))
    return stages["network"]


def transmission_seconds(archive: Archive, port: int) -> float:
    """How long the same results take to the same PACS on one association that is open, with nothing else to do."""
    files = sorted((archive.storage / "results").rglob("*.dcm"))[-2:]
    with StoreSession(Address("PACS", "127.0.0.1", port, "RADNODE"), files) as session:
        begin = time.monotonic()
        for file in files:
            session.send(file)
        return time.monotonic() - begin


if __name__ == "__main__":
    main()
