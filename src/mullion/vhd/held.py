"""Which sectors some layers of a chain hold: what may differ between two points of a disk's history.

Nothing is compared: exact to the sector of the layers' bitmaps, and a sector that was written again with the same
content counts. A layer that is shorter than what lies below hides the rest of it, which counts as held, too.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Sequence
from typing import Final

from mullion.base.units import MIB, SECTOR_BYTES
from mullion.vhd import bat as bat_table
from mullion.vhd import bitmap
from mullion.vhd.chain import Chain
from mullion.vhd.image import Image
from mullion.vhd.layout import DiskType

_LEAST_WINDOW_BYTES: Final = 2 * MIB

Range = tuple[int, int]
"""Begin and end, in bytes."""


class HeldSectors:
    """The sectors that some layers, top first, hold above the file `below` them (None: nothing is)."""

    def __init__(self, layers: Sequence[Image], below: Image | None, size_bytes: int) -> None:
        self._layers = tuple(layers)
        self._below_bytes = 0 if below is None else below.size_bytes
        self._size_bytes = size_bytes
        self._shortest_bytes = min((image.size_bytes for image in layers), default=size_bytes)
        self._window_bytes = max([_LEAST_WINDOW_BYTES, *(image.block_bytes for image in layers)])

    def ranges(self, offset: int, end: int) -> Iterator[Range]:
        """What is held from the offset on, ascending, inside the size; neighbours may touch. Raises: OSError."""
        end = min(end, self._size_bytes)
        if self._layers and self._layers[-1].header is None:  # a fixed disk has every sector
            whole = min(end, self._layers[-1].size_bytes)
            if offset < whole:
                yield offset, whole
            return
        window = self._window_bytes
        start = offset // window * window
        while start < end:
            sectors = min(window, self._size_bytes - start) // SECTOR_BYTES
            for first, count in bitmap.set_runs(self._held(start, sectors), sectors):
                begin = max(offset, start + first * SECTOR_BYTES)
                stop = min(end, start + (first + count) * SECTOR_BYTES)
                if begin < stop:
                    yield begin, stop
            start += window
            if start <= min(self._size_bytes, self._shortest_bytes):
                start = max(start, self._next_held(start) // window * window)

    def _next_held(self, offset: int) -> int:
        """The first byte from the offset on that is in an allocated block of any layer, or where the shortest ends."""
        found = self._shortest_bytes
        for image in self._layers:
            block = bat_table.next_allocated(image.bat, min(len(image.bat), offset // image.block_bytes))
            found = min(found, max(offset, block * image.block_bytes))
        return found

    def _held(self, offset: int, sectors: int) -> int:
        """Which sectors of a window the layers hold, or hide from what lies below because one of them is shorter."""
        held = 0
        visible = bitmap.mask(0, sectors, sectors)
        for image in self._layers:
            inside = max(0, min(sectors, (image.size_bytes - offset) // SECTOR_BYTES))
            visible &= bitmap.mask(0, inside, sectors)
            held |= _own(image, offset, sectors) & visible
        hidden = max(0, min(sectors, (self._below_bytes - offset) // SECTOR_BYTES))
        return held | (bitmap.mask(0, hidden, sectors) & ~visible)


def _own(image: Image, offset: int, sectors: int) -> int:
    """Which sectors of a window are in this file."""
    own = 0
    per_block = image.block_bytes // SECTOR_BYTES
    first = offset // image.block_bytes
    for block in range(first, min(len(image.bat), first + max(1, sectors // per_block + 1))):
        start = image.block_start(block)
        place = block * per_block - offset // SECTOR_BYTES
        if start is None or place >= sectors:
            continue
        bits = bitmap.mask(0, per_block, per_block)
        if image.kind is DiskType.DIFFERENCING:
            bits = image.read_bits(start, 0, per_block)
        shift = sectors - place - per_block
        own |= bits << shift if shift >= 0 else bits >> -shift
    return own


class ChangedSince:
    """Where a disk may differ from an older, or another, point of its history: two chains with files in common.

    What the layers of either chain above their first common file hold; all of the disk when they have none in common;
    and what lies past the end of the other. The chains stay the caller's, and open.
    """

    def __init__(self, chain: Chain, since: Chain) -> None:
        self._size_bytes = chain.size_bytes
        self._since_bytes = since.size_bytes
        ours, theirs = _above_common(chain.images, since.images)
        self._parts = []
        if ours == len(chain.images):  # nothing in common
            self._since_bytes = 0
            return
        for images, depth in ((chain.images, ours), (since.images, theirs)):
            self._parts.append(HeldSectors(images[:depth], images[depth], chain.size_bytes))

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """The range in order, without gaps: (length in bytes, whether it may have changed). Raises: OSError."""
        end = offset + length
        for begin, stop in heapq.merge(*self._ranges(offset, end)):
            if stop <= offset:
                continue
            if begin > offset:
                yield begin - offset, False
                offset = begin
            yield stop - offset, True
            offset = stop
        if offset < end:
            yield end - offset, False

    def _ranges(self, offset: int, end: int) -> Iterator[Iterator[Range]]:
        for part in self._parts:
            yield part.ranges(offset, end)
        past = max(offset, self._since_bytes)
        if past < end:
            yield iter([(past, end)])


def _above_common(ours: Sequence[Image], theirs: Sequence[Image]) -> tuple[int, int]:
    """How many files of each chain lie above the first that both have."""
    identities = [_identity(image) for image in theirs]
    for depth, image in enumerate(ours):
        if (identity := _identity(image)) in identities:
            return depth, identities.index(identity)
    return len(ours), len(theirs)


def _identity(image: Image) -> tuple[int, int]:
    found = os.fstat(image.fd)
    return found.st_dev, found.st_ino
