"""Writing 104 segments, side by side with dcmqi: `python -m tests.benchmark.seg [--slices N] [--segments N]`.

A synthetic label map of irregular organs on a CT series becomes a SEG file: ours as BINARY and as LABELMAP, and that
of dcmqi's `itkimage2segimage` in both types. Each runs in a process of its own; memory is the most that the process
ever held. Ours is timed from the label map in memory to the file on disk, without the interpreter's start and imports;
dcmqi's time and memory are those of its program, which reads a label map of NRRD without compression and the headers of
the series. Last comes the SR of as many groups of 8 measurements;
`--kinds` times further kinds instead. All are medians of `--repeat` runs; where others use
the machine meanwhile, seconds of CPU say more than those of the clock.
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from scipy.ndimage import zoom

from tests.dicom.slices import write_series

SIZE = 512
CODES = {
    "category": ["SCT", "123037004", "Anatomical Structure"],
    "type": ["SCT", "113343008", "Organ"],
}
OURS = ("binary", "labelmap")
MEASURES = 8


def draw_organs(slices: int, segments: int, size: int = SIZE) -> NDArray[np.uint8]:
    """Irregular ellipsoids of the sizes that organs, bones and vessels have, later ones over earlier ones."""
    rng = np.random.default_rng(5)
    shape = np.array((slices, size, size))
    labels = np.zeros(shape, np.uint8)
    rough = rng.normal(0, 1, (24, 24, 24))
    for label in range(1, segments + 1):
        radii = np.array((rng.uniform(0.04, 0.3), *rng.uniform(0.015, 0.09, 2))) * shape
        centre = np.array((rng.uniform(0.15, 0.85), *rng.uniform(0.2, 0.8, 2))) * shape
        low = np.maximum(0, centre - 1.5 * radii).astype(int)
        high = np.minimum(shape, centre + 1.5 * radii + 1).astype(int)
        grid = np.ogrid[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        distance = sum(((axis - c) / r) ** 2 for axis, c, r in zip(grid, centre, radii, strict=True))
        bumps = zoom(np.roll(rough, label, label % 3)[:8, :8, :8], (high - low) / 8, order=1)
        labels[tuple(slice(a, b) for a, b in zip(low, high, strict=True))][distance + 0.25 * bumps < 1] = label
    return labels


def prepare(folder: Path, slices: int, segments: int) -> None:
    """The series, the label map for both sides, and dcmqi's description of the segments."""
    import SimpleITK as sitk

    labels = draw_organs(slices, segments)
    zeros = np.zeros((SIZE, SIZE), np.int16)
    write_series(folder / "images", np.broadcast_to(zeros, (slices, SIZE, SIZE)), spacing_mm=(1.5, 0.8, 0.8))
    np.save(folder / "labels.npy", labels)
    image = sitk.GetImageFromArray(labels.astype(np.int16))
    image.SetSpacing((0.8, 0.8, 1.5))
    image.SetOrigin((-10.0, -20.0, 30.0))
    sitk.WriteImage(image, str(folder / "labels.nrrd"), useCompression=False)
    code = {name: dict(zip(("CodingSchemeDesignator", "CodeValue", "CodeMeaning"), value, strict=True))
            for name, value in CODES.items()}  # fmt: skip
    attributes = [
        {
            "labelID": int(label),
            "SegmentLabel": f"Organ {label}",
            "SegmentDescription": f"Organ {label}",
            "SegmentAlgorithmType": "AUTOMATIC",
            "SegmentAlgorithmName": "synthetic",
            "SegmentedPropertyCategoryCodeSequence": code["category"],
            "SegmentedPropertyTypeCodeSequence": code["type"],
            "recommendedDisplayRGBValue": [int(label), 128, 255 - int(label)],
        }
        for label in np.unique(labels)
        if label
    ]
    whole = {
        "ContentCreatorName": "radnode",
        "SeriesDescription": "Benchmark",
        "SeriesNumber": "900",
        "InstanceNumber": "1",
        "BodyPartExamined": "CHEST",
        "segmentAttributes": [attributes],
    }
    (folder / "dcmqi.json").write_text(json.dumps(whole))


def make_subject(folder: Path) -> Any:
    """What our reports are made of: the label map over the series, whose own voxels nothing looks at."""
    from node.dicom.assembly import assemble_volumes
    from node.dicom.header import read_header
    from node.dicom.volume import Volume
    from node.infer.manifest import Manifest
    from node.infer.results import Labelmap
    from node.report.subject import Subject

    paths = sorted((folder / "images").iterdir())
    (plan,) = assemble_volumes({path: read_header(path) for path in paths}).volumes
    labels = np.load(folder / "labels.npy").astype(np.uint16)
    manifest = Manifest.model_validate(
        {
            "title": "Synthetic organs",
            "intended_use": "A benchmark.",
            "licence_code": "Apache-2.0",
            "licence_weights": "none",
            "inputs": {"image": {}},
            "segments": {label: {"name": f"Organ {label}", **CODES} for label in range(1, int(labels.max()) + 1)},
        }
    )
    volume = Volume(
        array=np.broadcast_to(np.float32(0), labels.shape),
        grid=plan.grid,
        slices=plan.slices,
        series_uid=plan.series_uid,
        study_uid=plan.study_uid,
        modality=plan.modality,
        unit="HU",
    )
    return Subject(
        key="benchmark",
        created=datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC),
        source=volume,
        sources=plan.headers,
        prediction=Labelmap(labels, plan.grid),
        manifest=manifest,
        model_name="synthetic",
        model_version="1",
        model_digest="0123456789abcdef" * 4,
        node_version="0",
    )


def measure_seg(folder: Path, form: str) -> None:
    """Print our figures for one form as JSON; runs in a process of its own."""
    from node.report.kinds import SegForm
    from node.report.results import Result
    from node.report.seg import make_seg

    subject = make_subject(folder)
    before = _peak_mib()
    clock, cpu = time.perf_counter(), time.process_time()
    result = Result("seg", make_seg(subject, SegForm(form)))
    with (folder / f"ours_{form}.dcm").open("wb") as file:
        result.write(file)
    seconds = time.perf_counter() - clock
    print(json.dumps({"s": seconds, "cpu": time.process_time() - cpu, "peak": _peak_mib(), "before": before}))


def measure_sr(folder: Path) -> None:
    """Print the seconds of an SR of a group per segment, with 8 measurements each, from the measurements to bytes."""
    from highdicom import sr
    from pydicom.sr.codedict import codes

    from node.report.kinds import SegForm
    from node.report.results import Result
    from node.report.seg import make_seg
    from node.report.sr import PlainMeasurement, describe, make_sr

    subject = make_subject(folder)
    seg = make_seg(subject, SegForm.LABELMAP)
    before = _peak_mib()
    clock, cpu = time.perf_counter(), time.process_time()
    # Concepts are made once and shared: looking a code up and checking it again costs as much as the measurement.
    quantity = sr.CodedConcept.from_code(codes.DCM.AttenuationCoefficient)
    unit = sr.CodedConcept("[hnsf'U]", "UCUM", "Hounsfield unit")
    statistics_of = (codes.SCT.Mean, codes.SCT.Minimum, codes.SCT.Maximum, codes.SCT.StandardDeviation)
    derivations = [sr.CodedConcept.from_code(code) for code in statistics_of] * 2
    groups = [
        sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
            **describe(subject, segment, str(label)),
            referenced_segment=sr.ReferencedSegment(
                sop_class_uid=seg.SOPClassUID,
                sop_instance_uid=seg.SOPInstanceUID,
                segment_number=number,
                source_series=sr.SourceSeriesForSegmentation(subject.source.series_uid),
            ),
            measurements=[
                PlainMeasurement(quantity, value=float(number + index), unit=unit, derivation=derivation)
                for index, derivation in enumerate(derivations)
            ],
        )
        for number, (label, segment) in enumerate(sorted(subject.manifest.segments.items()), 1)
    ]
    built = time.perf_counter()
    encoded = Result("sr", make_sr(subject, groups, about=[seg])).encode()
    seconds = time.perf_counter() - clock
    (folder / "sr.dcm").write_bytes(encoded)
    print(
        json.dumps(
            {
                "s": seconds,
                "groups": built - clock,
                "cpu": time.process_time() - cpu,
                "peak": _peak_mib(),
                "before": before,
            }
        )
    )


def measure_kind(folder: Path, kind: str) -> None:
    """Print the seconds of measuring the segments and making one further kind of result, down to bytes."""
    from node.report.findings import measure
    from node.report.kinds import Kind, Wanted
    from node.report.results import make_results

    subject = make_subject(folder)
    before = _peak_mib()
    clock, cpu = time.perf_counter(), time.process_time()
    findings = measure(subject)
    count = len(findings.measurements)
    measured = time.perf_counter()
    results = make_results(findings, Wanted(kinds=[Kind(kind)]))
    size = sum(len(result.encode()) for result in results)
    figures = {"s": time.perf_counter() - measured, "measured": measured - clock, "cpu": time.process_time() - cpu}
    print(
        json.dumps(
            figures | {"peak": _peak_mib(), "before": before, "segments": count, "objects": len(results), "size": size}
        )
    )


def run_dcmqi(folder: Path, form: str) -> dict[str, float]:
    """The wall-clock seconds and the peak of dcmqi's converter."""
    command = [
        *("itkimage2segimage", "--inputImageList", str(folder / "labels.nrrd")),
        *("--inputDICOMDirectory", str(folder / "images"), "--inputMetadata", str(folder / "dcmqi.json")),
        *("--outputDICOM", str(folder / f"dcmqi_{form}.dcm"), "--segmentationType", form, "--skip", "1"),
    ]
    clock = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as process:
        assert process.stdout is not None
        said = process.stdout.read().decode(errors="replace")
        # dcmqi's program is a Python script that runs the real one: the peak is that of the largest of the two.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - clock
    if process.returncode:
        raise RuntimeError(f"itkimage2segimage: {said[-400:]}")
    return {"s": seconds, "cpu": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss / 1024}


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _run_ours(folder: Path, what: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmark.seg", "--measure", what, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure each and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=400)
    parser.add_argument("--segments", type=int, default=104)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--kinds", nargs="*", default=[], help="further kinds to time, instead: summary overlay gsps keys"
    )
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, folder = options.measure[0], Path(options.measure[1])
        if what == "sr":
            measure_sr(folder)
        else:
            (measure_seg if what in OURS else measure_kind)(folder, what)
        return
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        prepare(folder, options.slices, options.segments)
        print(f"{options.segments} segments, {options.slices} slices of {SIZE}x{SIZE}, {os.cpu_count()} cores")
        for kind in options.kinds:
            found = _median([_run_ours(folder, kind) for _ in range(options.repeat)])
            print(
                f"{kind:9} {found['s']:6.2f} s after {found['measured']:.2f} s of measuring  "
                f"peak {found['peak']:5.0f} MiB  {found['objects']:.0f} objects, {found['size'] / 2**20:.1f} MiB",
                flush=True,
            )
        if options.kinds:
            return
        for form in OURS:
            peer = _median([run_dcmqi(folder, form) for _ in range(options.repeat)])
            ours = _median([_run_ours(folder, form) for _ in range(options.repeat)])
            frames = dcmread(folder / f"ours_{form}.dcm", specific_tags=["NumberOfFrames"]).NumberOfFrames
            for name, found in (("dcmqi", peer), ("ours", ours)):
                size = (folder / f"{name}_{form}.dcm").stat().st_size / 2**20
                print(
                    f"{form:9} {name:6} {found['s']:6.2f} s  ratio {found['s'] / peer['s']:4.2f}  "
                    f"CPU {found['cpu']:6.2f} s  ratio {found['cpu'] / peer['cpu']:4.2f}  "
                    f"peak {found['peak']:5.0f} MiB  file {size:6.1f} MiB  {frames} frames",
                    flush=True,
                )
        found = _median([_run_ours(folder, "sr") for _ in range(options.repeat)])
        size = (folder / "sr.dcm").stat().st_size / 2**20
        print(
            f"SR        ours   {found['s']:6.2f} s              CPU {found['cpu']:6.2f} s  "
            f"({found['groups']:.2f} s for {options.segments} groups of {MEASURES})  file {size:.1f} MiB"
        )


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(each[key] for each in runs) for key in runs[0]}


if __name__ == "__main__":
    main()
