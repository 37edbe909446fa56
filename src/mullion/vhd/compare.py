"""Where two disks differ, to the sector, without reading what both have from the same file.

Invariants: what lies past the end of the shorter disk reads as zeros; memory is bounded by `_WINDOW_BYTES`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from mullion.base.progress import Progress, no_progress
from mullion.base.units import KIB, MIB, SECTOR_BYTES
from mullion.vhd.chain import Chain
from mullion.vhd.mapping import NOWHERE

_WINDOW_BYTES: Final = MIB
_STEPS: Final = (MIB, 32 * KIB, 4 * KIB, SECTOR_BYTES)
"""Pieces are compared whole, and only those that differ in smaller ones."""
_PROGRESS_BYTES: Final = 256 * MIB

_Source = tuple[object, int]
"""Which file a byte comes from, None for nowhere; how far that file's offset is from the disk's."""


class Comparison:
    """Two disks that are open and do not change where they are compared."""

    def __init__(self, one: Chain, two: Chain) -> None:
        self._disks = (one, two)
        self._files = [
            {image.fd: (status.st_dev, status.st_ino) for image in chain.images if (status := os.fstat(image.fd))}
            for chain in self._disks
        ]

    def differing(self, offset: int, length: int, progress: Progress = no_progress) -> Iterator[tuple[int, int]]:
        """The ranges of this part of the disks that differ, ascending, as long as they are: (offset, length).

        Raises: VhdDamagedError for what cannot be read; OSError.
        """
        start = end = offset
        for at, count in self._pieces(offset, length, progress):
            if at > end:
                if end > start:
                    yield start, end - start
                start = at
            end = at + count
        if end > start:
            yield start, end - start

    def _pieces(self, offset: int, length: int, progress: Progress) -> Iterator[tuple[int, int]]:
        begin, end = offset, offset + length
        shown = offset
        while offset < end:
            if offset >= shown:
                progress("comparing", offset - begin, length)
                shown = offset + _PROGRESS_BYTES
            stop = min(end, (offset // _WINDOW_BYTES + 1) * _WINDOW_BYTES)
            is_empty = True
            for at, count, first, second in self._sources(offset, stop):
                is_empty = is_empty and first[0] is None and second[0] is None
                if first != second:
                    yield from self._compare(at, count)
            offset = max(stop, min(end, self._next_used(stop))) if is_empty else stop

    def _next_used(self, offset: int) -> int:
        """Before this neither disk has anything."""
        found = [chain.next_used(offset) for chain in self._disks if offset < chain.size_bytes]
        longest = max(chain.size_bytes for chain in self._disks)
        return min((at for at, chain in zip(found, self._disks, strict=False)), default=longest)

    def _sources(self, offset: int, end: int) -> Iterator[tuple[int, int, _Source, _Source]]:
        """A window cut wherever one of the disks goes on in another file or place."""
        lists = [self._cuts(number, offset, end) for number in range(2)]
        while offset < end:
            stop = min(lists[0][0][0], lists[1][0][0])
            yield offset, stop - offset, lists[0][0][1], lists[1][0][1]
            offset = stop
            for cuts in lists:
                if cuts[0][0] == stop:
                    del cuts[0]

    def _cuts(self, number: int, offset: int, end: int) -> list[tuple[int, _Source]]:
        """Where each piece of a window ends, and what it comes from."""
        chain, files = self._disks[number], self._files[number]
        inside = max(offset, min(end, chain.size_bytes))
        cuts: list[tuple[int, _Source]] = []
        for fd, at, length in chain.segments(offset, inside - offset):
            source: _Source = (None, 0) if fd == NOWHERE else (files[fd], at - offset)
            offset += length
            cuts.append((offset, source))
        if offset < end:
            cuts.append((end, (None, 0)))
        return cuts

    def _compare(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        one, two = (bytes(self.read(number, offset, length)) for number in range(2))
        if one != two:
            for at, count in _unequal(one, two, 0, length, 0):
                yield offset + at, count

    def read(self, number: int, offset: int, length: int) -> bytearray:
        """Part of the first (0) or second (1) disk."""
        chain = self._disks[number]
        content = bytearray(length)
        inside = max(0, min(length, chain.size_bytes - offset))
        chain.pread(min(offset, chain.size_bytes), memoryview(content)[:inside])
        return content


def _unequal(one: bytes, two: bytes, begin: int, end: int, level: int) -> Iterator[tuple[int, int]]:
    """The sectors of two unequal buffers that differ, those side by side not joined."""
    step = _STEPS[level]
    for at in range(begin, end, step):
        stop = min(at + step, end)
        if one[at:stop] != two[at:stop]:
            if step == SECTOR_BYTES:
                yield at, stop - at
            else:
                yield from _unequal(one, two, at, stop, level + 1)
