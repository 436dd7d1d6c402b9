"""Programs with an in-folder and an out-folder: a mercure module, a MONAI-style program, and those that misbehave.

The programs are real and run as processes. No container engine runs here: a container's command line is tested as such.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from node.dicom.assembly import VolumePlan, assemble_volumes
from node.dicom.header import read_header
from node.dicom.pixels import read_volume
from node.dicom.volume import Grid
from node.errors import ManifestError, ModelError, OutputRefused
from node.infer.command import CommandModel
from node.infer.container import container_argv
from node.infer.model import load_model
from node.infer.nifti import read_labelmap
from node.infer.package import load_package
from node.infer.packagings import Command
from node.infer.results import DicomObjects, Labelmap
from tests.dicom.slices import PATIENT, write_series
from tests.infer.phantoms import GEOMETRIES, scan

KEY = "3f" * 32

# As mercure's own test module is written: every image of every series blurred, as a new series.
MERCURE = """
import json, os, sys
from pathlib import Path
import numpy as np
import pydicom
from pydicom.uid import generate_uid

source, target = Path(os.environ["MERCURE_IN_DIR"]), Path(os.environ["MERCURE_OUT_DIR"])
task = json.loads((source / "task.json").read_text())
settings = {"offset": 1, "series_offset": 1000}
settings.update(task["process"]["settings"])
series = {}
for file in source.glob("*.dcm"):
    series.setdefault(file.name.split("#", 1)[0], []).append(file)
for files in series.values():
    series_uid = generate_uid()
    for file in files:
        ds = pydicom.dcmread(file)
        ds.SeriesInstanceUID = series_uid
        ds.SOPInstanceUID = generate_uid()
        ds.SeriesNumber = 1 + settings["series_offset"]
        ds.SeriesDescription = "SHIFTED"
        ds.PixelData = (ds.pixel_array + settings["offset"]).astype("<i2").tobytes()
        ds.save_as(target / f"{series_uid}#{file.name.split('#', 1)[1]}")
(target / "result.json").write_text(json.dumps({"offset": settings["offset"]}))
"""

# As a MONAI Application Package looks for its folders, giving a label map in nibabel's order of axes.
MAP = """
import os
from pathlib import Path
import nibabel, numpy as np, pydicom

source, target = Path(os.environ["HOLOSCAN_INPUT_PATH"]), Path(os.environ["HOLOSCAN_OUTPUT_PATH"])
assert (Path(os.environ["HOLOSCAN_MODEL_PATH"]) / "weights.txt").read_text() == "weights"
slices = sorted((pydicom.dcmread(f) for f in source.rglob("*.dcm")), key=lambda d: float(d.ImagePositionPatient[2]))
first, last = slices[0], slices[-1]
row, column = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
step = (np.array(last.ImagePositionPatient, float) - np.array(first.ImagePositionPatient, float)) / (len(slices) - 1)
affine = np.eye(4)
affine[:3, 0] = row * float(first.PixelSpacing[1])
affine[:3, 1] = column * float(first.PixelSpacing[0])
affine[:3, 2] = step
affine[:3, 3] = first.ImagePositionPatient
affine = np.diag([-1.0, -1, 1, 1]) @ affine
array = np.stack([d.pixel_array.T for d in slices], axis=-1)
image = nibabel.Nifti1Image((array > 500).astype(np.uint8), affine)
(target / "segmentation").mkdir()
nibabel.save(nibabel.as_closest_canonical(image), target / "segmentation" / "labels.nii.gz")
"""

MANIFEST = """\
title: Program
adapter: command
version: 2.0.0
intended_use: Tests.
licence_code: Apache-2.0
licence_weights: none
inputs: {image: {}}
"""
SEGMENTS = 'segments: {1: {name: Marker, type: [99TEST, "1", Marker]}}\n'
OBJECTS = "task: objects\n"

Build = Callable[..., CommandModel]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A package with the program as `program.py`, loaded."""

    def build_package(
        program: str, settings: str = "", *, meanings: str = OBJECTS, timeout_s: float = 60
    ) -> CommandModel:
        folder = tmp_path / "program"
        (folder / "models").mkdir(parents=True, exist_ok=True)
        (folder / "models" / "weights.txt").write_text("weights")
        (folder / "program.py").write_text(program)
        run = f'command:\n  run: [{sys.executable}, "{{package}}/program.py"]\n'
        (folder / "dicom.yaml").write_text(f"{MANIFEST}{meanings}timeout_s: {timeout_s}\n{run}{settings}")
        model = load_model(load_package(folder), "cpu")
        assert isinstance(model, CommandModel)
        return model

    return build_package


@pytest.fixture
def plans(tmp_path: Path) -> dict[str, VolumePlan]:
    """A series of six slices as it lies in an archive."""
    array = np.arange(6 * 8 * 10, dtype=np.int16).reshape(6, 8, 10)
    return plan_of(tmp_path / "study", array, AccessionNumber="A1", StudyID="", SeriesNumber=3, **PATIENT)


def plan_of(folder: Path, array: Any, **values: Any) -> dict[str, VolumePlan]:
    paths = write_series(folder, array, **values)
    (volume,) = assemble_volumes({path: read_header(path) for path in paths}).volumes
    return {"image": volume}


def objects(result: object) -> DicomObjects:
    assert isinstance(result, DicomObjects)
    return result


# -- mercure modules ---------------------------------------------------------------------------------------------------


def test_mercure_module_runs_unmodified(build: Build, plans: dict[str, VolumePlan]) -> None:
    before = {path: path.read_bytes() for path in plans["image"].paths}
    result = objects(build(MERCURE, "  settings: {offset: 7}\n").run(plans, KEY))
    assert len(result.datasets) == 6
    assert result.record == {"offset": 7}
    sources = sorted((dcmread(path) for path in plans["image"].paths), key=lambda d: d.InstanceNumber)
    for dataset, source in zip(result.datasets, sources, strict=True):
        assert np.array_equal(dataset.pixel_array, source.pixel_array + 7)
        assert dataset.StudyInstanceUID == source.StudyInstanceUID
        assert dataset.SeriesInstanceUID != source.SeriesInstanceUID
        assert dataset.SeriesNumber == 1001
    assert len({dataset.SeriesInstanceUID for dataset in result.datasets}) == 1
    assert len({dataset.SOPInstanceUID for dataset in result.datasets}) == 6
    assert {path: path.read_bytes() for path in plans["image"].paths} == before


def test_same_job_makes_the_same_objects(build: Build, plans: dict[str, VolumePlan]) -> None:
    """The module makes random UIDs and file names; the job's own follow from its key."""
    model = build(MERCURE)
    one, two = (objects(model.run(plans, KEY)) for _ in range(2))
    other = objects(model.run(plans, "9a" * 32))

    def encoded(result: DicomObjects) -> list[Any]:
        return [(str(d.SOPInstanceUID), str(d.SeriesInstanceUID), d.PixelData) for d in result.datasets]

    assert encoded(one) == encoded(two)
    assert not {d.SOPInstanceUID for d in one.datasets} & {d.SOPInstanceUID for d in other.datasets}
    for dataset in one.datasets:
        assert str(dataset.SOPInstanceUID).startswith("2.25.")
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID


REFERRING = """
import os
from pathlib import Path
import pydicom
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import generate_uid

source, target = Path(os.environ["MERCURE_IN_DIR"]), Path(os.environ["MERCURE_OUT_DIR"])
made = []
for number, file in enumerate(sorted(source.glob("*.dcm"))[:2]):
    ds = pydicom.dcmread(file)
    original = Dataset()
    original.ReferencedSOPClassUID, original.ReferencedSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    if number:
        ds.SOPInstanceUID = generate_uid()  # the first keeps its input's
        other = Dataset()
        other.ReferencedSOPClassUID, other.ReferencedSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
        ds.ReferencedImageSequence = Sequence([other])
    ds.SourceImageSequence = Sequence([original])
    ds.SeriesNumber, ds.InstanceNumber = 9, number
    ds.SeriesInstanceUID = "1.2.3.4"
    ds.PatientName, ds.AccessionNumber = "", ""
    ds.save_as(target / f"{number}.dcm")
"""


def test_references_follow_and_those_to_the_input_stay(build: Build, plans: dict[str, VolumePlan]) -> None:
    given = {slice_.sop_instance_uid for slice_ in plans["image"].slices}
    first, second = objects(build(REFERRING).run(plans, KEY)).datasets
    assert not {str(first.SOPInstanceUID), str(second.SOPInstanceUID)} & given
    assert str(first.SourceImageSequence[0].ReferencedSOPInstanceUID) in given
    assert str(second.SourceImageSequence[0].ReferencedSOPInstanceUID) in given
    assert second.ReferencedImageSequence[0].ReferencedSOPInstanceUID == second.SOPInstanceUID
    assert str(first.PatientName) == PATIENT["PatientName"], "what was left empty is the input's"
    assert first.AccessionNumber == "A1"


@pytest.mark.parametrize("said", ["del ds.SpecificCharacterSet", "ds.SpecificCharacterSet = 'ISO_IR 100'"])
@pytest.mark.parametrize(("charset", "name"), [("ISO_IR 192", "Παπαδόπουλος^Νίκος"), ("ISO_IR 100", "Müller^Jürgen")])
def test_a_name_that_is_filled_in_keeps_its_letters(
    build: Build, tmp_path: Path, charset: str, name: str, said: str
) -> None:
    given = {**PATIENT, "PatientName": name, "SpecificCharacterSet": charset}
    plans = plan_of(tmp_path / "study", np.zeros((2, 8, 8), np.int16), **given)
    program = REFERRING.replace('ds.PatientName, ds.AccessionNumber = "", ""', f"del ds.PatientName; {said}")
    program = program.replace("ds.SeriesNumber,", "ds.SeriesDescription = 'Größe'; ds.SeriesNumber,", 1)
    for dataset in objects(build(program.replace("    del ", "    ds.decode(); del ")).run(plans, KEY)).datasets:
        file = io.BytesIO()
        dataset.save_as(file, enforce_file_format=True)
        written = dcmread(io.BytesIO(file.getvalue()))
        assert str(written.PatientName) == name
        assert written.SpecificCharacterSet in ("ISO_IR 100", "ISO_IR 192")
        assert written.SeriesDescription == "Größe"


# -- NIfTI label maps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_labels_lie_where_the_program_put_them(build: Build, tmp_path: Path, name: str) -> None:
    """The program sorts slices its own way and writes its file in another order of axes than the input's."""
    directions, spacing_mm = GEOMETRIES[name]
    volume, truth = scan(directions, spacing_mm)
    plan = plan_of(
        tmp_path / "study",
        volume.array.astype(np.int16),
        row=tuple(directions[:, 0]),
        column=tuple(directions[:, 1]),
        spacing_mm=spacing_mm,
        origin_mm=tuple(volume.grid.affine_lps[:3, 3]),
        descending=bool(np.dot(np.cross(directions[:, 0], directions[:, 1]), directions[:, 2]) < 0),
    )
    if name in ("coronal", "sagittal"):
        program = MAP.replace("float(d.ImagePositionPatient[2])", "np.dot(d.ImagePositionPatient, "
                              "np.cross(d.ImageOrientationPatient[:3], d.ImageOrientationPatient[3:]))")  # fmt: skip
    else:
        program = MAP
    result = build(program, meanings=SEGMENTS).run(plan, KEY)
    assert isinstance(result, Labelmap)
    assert np.array_equal(result.array == 1, read_volume(plan["image"]).array > 500)
    assert int((result.array == 1).sum()) == int(truth.sum())


def nifti(path: Path, array: Any, affine_ras: Any, **header: Any) -> Path:
    image = nibabel.Nifti1Image(array, affine_ras)
    for field, value in header.items():
        image.header[field] = value
    nibabel.save(image, path)
    return path


def test_every_order_and_direction_of_axes_is_put_right(tmp_path: Path) -> None:
    volume, truth = scan(GEOMETRIES["any rotation"][0], (2.2, 1.6, 1.9), (30, 44, 52))
    labels = truth.astype(np.uint8).transpose(2, 1, 0)
    image = nibabel.Nifti1Image(labels, volume.grid.affine_ras)
    for orientation in np.ndindex(2, 2, 2):
        for axes in ((0, 1, 2), (1, 2, 0), (2, 1, 0)):
            ornt = np.array([[axis, 1 if up else -1] for axis, up in zip(axes, orientation, strict=True)])
            path = tmp_path / "labels.nii"
            nibabel.save(image.as_reoriented(ornt), path)
            assert np.array_equal(read_labelmap(path, volume.grid, {1: "Marker"}) == 1, truth), (axes, orientation)


def _moved(grid: Grid, change: Callable[[Any], Any]) -> Any:
    return change(grid.affine_ras.copy())


WRONG_GRIDS = [
    ("half a voxel away", lambda a: a + np.array([[0, 0, 0, 0.75], [0] * 4, [0] * 4, [0] * 4])),
    ("other spacing", lambda a: a @ np.diag([1.01, 1, 1, 1])),
    ("sheared", lambda a: a + np.array([[0, 0, 0.1, 0], [0] * 4, [0] * 4, [0] * 4])),
    ("LPS taken for RAS", lambda a: np.diag([-1.0, -1, 1, 1]) @ a),
    ("no geometry", lambda a: np.eye(4)),
    ("flat", lambda a: np.diag([1.0, 1, 0, 1])),
]


@pytest.mark.parametrize(("what", "change"), WRONG_GRIDS, ids=[case[0] for case in WRONG_GRIDS])
def test_labels_on_another_grid_are_refused(tmp_path: Path, what: str, change: Callable[[Any], Any]) -> None:
    volume, truth = scan(GEOMETRIES["axial"][0])
    labels = truth.astype(np.uint8).transpose(2, 1, 0)
    image = nibabel.Nifti1Image(labels, None)
    image.header.set_sform(_moved(volume.grid, change), 1)
    image.header.set_qform(None, 0)
    nibabel.save(image, tmp_path / "labels.nii")
    with pytest.raises(OutputRefused, match="lies on another grid than the input"):
        read_labelmap(tmp_path / "labels.nii", volume.grid, {1: "Marker"})


def test_file_that_is_no_label_map_is_refused(tmp_path: Path) -> None:
    volume, truth = scan(GEOMETRIES["axial"][0])
    affine, labels = volume.grid.affine_ras, truth.astype(np.float32).transpose(2, 1, 0)
    cases = [
        (nifti(tmp_path / "a.nii", labels[:-1], affine), "lies on another grid"),
        (nifti(tmp_path / "b.nii", labels * 0.5, affine), "fractional labels"),
        (nifti(tmp_path / "c.nii", labels * 7, affine), r"labels \[7\] that dicom.yaml does not declare"),
        (nifti(tmp_path / "d.nii", labels[..., 0], affine), "has 2 dimensions"),
    ]
    (tmp_path / "e.nii").write_bytes(b"rubbish" * 100)
    (tmp_path / "f.nii.gz").write_bytes(b"rubbish")
    whole = nifti(tmp_path / "g.nii", labels, affine).read_bytes()
    (tmp_path / "g.nii").write_bytes(whole[:5000])
    cases += [(tmp_path / f"{name}", "not a NIfTI file") for name in ("e.nii", "f.nii.gz")]
    cases.append((tmp_path / "g.nii", "is damaged"))
    for path, sentence in cases:
        with pytest.raises(OutputRefused, match=sentence):
            read_labelmap(path, volume.grid, {1: "Marker"})


def test_label_map_is_the_only_one_or_the_one_that_is_named(build: Build, plans: dict[str, VolumePlan]) -> None:
    two = MAP.replace("500", "200") + 'nibabel.save(image, target / "other.nii")\n'
    with pytest.raises(OutputRefused, match=r"expected a \.nii or \.nii\.gz file in the out-folder, found 2 among 2"):
        build(two, meanings=SEGMENTS).run(plans, KEY)
    result = build(two, "  file: segmentation/labels.nii.gz\n", meanings=SEGMENTS).run(plans, KEY)
    assert isinstance(result, Labelmap)
    assert np.array_equal(result.array == 1, read_volume(plans["image"]).array > 200)
    with pytest.raises(OutputRefused, match=r"expected labels\.nii in the out-folder, found 0"):
        build(two, "  file: labels.nii\n", meanings=SEGMENTS).run(plans, KEY)


# -- What goes wrong ---------------------------------------------------------------------------------------------------


def changed(line: str) -> str:
    """The mercure module with one more line on every object that it writes."""
    return MERCURE.replace("        ds.save_as(", f"        {line}\n        ds.save_as(")


WRONG_OBJECTS = [
    ("another study", changed("ds.StudyInstanceUID = '1.2.3'"), "belongs to study 1.2.3, the input to"),
    ("another ID", changed("ds.PatientID = 'OTHER-1'"), "has another PatientID than its input"),
    ("another name", changed("ds.PatientName = 'Else^Somebody'"), "has another PatientName than its input"),
    ("another birth date", changed("ds.PatientBirthDate = '19990909'"), "has another PatientBirthDate"),
    ("one UID", changed("ds.SOPInstanceUID = '1.2.3'"), "have the same SOP Instance UID"),
    ("no study", changed("del ds.StudyInstanceUID"), "has no valid StudyInstanceUID"),
    ("no UID", changed("ds.SOPInstanceUID = 'none'"), "has no valid SOPInstanceUID"),
    ("no class", changed("del ds.SOPClassUID"), "has no valid SOPClassUID"),
    ("no image", changed("ds.SOPClassUID = '1.2.840.10008.1.1'"), "which is not stored"),
    ("rubbish", "import os; open(os.environ['MERCURE_OUT_DIR'] + '/a.dcm', 'wb').write(b'rubbish' * 99)",
     "is not a DICOM object"),
    ("cut", "import os, glob; c = open(glob.glob(os.environ['MERCURE_IN_DIR'] + '/*.dcm')[0], 'rb').read(); "
     "open(os.environ['MERCURE_OUT_DIR'] + '/a.dcm', 'wb').write(c[:400])", "file 1 of the out-folder"),
    ("other files", "import os; open(os.environ['MERCURE_OUT_DIR'] + '/a.txt', 'w').write('text')",
     "wrote no DICOM object, and 1 files of other kinds"),
    ("a link", "import os; os.symlink('/etc/passwd', os.environ['MERCURE_OUT_DIR'] + '/a.dcm')", "a link or a special"),
    ("a pipe", "import os; os.mkfifo(os.environ['MERCURE_OUT_DIR'] + '/a.dcm')", "a link or a special file"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "program", "sentence"), WRONG_OBJECTS, ids=[case[0] for case in WRONG_OBJECTS])
def test_objects_that_are_no_result_are_refused(
    build: Build, plans: dict[str, VolumePlan], what: str, program: str, sentence: str
) -> None:
    with pytest.raises(OutputRefused) as refusal:
        build(program).run(plans, KEY)
    assert sentence in str(refusal.value), what
    for value in (*PATIENT.values(), "Nemo", "OTHER-1", "Somebody", "19990909"):
        assert value not in str(refusal.value)


def test_copies_and_other_files_are_left_out_with_a_remark(build: Build, plans: dict[str, VolumePlan]) -> None:
    program = MERCURE + (
        "import shutil\n"
        "for file in source.glob('*'):\n    shutil.copy(file, target)\n"
        "(target / 'report.pdf').write_bytes(b'%PDF')\n"
        "(target / 'result.json').write_text('{\"__mercure_routing\": {\"discard\": true}}')\n"
    )
    result = objects(build(program).run(plans, KEY))
    assert len(result.datasets) == 6
    assert result.remarks == (
        "__mercure_routing in result.json was not followed",
        "6 copies of the input were left out",
        "1 files that are not DICOM were left out",
    )


def test_nothing_found_is_a_result(build: Build, plans: dict[str, VolumePlan]) -> None:
    result = objects(build("").run(plans, KEY))
    assert (result.datasets, result.record, result.remarks) == ((), {}, ())


FAILING = """
import os, sys
from pathlib import Path
import pydicom
ds = pydicom.dcmread(next(Path(os.environ["MERCURE_IN_DIR"]).glob("*.dcm")))
print("reading", ds.PatientName, "born", ds.PatientBirthDate)
print(f"cannot segment {ds.SOPClassUID} of {ds.PatientID}, nemo", file=sys.stderr)
sys.exit(3)
"""


def test_program_that_fails_is_quoted_without_the_patient(build: Build, plans: dict[str, VolumePlan]) -> None:
    with pytest.raises(ModelError) as failure:
        build(FAILING).run(plans, KEY)
    text = str(failure.value)
    assert text.startswith("model program ended with status 3: ")
    assert "cannot segment 1.2.840.10008.5.1.4.1.1.2 of [patient], [patient]" in text
    assert "\n" not in text
    for value in (*PATIENT.values(), "Nemo", "nemo", "Secret"):
        assert value not in text
    with pytest.raises(ModelError, match="ended by signal SIGSEGV"):
        build("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").run(plans, KEY)


# Starts another process, as a shell script that calls Python does, and says who they are.
HANGING = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({pids!r}, "w").write(f"{{os.getpid()}} {{child.pid}} {{os.environ['MERCURE_IN_DIR']}}")
time.sleep({seconds})
"""


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("seconds", [600, 0], ids=["hangs", "leaves a process behind"])
def test_all_that_a_program_started_ends_with_its_run(
    build: Build, plans: dict[str, VolumePlan], tmp_path: Path, seconds: int
) -> None:
    pids = tmp_path / "pids"
    program = HANGING.format(pids=str(pids), seconds=seconds)
    model = build(program, timeout_s=2 if seconds else 60)
    if seconds:
        with pytest.raises(ModelError, match=r"model program ran longer than 2 s \(timeout_s in dicom\.yaml\)"):
            model.run(plans, KEY)
    else:
        model.run(plans, KEY)
    parent, child, in_folder = pids.read_text().split()
    until(lambda: not is_running(int(parent)) and not is_running(int(child)), 10)  # a killed process takes a moment
    assert not Path(in_folder).parent.exists()


def test_a_signal_without_a_name_is_told_by_its_number(build: Build, plans: dict[str, VolumePlan]) -> None:
    with pytest.raises(ModelError, match=r"^model program ended by signal 40$"):
        build("import os; os.kill(os.getpid(), 40)").run(plans, KEY)


def test_another_thread_stops_a_program(build: Build, plans: dict[str, VolumePlan], tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    model = build(HANGING.format(pids=str(pids), seconds=600))
    timer = threading.Timer(1.0, model.stop, ["the job was cancelled"])
    timer.start()
    with pytest.raises(ModelError, match=r"^model program was stopped: the job was cancelled$"):
        model.run(plans, KEY)
    timer.join()
    parent, child, _ = pids.read_text().split()
    until(lambda: not is_running(int(parent)) and not is_running(int(child)), 10)


def test_all_ends_when_the_worker_is_killed(build: Build, tmp_path: Path) -> None:
    """A worker whose lease is lost is gone in an instant, with a program running and a patient's files in a folder."""
    pids = tmp_path / "pids"
    build(HANGING.format(pids=str(pids), seconds=600))
    write_series(tmp_path / "study", np.zeros((4, 8, 8), np.int16))
    code = (
        "import sys; from pathlib import Path; from node.dicom.assembly import assemble_volumes\n"
        "from node.dicom.header import read_header; from node.infer.package import load_package\n"
        "from node.infer.command import CommandModel\n"
        "paths = sorted(Path(sys.argv[2]).glob('*.dcm')); package = load_package(Path(sys.argv[1]))\n"
        "(volume,) = assemble_volumes({path: read_header(path) for path in paths}).volumes\n"
        "CommandModel(package.folder, package.manifest, 'cpu').run({'image': volume}, 'ab' * 32)\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "program"), str(tmp_path / "study")]
    worker = subprocess.Popen(argv, cwd=Path(__file__).parents[2])
    try:
        until(lambda: pids.exists() and len(pids.read_text().split()) == 3)
        parent, child, in_folder = pids.read_text().split()
        assert is_running(int(child))
        assert Path(in_folder).exists()
    finally:
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
    until(lambda: not is_running(int(parent)) and not is_running(int(child)))
    until(lambda: not Path(in_folder).parent.exists())


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def test_program_that_writes_without_end_is_stopped(build: Build, plans: dict[str, VolumePlan]) -> None:
    program = (
        "import os\nwith open(os.environ['MERCURE_OUT_DIR'] + '/a.dcm', 'wb') as file:\n"
        "    while True:\n        file.write(bytes(1_000_000))\n        file.flush()\n"
    )
    with pytest.raises(ModelError, match=r"model program wrote more than 20 MB"):
        build(program, "  output_max_mb: 20\n").run(plans, KEY)


def test_program_sees_its_own_environment_only(
    build: Build, plans: dict[str, VolumePlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RADNODE_DATABASE_PASSWORD", "secret")
    program = (
        "import json, os\n"
        "open(os.environ['MERCURE_OUT_DIR'] + '/result.json', 'w').write(json.dumps(dict(os.environ)))\n"
    )
    settings = "  environment: {MODE: fast, WEIGHTS: '{package}/models/weights.txt', MERCURE_IN_DIR: /elsewhere}\n"
    seen = objects(build(program, settings).run(plans, KEY)).record
    assert "RADNODE_DATABASE_PASSWORD" not in seen
    assert seen["MODE"] == "fast"
    assert seen["WEIGHTS"].endswith("program/models/weights.txt")
    for kind, names in (("in", ("MERCURE_IN_DIR", "MONAI_INPUTPATH", "HOLOSCAN_INPUT_PATH")),
                        ("out", ("MERCURE_OUT_DIR", "MONAI_OUTPUTPATH", "HOLOSCAN_OUTPUT_PATH"))):  # fmt: skip
        assert len({seen[name] for name in names}) == 1
        assert Path(seen[names[0]]).name == kind
    assert seen["HOME"] == seen["TMPDIR"] == seen["HOLOSCAN_WORKDIR"]


def test_task_names_no_patient(build: Build, plans: dict[str, VolumePlan]) -> None:
    program = (
        "import os, shutil\nout = os.environ['MERCURE_OUT_DIR']\n"
        "shutil.copy(os.environ['MERCURE_IN_DIR'] + '/task.json', out + '/result.json')\n"
    )
    record = objects(build(program, "  settings: {sigma: 2.5}\n").run(plans, KEY)).record
    assert record["process"]["settings"] == {"sigma": 2.5}
    assert record["info"]["uid"] == plans["image"].series_uid
    assert not [value for value in PATIENT.values() if value in json.dumps(record)]


def test_program_that_is_not_there_is_said_when_the_model_is_loaded(build: Build, tmp_path: Path) -> None:
    build("")
    folder = tmp_path / "program"
    text = (folder / "dicom.yaml").read_text().replace(sys.executable, "no-such-program")
    (folder / "dicom.yaml").write_text(text)
    with pytest.raises(ModelError, match="there is no program no-such-program"):
        load_model(load_package(folder), "cpu")


# -- Containers --------------------------------------------------------------------------------------------------------

IMAGE = "docker.io/mercureimaging/mercure-testmodule@sha256:" + "0a" * 32


def test_container_has_no_network_and_writes_nowhere_else(tmp_path: Path) -> None:
    command = Command.model_validate(
        {"image": IMAGE, "arguments": ["--fast"], "environment": {"MODE": "x"}, "memory_gb": 8, "shared_memory_gb": 1}
    )
    started = container_argv(command, "radnode-1", (tmp_path / "in", tmp_path / "out"), "cuda:1")
    argv = list(started.argv)
    assert argv[:5] == ["docker", "run", "--rm", "--name", "radnode-1"]
    assert argv[-2:] == [IMAGE, "--fast"]
    assert started.container == ("docker", "radnode-1")
    pairs = list(itertools.pairwise(argv))
    for pair in (
        ("--network", "none"), ("--cap-drop", "ALL"), ("--security-opt", "no-new-privileges"), ("--pull", "never"),
        ("--user", f"{os.getuid()}:{os.getgid()}"), ("--gpus", "device=1"), ("--memory", "8g"), ("--shm-size", "1g"),
        ("--mount", f"type=bind,src={tmp_path}/in,dst=/tmp/data,readonly"),
        ("--mount", f"type=bind,src={tmp_path}/out,dst=/tmp/output"),
        ("--env", "MERCURE_IN_DIR=/tmp/data"), ("--env", "HOLOSCAN_OUTPUT_PATH=/tmp/output"), ("--env", "MODE=x"),
    ):  # fmt: skip
        assert pair in pairs
    assert "--read-only" in argv
    assert "--privileged" not in argv
    assert [argument for argument in argv if argument == "--mount"] == ["--mount"] * 2


def test_application_package_finds_its_folders_where_it_expects_them(tmp_path: Path) -> None:
    command = Command.model_validate({"image": IMAGE, "layout": "map", "engine": "podman", "entrypoint": ""})
    argv = list(container_argv(command, "radnode-1", (tmp_path / "in", tmp_path / "out"), "cuda:0").argv)
    assert argv[0] == "podman"
    assert "HOLOSCAN_INPUT_PATH=/var/holoscan/input" in argv
    assert f"type=bind,src={tmp_path}/out,dst=/var/holoscan/output" in argv
    assert argv[argv.index("--device") + 1] == "nvidia.com/gpu=0"
    assert argv[argv.index("--entrypoint") + 1] == ""
    assert "--gpus" not in container_argv(command, "n", (tmp_path, tmp_path), "cpu").argv


# A stand-in for the engine: it notes how it was called. A container is made when the engine comes to it, whether its
# client still lives or not, and is a file by its name.
ENGINE = """#!/bin/sh
cd {folder}
echo "$@" >> calls
case "$1" in
run) setsid sh -c "sleep {seconds}; touch containers/$4; echo made >> calls" & sleep 600 ;;
rm) [ -e containers/$3 ] && rm containers/$3 ;;
container) [ -e containers/$3 ] ;;
esac
"""


@pytest.mark.parametrize("seconds", [0, 2], ids=["runs", "is made after its client was killed"])
def test_container_is_started_and_removed_by_its_name(
    plans: dict[str, VolumePlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    (tmp_path / "containers").mkdir()
    (tmp_path / "bin").mkdir()
    engine = tmp_path / "bin" / "docker"
    engine.write_text(ENGINE.format(folder=tmp_path, seconds=seconds))
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    folder = tmp_path / "container"
    folder.mkdir()
    (folder / "dicom.yaml").write_text(f"{MANIFEST}{OBJECTS}timeout_s: 1\ncommand:\n  image: {IMAGE}\n")
    model = load_model(load_package(folder), "cpu")
    assert isinstance(model, CommandModel)
    with pytest.raises(ModelError, match="ran longer than 1 s"):
        model.run(plans, KEY)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].startswith("run --rm --name radnode-3f3f3f3f3f3f3f3f-")
    name = calls[0].split()[3]
    until(lambda: "made" in (tmp_path / "calls").read_text())
    assert calls.index("made") < len(calls) - 1 - calls[::-1].index(f"rm --force {name}")
    assert list((tmp_path / "containers").iterdir()) == []


# -- The manifest ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "meanings", "sentence"),
    [
        ("{}", OBJECTS, "expected either run (a program) or image (a container)"),
        (f"{{run: [a], image: {IMAGE}}}", OBJECTS, "expected either run (a program) or image (a container)"),
        ("{image: 'mercureimaging/testmodule:latest'}", OBJECTS, "expected an image by its digest"),
        ("{image: '--privileged'}", OBJECTS, "expected an image by its digest"),
        ("{run: [a], arguments: [b]}", OBJECTS, "arguments and entrypoint belong to image"),
        ("{run: [a], environment: {'A=B': c}}", OBJECTS, "found the variable 'A=B'"),
        ("{run: [a]}", OBJECTS + SEGMENTS, "mean nothing for objects"),
        ("{run: [a]}", "", "a segmentation needs segments"),
        ("{run: [a], file: ../x.nii}", SEGMENTS, "expected a path inside the package"),
    ],
)
def test_manifest_that_is_wrong_says_where(tmp_path: Path, command: str, meanings: str, sentence: str) -> None:
    (tmp_path / "dicom.yaml").write_text(f"{MANIFEST}{meanings}command: {command}\n")
    with pytest.raises(ManifestError) as refusal:
        load_package(tmp_path)
    assert sentence in str(refusal.value)


def test_input_that_cannot_be_read_any_more(build: Build, plans: dict[str, VolumePlan]) -> None:
    gone = replace(plans["image"], paths=tuple(path.with_name("gone") for path in plans["image"].paths))
    with pytest.raises(ModelError, match=r"instance [0-9.]+ cannot be read"):
        build("").run({"image": gone}, KEY)


def test_subject_is_compared_without_padding(build: Build, plans: dict[str, VolumePlan]) -> None:
    program = changed("ds.PatientName = 'NEMO^Secret^^'; ds.PatientID = 'ID-4711 '")
    assert len(objects(build(program).run(plans, KEY)).datasets) == 6
    assert isinstance(plans["image"].headers[0], Dataset)
