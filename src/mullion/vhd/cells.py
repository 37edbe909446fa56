"""When the top of a disk that runs takes over more than was written, so that it does not fall into ever more pieces.

A *cell* is 64 KiB of the disk, aligned, or a granule of the chain where that is less. In each cell the top of a running
disk is to hold nothing, a stretch from the cell's beginning on, or all of it. A write that begins in the midst of what
the files below hold is therefore widened over what the top does not have of that cell. So

- a stream of writes, however short, costs nothing more: it enters each cell at its beginning;
- random writes cost once what they cost in a format with clusters of that size: from then on the cell is overwritten
  in place, no bitmap changes, and a flush has less to write;
- a long read meets two pieces in a cell, where it would meet sixteen.

64 KiB is also the chunk of a backup, and the usual granularity of QEMU's dirty bitmaps. A top that was put on a running
disk takes no more than is written while it is *young*: just after a checkpoint nothing is slower, and the tops that an
online merge puts on, one after the other until one is small, do not grow faster for it.
"""

from __future__ import annotations

from typing import Final

from mullion.base.units import KIB, MIB, SECTOR_BYTES

CELL_BYTES: Final = 64 * KIB
YOUNG_SECTORS: Final = 64 * MIB // SECTOR_BYTES
"""What a new top takes over before it is not young any more."""


def widened(bits: int, sectors: int, first: int, end: int, cell_sectors: int) -> tuple[int, int]:
    """The sectors that a write of `first` to `end` is to take over, in a block that has these `bits` before it.

    `sectors` are those of the block, a multiple of `cell_sectors`, which is a power of two. What is taken over more
    belongs to none of the block's bits, and to the cell in which the write begins.
    """
    cell = first & -cell_sectors
    before = bits >> sectors - first & (1 << first - cell) - 1
    if first == cell or before & 1:
        return first, end
    first = first - (before & -before).bit_length() + 1 if before else cell
    room = cell + cell_sectors - end
    if room > 0:
        behind = bits >> sectors - cell - cell_sectors & (1 << room) - 1
        end += room - behind.bit_length()
    return first, end
