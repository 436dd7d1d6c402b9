"""Every bundle of a MONAI Model Zoo checkout through radnode: random weights of the true architecture, or an oracle.

    python -m tests.benchmark.zoo MODEL_ZOO/models [--only NAME] [--oracle]

`MODEL_ZOO` is a clone of https://github.com/Project-MONAI/model-zoo; nothing in it is changed. Each bundle is copied to
a temporary folder, gets the `dicom.yaml` that ships in models/zoo, and runs in a process of its own on small synthetic
inputs. With `--oracle` the network is replaced by a threshold of its input and the result is compared with the object
that was drawn, on axial, descending, sagittal, oblique and anisotropic acquisitions. Exits 1 when a bundle fails.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent
MANIFESTS = REPOSITORY / "models" / "zoo"


def main() -> int:
    parser = argparse.ArgumentParser(description="Every bundle of a Model Zoo checkout through radnode.")
    parser.add_argument("zoo", type=Path, help="the folder `models` of a clone of Project-MONAI/model-zoo")
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--manifests", type=Path, default=MANIFESTS)
    parser.add_argument("--oracle", action="store_true", help="a threshold in place of the network")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the process of one bundle
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.zoo / options.one, options.manifests, oracle=options.oracle)))
        return 0
    names = options.only or sorted(path.parent.name for path in options.manifests.glob("*/dicom.yaml"))
    failed = 0
    for name in names:
        command = [sys.executable, "-W", "ignore", "-m", "tests.benchmark.zoo", str(options.zoo), "--one", name]
        command += ["--manifests", str(options.manifests)] + ["--oracle"] * options.oracle
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False)
        try:
            outcome = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            outcome = {"ok": False, "said": (done.stderr.strip().splitlines() or ["no answer"])[-1][:300]}
        failed += not outcome["ok"]
        print(f"{name:48} {'ok    ' if outcome['ok'] else 'FAILED'} {_tell(outcome)}", flush=True)
    print(f"{len(names) - failed} of {len(names)} bundles")
    return 1 if failed else 0


def _tell(outcome: dict[str, Any]) -> str:
    seconds = f"{outcome['seconds']:6.1f} s {outcome['rss_gb']:4.1f} GB  " if "seconds" in outcome else ""
    return seconds + outcome["said"]


def run_one(source: Path, manifests: Path, *, oracle: bool) -> dict[str, Any]:
    """One bundle in this process."""
    from node.errors import RadnodeError

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="radnode-zoo-") as temporary:
        folder = Path(temporary, source.name)
        shutil.copytree(source, folder)
        shutil.copy(manifests / source.name / "dicom.yaml", folder)
        try:
            said, ok = _check(folder) if oracle else (_run(folder), True)
        except RadnodeError as error:
            said, ok = f"{type(error).__name__}: {error}", False
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"ok": ok, "said": said, "seconds": time.monotonic() - started, "rss_gb": peak}


def _run(folder: Path) -> str:
    from node.errors import OutputRefused
    from node.infer.bundle import BundleModel
    from tests.infer.zoo import inputs_for, read_manifest, write_random_weights

    manifest = read_manifest(folder)
    write_random_weights(folder, manifest)
    model = BundleModel(folder, manifest, "cpu")
    try:
        prediction = model.predict(inputs_for(folder.name, manifest))
    except OutputRefused as error:  # what a random network says may well be no result; that it was read counts
        return f"refused as it should be with random weights: {error}"
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in model.seconds.items())
    return f"{type(prediction).__name__} ({stages})"


def _check(folder: Path) -> tuple[str, bool]:
    from tests.infer.zoo import check_with_oracle, read_manifest

    return check_with_oracle(folder, read_manifest(folder))


if __name__ == "__main__":
    sys.exit(main())
