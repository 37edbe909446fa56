"""The service's lock: one parent per run folder, and a file that says who it is.

An OFD lock (fcntl(2), F_OFD_SETLK) on `service.pid` lasts as long as the descriptor, so that no crash leaves it behind;
the file's content (process identity) is only for people and for `mullion stop`. A file of a host that crashed is taken
over, since nobody holds its lock.

Invariants: the file is never removed while locked by us, and never replaced: all contenders lock the same inode.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from types import TracebackType
from typing import Final, Self

from mullion.base.errors import ConflictError
from mullion.base.process import ProcessIdentity, read_identity

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock of x86-64 Linux: l_type, l_whence, l_start, l_len, l_pid
_NAMING_S: Final = 0.5


class ServiceLock:
    """Held by the running service. `acquire`, then `release`, or as a context manager."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock and write who we are.

        Raises: ConflictError naming the pid of the service that runs; OSError.
        """
        os.makedirs(os.path.dirname(self.path), mode=0o755, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            if not _try_lock(fd):
                raise self._conflict()
            identity = ProcessIdentity.of(os.getpid())
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{identity}\n".encode(), 0)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def release(self) -> None:
        """Give the lock back; may be called again."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.ftruncate(fd, 0)
            os.close(fd)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _conflict(self) -> ConflictError:
        # Whoever has just taken the lock writes its name in the next instant.
        deadline_s = time.monotonic() + _NAMING_S
        while (identity := running_service(self.path)) is None and time.monotonic() < deadline_s:
            time.sleep(0.005)
        who = f"process {identity.pid}" if identity is not None else "another process"
        return ConflictError(
            f"the service runs already: {who} holds {self.path}",
            remedy="Use it, or end it with `mullion stop`, or choose another MULLION_HOME for a second one.",
            path=self.path,
            pid=identity.pid if identity is not None else None,
        )


def running_service(path: str) -> ProcessIdentity | None:
    """Who holds the service's lock, or None when no service runs."""
    # After a crash the file still names a process that has ended, and a fresh one of that pid is no service of ours.
    identity = read_identity(path)
    return identity if identity is not None and identity.is_alive else None


def _try_lock(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except BlockingIOError:
        return False
    return True
