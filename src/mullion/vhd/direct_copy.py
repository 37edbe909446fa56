"""Threads that copy long runs from file to file around the page cache of the one that is written.

Why around it: what is copied is not read again soon, and writing through the cache takes the room, the copy and the
sync one after the other (1 GiB on ext4 over NVMe: half the time). Short runs do better in the cache.

Durability: none; the caller syncs the file, after `drain`.
"""

from __future__ import annotations

import mmap
import os
import threading
from queue import SimpleQueue
from typing import Final

from mullion.base.units import KIB, MIB
from mullion.vhd.fileio import FileIO

LONG_BYTES: Final = 128 * KIB
PAGE_BYTES: Final = 4 * KIB
"""Runs begin in the file that is written, and end, at multiples of this."""

_THREADS: Final = 2
_WAITING: Final = 16
_BUFFER_BYTES: Final = 2 * MIB

_Work = tuple[int, int, int, int]


class DirectCopies:
    """Copies into one file, done some time later by threads. One thread uses it."""

    def __init__(self, fd: int, file_io: FileIO) -> None:
        """Raises: OSError where the file system has no way around the page cache."""
        # A descriptor of its own: the flag belongs to the open file, and others write parts of sectors to theirs.
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        self._plain_fd = fd
        self._io = file_io
        self._failure: BaseException | None = None
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._slots = threading.BoundedSemaphore(_WAITING)
        self._threads = [threading.Thread(target=self._copy_all, name=f"copy-{number}") for number in range(_THREADS)]
        for thread in self._threads:
            thread.start()

    def copy(self, source_fd: int, source_offset: int, offset: int, length: int) -> None:
        """Have a run copied. Raises: what an earlier one raised."""
        self._slots.acquire()
        self._work.put((source_fd, source_offset, offset, length))
        self._check()

    def drain(self) -> None:
        """Return when all runs are copied. Raises: what one of them raised."""
        for _ in range(_WAITING):
            self._slots.acquire()
        self._slots.release(_WAITING)
        self._check()

    def close(self) -> None:
        """Copy nothing more; runs that wait are dropped, so `drain` first when they are wanted."""
        self._failure = self._failure or InterruptedError()
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()
        os.close(self._fd)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _copy_all(self) -> None:
        buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))
        while (work := self._work.get()) is not None:
            try:
                if self._failure is None:
                    self._copy(buffer, *work)
            except BaseException as error:
                self._failure = error
            self._slots.release()

    def _copy(self, buffer: memoryview, source_fd: int, source_offset: int, offset: int, length: int) -> None:
        while length:
            part = buffer[: min(length, len(buffer))]
            count = os.preadv(source_fd, [part], source_offset) // PAGE_BYTES * PAGE_BYTES
            try:
                written = self._io.pwritev(self._fd, [part[:count]], offset) if count else 0
            except OSError:
                written = 0
            if written <= 0 or written % PAGE_BYTES:
                # Larger units are wanted, or something is wrong: the plain way does it, or says what.
                self._io.copy_range(source_fd, source_offset, self._plain_fd, offset, length)
                return
            source_offset, offset, length = source_offset + written, offset + written, length - written
