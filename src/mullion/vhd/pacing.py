"""How fast a merge in the background may be: a rate in bytes a second that other threads change, or stop, at any time.

`PacedIO` is the seam between the engine and the file system with that rate in it: long copies become small pieces, each
of which waits for its turn, so that a stop is heard within one of them. Pieces go around the page cache of the file
that is written where it can be opened so: dirty pages that pile up until the next sync are what makes the syncs of
others, on the same file system, wait.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Sequence
from typing import Final

from mullion.base.block import Buffer
from mullion.base.errors import InvalidError
from mullion.base.units import KIB, MIB
from mullion.vhd.fileio import FileIO

DEFAULT_RATE: Final = 64 * MIB
"""Bytes a second. A merge of 2 GiB takes half a minute, and a disk that does 500 MiB/s, or half of that when it reads
and writes, keeps three quarters of its time for the guests."""
LEAST_RATE: Final = 64 * KIB
PIECE_BYTES: Final = 256 * KIB
PAGE_BYTES: Final = 4 * KIB

_BURST_S: Final = 0.1
"""What was not used for that long may be used at once."""


class StoppedError(Exception):
    """Whoever watches the work wants it to stop; what was done stays."""


class Budget:
    """When how much may be done, without a clock of its own: times are seconds of any clock that only goes forward."""

    def __init__(self, rate: int) -> None:
        """`rate` in bytes a second; 0 is without a limit."""
        self.rate = rate
        self._next_s = 0.0

    def spend(self, count: int, now_s: float) -> float:
        """Take that many bytes; the seconds to wait before they are used."""
        if not self.rate:
            return 0.0
        begin_s = max(self._next_s, now_s - _BURST_S)
        self._next_s = begin_s + count / self.rate
        return max(0.0, begin_s - now_s)

    def set_rate(self, rate: int, now_s: float) -> None:
        """From now on; what was taken and not paid is paid at the new rate."""
        owed = max(0.0, self._next_s - now_s) * self.rate
        self.rate = rate
        self._next_s = now_s + (owed / rate if rate else 0.0)


class Pace:
    """The rate of one merge. One thread does the work and takes; any other may change the rate, or stop it."""

    def __init__(self, rate: int = DEFAULT_RATE) -> None:
        """`rate` in bytes a second; 0 is without a limit."""
        self._budget = Budget(checked_rate(rate))
        self._changed = threading.Condition()
        self._is_stopped = False
        self.taken_bytes = 0

    @property
    def rate(self) -> int:
        return self._budget.rate

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    def set_rate(self, rate: int) -> None:
        """Raises: InvalidError."""
        with self._changed:
            self._budget.set_rate(checked_rate(rate), time.monotonic())
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def take(self, count: int) -> None:
        """Return when that many bytes may be moved. Raises: StoppedError."""
        with self._changed:
            now_s = time.monotonic()
            ready_s = now_s + self._budget.spend(count, now_s)
            rate = self._budget.rate
            while not self._is_stopped and (left_s := ready_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
                if self._budget.rate != rate:  # what is left of the wait, at the new rate
                    now_s = time.monotonic()
                    scale = rate / self._budget.rate if self._budget.rate else 0.0
                    ready_s, rate = now_s + max(0.0, ready_s - now_s) * scale, self._budget.rate
            if self._is_stopped:
                raise StoppedError
            self.taken_bytes += count


def checked_rate(rate: int) -> int:
    """Raises: InvalidError for a rate at which nothing would ever end."""
    if rate != 0 and not LEAST_RATE <= rate <= 1 << 50:
        raise InvalidError(
            f"a rate of {rate} bytes a second is not possible",
            remedy=f"Give at least {LEAST_RATE}, or 0 for no limit.",
        )
    return rate


class PacedIO(FileIO):
    """Another `FileIO`, at a pace. For one thread, and one file that is written."""

    is_threaded = False

    def __init__(self, inner: FileIO, pace: Pace, direct_fd: int | None = None) -> None:
        """`direct_fd` is the file that is written, opened with O_DIRECT; it stays the caller's."""
        self._inner = inner
        self._pace = pace
        self._direct_fd = direct_fd
        self._buffer = memoryview(mmap.mmap(-1, PIECE_BYTES)) if direct_fd is not None else memoryview(b"")

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        return self._inner.pwritev(fd, buffers, offset)

    def sync_file(self, fd: int) -> None:
        self._inner.sync_file(fd)

    def ftruncate(self, fd: int, length: int) -> None:
        self._inner.ftruncate(fd, length)

    def punch_hole(self, fd: int, offset: int, length: int) -> None:
        """A hole costs the journal of the file system about what a small piece of data costs."""
        self._pace.take(min(length, PAGE_BYTES))
        self._inner.punch_hole(fd, offset, length)

    def copy_range(self, source_fd: int, source_offset: int, fd: int, offset: int, length: int) -> None:
        while length:
            head = -offset % PAGE_BYTES
            count = min(length, head or PIECE_BYTES)
            if self._direct_fd is not None and not head and count > PAGE_BYTES:
                count = count // PAGE_BYTES * PAGE_BYTES
            self._pace.take(count)
            if not (count >= PAGE_BYTES and not head and self._copy_direct(source_fd, source_offset, offset, count)):
                self._inner.copy_range(source_fd, source_offset, fd, offset, count)
            source_offset, offset, length = source_offset + count, offset + count, length - count

    def _copy_direct(self, source_fd: int, source_offset: int, offset: int, length: int) -> bool:
        """Copy a piece of whole pages around the page cache; False when that cannot be done and nothing is lost."""
        if self._direct_fd is None or length % PAGE_BYTES:
            return False
        part = self._buffer[:length]
        if os.preadv(source_fd, [part], source_offset) != length:
            return False
        with contextlib.suppress(OSError):  # larger units are wanted, or something is wrong: the plain way says what
            return self._inner.pwritev(self._direct_fd, [part], offset) == length
        return False
