"""What a model's process is allowed, and how the kernel is asked to hold it to that.

A model is code that is not ours. It needs Python, its package, the accelerator and a folder for its scratch files, and
gets no more: no network, no other file, no other process, no rights. `leave_namespaces` runs in the process that
watches the model's, `enter` in the model's own before anything of the package is read. Each of several protections
stands by itself, so that what one kernel (or one systemd unit) refuses costs that one alone; all are told as
`Protection`s.

The folders that are readable: Python's, `/usr`, `/lib*`, `/bin`, `/sbin`, `/sys`, `/proc`, the loader's and the time
zone's files in `/etc`, and the package. CUDA opens `/dev/nvidia*`, `/proc/driver/nvidia`, `/proc/self`, `/sys/devices`
and `/dev/shm`; its cache of compiled kernels goes to the scratch folder.
"""

from __future__ import annotations

import contextlib
import glob
import os
import resource
import signal
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from node.infer import kernel

_SYSTEM = (
    "/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/sys", "/proc", "/etc/ld.so.cache", "/etc/ld.so.conf",
    "/etc/ld.so.conf.d", "/etc/ld.so.preload", "/etc/localtime", "/etc/timezone", "/etc/alternatives", "/etc/passwd",
    "/etc/group", "/etc/nsswitch.conf", "/etc/nvidia", "/run/nvidia-persistenced",
)  # fmt: skip
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
_NVIDIA = ("/dev/nvidia*", "/dev/nvidia-caps", "/dev/dri/renderD*")
_OOM_SCORE = 800  # of -1000 to 1000: when memory ends, the model goes before the node
_PROCESSES_MAX = 4096  # threads included


@dataclass(frozen=True)
class Limits:
    """What one model may have."""

    scratch: str  # the only folder that it may write to
    package: str  # the folder that it may read
    cuda: bool
    memory_bytes: int | None = None  # of private memory; None: no limit of its own


@dataclass(frozen=True)
class Protection:
    """One thing that a model cannot do, or can because the kernel (or systemd) does not let us prevent it."""

    what: str  # "no network"
    holds: bool
    how: str  # the means, or why there is none

    def __str__(self) -> str:
        return f"{self.what}: {'yes' if self.holds else 'no'} ({self.how})"


def leave_namespaces() -> dict[str, str]:
    """Leave the machine's network, processes and mounts behind, as far as the kernel allows; runs before the fork.

    Returns which (`net`, `pid`, `mnt`) with "", and why not for the others. Without root it takes a user namespace.
    """
    wanted = {"net": kernel.CLONE_NEWNET, "pid": kernel.CLONE_NEWPID, "mnt": kernel.CLONE_NEWNS}
    first = 0 if os.geteuid() == 0 else kernel.CLONE_NEWUSER
    try:
        kernel.unshare(first | sum(wanted.values()))
    except OSError:
        if first:  # a user namespace is a matter of all or nothing
            return dict.fromkeys(wanted, "user namespaces are not permitted here")
    else:
        return dict.fromkeys(wanted, "")
    outcome: dict[str, str] = {}
    for name, flag in wanted.items():
        try:
            kernel.unshare(flag)
            outcome[name] = ""
        except OSError as error:
            outcome[name] = os.strerror(error.errno or 0)
    return outcome


def enter(limits: Limits, namespaces: Mapping[str, str]) -> tuple[Protection, ...]:
    """Give up all that a model does not need; afterwards nothing in this process can take it back.

    `namespaces` is what `leave_namespaces` returned. Needs a process of one thread.
    """
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="utf-8") as score:
        score.write(str(_OOM_SCORE))
    _set_limits(limits)
    private = not namespaces["mnt"] and _make_mounts_private()
    shared_memory_is_private = private and _mount("tmpfs", "/dev/shm", "mode=1777")
    # /proc shows the processes of the namespace that mounted it.
    others_are_invisible = private and not namespaces["pid"] and _mount("proc", "/proc", "")
    landlock = kernel.landlock_version()
    if not landlock and private:
        private = _build_root(limits)
    dropped = _try(kernel.drop_capabilities)
    kernel.die_with_parent(signal.SIGKILL)
    kernel.forbid_new_privileges()
    landlock_failed = "the kernel has no Landlock"
    if landlock:
        writes_shm = shared_memory_is_private or limits.cuda
        landlock_failed = _try(lambda: kernel.restrict_files(_rules(limits, shared_memory=writes_shm)))
    scoped = landlock >= 6 and not landlock_failed
    only_itself = None if scoped or not namespaces["pid"] else os.getpid()
    filtered = _try(lambda: kernel.filter_system_calls(only_itself))
    files_how = "Landlock" if not landlock_failed else f"mount namespace; {landlock_failed}"
    files_hold = not landlock_failed or (not landlock and private)
    network = [name for name, failed in (("network namespace", namespaces["net"]), ("seccomp", filtered)) if not failed]
    others = [
        *(["PID namespace"] if not namespaces["pid"] else []),
        *(["Landlock"] if not landlock_failed else []),
        *(["seccomp"] if not filtered else []),
    ]
    return (
        Protection(
            "no network", bool(network) and _no_sockets(), " and ".join(network) or f"{namespaces['net']}; {filtered}"
        ),
        Protection(
            "read-only files, none but its own",
            files_hold and _no_write_beside(limits.scratch),
            files_how if files_hold else landlock_failed,
        ),
        Protection(
            "no way to other processes",
            bool(not landlock_failed and (scoped or not filtered)) or bool(others_are_invisible),
            " and ".join(others) or "nothing of it is permitted here",
        ),
        Protection(
            "no rights to gain",
            not dropped,
            "no capabilities, no_new_privs" if not dropped else f"capabilities remain: {dropped}",
        ),
    )


def clean_environment(scratch: str) -> dict[str, str]:
    """The environment of a model's process: where Python and libraries lie, no secrets, and every cache in `scratch`.

    Of our own environment only names that are known to matter pass: a database's URL or a token may stand in any other.
    """
    kept = {"PATH", "LANG", "TZ", "LD_LIBRARY_PATH", "PYTHONHOME", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"}
    starts = ("LC_", "OMP_", "MKL_", "PYTORCH_", "NVIDIA_VISIBLE", "NVIDIA_DRIVER")
    return {name: value for name, value in os.environ.items() if name in kept or name.startswith(starts)} | {
        "HOME": scratch,
        "TMPDIR": scratch,
        "XDG_CACHE_HOME": scratch,
        "TORCH_HOME": scratch,
        "HF_HOME": scratch,
        "MPLCONFIGDIR": scratch,
        "NUMBA_CACHE_DIR": scratch,
        "CUDA_CACHE_PATH": f"{scratch}/nv",
        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
        "TRITON_CACHE_DIR": f"{scratch}/triton",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "nnUNet_raw": scratch,
        "nnUNet_preprocessed": scratch,
        "nnUNet_results": scratch,
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if os.path.isabs(entry)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        # torch takes the CPU's memory in huge pages: a volume's chain of transforms in two thirds of the time.
        "THP_MEM_ALLOC_ENABLE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _set_limits(limits: Limits) -> None:
    """Limits of the kernel for the process and what it starts, as far as they are below what holds already."""
    wanted = {resource.RLIMIT_CORE: 0}  # a dump would hold the study
    if os.geteuid():  # the limit counts all processes of the user, and root's are the machine's
        wanted[resource.RLIMIT_NPROC] = _PROCESSES_MAX
    # RLIMIT_DATA counts private memory that can be written; RLIMIT_AS would count the terabytes of addresses that torch
    # and CUDA reserve. CUDA's own reservations count in both: there the parent watches what is resident.
    if limits.memory_bytes is not None and not limits.cuda:
        wanted[resource.RLIMIT_DATA] = limits.memory_bytes
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (most, most))


def _readable(limits: Limits) -> Iterator[str]:
    """The paths that a model may read."""
    yield from _SYSTEM
    yield from {sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.path.realpath(sys.executable))}
    own = Path(__file__).resolve().parents[1]
    yield str(own)
    for entry in [*sys.path, *os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)]:
        # A checkout holds configuration, models and storage beside the code.
        is_checkout = os.path.isdir(os.path.join(entry, own.name)) and "-packages" not in os.path.basename(entry)
        if os.path.isabs(entry) and entry != "/" and not is_checkout:
            yield entry
    yield limits.package  # and no more: links lead nowhere but within it (`node.infer.package`)


def _devices(limits: Limits) -> list[str]:
    return [*_DEVICES, *(path for pattern in _NVIDIA for path in glob.glob(pattern) if limits.cuda)]


def _rules(limits: Limits, *, shared_memory: bool) -> Iterator[tuple[str, int]]:
    """Paths and their rights for Landlock."""
    yield from ((path, kernel.READ) for path in _readable(limits))
    yield from ((path, kernel.DEVICE) for path in _devices(limits))
    yield limits.scratch, kernel.WRITE
    if shared_memory:
        yield "/dev/shm", kernel.WRITE


def _make_mounts_private() -> bool:
    return not _try(lambda: kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE))


def _mount(kind: str, place: str, options: str) -> bool:
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    return not _try(lambda: kernel.mount(kind, place, kind, flags, options))


def _build_root(limits: Limits) -> bool:
    """For kernels without Landlock: a root file system that holds the readable paths, read-only, and the scratch."""
    # Mounted over a folder that lies in the scratch; it vanishes with this mount namespace.
    root = os.path.join(limits.scratch, "root")

    def build() -> None:
        os.mkdir(root)
        kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
        for path in dict.fromkeys([*_readable(limits), *map(os.path.realpath, _readable(limits))]):
            _show(root, path, read_only=True)
        for path in [*_devices(limits), "/dev/shm", limits.scratch]:
            _show(root, path, read_only=False)
        kernel.mount("", root, "", _flags_of(root) | kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY)
        kernel.change_root(root)

    return not _try(build)


def _show(root: str, path: str, *, read_only: bool) -> None:
    """The path inside `root`, as it is outside: a link as a link, a folder or file by a bind mount."""
    inside = root + path
    if os.path.lexists(inside) and not (path == "/dev/shm" or os.path.isdir(path)):
        return
    try:
        mode = os.lstat(path).st_mode
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if stat.S_ISLNK(mode):
            os.symlink(os.readlink(path), inside)
            return
        if stat.S_ISDIR(mode):
            os.makedirs(inside, exist_ok=True)
        else:
            os.close(os.open(inside, os.O_CREAT | os.O_WRONLY))
    except (FileNotFoundError, FileExistsError):
        return
    except OSError:  # it lies below one that is mounted already, and read-only
        return
    kernel.mount(path, inside, "", kernel.MS_BIND | kernel.MS_REC)
    if read_only:
        kernel.mount("", inside, "", _flags_of(inside) | kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY)


def _flags_of(path: str) -> int:
    """The flags of a mount that a remount must keep where a user namespace inherited them."""
    known = (
        (os.ST_NOSUID, kernel.MS_NOSUID),
        (os.ST_NODEV, kernel.MS_NODEV),
        (os.ST_NOEXEC, kernel.MS_NOEXEC),
        (os.ST_NOATIME, 1024),
        (os.ST_NODIRATIME, 2048),
        (os.ST_RELATIME, 1 << 21),
    )
    have = os.statvfs(path).f_flag
    return sum(flag for bit, flag in known if have & bit)


def _try(step) -> str:
    """Why a step failed; "" when it did not."""
    try:
        step()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _no_sockets() -> bool:
    """Whether this process can reach no address, tried on one of documentation's (RFC 5737)."""
    import socket

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing; needs a route
    except OSError:
        return True
    return False


def _no_write_beside(scratch: str) -> bool:
    """Whether no file can be made in the folder that holds the scratch."""
    path = os.path.join(os.path.dirname(scratch), f".{os.path.basename(scratch)}.probe")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError:
        return True
    os.unlink(path)
    return False
