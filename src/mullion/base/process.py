"""The one door to `subprocess`: programs of the host are run from here and nowhere else.

Short programs that answer (`run`); long-lived ones are started detached (`spawn`) and known ever after by
`ProcessIdentity`,
because a pid alone says nothing: it may belong to somebody else by the time it is read back from a file.

Source of the identity: proc(5), `/proc/PID/stat` field 22 (start time in clock ticks after boot) and
`/proc/sys/kernel/random/boot_id`; a pid and a start time of one boot never come twice.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Self

from mullion.base.errors import DeadlineError, MissingToolError, OperationFailedError
from mullion.base.files import replace_file

Spawned = subprocess.Popen[bytes]
"""What `spawn` returns."""

_OUTPUT_LIMIT_CHARS: Final = 4000

PACKAGES: Final[Mapping[str, str]] = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "7z": "7zip",
    "7zz": "7zip",
    "mcopy": "mtools",
    "mmd": "mtools",
    "mkfs.vfat": "dosfstools",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "syslinux": "syslinux",
    "apt-cache": "apt",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "setpriv": "util-linux",
    "swtpm": "swtpm",
    "fusermount3": "fuse3",
    "umount": "mount",
}
"""The Debian package of each program that Mullion may call."""


@lru_cache(maxsize=1)
def boot_id() -> str:
    """The identity of this boot of the host (a UUID)."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process, beyond confusion: pid, start time in clock ticks after boot, boot id."""

    pid: int
    start_ticks: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """The identity of a process that is there now (a zombie is not), or None."""
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                text = file.read()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The command name in parentheses may hold anything, even parentheses: count from the last one.
        fields = text[text.rindex(b")") + 2 :].split()
        if fields[0] in (b"Z", b"X"):
            return None
        return cls(pid, int(fields[19]), boot_id())

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read back what `str()` wrote; None when it is not that."""
        parts = text.split()
        if len(parts) != 3 or not (parts[0].isdigit() and parts[1].isdigit()):
            return None
        return cls(int(parts[0]), int(parts[1]), parts[2])

    def __str__(self) -> str:
        return f"{self.pid} {self.start_ticks} {self.boot_id}"

    @property
    def is_alive(self) -> bool:
        return self.boot_id == boot_id() and ProcessIdentity.of(self.pid) == self

    def open_pidfd(self) -> int | None:
        """A descriptor that becomes readable when the process ends, or None when it has ended. The caller closes it."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if self.is_alive:  # checked after opening: the descriptor cannot pass to another process any more
            return pidfd
        os.close(pidfd)
        return None

    def send_signal(self, number: signal.Signals) -> bool:
        """Signal exactly this process; False when it has ended."""
        pidfd = self.open_pidfd()
        if pidfd is None:
            return False
        try:
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        return True


@dataclass(frozen=True, slots=True)
class Completed:
    """What a short program answered."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes


def find_program(name: str) -> str:
    """The path of a program of the host.

    Raises: MissingToolError with the command that installs it.
    """
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        package = PACKAGES.get(name, name)
        raise MissingToolError(
            f"{name} is not installed", remedy=f"Install it: apt-get install {package}", program=name, package=package
        )
    return found


def run(
    argv: Sequence[str],
    *,
    timeout_s: float = 60.0,
    stdin: bytes | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    check: bool = True,
    pass_fds: Sequence[int] = (),
) -> Completed:
    """Run a program to its end and take what it prints.

    Raises: MissingToolError; DeadlineError after `timeout_s` (the program is killed); OperationFailedError when `check`
    and it exits with anything but 0: the message has a line that can be pasted into a shell.
    """
    line = shlex.join(argv)
    program = find_program(argv[0])
    try:
        done = subprocess.run(
            [program, *argv[1:]],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            timeout=timeout_s,
            env=None if env is None else dict(env),
            cwd=cwd,
            check=False,
            pass_fds=tuple(pass_fds),
        )
    except subprocess.TimeoutExpired as error:
        raise DeadlineError(f"{argv[0]} did not end within {timeout_s:g} s: {line}") from error
    if check and done.returncode != 0:
        printed = (done.stderr or done.stdout).decode(errors="replace").strip()[-_OUTPUT_LIMIT_CHARS:]
        raise OperationFailedError(
            f"{argv[0]} failed with exit status {done.returncode}: {printed}", remedy=f"Run it by hand: {line}"
        )
    return Completed(tuple(argv), done.returncode, done.stdout, done.stderr)


def spawn(
    argv: Sequence[str],
    *,
    log_path: str,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    pass_fds: Sequence[int] = (),
) -> Spawned:
    """Start a program that outlives us: own session, no standard input, output appended to a log file.

    Raises: MissingToolError; OSError.
    """
    program = find_program(argv[0])
    log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    try:
        return subprocess.Popen(
            [program, *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
    finally:
        os.close(log_fd)


def attach(argv: Sequence[str], *, pass_fds: Sequence[int] = ()) -> Spawned:
    """Start a program that works for us and that we wait for: own session (^C is ours), standard error is a pipe.

    Raises: MissingToolError; OSError.
    """
    return subprocess.Popen(
        [find_program(argv[0]), *argv[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        pass_fds=tuple(pass_fds),
    )


def wait_or_kill(process: Spawned, patience_s: float) -> int:
    """Wait for a program of ours to end; when the time is over, or we are interrupted, it is killed. Its exit status.

    Negative is the signal that ended it.
    """
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    return process.returncode


def write_identity(path: str, identity: ProcessIdentity) -> None:
    """Keep an identity in a file, whole or not at all."""
    replace_file(path, f"{identity}\n".encode(), durable=False)


def read_identity(path: str) -> ProcessIdentity | None:
    """The identity that a file keeps, or None when there is none."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return ProcessIdentity.parse(file.read(200))
    except FileNotFoundError:
        return None
