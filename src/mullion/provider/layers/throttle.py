"""Caps on the disks of a partition: who may go ahead with a request, and when the others should ask again.

    ring or connection ─ Turn ─┐ first come, first served    ┌─ Lane (a disk's caps) ─┐ one request
    ring or connection ─ Turn ─┴─────────────────────────────┘           a disk at once ┴─ Group (the partition's caps)

A turn asks before it takes a request. The first in a disk's queue is given its place in the buckets of the disk and of
the partition, and nobody can take that from it; the next in the queue gets one when it has gone ahead. So the disks of
a partition that all wait go ahead by turns, however many requests each has ready, and within a disk so do its rings.

Invariants: nobody sleeps here but in `Turn.wait`, which is for threads that serve one connection. A change is in
force, and sleepers look again, before `set_limits` returns. A disk without caps costs its users one look at a flag.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

from mullion.provider.layers.bucket import Bucket
from mullion.provider.layers.limits import Cap, Limits

_ASK_AGAIN_S: Final = 0.001
"""Those behind the first of a queue cannot know how long; the clock of epoll has milliseconds."""
_LOOK_S: Final = 1.0
"""How often a sleeping connection looks whether its client is still there."""


class _Buckets:
    """The caps that are in force in one place."""

    def __init__(self) -> None:
        self.limits = Limits()
        self._caps: dict[str, tuple[Cap, Bucket]] = {}

    def set(self, limits: Limits, now_s: float, *, is_in_use: bool) -> None:
        self.limits = limits
        caps: dict[str, tuple[Cap, Bucket]] = {}
        for name, cap in limits.caps().items():
            known = self._caps.get(name)
            if known is None:
                bucket = Bucket(cap.rate, cap.capacity, now_s, is_full=is_in_use)
            else:
                bucket = known[1]
                bucket.change(cap.rate, cap.capacity, now_s)
            caps[name] = (cap, bucket)
        for name in self._caps.keys() - caps.keys():
            self._caps[name][1].change(float("inf"), self._caps[name][1].capacity, now_s)  # who waits for it may go
        self._caps = caps

    @property
    def is_limiting(self) -> bool:
        return bool(self._caps)

    def charge(self, is_write: bool, size_bytes: int, now_s: float) -> list[tuple[Bucket, float, float]]:
        tickets = []
        for cap, bucket in self._caps.values():
            if cap.for_writes is None or cap.for_writes is is_write:
                amount = float(size_bytes if cap.counts_bytes else 1)
                if amount:
                    tickets.append((bucket, bucket.charge(amount, now_s), amount))
        return tickets


class Turn:
    """One ring's or one connection's place among those that use a disk. Used by one thread."""

    def __init__(self, throttle: Throttle, lane: Lane) -> None:
        self._throttle = throttle
        self.lane = lane
        self.tickets: list[tuple[Bucket, float, float]] = []
        self.request = (False, 0)
        self.since_s = 0.0
        self.has_waited = False
        self.is_queued = False

    @property
    def is_limited(self) -> bool:
        """Whether `ask` has to be asked at all."""
        return self.lane.is_limited

    def ask(self, is_write: bool, size_bytes: int) -> float:
        """0.0: go ahead, it is charged. Else the seconds after which to ask again, for the same request."""
        with self._throttle.changed:
            return self.lane.ask(self, is_write, size_bytes, self._throttle.clock())

    def wait(self, is_write: bool, size_bytes: int, is_gone: Callable[[], bool]) -> bool:
        """Sleep until the request may go ahead; False when the client went away meanwhile."""
        changed, lane, clock = self._throttle.changed, self.lane, self._throttle.clock
        with changed:
            while (left_s := lane.ask(self, is_write, size_bytes, clock())) > 0.0:
                changed.wait(min(left_s, _LOOK_S))
                if left_s > _LOOK_S and is_gone():
                    lane.leave(self, clock())
                    return False
        return True

    def leave(self) -> None:
        """This ring or connection ends; what it had asked for is not waited for."""
        with self._throttle.changed:
            self.lane.leave(self, self._throttle.clock())


class Lane:
    """One disk. The throttle's lock is held by whoever calls, but for the flag and the counters."""

    def __init__(self, throttle: Throttle) -> None:
        self._throttle = throttle
        self.buckets = _Buckets()
        self._queue: collections.deque[Turn] = collections.deque()
        self.is_limited = False
        self.waits = 0
        self.waited_s = 0.0

    def turn(self) -> Turn:
        return Turn(self._throttle, self)

    def ask(self, turn: Turn, is_write: bool, size_bytes: int, now_s: float) -> float:
        queue = self._queue
        if not turn.is_queued:
            if not self.is_limited:
                return 0.0
            turn.request, turn.since_s, turn.is_queued, turn.has_waited = (is_write, size_bytes), now_s, True, False
            queue.append(turn)
            if queue[0] is turn:
                self._reserve(turn, now_s)
        first = queue[0]
        left_s = max((bucket.wait_s(ticket, amount, now_s) for bucket, ticket, amount in first.tickets), default=0.0)
        if first is not turn or left_s > 0.0:
            turn.has_waited = True
            return left_s if first is turn else max(left_s, _ASK_AGAIN_S)
        self.leave(turn, now_s)
        if turn.has_waited:
            self.waits += 1
            self.waited_s += now_s - turn.since_s
        return 0.0

    def leave(self, turn: Turn, now_s: float) -> None:
        if not turn.is_queued:
            return
        was_first = self._queue[0] is turn
        self._queue.remove(turn)
        turn.is_queued = False
        turn.tickets = []
        if was_first and self._queue:
            self._reserve(self._queue[0], now_s)

    def update(self) -> None:
        """The caps have changed."""
        self.is_limited = self.buckets.is_limiting or self._throttle.group.is_limiting
        if not self.is_limited:
            for turn in self._queue:
                turn.is_queued = False
                turn.tickets = []
            self._queue.clear()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def _reserve(self, turn: Turn, now_s: float) -> None:
        is_write, size_bytes = turn.request
        turn.tickets = self.buckets.charge(is_write, size_bytes, now_s)
        turn.tickets += self._throttle.group.charge(is_write, size_bytes, now_s)


class Throttle:
    """The caps of one partition and its disks. Used by every thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.changed = threading.Condition()
        self.group = _Buckets()
        self._lanes: dict[str, Lane] = {}
        self._wakers: list[Callable[[], None]] = []

    def lane(self, disk_id: str) -> Lane:
        """The lane of a disk, made when it is first asked for."""
        with self.changed:
            lane = self._lanes.get(disk_id)
            if lane is None:
                lane = self._lanes[disk_id] = Lane(self)
                lane.update()
            return lane

    def add_waker(self, waker: Callable[[], None]) -> None:
        """Call this when caps have changed: who was told to ask later should ask now."""
        self._wakers.append(waker)

    def set_limits(self, disk_id: str | None, limits: Limits, *, is_in_use: bool = True) -> None:
        """Cap a disk, or (None) all disks of the partition together, from now on."""
        lane = None if disk_id is None else self.lane(disk_id)
        with self.changed:
            buckets = self.group if lane is None else lane.buckets
            buckets.set(limits, self.clock(), is_in_use=is_in_use)
            self._changed()

    def open(self) -> None:
        """No caps any more: the provider ends, and what is in hand has to be finished."""
        with self.changed:
            now_s = self.clock()
            for buckets in (self.group, *(lane.buckets for lane in self._lanes.values())):
                buckets.set(Limits(), now_s, is_in_use=True)
            self._changed()

    def _changed(self) -> None:
        for lane in self._lanes.values():
            lane.update()
        self.changed.notify_all()
        for waker in self._wakers:
            waker()

    def limits(self, disk_id: str | None) -> Limits:
        """The caps in force for a disk, or (None) for all together."""
        return (self.group if disk_id is None else self.lane(disk_id).buckets).limits

    def status(self, disk_id: str | None) -> Mapping[str, object]:
        """The caps of a disk and how long its requests waited; of the partition, the caps only."""
        limits = self.limits(disk_id).to_fields()
        if disk_id is None:
            return {"limits": limits}
        lane = self.lane(disk_id)
        return {
            "limits": limits,
            "waits": lane.waits,
            "waited_s": round(lane.waited_s, 3),
            "waiting": lane.waiting,
        }
