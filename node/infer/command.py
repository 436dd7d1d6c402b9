"""Programs and containers that read DICOM files from one folder and write results into another, run unmodified.

mercure modules and MONAI Application Packages are such: the folders, the names of the files, task.json and the
environment are what their makers document. The folders live as long as the run. What came out is taken as the result
only when it is one: `node.infer.objects` and `node.infer.nifti` check that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from node.dicom.assembly import InputPlan, VolumePlan
from node.errors import ModelError, OutputRefused
from node.infer.container import Started, container_argv, folder_variables
from node.infer.failures import name_signal
from node.infer.guard import dismiss_guard, remove_container, start_guard
from node.infer.manifest import Manifest, Task
from node.infer.nifti import read_labelmap
from node.infer.objects import WrittenFile, looks_like_dicom, take_objects
from node.infer.results import DicomObjects, Labelmap

_FILES_MAX = 10_000  # that are taken from an out-folder
_RECORD_MAX = 1_000_000  # bytes of result.json
_TAIL = 4_000  # bytes of what a program said last, of which an error tells
_POLL_S = 0.2
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES")
_IDENTIFYING = ("PatientName", "PatientID", "PatientBirthDate", "OtherPatientIDs", "OtherPatientNames")


class CommandModel:
    """One program or container, started anew for every run."""

    def __init__(self, folder: Path, manifest: Manifest, device: str):
        """Look for the program or the container engine; `ModelError` where there is none."""
        if manifest.command is None:
            raise ModelError(f"model {folder.name}: dicom.yaml has no command")
        self._folder, self._manifest, self._device = folder.absolute(), manifest, device
        self._command = manifest.command
        program = self._command.run[0] if self._command.run else self._command.engine
        if shutil.which(program.replace("{package}", str(self._folder))) is None:
            raise ModelError(f"model {folder.name}: there is no program {program} to run it with")
        self._stopped = ""
        self.running = False

    def stop(self, why: str) -> None:
        """End the program, from any thread: its run, or the one that comes next, raises `ModelError` that says why."""
        self._stopped = why

    def run(self, plans: Mapping[str, InputPlan], key: str) -> DicomObjects | Labelmap:
        """Run on the files of `plans`, one for each of the manifest's inputs; UIDs of results derive from `key`.

        Raises `ModelError` when the program fails, writes too much or takes too long; `OutputRefused` when what it
        wrote is no result of these inputs.
        """
        with _folders() as root:
            in_folder, out_folder = root / "in", root / "out"
            digests = _copy_inputs(plans, in_folder)
            (in_folder / "task.json").write_text(json.dumps(self._task(plans, key)))
            headers = [header for plan in plans.values() for header in plan.headers]
            self._execute(root, key, headers)
            files = _walk(out_folder)
            if self._manifest.task is Task.SEGMENTATION:
                return self._take_labelmap(plans, out_folder, files)
            record, remarks = _read_record(out_folder, files)
            written = _read_objects(out_folder, files, digests, remarks)
            return DicomObjects(take_objects(written, headers, key), next(iter(plans)), record, tuple(remarks))

    def close(self) -> None:
        """Nothing is kept between runs."""

    def _take_labelmap(self, plans: Mapping[str, InputPlan], out_folder: Path, files: Sequence[Path]) -> Labelmap:
        name, plan = next(iter(plans.items()))
        if not isinstance(plan, VolumePlan) or plan.positions_lps is not None:
            raise OutputRefused("a label map in a NIfTI file needs an input that is a regular volume")
        wanted = self._command.file
        found = [path for path in files if path.name.endswith((".nii", ".nii.gz"))]
        if wanted is not None:
            found = [path for path in files if path.relative_to(out_folder).as_posix() == wanted]
        if len(found) != 1:
            what = wanted or "a .nii or .nii.gz file"
            raise OutputRefused(
                f"expected {what} in the out-folder, found {len(found)} among {len(files)} files; see command.file"
            )
        return Labelmap(read_labelmap(found[0], plan.grid, self._manifest.label_names), plan.grid, name)

    def _task(self, plans: Mapping[str, InputPlan], key: str) -> dict[str, Any]:
        """mercure's task.json, of which modules read `process.settings`. It names no patient: the DICOM files do."""
        plan = next(iter(plans.values()))
        series = {plan.series_uid for plan in plans.values()}
        return {
            "id": key[:36],
            "info": {
                "action": "process",
                "uid": plan.series_uid if len(series) == 1 else plan.study_uid,
                "uid_type": "series" if len(series) == 1 else "study",
                "triggered_rules": "",
                "applied_rule": "",
                "patient_name": "",
                "mrn": "",
                "acc": "",
                "mercure_version": "",
                "mercure_appliance": "radnode",
                "mercure_server": "",
            },
            "dispatch": {},
            "process": {
                "module_name": self._folder.name,
                "settings": self._command.settings,
                "retain_input_images": False,
                "output": None,
            },
            "study": {},
        }

    def _execute(self, root: Path, key: str, headers: Sequence[Dataset]) -> None:
        """Start the program, wait for its end, and end all of it; `ModelError` where that was no success."""
        started, environment = self._start(root, key)
        log = root / "log"
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    started.argv,
                    cwd=root / "work",
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as reason:
                raise ModelError(f"model {self._folder.name} could not be started ({reason.strerror})") from None
        try:
            guard = start_guard(process.pid, root, started.container)
        except BaseException:
            _end(process, started, by_itself=False)
            raise
        by_itself = False
        try:
            self.running = True
            why = self._wait(process, root)
            by_itself = not why
        finally:
            self.running = False
            _end(process, started, by_itself=by_itself)
            dismiss_guard(guard)
        if why:
            raise ModelError(f"model {self._folder.name} {why}")
        if process.returncode != 0:
            said = _last_lines(log, headers)
            how = f"with status {process.returncode}"
            if process.returncode < 0:
                how = f"by signal {name_signal(-process.returncode)}"
            raise ModelError(f"model {self._folder.name} ended {how}" + (f": {said}" if said else ""))

    def _start(self, root: Path, key: str) -> tuple[Started, dict[str, str]]:
        in_folder, out_folder, work = root / "in", root / "out", root / "work"
        inherited = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        if self._command.run is None:
            name = f"radnode-{re.sub('[^A-Za-z0-9]', '', key)[:16]}-{secrets.token_hex(4)}"
            started = container_argv(self._command, name, (in_folder, out_folder), self._device)
            engine = {
                name: os.environ[name] for name in ("DOCKER_HOST", "XDG_RUNTIME_DIR", "HOME") if name in os.environ
            }
            return started, inherited | engine
        places = {"{package}": self._folder, "{input}": in_folder, "{output}": out_folder, "{work}": work}

        def fill(text: str) -> str:
            for place, path in places.items():
                text = text.replace(place, str(path))
            return text

        environment = {
            **inherited,
            "HOME": str(work),
            "TMPDIR": str(work),
            "HOLOSCAN_WORKDIR": str(work),
            "HOLOSCAN_MODEL_PATH": str(self._folder / "models"),
            "PYTHONDONTWRITEBYTECODE": "1",  # the package's digest covers what lies in it
            **{name: fill(value) for name, value in self._command.environment.items()},
            **folder_variables(str(in_folder), str(out_folder)),
        }
        if self._device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        elif ":" in self._device and "CUDA_VISIBLE_DEVICES" not in os.environ:
            environment["CUDA_VISIBLE_DEVICES"] = self._device.partition(":")[2]
        return Started(tuple(fill(part) for part in self._command.run)), environment

    def _wait(self, process: subprocess.Popen[bytes], root: Path) -> str:
        """ "" when the program ended by itself, else why it must not go on."""
        deadline = time.monotonic() + self._manifest.timeout_s
        limit = int(self._command.output_max_mb * 1_000_000)
        pause = 0.01
        while True:
            # It stays a zombie until its group was killed, so that the group's number cannot become another's.
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            if self._stopped:
                why, self._stopped = self._stopped, ""
                return f"was stopped: {why}"
            if _written(root) > limit:
                return f"wrote more than {self._command.output_max_mb:g} MB (command.output_max_mb in dicom.yaml)"
            if ended:
                return ""
            if time.monotonic() >= deadline:
                return f"ran longer than {self._manifest.timeout_s:g} s (timeout_s in dicom.yaml)"
            time.sleep(pause)
            pause = min(_POLL_S, pause * 2)


@contextlib.contextmanager
def _folders() -> Iterator[Path]:
    """A folder that only this user may enter, with in-folder, out-folder and a place to work; gone afterwards."""
    root = Path(tempfile.mkdtemp(prefix="radnode-run-"))
    try:
        for name in ("in", "out", "work"):
            (root / name).mkdir()
        yield root
    finally:
        # A program may leave folders behind that may not be entered.
        for place, folders, _ in os.walk(root):
            for name in folders:
                with contextlib.suppress(OSError):
                    if not Path(place, name).is_symlink():
                        Path(place, name).chmod(0o700)
        shutil.rmtree(root, ignore_errors=True)


def _copy_inputs(plans: Mapping[str, InputPlan], in_folder: Path) -> set[str]:
    """Every instance once, named as mercure names it; the digests of their contents.

    Copies, as a program that writes into its in-folder must not write into the archive.
    """
    digests: set[str] = set()
    for plan in plans.values():
        for path, slice_ in zip(plan.paths, plan.slices, strict=True):
            copied = in_folder / f"{plan.series_uid}#{slice_.sop_instance_uid}.dcm"
            if copied.exists():
                continue
            try:
                content = path.read_bytes()
            except OSError as reason:
                raise ModelError(f"instance {slice_.sop_instance_uid} cannot be read ({reason.strerror})") from None
            copied.write_bytes(content)
            copied.chmod(0o444)
            digests.add(hashlib.sha256(content).hexdigest())
    return digests


def _end(process: subprocess.Popen[bytes], started: Started, *, by_itself: bool) -> None:
    """End everything that the program started: its process group and, where it is the client of one, its container.

    The client comes first: it asks for nothing any more when its container is looked for.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what it left behind, too, when it ended by itself
    process.wait()
    if started.container:
        engine, name = started.container
        remove_container(engine, name, settled=by_itself)


def _written(root: Path) -> int:
    """Bytes that the program wrote so far."""
    total = (root / "log").stat().st_size
    for folder in ("out", "work"):
        for place, _, files in os.walk(root / folder):
            for name in files:
                with contextlib.suppress(OSError):  # work files come and go
                    total += Path(place, name).lstat().st_size
    return total


def _walk(out_folder: Path) -> list[Path]:
    """Every file in the out-folder, in the order of names; `OutputRefused` for what is neither file nor folder."""
    found: list[Path] = []
    for place, folders, files in os.walk(out_folder):
        folders.sort()
        for name in sorted(folders + files):
            path = Path(place, name)
            mode = path.lstat().st_mode
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise OutputRefused("the model left a link or a special file in its out-folder; nothing of it is taken")
            if stat.S_ISREG(mode):
                found.append(path)
    if len(found) > _FILES_MAX:
        raise OutputRefused(f"the model wrote {len(found)} files; at most {_FILES_MAX} are taken")
    return found


def _read_record(out_folder: Path, files: Sequence[Path]) -> tuple[dict[str, Any], list[str]]:
    """What a mercure module says in result.json, and remarks. It never decides where results go, as in mercure."""
    path = out_folder / "result.json"
    if path not in files:
        return {}, []
    try:
        record = json.loads(path.read_bytes()[:_RECORD_MAX])
    except (ValueError, RecursionError):
        return {}, ["result.json is not JSON, and was left out"]
    if not isinstance(record, dict):
        return {}, ["result.json holds no mapping, and was left out"]
    return record, ["__mercure_routing in result.json was not followed"] if "__mercure_routing" in record else []


def _read_objects(out_folder: Path, files: Sequence[Path], digests: set[str], remarks: list[str]) -> list[WrittenFile]:
    """The DICOM files, without copies of the inputs; what was left out is added to `remarks`."""
    written: list[WrittenFile] = []
    copies = others = 0
    for path in files:
        if path.relative_to(out_folder).as_posix() in ("result.json", "task.json"):
            continue
        if not looks_like_dicom(path):
            others += 1
            continue
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() in digests:
            copies += 1
        else:
            written.append(WrittenFile(f"file {len(written) + 1} of the out-folder", content))
    if copies:
        remarks.append(f"{copies} copies of the input were left out")
    if others:
        if not written:
            raise OutputRefused(f"the model wrote no DICOM object, and {others} files of other kinds")
        remarks.append(f"{others} files that are not DICOM were left out")
    return written


def _last_lines(log: Path, headers: Sequence[Dataset]) -> str:
    """What the program said last, in one line, without what identifies the patient."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        text = file.read().decode(errors="replace")
    for value in sorted(_identifying(headers), key=len, reverse=True):
        text = re.sub(re.escape(value), "[patient]", text, flags=re.IGNORECASE)
    lines = ["".join(c for c in line if c.isprintable()).strip() for line in text.splitlines()]
    return " | ".join(line for line in lines[-6:] if line)[-400:]


def _identifying(headers: Sequence[Dataset]) -> set[str]:
    """The patient's identifiers and the parts of the name, as they could stand in a program's output."""
    values: set[str] = set()
    for header in headers[:1]:
        for keyword in _IDENTIFYING:
            value = str(header.get(keyword) or "")
            values |= {value, *re.split(r"[\^=\s\\,'\[\]]+", value)}
    return {value for value in values if len(value) > 1}
