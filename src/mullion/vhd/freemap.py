"""Ranges of a disk that nobody uses, as whoever knows its filesystems found them."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

RANGES_LIMIT: Final = 1 << 22
"""More are left out and count as used: memory must not grow with what a disk says."""


class FreeMap:
    """Free ranges, merged; in two arrays, because a filesystem may have millions of them."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Of (offset, length) in bytes, in any order; they may overlap."""
        self._starts = array("Q")
        self._ends = array("Q")
        late: list[tuple[int, int]] = []
        for offset, length in islice(ranges, RANGES_LIMIT):
            if length <= 0 or offset < 0:
                continue
            if self._starts and offset < self._starts[-1]:
                late.append((offset, length))
            else:
                self._add(offset, offset + length)
        if late:
            known = [(start, end - start) for start, end in zip(self._starts, self._ends, strict=True)]
            self._starts, self._ends = array("Q"), array("Q")
            for offset, length in sorted([*known, *late]):
                self._add(offset, offset + length)

    def _add(self, start: int, end: int) -> None:
        if self._ends and start <= self._ends[-1]:
            self._ends[-1] = max(self._ends[-1], end)
        else:
            self._starts.append(start)
            self._ends.append(end)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def used(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """What of a range is not free: (offset, length)."""
        end = offset + length
        index = max(0, bisect_right(self._starts, offset) - 1)
        while offset < end:
            while index < len(self._starts) and self._ends[index] <= offset:
                index += 1
            start = self._starts[index] if index < len(self._starts) else end
            if start > offset:
                yield offset, min(start, end) - offset
            if start >= end:
                return
            offset = self._ends[index]

    def free(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """What of a range is free: (offset, length)."""
        end = offset + length
        index = max(0, bisect_right(self._starts, offset) - 1)
        while index < len(self._starts) and self._starts[index] < end:
            low, high = max(offset, self._starts[index]), min(end, self._ends[index])
            if low < high:
                yield low, high - low
            index += 1
