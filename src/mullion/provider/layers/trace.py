"""A record of the requests of a disk: what, where, how much, how long it took. For as long as somebody reads it.

Bounded: `CAPACITY` requests wait to be read; further ones are counted as dropped. A trace that nobody has read for
`FORGOTTEN_S` seconds takes itself away with the next request.
Latency is that of the disk, as the layers below answer: what a request waited for a cap, or in the guest, is not in it.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import Final

from mullion.provider.device import DirectDevice
from mullion.provider.layers.guarded import GuardedLayer, Kind

CAPACITY: Final = 65_536
FORGOTTEN_S: Final = 30.0


Record = tuple[int, str, int, int, int, bool]
"""Microseconds since the trace began, kind, offset and length in bytes, latency in microseconds, whether it failed."""


class TraceLayer(GuardedLayer):
    """Records what goes through it. Used by the threads of all transports; read by another."""

    def __init__(
        self,
        below: DirectDevice,
        forget: Callable[[TraceLayer], None],
        *,
        capacity: int = CAPACITY,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        """`forget` is called, once, when nobody reads any more."""
        super().__init__(below)
        self._forget = forget
        self._capacity = capacity
        self._clock_ns = clock_ns
        self._records: collections.deque[Record] = collections.deque()
        self._begun_ns = self._read_ns = clock_ns()
        self.dropped = 0
        self._is_forgotten = False

    def around(self, kind: Kind, offset: int, length: int, act: Callable[[], None]) -> None:
        begun_ns = self._clock_ns()
        failed = True
        try:
            act()
            failed = False
        finally:
            now_ns = self._clock_ns()
            if len(self._records) < self._capacity:
                since_us = (begun_ns - self._begun_ns) // 1000
                self._records.append((since_us, kind.value, offset, length, (now_ns - begun_ns) // 1000, failed))
            else:
                self.dropped += 1
            if now_ns - self._read_ns > FORGOTTEN_S * 1e9 and not self._is_forgotten:
                self._is_forgotten = True
                self._forget(self)

    def take(self, count: int) -> list[Record]:
        """The oldest that were not taken yet."""
        self._read_ns = self._clock_ns()
        return [self._records.popleft() for _ in range(min(count, len(self._records)))]

    @property
    def waiting(self) -> int:
        """Requests that were not taken yet."""
        return len(self._records)
