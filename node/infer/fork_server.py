"""The process that models' processes are forked from: `python -m node.infer.fork_server SOCKET`.

PyTorch and MONAI take 5 to 7 s to import. This process does that once for a worker (`node.infer.processes`), and then
forks one child for every request: a model is loaded in a tenth of a second, and one that ended costs as little. No code
of a package ever runs here, and no voxel comes here. A child closes the way back before it does anything else, and then
is what a fresh `node.infer.host` would be: it gives up its rights before it reads the package.

CUDA cannot be used in a fork of a process that has used it. None of the imports does; where the driver's library is
loaded all the same, no process for CUDA is forked.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from typing import Any

from setproctitle import setproctitle

from node.infer import host

PRELOADED = (
    "node.infer.bundle", "node.infer.network", "node.infer.nnunet", "node.infer.exported", "node.infer.wire",
    "node.infer.package", "node.infer.model", "node.yamlfile",
)  # fmt: skip
REQUEST_MAX = 1 << 17  # bytes: the environment and a few names
_REAP_MS = 5000


def main() -> int:
    """Import, then fork a process for each request until the worker closes the socket."""
    end = socket.socket(fileno=int(sys.argv[1]))
    setproctitle("radnode fork server")  # now: it finds its place before the environment is changed
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a terminal's Ctrl-C is the worker's affair
    for name in PRELOADED:
        with contextlib.suppress(Exception):  # the model's process will say it
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # children share what is never looked at again
    with contextlib.suppress(OSError):  # the worker is gone
        end.send(json.dumps({"cuda": _may_use_cuda()}).encode())
        _serve(end)
    shutil.rmtree(os.environ["HOME"], ignore_errors=True)  # its scratch folder, where no worker is left to do it
    return 0


def _serve(end: socket.socket) -> None:
    poll = select.poll()
    poll.register(end, select.POLLIN)
    while True:
        ready = poll.poll(_REAP_MS)
        _reap()
        if not ready:
            continue
        data, descriptors, _, _ = socket.recv_fds(end, REQUEST_MAX, 4)
        if not data:
            return
        _fork(end, json.loads(data), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _fork(end: socket.socket, request: dict[str, Any], descriptors: list[int]) -> None:
    """Fork one model's process; its pidfd goes back through the last descriptor."""
    channel, lifeline, output, birth = descriptors
    try:
        child = os.fork()
    except OSError:  # the closed descriptors say that none was born
        return
    if not child:
        code = 1
        try:
            end.close()
            code = _become(request, channel, lifeline, output)
        except BaseException:
            traceback.print_exc()  # the last lines of it reach the worker
        finally:
            os._exit(code)  # never back into the server's frames
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(birth)) as news:
        descriptor = os.pidfd_open(child)
        try:
            socket.send_fds(news, [b"born"], [descriptor])
        finally:
            os.close(descriptor)


def _become(request: dict[str, Any], channel: int, lifeline: int, output: int) -> int:
    """Be what `node.infer.host` is when it was started by itself."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    kept = {0, 1, 2, channel, lifeline}
    for number in map(int, os.listdir("/proc/self/fd")):
        if number not in kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(number)
    for number in (channel, lifeline):
        os.set_inheritable(number, False)
    os.environ.clear()
    os.environ.update(request["environment"])
    package = request["setup"]["package"]
    setproctitle(f"radnode model {package['name']}: {package['folder']}" if package else "radnode model")  # for ps
    tempfile.tempdir = None
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    return host.become_warden(request["setup"] | {"channel": channel, "lifeline": lifeline})


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _may_use_cuda() -> bool:
    """Whether a fork may use CUDA: its driver's library is not here yet."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            return "libcuda.so" not in maps.read()
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
