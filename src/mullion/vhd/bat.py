"""The block allocation table (BAT).

Spec: "Block Allocation Table and Data Blocks": one u32 for each block, the absolute sector number of its bitmap;
0xFFFFFFFF means not allocated; padded to a sector with ff.

Kept in pages, and all pages without an allocated block are the same one: a chain of 256 disks of 127 GiB would take
64 MB otherwise, for tables that are nearly all blank. Pages are `array("I")` in the machine's byte order, which
compares, sorts and swaps bytes at the speed of memory.
"""

from __future__ import annotations

import os
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise, repeat
from operator import lt, sub
from typing import Final, Self, overload

from mullion.base.units import KIB, MIB, SECTOR_BYTES

UNALLOCATED: Final = 0xFFFF_FFFF
ENTRY_BYTES: Final = 4
ENTRIES_PER_SECTOR: Final = SECTOR_BYTES // ENTRY_BYTES
MAX_BAT_BYTES: Final = 16 * MIB
MAX_BAT_ENTRIES: Final = MAX_BAT_BYTES // ENTRY_BYTES
"""More is refused; enough for 2040 GiB in blocks of 512 KiB."""

_NATIVE_IS_BIG: Final = sys.byteorder == "big"
_PAGE_SHIFT: Final = 9
_PAGE_ENTRIES: Final = 1 << _PAGE_SHIFT
"""A page stands for 1 GiB in blocks of 2 MiB: few are in use where a child holds a few changes."""
_PAGE_BYTES: Final = _PAGE_ENTRIES * ENTRY_BYTES
_READ_BYTES: Final = 64 * KIB
_SORT_PAGES: Final = 256
_SKIP_ENTRIES: Final = 64
_WINDOW_ENTRIES: Final = 1 << 12
_BLANK: Final = array("I", [UNALLOCATED]) * _PAGE_ENTRIES
"""The page of all stretches without a block, in every table: never written to."""
_BLANK_STRETCH: Final = _BLANK[:_SKIP_ENTRIES]
_BLANK_PAGE: Final = _BLANK.tobytes()
_BLANK_BYTES: Final = b"\xff" * _READ_BYTES


class Bat:
    """A BAT in memory: a sequence of entries, of which a slice is an `array("I")`.

    Threads: entries may be read by anyone while one thread sets them.
    """

    __slots__ = ("_entries", "_pages")

    def __init__(self, entries: Iterable[int] = ()) -> None:
        given = array("I", entries)
        self._entries = len(given)
        self._pages = [_full(given[at : at + _PAGE_ENTRIES]) for at in range(0, len(given), _PAGE_ENTRIES)]

    @classmethod
    def blank(cls, entries: int) -> Self:
        """A table without an allocated block."""
        return cls._of_pages([_BLANK] * -(-entries // _PAGE_ENTRIES), entries)

    @classmethod
    def _of_pages(cls, pages: list[array[int]], entries: int) -> Self:
        table = cls()
        table._pages, table._entries = pages, entries
        return table

    def __len__(self) -> int:
        return self._entries

    def __iter__(self) -> Iterator[int]:
        return islice(chain.from_iterable(self._pages), self._entries)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice[int | None, int | None, None]) -> array[int]: ...

    def __getitem__(self, index: int | slice[int | None, int | None, None]) -> int | array[int]:
        if isinstance(index, int):
            if not 0 <= index < self._entries:
                raise IndexError(index)
            return self._pages[index >> _PAGE_SHIFT][index & _PAGE_ENTRIES - 1]
        begin, end, _ = index.indices(self._entries)
        found = array("I")
        while begin < end:
            within = begin & _PAGE_ENTRIES - 1
            part = self._pages[begin >> _PAGE_SHIFT][within : within + end - begin]
            found += part
            begin += len(part)
        return found

    def __setitem__(self, index: int, entry: int) -> None:
        if not 0 <= index < self._entries:
            raise IndexError(index)
        page = self._pages[index >> _PAGE_SHIFT]
        if page is _BLANK:
            page = _BLANK[:]
            self._pages[index >> _PAGE_SHIFT] = page
        page[index & _PAGE_ENTRIES - 1] = entry

    def shorten(self, entries: int) -> None:
        """Drop the entries from that number on."""
        del self._pages[-(-entries // _PAGE_ENTRIES) :]
        self._entries = min(self._entries, entries)
        rest = self._entries % _PAGE_ENTRIES
        if rest:  # behind the last entry a page is blank
            self._pages[-1] = _full(self._pages[-1][:rest])

    def used_pages(self, index: int = 0) -> Iterator[tuple[int, array[int]]]:
        """The pages that may hold allocated blocks, from that of entry `index` on: (number of the first entry, page).

        They are not to be changed. The last one goes on behind the table, without a block.
        """
        for number in range(index >> _PAGE_SHIFT, len(self._pages)):
            page = self._pages[number]
            if page is not _BLANK:
                yield number << _PAGE_SHIFT, page

    def count_allocated(self) -> int:
        """How many blocks are allocated."""
        return sum(_PAGE_ENTRIES - page.count(UNALLOCATED) for _, page in self.used_pages())


def _full(part: array[int]) -> array[int]:
    """A page that begins with these entries."""
    blank = _BLANK[: len(part)]
    return _BLANK if part == blank else part + _BLANK[len(part) :]


def load(fd: int, offset: int, entries: int) -> Bat | None:
    """Read a BAT; None when the file ends before it does. The caller has bounded `entries`."""
    pages: list[array[int]] = []
    end = offset + entries * ENTRY_BYTES
    for at in range(offset, end, _READ_BYTES):
        raw = os.pread(fd, min(_READ_BYTES, end - at), at)
        if len(raw) != min(_READ_BYTES, end - at):
            return None
        if _BLANK_BYTES.startswith(raw):
            pages += [_BLANK] * -(-len(raw) // _PAGE_BYTES)
        else:
            parts = (raw[begin : begin + _PAGE_BYTES] for begin in range(0, len(raw), _PAGE_BYTES))
            pages += [_BLANK if part == _BLANK_PAGE else _unpack(part) for part in parts]
    return Bat._of_pages(pages, entries)


def _unpack(raw: bytes) -> array[int]:
    """A page as it lies in the file."""
    page = array("I", raw)
    if not _NATIVE_IS_BIG:
        page.byteswap()
    return page if len(page) == _PAGE_ENTRIES else _full(page)


def raw_sector(table: Bat, index: int) -> bytes:
    """The BAT's sector `index` as it lies in the file; the last one without what follows the table."""
    part = table[index * ENTRIES_PER_SECTOR : (index + 1) * ENTRIES_PER_SECTOR]
    if not _NATIVE_IS_BIG:
        part.byteswap()
    return part.tobytes()


def next_allocated(table: Bat, index: int) -> int:
    """The first allocated block from `index` on, or the number of blocks when there is none."""
    for begin, page in table.used_pages(index):
        first = max(0, index - begin)
        part = page[first:]
        if part != _BLANK[first:]:
            return begin + first + next(i for i, entry in enumerate(part) if entry != UNALLOCATED)
    return len(table)


def last_start(table: Bat) -> int | None:
    """The highest entry of an allocated block, None when there is none."""
    used = (entry for _, page in table.used_pages() for entry in page if entry != UNALLOCATED)
    return max(used, default=None)


def allocated_starts(table: Bat) -> array[int]:
    """The entries of all allocated blocks, ascending.

    Blank stretches are skipped at the speed of memory. The rest is sorted piece by piece: a Python list of 4 Mi numbers
    would take 150 MB.
    """
    pieces: list[array[int]] = []
    pages = (page for _, page in table.used_pages())
    while some := list(islice(pages, _SORT_PAGES)):
        parts = (page[at : at + _SKIP_ENTRIES] for page in some for at in range(0, _PAGE_ENTRIES, _SKIP_ENTRIES))
        ascending = sorted(chain.from_iterable(part for part in parts if part != _BLANK_STRETCH))
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
