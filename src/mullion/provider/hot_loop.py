"""The hot loop of a ring: plain reads and writes of one segment within one granule, as cheaply as Python can.

Spec: VIRTIO 1.2, section 2.7 (split virtqueues) and 5.2.6 (requests of the block device). The table of the parts is in
`wire.vhost_user.virtio_blk`.

How it is made fast: rings and guest memory are `memoryview.cast` views (an index is one aligned load or store), a
descriptor is two 64-bit words, a driver's usual table of three descriptors is one `unpack`, data goes between file and
guest memory by `preadv`/`pwritev` without a copy, and there is no object per request. What is anything else, or goes
wrong, is left to `serve`, which takes all that the specification allows.

Invariants: requests are taken strictly in order, and what is known of one is in the used ring before the next is taken.
Everything read from the guest is checked before use: addresses and lengths against its memory, a head by `serve`.
Ordering: stores of one thread become visible in order on x86; before sleeping, the request for a notification has to be
visible before the ring is read again. Taking a free lock is an atomic read-modify-write and so, on x86, a full barrier;
it costs a tenth of a system call.
"""

from __future__ import annotations

import os
import select
import struct
import threading
from collections.abc import Callable
from struct import error as StructError  # noqa: N812
from typing import Final, Protocol

from mullion.base.errors import MullionError
from mullion.provider.device import DirectDevice
from mullion.vhd.fileio import DATA_PIECE_BYTES
from mullion.wire.vhost_user.virtio_blk import DescriptorFlag

ANNOUNCE_BYTES: Final = 512 * 1024
"""After so much data the driver hears of it at once, so that it can prepare more while the rest is served."""
ANNOUNCE_REQUESTS: Final = 16
"""Likewise after so many requests: a driver that is woken only at the end of a batch finds the ring empty, and then so
do we; both sleep and are woken for every batch (`bench/provider_bench.py`)."""
BUDGET_REQUESTS: Final = 512
"""After so many requests of one ring the other rings and the control of the connection get a turn."""
EVENTS: Final = 32
"""Taken from epoll at a time."""
UNANSWERED: Final = -1
"""What `serve` returns for a request that it has begun, and that is answered later: nothing is published for it now."""

_NO_NOTIFY: Final = 1  # in the flags of either ring (2.7.6, 2.7.8)
_SECTOR_SHIFT: Final = 9
# A descriptor's flags, and flags | next << 16 as they stand in a driver's usual table of three.
_NEXT: Final = int(DescriptorFlag.NEXT)
_WRITE: Final = int(DescriptorFlag.WRITE)
_INDIRECT: Final = int(DescriptorFlag.INDIRECT)
_NEXT_1: Final = _NEXT | 1 << 16
_NEXT_2: Final = _NEXT | 2 << 16
_NEXT_2_WRITE: Final = _NEXT | _WRITE | 2 << 16
_NOWHERE: Final[dict[int, tuple[int, int]]] = {}

_DESCRIPTOR: Final = struct.Struct("<QII").unpack_from  # address, length, flags | next << 16
_THREE_DESCRIPTORS: Final = struct.Struct("<QIIQIIQII").unpack_from
_TWO_WORDS: Final = struct.Struct("<QQ").unpack_from


class Holder(Protocol):
    """Whoever may want the disk for himself (`Turnstile`)."""

    @property
    def is_held(self) -> bool: ...


class Served(Protocol):
    """What has the disk."""

    @property
    def device(self) -> DirectDevice:
        """The disk as it is now."""
        ...


class Limited(Protocol):
    """What knows of caps."""

    @property
    def is_limited(self) -> bool:
        """Whether requests have to be asked for their cost."""
        ...


class Owner(Protocol):
    """The ring whose loop it is, for the time that the loop waits for kicks by itself."""

    @property
    def blk(self) -> Served: ...

    @property
    def lane(self) -> Limited: ...

    def serve(self, head: int) -> int:
        """As `run` needs it."""
        ...

    def keep(self) -> None:
        """Sweeps are over: the loop's attributes say how far it came."""
        ...


class Call:
    """Notifies a driver, by an eventfd of whoever has it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __call__(self) -> None:
        """Raises: OSError."""
        try:
            os.eventfd_write(self._fd, 1)
        except BlockingIOError:
            return  # a full counter is a notification that was not taken yet


class HotLoop:
    """The loop over one ring. After each run, also one that raised, the attributes say how far it came."""

    def __init__(
        self,
        *,
        size: int,
        descriptors: memoryview,
        available: memoryview,
        used: memoryview,
        base: int,
        memory: memoryview,
        event_idx: bool,
        barrier: threading.Lock,
    ) -> None:
        """The parts of a ring of `size` descriptors, as bytes, and the region of memory with most of the guest's data.

        `base` is that region's guest address. What lies elsewhere is the business of `serve`. `event_idx` says how the
        two sides ask each other for notifications; `barrier` is a lock that nobody else takes.
        """
        self.available_index = 0
        """Of the next request to take, mod 2¹⁶."""
        self.used_index = 0
        """Of the next answer, mod 2¹⁶: it stands in the used ring."""
        self.answered = 0
        """Requests since the beginning. Any thread may read it, and the next."""
        self.moved_bytes = 0
        """Their data, without what `serve` moved."""
        self._size = size
        self._descriptors = descriptors
        self._available = available.cast("H")
        self._used = used[:4].cast("H")
        self._used_words = used[: 4 + 8 * size].cast("I")  # [1 + 2 n] head, [2 + 2 n] length of element n
        self._available_event = used[4 + 8 * size :].cast("H")
        self._base = base
        self._memory = memory
        self._event_idx = event_idx
        self._barrier = barrier
        self._signalled = self._used[1]  # the used index at which the driver was last thought of

    def pending(self, available_index: int) -> int:
        """How many requests the driver says to have made available; more than the ring has is a lie."""
        return (self._available[1] - available_index) & 0xFFFF

    def arm(self, available_index: int) -> bool:
        """Ask to be notified of the next request (2.7.7.1, 2.7.10); False when it is there already."""
        if self._event_idx:
            self._available_event[0] = available_index
        else:
            self._used[0] = 0
        with self._barrier:
            pass
        return self._available[1] == available_index

    def announce(self, used_index: int, notify: Callable[[], None]) -> None:
        """Notify the driver of what was answered since the last time, if it asked (2.7.7.2, 2.7.10)."""
        old = self._signalled
        if used_index == old:
            return
        self._signalled = used_index
        with self._barrier:  # used.idx must be visible before the driver's wish is read
            pass
        if self._event_idx:
            event = self._available[2 + self._size]
            wanted = (used_index - event - 1) & 0xFFFF < (used_index - old) & 0xFFFF
        else:
            wanted = not self._available[0] & _NO_NOTIFY
        if wanted:
            notify()

    def sweep(  # noqa: PLR0917 - for each kick
        self,
        device: DirectDevice,
        serve: Callable[[int], int],
        notify: Callable[[], None],
        holder: Holder,
        available_index: int,
        used_index: int,
        budget: int,
    ) -> bool:
        """Take batch after batch, and announce each, until there is nothing left and the driver was asked to notify.

        False when it ends before: `budget` requests were taken, one of them is answered later, the disk is wanted, or
        the driver lies about how many there are. The last announcement comes when all else is done: whoever it wakes
        may need this processor. Raises: what `serve` raises; what was answered before it is announced.
        """
        self.available_index, self.used_index = available_index, used_index
        unanswered = (available_index - used_index) & 0xFFFF
        try:
            while True:
                first = self.available_index
                count = self.pending(first)
                if not count:
                    if self.arm(first):
                        return True
                    self.announce(self.used_index, notify)
                    continue
                if count > self._size or budget <= 0 or holder.is_held:
                    return False
                if (first - self.used_index) & 0xFFFF != unanswered:
                    return False
                count = min(count, self._size - (first & (self._size - 1)), ANNOUNCE_REQUESTS)
                self.run(device, serve, first, self.used_index, count)
                budget -= (self.available_index - first) & 0xFFFF
                if self.pending(self.available_index):
                    self.announce(self.used_index, notify)
        finally:
            self.announce(self.used_index, notify)

    def attend(  # noqa: PLR0917 - as sweep
        self,
        owner: Owner,
        notify: Callable[[], None],
        holder: Holder,
        seat: threading.Lock,
        epoll: select.epoll,
        kick: int,
    ) -> list[tuple[int, int]]:
        """Wait for events, and while each is the ring's kick and nothing else, sweep the ring with the seat held.

        Goes on from where the attributes stand. Returns the first events that are anything else, or a kick after which
        a sweep did not come to its end. Raises: what `serve` raises; the ring is kept as far as it came.
        """
        try:
            while True:
                events = epoll.poll(-1, EVENTS)
                if len(events) != 1 or events[0][0] != kick or holder.is_held or owner.lane.is_limited:
                    return events
                with seat:
                    is_idle = self.sweep(
                        *(owner.blk.device, owner.serve, notify, holder),
                        *(self.available_index, self.used_index, BUDGET_REQUESTS),
                    )
                if not is_idle:
                    return events
        finally:
            owner.keep()

    def run(
        self, device: DirectDevice, serve: Callable[[int], int], available_index: int, used_index: int, count: int
    ) -> None:
        """Take up to `count` requests, which are available and do not wrap around the end of the available ring.

        The two indices are the ring's, and need not be the same: requests may have been taken and not answered yet.
        `serve` is called with the head of what the loop leaves over; it returns the bytes that it wrote into the
        guest's memory, or `UNANSWERED`. Whatever it raises ends the run, its request not taken. Raises: the same.
        """
        if not self._event_idx:
            self._used[0] = _NO_NOTIFY
        base, memory = self._base, self._memory
        read_get, write_get, shift = device.direct_read.get, device.direct_write.get, device.block_shift
        mixed_get, mixed_used, mixed_write_fd = device.mixed_read.get, device.mixed_used.add, device.mixed_write_fd
        if device.read_only:
            write_get, mixed_write_fd = _NOWHERE.get, -1
        granule_bytes = 1 << shift
        sector_shift = shift - _SECTOR_SHIFT
        sector_mask = (1 << sector_shift) - 1
        whole_granules = device.size_bytes >> shift
        descriptors, used, used_words = self._descriptors, self._used, self._used_words
        preadv, pwritev = os.preadv, os.pwritev
        descriptor, three_descriptors, two_words = _DESCRIPTOR, _THREE_DESCRIPTORS, _TWO_WORDS
        slot_mask = self._size - 1
        slot = available_index & slot_mask
        self.used_index = used_index
        moved = taken = 0
        try:
            for head in self._available[2 + slot : 2 + slot + count].tolist():
                written = 0
                try:
                    address, length, shape = descriptor(descriptors, head << 4)
                    if shape & 0xFFFF == _INDIRECT and length == 48 and address >= base:
                        at, at_bytes, shape, data, length, direction, status, status_bytes, last = three_descriptors(
                            memory, address - base
                        )
                        is_plain = shape == _NEXT_1
                    else:
                        at, at_bytes = address, length
                        is_plain = shape & 0xFFFF == _NEXT
                        if is_plain:
                            data, length, direction = descriptor(descriptors, shape >> 16 << 4)
                            status, status_bytes, last = descriptor(descriptors, direction >> 16 << 4)
                            direction = direction & 0xFFFF | 0x20000
                    if (
                        is_plain
                        and at_bytes == 16
                        and status_bytes == 1
                        and last & 0xFFFF == _WRITE
                        and at >= base <= data
                        and status >= base
                    ):
                        # What reaches beyond the end of memory is seen by the unpack, the short transfer or the store.
                        kind, sector = two_words(memory, at - base)
                        inside = (sector & sector_mask) << _SECTOR_SHIFT
                        granule = sector >> sector_shift
                        if inside + length <= granule_bytes and granule < whole_granules and not length & 511:
                            data -= base
                            piece = memory[data : data + length]
                            if direction == _NEXT_2_WRITE and kind == 0:
                                place = read_get(granule)
                                if place is None and (levels := mixed_get(granule)) is not None:
                                    owners, unit_shift, places = levels[0]
                                    unit, last = inside >> unit_shift, (inside + length - 1) >> unit_shift
                                    owner = owners[unit]
                                    if unit == last or owners.count(owner, unit, last + 1) == last + 1 - unit:
                                        mixed_used(granule)
                                        place = places[owner]
                                if place is not None:
                                    fd, start = place
                                    if preadv(fd, (piece,), start + inside) == length:
                                        memory[status - base] = 0
                                        written = length + 1
                                        moved += length
                                elif len(piece) == length > 0:
                                    device.preadv(sector << _SECTOR_SHIFT, (piece,))
                                    memory[status - base] = 0
                                    written = length + 1
                                    moved += length
                            elif direction == _NEXT_2 and kind == 1:
                                place = write_get(granule)
                                if place is None and (levels := mixed_get(granule)) is not None:
                                    owners, unit_shift, places = levels[0]
                                    unit, last = inside >> unit_shift, (inside + length - 1) >> unit_shift
                                    owner = owners[unit]
                                    if unit == last or owners.count(owner, unit, last + 1) == last + 1 - unit:
                                        shared = places[owner]
                                        if shared is not None and shared[0] == mixed_write_fd:
                                            mixed_used(granule)
                                            place = shared
                                if place is not None and length <= DATA_PIECE_BYTES:
                                    fd, start = place
                                    if pwritev(fd, (piece,), start + inside) == length:
                                        memory[status - base] = 0
                                        written = 1
                                        moved += length
                                elif len(piece) == length > 0 and not device.read_only:
                                    device.pwritev(sector << _SECTOR_SHIFT, (piece,))
                                    memory[status - base] = 0
                                    written = 1
                                    moved += length
                except (IndexError, OverflowError, StructError, OSError, MullionError):
                    written = 0  # what is wrong, or gone, is found out by `serve`
                if not written:
                    written = serve(head)
                taken += 1
                if written == UNANSWERED:
                    continue
                element = 1 + 2 * (used_index & slot_mask)
                used_words[element] = head
                used_words[element + 1] = written
                used_index = (used_index + 1) & 0xFFFF
                used[1] = used_index
                if moved >= ANNOUNCE_BYTES:
                    break
        finally:
            self.available_index = (available_index + taken) & 0xFFFF
            self.answered += (used_index - self.used_index) & 0xFFFF
            self.used_index = used_index
            self.moved_bytes += moved
