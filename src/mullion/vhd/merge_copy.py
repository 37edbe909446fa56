"""The copying of a merge: what some layers of a chain hold goes into the layer below them, block by block.

`UpperLayers` are read, `LowerLayer` is written; `merge_block` does one stretch. It may be repeated, in any order and
after any crash: until the upper layers are taken out of the chain they hide all that it writes. So a merge of a disk
in use drives the same function, one block at a time.

Durability: none before `LowerLayer.flush`; room, bitmaps and BAT entries follow the order of `top`.

Invariants: a sector that the upper layers hold is theirs afterwards, also when it is zero; one that they do not hold is
untouched, except where it lies past the end of one of them: there the disk above them reads zero.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence

from mullion.base.units import SECTOR_BYTES
from mullion.vhd.direct_copy import LONG_BYTES, PAGE_BYTES, DirectCopies
from mullion.vhd.fileio import SHORT_COPY_BYTES, FileIO
from mullion.vhd.image import Image
from mullion.vhd.mapping import NOWHERE, Mapping, Segment
from mullion.vhd.top import TopWriter


class UpperLayers:
    """The layers to be merged, top first, seen as one: open, and not written by anybody.

    `writer` is that of the first, when not all that it holds is in the file yet.
    """

    def __init__(self, images: Sequence[Image], writer: TopWriter | None = None) -> None:
        self._map = Mapping(list(images), writer, read_only=True)
        self.size_bytes = images[0].size_bytes
        self.opaque_from = min(image.size_bytes for image in images)
        """From this byte on what they do not hold reads zero, and not what lies below."""

    @property
    def block_bytes(self) -> int:
        """The unit of `blocks`."""
        return self._map.granule_bytes

    def blocks(self, size_bytes: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """The stretches (offset, length) of a disk of that size in which there may be something to do.

        `start` is where one of them begins.
        """
        offset = start
        while offset < size_bytes:
            if offset + self.block_bytes <= self.opaque_from:
                offset = self._map.next_used(offset)
            if offset < size_bytes:
                yield offset, min(self.block_bytes, size_bytes - offset)
            offset += self.block_bytes

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, Segment]]:
        """What a stretch holds, as (offset, (descriptor or `NOWHERE` for zeros, place in the file, length))."""
        here = max(0, min(length, self.size_bytes - offset))
        for fd, at, count in [*self._map.segments(offset, here), (NOWHERE, 0, length - here)]:
            if fd != NOWHERE:
                yield from _data_runs(offset, fd, at, count)
            elif offset + count > self.opaque_from:
                begin = max(offset, self.opaque_from)
                yield begin, (NOWHERE, 0, offset + count - begin)
            offset += count


def _data_runs(offset: int, fd: int, at: int, length: int) -> Iterator[tuple[int, Segment]]:
    """A run of a file, with its holes as zeros; short runs are not worth the question."""
    end = at + length
    while length >= SHORT_COPY_BYTES:
        data = _seek(fd, at, end, os.SEEK_DATA)
        if data > at:
            yield offset, (NOWHERE, 0, data - at)
            offset, at, length = offset + data - at, data, end - data
        if length:
            hole = _seek(fd, at, end, os.SEEK_HOLE)
            yield offset, (fd, at, hole - at)
            offset, at, length = offset + hole - at, hole, end - hole
    if length:
        yield offset, (fd, at, length)


def _seek(fd: int, at: int, end: int, whence: int) -> int:
    """The next data or hole from `at` on, in whole sectors and at most `end`."""
    try:
        found = os.lseek(fd, at, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
            return end
        return at if whence == os.SEEK_DATA else end
    if whence == os.SEEK_DATA:
        return min(end, max(at, found // SECTOR_BYTES * SECTOR_BYTES))
    return min(end, -(-found // SECTOR_BYTES) * SECTOR_BYTES)


class LowerLayer:
    """The layer that is merged into: open for writing, as `recovery.open_top` left it."""

    def __init__(self, image: Image, writer: TopWriter | None, file_io: FileIO) -> None:
        self._image = image
        self._writer = writer
        self._io = file_io
        self._direct: DirectCopies | None = None
        if file_io.is_threaded:
            with contextlib.suppress(OSError):
                self._direct = DirectCopies(image.fd, file_io)
        self.size_bytes = image.size_bytes

    def copy(self, offset: int, fd: int, at: int, length: int) -> None:
        """Take over whole sectors from byte `at` of another file. Raises: OSError, after which it may be repeated."""
        for place, count in self._places(offset, length, is_zero=False):
            self._copy_run(fd, at, place, count)
            self._show(offset, count)
            offset, at = offset + count, at + count

    def zero(self, offset: int, length: int) -> None:
        """Whole sectors read zero from now on; nothing is allocated where nothing is to be hidden."""
        for place, count in self._places(offset, length, is_zero=True):
            if place != NOWHERE:
                self._io.write_zeros(self._image.fd, place, count)
                self._show(offset, count)
            offset += count

    def flush(self) -> None:
        """Make it durable. Raises: OSError, also that of an earlier copy."""
        if self._direct is not None:
            self._direct.drain()
        if self._writer is not None:
            self._writer.flush()
        else:
            self._io.sync_file(self._image.fd)

    def close(self) -> None:
        """Write nothing more. What was not flushed may be there or not."""
        if self._direct is not None:
            self._direct.close()
            self._direct = None

    def _copy_run(self, fd: int, at: int, place: int, length: int) -> None:
        if self._direct is not None and length >= LONG_BYTES:
            head = -place % PAGE_BYTES
            middle = (length - head) // PAGE_BYTES * PAGE_BYTES
            self._direct.copy(fd, at + head, place + head, middle)
            tail = head + middle
            self._io.copy_range(fd, at, self._image.fd, place, head)
            self._io.copy_range(fd, at + tail, self._image.fd, place + tail, length - tail)
        else:
            self._io.copy_range(fd, at, self._image.fd, place, length)

    def _places(self, offset: int, length: int, *, is_zero: bool) -> Iterator[tuple[int, int]]:
        """Where a range goes in the file, block by block: (place or `NOWHERE`, bytes)."""
        writer = self._writer
        if writer is None:
            yield offset, length
            return
        end = offset + length
        while offset < end:
            block, within = divmod(offset, self._image.block_bytes)
            count = min(end - offset, self._image.block_bytes - within)
            if writer.is_full:
                self.flush()
            data = writer.data_offset(block)
            if data is None and not (is_zero and not writer.is_child):
                data = writer.write_empty(block)
            yield (NOWHERE if data is None else data + within), count
            offset += count

    def _show(self, offset: int, length: int) -> None:
        """In a differencing disk: what was written hides the parent from the next flush on."""
        if self._writer is not None and self._writer.is_child:
            block, within = divmod(offset, self._image.block_bytes)
            self._writer.set_bits(block, within // SECTOR_BYTES, length // SECTOR_BYTES)


def merge_block(upper: UpperLayers, lower: LowerLayer, offset: int, length: int) -> int:
    """Write what the upper layers hold of a stretch into the lower one: the bytes that were copied. Raises: OSError."""
    copied = 0
    for start, (fd, at, count) in upper.runs(offset, length):
        if fd == NOWHERE:
            lower.zero(start, count)
        else:
            lower.copy(start, fd, at, count)
            copied += count
    return copied
