"""A Ray cluster on this machine: a head without room for models, and machines that come and go, all on loopback."""

from __future__ import annotations

import os
import shutil
import tempfile
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from node.infer.ray_cluster import import_ray
from tests.running_node import wait_until

_STORE = 90 << 20  # bytes of each machine's object store
_addresses = count(2)


class SmallCluster:
    """The head, and `add`ed machines with addresses of their own; not 127.0.0.1, for which Ray takes another one."""

    def __init__(self) -> None:
        import_ray()
        from ray.cluster_utils import Cluster

        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie in it
        self._before = {process.pid for process in psutil.Process().children(recursive=True)}
        self._cluster = Cluster()
        self._head = self.add(cpus=0, temp_dir=str(self._folder), include_dashboard=False)
        self.address: str = self._cluster.address

    def add(self, *, cpus: int = 1, gpus: int = 0, **more: object) -> Any:
        """One more machine, by an address of its own."""
        place = f"127.0.0.{next(_addresses)}"
        return self._cluster.add_node(
            num_cpus=cpus, num_gpus=gpus, object_store_memory=_STORE, node_ip_address=place, **more
        )

    def lose(self, machine: Any) -> None:
        """A machine is gone from one moment to the next."""
        self._cluster.remove_node(machine, allow_graceful=False)

    def machine_at(self, address: str) -> Any:
        """The machine of this address."""
        return next(node for node in self._cluster.list_all_nodes() if node.node_ip_address == address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import_ray().shutdown()  # where this process was a driver of it
        self._cluster.shutdown()
        left = [each for each in psutil.Process().children(recursive=True) if each.pid not in self._before]
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=10)
        shutil.rmtree(self._folder, ignore_errors=True)


def processes_with(text: str) -> list[psutil.Process]:
    """The processes that have this text in their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if text in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.pid != os.getpid()]


def wait_for_end(text: str, patience_s: float = 60) -> None:
    """Until no process has this text in its command line."""
    wait_until(lambda: not processes_with(text), patience_s, f"no process of {text} is left")
