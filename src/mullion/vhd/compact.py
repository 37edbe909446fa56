"""A shorter file for the same disk: blocks of zeros are taken out, the last blocks fill the holes.

A block of a dynamic disk may go when it reads as zeros. One of a differencing disk hides its parent with zeros too, so
it may go only when its bitmap is clear, or, `against_parent`, when it reads the same as the parent. Ranges that the
caller says are `free`, because no filesystem uses them, count as zeros. A fixed disk keeps its length; its runs of
zeros become holes.

Blocks are moved from the end of the file into the lowest holes that take a whole block, so each is moved at most once,
and a moved block never overlaps its old place. Holes shorter than a block stay.

Durability, some blocks at once:

    1  BAT entries of blocks that go: not allocated                   fdatasync: their room is free from here on
    2  bitmap and data to the new place, which nothing points to      fdatasync
    3  BAT entries of the moved blocks, sector by sector old or new   fdatasync: their old room is free from here on
    4  at the end: footer behind the last block, file cut there       fdatasync after each

So an entry points to a whole copy at every instant, and content changes nowhere but in `free` ranges. An interrupted
compaction is a sound disk; running it again goes on.
"""

from __future__ import annotations

import heapq
import itertools
import os
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from mullion.base.block import BlockDevice
from mullion.base.errors import ConflictError
from mullion.base.progress import Progress, no_progress
from mullion.base.units import MIB, SECTOR_BYTES
from mullion.vhd import bat as bat_table
from mullion.vhd import bitmap
from mullion.vhd.batmap import Batmap
from mullion.vhd.chain import Chain
from mullion.vhd.children import find_children
from mullion.vhd.create import DATA_ALIGNMENT, footer_place
from mullion.vhd.fileio import SYSTEM, FileIO
from mullion.vhd.freemap import FreeMap
from mullion.vhd.header_switch import Piece, end_file, is_away, switch_header
from mullion.vhd.image import Image, open_file
from mullion.vhd.layout import DiskType
from mullion.vhd.offline import open_for_change
from mullion.vhd.structures import bat_end
from mullion.vhd.zeros import UNIT_BYTES, file_runs, is_zero

FindFree = Callable[[BlockDevice], Iterable[tuple[int, int]]]
"""Finds the ranges of a disk that nobody uses; reads it only."""

_BATCH_BYTES: Final = 64 * MIB
_BATCH_BLOCKS: Final = 4096
_PROGRESS_BYTES: Final = 64 * MIB
_STAT_BLOCK_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class Compacted:
    """What a compaction did; the room is what the file takes on its filesystem."""

    path: str
    old_file_bytes: int
    file_bytes: int
    old_room_bytes: int
    room_bytes: int
    blocks_removed: int
    blocks_moved: int


def compact(
    path: str,
    *,
    free: Iterable[tuple[int, int]] = (),
    find_free: FindFree | None = None,
    against_parent: bool = False,
    force: bool = False,
    allowed_dirs: Sequence[str] | None = None,
    progress: Progress = no_progress,
    file_io: FileIO = SYSTEM,
) -> Compacted:
    """Make the file of a disk as short as its content allows.

    `free` are ranges of the disk, (offset, length) in bytes, whose content nobody needs; `find_free` finds more, once
    the disk is open and nobody else can write. That changes what other disks see that were made on this one, so it
    needs `force` then. Raises: ConflictError; what opening for writing raises, of the parents only with `find_free` and
    `against_parent`; what `find_free` raises; OSError.
    """
    before = _status(path)  # opening gives back what an interrupted write had taken
    with open_for_change(
        path,
        holder="mullion vhd compact",
        file_io=file_io,
        with_parents=against_parent or find_free is not None,
        allowed_dirs=allowed_dirs,
    ) as chain:
        image = chain.images[0]
        unused = FreeMap(itertools.chain(free, find_free(chain) if find_free is not None else ()))
        if unused and not force and (child := next(find_children(path, chain.unique_id), None)):
            raise ConflictError(
                f"{path} is the parent of {child}: its free space must not change",
                remedy="Compact the child; or this disk without --free-space, which changes no content.",
                path=path,
            )
        if image.header is None:
            removed, moved = 0, 0
            _punch(image, unused, progress, file_io)
        else:
            parent = _parent_of(chain.images) if against_parent else None
            removed, moved = _Compaction(image, parent, unused, progress, file_io).run()
        after = os.fstat(image.fd)
        return Compacted(
            path,
            before.st_size,
            after.st_size,
            before.st_blocks * _STAT_BLOCK_BYTES,
            after.st_blocks * _STAT_BLOCK_BYTES,
            removed,
            moved,
        )


def _status(path: str) -> os.stat_result:
    fd = open_file(path)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _parent_of(images: list[Image]) -> Chain | None:
    """What lies below the top, for reading; the descriptors stay those of the chain."""
    if len(images) == 1:
        return None
    return Chain(images[1:], read_only=True, pending_path=None, holder="", file_io=SYSTEM)


def _punch(image: Image, unused: FreeMap, progress: Progress, file_io: FileIO) -> None:
    """Make holes of a fixed disk's zeros, and of what nobody uses."""
    size, shown = image.size_bytes, 0
    for offset, length, is_zeros in file_runs(image.fd, 0, size):
        if offset >= shown:
            progress("looking for zeros", offset, size)
            shown = offset + _PROGRESS_BYTES
        if is_zeros:
            file_io.discard(image.fd, offset, length)
        else:
            for at, count in unused.free(offset, length):
                start, end = -(-at // UNIT_BYTES) * UNIT_BYTES, (at + count) // UNIT_BYTES * UNIT_BYTES
                if start < end:
                    file_io.discard(image.fd, start, end - start)
    file_io.sync_file(image.fd)


class _Compaction:
    """One run over a dynamic or differencing disk."""

    def __init__(
        self, image: Image, parent: Chain | None, unused: FreeMap, progress: Progress, file_io: FileIO
    ) -> None:
        self._image = image
        self._parent = parent
        self._unused = unused
        self._progress = progress
        self._io = file_io
        self._sectors = image.block_bytes // SECTOR_BYTES

    def run(self) -> tuple[int, int]:
        """Blocks removed, blocks moved."""
        removed = self._remove()
        moved = self._fill()
        while self._lower_table():
            moved += self._fill()
        image = self._image
        if is_away(image) and image.header is not None:
            switch_header(image, image.footer, image.header, self._io)
        if footer_place(image.data_end()) < image.footer_offset:
            end_file(image, self._io)
        return removed, moved

    # ------------------------------------------------------------------ blocks that go

    def _remove(self) -> int:
        image = self._image
        starts, blocks = self._by_place()
        gone = array("I")
        for number, (entry, block) in enumerate(zip(starts, blocks, strict=True)):
            if number * image.block_bytes % _PROGRESS_BYTES == 0:
                self._progress("looking for zeros", number * image.block_bytes, len(starts) * image.block_bytes)
            if self._may_go(block, entry * SECTOR_BYTES):
                gone.append(block)
        if gone:
            batmap = Batmap.load(image)
            if batmap is not None:
                for offset, raw in batmap.without(gone).pieces():
                    self._io.write_all(image.fd, [raw], offset)
                self._io.sync_file(image.fd)
            for block in gone:
                image.bat[block] = bat_table.UNALLOCATED
            self._write_entries(gone)
        return len(gone)

    def _may_go(self, block: int, start: int) -> bool:
        """Would nobody see that a block is not there?"""
        image = self._image
        disk_offset = block * image.block_bytes
        here = min(image.block_bytes, image.size_bytes - disk_offset)
        if image.kind is DiskType.DYNAMIC:
            data = start + image.bitmap_bytes - disk_offset
            return all(is_zero(image.fd, data + at, count) for at, count in self._unused.used(disk_offset, here))
        bits = image.read_bits(start, 0, self._sectors) & bitmap.mask(0, here // SECTOR_BYTES, self._sectors)
        if bits and self._unused:
            used = 0
            for at, count in self._unused.used(disk_offset, here):
                first = (at - disk_offset) // SECTOR_BYTES
                end = -(-(at + count - disk_offset) // SECTOR_BYTES)
                used |= bitmap.mask(first, end - first, self._sectors)
            bits &= used
        return not bits or (self._parent is not None and self._is_as_parent(disk_offset, start, bits))

    def _is_as_parent(self, disk_offset: int, start: int, bits: int) -> bool:
        """Does the parent read the same in those sectors?"""
        assert self._parent is not None
        for first, count in bitmap.set_runs(bits, self._sectors):
            for sector in range(first, first + count, MIB // SECTOR_BYTES):
                length = min(first + count - sector, MIB // SECTOR_BYTES) * SECTOR_BYTES
                within = sector * SECTOR_BYTES
                own = os.pread(self._image.fd, length, start + self._image.bitmap_bytes + within)
                theirs = bytearray(length)
                readable = min(length, self._parent.size_bytes - disk_offset - within)
                if readable > 0:  # past the parent's end it reads zeros
                    self._parent.pread(disk_offset + within, memoryview(theirs)[:readable])
                if own != theirs:
                    return False
        return True

    # ------------------------------------------------------------------ blocks that move

    def _fill(self) -> int:
        """Move blocks from the end into holes; returns how many."""
        image = self._image
        starts, blocks = self._by_place()
        moves = (
            (slot, entry * SECTOR_BYTES, block)
            for slot, entry, block in zip(self._slots(starts), reversed(starts), reversed(blocks), strict=False)
        )
        at_once = max(1, min(_BATCH_BLOCKS, _BATCH_BYTES // image.span_bytes))
        moved = 0
        while batch := [move for move in itertools.islice(moves, at_once) if move[0] < move[1]]:
            self._progress("moving blocks", moved * image.block_bytes, len(starts) * image.block_bytes)
            for slot, start, _ in batch:
                self._copy(start, slot)
            self._io.sync_file(image.fd)
            for slot, _, block in batch:
                image.bat[block] = slot // SECTOR_BYTES
            self._write_entries(block for _, _, block in batch)
            moved += len(batch)
        return moved

    def _slots(self, starts: array[int]) -> Iterator[int]:
        """Places for whole blocks in the holes of the file, ascending."""
        image = self._image
        span = image.span_bytes
        stride = -(-span // DATA_ALIGNMENT) * DATA_ALIGNMENT
        for begin, end in self._holes(starts):
            count = (end - begin) // span
            aligned = -(-(begin + image.bitmap_bytes) // DATA_ALIGNMENT) * DATA_ALIGNMENT - image.bitmap_bytes
            if count and aligned + (count - 1) * stride + span <= end:
                yield from range(aligned, aligned + count * stride, stride)
            else:  # packed as the file's maker had it
                yield from range(begin, begin + count * span, span)

    def _holes(self, starts: array[int]) -> Iterator[tuple[int, int]]:
        """Room between structures that belongs to nothing, in whole sectors: (start, end), ascending."""
        image = self._image
        blocks = ((entry * SECTOR_BYTES, entry * SECTOR_BYTES + image.span_bytes) for entry in starts)
        at = 0
        for start, end in heapq.merge(sorted([*image.metadata, (0, image.claimed_end)]), blocks):
            begin = -(-at // SECTOR_BYTES) * SECTOR_BYTES
            if start > begin:
                yield begin, start
            at = max(at, end)

    def _copy(self, source: int, target: int) -> None:
        """A block with its bitmap to another place; runs of zeros become holes."""
        image = self._image
        raw = os.pread(image.fd, image.bitmap_bytes, source)
        self._io.write_all(image.fd, [raw], target)
        source, target = source + image.bitmap_bytes, target + image.bitmap_bytes
        for at, length, is_zeros in file_runs(image.fd, source, image.block_bytes):
            if is_zeros:
                self._io.write_zeros(image.fd, target + at - source, length)
            else:
                self._io.copy_range(image.fd, at, image.fd, target + at - source, length)

    # ------------------------------------------------------------------ the table

    def _lower_table(self) -> bool:
        """Bring a BAT that a growth has put behind blocks down into a hole; True when it moved."""
        image = self._image
        header = image.header
        assert header is not None
        starts, _ = self._by_place()
        if not starts or starts[0] * SECTOR_BYTES > header.bat_offset:
            return False
        batmap = Batmap.load(image)
        table_bytes = bat_end(header) - header.bat_offset
        needed = table_bytes + (SECTOR_BYTES + len(batmap.bits) if batmap else 0)
        hole = next((begin for begin, end in self._holes(starts) if end - begin >= needed), None)
        if hole is None or hole > header.bat_offset:
            return False
        raw = b"".join(
            bat_table.raw_sector(image.bat, index)
            for index in range(-(-len(image.bat) // bat_table.ENTRIES_PER_SECTOR))
        )
        pieces: list[Piece] = [(hole, raw.ljust(table_bytes, b"\xff"))]
        if batmap is not None:
            pieces += batmap.moved(hole + table_bytes, len(batmap.bits) * 8).pieces()
        switch_header(image, image.footer, replace(header, bat_offset=hole), self._io, pieces=pieces)
        return True

    def _by_place(self) -> tuple[array[int], array[int]]:
        """The allocated blocks in the order in which they lie in the file: their entries, their numbers."""
        table = self._image.bat
        starts = bat_table.allocated_starts(table)
        blocks = array("I", bytes(4 * len(starts)))
        for block, entry in enumerate(table):
            if entry != bat_table.UNALLOCATED:
                blocks[bisect_left(starts, entry)] = block
        return starts, blocks

    def _write_entries(self, blocks: Iterable[int]) -> None:
        """Write the BAT's sectors with these blocks, durably: each is old or new at every instant."""
        image = self._image
        assert image.header is not None
        for index in sorted({block // bat_table.ENTRIES_PER_SECTOR for block in blocks}):
            raw = bat_table.raw_sector(image.bat, index)
            self._io.write_all(image.fd, [raw], image.header.bat_offset + index * SECTOR_BYTES)
        self._io.sync_file(image.fd)
