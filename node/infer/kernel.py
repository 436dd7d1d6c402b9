"""What Linux offers to a process that gives up rights, as thin calls: namespaces, mounts, Landlock, seccomp, limits.

Only ctypes, so that it can run before anything else is imported. `node.infer.sandbox` says what is asked for and why.
Numbers are those of include/uapi in the kernel; x86_64 and aarch64 are known.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x00020000, 0x10000000, 0x20000000, 0x40000000
_CLONE_NEW_ANY = 0x7E020080  # NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET and NEWTIME
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_SECCOMP_MODE_FILTER = 2

# Name to number on x86_64 and on aarch64.
_NUMBERS: dict[str, tuple[int, int]] = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "capset": (126, 91),
    "chroot": (161, 51),
    "clone": (56, 220),
    "clone3": (435, 435),
    "connect": (42, 203),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "kill": (62, 129),
    "landlock_add_rule": (445, 445),
    "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "setns": (308, 268),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "socket": (41, 198),
    "tgkill": (234, 131),
    "tkill": (200, 130),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def _number(name: str) -> int:
    machine = platform.machine()
    if machine not in _AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"radnode does not know the system calls of {machine}")
    return _NUMBERS[name][machine == "aarch64"]


def _syscall(name: str, *arguments: object) -> int:
    result = _libc.syscall(_number(name), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _prctl(option: int, value: object, *more: object) -> None:
    zero = ctypes.c_ulong(0)
    arguments = [ctypes.c_ulong(value) if isinstance(value, int) else value, *more]
    if _libc.prctl(option, *arguments, *[zero] * (4 - len(arguments))) < 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


# -- Life and rights ---------------------------------------------------------------------------------------------------


def die_with_parent(signal: int) -> None:
    """Get this signal when the thread that started this process ends (PR_SET_PDEATHSIG)."""
    _prctl(_PR_SET_PDEATHSIG, int(signal))


def adopt_orphans() -> None:
    """Processes whose parents end below this one become its children (PR_SET_CHILD_SUBREAPER)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def forbid_new_privileges() -> None:
    """No set-uid program gives rights any more; needed before Landlock and seccomp."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Give up every capability, for this process and what it starts. `OSError` when some remain."""
    for capability in range(64):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno == errno.EINVAL:  # past the last one that this kernel has
                break
            if error.errno != errno.EPERM:  # without CAP_SETPCAP; no_new_privs keeps what is not held from coming back
                raise
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    try:
        _syscall("capset", ctypes.c_char_p(header), ctypes.c_char_p(bytes(24)))
    except OSError:
        if effective_capabilities():
            raise


def effective_capabilities() -> int:
    """The capabilities of this process as a bit mask."""
    with open("/proc/self/status", encoding="utf-8", errors="replace") as status:
        return next((int(line.split()[1], 16) for line in status if line.startswith("CapEff:")), 0)


# -- Namespaces and mounts ---------------------------------------------------------------------------------------------


def unshare(flags: int) -> None:
    """Leave the shared namespaces of these kinds. A user namespace maps this user and group to themselves."""
    user, group = os.getuid(), os.getgid()
    _syscall("unshare", ctypes.c_ulong(flags))
    if flags & CLONE_NEWUSER:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
                file.write(text)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    texts = [ctypes.c_char_p(os.fsencode(text)) if text else None for text in (source, target, kind)]
    _syscall("mount", *texts, ctypes.c_ulong(flags), ctypes.c_char_p(options.encode()) if options else None)


def change_root(folder: str) -> None:
    """Make this mount the root; what was mounted outside of it is gone (pivot_root(2), "pivot_root(".", ".")")."""
    os.chdir(folder)
    _syscall("pivot_root", ctypes.c_char_p(b"."), ctypes.c_char_p(b"."))
    _syscall("umount2", ctypes.c_char_p(b"."), ctypes.c_int(_MNT_DETACH))
    os.chdir("/")


# -- Landlock ----------------------------------------------------------------------------------------------------------

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_MAKE_SPECIAL = 1 << 6 | 1 << 9 | 1 << 11  # MAKE_CHAR, MAKE_SOCK and MAKE_BLOCK: allowed nowhere
_IOCTL_DEV = 1 << 15
_FILES_ALONE = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14 | _IOCTL_DEV  # the rights that a file can have
READ = _EXECUTE | _READ_FILE | _READ_DIR
DEVICE = READ | _WRITE_FILE | _IOCTL_DEV
WRITE = 0xFFFF & ~_MAKE_SPECIAL & ~_IOCTL_DEV


def landlock_version() -> int:
    """The kernel's Landlock ABI, 0 where there is none."""
    try:
        return _syscall("landlock_create_ruleset", None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError:
        return 0


def restrict_files(rules: Iterable[tuple[str, int]]) -> int:
    """From now on this process opens nothing but what lies below these paths, with these rights (Landlock).

    Where the kernel can, TCP, abstract sockets of others and signals to others are refused too. Returns the ABI. Needs
    `forbid_new_privileges`. A path that does not exist is passed over.
    """
    version = landlock_version()
    if not version:
        raise OSError(errno.EOPNOTSUPP, "the kernel has no Landlock")
    files = (1 << (13 + (version >= 2) + (version >= 3))) - 1 | (_IOCTL_DEV if version >= 5 else 0)
    network = 3 if version >= 4 else 0  # bind and connect of TCP
    scoped = 3 if version >= 6 else 0  # abstract sockets and signals
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = struct.pack("=QQQ", files, network, scoped)[:size]
    ruleset = _syscall(
        "landlock_create_ruleset", ctypes.c_char_p(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0)
    )
    try:
        for path, rights in rules:
            try:
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                allowed = rights & files & (-1 if os.path.isdir(path) else _FILES_ALONE)
                rule = struct.pack("=Qi", allowed, place)
                arguments = (ctypes.c_int(1), ctypes.c_char_p(rule), ctypes.c_uint32(0))
                _syscall("landlock_add_rule", ctypes.c_int(ruleset), *arguments)
            finally:
                os.close(place)
        _syscall("landlock_restrict_self", ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return version


# -- seccomp -----------------------------------------------------------------------------------------------------------

# What no model needs, and what would undo the rest: io_uring opens sockets past a filter, ptrace and process_vm_* reach
# into processes of the same user, a session or group of one's own would escape the signal that ends the host.
_REFUSED = (
    "add_key", "bpf", "chroot", "delete_module", "finit_module", "fsconfig", "fsmount", "fsopen", "fspick",
    "init_module", "io_uring_enter", "io_uring_register", "io_uring_setup", "kexec_file_load", "kexec_load", "keyctl",
    "mount", "mount_setattr", "move_mount", "open_by_handle_at", "open_tree", "perf_event_open", "pidfd_getfd",
    "pivot_root", "process_vm_readv", "process_vm_writev", "ptrace", "request_key", "setns", "setpgid", "setsid",
    "umount2", "unshare", "userfaultfd",
)  # fmt: skip
_SIGNALS = ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
_AF_UNIX, _SOCK_DGRAM = 1, 2
_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06  # BPF_LD|W|ABS, BPF_ALU|AND|K, BPF_RET|K
_EQUAL, _AT_LEAST, _ANY_BIT = 0x15, 0x35, 0x45  # BPF_JMP|JEQ|K, JGE, JSET
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NR, _ARCH, _FIRST, _SECOND = 0, 4, 16, 24  # offsets in struct seccomp_data; the low half of an argument

Instruction = tuple[int, int, int, int]  # code, jump when true, jump when false, value


def filter_program(signals_to: int | None) -> list[Instruction]:
    """The filter: no sockets but of AF_UNIX streams, which connect to nothing, and none of `_REFUSED`.

    `signals_to` is the only process that signals may be sent to, None for any that the kernel lets this one see.
    """

    def refuse(code: int = errno.EPERM) -> Instruction:
        return (_RETURN, 0, 0, _ERRNO | code)

    allow: Instruction = (_RETURN, 0, 0, _ALLOW)
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _AUDIT_ARCH[platform.machine()]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NR),
    ]
    if platform.machine() == "x86_64":  # the x32 numbers of the same calls
        program += [(_AT_LEAST, 0, 1, 0x40000000), refuse()]
    for name in _REFUSED:
        program += [(_EQUAL, 0, 1, _number(name)), refuse()]
    # As if nobody listened: what looks for a service (nscd, NVIDIA's persistence daemon and MPS) goes on without it.
    program += [(_EQUAL, 0, 1, _number("connect")), refuse(errno.ECONNREFUSED)]
    # Its flags lie in memory, where a filter cannot look; libc falls back to clone.
    program += [(_EQUAL, 0, 1, _number("clone3")), refuse(errno.ENOSYS)]
    program += [
        (_EQUAL, 0, 4, _number("clone")),
        (_LOAD, 0, 0, _FIRST),
        (_ANY_BIT, 0, 1, _CLONE_NEW_ANY),
        refuse(),
        allow,
    ]
    # CUDA opens AF_UNIX sockets to itself. A datagram socket could send without connecting.
    program += [
        (_EQUAL, 0, 7, _number("socket")),
        (_LOAD, 0, 0, _FIRST),
        (_EQUAL, 0, 3, _AF_UNIX),
        (_LOAD, 0, 0, _SECOND),
        (_AND, 0, 0, 0xF),
        (_EQUAL, 0, 1, _SOCK_DGRAM),
        refuse(),
        allow,
    ]
    if signals_to is not None:
        program += [(_EQUAL, 0, 1, _number("pidfd_send_signal")), refuse()]
        for name in _SIGNALS:
            program += [
                (_EQUAL, 0, 4, _number(name)),
                (_LOAD, 0, 0, _FIRST),
                (_EQUAL, 1, 0, signals_to),
                refuse(),
                allow,
            ]
    return [*program, allow]


def filter_system_calls(signals_to: int | None = None) -> None:
    """Install `filter_program` for this process and all that it starts. Needs `forbid_new_privileges`."""
    program = filter_program(signals_to)
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(buffer)))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_void_p(ctypes.addressof(header)))
