"""Receiving, side by side with its peers in one run: `python -m tests.benchmark.ingest [--cases ...] [--out FILE]`.

The images are 512x512 CT of 525 kB that this program makes; DCMTK's `storescu` sends them over loopback. The disk's own
bound is the same bytes with the same syncs (file, folder, database row) and no network. Every figure is the median of
`--repeat` rounds, in which the receivers take turns, for a disk's speed drifts. `--flush-ms` puts a disk with a slower
flush under all of them: where a flush costs next to nothing the cores are measured, not the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

from tests.benchmark import disk_bound, receivers
from tests.benchmark.receivers import Receiver, send

IDLE_ASSOCIATIONS = 200
LARGE_FRAMES = 4096  # of 512x512x16 bit: 2 GiB
MANY = 10_000


def make_images(folder: Path, count: int, *, rows: int = 512, study_uid: str | None = None) -> Path:
    """A CT series of `count` noise slices."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(1).integers(0, 4096, (rows, rows), np.uint16)
    study_uid, series_uid = study_uid or generate_uid(), generate_uid()
    for number in range(count):
        image = _image(rows, study_uid, series_uid)
        image.InstanceNumber = number + 1
        image.ImagePositionPatient = [0, 0, float(number)]
        image.PixelData = np.roll(noise, number).tobytes()
        image.save_as(folder / f"{number:05d}.dcm", enforce_file_format=True)
    return folder


def make_large(path: Path, frames: int) -> Path:
    """One multi-frame object, written piece by piece."""
    image = _image(512, generate_uid(), generate_uid())
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    image.NumberOfFrames = frames
    image.save_as(path, enforce_file_format=True)
    frame = np.random.default_rng(2).integers(0, 4096, (512, 512), np.uint16).tobytes()
    with path.open("ab") as file:
        file.write(b"\xe0\x7f\x10\x00OW\0\0" + (frames * len(frame)).to_bytes(4, "little"))
        for _ in range(frames):
            file.write(frame)
    return path


def _image(rows: int, study_uid: str, series_uid: str) -> Dataset:
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = CTImageStorage
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    image.StudyInstanceUID, image.SeriesInstanceUID = study_uid, series_uid
    image.PatientID, image.PatientName, image.Modality = "BENCHMARK", "Benchmark", "CT"
    image.Rows = image.Columns = rows
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    image.PixelSpacing = [0.7, 0.7]
    return image


def slow_flush(library: Path, milliseconds: float) -> None:
    """Put a disk whose flush takes `milliseconds` under every process that this one starts from now on."""
    source = Path(__file__).with_name("slow_flush.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"], check=True)
    os.environ.update(LD_PRELOAD=str(library), SLOW_FLUSH_MS=str(milliseconds))


class Benchmark:
    """One run: its images, its scratch folder, and what it found."""

    def __init__(self, scratch: Path, images: int, repeat: int):
        self.scratch = scratch
        self.repeat = repeat
        self.images = images
        self.results: dict[str, dict[str, float | str]] = {}
        self._number = 0

    def folder(self) -> Path:
        """A new folder."""
        self._number += 1
        return self.scratch / f"{self._number:04d}"

    def senders(self, count: int) -> list[Path]:
        """Folders with all images, shared among `count` senders; each sender brings a study of its own."""
        return [make_images(self.folder(), self.images // count) for _ in range(count)]

    def rate(
        self, start: Callable[..., contextlib.AbstractContextManager[Receiver]], senders: list[Path], **more
    ) -> float:
        """Images per second of a fresh receiver."""
        folder = self.folder()
        with start(folder, **more) as receiver:
            rate = self.images / send(receiver, senders)
        shutil.rmtree(folder)
        return rate

    # -- the cases ---------------------------------------------------------------------------------------------------

    def one(self) -> None:
        """One association: durable against the disk's bound and Orthanc; relaxed against storescp and pynetdicom."""
        senders = self.senders(1)
        found: dict[str, list[float]] = {}
        for _ in range(self.repeat):
            found.setdefault("disk bound", []).append(disk_bound.measure("contract", self.folder(), senders[0]))
            found.setdefault("radnode durable", []).append(self.rate(receivers.radnode, senders))
            found.setdefault("Orthanc", []).append(self.rate(receivers.orthanc, senders))
            found.setdefault("radnode relaxed", []).append(self.rate(receivers.radnode, senders, durability="relaxed"))
            found.setdefault("storescp", []).append(self.rate(receivers.storescp, senders))
            found.setdefault("pynetdicom", []).append(self.rate(receivers.pynetdicom, senders))
        rates = {name: statistics.median(values) for name, values in found.items()}
        self.report("one association", rates | {
            "durable / disk bound (goal 0.9)": rates["radnode durable"] / rates["disk bound"],
            "durable / Orthanc (goal 1.5)": rates["radnode durable"] / rates["Orthanc"],
            "relaxed / storescp (goal 1.0)": rates["radnode relaxed"] / rates["storescp"],
            "relaxed / pynetdicom": rates["radnode relaxed"] / rates["pynetdicom"],
        })  # fmt: skip

    def four(self) -> None:
        """Four associations at once, durable."""
        one, four = self.senders(1), self.senders(4)
        found: dict[str, list[float]] = {}
        for _ in range(self.repeat):
            for writers in (1, 4):
                files = disk_bound.measure("files", self.folder(), one[0], writers)
                found.setdefault(f"files written and synced by {writers}", []).append(files)
            found.setdefault("radnode, one", []).append(self.rate(receivers.radnode, one))
            found.setdefault("radnode, four", []).append(self.rate(receivers.radnode, four))
            found.setdefault("Orthanc, four", []).append(self.rate(receivers.orthanc, four))
            found.setdefault("storescp --fork, four", []).append(self.rate(receivers.storescp, four))
        rates = {name: statistics.median(values) for name, values in found.items()}
        self.report("four associations", rates | {
            "the disk groups: files by 4 / by 1":
                rates["files written and synced by 4"] / rates["files written and synced by 1"],
            "four / one (goal 3)": rates["radnode, four"] / rates["radnode, one"],
            "four / Orthanc four (goal 5)": rates["radnode, four"] / rates["Orthanc, four"],
        })  # fmt: skip

    def idle(self) -> None:
        """Idle associations: what they cost, and what they cost an active sender."""
        from pynetdicom.pdu import A_ASSOCIATE_RQ  # noqa: F401 - pynetdicom is there, the request is built by hand

        senders = self.senders(1)
        alone, beside, shares = [], [], []
        for _ in range(self.repeat):
            alone.append(self.rate(receivers.radnode, senders))
            folder = self.folder()
            with receivers.radnode(folder) as receiver, idle_associations(receiver, IDLE_ASSOCIATIONS):
                before, begin = sum(receiver.process.cpu_times()[:2]), time.perf_counter()
                time.sleep(5)
                shares.append((sum(receiver.process.cpu_times()[:2]) - before) / (time.perf_counter() - begin))
                beside.append(self.images / send(receiver, senders))
            shutil.rmtree(folder)
        self.report(f"{IDLE_ASSOCIATIONS} idle associations", {
            "share of one core, % (goal 5)": 100 * statistics.median(shares),
            "alone": statistics.median(alone),
            "beside them": statistics.median(beside),
            "beside / alone (goal 0.9)": statistics.median(beside) / statistics.median(alone),
        })  # fmt: skip

    def large(self) -> None:
        """One object of 2 GiB: the receiver's memory."""
        folder = self.folder()
        folder.mkdir(parents=True)
        path = make_large(folder / "large.dcm", LARGE_FRAMES)
        with receivers.radnode(self.folder()) as receiver:
            idle = receiver.process.memory_info().rss
            peak, done = idle, threading.Event()

            def watch() -> None:
                nonlocal peak
                while not done.wait(0.01):
                    peak = max(peak, receiver.process.memory_info().rss)

            watcher = threading.Thread(target=watch)
            watcher.start()
            seconds = send(receiver, [folder])
            done.set()
            watcher.join()
        self.report("one object of 2 GiB", {
            "MB/s": path.stat().st_size / seconds / 1e6,
            "peak RSS above idle, MB (goal 150)": (peak - idle) / 1e6,
        })  # fmt: skip
        shutil.rmtree(folder)

    def many(self) -> None:
        """Many images in one study: whether the last cost more than the first."""
        study_uid = generate_uid()
        parts = [make_images(self.folder(), MANY // 10, rows=64, study_uid=study_uid) for _ in range(10)]
        with receivers.radnode(self.folder()) as receiver:
            seconds = [send(receiver, [part]) for part in parts]
        costs = [1000 * each / (MANY // 10) for each in seconds]
        self.report(f"{MANY} images in one study", {
            "first three thousand, ms per image": statistics.median(costs[:3]),
            "last three thousand, ms per image": statistics.median(costs[-3:]),
            "last / first (goal 1.1)": statistics.median(costs[-3:]) / statistics.median(costs[:3]),
        })  # fmt: skip

    def report(self, case: str, figures: dict[str, float]) -> None:
        """Print a case's figures as they come."""
        self.results[case] = dict(figures)
        print(case)
        for name, value in figures.items():
            unit = "" if any(mark in name for mark in ("/", "goal", "ms")) else " images/s"
            print(f"  {name:40} {value:10.2f}{unit}" if not unit else f"  {name:40} {value:10.0f}{unit}", flush=True)


@contextlib.contextmanager
def idle_associations(receiver: Receiver, count: int):
    """Hold `count` associations open, established and silent."""
    import socket

    from tests.receive.peers import associate

    held: list[socket.socket] = []
    try:
        for _ in range(count):
            held.append(associate(receiver.port))
        yield
    finally:
        for connection in held:
            connection.close()


CASES = ("one", "four", "idle", "large", "many")


def main() -> None:
    """Run the cases and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure; default: the system's")
    parser.add_argument("--flush-ms", type=float, help="measure on a disk whose flush takes so long (slow_flush.c)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="radnode-ingest-", dir=options.scratch))
    version = subprocess.run(["storescu", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[
        0
    ]
    print(f"{psutil.cpu_count()} cores; {version.strip()}; {options.images} images; median of {options.repeat}")
    if options.flush_ms:
        print(f"every flush takes {options.flush_ms} ms more")
        slow_flush(scratch / "slow_flush.so", options.flush_ms)
    try:
        benchmark = Benchmark(scratch, options.images, options.repeat)
        for case in options.cases:
            getattr(benchmark, case)()
        if options.out:
            options.out.write_text(json.dumps(benchmark.results, indent=2) + "\n")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
