"""The block allocation table (BAT).

Spec: "Block Allocation Table and Data Blocks": one u32 for each block, the absolute sector number of its bitmap;
0xFFFFFFFF means not allocated; padded to a sector with ff.

Kept as `array("I")` in the machine's byte order; `byteswap` turns a million entries in 0.3 ms.
"""

from __future__ import annotations

import os
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import islice, pairwise, repeat
from operator import lt, sub
from typing import Final

from mullion.base.units import MIB, SECTOR_BYTES

UNALLOCATED: Final = 0xFFFF_FFFF
ENTRY_BYTES: Final = 4
ENTRIES_PER_SECTOR: Final = SECTOR_BYTES // ENTRY_BYTES
MAX_BAT_BYTES: Final = 16 * MIB
MAX_BAT_ENTRIES: Final = MAX_BAT_BYTES // ENTRY_BYTES
"""More is refused; enough for 2040 GiB in blocks of 512 KiB."""

_NATIVE_IS_BIG: Final = sys.byteorder == "big"
_SCAN_ENTRIES: Final = 4096
_SORT_ENTRIES: Final = 1 << 18
_WINDOW_ENTRIES: Final = 1 << 14
_SKIP_ENTRIES: Final = 512
_BLANK: Final = array("I", [UNALLOCATED]) * _SCAN_ENTRIES


def load(fd: int, offset: int, entries: int) -> array[int] | None:
    """Read a BAT; None when the file ends before it does. The caller has bounded `entries`."""
    table = array("I", (0,)) * entries
    # Straight into the table: bytes on the way would leave holes of its size in the heap, for each file of a chain.
    if entries and os.preadv(fd, (table,), offset) != entries * ENTRY_BYTES:
        return None
    if not _NATIVE_IS_BIG:
        table.byteswap()
    return table


def raw_sector(table: array[int], index: int) -> bytes:
    """The BAT's sector `index` as it lies in the file; the last one without what follows the table."""
    part = table[index * ENTRIES_PER_SECTOR : (index + 1) * ENTRIES_PER_SECTOR]
    if not _NATIVE_IS_BIG:
        part.byteswap()
    return part.tobytes()


def next_allocated(table: array[int], index: int) -> int:
    """The first allocated block from `index` on, or the number of blocks when there is none."""
    end = len(table)
    while index < end:
        part = table[index : index + _SCAN_ENTRIES]
        blank = _BLANK if len(part) == _SCAN_ENTRIES else _BLANK[: len(part)]
        if part != blank:
            return next(index + i for i, entry in enumerate(part) if entry != UNALLOCATED)
        index += len(part)
    return end


def last_start(table: array[int]) -> int | None:
    """The highest entry of an allocated block, None when there is none."""
    found = -1
    for index in range(0, len(table), _SCAN_ENTRIES):
        part = table[index : index + _SCAN_ENTRIES]
        if part.count(UNALLOCATED) < len(part):
            highest = max(entry for entry in part if entry != UNALLOCATED)
            found = max(found, highest)
    return None if found < 0 else found


def allocated_starts(table: array[int]) -> array[int]:
    """The entries of all allocated blocks, ascending.

    Stretches without any are skipped at the speed of memory: most of a child's BAT is blank. The rest is sorted
    piece by piece: a Python list of 4 Mi numbers would take 150 MB.
    """
    pieces: list[array[int]] = []
    for begin in range(0, len(table), _SORT_ENTRIES):
        used = array("I")
        end = min(begin + _SORT_ENTRIES, len(table))
        for index in range(begin, end, _SKIP_ENTRIES):
            part = table[index : min(index + _SKIP_ENTRIES, end)]
            if part != _BLANK[: len(part)]:
                used.extend(part)
        if used:
            ascending = sorted(used)
            pieces.append(array("I", ascending[: bisect_left(ascending, UNALLOCATED)]))
    return _merge(pieces)


def find_bad_starts(
    starts: array[int], span_sectors: int, end_sector: int, metadata: Sequence[tuple[int, int]]
) -> array[int]:
    """Those of the ascending `starts` whose block collides with another, with metadata, or has no room for its bitmap.

    `metadata` are ranges in bytes, (start, end). A block is `span_sectors` long with its bitmap; one that begins at
    `end_sector` or later lies past the end. What is wrong by itself does not make its neighbour wrong.
    """
    past = bisect_left(starts, max(0, end_sector))
    bad = [starts[past:]]
    rest = starts if past == len(starts) else starts[:past]
    for begin, end in metadata:
        low = bisect_left(rest, begin // SECTOR_BYTES - span_sectors + 1)
        high = bisect_left(rest, -(-end // SECTOR_BYTES))
        if low < high:
            bad.append(rest[low:high])
            rest = rest[:low] + rest[high:]
    if any(map(lt, map(sub, islice(rest, 1, None), rest), repeat(span_sectors))):
        colliding = array("I")
        for first, second in pairwise(rest):
            if second - first < span_sectors:
                if not colliding or colliding[-1] != first:
                    colliding.append(first)
                colliding.append(second)
        bad.append(colliding)
    return _merge([part for part in bad if part])


def _merge(pieces: Sequence[array[int]]) -> array[int]:
    """One ascending array of several.

    In windows between values that occur: `sorted` merges the ascending parts of a window at machine speed, and a window
    is bounded, so that no more than a few numbers are Python objects at a time.
    """
    if len(pieces) == 1:
        return pieces[0]
    merged = array("I")
    marks = sorted({piece[index] for piece in pieces for index in range(0, len(piece), _WINDOW_ENTRIES)})
    at = [0] * len(pieces)
    for mark, following in pairwise([*marks, UNALLOCATED + 1]):
        same = 0
        window: list[int] = []
        for number, piece in enumerate(pieces):
            first = bisect_right(piece, mark, at[number])
            same += first - at[number]
            at[number] = bisect_left(piece, following, first)
            window += piece[first : at[number]]
        for count in range(same, 0, -_WINDOW_ENTRIES):
            merged.extend(array("I", [mark]) * min(count, _WINDOW_ENTRIES))
        window.sort()
        merged.extend(array("I", window))
    return merged
