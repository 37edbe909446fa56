"""Walls around code that reads foreign bytes: limits, no network, no rights, no files but the ones that were handed in.

Two ways in. `confine` is called by a Python process on itself before it reads the first foreign byte; afterwards it can
compute and use the descriptors it holds, nothing else (seccomp allows a short list of system calls). `command` gives
the command line that confines a program and then becomes it; a program must be loaded and wants threads, so there the
walls are Landlock (the program's own libraries and the named files), an empty network namespace, a user without rights.

What is applied, in this order, each where the kernel and our rights allow it: death with the parent; resource limits;
new network and IPC namespaces (as root, or in a new user namespace); user and group 65534 without groups and
capabilities when we are root (a program keeps CAP_DAC_READ_SEARCH, since it must open the disk that was given to it by
descriptor: Landlock then says which file that may be); no new privileges; Landlock; seccomp. Limits, no-new-privileges
and, on x86-64, seccomp are not optional: without them this raises.

Sources: landlock(7), seccomp(2), prctl(2), `linux/landlock.h`, `linux/seccomp.h`, `asm/unistd_64.h`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from mullion.base.units import MIB

NOBODY: Final = 65534
FIRST_FILE: Final = 10
"""The descriptor that the first file of a confined program has; the others follow."""
LISTEN_FD: Final = 3
"""Where a program finds its listening socket (sd_listen_fds(3))."""

_PROGRAM_FOLDERS: Final = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/dev/null")

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_CLONE_NEWIPC: Final = 0x08000000

_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_ADD_RULE: Final = 445
_LANDLOCK_RESTRICT_SELF: Final = 446
_LANDLOCK_EXECUTE: Final = 1 << 0
_LANDLOCK_WRITE_FILE: Final = 1 << 1
_LANDLOCK_READ_FILE: Final = 1 << 2
_LANDLOCK_READ_DIR: Final = 1 << 3
_LANDLOCK_TRUNCATE: Final = 1 << 14
_LANDLOCK_FS_BITS: Final = {1: 13, 2: 14}
_LANDLOCK_FS_BITS_NOW: Final = 15
_LANDLOCK_NET: Final = 0b11  # bind and connect TCP, since ABI 4
_LANDLOCK_SCOPED: Final = 0b11  # abstract unix sockets and signals, since ABI 6

# What a process needs to compute, to use the descriptors it has, and to end: asm/unistd_64.h.
_ALLOWED_CALLS: Final = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
    "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sched_yield": 24, "mremap": 25,
    "madvise": 28, "getpid": 39, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "exit": 60,
    "gettimeofday": 96, "gettid": 186, "time": 201, "futex": 202, "restart_syscall": 219, "clock_gettime": 228,
    "exit_group": 231, "tgkill": 234, "getrandom": 318,
}  # fmt: skip
_AUDIT_ARCH_X86_64: Final = 0xC000003E
_X32_BIT: Final = 0x40000000
_RET_ALLOW: Final = 0x7FFF0000
_RET_EPERM: Final = 0x00050000 | errno.EPERM
_RET_KILL: Final = 0x80000000


@dataclass(frozen=True, slots=True)
class Limits:
    """What a confined process may use; `file_bytes` is the length that a file it writes may reach."""

    memory_bytes: int = 512 * MIB
    cpu_s: int = 60
    file_bytes: int = 0
    descriptors: int = 64


def command(argv: Sequence[str], *, limits: Limits, listen_fd: int, files: Sequence[int]) -> tuple[str, ...]:
    """The command line that confines a program; pass the descriptors on to it.

    The program finds its listening socket as descriptor 3 and the files as 10, 11, …; it can open the files again by
    `/proc/self/fd/10`, and nothing else but what it is made of. Pure.
    """
    rights = {"argv": list(argv), "limits": asdict(limits), "listen": listen_fd, "files": list(files)}
    return (sys.executable, "-I", "-m", "mullion.media.confined.jail", json.dumps(rights), str(os.getpid()))


def confine(limits: Limits, *, keep: Iterable[int], parent: int) -> None:
    """Shut this process in for good: it keeps these descriptors and can open, execute and connect nothing any more.

    `parent` is the pid of whoever started us and wants us dead with it. Raises: OSError where a wall cannot be built.
    """
    _close_others(keep)
    os.chdir("/")
    _limit(limits)
    _leave_network()
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)  # gives up all capabilities with it
    _die_with(parent)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _landlock(())
    _allow_calls(_ALLOWED_CALLS.values())


def _close_others(keep: Iterable[int]) -> None:
    kept = {0, 1, 2, *keep}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):  # the one that listed the folder
                os.close(int(name))


def _limit(limits: Limits) -> None:
    for what, value in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.descriptors),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (least, least))


def _leave_network() -> None:
    """Into namespaces of our own, where the host lets us: without rights by way of a user namespace."""
    flags = _CLONE_NEWNET | _CLONE_NEWIPC
    if _libc().unshare(flags) != 0:
        _libc().unshare(flags | _CLONE_NEWUSER)


def _die_with(parent: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be told
        os._exit(1)


def _landlock(allowed: Iterable[tuple[int, int]]) -> bool:
    """Allow only what is below these descriptors: (descriptor, rights). False where the kernel has no Landlock."""
    libc = _libc()
    abi = libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, 1)
    if abi < 1:
        return False
    handled = (1 << _LANDLOCK_FS_BITS.get(abi, _LANDLOCK_FS_BITS_NOW)) - 1
    fields = [handled]
    if abi >= 4:
        fields.append(_LANDLOCK_NET)
    if abi >= 6:
        fields.append(_LANDLOCK_SCOPED)
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    try:
        for fd, rights in allowed:
            rule = struct.pack("=Qi", rights & handled, fd)
            if libc.syscall(_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0) != 0:
                raise OSError(ctypes.get_errno(), f"landlock_add_rule for descriptor {fd}")
        if libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0:
            raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    finally:
        os.close(ruleset)
    return True


def _allow_calls(numbers: Iterable[int]) -> None:
    """Only these system calls from now on; others fail with EPERM, those of another architecture kill."""
    if platform.machine() != "x86_64":
        return
    numbers = list(numbers)
    load, jump_equal, jump_least, give = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, …|JGE|K, BPF_RET|K
    program = [
        (load, 0, 0, 4),
        (jump_equal, 1, 0, _AUDIT_ARCH_X86_64),
        (give, 0, 0, _RET_KILL),
        (load, 0, 0, 0),
        (jump_least, 0, 1, _X32_BIT),
        (give, 0, 0, _RET_KILL),
        *((jump_equal, len(numbers) - index, 0, number) for index, number in enumerate(numbers)),
        (give, 0, 0, _RET_EPERM),
        (give, 0, 0, _RET_ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    header = struct.pack("@HP", len(program), ctypes.addressof(code))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header)


def _prctl(what: int, *arguments: int | bytes) -> None:
    values = [value if isinstance(value, bytes) else ctypes.c_ulong(value) for value in arguments]
    values += [ctypes.c_ulong(0)] * (4 - len(values))
    if _libc().prctl(what, *values) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {what}")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _become(rights: dict[str, object], parent: int) -> None:
    """Confine this process and become the program."""
    argv, listen, files = rights["argv"], rights["listen"], rights["files"]
    limits = rights["limits"]
    assert isinstance(argv, list)
    assert isinstance(listen, int)
    assert isinstance(files, list)
    assert isinstance(limits, dict)
    # Out of each other's way first: any of them may have the number that another is to get.
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (listen, *files)]
    os.dup2(above[0], LISTEN_FD)
    kept = [os.dup2(fd, FIRST_FILE + index) for index, fd in enumerate(above[1:])]
    _close_others([LISTEN_FD, *kept])
    os.chdir("/")
    _die_with(parent)
    _leave_network()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    allowed: list[tuple[int, int]] = []
    for path in _PROGRAM_FOLDERS:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            of_folder = _LANDLOCK_READ_DIR if os.path.isdir(path) else 0
            allowed.append((fd, _LANDLOCK_EXECUTE | _LANDLOCK_READ_FILE | of_folder))
    for fd in kept:
        writes = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        allowed.append((fd, _LANDLOCK_READ_FILE | (_LANDLOCK_WRITE_FILE | _LANDLOCK_TRUNCATE if writes else 0)))
    _landlock(allowed)
    prefix = ["setpriv", "--pdeathsig", "KILL", "--no-new-privs"]
    if os.geteuid() == 0:
        capabilities = "-all,+dac_read_search"
        prefix += ["--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--inh-caps", capabilities]
        prefix += ["--ambient-caps", capabilities, "--bounding-set", capabilities]
    _limit(Limits(**limits))
    environment = {
        "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
        "LC_ALL": "C.UTF-8",
        "MALLOC_ARENA_MAX": "2",  # each arena reserves 64 MiB of the memory limit
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": "1",
    }
    os.execvpe(prefix[0], [*prefix, "--", *argv], environment)  # noqa: S606 - that is what it is for


if __name__ == "__main__":
    _become(json.loads(sys.argv[1]), int(sys.argv[2]))
