"""A ring: takes requests from a split virtqueue in order, and answers them, all but flushes, in order.

Spec: VIRTIO 1.2, section 2.7 (split virtqueues), 2.7.7 and 2.7.10 (notifications, EVENT_IDX). The table of the parts
is in `wire.vhost_user.virtio_blk`.

Nearly all requests are plain reads and writes of one segment within one granule: `hot_loop` serves them by the dozen.
What it leaves over goes through `serve`, which takes everything that the specification allows.

A FLUSH goes to the disk's `Flusher`, and the requests behind it are served and answered while it runs. That needs the
in-flight region, which then says what was taken and not answered. Without one, and while the guest's memory is copied,
a flush is a request like any other. So it is where nobody would gain: on a disk with one ring, whose driver has waited
for its last flushes with nothing else to do, and not for long; two threads less to wake.

Invariants: requests are taken strictly in order, and each but a flush is finished before the next is taken: after a
crash the ring goes on from `used.idx` plus the flushes that are marked in flight (`inflight`). Everything read from
the guest is checked before use: indices against the ring's size, addresses and lengths against its memory, chains
against a limit. A ring that contradicts itself raises `GuestFault`, and its state is as before the offending request.
Durability: as the request says; a write that finds no space stays in the ring, unanswered, until it succeeds.
"""

from __future__ import annotations

import enum
import select
import struct
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

from mullion.base.flusher import Flusher, Outcomes
from mullion.base.implementation import implementation_of
from mullion.provider.blk import BlkDevice, OutOfSpace, Segments, cost_of, room_of_flush
from mullion.provider.dirty_log import DirtyLog
from mullion.provider.hot_loop import ANNOUNCE_REQUESTS, BUDGET_REQUESTS, EVENTS, UNANSWERED
from mullion.provider.hot_loop import Call as PythonCall
from mullion.provider.hot_loop import HotLoop as PythonHotLoop
from mullion.provider.inflight import InflightQueue
from mullion.provider.layers.throttle import Turn
from mullion.provider.memory import GuestFault, GuestMemory
from mullion.provider.turnstile import Turnstile
from mullion.wire.vhost_user.messages import VRING_LOG, DeviceFeature, VringAddress
from mullion.wire.vhost_user.virtio_blk import BlkStatus, DescriptorFlag

_IMPLEMENTATION: Final = implementation_of("mullion.provider.hot_loop")
HotLoop: type[PythonHotLoop] = _IMPLEMENTATION.HotLoop
Call: type[PythonCall] = _IMPLEMENTATION.Call

CHAIN_LIMIT: Final = 1024
"""Descriptors of one request, direct and indirect together."""

_LONELY_FLUSHES: Final = 4
"""After so many flushes in a row behind which nothing came until they were done, the next is done on the spot."""
_LONELY_S: Final = 0.05
"""One that takes longer is not done on the spot: whoever wants to hold the disk has to wait for it."""

_EVENT_IDX: Final = int(DeviceFeature.RING_EVENT_IDX)
_ENTRY_BYTES: Final = 16
_FRAME_BYTES: Final = 17  # header and status of a request
_NEXT: Final = int(DescriptorFlag.NEXT)
_WRITE: Final = int(DescriptorFlag.WRITE)
_INDIRECT: Final = int(DescriptorFlag.INDIRECT)
_DESCRIPTOR: Final = struct.Struct("<QII").unpack_from  # address, length, flags | next << 16


FlushOutcome = BlkStatus | OutOfSpace


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
        flusher: Flusher[FlushOutcome] | None = None,
    ) -> None:
        """Attach to a ring in guest memory. Raises: GuestFault when it does not lie there."""
        self.stall: OSError | None = None
        self.wait_s = 0.0
        self.blk = blk
        self._memory = memory
        self._size = size
        self._turn = turn
        self.lane = turn.lane  # one look at a flag a batch is all that a disk without caps pays
        self._answered = 0  # beside the hot loop
        self._moved_bytes = 0
        self._admitted = 0  # requests that may be served without asking the turn again
        self._paid_bytes = 0  # of `bytes`, while a cap is on
        self._paid_requests = 0
        self._turnstile = turnstile
        self._log = log
        self._log_used: int | None = address.log if address.flags & VRING_LOG else None
        self._marks: list[tuple[int, int]] = []
        if address.descriptor % 16 or address.available % 2 or address.used % 4:
            raise GuestFault(f"vring {address.index} is not aligned")
        used = memory.ring_part(address.used, 6 + 8 * size)
        self._descriptors = memory.ring_part(address.descriptor, _ENTRY_BYTES * size)
        self._available = memory.ring_part(address.available, 6 + 2 * size).cast("H")
        self._available_place = memory.guest_address(address.available)
        self._used = used[:4].cast("H")
        self._used_words = used[: 4 + 8 * size].cast("I")  # [1 + 2 n] head, [2 + 2 n] length of element n
        hot = memory.largest
        assert hot is not None, "a ring lies in memory, so there is some"
        self._hot = HotLoop(
            size=size,
            descriptors=self._descriptors,
            available=self._available.cast("B"),
            used=used,
            base=hot.guest_address,
            memory=hot.view,
            event_idx=bool(features & _EVENT_IDX),
            barrier=barrier,
        )
        self._inflight = inflight
        self._used_index = self._used[1]
        self._resubmit = [] if inflight is None else inflight.recover(self._used_index, size)
        self.next_index = (self._used_index + len(self._resubmit)) & 0xFFFF
        self._flusher = flusher if inflight is not None and log is None else None
        self._flushes: dict[int, tuple[memoryview, int]] = {}  # heads that are being flushed, and where to answer
        self._flush_behind = -1  # the driver's index when the last of these began, if nothing was available behind it
        self._lonely_flushes = 0
        self._is_attended = False
        self._outcomes: Outcomes[FlushOutcome] = SimpleQueue()
        self._unsynced: list[int] = []  # of the flushes, those that found no space

    def drain(self, notify: Callable[[], None]) -> Drained:
        """Serve what is available; `notify` is called when the driver asked to hear of it.

        Raises: GuestFault; what was finished before it is answered and announced.
        """
        hot, size = self._hot, self._size
        spent = 0
        try:
            if self._resubmit:
                self._serve_inflight()
            if self._unsynced:
                self._flush_again()
            while True:
                first = self.next_index
                if self._flushes:
                    self._answer_flushes()
                if not (self.lane.is_limited or self._admitted or self._log is not None):
                    if self._sweep(notify, BUDGET_REQUESTS - spent):
                        return Drained.IDLE
                    spent += (self.next_index - first) & 0xFFFF
                    first = self.next_index
                count = hot.pending(first)
                if not count:
                    if hot.arm(first):
                        return Drained.IDLE
                    continue
                if count > size:
                    raise GuestFault(f"available index is {count} ahead of {first}, the ring has {size}")
                if spent >= BUDGET_REQUESTS or self._turnstile.is_held:
                    return Drained.BUSY
                count = min(count, size - (first & (size - 1)), ANNOUNCE_REQUESTS)
                if self.lane.is_limited or self._admitted:
                    count = self._admit(count)
                    if not count:
                        return Drained.CAPPED
                    try:
                        self._run(count)
                    finally:
                        self._admitted -= (self.next_index - first) & 0xFFFF
                        self._paid_requests = self.requests
                else:
                    self._run(count)
                spent += (self.next_index - first) & 0xFFFF
                hot.announce(self._used_index, notify)
        except OutOfSpace as shortage:
            self.stall = shortage.error
            return Drained.STALLED
        finally:
            if self._log is not None and self._log_used is not None:
                self._log.mark(self._log_used, 6 + 8 * size)
            hot.announce(self._used_index, notify)

    def _sweep(self, notify: Callable[[], None], budget: int) -> bool:
        """Serve until nothing is left, the usual way; False when there is more, or less, to it than that."""
        hot = self._hot
        try:
            return hot.sweep(
                *(self.blk.device, self.serve, notify, self._turnstile, self.next_index, self._used_index, budget)
            )
        finally:
            self.keep()

    def attend(
        self, notify: Callable[[], None], seat: threading.Lock, epoll: select.epoll, kick: int
    ) -> list[tuple[int, int]]:
        """Wait for events, and serve what comes with kicks as long as there is nothing else to it.

        Returns what else has come; then, and after a kick, it is to be drained. Raises: GuestFault, OSError.
        """
        if self._resubmit or self._unsynced or self._admitted or self._log is not None:
            return epoll.poll(-1, EVENTS)
        self._hot.available_index, self._hot.used_index = self.next_index, self._used_index
        self._is_attended = True
        try:
            return self._hot.attend(self, notify, self._turnstile, seat, epoll, kick)
        except OutOfSpace:
            return [(kick, select.EPOLLIN)]  # and is met again by whoever drains the ring
        finally:
            self._is_attended = False

    @property
    def requests(self) -> int:
        """Answered since the ring began."""
        return self._answered + self._hot.answered

    @property
    def bytes(self) -> int:
        """Of data, in these."""
        return self._moved_bytes + self._hot.moved_bytes

    def _run(self, count: int) -> None:
        """Serve up to so many requests, which are available and do not wrap around the ring's end."""
        if self._log is not None:
            self._run_logged(count)
            return
        try:
            self._hot.run(self.blk.device, self.serve, self.next_index, self._used_index, count)
        finally:
            self.keep()

    def keep(self) -> None:
        """Take over how far the hot loop came."""
        hot = self._hot
        self.next_index, self._used_index = hot.available_index, hot.used_index

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
            self._publish(head, self.serve(head))
            self.next_index = (self.next_index + 1) & 0xFFFF

    def _serve_inflight(self) -> None:
        """Serve again what an earlier process had taken and not answered (inflight.py)."""
        while self._resubmit:
            head = self._resubmit[0]
            self._publish_marked(head, self._serve_now(head))
            del self._resubmit[0]

    def _publish(self, head: int, written: int) -> None:
        element = 1 + 2 * (self._used_index & (self._size - 1))
        self._used_words[element] = head
        self._used_words[element + 1] = written
        self._used_index = (self._used_index + 1) & 0xFFFF
        self._used[1] = self._used_index
        self._answered += 1

    def _publish_marked(self, head: int, written: int) -> None:
        """Answer a request that the in-flight region says to be taken."""
        assert self._inflight is not None
        self._inflight.begin(head, self._used_index)
        self._publish(head, written)
        self._inflight.finish(head, self._used_index)

    # Flushes.

    @property
    def has_outcome(self) -> bool:
        """Whether a flush is done, and was not answered."""
        return not self._outcomes.empty()

    def _begin_flush(self, head: int, status: memoryview, written: int) -> bool:
        """Have a flush done while requests go on; False when that cannot be. Raises: GuestFault."""
        assert self._inflight is not None
        assert self._flusher is not None
        if head in self._flushes:
            raise GuestFault(f"request {head} is available once more before it was answered")
        if not self._flusher.ask(self._outcomes, head):
            return False
        self._inflight.mark(head)
        self._flushes[head] = status, written
        self._flush_behind = self._available[1] if self._is_last(head) else -1
        return True

    def _is_last(self, head: int) -> bool:
        """Whether nothing is available behind a request."""
        return self._available[2 + ((self._available[1] - 1) & (self._size - 1))] == head

    def _flush_on_the_spot(self, readable: Segments, writable: Segments) -> int:
        """Raises: GuestFault, OutOfSpace."""
        index, begun_s = self._available[1], time.monotonic()
        written = self._finish(readable, writable)
        if self._available[1] != index or time.monotonic() - begun_s > _LONELY_S:
            self._lonely_flushes = 0
        return written

    def _answer_flushes(self) -> None:
        """Answer those that are done. Raises: OutOfSpace when there was none for some of them."""
        shortage: OutOfSpace | None = None
        while not self._outcomes.empty():
            shortage = self._take_outcome() or shortage
        if shortage is not None:
            raise shortage

    def _take_outcome(self) -> OutOfSpace | None:
        """Wait for a flush, and answer it; or what it lacks."""
        head, outcome = self._outcomes.get()
        if isinstance(outcome, OutOfSpace):
            self._unsynced.append(head)
            return outcome
        self._answer_flush(head, outcome)
        return None

    def _answer_flush(self, head: int, outcome: BlkStatus) -> None:
        status, written = self._flushes.pop(head)
        self._lonely_flushes = self._lonely_flushes + 1 if self._available[1] == self._flush_behind else 0
        status[0] = outcome
        self._publish_marked(head, written if outcome is BlkStatus.OK else 1)
        self._paid_requests += 1  # that it was not asked for its cost forgives nobody anything

    def _flush_again(self) -> None:
        """Try once more what found no space, before anything else. Raises: OutOfSpace."""
        outcome = self.blk.flush()
        while self._unsynced:
            self._answer_flush(self._unsynced.pop(), outcome)

    def come_to_rest(self, notify: Callable[[], None]) -> None:
        """Wait for the flushes that run, and answer them; the ring is not used any more, and goes on at `next_index`.

        What found no space, or was not served since an earlier process took it, is available again, before all that was
        not taken. Its place in the available ring is one that the driver has filled, and fills again only when the
        request was answered. Killed at any instant: of these heads, some are marked, and the others are available right
        behind as many places.
        """
        while len(self._unsynced) < len(self._flushes):
            self._take_outcome()
        unserved = [*self._resubmit, *self._unsynced]
        for number, head in enumerate(unserved):
            self._available[2 + ((self._used_index + number) & (self._size - 1))] = head
        if unserved and self._log is not None:
            self._log.mark(self._available_place, 6 + 2 * self._size)
        if self._inflight is not None:
            for head in reversed(unserved):
                self._inflight.unmark(head)
            self._inflight.rest(self._used_index)
        self.next_index = self._used_index
        self._hot.announce(self._used_index, notify)

    # What all requests need.

    def serve(self, head: int) -> int:
        """Serve a request of any shape, or have it flushed: the bytes written into guest memory, or `UNANSWERED`.

        Raises: GuestFault, OutOfSpace.
        """
        self._marks.clear()
        readable, writable = self._walk(head)
        if self._flusher is not None:
            room = room_of_flush(readable, writable)
            if room is not None:
                if self._is_attended and self._lonely_flushes >= _LONELY_FLUSHES and self._is_last(head):
                    return self._flush_on_the_spot(readable, writable)
                if self._begin_flush(head, *room):
                    return UNANSWERED
        return self._finish(readable, writable)

    def _serve_now(self, head: int) -> int:
        """The same, finished in any case."""
        self._marks.clear()
        return self._finish(*self._walk(head))

    def _finish(self, readable: Segments, writable: Segments) -> int:
        written = self.blk.serve(readable, writable)
        if self._log is not None:
            for address, length in self._marks:
                self._log.mark(address, length)
        self._moved_bytes += sum(map(len, readable)) + sum(map(len, writable)) - _FRAME_BYTES
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
