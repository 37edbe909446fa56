"""Who may use a disk file: OFD locks, and a note of who holds them.

One byte at `LOCK_OFFSET`, far behind any data, is locked with `F_OFD_SETLK` (fcntl(2)): a writer of a chain holds the
write lock on the top file; readers of it, and everyone who has it as a parent, hold the read lock. The lock belongs to
the open file description, so it ends with the last descriptor however the process dies, and a descriptor handed to
another process carries it along.

The byte behind it is about merges while a chain is in use, when the lower layer changes under its readers, who see none
of it because the upper layer hides it. Who reads a file by itself, as a top, holds the read lock of that byte, and a
merge into the file its write lock: `lock_content`, `lock_for_merge`. Readers of the chain hold neither.

An OFD lock does not say who holds it (its pid is -1), so the writer leaves a note in the extended attribute
`user.mullion.holder`. It is display text: never believed, and absent where the file system keeps no attributes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from typing import Final

from mullion.vhd.errors import DiskBusyError

LOCK_OFFSET: Final = 1 << 62
LOCK_BYTES: Final = 1
_MERGE_OFFSET: Final = LOCK_OFFSET + LOCK_BYTES
HOLDER_ATTRIBUTE: Final = "user.mullion.holder"

_FLOCK: Final = struct.Struct("hhqqi4x")
_HOLDER_LIMIT: Final = 200


def lock_file(fd: int, path: str, *, for_writing: bool) -> None:
    """Take the write or the read lock; a lock that this open file already has is converted.

    Raises: DiskBusyError that names the holder, where that can be known.
    """
    kind = fcntl.F_WRLCK if for_writing else fcntl.F_RDLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, LOCK_OFFSET, LOCK_BYTES, 0))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        note = read_holder(fd) if is_locked_for_writing(fd) else None  # a killed writer's note outlives it
        holder = note or _user_of(fd) or "another process"
        use = "written" if for_writing else "opened"
        raise DiskBusyError(
            f"{path} is in use by {holder} and cannot be {use} now", path=path, holder=holder
        ) from error


def lock_content(fd: int, path: str) -> None:
    """Keep merges from changing a file that is read by itself. Raises: DiskBusyError while one does."""
    if not _lock_merge_byte(fd, fcntl.F_RDLCK):
        raise DiskBusyError(
            f"{path} cannot be read by itself now: another layer is being merged into it",
            remedy="Wait until the merge is done, or open the disk through the layer that is merged.",
            path=path,
            holder="a merge",
        )


def lock_for_merge(fd: int, path: str) -> None:
    """Become the only one who merges into a file that readers of a chain have open; it is open for writing.

    Raises: DiskBusyError when somebody else merges into it, or reads it by itself.
    """
    lock_file(fd, path, for_writing=False)
    if not _lock_merge_byte(fd, fcntl.F_WRLCK):
        raise DiskBusyError(
            f"{path} cannot be merged into now: it is read by itself, or another merge into it runs",
            remedy="Wait until the backup, export or merge that reads it has ended, then try again.",
            path=path,
        )


def unlock_merge(fd: int) -> None:
    """Merge no more into a file that stays open: what `lock_for_merge` took, but for the read lock."""
    _lock_merge_byte(fd, fcntl.F_UNLCK)


def is_locked_for_merge(fd: int) -> bool:
    """Is somebody else merging into this file? Asked without taking a lock, so it may change at once."""
    asked = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, _MERGE_OFFSET, LOCK_BYTES, 0))
    return bool(_FLOCK.unpack(asked)[0] != fcntl.F_UNLCK)


def _lock_merge_byte(fd: int, kind: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, _MERGE_OFFSET, LOCK_BYTES, 0))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


def unlock_file(fd: int) -> None:
    """Give the locks back before the descriptor is closed, in case others share the open file."""
    both = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, LOCK_OFFSET, _MERGE_OFFSET + LOCK_BYTES - LOCK_OFFSET, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, both)


def write_holder(fd: int, holder: str) -> None:
    """Leave or take away (with "") the note of who writes. Best effort: it is for display only."""
    with contextlib.suppress(OSError):
        if holder:
            os.setxattr(fd, HOLDER_ATTRIBUTE, holder.encode()[:_HOLDER_LIMIT])
        else:
            os.removexattr(fd, HOLDER_ATTRIBUTE)


def read_holder(fd: int) -> str | None:
    """The note of who writes, made harmless for a terminal."""
    try:
        raw = os.getxattr(fd, HOLDER_ATTRIBUTE)
    except OSError:
        return None
    text = raw[:_HOLDER_LIMIT].decode(errors="replace")
    return "".join(char if char.isprintable() else "?" for char in text) or None


def _user_of(fd: int) -> str | None:
    """A process that has the file open, for display: readers leave no note. Others' processes are seen by root only."""
    wanted, own = os.readlink(f"/proc/self/fd/{fd}"), str(os.getpid())
    for pid in os.listdir("/proc"):
        if not pid.isdecimal() or pid == own:
            continue
        with contextlib.suppress(OSError):  # it may end meanwhile, or be another user's
            for entry in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{entry}") == wanted:
                    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
                        name = "".join(char if char.isprintable() else "?" for char in comm.read().rstrip("\n"))
                    return f"{name} (pid {pid})"
    return None


def is_locked_for_writing(fd: int) -> bool:
    """Has somebody else the file open for writing? Asked without taking a lock, so it may change at once."""
    asked = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, LOCK_OFFSET, LOCK_BYTES, 0))
    return bool(_FLOCK.unpack(asked)[0] != fcntl.F_UNLCK)
