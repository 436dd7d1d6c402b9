"""What a model can do to its worker, done for real: a bundle that attacks from inside its own process.

The bundle's network reads from the first voxel what it shall do, so that one loaded process serves many tests.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from node.dicom.volume import Grid, SliceRef, Volume
from node.errors import ModelError, OutputRefused
from node.infer.hosted import LOAD_S, HostedModel, probe_protections
from node.infer.package import Package, load_package
from node.infer.processes import ForkServer
from node.infer.warm import WarmModels
from tests.infer.test_bundle import configuration
from tests.running_node import wait_until

NETWORK = """
import ctypes, errno, json, os, signal, socket, stat, struct, subprocess, sys, time
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent.parent
PLAN = json.loads((PACKAGE / "plan.json").read_text())
REFUSED, SUCCEEDED = 1, 2


def attempt(step):
    try:
        step()
    except OSError:
        return REFUSED
    return SUCCEEDED


def connect():
    socket.create_connection(("127.0.0.1", PLAN["port"]), 2)


def write(path):
    with open(path, "a") as file:
        file.write("x")


def channel():
    for name in os.listdir("/proc/self/fd"):
        try:
            end = socket.socket(fileno=os.dup(int(name)))
            end.getpeername()
            return end
        except OSError:
            continue


def daemon():
    if not os.fork():
        if not os.fork():
            try:
                os.setsid()
            except OSError:
                pass
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            while True:
                time.sleep(1)
        os._exit(0)
    os.wait()
    return REFUSED


def flood():
    for stream in (sys.stdout, sys.stderr):
        for _ in range(2000):
            stream.write("x" * 10_000 + "\\n")
    return REFUSED


def hog():
    held = []
    while True:
        held.append(bytearray(50_000_000))


def ways_out():
    kinds = []
    for name in os.listdir("/proc/self/fd"):
        try:
            kinds.append(os.fstat(int(name)).st_mode)
        except OSError:  # the listing's own
            pass
    return sum(stat.S_ISSOCK(kind) for kind in kinds)


def hang():
    while True:
        time.sleep(1)


def lie(follows, **said):
    frame = sys._getframe()
    while "request" not in frame.f_locals:
        frame = frame.f_back
    asked = frame.f_locals["request"]["asked"]
    answer = {"asked": asked, "kind": "labelmap", "input": "image", "remarks": [], "dtype": "uint8", "bytes": 480}
    data = json.dumps(answer | said).encode()
    channel().sendall(struct.pack("!I", len(data)) + data + bytes(follows))
    hang()


ACTIONS = {
    1: lambda: attempt(connect),
    2: lambda: attempt(lambda: open(PLAN["database"])),
    3: lambda: attempt(lambda: write(PLAN["outside"] + "/new")),
    4: lambda: attempt(lambda: write(PACKAGE / "configs" / "inference.json")),
    5: lambda: attempt(lambda: os.kill(PLAN["worker"], signal.SIGKILL)),
    6: lambda: attempt(lambda: write(os.environ["HOME"] + "/own")),
    7: lambda: os._exit(3),
    8: lambda: ctypes.string_at(0),
    9: hog,
    10: hang,
    11: daemon,
    12: lambda: channel().sendall(b"rubbish that is no message"),
    13: lambda: channel().sendall(b"\\xff\\xff\\xff\\xff"),
    14: lambda: channel().sendall(b"\\0\\0\\0\\x02{}"),
    15: flood,
    16: lambda: sys.exit(4),
    17: lambda: print("PHI? \\x1b[31mno", flush=True) or os._exit(5),
    18: lambda: channel().sendall(b"\\0\\0\\x27\\x10" + b"[" * 10_000),
    19: lambda: lie(100),
    20: lambda: lie(479, bytes=479),
    21: lambda: lie(480, bytes=-1),
    22: lambda: lie(480, bytes="480"),
    23: lambda: lie(600, bytes=600),
    24: lambda: lie(480, dtype="float64"),
    25: lambda: SUCCEEDED if ways_out() != 1 else REFUSED,  # the channel is one
}


class Attack(torch.nn.Module):
    def forward(self, image):
        pixels = image.as_tensor() if hasattr(image, "as_tensor") else image
        action = int(pixels.reshape(-1)[0])
        label = torch.zeros_like(pixels, dtype=torch.float32)
        if action == 100:
            return label[..., :-1]
        if action == 101:
            return label + float("nan")
        if action == 102:
            return label.masked_fill(pixels > 500, 7)
        if action == 103:
            pixels += 1  # its own input
            return label
        if action == 104:
            raise ValueError("the network does not like this image")
        value = ACTIONS[action]() if action else REFUSED
        return label.masked_fill(pixels > 500, value or REFUSED)
"""
MANIFEST = """\
title: Attack
intended_use: Tests.
licence_code: Apache-2.0
licence_weights: none
inputs: {{image: {{}}}}
segments:
  1: {{name: Refused, type: [SCT, 39607008, Lung]}}
  2: {{name: Succeeded, type: [SCT, 39607008, Lung]}}
timeout_s: {timeout_s}
"""
REFUSED = 1


class Arena:
    """A package that attacks, what it attacks, and its model."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.storage = folder / "var"
        self.storage.mkdir()
        self.database = self.storage / "radnode.sqlite"
        self.database.write_text("secret")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.visitors = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                self.listener.accept()
            except OSError:
                return
            self.visitors += 1

    def package(self, name: str = "attack", timeout_s: float = 60) -> Package:
        folder = self.folder / "models" / name
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "configs").mkdir(parents=True)
        (folder / "scripts").mkdir()
        config = configuration() | {"network_def": {"_target_": "scripts.net.Attack"}}
        (folder / "configs" / "inference.json").write_text(json.dumps(config))
        (folder / "configs" / "metadata.json").write_text(json.dumps({"version": "1.0", "network_data_format": {}}))
        (folder / "scripts" / "__init__.py").write_text("")
        (folder / "scripts" / "net.py").write_text(NETWORK)
        (folder / "dicom.yaml").write_text(MANIFEST.format(timeout_s=timeout_s))
        plan = {
            "port": self.listener.getsockname()[1],
            "database": str(self.database),
            "outside": str(self.storage),
            "worker": os.getpid(),
        }
        (folder / "plan.json").write_text(json.dumps(plan))
        return load_package(folder)


def volume(action: int) -> Volume:
    """A volume whose voxels are all the action's number but for a block that stands out."""
    array = np.full((6, 8, 10), action, np.float32)
    array[2:4, 2:5, 3:7] = 1000
    grid = Grid((6, 8, 10), np.diag([1.0, 1.0, 2.0, 1.0]), "1.2.3")
    slices = tuple(SliceRef("1.2", f"1.2.{index}") for index in range(6))
    return Volume(array, grid, slices, "1.2.3.4", "1.2.3.5", "CT", "HU", attributes={"PatientAge": "045Y"})


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    made = Arena(tmp_path_factory.mktemp("arena"))
    yield made
    made.listener.close()


@pytest.fixture(scope="module", params=["fresh", "forked"])
def forks(request: pytest.FixtureRequest) -> Iterator[ForkServer | None]:
    """Each test runs with a process of its own interpreter, and with a fork of one that has its libraries."""
    if request.param == "fresh":
        yield None
        return
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def model(arena: Arena, forks: ForkServer | None) -> Iterator[HostedModel]:
    hosted = HostedModel(arena.package(), "cpu", memory_bytes=6_000_000_000, forks=forks)
    hosted.load()
    yield hosted
    hosted.close()


def label_of(model: HostedModel, action: int) -> int:
    """What the network reported by its label."""
    prediction = model.predict({"image": volume(action)})
    assert prediction.array.shape == (6, 8, 10)
    assert set(np.unique(prediction.array)) <= {0, 1, 2}
    assert (prediction.array[2:4, 2:5, 3:7] > 0).all()
    assert np.count_nonzero(prediction.array) == 2 * 3 * 4
    return int(prediction.array.max())


def test_a_model_runs_with_every_protection_and_its_label_map_lies_where_it_belongs(model: HostedModel) -> None:
    assert len(model.protections) == 4
    assert all(protection.holds for protection in model.protections), model.protections
    assert label_of(model, 0) == REFUSED
    prediction = model.predict({"image": volume(0)})
    assert prediction.input == "image"
    assert prediction.grid is not None
    assert prediction.grid.frame_of_reference_uid == "1.2.3"


def test_it_can_write_to_its_scratch_folder_which_is_deleted(
    arena: Arena, forks: ForkServer | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # other tests have models of their own
    hosted = HostedModel(arena.package("scratch"), "cpu", forks=forks)
    assert label_of(hosted, 6) == 2
    (scratch,) = tmp_path.glob("radnode-model-*")
    assert list(scratch.rglob("own"))
    hosted.close()
    assert list(tmp_path.glob("radnode-model-*")) == []


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(1, id="connects to a port of this machine"),
        pytest.param(2, id="reads the node's database"),
        pytest.param(3, id="writes into the storage"),
        pytest.param(4, id="changes its own package"),
        pytest.param(5, id="kills the worker"),
        pytest.param(25, id="speaks to anybody but the worker"),
    ],
)
def test_what_it_may_not_do_is_refused(arena: Arena, model: HostedModel, action: int) -> None:
    before = arena.visitors
    assert label_of(model, action) == REFUSED
    assert arena.visitors == before
    assert list(arena.storage.iterdir()) == [arena.database]
    assert arena.database.read_text() == "secret"


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        pytest.param(7, "ended by itself with code 3", id="exits"),
        pytest.param(8, r"crashed \(SIGSEGV\)", id="segfault"),
        pytest.param(12, "not believed", id="rubbish on the channel"),
        pytest.param(13, "not believed", id="a message of 4 GB is announced"),
        pytest.param(14, "answered what it was not asked", id="an answer to nothing"),
        pytest.param(18, "not believed", id="nested without end"),
        pytest.param(20, "sends less than its answer says", id="a shorter label map is announced"),
        pytest.param(21, "did not say how much follows", id="less than nothing follows"),
        pytest.param(22, "did not say how much follows", id="no number follows"),
        pytest.param(23, "sends more than a result", id="a longer label map follows"),
        pytest.param(104, "does not like this image", id="an exception of its own"),
    ],
)
def test_an_end_costs_one_run_and_the_next_has_a_fresh_process(model: HostedModel, action: int, sentence: str) -> None:
    model.load()
    before = model.pid
    with pytest.raises(ModelError, match=sentence):
        model.predict({"image": volume(action)})
    assert model.pid is None
    assert label_of(model, 0) == REFUSED
    assert model.pid not in (None, before)


def test_its_last_words_are_told_without_control_characters(model: HostedModel) -> None:
    with pytest.raises(ModelError, match=r"code 5; it said last: PHI\?  \[31mno$"):
        model.predict({"image": volume(17)})


def test_memory_ends_the_run_and_not_the_worker(arena: Arena, forks: ForkServer | None) -> None:
    hosted = HostedModel(arena.package("hog"), "cpu", memory_bytes=2_000_000_000, forks=forks)
    with pytest.raises(ModelError, match=r"out of memory|more than workers\.memory"):
        hosted.predict({"image": volume(9)})
    assert label_of(hosted, 0) == REFUSED
    hosted.close()


def test_a_hanging_model_is_killed_with_all_that_it_started(arena: Arena, forks: ForkServer | None) -> None:
    hosted = HostedModel(arena.package("hang", timeout_s=3), "cpu", forks=forks)
    hosted.load()
    assert label_of(hosted, 11) == REFUSED  # a daemon runs on
    children = descendants(os.getpid())
    assert len(children) >= 3, "the warden, the model and the daemon"
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"longer than 3 s \(timeout_s"):
        hosted.predict({"image": volume(10)})
    assert time.monotonic() - began < 60
    hosted.close()
    own = children - descendants(os.getpid())
    assert not [pid for pid in own if alive(pid)]


def test_a_daemon_dies_with_its_model(arena: Arena, forks: ForkServer | None) -> None:
    before = descendants(os.getpid())
    hosted = HostedModel(arena.package("daemon"), "cpu", forks=forks)
    assert label_of(hosted, 11) == REFUSED
    started = descendants(os.getpid()) - before
    assert len(started) >= 3
    hosted.close()
    wait_until(lambda: not [pid for pid in started if alive(pid)], 10, "nothing of the model is left")


@pytest.mark.parametrize("forks", ["None", "ForkServer()"])
def test_all_of_it_dies_with_a_killed_worker(arena: Arena, forks: str) -> None:
    package = arena.package("orphan")
    script = (
        "import sys, time; from pathlib import Path; from node.infer.package import load_package\n"
        "from node.infer.hosted import HostedModel; from node.infer.processes import ForkServer\n"
        f"forks = {forks}; model = HostedModel(load_package(Path(sys.argv[1])), 'cpu', forks=forks); model.load()\n"
        "print('ready', flush=True); time.sleep(600)\n"
    )
    (package.folder / "scripts" / "net.py").write_text(NETWORK + "\n\ndaemon()\n")  # started while it loads
    worker = subprocess.Popen([sys.executable, "-c", script, package.folder], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    started = descendants(worker.pid)
    assert len(started) >= 3
    worker.kill()
    worker.wait()
    wait_until(lambda: not [pid for pid in started if alive(pid)], 15, "nothing of the model is left")
    worker.stdout.close()


def test_a_flood_of_output_neither_blocks_nor_fills(model: HostedModel) -> None:
    assert label_of(model, 15) == REFUSED


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        pytest.param(100, "shape", id="another shape"),
        pytest.param(101, "not finite", id="NaN"),
        pytest.param(102, r"labels \[7\]", id="a label that nobody declared"),
    ],
)
def test_what_is_no_result_is_refused_and_the_process_stays(model: HostedModel, action: int, sentence: str) -> None:
    model.load()
    before = model.pid
    with pytest.raises(OutputRefused, match=sentence):
        model.predict({"image": volume(action)})
    assert model.pid == before


def test_a_model_that_writes_into_its_input_changes_nothing_outside(model: HostedModel) -> None:
    source = volume(103)
    model.predict({"image": source})
    assert np.array_equal(source.array, volume(103).array)


def test_a_process_that_was_killed_between_two_runs_costs_no_run(model: HostedModel) -> None:
    model.load()
    assert model.pid is not None
    os.kill(model.pid, signal.SIGKILL)
    time.sleep(0.5)
    assert label_of(model, 0) == REFUSED


def test_another_thread_stops_a_run(model: HostedModel) -> None:
    model.load()
    seen = [model.running]

    def stop() -> None:
        seen.append(model.running)
        model.stop("the job was cancelled")

    timer = threading.Timer(1.0, stop)
    timer.start()
    with pytest.raises(ModelError, match=r"^model attack: the job was cancelled$"):
        model.predict({"image": volume(10)})
    timer.join()
    assert [*seen, model.running] == [False, True, False]
    assert label_of(model, 0) == REFUSED


def test_a_label_map_that_never_comes_ends_with_the_time_of_a_run(arena: Arena, forks: ForkServer | None) -> None:
    hosted = HostedModel(arena.package("endless", timeout_s=2), "cpu", forks=forks)
    with pytest.raises(ModelError, match="ran longer than 2 s"):
        hosted.predict({"image": volume(19)})
    assert hosted.pid is None


def test_what_follows_a_refused_answer_is_never_taken_for_the_next(model: HostedModel) -> None:
    with pytest.raises(OutputRefused, match="float64"):
        model.predict({"image": volume(24)})
    assert model.pid is None
    assert label_of(model, 0) == REFUSED


def test_an_input_that_memory_cannot_hold_says_so(arena: Arena, forks: ForkServer | None) -> None:
    hosted = HostedModel(arena.package("small"), "cpu", memory_bytes=2_000_000_000, forks=forks)
    large = replace(volume(0), array=np.broadcast_to(np.float32(0), (600, 1024, 1024)))
    with pytest.raises(ModelError, match=r"out of memory|took .* GB of memory"):
        hosted.predict({"image": large})
    assert label_of(hosted, 0) == REFUSED
    hosted.close()


def test_a_package_that_cannot_be_loaded_says_why(arena: Arena, forks: ForkServer | None) -> None:
    package = arena.package("broken")
    (package.folder / "scripts" / "net.py").write_text("import nothing_of_this_name\n")
    hosted = HostedModel(package, "cpu", forks=forks)
    with pytest.raises(ModelError, match=r"model broken could not be loaded: .*nothing_of_this_name"):
        hosted.load()
    hosted.close()


def test_a_model_that_was_ready_before_anyone_asked(arena: Arena, forks: ForkServer | None) -> None:
    """Both messages of its start lie there by then, and are read at once."""
    hosted = HostedModel(arena.package("early"), "cpu", forks=forks)
    host = hosted._host
    assert host is not None
    deadline = time.monotonic() + 60
    while host.resident_bytes() < 100_000_000 and time.monotonic() < deadline:  # torch is loaded
        time.sleep(0.1)
    time.sleep(3)  # and the model
    hosted.load()
    assert hosted.protections
    hosted.close()


def test_a_model_that_was_loaded_in_time_and_asked_for_late(arena: Arena, forks: ForkServer | None) -> None:
    """A job whose input was refused leaves a model behind that nobody asks for until another job comes."""
    hosted = HostedModel(arena.package("late"), "cpu", forks=forks)
    host = hosted._host
    assert host is not None
    wait_until(lambda: b'"loaded"' in host._channel._end.recv(1 << 16, socket.MSG_PEEK), 60, "loaded")
    host.started_at -= 2 * LOAD_S
    hosted.load()
    assert label_of(hosted, 0) == REFUSED
    hosted.close()


def test_a_stop_while_the_study_is_read_ends_that_job_and_not_the_next(arena: Arena) -> None:
    package = arena.package("stopped")
    models = WarmModels("cpu", memory_bytes=None, warm_bytes=100_000_000_000)
    model = models.get(package)
    assert isinstance(model, HostedModel)
    model.load()
    model.stop("the job was cancelled")
    with pytest.raises(ModelError, match=r"^model stopped: the job was cancelled$"):
        model.predict({"image": volume(0)})
    for is_loaded in (True, False):  # the job ended before it asked the model, say for an input that is refused
        model = models.get(package)
        assert isinstance(model, HostedModel)
        if is_loaded:
            model.load()
        model.stop("the job was cancelled")
        model = models.get(package)
        assert isinstance(model, HostedModel)
        assert label_of(model, 0) == REFUSED
    models.close()


def test_warm_models_stay_within_their_memory(arena: Arena) -> None:
    first, second = arena.package("warm1"), arena.package("warm2")
    (second.folder / "plan.json").write_text("{}")
    second = load_package(second.folder)
    models = WarmModels("cpu", memory_bytes=None, warm_bytes=100_000_000_000)
    one, two = models.get(first), models.get(second)
    one.load()
    two.load()
    assert one.resident_bytes > 100_000_000, "torch is loaded"
    models.make_room()
    assert None not in (one.pid, two.pid)
    assert models.get(first) is one
    assert models.names == {"warm1", "warm2"}
    models.warm_bytes = 1
    models.make_room()
    assert one.pid is not None, "the last one stays, however large it is"
    assert two.pid is None
    models.close()
    assert one.pid is None


def test_memory_that_is_only_kept_ends_no_warm_model(arena: Arena) -> None:
    models = WarmModels("cpu", memory_bytes=None, warm_bytes=0)
    first, second = arena.package("kept1"), arena.package("kept2")
    (second.folder / "plan.json").write_text("{}")
    two = models.get(load_package(second.folder))
    two.load()
    one = models.get(first)
    assert isinstance(one, HostedModel)
    assert isinstance(two, HostedModel)
    one.load()
    idle = one.resident_bytes + two.resident_bytes
    array = np.zeros((100, 512, 512), np.float32)
    grid = Grid((100, 512, 512), np.eye(4), "1.2.3")
    one.predict({"image": replace(volume(0), array=array, grid=grid, slices=(SliceRef("1.2", "1.3"),) * 100)})
    assert one.resident_bytes + two.resident_bytes > idle + 300_000_000
    models.warm_bytes = idle + 150_000_000
    models.make_room()
    assert None not in (one.pid, two.pid)
    assert one.resident_bytes + two.resident_bytes < models.warm_bytes
    assert label_of(one, 0) == REFUSED  # as good as before
    models.close()


def test_protections_can_be_told_without_a_model() -> None:
    said = [str(protection) for protection in probe_protections("cpu")]
    assert any(sentence.startswith("no network: yes (") for sentence in said), said


def test_a_fork_server_that_is_gone_costs_no_run(arena: Arena) -> None:
    server = ForkServer()
    first = HostedModel(arena.package("first"), "cpu", forks=server)
    assert label_of(first, 0) == REFUSED
    assert server.pid is not None
    os.kill(gone := server.pid, signal.SIGKILL)
    wait_until(lambda: not alive(gone), 5, "the server is gone")
    assert label_of(first, 0) == REFUSED  # goes on without it
    for name in ("second", "third"):  # afresh, and forked from the server that follows
        hosted = HostedModel(arena.package(name), "cpu", forks=server)
        assert label_of(hosted, 0) == REFUSED
        hosted.close()
    assert server.pid not in (None, gone)
    server.close()
    assert label_of(first, 0) == REFUSED
    first.close()


def test_a_server_that_is_killed_while_it_imports_costs_no_run(arena: Arena) -> None:
    server = ForkServer()
    hosted = HostedModel(arena.package("early"), "cpu", forks=server)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    assert label_of(hosted, 0) == REFUSED
    hosted.close()
    server.close()


def test_a_fork_server_imports_once_and_leaves_nothing(arena: Arena) -> None:
    before = set(Path(tempfile.gettempdir()).glob("radnode-forks-*"))
    server = ForkServer()
    HostedModel(arena.package("once"), "cpu", forks=server).load()
    began = time.monotonic()
    again = HostedModel(arena.package("again"), "cpu", forks=server)
    again.load()
    assert time.monotonic() - began < 2.5, "PyTorch and MONAI alone take 5 s"
    title = " ".join(psutil.Process(again.pid).cmdline())
    assert title.startswith("radnode model again: /"), "ps names the model"
    again.close()
    server.close()
    wait_until(lambda: set(Path(tempfile.gettempdir()).glob("radnode-forks-*")) <= before, 5, "its folder is gone")


def descendants(pid: int) -> set[int]:
    return {child.pid for child in psutil.Process(pid).children(recursive=True)}


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
