"""What a provider does with the rights it starts with, before it gives them up: open files, bind sockets, change user.

Order, each step before the next: open every file of every chain by its given path → bind the sockets → drop to the
partition's user → parse. Here, nothing that a guest wrote is looked at with more rights than the partition's own user
has. The service itself does read the same structures under its own user, root's where it is root (`inspect_chain`: to
show a disk, and to find a chain's files before each start): docs/threat-model.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Mapping
from typing import Final

from mullion.base.errors import DeniedError, InvalidError, MullionError, NotFoundError
from mullion.provider.control_client import encode
from mullion.provider.spec import DiskSpec
from mullion.vhd.locking import lock_file
from mullion.vhd.pending import log_path

PROCESS_NAME: Final = "mullion-prov"


def open_chain_files(disk: DiskSpec, pending_dir: str | None = None) -> list[int]:
    """Descriptors of a disk's files, top first: the top for writing unless the disk is read-only.

    A file below it is opened for writing when a pending log of it is there: its writer was killed. So is the last one
    of a disk with a backing, where blocks come home.
    Raises: NotFoundError, DeniedError, InvalidError; whatever was opened is closed again then.
    """
    fds: list[int] = []
    try:
        for number, path in enumerate(disk.chain):
            fds.append(_open_file(path, writable=number == 0 and not disk.read_only))
            is_filled = disk.backing is not None and path == disk.chain[-1]
            if number and not disk.read_only and (is_filled or has_log(pending_dir, disk.id, fds[-1])):
                read_only_fd = fds.pop()
                os.close(read_only_fd)
                fds.append(_open_file(path, writable=True))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def has_log(pending_dir: str | None, disk_id: str, fd: int) -> bool:
    """Is there a pending log of that file, from a writer that was killed?"""
    return pending_dir is not None and os.path.exists(log_path(pending_dir, disk_id, fd))


def give_file(fd: int, path: str, uid: int | None, gid: int | None) -> None:
    """Make the partition's user the owner of the file that it writes, once it is locked against everybody else.

    The chain keeps its session and its holder in `user.` attributes, which take the rights of the caller (xattr(7)),
    not of the descriptor. Raises: DiskBusyError; OSError.
    """
    lock_file(fd, path, for_writing=True)
    if uid is not None or gid is not None:
        os.fchown(fd, -1 if uid is None else uid, -1 if gid is None else gid)


def _open_file(path: str, *, writable: bool) -> int:
    """A regular file, and no symbolic link in its last component; nothing else is even opened (O_PATH)."""
    probe = -1
    try:
        probe = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(probe).st_mode):
            raise InvalidError(
                f"{path} is not a regular file", remedy="Give the path of a VHD file, not of a link.", path=path
            )
        access = os.O_RDWR if writable else os.O_RDONLY
        return os.open(f"/proc/self/fd/{probe}", access | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _file_error(error, path) from error
    finally:
        if probe >= 0:
            os.close(probe)


def _file_error(error: OSError, path: str) -> MullionError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFoundError(
            f"there is no disk file {path}", remedy="Put the file back, or detach the disk.", path=path
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DeniedError(f"{path} may not be opened: {error.strerror}", path=path)
    return InvalidError(
        f"{path} cannot be opened: {error.strerror}", remedy="Look after the file system that it is on.", path=path
    )


def drop_privileges(uid: int | None, gid: int | None) -> None:
    """Become the partition's user for good. Raises: DeniedError."""
    try:
        if gid is not None or uid is not None:
            os.setgroups([])
        if gid is not None:
            os.setresgid(gid, gid, gid)
        if uid is not None:
            os.setresuid(uid, uid, uid)
    except PermissionError as error:
        raise DeniedError(f"cannot become user {uid}, group {gid}: {error.strerror}") from error


def report(fd: int, message: Mapping[str, object]) -> None:
    """Tell whoever waits for the start, and close the descriptor. Nobody may wait any more: no reason to end."""
    with contextlib.suppress(BrokenPipeError), os.fdopen(fd, "wb") as file:
        file.write(encode(message))


def set_process_name(name: str) -> None:
    """What `ps -o comm` shows."""
    fd = os.open("/proc/self/comm", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, name.encode())
    finally:
        os.close(fd)
