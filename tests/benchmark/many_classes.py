"""Segmentation into 105 classes: MONAI's chain beside ours, each in a process of its own, by seconds and peak memory.

    python -m tests.benchmark.many_classes [--chain labels|probabilities] [--scale 1.0] [--classes 105] [--only ours]

The source is 400 slices of 512 × 512 (0.7 × 0.7 × 1 mm), the network's grid 1.5 mm, both chains run in MONAI's own
`SupervisedEvaluator`. `labels` ends as wholeBody_ct_segmentation does (softmax, argmax, Invertd nearest),
`probabilities` as most of the zoo does (softmax, Invertd linear, argmax). MONAI's chain took 7.1 GB for the first at
scale 0.8 and 6.5 GB for the second at scale 0.35, and grows with the volume: `--scale` makes all three axes shorter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHECKOUT = Path(__file__).parents[2]
SHAPE = (512, 512, 400)  # x, y, z
SPACING_MM = (0.7, 0.7, 1.0)
NETWORK_MM = 1.5
ROI = (96, 96, 96)
CHAINS = ("labels", "probabilities")


@dataclass(frozen=True)
class Measured:
    seconds: float
    peak_mb: int  # the largest resident set of the process, with the libraries and the source volume
    before_mb: int  # the resident set before the evaluator ran
    remarks: tuple[str, ...]
    labels: NDArray[np.uint8]  # x, y, z


def measure(
    side: str, chain: str, *, classes: int = 105, scale: float = 1.0, half: bool = False, threads: int = 0
) -> Measured:
    """Run one `side` ("naive" or "ours") of a chain in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="radnode-benchmark-") as folder:
        out = Path(folder) / "labels.npy"
        command = [sys.executable, "-W", "ignore", "-m", "tests.benchmark.many_classes", "--chain", chain]
        command += ["--side", side, "--classes", str(classes), "--scale", str(scale), "--out", str(out)]
        command += ["--threads", str(threads)] + (["--half"] if half else [])
        # Threads that spin while they wait for one another make either side many times slower on a shared machine.
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(CHECKOUT)}
        done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = f"killed by signal {-done.returncode}" if done.returncode < 0 else done.stderr[-2000:]
            raise RuntimeError(f"{side} {chain}: {reason}")
        figures = json.loads(done.stdout.splitlines()[-1])
        return Measured(
            figures["seconds"], figures["peak_mb"], figures["before_mb"], tuple(figures["remarks"]), np.load(out)
        )


def run(side: str, chain: str, *, classes: int, scale: float, half: bool) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """One chain in this process: its figures and its label map."""
    import torch
    from monai.data.dataloader import DataLoader
    from monai.data.dataset import Dataset
    from monai.data.meta_tensor import MetaTensor
    from monai.engines.evaluator import SupervisedEvaluator
    from monai.inferers.inferer import SlidingWindowInferer
    from monai.transforms.compose import Compose
    from monai.transforms.intensity.dictionary import ScaleIntensityd
    from monai.transforms.post.dictionary import Activationsd, AsDiscreted, Invertd
    from monai.transforms.spatial.dictionary import Orientationd, Spacingd

    from node.infer.blockwise import ChunkedInvertArgmaxd, ChunkedInvertd
    from node.infer.reduce import to_labels, to_values
    from node.infer.sliding import SlabSlidingWindowInferer

    affine = torch.diag(torch.tensor([-SPACING_MM[0], -SPACING_MM[1], SPACING_MM[2], 1.0], dtype=torch.float64))
    image = MetaTensor(torch.from_numpy(_phantom(scale))[None], affine=affine)
    preprocessing = Compose(
        [
            Orientationd("image", axcodes="RAS"),
            Spacingd("image", pixdim=[NETWORK_MM] * 3, mode="bilinear"),
            ScaleIntensityd("image", minv=-1.0, maxv=1.0),
        ]
    )
    linear = {"transform": preprocessing, "orig_keys": "image", "nearest_interp": chain == "labels"}
    inferer = SlidingWindowInferer(ROI, 1, 0.25, mode="gaussian", padding_mode="replicate")
    if side == "naive":
        softmax, argmax = Activationsd("pred", softmax=True), AsDiscreted("pred", argmax=True)
        invert = Invertd("pred", **linear)
        post = [softmax, argmax, invert] if chain == "labels" else [softmax, invert, argmax]
    elif chain == "labels":
        inferer = SlabSlidingWindowInferer.of(inferer, to_labels("softmax"))
        post = [ChunkedInvertd("pred", **linear)]
    else:
        inferer = SlabSlidingWindowInferer.of(inferer, to_values("softmax", torch.float16 if half else None))
        post = [ChunkedInvertArgmaxd("pred", **linear)]
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset([{"image": image}], preprocessing), batch_size=1, num_workers=0),
        network=_network(classes),
        inferer=inferer,
        postprocessing=Compose(post),
    )
    before_mb, start = resident_mb("VmRSS"), time.perf_counter()
    with torch.inference_mode():
        evaluator.run()
    seconds = time.perf_counter() - start
    labels = evaluator.state.output[0]["pred"]
    remarks = list(getattr(inferer, "remarks", [])) + list(getattr(post[-1], "remarks", []))
    figures = {"seconds": round(seconds, 1), "before_mb": before_mb, "peak_mb": resident_mb("VmHWM")}
    return figures | {"remarks": remarks}, labels[0].numpy().astype(np.uint8)


def _phantom(scale: float) -> NDArray[np.float32]:
    """A volume in which every class occurs: smooth waves, three of them across each axis."""
    axes = [np.linspace(0, 3 * np.pi, max(2, round(extent * scale)), dtype=np.float32) for extent in SHAPE]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    return np.sin(x) + np.sin(1.3 * y + 0.5) * np.cos(z) + 0.5 * np.sin(x * 0.7 + z)


def _network(classes: int) -> Any:
    """One 1 × 1 × 1 convolution whose largest class is the nearest of as many centres between -1 and 1."""
    import torch

    network = torch.nn.Conv3d(1, classes, 1)
    centres = torch.linspace(-1, 1, classes)
    sharpness = 4.0 * classes
    with torch.no_grad():
        network.weight.copy_((sharpness * centres).reshape(-1, 1, 1, 1, 1))
        network.bias.copy_(-sharpness * centres**2 / 2)
    return network


def resident_mb(name: str) -> int:
    """VmRSS or VmHWM: unlike `ru_maxrss` they start anew with the program."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", choices=CHAINS, default="labels")
    parser.add_argument("--scale", type=float, default=1.0, help="of the source's extent along each axis")
    parser.add_argument("--classes", type=int, default=105)
    parser.add_argument("--half", action="store_true", help="ours keeps probabilities as float16")
    parser.add_argument("--only", choices=("naive", "ours"), help="run this one alone")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 for its own choice")
    parser.add_argument("--side", choices=("naive", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        import torch

        if given.threads:
            torch.set_num_threads(given.threads)
        figures, labels = run(given.side, given.chain, classes=given.classes, scale=given.scale, half=given.half)
        np.save(given.out, labels)
        print(json.dumps(figures))
        return
    shape = " × ".join(str(max(2, round(extent * given.scale))) for extent in SHAPE)
    print(f"{given.classes} classes, source {shape}, network grid {NETWORK_MM} mm, chain: {given.chain}")
    results: dict[str, Measured] = {}
    for side in ("ours", "naive"):
        if given.only in (None, side):
            options = {"classes": given.classes, "scale": given.scale, "half": given.half, "threads": given.threads}
            try:
                done = results[side] = measure(side, given.chain, **options)
            except RuntimeError as error:
                print(f"{side:6} failed: {error}")
                continue
            remarks = "".join(f"  {remark}" for remark in done.remarks)
            print(f"{side:6} {done.seconds:8.1f} s   peak {done.peak_mb:6d} MB ({done.before_mb} before){remarks}")
    if len(results) == 2:
        ours, naive = results["ours"], results["naive"]
        different = int(np.count_nonzero(ours.labels != naive.labels))
        print(f"memory {ours.peak_mb / naive.peak_mb:.2f}, time {ours.seconds / naive.seconds:.2f} of MONAI's chain")
        print(f"labels present: {len(np.unique(ours.labels))}; voxels that differ: {different} of {ours.labels.size}")


if __name__ == "__main__":
    main()
