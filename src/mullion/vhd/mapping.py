"""Where each byte of a chain lies: the chain flattened lazily.

The disk is divided into *granules* (the smallest block of the chain, at most 2 MiB). On first touch a granule is
resolved to one of three things:

    direct   all of it lies in one piece in one file: `direct_read`, and `direct_write` where that file is the top and
             nothing but the data changes when it is written
    zero     no file has any of it
    mixed    sectors come from several files: an owner map (see `bitmap`), 512 bytes or 4 KiB, in a bounded cache

so that the cost of a read does not depend on the depth of the chain.

Threads: `direct_read`, `direct_write` and `mixed` may be looked up by anyone at any time without a lock; what is found
is valid for a request that starts after it was found. A lock guards all changes, held for microseconds. Whoever changes
what a file holds calls `forget_block` or `forget_sectors` before the change is acknowledged.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping as Table
from typing import Final

from mullion.base.units import MIB, SECTOR_BYTES
from mullion.vhd import bat, bitmap
from mullion.vhd.image import FIXED_GRANULE_BYTES, Image
from mullion.vhd.layout import DiskType
from mullion.vhd.top import TopWriter

DIRECT_LIMIT: Final = 16384
"""Entries of `direct_read` and of `direct_write`: 32 GiB each in granules of 2 MiB."""
NOWHERE: Final = -1
"""The descriptor of zeros."""

_ZERO_LIMIT: Final = 65536
_MIXED_BYTES: Final = 2 * MIB

Place = tuple[int, int]
"""File descriptor, offset in that file of where the granule begins."""
Segment = tuple[int, int, int]
"""File descriptor or `NOWHERE`, offset in the file, length."""
Level = tuple[bytes, int, tuple[Place | None, ...]]
"""Owner map, log2 of the bytes of a unit, place of each owner (of nobody, 0: None).

A second level has what the first says nobody owns; it exists only where a granule has more than 255 owners.
"""


class Mapping:
    """The map of a chain of open files, top first; `writer` when the top can be written and has blocks.

    `lower_writers` are those of other files, by descriptor, whose bitmaps are not all in the file yet.
    """

    def __init__(
        self,
        images: list[Image],
        writer: TopWriter | None,
        *,
        read_only: bool,
        lower_writers: Table[int, TopWriter] | None = None,
    ) -> None:
        blocks = [image.block_bytes for image in images if image.header is not None]
        self.shift = min([FIXED_GRANULE_BYTES, *blocks]).bit_length() - 1
        self.granule_bytes = 1 << self.shift
        self.direct_read: dict[int, Place] = {}
        self.direct_write: dict[int, Place] = {}
        self.mixed: OrderedDict[int, tuple[Level, ...]] = OrderedDict()
        self.used: set[int] = set()
        """Mixed granules that were read since they were last up for eviction; added to without a lock."""
        self._zero: set[int] = set()
        self._mixed_limit = max(8, _MIXED_BYTES * SECTOR_BYTES // self.granule_bytes)
        self._images = images
        self._top = images[0]
        self._size = images[0].size_bytes
        self._writers = dict(lower_writers or {})
        if writer is not None:
            self._writers[images[0].fd] = writer
        self._read_only = read_only
        self._lock = threading.Lock()

    def segments(self, offset: int, length: int) -> list[Segment]:
        """Where a range lies: as few pieces as the files allow."""
        found: list[Segment] = []
        end = offset + length
        while offset < end:
            within = offset & (self.granule_bytes - 1)
            count = min(end - offset, self.granule_bytes - within)
            levels = self.resolve(offset >> self.shift)
            if levels is None:
                _add(found, NOWHERE, 0, count)
            elif isinstance(levels[0], int):
                _add(found, levels[0], levels[1] + within, count)
            else:
                _split_mixed(levels, 0, within, within + count, found)
            offset += count
        return found

    def resolve(self, granule: int) -> tuple[Level, ...] | Place | None:
        """What a granule is: a place when it is direct, levels when it is mixed, None when it is zero."""
        place = self.direct_read.get(granule)
        if place is not None:
            return place
        with self._lock:
            mixed = self.mixed.get(granule)
            if mixed is not None:
                self.used.add(granule)
                return mixed
            if granule in self._zero:
                return None
            masks, places, sectors = self._owners(granule)
            if not masks:
                if len(self._zero) >= _ZERO_LIMIT:
                    self._zero.clear()
                self._zero.add(granule)
                return None
            if len(masks) == 1 and masks[0] == (1 << sectors) - 1 and self._is_inside_file(places[0], sectors):
                self._keep_direct(granule, places[0])
                return places[0]
            levels: list[Level] = []
            for begin in range(0, len(masks), bitmap.MAX_OWNERS):
                owners, unit = bitmap.owner_map(masks[begin : begin + bitmap.MAX_OWNERS], sectors)
                unit_shift = (unit * SECTOR_BYTES).bit_length() - 1
                levels.append((owners, unit_shift, (None, *places[begin : begin + bitmap.MAX_OWNERS])))
            self._keep_mixed(granule, tuple(levels))
            return tuple(levels)

    def keep_top(self, granule: int, offset: int) -> Place:
        """All of a granule lies in the top, in one piece from byte `offset` on."""
        place = (self._top.fd, offset)
        with self._lock:
            self._keep_direct(granule, place)
            self.mixed.pop(granule, None)
            self.used.discard(granule)
        return place

    def forget_block(self, block: int) -> None:
        """A block of a dynamic top was allocated: it is not zero any more."""
        per_block = self._top.block_bytes >> self.shift
        with self._lock:
            self._zero.difference_update(range(block * per_block, (block + 1) * per_block))

    def forget_sectors(self, granule: int, first: int, count: int) -> None:
        """Sectors of a granule became the top's: mend its owner map where that is simple, or resolve it anew."""
        with self._lock:
            levels = self.mixed.get(granule)
            if levels is None:
                self._zero.discard(granule)
                self.direct_read.pop(granule, None)
                return
            owners, unit_shift, places = levels[0]
            unit = (1 << unit_shift) // SECTOR_BYTES
            start, units = first // unit, count // unit
            first_owner = places[1]
            assert first_owner is not None
            if first_owner[0] == self._top.fd and not first % unit and not count % unit:
                owners = b"".join((owners[:start], b"\x01" * units, owners[start + units :]))
                self.mixed[granule] = ((owners, unit_shift, places), *levels[1:])
            else:
                del self.mixed[granule]
                self.used.discard(granule)

    def forget_writer(self, fd: int) -> None:
        """All of that lower file is in the file now."""
        with self._lock:
            self._writers.pop(fd, None)

    def forget_granules(self, first: int, count: int) -> None:
        """A file below the top came to hold what nobody had of these granules."""
        with self._lock:
            for granule in range(first, first + count):
                self._zero.discard(granule)
                self.used.discard(granule)
                self.mixed.pop(granule, None)

    def next_used(self, offset: int) -> int:
        """A granule's start at or behind `offset` before which no file has anything; for chains without a fixed disk.

        Cheap: whole stretches of the BATs are skipped at once.
        """
        found = self._size
        with self._lock:
            for image in self._images:
                if image.header is None:
                    return offset
                block = bat.next_allocated(image.bat, min(len(image.bat), offset // image.block_bytes))
                found = min(found, max(offset, block * image.block_bytes))
        return found

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            for table in (self.direct_read, self.direct_write, self.mixed, self._zero, self.used):
                table.clear()

    def _owners(self, granule: int) -> tuple[list[int], list[Place], int]:
        """Which sectors of a granule each file holds, top first: (bitmaps, places, sectors)."""
        start = granule << self.shift
        sectors = min(self.granule_bytes, self._size - start) // SECTOR_BYTES
        left = (1 << sectors) - 1
        masks: list[int] = []
        places: list[Place] = []
        for image in self._images:
            here = (image.size_bytes - start) // SECTOR_BYTES
            if here < sectors:  # past the parent's end reads zero
                if here <= 0:
                    break
                left &= bitmap.mask(0, here, sectors)
            if image.header is None:
                masks.append(left)
                places.append((image.fd, start))
                break
            block, within = divmod(start, image.header.block_bytes)
            at = image.block_start(block)
            if image.footer.disk_type is DiskType.DYNAMIC:
                if at is not None:
                    masks.append(left)
                    places.append((image.fd, at + image.bitmap_bytes + within))
                break
            if at is None:
                continue
            writer = self._writers.get(image.fd)
            if writer is not None:
                whole = image.header.block_bytes // SECTOR_BYTES
                bits = writer.bits(block) >> (whole - within // SECTOR_BYTES - sectors) & left
            else:
                bits = image.read_bits(at, within // SECTOR_BYTES, sectors) & left
            if bits:
                masks.append(bits)
                places.append((image.fd, at + image.bitmap_bytes + within))
                left ^= bits
                if not left:
                    break
        return masks, places, sectors

    def _is_inside_file(self, place: Place, sectors: int) -> bool:
        """Is it whole? A file that was cut must be read with care, so its last block is never direct."""
        return all(
            place[1] + sectors * SECTOR_BYTES <= image.file_bytes for image in self._images if image.fd == place[0]
        )

    def _keep_direct(self, granule: int, place: Place) -> None:
        if len(self.direct_read) >= DIRECT_LIMIT:
            self.direct_read.clear()
        self.direct_read[granule] = place
        if place[0] == self._top.fd and not self._read_only:
            if len(self.direct_write) >= DIRECT_LIMIT:
                self.direct_write.clear()
            self.direct_write[granule] = place

    def _keep_mixed(self, granule: int, levels: tuple[Level, ...]) -> None:
        """Keep it, and let go of the oldest that nobody has read since its last chance (CLOCK)."""
        while len(self.mixed) >= self._mixed_limit:
            oldest, kept = self.mixed.popitem(last=False)
            if oldest not in self.used:
                break
            self.used.discard(oldest)
            self.mixed[oldest] = kept
        self.mixed[granule] = levels


def _split_mixed(levels: tuple[Level, ...], depth: int, first: int, end: int, found: list[Segment]) -> None:
    """Divide bytes `first` to `end` of a mixed granule by owner; what a level does not own is the next one's."""
    owners, unit_shift, places = levels[depth]
    start = first >> unit_shift
    is_last = depth + 1 == len(levels)
    for owner, run, count in bitmap.runs(owners[start : ((end - 1) >> unit_shift) + 1]):
        low = max(first, (start + run) << unit_shift)
        high = min(end, (start + run + count) << unit_shift)
        place = places[owner]
        if place is not None:
            _add(found, place[0], place[1] + low, high - low)
        elif is_last:
            _add(found, NOWHERE, 0, high - low)
        else:
            _split_mixed(levels, depth + 1, low, high, found)


def _add(found: list[Segment], fd: int, at: int, length: int) -> None:
    """Append a segment, or lengthen the last one when it goes on there."""
    if found:
        last_fd, last_at, last_length = found[-1]
        if last_fd == fd and (fd == NOWHERE or last_at + last_length == at):
            found[-1] = (fd, last_at, last_length + length)
            return
    found.append((fd, at, length))
