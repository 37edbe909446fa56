"""The ring loop: takes requests from a split virtqueue and answers them, in order, as cheaply as Python can.

Spec: VIRTIO 1.2, section 2.7 (split virtqueues), 2.7.7 and 2.7.10 (notifications, EVENT_IDX). The table of the parts
is in `wire.vhost_user.virtio_blk`.

How it is made fast: rings and guest memory are `memoryview.cast` views (an index is one aligned load or store), a
descriptor is two 64-bit words, a driver's usual table of three descriptors is one `unpack`, data goes between file and
guest memory by `preadv`/`pwritev` without a copy, and there is no object per request. What is not a plain read or write
of one segment within one granule goes through `_serve`, which takes everything that the specification allows.

Invariants: requests are served strictly in order and each is finished before the next is taken, so `used.idx` is at
every instant exactly the number of finished requests: after a crash the ring goes on from there. Everything read from
the guest is checked before use: indices against the ring's size, addresses and lengths against its memory, chains
against a limit. A ring that contradicts itself raises `GuestFault`, and its state is as before the offending request.
Ordering: stores of one thread become visible in order on x86; before sleeping, the request for a notification has to be
visible before the ring is read again. Taking a free lock is an atomic read-modify-write and so, on x86, a full barrier;
it costs a tenth of a system call.
Durability: as the request says; a write that finds no space stays in the ring, unanswered, until it succeeds.
"""

from __future__ import annotations

import enum
import os
import struct
import threading
from collections.abc import Callable
from struct import error as StructError  # noqa: N812
from typing import Final

from mullion.base.errors import MullionError
from mullion.provider.blk import BlkDevice, OutOfSpace, Segments, cost_of
from mullion.provider.dirty_log import DirtyLog
from mullion.provider.inflight import InflightQueue
from mullion.provider.layers.throttle import Turn
from mullion.provider.memory import GuestFault, GuestMemory
from mullion.provider.turnstile import Turnstile
from mullion.wire.vhost_user.messages import VRING_LOG, DeviceFeature, VringAddress
from mullion.wire.vhost_user.virtio_blk import DescriptorFlag

CHAIN_LIMIT: Final = 1024
"""Descriptors of one request, direct and indirect together."""
BUDGET_REQUESTS: Final = 512
"""After so many requests of one ring the other rings and the control of the connection get a turn."""
ANNOUNCE_BYTES: Final = 512 * 1024
"""After so much data the driver hears of it at once, so that it can prepare more while the rest is served."""

ANNOUNCE_REQUESTS: Final = 16
"""Likewise after so many requests: a driver that is woken only at the end of a batch finds the ring empty, and then so
do we; both sleep and are woken for every batch (`bench/provider_bench.py`)."""

_EVENT_IDX: Final = int(DeviceFeature.RING_EVENT_IDX)
_NO_NOTIFY: Final = 1
_ENTRY_BYTES: Final = 16
_SECTOR_SHIFT: Final = 9
_FRAME_BYTES: Final = 17  # header and status of a request
# A descriptor's flags, and flags | next << 16 as they stand in a driver's usual table of three.
_NEXT: Final = int(DescriptorFlag.NEXT)
_WRITE: Final = int(DescriptorFlag.WRITE)
_INDIRECT: Final = int(DescriptorFlag.INDIRECT)
_NEXT_1: Final = _NEXT | 1 << 16
_NEXT_2: Final = _NEXT | 2 << 16
_NEXT_2_WRITE: Final = _NEXT | _WRITE | 2 << 16

_DESCRIPTOR: Final = struct.Struct("<QII").unpack_from  # address, length, flags | next << 16
_THREE_DESCRIPTORS: Final = struct.Struct("<QIIQIIQII").unpack_from
_TWO_WORDS: Final = struct.Struct("<QQ").unpack_from


class Drained(enum.Enum):
    """How a call of `drain` ended."""

    IDLE = "idle"  # nothing left; the driver will kick
    BUSY = "busy"  # the budget is spent or the disk is held, there is more
    STALLED = "stalled"  # a write waits for space
    CAPPED = "capped"  # the next request has to wait, for `Ring.wait_s`


class Ring:
    """One virtqueue that runs. Used by one thread; the counters may be read from any."""

    def __init__(
        self,
        blk: BlkDevice,
        memory: GuestMemory,
        address: VringAddress,
        size: int,
        *,
        features: int,
        inflight: InflightQueue | None,
        barrier: threading.Lock,
        turn: Turn,
        turnstile: Turnstile,
        log: DirtyLog | None = None,
    ) -> None:
        """Attach to a ring in guest memory. Raises: GuestFault when it does not lie there."""
        self.requests = 0
        self.bytes = 0
        self.stall: OSError | None = None
        self.wait_s = 0.0
        self._blk = blk
        self._memory = memory
        self._size = size
        self._barrier = barrier
        self._turn = turn
        self._lane = turn.lane  # one look at a flag a batch is all that a disk without caps pays
        self._admitted = 0  # requests that may be served without asking the turn again
        self._paid_bytes = 0  # of `bytes`, while a cap is on
        self._paid_requests = 0
        self._turnstile = turnstile
        self._log = log
        self._log_used: int | None = address.log if address.flags & VRING_LOG else None
        self._marks: list[tuple[int, int]] = []
        self._event_idx = bool(features & _EVENT_IDX)
        if address.descriptor % 16 or address.available % 2 or address.used % 4:
            raise GuestFault(f"vring {address.index} is not aligned")
        used = memory.ring_part(address.used, 6 + 8 * size)
        self._descriptors = memory.ring_part(address.descriptor, _ENTRY_BYTES * size)
        self._available = memory.ring_part(address.available, 6 + 2 * size).cast("H")
        self._used = used[:4].cast("H")
        self._used_words = used[: 4 + 8 * size].cast("I")  # [1 + 2 n] head, [2 + 2 n] length of element n
        self._available_event = used[4 + 8 * size :].cast("H")
        self._inflight = inflight
        self.next_index = self._used[1]
        self._resubmit = [] if inflight is None else inflight.recover(self.next_index, size)
        self._signalled = self.next_index

    def drain(self, notify: Callable[[], None]) -> Drained:
        """Serve what is available; `notify` is called when the driver asked to hear of it.

        Raises: GuestFault; what was finished before it is answered and announced.
        """
        available, size = self._available, self._size
        spent = 0
        try:
            if self._resubmit:
                self._serve_inflight()
            while True:
                index = self.next_index
                limit = available[1]
                count = (limit - index) & 0xFFFF
                if count:
                    if count > size:
                        raise GuestFault(f"available index {limit} is {count} ahead of {index}, the ring has {size}")
                    if spent >= BUDGET_REQUESTS or self._turnstile.is_held:
                        return Drained.BUSY
                    if not self._event_idx:
                        self._used[0] = _NO_NOTIFY
                    count = min(count, size - (index & (size - 1)), ANNOUNCE_REQUESTS)
                    if self._lane.is_limited or self._admitted:
                        count = self._admit(count)
                        if not count:
                            return Drained.CAPPED
                        try:
                            self._run(count)
                        finally:
                            self._admitted -= (self.next_index - index) & 0xFFFF
                            self._paid_requests = self.requests
                    else:
                        self._run(count)
                    spent += (self.next_index - index) & 0xFFFF
                    self._announce(notify)
                    continue
                if self._event_idx:
                    self._available_event[0] = index
                else:
                    self._used[0] = 0
                with self._barrier:
                    pass
                if available[1] == index:
                    return Drained.IDLE
        except OutOfSpace as shortage:
            self.stall = shortage.error
            return Drained.STALLED
        finally:
            if self._log is not None and self._log_used is not None:
                self._log.mark(self._log_used, 6 + 8 * size)
            self._announce(notify)

    def _run(self, count: int) -> None:
        """Serve up to so many requests, which are available and do not wrap around the ring's end; the hot loop."""
        if self._log is not None:
            self._run_logged(count)
            return
        hot = self._memory.largest
        assert hot is not None, "a ring lies in memory, so there is some"
        base, memory = hot.guest_address, hot.view
        device = self._blk.device
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
        index = first = self.next_index
        slot = index & (self._size - 1)
        element = 1 + 2 * slot
        moved = 0
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
                                if place is not None:
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
                    written = 0  # what is wrong, or gone, is found out in `_serve`
                if not written:
                    written = self._serve(head)
                used_words[element] = head
                used_words[element + 1] = written
                element += 2
                index = (index + 1) & 0xFFFF
                used[1] = index
                if moved >= ANNOUNCE_BYTES:
                    break
        finally:
            self.next_index = index
            self.requests += (index - first) & 0xFFFF
            self.bytes += moved

    def _admit(self, count: int) -> int:
        """How many of the next requests may go ahead now; with none, `wait_s` says when to ask. Raises: GuestFault."""
        if self._paid_requests != self.requests:  # some were served without a cap
            self._paid_bytes, self._paid_requests = self.bytes, self.requests
        slot = self.next_index & (self._size - 1)
        heads = self._available[2 + slot : 2 + slot + count].tolist()
        while self._admitted < count:
            try:
                cost = cost_of(*self._walk(heads[self._admitted]))
            except GuestFault:
                if self._admitted:  # those before it are served first
                    break
                raise
            if cost is not None:
                is_write, size_bytes = cost
                # A guest may have made a request longer after its cost was found: that is paid with the next one.
                size_bytes += max(self.bytes - self._paid_bytes, 0)
                self.wait_s = self._turn.ask(is_write, size_bytes)
                if self.wait_s:
                    break
                self._paid_bytes += size_bytes
            self._admitted += 1
        return min(self._admitted, count)

    def leave(self) -> None:
        """The ring ends: its next request is not waited for."""
        self._turn.leave()

    def _run_logged(self, count: int) -> None:
        """The same, while the guest's memory is copied: every request goes the long way, which marks what it wrote."""
        slot = self.next_index & (self._size - 1)
        for head in self._available[2 + slot : 2 + slot + count].tolist():
            element = 1 + 2 * (self.next_index & (self._size - 1))
            self._used_words[element + 1] = self._serve(head)
            self._used_words[element] = head
            self.next_index = (self.next_index + 1) & 0xFFFF
            self._used[1] = self.next_index
            self.requests += 1

    def _serve_inflight(self) -> None:
        """Serve again what an earlier process had taken and not answered (inflight.py)."""
        while self._resubmit:
            head = self._resubmit[0]
            if self._inflight is not None:
                self._inflight.begin(head, self.next_index)
            element = 1 + 2 * (self.next_index & (self._size - 1))
            self._used_words[element + 1] = self._serve(head)
            self._used_words[element] = head
            self.next_index = (self.next_index + 1) & 0xFFFF
            self._used[1] = self.next_index
            if self._inflight is not None:
                self._inflight.finish(head, self.next_index)
            self.requests += 1
            del self._resubmit[0]

    def _announce(self, notify: Callable[[], None]) -> None:
        """Notify the driver of what was finished since the last time, if it asked (2.7.7.2, 2.7.10)."""
        new, old = self.next_index, self._signalled
        if new == old:
            return
        self._signalled = new
        with self._barrier:  # used.idx must be visible before the driver's wish is read
            pass
        if self._event_idx:
            event = self._available[2 + self._size]
            wanted = (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
        else:
            wanted = not self._available[0] & _NO_NOTIFY
        if wanted:
            notify()

    def _serve(self, head: int) -> int:
        """Serve a request of any shape; the bytes written into guest memory. Raises: GuestFault, OutOfSpace."""
        self._marks.clear()
        readable, writable = self._walk(head)
        written = self._blk.serve(readable, writable)
        if self._log is not None:
            for address, length in self._marks:
                self._log.mark(address, length)
        self.bytes += sum(map(len, readable)) + sum(map(len, writable)) - _FRAME_BYTES
        return written

    def _walk(self, head: int) -> tuple[Segments, Segments]:
        """The pieces of memory of a chain: those the device reads, and those it writes (2.7.5)."""
        readable: Segments = []
        writable: Segments = []
        table: memoryview = self._descriptors
        entries, is_indirect, seen, index = self._size, False, 0, head
        while True:
            seen += 1
            if index >= entries or seen > CHAIN_LIMIT:
                raise GuestFault(f"request {head}: descriptor {index} of {entries}, {seen} in the chain")
            address, length, shape = _DESCRIPTOR(table, index * _ENTRY_BYTES)
            flags = shape & 0xFFFF
            if flags & _INDIRECT:
                if is_indirect or flags & _NEXT or length % _ENTRY_BYTES or not length:
                    raise GuestFault(f"request {head}: an indirect table of {length} bytes, flags {flags:#x}")
                if length > CHAIN_LIMIT * _ENTRY_BYTES:
                    raise GuestFault(f"request {head}: an indirect table of {length} bytes")
                pieces = self._memory.segments(address, length)
                table = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
                entries, is_indirect, index = length // _ENTRY_BYTES, True, 0
                continue
            if flags & _WRITE:
                writable += self._memory.segments(address, length)
                if self._log is not None:
                    self._marks.append((address, length))
            elif writable:
                raise GuestFault(f"request {head}: a descriptor to read after one to write")
            else:
                readable += self._memory.segments(address, length)
            if not flags & _NEXT:
                return readable, writable
            index = shape >> 16


_NOWHERE: Final[dict[int, tuple[int, int]]] = {}
