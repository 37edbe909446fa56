"""A ring: takes requests from a split virtqueue and answers them, in order.

Spec: VIRTIO 1.2, section 2.7 (split virtqueues), 2.7.7 and 2.7.10 (notifications, EVENT_IDX). The table of the parts
is in `wire.vhost_user.virtio_blk`.

Nearly all requests are plain reads and writes of one segment within one granule: `hot_loop` serves them by the dozen.
What it leaves over goes through `_serve`, which takes everything that the specification allows.

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
import struct
import threading
from collections.abc import Callable
from typing import Final

from mullion.base.implementation import implementation_of
from mullion.provider.blk import BlkDevice, OutOfSpace, Segments, cost_of
from mullion.provider.dirty_log import DirtyLog
from mullion.provider.hot_loop import HotLoop as PythonHotLoop
from mullion.provider.inflight import InflightQueue
from mullion.provider.layers.throttle import Turn
from mullion.provider.memory import GuestFault, GuestMemory
from mullion.provider.turnstile import Turnstile
from mullion.wire.vhost_user.messages import VRING_LOG, DeviceFeature, VringAddress
from mullion.wire.vhost_user.virtio_blk import DescriptorFlag

HotLoop: type[PythonHotLoop] = implementation_of("mullion.provider.hot_loop").HotLoop

CHAIN_LIMIT: Final = 1024
"""Descriptors of one request, direct and indirect together."""
BUDGET_REQUESTS: Final = 512
"""After so many requests of one ring the other rings and the control of the connection get a turn."""
ANNOUNCE_REQUESTS: Final = 16
"""After so many requests the driver hears of them: one that is woken only at the end of a batch finds the ring empty,
and then so do we; both sleep and are woken for every batch (`bench/provider_bench.py`)."""

_EVENT_IDX: Final = int(DeviceFeature.RING_EVENT_IDX)
_NO_NOTIFY: Final = 1
_ENTRY_BYTES: Final = 16
_FRAME_BYTES: Final = 17  # header and status of a request
_NEXT: Final = int(DescriptorFlag.NEXT)
_WRITE: Final = int(DescriptorFlag.WRITE)
_INDIRECT: Final = int(DescriptorFlag.INDIRECT)
_DESCRIPTOR: Final = struct.Struct("<QII").unpack_from  # address, length, flags | next << 16


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
        hot = memory.largest
        assert hot is not None, "a ring lies in memory, so there is some"
        self._hot = HotLoop(
            size=size,
            descriptors=self._descriptors,
            available=self._available.cast("B"),
            used=used,
            base=hot.guest_address,
            memory=hot.view,
        )
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
        """Serve up to so many requests, which are available and do not wrap around the ring's end."""
        if self._log is not None:
            self._run_logged(count)
            return
        hot, first = self._hot, self.next_index
        try:
            hot.run(self._blk.device, self._serve, first, first, count)
        finally:
            self.next_index = hot.available_index
            self.requests += (self.next_index - first) & 0xFFFF
            self.bytes += hot.moved_bytes

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
