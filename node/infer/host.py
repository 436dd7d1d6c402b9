"""The process of one model: `python -m node.infer.host SETUP`, or a fork of `node.infer.fork_server`.

It is two processes. The first one, the warden, leaves the machine's namespaces, starts the second and watches: when
either the worker or the model's process ends, it kills whatever the model started and deletes the scratch folder. The
second gives up its rights (`node.infer.sandbox`), and only then reads the package, loads the model and answers.

SETUP is a JSON object: `package` (name, folder, version, digest; null to tell the protections and end), `device`,
`scratch`, `memory_bytes`, and the descriptors `channel` (to the worker, `node.infer.wire`) and `lifeline` (the
warden's: a line when the model's process starts and one when it has ended; closed by the worker to end everything).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from node import memory
from node.infer import kernel, sandbox

_BURIAL_S = 10.0  # that killed processes may take to end
_CUDA_CONTEXT_BYTES = 500_000_000  # that a process holds on the GPU beside torch's tensors


def main() -> int:
    """A process of its own, started by nobody but `node.infer.processes`."""
    return become_warden(json.loads(sys.argv[1]))


def become_warden(setup: Mapping[str, Any]) -> int:
    """Be the warden of a model's process, which this starts, until that has ended; the exit code."""
    namespaces = sandbox.leave_namespaces()
    kernel.adopt_orphans()
    # SIGTERM and a terminal's Ctrl-C are the worker's affair, which then closes the lifeline.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    model = os.fork()
    if not model:
        os.setpgid(0, 0)
        os.close(setup["lifeline"])
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        code = 1
        try:
            code = _be_model(setup, namespaces)
        except BaseException:
            traceback.print_exc()  # the last lines of it reach the worker
        finally:
            sys.stderr.flush()
            os._exit(code)  # never back into the warden's frames
    with contextlib.suppress(OSError):
        os.setpgid(model, model)  # both do, so that neither comes first
    os.close(setup["channel"])
    return _watch(model, socket.socket(fileno=setup["lifeline"]), setup["scratch"])


# -- The warden --------------------------------------------------------------------------------------------------------


def _watch(model: int, lifeline: socket.socket, scratch: str) -> int:
    """Wait for the end of the model's process or of the worker, and leave nothing behind."""
    _tell(lifeline, {"pid": model})
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    try:
        descriptor = os.pidfd_open(model)
        poll.register(descriptor, select.POLLIN)
        patience_ms = None
    except OSError:  # before Linux 5.3, or not permitted
        patience_ms = 100
    status: int | None = None
    while status is None:
        worker_is_gone = any(number == lifeline.fileno() for number, _ in poll.poll(patience_ms))
        if worker_is_gone:
            _kill_group(model)
        ended, code = os.waitpid(model, 0 if worker_is_gone else os.WNOHANG)
        status = code if ended else None
    _bury(model)
    shutil.rmtree(scratch, ignore_errors=True)
    _tell(lifeline, {"status": status})
    return 0


def _bury(group: int) -> None:
    """Kill and reap what the model's process left behind: its own group, as it can make no other."""
    deadline = time.monotonic() + _BURIAL_S
    while time.monotonic() < deadline:
        _kill_group(group)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
        except ChildProcessError:
            return


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _tell(lifeline: socket.socket, message: Mapping[str, object]) -> None:
    with contextlib.suppress(OSError):  # a worker that is gone
        lifeline.sendall(json.dumps(message).encode() + b"\n")


# -- The model's process -----------------------------------------------------------------------------------------------


def _be_model(setup: Mapping[str, Any], namespaces: Mapping[str, str]) -> int:
    package = setup["package"]
    limits = sandbox.Limits(
        scratch=setup["scratch"],
        package=package["folder"] if package else setup["scratch"],
        cuda=setup["device"].startswith("cuda"),
        memory_bytes=setup["memory_bytes"],
    )
    os.chdir(limits.scratch)
    memory.keep_freed()
    protections = sandbox.enter(limits, namespaces)

    from node.infer.wire import Channel

    channel = Channel(socket.socket(fileno=setup["channel"]))
    channel.send({"protections": [asdict(protection) for protection in protections]})
    if package:
        _serve(channel, package, setup["device"])
    return 0


def _serve(channel: Any, package: Mapping[str, str], device: str) -> None:
    """Load the model and answer until the worker closes the channel."""
    from node.errors import ManifestError
    from node.infer.manifest import Manifest
    from node.infer.model import load_model
    from node.infer.package import MANIFEST, Package
    from node.yamlfile import load_yaml

    folder = Path(package["folder"])
    try:
        manifest = load_yaml(folder / MANIFEST, Manifest, ManifestError)
        model = load_model(Package(package["name"], folder, package["version"], manifest, package["digest"]), device)
    except BaseException as error:
        channel.send(_explain(error, "be loaded", package["name"]))
        return
    channel.send({"loaded": True} | _memory())
    while (request := _next_request(channel)) is not None:
        arrays: list[Any] = []
        try:
            inputs = _receive_inputs(channel, request["inputs"])
        except EOFError:
            return
        except MemoryError as error:
            reply = _explain(error, "run", package["name"])
        else:
            reply, arrays = _predict(model, manifest, inputs, package["name"])
            del inputs
        channel.send(reply | _memory() | {"asked": request["asked"]}, arrays)
        del reply, arrays


def _next_request(channel: Any) -> dict[str, Any] | None:
    """What the worker asks; None when it has closed the channel. Memory of the last run is kept for a while."""
    kept = True
    while True:
        try:
            if (request := channel.read_arrived()) is None:
                if kept and not select.select([channel], [], [], memory.IDLE_S)[0]:
                    memory.give_back()
                    kept = False
                request = channel.read_some()
        except EOFError:
            return None
        if request is not None and request.get("rest"):
            memory.give_back()
            kept = False
            if request["answer"]:
                channel.send({"asked": request["asked"]})
        elif request is not None:
            return request


def _receive_inputs(channel: Any, described: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs, whose voxels follow the request; after `MemoryError` all of it was read."""
    from node.infer.wire import restore_input

    inputs: dict[str, Any] = {}
    failure: MemoryError | None = None
    for name, one in described.items():
        try:
            inputs[name] = restore_input(one, channel.receive_array(tuple(one["shape"]), one["dtype"]))
        except MemoryError as error:
            failure = error
    if failure is not None:
        raise failure
    return inputs


def _predict(model: Any, manifest: Any, inputs: dict[str, Any], name: str) -> tuple[dict[str, Any], list[Any]]:
    """Run; the answer, and the arrays that follow it."""
    from node.infer.wire import describe_prediction

    try:
        reply, arrays = describe_prediction(model.predict(inputs), manifest, inputs)
        return reply | {"seconds": dict(getattr(model, "seconds", {}))}, arrays
    except BaseException as error:  # a model may raise anything, SystemExit too
        return _explain(error, "run", name), []


def _explain(error: BaseException, doing: str, name: str) -> dict[str, str]:
    """An error as a message: its kind as far as it is one of ours, and its sentence."""
    from node.errors import InputRefused, ModelError, OutputRefused

    for kind in (OutputRefused, InputRefused, ModelError):
        if isinstance(error, kind):
            return {"error": kind.__name__, "says": str(error)}
    if isinstance(error, MemoryError):
        return {"error": "ModelError", "says": f"model {name} could not {doing}: out of memory"}
    first_line = (str(error).splitlines() or [""])[0][:300]
    return {"error": "ModelError", "says": f"model {name} could not {doing}: {type(error).__name__}: {first_line}"}


def _memory() -> dict[str, float]:
    """The share of the GPU that this process holds; memory that torch only keeps for later is given back first."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {"cuda_share": 0.0}
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return {"cuda_share": min(1.0, (torch.cuda.memory_reserved() + _CUDA_CONTEXT_BYTES) / total)}


if __name__ == "__main__":
    sys.exit(main())
