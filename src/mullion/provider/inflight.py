"""Which requests were taken from a ring and not yet answered, in memory that outlives this process.

Spec: QEMU, "Vhost-user Protocol", "Inflight I/O tracking", split virtqueue region. One region a queue, each rounded up
to 64 bytes; integers little-endian.

| offset | size | type | field |
|---|---|---|---|
| 0 | 8 | u64 | features, 0 |
| 8 | 2 | u16 | version, 1; 0 in a fresh region |
| 10 | 2 | u16 | desc_num, the queue's size |
| 12 | 2 | u16 | last_batch_head |
| 14 | 2 | u16 | used_idx |
| 16 + 16 n | 1 | u8 | inflight: 1 while descriptor head n is being served |
| 16 + 16 n + 6 | 2 | u16 | next (of a batch: ours hold one request) |
| 16 + 16 n + 8 | 8 | u64 | counter: order in which heads were taken |

Invariants: our ring takes requests strictly in order, and all but flushes are finished before the next is taken. Such a
request counts as taken at the instant it is published in the used ring, and what was begun and not published is still
available: it is simply served again (every request of a disk may be repeated). So their heads are never marked;
measured, that would cost 5 % of a read. A flush, which is answered when requests behind it may have been, is taken at
the instant its head is marked, before any of them is published. At every instant, therefore, the next request is that
at `used.idx` + the number of marked heads, and whoever takes the ring over serves the marked ones first, in counter
order, as another back-end's.
`last_batch_head` is a head only while that one is published: it counts as published, marked or not, as soon as
`used_idx` is not the used ring's any more. While others are published, which do not change this word, it names nobody.
A ring that comes to rest leaves no mark, and head 0 in that word, for back-ends that know no nobody.
Durability: whatever instant the process is killed at, no request is lost and none is published twice: each change of
what counts is one store. The memory is lost with the host, and the guest with it.
"""

from __future__ import annotations

import mmap
import os
from typing import Final

from mullion.provider.memory import GuestFault
from mullion.wire.vhost_user import Inflight

_HEADER_BYTES: Final = 16
_ENTRY_BYTES: Final = 16
_ALIGNMENT: Final = 64
_VERSION: Final = 1
_NOBODY: Final = 0xFFFF
_COUNTER_MASK: Final = (1 << 64) - 1
_PAGE_MASK: Final = mmap.ALLOCATIONGRANULARITY - 1


def queue_bytes(queue_size: int) -> int:
    """Bytes of one queue's region."""
    used = _HEADER_BYTES + _ENTRY_BYTES * queue_size
    return (used + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def create_inflight(queues: int, queue_size: int) -> tuple[Inflight, int]:
    """A fresh region in a memory file of its own; the descriptor is the caller's. Raises: OSError."""
    size = queues * queue_bytes(queue_size)
    fd = os.memfd_create("mullion-inflight", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return Inflight(size, 0, queues, queue_size), fd


class InflightQueue:
    """The region of one queue."""

    def __init__(self, view: memoryview, queue_size: int) -> None:
        self.header = view[:_HEADER_BYTES].cast("I")  # [3] is last_batch_head | used_idx << 16
        self.entries = view[_HEADER_BYTES : _HEADER_BYTES + _ENTRY_BYTES * queue_size].cast("Q")
        self._fields = view[:_HEADER_BYTES].cast("H")
        self._size = queue_size
        self._counter = 0

    def recover(self, used_idx: int, vring_size: int) -> list[int]:
        """Bring the region in line with the used ring; the heads to serve again, in the order they were taken.

        Raises: GuestFault when the region is of another version or shape.
        """
        version, desc_num = self._fields[4], self._fields[5]
        if version == 0:
            self._fields[4], self._fields[5] = _VERSION, self._size
            self.header[3] = _NOBODY | used_idx << 16
            return []
        if version != _VERSION or desc_num != self._size:
            raise GuestFault(
                f"inflight region: version {version}, {desc_num} descriptors, it must be 1 and {self._size}"
            )
        last_batch_head, known_used_idx = self._fields[6], self._fields[7]
        if known_used_idx != used_idx and last_batch_head < self._size:
            self._clear(last_batch_head)
        self.header[3] = _NOBODY | used_idx << 16
        pending = [head for head in range(vring_size) if self.entries[2 * head] & 0xFF]
        self._counter = max((self.entries[2 * head + 1] for head in pending), default=0)
        return sorted(pending, key=lambda head: self.entries[2 * head + 1])

    def mark(self, head: int) -> None:
        """The head is taken, and will be answered after others."""
        self._counter = (self._counter + 1) & _COUNTER_MASK
        self.entries[2 * head + 1] = self._counter
        self.entries[2 * head] |= 1

    def unmark(self, head: int) -> None:
        """It is available again, where the next request is looked for."""
        self._clear(head)

    def begin(self, head: int, used_idx: int) -> None:
        """A marked head is about to be published: should we die, the used ring tells whether it was."""
        self.header[3] = head | used_idx << 16

    def finish(self, head: int, used_idx: int) -> None:
        """It is in the used ring."""
        self._clear(head)
        self.header[3] = _NOBODY | used_idx << 16

    def rest(self, used_idx: int) -> None:
        """No head is marked, and nothing is taken any more."""
        self.header[3] = used_idx << 16

    def _clear(self, head: int) -> None:
        self.entries[2 * head] &= ~0xFF


class InflightRegion:
    """The whole region as the front-end handed it over."""

    def __init__(self, inflight: Inflight, fd: int) -> None:
        """Map it. The descriptor stays the caller's. Raises: GuestFault."""
        each = queue_bytes(inflight.queue_size)
        if not inflight.queues or not inflight.queue_size or inflight.mmap_size < each * inflight.queues:
            raise GuestFault(
                f"inflight region: {inflight.mmap_size} bytes for {inflight.queues} queues of {inflight.queue_size}"
            )
        slack = inflight.mmap_offset & _PAGE_MASK
        try:
            if os.fstat(fd).st_size < inflight.mmap_offset + inflight.mmap_size:
                raise GuestFault("inflight region is larger than its file")
            mapped = mmap.mmap(fd, slack + inflight.mmap_size, offset=inflight.mmap_offset - slack)
        except (ValueError, OverflowError, OSError) as error:
            raise GuestFault(f"inflight region cannot be mapped: {error}") from error
        self._view = memoryview(mapped)[slack:]
        self._inflight = inflight

    def queue(self, index: int, vring_size: int) -> InflightQueue:
        """The part of one queue. Raises: GuestFault when the region is too small for it."""
        size = self._inflight.queue_size
        if index >= self._inflight.queues or vring_size > size:
            raise GuestFault(f"inflight region has no room for vring {index} of {vring_size} descriptors")
        each = queue_bytes(size)
        return InflightQueue(self._view[index * each : (index + 1) * each], size)
