"""How a worker starts a model's process (`node.infer.host`): afresh, or forked from one that has its libraries.

The fork server (`node.infer.fork_server`) belongs to one worker and ends with it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from node.infer.sandbox import clean_environment

_log = logging.getLogger(__name__)

_END_S = 5.0
_AGAIN_S = 60.0  # until a fork server that could not be started is tried again


@dataclass(frozen=True)
class Start:
    """What a model's process is started with."""

    setup: Mapping[str, Any]  # as in `node.infer.host`, without its descriptors
    scratch: str
    channel: int  # descriptors: the process's ends of them
    lifeline: int


class Process(Protocol):
    """A warden that was started."""

    output: int  # descriptor: what it and its model print; the reader closes it

    @property
    def began(self) -> bool:
        """Whether it ever was, as far as `wait` has found out."""
        ...

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after this many seconds at most."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


class FreshProcess:
    """A process of its own interpreter."""

    began = True

    def __init__(self, start: Start):
        self.output, written = os.pipe()
        setup = {**start.setup, "channel": start.channel, "lifeline": start.lifeline}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "node.infer.host", json.dumps(setup)],
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
                env=clean_environment(start.scratch),
                pass_fds=(start.channel, start.lifeline),
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            os.close(self.output)
            raise
        finally:
            os.close(written)

    def wait(self, seconds: float) -> bool:
        """See `Process`."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """See `Process`."""
        self._process.kill()
        self._process.wait()


class ForkedProcess:
    """A fork of the server. It is asked for and not waited for: the server may still be importing."""

    def __init__(self, output: int, birth: socket.socket):
        """`birth` brings its pidfd."""
        self.output = output
        self._birth = birth
        self._pidfd: int | None = None

    @property
    def began(self) -> bool:
        """See `Process`."""
        return self._pidfd is not None

    def wait(self, seconds: float) -> bool:
        """See `Process`."""
        if self._pidfd is None:
            self._birth.settimeout(seconds)
            try:
                _, descriptors, _, _ = socket.recv_fds(self._birth, 16, 1)
            except (TimeoutError, BlockingIOError):
                return False
            if not descriptors:  # the server ended before it was born, or it cannot be forked
                return True
            self._pidfd = descriptors[0]
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def kill(self) -> None:
        """See `Process`."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def __del__(self) -> None:
        self._birth.close()
        if self._pidfd is not None:
            os.close(self._pidfd)


class ForkServer:
    """A worker's process that has PyTorch and MONAI, and forks those of its models."""

    def __init__(self) -> None:
        """Start it; it imports for some seconds, and what is asked of it meanwhile waits."""
        self._lock = threading.Lock()
        self._end: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: str | None = None
        self._cuda: bool | None = None  # whether its forks may use CUDA, once it is ready
        self._again_at = math.inf  # when it is started once more
        self._begin()

    @property
    def pid(self) -> int | None:
        """Its process."""
        return self._process.pid if self._process is not None else None

    def start(self, start: Start) -> Process:
        """Start a model's process: a fork, or a fresh one where that is not to be had."""
        with self._lock:
            if time.monotonic() >= self._again_at:
                self._begin()
            if self._end is None or (start.setup["device"].startswith("cuda") and not self._forks_use_cuda()):
                return FreshProcess(start)
            ours, theirs = socket.socketpair()
            output, written = os.pipe()
            request = {"setup": dict(start.setup), "environment": clean_environment(start.scratch)}
            try:
                socket.send_fds(
                    self._end, [json.dumps(request).encode()], [start.channel, start.lifeline, written, theirs.fileno()]
                )
            except OSError:  # it was killed: another one is there for the next
                _log.warning("the process that models are forked from is gone: it starts again")
                os.close(output)
                ours.close()
                self._finish()
                self._begin()
                return FreshProcess(start)
            finally:
                os.close(written)
                theirs.close()
            return ForkedProcess(output, ours)

    def close(self) -> None:
        """End it. The models that it forked go on."""
        with self._lock:
            self._finish()
            self._again_at = math.inf

    def _begin(self) -> None:
        self._cuda = None
        self._again_at = math.inf
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._scratch = scratch = os.path.realpath(tempfile.mkdtemp(prefix="radnode-forks-"))
            command = [sys.executable, "-P", "-m", "node.infer.fork_server", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what fails to import fails again in the model's process, which says so
                env=clean_environment(scratch),
                pass_fds=(theirs.fileno(),),
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            _log.warning("models start afresh for %.0f s: %s", _AGAIN_S, error.strerror or type(error).__name__)
            self._again_at = time.monotonic() + _AGAIN_S
            ours.close()
            self._finish()
            return
        finally:
            theirs.close()
        self._end = ours

    def _finish(self) -> None:
        if self._end is not None:
            self._end.close()
            self._end = None
        if self._process is not None:
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:  # it still imports
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def _forks_use_cuda(self) -> bool:
        """Not before it has said so: while it imports, a fresh process is as quick."""
        if self._cuda is None and self._end is not None:
            with contextlib.suppress(BlockingIOError):
                try:
                    self._cuda = bool(json.loads(self._end.recv(1024, socket.MSG_DONTWAIT) or b"{}").get("cuda"))
                except ConnectionError:
                    self._cuda = False
        return bool(self._cuda)
