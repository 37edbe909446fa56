"""A disk as a folder: `disk.raw`, its content, and `partition1.raw` and so on, through FUSE.

A mount is served by a process of its own (`mount_process`), which opens the disk, says over a pipe that the mount is
there or why it is not, and ends after the disk is unmounted, flushed and closed. Whoever unmounts learns which process
that is from the mount itself, by an extended attribute of its folder: no file has to be kept, or cleaned up, for it.

Invariants: nothing is mounted over files; a disk that is busy, or not there, is not mounted at all; after `unmount` has
returned the disk is free.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Final, Self

from mullion.base.block import BlockDevice
from mullion.base.errors import (
    ConflictError,
    DeadlineError,
    DeniedError,
    InvalidError,
    MullionError,
    NotFoundError,
    UnavailableError,
)
from mullion.base.process import ProcessIdentity, Spawned, find_program, run, spawn
from mullion.vhd.geometry import SizeFrom
from mullion.vhd.partitions import read_partitions

WHOLE_DISK: Final = "disk.raw"
PROCESS_ATTRIBUTE: Final = "user.mullion.process"
"""Of the mounted folder: the identity of the process behind it."""
_READY_DEADLINE_S: Final = 60.0
_END_DEADLINE_S: Final = 120.0
_ANSWER_LIMIT_BYTES: Final = 65536
_EXCERPT_BYTES: Final = 1500


@dataclass(frozen=True, slots=True)
class MountSpec:
    """What is mounted where."""

    path: str
    mountpoint: str
    """An absolute path."""
    writable: bool = False
    allow_other: bool = False
    allowed_dirs: tuple[str, ...] | None = None
    size_from: str = SizeFrom.FOOTER.value

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = json.loads(text)
        allowed = fields["allowed_dirs"]
        return cls(**{**fields, "allowed_dirs": None if allowed is None else tuple(allowed)})


@dataclass(frozen=True, slots=True)
class View:
    """A file of the mounted folder: a range of the disk, in bytes."""

    name: str
    offset: int
    length: int


def plan_views(device: BlockDevice) -> tuple[list[View], list[str]]:
    """The files for a disk, and what is wrong with its partition table."""
    views = [View(WHOLE_DISK, 0, device.size_bytes)]
    table = read_partitions(device)
    if table is None:
        return views, []
    views += [View(f"partition{part.number}.raw", part.offset, part.length) for part in table.partitions]
    return views, list(table.problems)


def resolve_mountpoint(path: str) -> str:
    """The folder that a path means, with all links resolved.

    Raises: InvalidError for a link that leads nowhere: a folder would be made where nobody asked for one.
    """
    if os.path.islink(path) and not os.path.exists(path):
        raise InvalidError(
            f"{path} is a link to {os.readlink(path)}, which is not there",
            remedy="Make that folder, or choose another mount point.",
            path=path,
        )
    return os.path.realpath(path)


def prepare_mountpoint(mountpoint: str) -> bool:
    """See that something can be mounted there; make the folder when it is missing, and say whether that was done.

    Raises: ConflictError when something is mounted there or the folder has files; NotFoundError, DeniedError,
    InvalidError.
    """
    try:
        os.mkdir(mountpoint, 0o755)
    except FileExistsError:
        pass
    except FileNotFoundError as error:
        raise NotFoundError(
            f"there is no folder {os.path.dirname(mountpoint)}", remedy="Make it first.", path=mountpoint
        ) from error
    except OSError as error:
        raise DeniedError(
            f"the folder {mountpoint} cannot be made: {error.strerror}",
            remedy="Choose a folder that you may write to.",
            path=mountpoint,
        ) from error
    else:
        return True
    try:
        is_empty = not os.listdir(mountpoint)  # asks a mount too: one whose process is gone does not answer
        if os.path.ismount(mountpoint):
            raise ConflictError(
                f"something is mounted on {mountpoint} already",
                remedy=f"Choose another folder, or end it: mullion vhd unmount {shlex.quote(mountpoint)}",
                path=mountpoint,
            )
    except NotADirectoryError as error:
        raise InvalidError(f"{mountpoint} is not a folder", remedy="Choose a folder.", path=mountpoint) from error
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise _dead_mount(mountpoint) from error
        raise DeniedError(f"{mountpoint} cannot be read: {error.strerror}", path=mountpoint) from error
    if not is_empty:
        raise ConflictError(
            f"{mountpoint} is not empty, and a mount would hide its files",
            remedy="Choose an empty folder, or a path where there is none yet: it is made.",
            path=mountpoint,
        )
    return False


def _dead_mount(mountpoint: str) -> ConflictError:
    return ConflictError(
        f"{mountpoint} is what is left of a mount whose process was killed",
        remedy=f"Clear it away: mullion vhd unmount {shlex.quote(mountpoint)}",
        path=mountpoint,
    )


def start_mount(spec: MountSpec, *, log_path: str) -> None:
    """Mount a disk in the background: return when the mount works.

    Raises: what opening the disk raises; UnavailableError when the process ends at once, with the end of its log;
    DeadlineError when it does not answer.
    """
    was_made = prepare_mountpoint(spec.mountpoint)
    try:
        os.makedirs(os.path.dirname(log_path), mode=0o711, exist_ok=True)
        log_begins = os.path.getsize(log_path) if os.path.exists(log_path) else 0
        reading, writing = os.pipe()
        with open(reading, "rb") as answer:
            argv = [sys.executable, "-P", "-m", "mullion.media.mount_process", str(writing), log_path, spec.to_json()]
            try:
                process = spawn(argv, log_path=log_path, pass_fds=[writing])
            finally:
                os.close(writing)
            _await_ready(process, answer.fileno(), spec, log_path, log_begins)
        os.statvfs(spec.mountpoint)  # asks the mount itself
    except BaseException:
        if was_made:
            with contextlib.suppress(OSError):
                os.rmdir(spec.mountpoint)
        raise


def _await_ready(process: Spawned, answer_fd: int, spec: MountSpec, log_path: str, log_begins: int) -> None:
    """Read the process's answer: nothing but a line feed when the mount is there, else an error as JSON."""
    answer = b""
    poller = select.poll()
    poller.register(answer_fd, select.POLLIN)
    while b"\n" not in answer and len(answer) < _ANSWER_LIMIT_BYTES:
        if not poller.poll(_READY_DEADLINE_S * 1000):
            process.kill()
            process.wait()
            raise DeadlineError(
                f"{spec.path} was not mounted within {_READY_DEADLINE_S:g} s",
                remedy=f"The storage may hang. Look into {log_path}.",
                path=spec.path,
            )
        piece = os.read(answer_fd, 4096)
        if not piece:
            break
        answer += piece
    if answer == b"\n":
        return
    process.wait()
    if answer.endswith(b"\n"):
        raise MullionError.from_wire(json.loads(answer))
    raise UnavailableError(
        f"{spec.path} could not be mounted on {spec.mountpoint}: {_log_excerpt(log_path, log_begins)}",
        remedy=fuse_remedy(),
        path=spec.path,
    )


def _log_excerpt(log_path: str, begins: int) -> str:
    with open(log_path, "rb") as log:
        log.seek(begins)
        text = log.read()[-_EXCERPT_BYTES:].decode(errors="replace")
    return "; ".join(line.strip() for line in text.splitlines() if line.strip()) or "its process ended without a word"


def fuse_remedy() -> str:
    """What to do when libfuse cannot mount."""
    if not os.path.exists("/dev/fuse"):
        return "This host has no /dev/fuse: load the kernel module (modprobe fuse), or use `mullion vhd serve`."
    return "See that fusermount3 is installed (apt-get install fuse3) and that you may write to the folder."


def unmount(mountpoint: str) -> None:
    """Flush and unmount a disk, and wait until its process has closed it. What a killed process left is cleared away.

    Raises: NotFoundError when nothing of ours is mounted there; ConflictError when files of it are open;
    OSError when the disk cannot take what was written; DeadlineError.
    """
    identity = _process_behind(mountpoint)
    if identity is not None:
        _flush(mountpoint)
    pidfd = identity.open_pidfd() if identity is not None else None
    try:
        done = run([*_unmount_command(), mountpoint], env={**os.environ, "LC_ALL": "C"}, check=False)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            if "busy" in said:
                raise ConflictError(
                    f"{mountpoint} is in use: a program has a file of it open, or works in that folder",
                    remedy=f"End that program (fuser -vm {mountpoint} names it), then unmount again.",
                    path=mountpoint,
                )
            raise DeniedError(
                f"{mountpoint} could not be unmounted: {said}",
                remedy="Unmount it as the user who mounted it, or as root.",
                path=mountpoint,
            )
        if pidfd is not None:
            _await_end(pidfd, mountpoint)
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _process_behind(mountpoint: str) -> ProcessIdentity | None:
    """Who serves the mount; None when nobody does any more."""
    try:
        text = os.getxattr(mountpoint, PROCESS_ATTRIBUTE).decode(errors="replace")
    except OSError as error:
        if error.errno == errno.ENOTCONN and _is_ours(mountpoint):
            return None
        raise NotFoundError(
            f"no disk is mounted on {mountpoint}",
            remedy="Mounted disks are listed by: findmnt -t fuse.mullion",
            path=mountpoint,
        ) from error
    return ProcessIdentity.parse(text)


def _is_ours(mountpoint: str) -> bool:
    """Is it a mount of ours, by the kernel's own table? For mounts that do not answer."""
    return any(at == os.fsencode(mountpoint) for at in _mounts_of_ours())


def _mounts_of_ours() -> Iterator[bytes]:
    # Source: proc(5), mountinfo: field 5 is the mount point with octal escapes, after " - " come type and source.
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            before, _, after = line.partition(b" - ")
            if after.startswith(b"fuse.mullion "):
                yield before.split()[4].decode("unicode_escape").encode("latin-1")


def _flush(mountpoint: str) -> None:
    """Have the disk's cache written, so that what cannot be is said here, while the mount is still there."""
    try:
        fd = os.open(f"{mountpoint}/{WHOLE_DISK}", os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        return  # somebody else's mount: unmounting says so
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unmount_command() -> Sequence[str]:
    if os.geteuid() == 0:
        return ("umount", "--")
    find_program("fusermount3")
    return ("fusermount3", "-u", "--")


def _await_end(pidfd: int, mountpoint: str) -> None:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    if not poller.poll(_END_DEADLINE_S * 1000):
        raise DeadlineError(
            f"{mountpoint} is unmounted, but its process has not closed the disk within {_END_DEADLINE_S:g} s",
            remedy="The storage may hang: look into the kernel's log, and wait before you use the disk.",
            path=mountpoint,
        )
