"""Where the threads that serve a disk pass before every request, and where all of them can be held at one instant.

Each thread has a seat, a lock that it holds while it serves a request. Whoever holds the disk takes all seats: what is
being served is finished first, and nothing is begun. `is_held` is looked at without a lock, so that a thread with
much to do notices soon and gives way.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator, Sequence

from mullion.base.block import BlockDevice, Buffer, Extent, WritableBuffer
from mullion.base.errors import DeadlineError
from mullion.wire.nbd.pages import PagedDevice


class Turnstile:
    """One disk's. Used by any thread."""

    def __init__(self, disk_id: str) -> None:
        self.is_held = False
        self._disk_id = disk_id
        self._registry = threading.Lock()
        self._seats: weakref.WeakSet[threading.Lock] = weakref.WeakSet()
        self._taken: list[threading.Lock] = []
        self._opened = threading.Event()
        self._opened.set()

    def seat(self) -> threading.Lock:
        """A lock for one thread, to be held while it serves a request. A disk that is held gives none yet."""
        seat = threading.Lock()
        while True:
            with self._registry:
                if not self.is_held:
                    self._seats.add(seat)
                    return seat
            self._opened.wait()

    def give_way(self) -> None:
        """Wait while the disk is held; to be called without the seat."""
        self._opened.wait()

    def hold(self, deadline_s: float) -> None:
        """Let what is being served be finished, and nothing be begun. `deadline_s` is a time of `time.monotonic`.

        Raises: DeadlineError when a request does not end, and then nothing is held.
        """
        with self._registry:
            self._opened.clear()
            self.is_held = True
            seats = list(self._seats)
        for seat in seats:
            if not seat.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
                self.release()
                raise DeadlineError(
                    f"disk {self._disk_id}: a request does not end",
                    remedy="The storage below the disk hangs: look into the host's kernel log.",
                    disk=self._disk_id,
                )
            self._taken.append(seat)

    def release(self) -> None:
        """Let all go on."""
        with self._registry:
            self.is_held = False
            taken, self._taken = self._taken, []
        for seat in taken:
            seat.release()
        self._opened.set()


@contextlib.contextmanager
def holding(turnstiles: Sequence[Turnstile], timeout_s: float) -> Iterator[None]:
    """Hold several disks at one instant. Raises: DeadlineError, and then none is held."""
    deadline_s = time.monotonic() + timeout_s
    with contextlib.ExitStack() as held:
        for turnstile in turnstiles:
            turnstile.hold(deadline_s)
            held.callback(turnstile.release)
        yield


class HeldDevice:
    """A disk whose every request passes the turnstile; for exports whose threads call it directly."""

    def __init__(self, device: BlockDevice, turnstile: Turnstile) -> None:
        self._device = device
        self._paged = device if isinstance(device, PagedDevice) else None
        self._turnstile = turnstile
        self._local = threading.local()

    def _seat(self) -> threading.Lock:
        try:
            seat: threading.Lock = self._local.seat
        except AttributeError:
            seat = self._local.seat = self._turnstile.seat()
        if self._turnstile.is_held:
            self._turnstile.give_way()
        return seat

    @property
    def size_bytes(self) -> int:
        return self._device.size_bytes

    @property
    def read_only(self) -> bool:
        return self._device.read_only

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        with self._seat():
            self._device.pread(offset, buffer)

    def pread_to_pipe(self, offset: int, length: int, pipe_fd: int) -> bool:
        """As of `wire.nbd.pages.PagedDevice`, where the device can do it."""
        if self._paged is None:
            return False
        with self._seat():
            return self._paged.pread_to_pipe(offset, length, pipe_fd)

    def pwrite(self, offset: int, buffer: Buffer) -> None:
        with self._seat():
            self._device.pwrite(offset, buffer)

    def flush(self) -> None:
        """Not held: it may run while files are exchanged, and whoever holds the disk does not wait for it."""
        self._device.flush()

    def discard(self, offset: int, length: int) -> None:
        with self._seat():
            self._device.discard(offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        with self._seat():
            self._device.write_zeroes(offset, length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Each step is a request of its own: who asks may be slow."""
        steps = self._device.extents(offset, length)
        while True:
            with self._seat():
                found = next(steps, None)
            if found is None:
                return
            yield found

    def close(self) -> None:
        """The device is its owner's to close."""
