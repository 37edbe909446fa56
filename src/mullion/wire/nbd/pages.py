"""Data of a READ from the page cache to a client's socket without a copy: the socket's buffer refers to the pages.

    header ──write──┐
    file ──splice──► pipe ──splice──► socket        (Linux 6.5 and later send pages on unix sockets by reference)

Why that is safe:
- A page that a socket refers to is not used for anything else before the client has taken it, whatever becomes of its
  file: cutting a file, punching a hole or removing it takes pages out of the cache and leaves their content alone.
- What is written to the same place of the file before the client takes the data, it may see. Such a write is under way
  at the same time as the READ, whose reply has not arrived: either content is right, and parts of both, as ever when
  requests overlap. A write that was finished before the READ was asked for is always seen.
- So it is for disks that run; and what may not change at all is not written by anyone (frozen layers).
- What is in the pipe is known to be all of it before the header leaves: errors are answered as errors.
"""

from __future__ import annotations

import fcntl
import os
from typing import Final, Protocol, runtime_checkable

from mullion.base.errors import MullionError
from mullion.base.units import KIB

PAGED_BYTES: Final = 32 * KIB
"""From here on it costs less than copying, for both ends together (half, at 256 KiB)."""
_PIPE_BYTES: Final = 512 * KIB
"""One page of it is for the header, and one more for data that do not begin with a page of the file."""


@runtime_checkable
class PagedDevice(Protocol):
    """A device some of whose data lie in files."""

    def pread_to_pipe(self, offset: int, length: int, pipe_fd: int) -> bool:
        """Append the range to a pipe, without waiting; False when that cannot be, and the pipe may hold part of it."""
        ...


class PagePipe:
    """Of one connection, used by its thread. It takes no descriptors before it is needed."""

    def __init__(self, socket_fd: int) -> None:
        """A socket that blocks, and stays open for longer than this."""
        self._socket_fd = socket_fd
        self._read_fd = self._write_fd = -1
        self._is_of_use = True

    def send(self, header: bytes, device: PagedDevice, offset: int, length: int) -> bool:
        """Send a header and a range of the device; False when nothing was sent, and `pread` has to do it.

        Raises: OSError when the connection broke.
        """
        if not self._is_of_use:
            return False
        try:
            if self._read_fd < 0:
                self._open()
            os.write(self._write_fd, header)
            is_filled = device.pread_to_pipe(offset, length, self._write_fd)
        except (OSError, MullionError):
            # A file system that cannot do it, no more pipes for this user; or a broken disk: `pread` will tell.
            is_filled = self._is_of_use = False
        if not is_filled:
            self.close()  # with what is in it
            return False
        left = len(header) + length
        while left:
            left -= os.splice(self._read_fd, self._socket_fd, left)
        return True

    def _open(self) -> None:
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(self._read_fd, True)
        fcntl.fcntl(self._write_fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def close(self) -> None:
        """May be called again; `send` opens it anew."""
        for fd in (self._read_fd, self._write_fd):
            if fd >= 0:
                os.close(fd)
        self._read_fd = self._write_fd = -1
