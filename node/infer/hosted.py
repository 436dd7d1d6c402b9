"""A model in a process of its own: the worker's side of `node.infer.host`.

The process starts when the model is asked for and loads while the worker reads the study. Whatever it does (ends,
crashes, hangs, answers rubbish), the worker hears a named error with a sentence, and the next run gets a fresh process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from numpy.typing import NDArray

from node.dicom.volume import Image, Volume
from node.errors import InputRefused, ModelError, OutputRefused
from node.infer.failures import name_signal
from node.infer.package import Package
from node.infer.processes import ForkServer, FreshProcess, Start
from node.infer.results import Prediction
from node.infer.sandbox import Protection
from node.infer.wire import (
    Channel,
    bytes_of,
    clean_text,
    describe_input,
    restore_prediction,
    restore_seconds,
)

_log = logging.getLogger(__name__)
_Read = TypeVar("_Read")

LOAD_S = 600.0  # that a model may take to load
_SEND_S = 30.0  # that a request may wait for the model's process to read it
_SLOW = 50e6  # bytes that it reads in a second at least
_END_S = 20.0  # that the warden may take to end
_LOOK_S = 0.5  # between two looks at the memory
_TAIL = 4096  # bytes of what a model printed that are kept


class HostedModel:
    """One package's model, run by one thread at a time in a process that has no rights and no network."""

    def __init__(
        self, package: Package, device: str, *, memory_bytes: int | None = None, forks: ForkServer | None = None
    ):
        """Start to load it and return at once; what goes wrong is told by `load` or `predict`.

        `memory_bytes` is the most that its process may take of the machine's memory. It is one of the `forks`, or a
        fresh one.
        """
        self._forks = forks
        self._package = package
        self._device = device
        self._memory_bytes = memory_bytes
        self._host: _Host | None = None
        self.running = False  # it has its input and has not answered yet
        self.protections: tuple[Protection, ...] = ()  # known when it is loaded
        self.seconds: dict[str, float] = {}  # of the last run, by its parts, as the model told them
        self._start()

    def load(self) -> None:
        """Wait until it is loaded; `ModelError` says why it cannot be."""
        if self._host is not None and self._host.loaded and not self._host.stopped and self._host.has_ended():
            self._drop()  # between two runs, by whomever: nobody's attempt is lost
        host = self._host or self._start()
        if host.loaded:
            return
        try:
            self._await(host)
        except ModelError:
            if not host.never_began():
                raise
            self._await(self._start())  # the server that it was to be forked from is gone: of a fresh one

    def _await(self, host: _Host) -> None:
        try:
            told, self.protections = self.protections, host.protections()
            for protection in self.protections:
                if not protection.holds and protection not in told:
                    _log.warning("model %s runs without a protection: %s", self._package.name, protection)
            deadline = host.started_at + LOAD_S
            message = host.answer(deadline, f"it took longer than {LOAD_S:.0f} s to load")
            _raise_if_error(message)
            host.loaded = True
            host.note_memory(message)
        except BaseException:
            self._drop()
            raise

    def predict(self, inputs: Mapping[str, Volume | Image]) -> Prediction:
        """Run on `inputs`, as `node.infer.model.Model` says. After `ModelError` the next run has a fresh process."""
        self.load()
        host = self._host
        if host is None:  # stopped by another thread in this moment
            raise ModelError(self._sentence("it was stopped"))
        manifest = self._package.manifest
        limit_s = manifest.timeout_s
        try:
            host.ask(inputs)
            self.running = True
            late = f"it ran longer than {limit_s:.0f} s (timeout_s in dicom.yaml)"
            deadline = time.monotonic() + limit_s
            message = host.answer(deadline, late)
            host.note_memory(message)
            _raise_if_error(message)
            self.seconds = restore_seconds(message)
            receive = partial(host.receive, deadline=deadline, late=late)
            prediction = restore_prediction(message, manifest, inputs, receive)
            if host.unread:
                raise ModelError(self._sentence("its process sends more than a result"))
            return prediction
        except (InputRefused, OutputRefused):  # an answer: the process is as good as before
            if host.unread:  # of what it announced
                self._drop()
            raise
        except BaseException:
            self._drop()
            raise
        finally:
            self.running = False

    def stop(self, why: str) -> None:
        """End its process at once, from any thread: the run that waits for it raises `ModelError` with this sentence.

        Where none waits the next one does: a job may be cancelled while its study is still read.
        """
        if (host := self._host) is not None:
            host.stop(self._sentence(why))

    def rest(self, *, wait: bool = False) -> None:
        """Another model runs next: its process gives back the memory that it keeps for a next run. With `wait` it has
        done so upon return; one that does not answer is ended.
        """
        if self._host is None or not self._host.loaded or self._host.stopped:
            return
        try:
            self._host.rest(wait=wait)
        except ModelError as error:
            _log.warning("%s", error)
            self._drop()

    def close(self) -> None:
        """End its process."""
        self._drop()

    @property
    def name(self) -> str:
        """The package's name."""
        return self._package.name

    @property
    def stopped(self) -> bool:
        """Whether `stop` ended its process and no run was told of it yet."""
        return self._host is not None and bool(self._host.stopped)

    @property
    def resident_bytes(self) -> int:
        """What its process holds of the machine's memory; 0 when there is none."""
        return self._host.resident_bytes() if self._host is not None else 0

    @property
    def cuda_share(self) -> float:
        """The share (0 to 1) of the GPU's memory that its process said that it holds."""
        return self._host.cuda_share if self._host is not None else 0.0

    @property
    def pid(self) -> int | None:
        """The model's process, None when there is none."""
        return self._host.pid if self._host is not None else None

    def _start(self) -> _Host:
        self._host = _Host(self._package, self._device, self._memory_bytes, self._forks)
        return self._host

    def _drop(self) -> None:
        if self._host is not None:
            self._host.close()
            self._host = None

    def _sentence(self, why: str) -> str:
        return f"model {self._package.name}: {why}"


def probe_protections(device: str) -> tuple[Protection, ...]:
    """What holds for models on this machine and for this user, tried by a process without a model."""
    host = _Host(None, device, None)
    try:
        return host.protections()
    finally:
        host.close()


class _Host:
    """One process, from its start to its end."""

    def __init__(self, package: Package | None, device: str, memory_bytes: int | None, forks: ForkServer | None = None):
        self.name = package.name if package else "none"
        self.started_at = time.monotonic()
        self.pid: int | None = None
        self.loaded = False
        self.cuda_share = 0.0
        self._memory_bytes = memory_bytes
        self._asked = 0
        self.unread = 0  # bytes that follow the last answer
        self.stopped = ""  # the sentence for whom it was stopped
        self._status: int | None = None
        self._told = b""  # by the warden
        self._scratch = os.path.realpath(tempfile.mkdtemp(prefix="radnode-model-"))
        ours, theirs = socket.socketpair()
        self._lifeline, lifeline = socket.socketpair()
        self._lifeline.settimeout(_SEND_S)
        self._ours, self._channel = ours, Channel(ours)
        setup = {
            "package": package
            and {
                "name": package.name,
                "folder": str(package.folder.resolve()),
                "version": package.version,
                "digest": package.digest,
            },
            "device": device,
            "scratch": self._scratch,
            "memory_bytes": memory_bytes,
        }
        try:
            begin = FreshProcess if forks is None else forks.start
            self._process = begin(Start(setup, self._scratch, theirs.fileno(), lifeline.fileno()))
        except BaseException:
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise
        finally:
            theirs.close()
            lifeline.close()
        self._printed = bytearray()
        self._reader = threading.Thread(target=self._read_output, name="model output", daemon=True)
        self._reader.start()

    def protections(self) -> tuple[Protection, ...]:
        """What holds for this process: its first message, from before it read anything of the package."""
        message = self.answer(time.monotonic() + LOAD_S, "its process does not start")
        try:
            return tuple(Protection(**item) for item in message["protections"])
        except (KeyError, TypeError):
            raise ModelError(f"model {self.name}: its process did not say what protects it") from None

    def ask(self, inputs: Mapping[str, Volume | Image]) -> None:
        """Send the inputs."""
        self._asked += 1
        described = {name: describe_input(source) for name, source in inputs.items()}
        arrays = [source.array for source in inputs.values()]
        self._ours.settimeout(_SEND_S + sum(array.nbytes for array in arrays) / _SLOW)
        try:
            self._channel.send({"inputs": described, "asked": self._asked}, arrays)
        except TimeoutError:
            raise ModelError(f"model {self.name}: its process does not read what it is sent") from None
        except (BrokenPipeError, ConnectionResetError):
            raise self._ended() from None

    def rest(self, *, wait: bool) -> None:
        """Ask it to give back the memory that it keeps, and `wait` for its word; errors as of `answer`."""
        self._asked += wait
        self._ours.settimeout(_SEND_S)
        with contextlib.suppress(OSError):  # whoever asks next will find out
            self._channel.send({"rest": True, "asked": self._asked, "answer": wait})
        if wait:
            self.answer(time.monotonic() + _SEND_S, "its process does not give back its memory")

    def answer(self, deadline: float, late: str) -> dict[str, Any]:
        """The next message. `ModelError` when the process ends, takes too much memory or sends rubbish, and at
        `deadline` (monotonic) with the words `late`.
        """
        message = self._channel.read_arrived()
        while message is None:
            message = self._when_ready(self._channel.read_some, deadline, late)
        if message.get("asked", 0) != self._asked:
            raise ModelError(f"model {self.name}: its process answered what it was not asked")
        follows = message.get("bytes", 0)
        if type(follows) is not int or follows < 0:
            raise ModelError(f"model {self.name}: its process did not say how much follows its answer")
        self.unread = follows
        return message

    def receive(self, array: NDArray[Any], deadline: float, late: str) -> None:
        """Fill an array with what follows the answer; errors as of `answer`."""
        if array.nbytes > self.unread:
            raise ModelError(f"model {self.name}: its process sends less than its answer says")
        self.unread -= array.nbytes
        view = bytes_of(array)
        view = view[self._channel.take_arrived(view) :]
        while len(view):
            view = view[self._when_ready(partial(self._channel.read_into, view), deadline, late) :]

    def _when_ready(self, read: Callable[[], _Read], deadline: float, late: str) -> _Read:
        """What `read` gives when something has come through the channel."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(self._lifeline, select.POLLIN)
        while True:
            if self.stopped:
                raise ModelError(self.stopped)
            wait_s = min(deadline - time.monotonic(), _LOOK_S)
            ready = {number for number, _ in poll.poll(max(wait_s, 0) * 1000)}
            if wait_s <= 0 and not ready:  # what was said in time may be asked for late
                raise ModelError(f"model {self.name}: {late}")
            if self._channel.fileno() in ready:
                try:
                    return read()
                except (EOFError, ConnectionResetError):
                    raise self._ended() from None
            if self._lifeline.fileno() in ready:
                self._listen()
                if self._status is not None:  # and it said nothing last
                    raise self._ended()
            self._check_memory()

    def note_memory(self, message: Mapping[str, Any]) -> None:
        """Keep what the process says of the GPU's memory."""
        share = message.get("cuda_share")
        self.cuda_share = float(share) if isinstance(share, int | float) and 0 <= share <= 1 else 0.0

    def has_ended(self) -> bool:
        """Whether the process is no more, or about to end."""
        poll = select.poll()
        poll.register(self._lifeline, select.POLLIN)
        while self._status is None and poll.poll(0):
            self._listen()
        return bool(self.stopped) or self._status is not None

    def never_began(self) -> bool:
        """Whether there never was such a process, and nobody stopped it."""
        return self.pid is None and not self.stopped and self._process.wait(0) and not self._process.began

    def stop(self, sentence: str) -> None:
        """End the process and everything that it started; whoever waits for it is told `sentence`."""
        self.stopped = sentence
        with contextlib.suppress(OSError):
            self._lifeline.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """End the process, wait for it, and delete what it wrote."""
        with contextlib.suppress(OSError):
            self._lifeline.shutdown(socket.SHUT_WR)
        self._channel.close()
        if not self._process.wait(_END_S):
            _log.error("model %s: the warden of its process does not end and is killed", self.name)
            self._process.kill()
        if self._status is None and self.pid is not None:
            with contextlib.suppress(OSError):
                self._listen()
            if self._status is None:  # the warden was killed; the model's process dies with it, what that started not
                with contextlib.suppress(OSError):
                    os.killpg(self.pid, signal.SIGKILL)
        self._lifeline.close()
        self._reader.join(1)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def resident_bytes(self) -> int:
        """The process's resident memory."""
        if self.pid is None:
            with contextlib.suppress(OSError):
                self._listen()
        try:
            with open(f"/proc/{self.pid}/statm", encoding="utf-8") as statm:
                return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError, ValueError):
            return 0

    def _listen(self) -> None:
        """Read what the warden tells."""
        data = self._lifeline.recv(4096)
        self._told += data
        for line in self._told.splitlines():
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                self.pid = told.get("pid", self.pid)
                self._status = told.get("status", self._status)
        if not data and self._status is None:
            self._status = signal.SIGKILL  # the warden itself was killed

    def _check_memory(self) -> None:
        if self._memory_bytes is not None and self.pid is not None:
            resident = self.resident_bytes()
            if resident > self._memory_bytes:
                raise ModelError(
                    f"model {self.name}: it took {resident / 1e9:.1f} GB of memory, more than workers.memory "
                    f"({self._memory_bytes / 1e9:.1f} GB)"
                )

    def _ended(self) -> ModelError:
        """Why the process is no more."""
        deadline = time.monotonic() + _END_S
        while self._status is None and time.monotonic() < deadline:
            try:
                self._listen()
            except OSError:
                break
        if self.stopped:
            return ModelError(self.stopped)
        self._reader.join(1)
        status = self._status if self._status is not None else int(signal.SIGKILL)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            how = (
                "was killed (SIGKILL): the machine ran out of memory, or somebody ended it"
                if number == signal.SIGKILL
                else f"crashed ({name_signal(number)})"
            )
        else:
            how = f"ended by itself with code {os.WEXITSTATUS(status)}"
        words = [text for line in bytes(self._printed).decode(errors="replace").splitlines() if (text := line.strip())]
        said = f"; it said last: {clean_text(words[-1])[:300]}" if words else ""
        return ModelError(f"model {self.name}: its process {how}{said}")

    def _read_output(self) -> None:
        """Keep the end of what the process prints; it is never blocked by printing, and never fills a disk."""
        with open(self._process.output, "rb") as output:
            while data := os.read(output.fileno(), 1 << 16):
                self._printed += data
                del self._printed[:-_TAIL]


def _raise_if_error(message: Mapping[str, Any]) -> None:
    kinds = {"OutputRefused": OutputRefused, "InputRefused": InputRefused, "ModelError": ModelError}
    if "error" in message:
        says = message.get("says")
        raise kinds.get(str(message["error"]), ModelError)(clean_text(says if isinstance(says, str) else "it failed"))
