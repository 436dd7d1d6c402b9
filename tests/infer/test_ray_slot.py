"""A worker's slot in a Ray cluster: two machines on loopback, real models, machines that are lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from node.dicom.volume import Grid, SliceRef, Volume
from node.errors import ModelError
from node.infer.package import Package, load_package
from node.infer.package_cache import PackageCache
from node.infer.ray_actor import SlotSettings
from node.infer.ray_cluster import ClusterUnreachable, connect
from node.infer.ray_slot import RaySlot, _RayModel
from node.infer.results import Labelmap
from tests.infer.tiny import MANIFEST, bundle_files, write
from tests.ray_cluster import SmallCluster, processes_with, wait_for_end
from tests.running_node import wait_until

HANGS, ENDS = 10.0, 11.0  # what a volume is filled with
NETWORK = b"""\
import os
import time

import torch


class Threshold(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.limit = torch.nn.Parameter(torch.tensor(1e9))

    def forward(self, image):
        while float(image.min()) == 10:
            time.sleep(0.1)
        if float(image.min()) == 11:
            os._exit(3)
        return (image > self.limit).to(torch.float32)
"""


def make_package(folder: Path, name: str = "marker", limit: float = 500.0) -> Package:
    files = bundle_files(limit=limit) | {"scripts/net.py": NETWORK, "dicom.yaml": MANIFEST.encode()}
    return load_package(write(folder / name, files))


def volume(fill: float = 0.0) -> Volume:
    array = np.full((6, 8, 10), fill, np.float32)
    array[2:4, 2:5, 3:7] = 1000
    grid = Grid((6, 8, 10), np.diag([1.0, 1.0, 2.0, 1.0]), "1.2.3")
    slices = tuple(SliceRef("1.2", f"1.2.{index}") for index in range(6))
    return Volume(array, grid, slices, "1.2.3.4", "1.2.3.5", "CT", "HU")


@pytest.fixture(scope="module")
def cluster() -> Iterator[SmallCluster]:
    with SmallCluster() as running:
        running.add(gpus=1)
        yield running


@pytest.fixture
def slot_of(cluster: SmallCluster, tmp_path: Path) -> Iterator[Callable[..., RaySlot]]:
    made: list[RaySlot] = []

    def make(pending_s: float = 60.0, **settings: object) -> RaySlot:
        asked = SlotSettings(**{"cpus": 0.2, "cache": str(tmp_path / "cache"), **settings})  # pyright: ignore
        slot = RaySlot(cluster.address, asked, device="cpu", pending_s=pending_s)
        made.append(slot)
        return slot

    yield make
    for slot in made:
        slot.close()


@pytest.fixture(scope="module")
def slot(cluster: SmallCluster) -> Iterator[RaySlot]:
    """One that several tests use, one after the other; it asks for a share of a GPU where torch sees none."""
    made = RaySlot(cluster.address, SlotSettings(cpus=0.1, gpus=0.1), device="cpu")
    wait_until(lambda: made.ready(threading.Event()), 120, "there is a slot")
    yield made
    made.close()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return make_package(tmp_path_factory.mktemp("models"))


def run(slot: RaySlot, package: Package, fill: float = 0.0) -> Labelmap:
    model = slot.get(package)
    prediction = model.predict({"image": volume(fill)})
    slot.make_room()
    assert isinstance(prediction, Labelmap)
    return prediction


def machine_of(slot: RaySlot) -> str:
    """The address of the machine on which the slot is."""
    seat = slot.seek(30.0)
    assert seat is not None
    return seat.machine.partition("(")[2].rstrip(")")


def pid_of(slot: RaySlot) -> int:
    seat = slot.seek(30.0)
    assert seat is not None
    assert seat.place is not None
    return seat.place.pid


def test_a_model_runs_there_in_the_geometry_of_here(slot: RaySlot, package: Package) -> None:
    source = volume()
    model = slot.get(package)
    prediction = model.predict({"image": source})
    assert isinstance(prediction, Labelmap)
    assert np.array_equal(prediction.array == 1, source.array == 1000)
    assert prediction.grid is source.grid
    assert prediction.array.flags.writeable
    assert not model.running
    assert model.seconds
    actor = pid_of(slot)
    first = {child.pid for child in psutil.Process(actor).children(recursive=True)}
    slot.make_room()
    run(slot, package)
    assert {child.pid for child in psutil.Process(actor).children(recursive=True)} == first, "it stayed loaded"


def test_a_package_that_is_not_there_is_copied_once(
    slot_of: Callable[..., RaySlot], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.infer.ray_slot._PART", 1000)  # in many parts
    package = make_package(tmp_path / "models")
    slot = slot_of()
    elsewhere = Package(package.name, tmp_path / "here" / "marker", package.version, package.manifest, package.digest)
    (tmp_path / "here").mkdir()
    package.folder.rename(elsewhere.folder)
    seat = slot.seek(30.0)
    assert seat is not None
    assert not seat.ray.get(seat.actor.has_package.remote("marker", package.digest, str(package.folder)))
    hidden = Path(str(elsewhere.folder))
    # The machine is the same one; what lies at the worker's path must not be found there.
    monkeypatch.setattr(Path, "resolve", lambda self, strict=False: Path("/nowhere") / self.name)
    run(slot, Package(package.name, hidden, package.version, package.manifest, package.digest))
    monkeypatch.undo()
    copy = tmp_path / "cache" / package.digest / "marker"
    assert load_package(copy).digest == package.digest
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [package.digest]
    shutil.rmtree(elsewhere.folder)
    run(slot, Package(package.name, Path("/nowhere/marker"), package.version, package.manifest, package.digest))


def test_the_check_tells_the_machines_and_the_room(cluster: SmallCluster, tmp_path: Path) -> None:
    def findings(address: str, gpus: float) -> list[tuple[str, str]]:
        config = tmp_path / "config.yaml"
        config.write_text(
            f"node: {{storage: {tmp_path / 'var'}}}\nmodels: {{path: {tmp_path}}}\n"
            f"workers: {{engine: ray, address: '{address}', count: 3, gpus: {gpus}, cpus: 0.1}}\n"
        )
        command = [sys.executable, "-m", "node.cli", "check", "--json", "--config", config]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
        return [(each["verdict"], each["says"]) for each in json.loads(done.stdout) if each["what"] == "Ray"]

    *machines, (verdict, room) = findings(cluster.address, 0.5)
    assert [verdict for verdict, _ in machines] == ["good"] * len(machines)
    assert any("1 CPU, 1 GPU" in says for _, says in machines)
    assert (verdict, room) == ("note", "3 slots are asked for (workers.count), the cluster has room for 2")
    assert findings("127.0.0.1:1", 0.5)[0][0] == "wrong"


def test_the_copies_stay_within_their_size_and_what_is_used_stays(tmp_path: Path) -> None:
    def send(cache: PackageCache, package: Package) -> None:
        size = sum(path.stat().st_size for path in package.folder.rglob("*") if path.is_file())
        cache.begin(package.name, package.digest, size)
        for path in package.folder.rglob("*"):
            if path.is_file():
                relative = path.relative_to(package.folder).as_posix()
                cache.add(package.name, package.digest, relative, path.read_bytes())
        cache.finish(package.name, package.digest)

    packages = [make_package(tmp_path / "models", f"m{n}", limit=n) for n in range(3)]
    size = sum(path.stat().st_size for path in packages[0].folder.rglob("*") if path.is_file())
    cache = PackageCache(tmp_path / "cache", int(size * 2.5))
    for package in packages:
        send(cache, package)
    assert len(list((tmp_path / "cache").iterdir())) == 3, "all are held"
    cache.release_but({packages[0].digest})
    again = make_package(tmp_path / "models", "m3", limit=3)
    send(cache, again)
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left == {packages[0].digest, again.digest}
    with pytest.raises(ModelError, match="is larger than all copies may be on this machine"):
        cache.begin("m1", packages[1].digest, size * 3)
    with pytest.raises(ModelError, match="a part of it came that was not begun"):
        cache.add("m1", packages[1].digest, "x", b"x")
    cache.begin("m1", packages[1].digest, size)
    with pytest.raises(ModelError, match="a part of it came that was not begun"):
        cache.add("m1", packages[1].digest, "../x", b"x")
    cache.add("m1", packages[1].digest, "dicom.yaml", (packages[1].folder / "dicom.yaml").read_bytes())
    cache.add("m1", packages[1].digest, "configs/metadata.json", b'{"version": "0.1.0"}')
    cache.add("m1", packages[1].digest, "configs/inference.json", b"{}")
    with pytest.raises(ModelError, match="model package m1 changed while it was copied"):
        cache.finish("m1", packages[1].digest)
    assert cache.find("m1", packages[1].digest, Path("/nowhere/m1")) is None


def hang_until(model: _RayModel, act: Callable[[], object]) -> None:
    """A run that would never end, and what another thread does once it runs; raises what the run raises."""

    def act_in_time() -> None:
        wait_until(lambda: model.running, 60, "it runs")
        act()

    thread = threading.Thread(target=act_in_time)
    thread.start()
    try:
        model.predict({"image": volume(HANGS)})
    finally:
        thread.join()
        assert not model.running


def test_another_thread_stops_a_run(slot: RaySlot, package: Package) -> None:
    model = slot.get(package)
    assert isinstance(model, _RayModel)

    with pytest.raises(ModelError, match=r"^model marker: the job was cancelled$"):
        hang_until(model, lambda: model.stop("the job was cancelled"))
    slot.make_room()
    actor = pid_of(slot)
    assert run(slot, package).array.any(), "the next run has a fresh process"
    assert pid_of(slot) == actor, "in the same actor"


def test_a_stop_before_the_run_is_told_by_the_run(slot: RaySlot, package: Package) -> None:
    model = slot.get(package)
    assert isinstance(model, _RayModel)
    model.stop("the job was cancelled")
    with pytest.raises(ModelError, match="model marker: the job was cancelled"):
        model.predict({"image": volume()})
    slot.make_room()
    assert run(slot, package).array.any()


def test_a_model_that_ends_says_so_and_its_slot_stays(slot: RaySlot, package: Package) -> None:
    with pytest.raises(ModelError, match="model marker: its process ended by itself with code 3"):
        run(slot, package, ENDS)
    actor = pid_of(slot)
    assert run(slot, package).array.any()
    assert pid_of(slot) == actor


def test_the_time_in_the_manifest_counts_there(slot: RaySlot, tmp_path: Path) -> None:
    files = bundle_files() | {"scripts/net.py": NETWORK, "dicom.yaml": MANIFEST.encode() + b"timeout_s: 2\n"}
    package = load_package(write(tmp_path / "models" / "marker", files))
    with pytest.raises(ModelError, match=r"model marker: it ran longer than 2 s \(timeout_s in dicom.yaml\)"):
        run(slot, package, HANGS)


def test_a_machine_that_is_lost_costs_one_run(
    slot_of: Callable[..., RaySlot], cluster: SmallCluster, tmp_path: Path
) -> None:
    slot, package = slot_of(cpus=0.5), make_package(tmp_path / "models")
    first = machine_of(slot)
    cluster.add()

    model = slot.get(package)
    assert isinstance(model, _RayModel)

    with pytest.raises(ModelError, match=r"model marker: the machine .*\(127.0.0.\d+\) that ran it was lost \(Actor"):
        hang_until(model, lambda: cluster.lose(cluster.machine_at(first)))
    slot.make_room()
    wait_for_end(str(package.folder))
    assert run(slot, package).array.any()
    assert machine_of(slot) != first


def test_a_slot_that_dies_between_two_jobs_costs_none(slot_of: Callable[..., RaySlot], tmp_path: Path) -> None:
    slot, package = slot_of(), make_package(tmp_path / "models")
    stop = threading.Event()
    wait_until(lambda: slot.ready(stop), 60, "a slot")
    run(slot, package)
    actor = pid_of(slot)
    psutil.Process(actor).kill()
    wait_for_end(str(package.folder))
    wait_until(lambda: slot.ready(stop) and pid_of(slot) != actor, 60, "another slot")
    assert run(slot, package).array.any()


def test_no_room_is_told_with_what_was_asked_and_what_there_is(
    slot_of: Callable[..., RaySlot], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slot = slot_of(pending_s=1.0, cpus=7.0, gpus=1.0)
    told = r"no room for a slot of 7 CPU, 1 GPU for 1 s; free are .* CPU, .* GPU; there are .*: 1 CPU"
    with pytest.raises(ModelError, match=told):
        run(slot, make_package(tmp_path / "models"))
    stop = threading.Event()
    assert not slot.ready(stop)
    assert not slot.ready(stop)
    assert [record.message for record in caplog.records].count(caplog.records[-1].message) == 1, "told once"
    assert "no room for a slot of 7 CPU" in caplog.text


def test_nothing_answers_where_a_cluster_should_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterUnreachable, match=r"no Ray cluster answers at 127.0.0.1:1 \(Connection refused\)"):
        connect("127.0.0.1:1")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterUnreachable, match="no Ray runs on this machine"):
        connect("auto")


WORKER = """
import sys, threading
from pathlib import Path
from node.infer.package import load_package
from node.infer.ray_actor import SlotSettings
from node.infer.ray_slot import RaySlot
from tests.infer.test_ray_slot import HANGS, volume

slot = RaySlot(sys.argv[1], SlotSettings(cpus=0.5), device="cpu")
model = slot.get(load_package(Path(sys.argv[2])))
threading.Timer(0, model.predict, [{"image": volume(HANGS)}]).start()
while not model.running:
    pass
print(slot.seek(1).place.pid, flush=True)
threading.Event().wait()
"""


def test_all_of_it_ends_with_a_killed_worker(cluster: SmallCluster, tmp_path: Path) -> None:
    package = make_package(tmp_path / "models")
    root = Path(__file__).parents[2]
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, cluster.address, package.folder],
        cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert worker.stdout is not None
    actor = int(worker.stdout.readline())
    assert psutil.pid_exists(actor)
    assert processes_with(str(package.folder)), "the model runs"
    worker.kill()
    worker.wait()
    wait_until(lambda: not psutil.pid_exists(actor), 60, "the actor ends with its worker")
    wait_for_end(str(package.folder))


def test_a_driver_without_the_token_is_refused(tmp_path: Path) -> None:
    """In processes of their own, as Ray reads its environment once."""
    root = Path(__file__).parents[2]
    script = """
import sys
from tests.ray_cluster import SmallCluster
with SmallCluster() as cluster:
    print(cluster.address, flush=True)
    sys.stdin.read()
"""
    join = """
import sys
from node.errors import ModelError
from node.infer.ray_cluster import connect, list_machines
try:
    print(len(list_machines(connect(sys.argv[1]))), "machines")
except ModelError as error:
    print(type(error).__name__, error)
"""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    plain |= {"PYTHONPATH": str(root), "HOME": str(tmp_path)}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    head = subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, env=plain | token, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert head.stdout is not None
    assert head.stdin is not None
    try:
        address = head.stdout.readline().strip()

        def joined(**more: str) -> str:
            done = subprocess.run(
                [sys.executable, "-c", join, address], cwd=root, env=plain | more, capture_output=True, text=True,
                timeout=120, check=False,
            )  # fmt: skip
            return done.stdout

        assert joined(**token) == "1 machines\n"
        for wrong in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64}):
            assert joined(**wrong).startswith(f"ModelError the Ray cluster at {address} answers and cannot be joined")
    finally:
        head.stdin.close()
        head.wait(60)
