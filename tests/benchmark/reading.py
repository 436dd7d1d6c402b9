"""Reading a series into a float volume, side by side: `python -m tests.benchmark.reading [--slices N] [--repeat N]`.

SimpleITK's ImageSeriesReader (GDCM), highdicom's `get_volume_from_series` and `read_volume` read the same files, each
in a process of its own, whose first reading is not timed: the page cache is warm for all. Seconds are the median of
`--repeat` readings; memory is the most that the process held above what it held before, in float32 volumes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    EnhancedCTImageStorage,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)
from scipy.ndimage import gaussian_filter

from tests.dicom.slices import write_series

SIZE = 512
READERS = ("SimpleITK", "highdicom", "ours")
ENCODINGS = {"RLE": RLELossless, "JPEG-LS": JPEGLSLossless, "JPEG 2000": JPEG2000Lossless}


def make_series(folder: Path, slices: int) -> list[Path]:
    """A CT series of smooth structures with noise, which compresses as CT does."""
    rng = np.random.default_rng(1)
    plane = gaussian_filter(rng.normal(0, 1, (SIZE, SIZE)), 8) * 9000 - 200
    noise = rng.normal(0, 12, (SIZE, SIZE))
    array = np.stack([np.roll(plane, index) + np.roll(noise, 7 * index, 1) for index in range(slices)])
    return write_series(folder, np.clip(array, -1024, 3000).astype(np.int16))


def make_compressed(folder: Path, paths: list[Path], syntax: str) -> list[Path]:
    """The same series in another transfer syntax."""
    folder.mkdir()
    for path in paths:
        dataset = dcmread(path)
        dataset.compress(syntax, generate_instance_uid=False)
        dataset.save_as(folder / path.name)
    return sorted(folder.iterdir())


def make_multiframe(folder: Path, paths: list[Path]) -> list[Path]:
    """The same series as one enhanced CT object, as much of it as readers of volumes look at."""
    folder.mkdir()
    first = dcmread(paths[0])
    moved = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept")
    whole = Dataset()
    whole.update({element.tag: element for element in first if element.keyword not in (*moved, "SliceThickness")})
    whole.file_meta = first.file_meta
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    whole.SOPInstanceUID = whole.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    whole.NumberOfFrames = len(paths)
    shared = Dataset()
    shared.PlaneOrientationSequence = [_item(ImageOrientationPatient=first.ImageOrientationPatient)]
    shared.PixelMeasuresSequence = [_item(PixelSpacing=first.PixelSpacing, SliceThickness="2")]
    shared.PixelValueTransformationSequence = [_item(RescaleSlope="1", RescaleIntercept="0", RescaleType="HU")]
    whole.SharedFunctionalGroupsSequence = [shared]
    slices = [dcmread(path) for path in paths]
    frames = []
    for number, slice_ in enumerate(slices, 1):
        frame = Dataset()
        frame.PlanePositionSequence = [_item(ImagePositionPatient=slice_.ImagePositionPatient)]
        frame.FrameContentSequence = [_item(StackID="1", InStackPositionNumber=number, DimensionIndexValues=[number])]
        frames.append(frame)
    whole.PerFrameFunctionalGroupsSequence = frames
    whole.PixelData = b"".join(slice_.PixelData for slice_ in slices)
    path = folder / "enhanced.dcm"
    whole.save_as(path, enforce_file_format=True)
    return [path]


def _item(**values: object) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def prepare(reader: str, folder: Path) -> Callable[[], np.ndarray]:
    """What reads the series in `folder`; what a node knows before it reads (paths in order, headers) is not timed."""
    paths = sorted(folder.iterdir())
    if reader == "SimpleITK":
        import SimpleITK as sitk

        def read() -> np.ndarray:
            if len(paths) == 1:
                return sitk.GetArrayFromImage(sitk.ReadImage(str(paths[0]), sitk.sitkFloat32))
            series = sitk.ImageSeriesReader()
            series.SetFileNames([str(path) for path in paths])
            series.SetOutputPixelType(sitk.sitkFloat32)
            return sitk.GetArrayFromImage(series.Execute())

    elif reader == "highdicom":
        import highdicom

        def read() -> np.ndarray:
            if len(paths) == 1:
                return highdicom.imread(paths[0]).get_volume(dtype=np.float32).array
            return highdicom.get_volume_from_series([dcmread(path) for path in paths], dtype=np.float32).array

    else:
        from node.dicom.assembly import assemble_volumes
        from node.dicom.header import read_header
        from node.dicom.pixels import read_volume

        (plan,) = assemble_volumes({path: read_header(path) for path in paths}).volumes

        def read() -> np.ndarray:
            return read_volume(plan).array

    return read


def measure(reader: str, folder: Path, repeat: int) -> None:
    """Print one reader's figures as JSON; runs in a process of its own."""
    read = prepare(reader, folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here (proc_pid_clear_refs(5))
    before_kib = _status("VmRSS")
    array = read()
    memory = (_status("VmHWM") - before_kib) * 1024 / (array.size * 4)
    mean = float(np.asarray(array[:: max(1, len(array) // 8)], np.float64).mean())
    del array
    seconds = []
    for _ in range(repeat):
        clock = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - clock)
    print(json.dumps({"s": statistics.median(seconds), "memory": memory, "mean": mean}))


def _status(key: str) -> int:
    """A size of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    """Measure every reader on every encoding and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=400)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--encodings", nargs="*", default=["plain", "multi-frame", *ENCODINGS])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]), options.repeat)
        return
    with tempfile.TemporaryDirectory() as root:
        plain = make_series(Path(root, "plain"), options.slices)
        print(f"{options.slices} slices of {SIZE}x{SIZE}; ratios are to SimpleITK")
        for encoding in options.encodings:
            if encoding == "multi-frame":
                make_multiframe(Path(root, encoding), plain)
            elif encoding != "plain":
                make_compressed(Path(root, encoding), plain, ENCODINGS[encoding])
            peer = 0.0
            for reader in READERS:
                command = [sys.executable, "-m", "tests.benchmark.reading", "--repeat", str(options.repeat)]
                done = subprocess.run(
                    [*command, "--measure", reader, str(Path(root, encoding))],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    print(f"{encoding:12} {reader:10} failed: {done.stderr.strip().splitlines()[-1:]}")
                    continue
                found = json.loads(done.stdout.splitlines()[-1])
                peer = peer or found["s"]
                print(
                    f"{encoding:12} {reader:10} {found['s']:7.2f} s  ratio {found['s'] / peer:5.2f}  "
                    f"memory {found['memory']:4.2f} x the volume  (mean {found['mean']:.3f})"
                )


if __name__ == "__main__":
    main()
