"""The way from a worker into a Ray cluster: what is wrong with it is told at once, where Ray itself waits for minutes.

Ray is imported here and in the modules of its slots only, inside functions: who does not use it needs not have it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from node.errors import ModelError

_log = logging.getLogger(__name__)

_REACH_S = 5.0


class ClusterUnreachable(ModelError):
    """No cluster answers at the address: it may be there later."""


@dataclass(frozen=True)
class Machine:
    """One machine of the cluster."""

    name: str
    address: str
    resources: Mapping[str, float]  # CPU, GPU

    def slots(self, cpus: float, gpus: float) -> int:
        """How many slots of this size it has room for when nothing else runs."""
        asked = {"CPU": cpus, "GPU": gpus}
        # Ray counts in units of 1/10000.
        return min(int(self.resources.get(what, 0) / each + 1e-4) for what, each in asked.items() if each)

    def __str__(self) -> str:
        return f"{self.name} ({self.address}): {tell_resources(self.resources)}"


def tell_resources(resources: Mapping[str, float]) -> str:
    """`8 CPU, 2 GPU`: what models can use."""
    return ", ".join(f"{resources.get(what, 0.0):g} {what}" for what in ("CPU", "GPU"))


def import_ray() -> Any:
    """The package, told to be quiet and to report to nobody; `ModelError` when it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    try:
        import ray
    except ImportError:
        raise ModelError("workers.engine is ray, and Ray is not installed: pip install 'radnode[ray]'") from None
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # what concerns us becomes an error with a sentence
    return ray


def connect(address: str) -> Any:
    """Join the cluster at `address` (`auto`: that of this machine, or `host:port`) as a driver; the ray module.

    Raises `ClusterUnreachable` when nothing answers there, `ModelError` for what waiting does not mend. Signal handlers
    stay as they were: Ray would take SIGTERM for itself.
    """
    ray = import_ray()
    place = _find(address)
    _reach(place)
    if ray.is_initialized():  # one process is one driver, until it ends
        return ray
    main = threading.current_thread() is threading.main_thread()  # in another thread Ray takes none, nor could we
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT) if main}
    try:
        ray.init(
            address=place,
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.CRITICAL,
        )
    except (ray.exceptions.AuthenticationError, OSError):  # Ray does not tell the one from the other
        raise ModelError(
            f"the Ray cluster at {place} answers and cannot be joined: either it does not take this machine's token "
            "(set the same RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH for radnode as for Ray), or no Ray of that cluster "
            "runs on this machine (docs/scale-out.md)"
        ) from None
    except Exception as error:  # Ray raises RuntimeError and what its libraries raise: another version, another cluster
        raise ModelError(
            f"the Ray cluster at {place} cannot be joined: {_first_line(error)}; the same Python, Ray and radnode must "
            "run on all of its machines (docs/scale-out.md)"
        ) from None
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
    return ray


def list_machines(ray: Any) -> list[Machine]:
    """The machines that are there now."""
    machines = [
        Machine(str(node["NodeManagerHostname"]), str(node["NodeManagerAddress"]), node.get("Resources", {}))
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(machines, key=lambda machine: (machine.name, machine.address))


def _find(address: str) -> str:
    """`auto` as Ray means it: what RAY_ADDRESS says, else what Ray wrote down when it was started on this machine."""
    if address != "auto":
        return address
    if named := os.environ.get("RAY_ADDRESS"):
        return named
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    file = Path(folder) / "ray" / "ray_current_cluster"
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        raise ClusterUnreachable(
            f"no Ray runs on this machine ({file} is missing): start it (docs/scale-out.md), or name the cluster in "
            "workers.address"
        ) from None


def _reach(place: str) -> None:
    """Ray waits for minutes where nothing answers, and fills the log meanwhile."""
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ClusterUnreachable(
            f"no Ray cluster answers at {place} ({why}): see `ray status` there, and workers.address"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
