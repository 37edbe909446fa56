"""A leaky bucket that gives out places in a queue: the arithmetic of a cap, without clock, lock or I/O.

All that was ever charged is a line of work; the bucket works it off at `rate`. A charge is given the place on the line
where it ends (its ticket), and may go ahead when no more than `capacity` of the line before that place is left to do.

Invariants: what goes ahead in any span of t seconds is at most `rate * t + max(capacity, the largest charge)`.
Charges go ahead in the order in which they were made, each of them some time: a charge above the capacity waits until
all before it is worked off. Nothing is saved up but `capacity`. A change of rate keeps places and how full the bucket
is in proportion, so that the new rate holds at once: no burst after a rise, no standstill after a fall.
"""

from __future__ import annotations

from typing import Final

_NEGLIGIBLE: Final = 1e-6


class Bucket:
    """`rate` in units a second, `capacity` in units; times are seconds of a monotonic clock."""

    __slots__ = ("_charged", "_drained", "_now_s", "capacity", "rate")

    def __init__(self, rate: float, capacity: float, now_s: float, *, is_full: bool = False) -> None:
        """`is_full`: as after long use, so that nothing goes ahead on credit."""
        self.rate = rate
        self.capacity = capacity
        self._charged = capacity if is_full else 0.0
        self._drained = 0.0
        self._now_s = now_s

    @property
    def level(self) -> float:
        """What is charged and not worked off, as of the last call."""
        return self._charged - self._drained

    def charge(self, amount: float, now_s: float) -> float:
        """Put work at the end of the line; the ticket."""
        self._drain(now_s)
        self._charged += amount
        return self._charged

    def wait_s(self, ticket: float, amount: float, now_s: float) -> float:
        """Seconds until the charge with this ticket may go ahead, 0.0 for now; the rate may change meanwhile."""
        self._drain(now_s)
        ahead = ticket - self._drained - max(self.capacity, amount)
        return ahead / self.rate if ahead > _NEGLIGIBLE else 0.0

    def change(self, rate: float, capacity: float, now_s: float) -> None:
        """From now on another rate and capacity."""
        self._drain(now_s)
        waiting = max(self.level - self.capacity, 0.0)
        filled = (self.level - waiting) / self.capacity
        self._drained = self._charged - waiting - filled * capacity
        self.rate, self.capacity = rate, capacity

    def _drain(self, now_s: float) -> None:
        if now_s > self._now_s:
            self._drained = min(self._charged, self._drained + self.rate * (now_s - self._now_s))
            self._now_s = now_s
