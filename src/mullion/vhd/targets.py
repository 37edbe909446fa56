"""The layouts in which a copied disk is written: raw, fixed, dynamic. Pure: says what goes where, writes nothing.

Each is what `create` would make of the same size, with the content in it: block data at multiples of 4 KiB in ascending
order, the sector bitmap right before it and all ones, the BAT exact, the footer in its place.

    raw      data
    fixed    data, footer
    dynamic  footer copy, header 512, BAT 1536 | lead, data | lead, data … | footer

A *lead* is the room between two blocks' data, whole pages of 4 KiB: zeros, then the bitmap. The first block's bitmap
belongs to the page of the BAT's end, so it is written with the structures, last of all.

Invariants: while `is_aligned`, every piece that `place` gives begins and ends at multiples of 4 KiB of the file and of
its buffer, so that it can be written around the page cache.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Final

from mullion.base.block import Buffer
from mullion.base.units import SECTOR_BYTES
from mullion.vhd import bat as bat_table
from mullion.vhd.bitmap import bitmap_bytes
from mullion.vhd.create import BODY_OFFSET, DATA_ALIGNMENT, HEADER_OFFSET, count_blocks, footer_place, new_footer
from mullion.vhd.errors import VhdUnsupportedError
from mullion.vhd.layout import ALL_ONES, FOOTER_BYTES, DiskType, DynamicHeader

PAGE_BYTES: Final = DATA_ALIGNMENT

Piece = tuple[int, Sequence[Buffer]]
"""Offset in the file, and what goes there."""


class Target(ABC):
    """A file that is being filled, in ascending order of the disk's content."""

    size_bytes: int
    """Of the disk, a multiple of 512 for a VHD."""
    is_aligned: bool = True

    @abstractmethod
    def place(self, offset: int, content: memoryview, first: int, end: int) -> Iterator[Piece]:
        """Where `content[first:end]` goes, the data from the disk's byte `offset + first` on.

        `first` and `end` are multiples of 4 KiB. What lies past the disk's end is zeros.
        """

    @abstractmethod
    def close(self) -> Iterator[Piece]:
        """What is written when all data is, in this order; not aligned."""

    @property
    @abstractmethod
    def file_bytes(self) -> int:
        """How long the file is in the end; to be asked after the last `place`."""


class FlatTarget(Target):
    """The content at its own offsets; a fixed VHD has a footer behind it."""

    def __init__(self, size_bytes: int, *, fixed: bool) -> None:
        """Raises: InvalidError for a size that a VHD cannot have."""
        self.size_bytes = size_bytes
        self._footer = new_footer(DiskType.FIXED, size_bytes, ALL_ONES).pack() if fixed else b""
        self._tail: Piece | None = None

    def place(self, offset: int, content: memoryview, first: int, end: int) -> Iterator[Piece]:
        aligned_end = end
        if offset + end > self.size_bytes:  # the footer, or nothing at all, comes right behind an odd end
            aligned_end = (self.size_bytes - offset) // PAGE_BYTES * PAGE_BYTES
            self._tail = offset + aligned_end, [bytes(content[aligned_end : self.size_bytes - offset])]
        if aligned_end > first:
            yield offset + first, [content[first:aligned_end]]

    def close(self) -> Iterator[Piece]:
        if self._tail is not None:
            yield self._tail
        if self._footer:
            yield self.size_bytes, [self._footer]

    @property
    def file_bytes(self) -> int:
        return self.size_bytes + len(self._footer)


class DynamicTarget(Target):
    """Blocks, in the order in which they come."""

    def __init__(self, size_bytes: int, block_bytes: int) -> None:
        """Raises: InvalidError for an impossible size or block size."""
        self.size_bytes = size_bytes
        self._footer = new_footer(DiskType.DYNAMIC, size_bytes, HEADER_OFFSET).pack()
        self._block_bytes = block_bytes
        self._bitmap_bytes = bitmap_bytes(block_bytes)
        self._table = bat_table.Bat.blank(count_blocks(size_bytes, block_bytes))
        self._used = 0
        table_bytes = -(-len(self._table) * bat_table.ENTRY_BYTES // SECTOR_BYTES) * SECTOR_BYTES
        self._body_end = BODY_OFFSET + table_bytes
        self._first_data = _page_up(footer_place(self._body_end) + self._bitmap_bytes)
        lead_bytes = _page_up(self._bitmap_bytes)
        self._lead = memoryview(mmap.mmap(-1, lead_bytes))
        self._lead[lead_bytes - self._bitmap_bytes :] = b"\xff" * self._bitmap_bytes
        self._stride = lead_bytes + _page_up(block_bytes)
        self.is_aligned = block_bytes % PAGE_BYTES == 0

    def place(self, offset: int, content: memoryview, first: int, end: int) -> Iterator[Piece]:
        end = min(end, len(self._table) * self._block_bytes - offset)
        begin, parts = 0, 0
        buffers: list[Buffer] = []
        while first < end:
            block, within = divmod(offset + first, self._block_bytes)
            count = min(end - first, self._block_bytes - within)
            entry = self._table[block]
            is_new = entry == bat_table.UNALLOCATED
            data = self._allocate(block) if is_new else entry * SECTOR_BYTES + self._bitmap_bytes
            if is_new and data != self._first_data:
                if begin + parts != data - len(self._lead):
                    if buffers:
                        yield begin, buffers
                    begin, parts, buffers = data - len(self._lead), 0, []
                buffers.append(self._lead)
                parts += len(self._lead)
            if begin + parts != data + within:
                if buffers:
                    yield begin, buffers
                begin, parts, buffers = data + within, 0, []
            buffers.append(content[first : first + count])
            parts += count
            first += count
        if buffers:
            yield begin, buffers

    def _allocate(self, block: int) -> int:
        """Take the next place for a block; where its data begins."""
        data = self._first_data + self._used * self._stride
        start = (data - self._bitmap_bytes) // SECTOR_BYTES
        if start >= bat_table.UNALLOCATED:
            raise VhdUnsupportedError(
                "the content does not fit into the 2 TiB of file that a BAT can address",
                structure="BAT",
                remedy="Choose blocks of 2M, which waste less room than smaller ones, or a fixed disk (--to fixed).",
            )
        self._table[block] = start
        self._used += 1
        return data

    def close(self) -> Iterator[Piece]:
        header = DynamicHeader(BODY_OFFSET, len(self._table), self._block_bytes)
        entries = b"".join(
            bat_table.raw_sector(self._table, index)
            for index in range(-(-len(self._table) // bat_table.ENTRIES_PER_SECTOR))
        )
        body = [self._footer, header.pack(), entries.ljust(self._body_end - BODY_OFFSET, b"\xff")]
        yield 0, body
        if self._used:
            yield self._first_data - self._bitmap_bytes, [b"\xff" * self._bitmap_bytes]
        yield self.file_bytes - FOOTER_BYTES, [self._footer]

    @property
    def file_bytes(self) -> int:
        end = self._body_end
        if self._used:
            end = self._first_data + (self._used - 1) * self._stride + self._block_bytes
        return footer_place(end) + FOOTER_BYTES


def _page_up(number: int) -> int:
    return -(-number // PAGE_BYTES) * PAGE_BYTES
