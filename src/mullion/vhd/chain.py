"""A chain of VHD files as one disk.

The chain is flattened lazily. Its address space is divided into *granules* (the smallest block of the chain, at most
2 MiB). On first touch a granule is resolved to one of three things:

    direct   all of it lies in one piece in one file: `direct_read`, and `direct_write` where that is the top
             and nothing but the data changes when it is written
    zero     no file has any of it
    mixed    sectors come from several files: an owner map (see `bitmap`), at most 4 KiB, in a bounded LRU

so that the cost of a read does not depend on the depth of the chain.

Threads: `direct_read` and `direct_write` may be read by anyone at any time without a lock; an entry is valid for a
request that starts after it was seen. Everything else may be called from several threads. `_lock` guards the maps and
is held for microseconds; `_write_lock` serialises flushes and the writes that change metadata.

Durability: see `top` (order of writing) and `pending` (death of the process without a power cut).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Final, Self

from mullion.base.block import Buffer, Extent, ExtentKind, WritableBuffer
from mullion.base.errors import InvalidError, StateError
from mullion.base.units import MIB, SECTOR_BYTES
from mullion.vhd import bat as bat_table
from mullion.vhd import bitmap
from mullion.vhd.errors import DiskReadOnlyError, ParentNotFoundError, VhdDamagedError
from mullion.vhd.fileio import IOV_LIMIT, SYSTEM, ZEROS, FileIO
from mullion.vhd.image import FIXED_GRANULE_BYTES, Image, load_image, open_file
from mullion.vhd.layout import DiskType
from mullion.vhd.locking import lock_file, unlock_file, write_holder
from mullion.vhd.parents import CHAIN_LIMIT, check_parent, open_parents
from mullion.vhd.pending import PendingLog, end_session, start_session
from mullion.vhd.top import TopWriter

DIRECT_LIMIT: Final = 16384
"""Entries of `direct_read` and of `direct_write`: 32 GiB each in granules of 2 MiB."""
_ZERO_LIMIT: Final = 65536
_MIXED_UNITS: Final = 2 * MIB
"""Bytes of owner maps that are kept."""

_NOWHERE: Final = -1
_Place = tuple[int, int]
_Level = tuple[bytes, int, tuple[_Place, ...]]
"""Owner map, sectors in a unit, and for each owner (file descriptor, offset of the granule's start in that file)."""
_Segment = tuple[int, int, int]
"""File descriptor (`_NOWHERE` for zeros), offset in the file, length."""


class Chain:
    """A disk made of one or more VHD files; a `BlockDevice`. Make it with `open_chain` or `from_descriptors`."""

    def __init__(self, images: list[Image], *, writer: TopWriter | None, read_only: bool, file_io: FileIO) -> None:
        """Of files that are open, locked and checked; private to this package."""
        self._images = images
        self._top = images[0]
        self._writer = writer
        self._read_only = read_only
        self._io = file_io
        self._log: PendingLog | None = None
        self._is_closed = False
        self._size = self._top.size_bytes
        blocks = [image.block_bytes for image in images if image.header is not None]
        self.block_shift: int = min([FIXED_GRANULE_BYTES, *blocks]).bit_length() - 1
        self._granule = 1 << self.block_shift
        self._mask = self._granule - 1
        self.direct_read: dict[int, tuple[int, int]] = {}
        self.direct_write: dict[int, tuple[int, int]] = {}
        self._zero: set[int] = set()
        self._mixed: OrderedDict[int, tuple[_Level, ...]] = OrderedDict()
        self._mixed_limit = max(8, _MIXED_UNITS * SECTOR_BYTES // self._granule)
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        self.warnings: list[str] = []
        for image in images:
            self.warnings.extend(f"{image.path}: {text}" for text in (*image.warnings, *image.damage))

    @classmethod
    def from_descriptors(
        cls,
        fds_top_first: Sequence[int],
        paths: Sequence[str],
        *,
        read_only: bool = False,
        pending_path: str | None = None,
        holder: str = "",
        file_io: FileIO = SYSTEM,
    ) -> Chain:
        """Make a chain of files that somebody else opened; `paths` are for messages only.

        The descriptors become the chain's, and are closed when this raises. The first must be open for writing unless
        `read_only`. Raises: what `open_chain` raises, except for what only finding a parent can meet.
        """
        images: list[Image] = []
        try:
            for number, (fd, path) in enumerate(zip(fds_top_first, paths, strict=True)):
                lock_file(fd, path, for_writing=number == 0 and not read_only)
                images.append(load_image(fd, path))
                if number:
                    check_parent(images[number - 1], images[number])
            if images[-1].kind is DiskType.DIFFERENCING:
                raise ParentNotFoundError(
                    f"{images[-1].path}: its parent was not given", path=images[-1].path, structure="chain"
                )
            return _assemble(images, read_only=read_only, pending_path=pending_path, holder=holder, file_io=file_io)
        except BaseException:
            for fd in fds_top_first:
                os.close(fd)
            raise

    @property
    def size_bytes(self) -> int:
        return self._size

    @property
    def read_only(self) -> bool:
        return self._read_only

    @property
    def paths(self) -> tuple[str, ...]:
        """The files, top first."""
        return tuple(image.path for image in self._images)

    @property
    def unique_id(self) -> bytes:
        """The top's, 16 raw bytes."""
        return self._top.footer.unique_id

    # ------------------------------------------------------------------ reading

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        self.preadv(offset, (memoryview(buffer),))

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers (of bytes) one after the other from the offset on."""
        length = sum(map(len, buffers))
        place = self.direct_read.get(offset >> self.block_shift)
        if place is not None and length and len(buffers) <= IOV_LIMIT and offset + length <= self._size:
            within = offset & self._mask
            if within + length <= self._granule and os.preadv(place[0], buffers, place[1] + within) == length:
                return
        self._check_range(offset, length)
        if not length:
            return
        segments = self._segments(offset, length)
        if len(segments) == 1:
            self._read_segment(segments[0], buffers, offset)
            return
        for segment, part in zip(segments, _split(buffers, segments), strict=True):
            self._read_segment(segment, part, offset)

    def _read_segment(self, segment: _Segment, buffers: Sequence[memoryview], offset: int) -> None:
        fd, at, _ = segment
        if fd == _NOWHERE:
            for buffer in buffers:
                for start in range(0, len(buffer), len(ZEROS)):
                    step = min(len(ZEROS), len(buffer) - start)
                    buffer[start : start + step] = ZEROS[:step]
            return
        left = list(buffers)
        while left:
            count = os.preadv(fd, left[:IOV_LIMIT], at)
            if count == 0:
                path = next((image.path for image in self._images if image.fd == fd), self._top.path)
                raise VhdDamagedError(
                    f"{path}: the file ends at byte {at}, inside the data of the disk's byte {offset}",
                    path=path,
                    structure="block",
                    offset=at,
                )
            at += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]

    def _segments(self, offset: int, length: int) -> list[_Segment]:
        """Where a range lies: as few pieces as the files allow."""
        found: list[_Segment] = []
        end = offset + length
        while offset < end:
            granule = offset >> self.block_shift
            within = offset & self._mask
            count = min(end - offset, self._granule - within)
            place = self.direct_read.get(granule)
            if place is not None:
                _add(found, place[0], place[1] + within, count)
            else:
                levels = self._lookup(granule)
                if isinstance(levels, tuple):
                    self._split_mixed(levels, 0, within, within + count, found)
                elif levels is None:
                    _add(found, _NOWHERE, 0, count)
                else:
                    _add(found, levels[0], levels[1] + within, count)
            offset += count
        return found

    def _split_mixed(self, levels: tuple[_Level, ...], depth: int, first: int, end: int, found: list[_Segment]) -> None:
        """Divide bytes `first` to `end` of a mixed granule by owner; what a level does not own is the next one's."""
        owners, unit, places = levels[depth]
        unit_bytes = unit * SECTOR_BYTES
        start = first // unit_bytes
        part = owners[start : -(-end // unit_bytes)]
        is_last = depth + 1 == len(levels)
        for owner, run, count in bitmap.runs(part):
            low = max(first, (start + run) * unit_bytes)
            high = min(end, (start + run + count) * unit_bytes)
            if owner:
                fd, at = places[owner - 1]
                _add(found, fd, at + low, high - low)
            elif is_last:
                _add(found, _NOWHERE, 0, high - low)
            else:
                self._split_mixed(levels, depth + 1, low, high, found)

    def _lookup(self, granule: int) -> tuple[_Level, ...] | list[int] | None:
        """Resolve a granule: levels when it is mixed, [descriptor, offset] when direct, None when zero."""
        with self._lock:
            self._check_open()
            mixed = self._mixed.get(granule)
            if mixed is not None:
                self._mixed.move_to_end(granule)
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
                self._keep_direct(self.direct_read, granule, places[0])
                self._keep_writable(granule, places[0])
                return list(places[0])
            levels = []
            for begin in range(0, len(masks), bitmap.MAX_OWNERS):
                part = masks[begin : begin + bitmap.MAX_OWNERS]
                owners, unit = bitmap.owner_map(part, sectors)
                levels.append((owners, unit, tuple(places[begin : begin + bitmap.MAX_OWNERS])))
            self._mixed[granule] = tuple(levels)
            if len(self._mixed) > self._mixed_limit:
                self._mixed.popitem(last=False)
            return tuple(levels)

    def _owners(self, granule: int) -> tuple[list[int], list[_Place], int]:
        """Which sectors of a granule each file holds, top first: (bitmaps, places, sectors)."""
        start = granule << self.block_shift
        sectors = min(self._granule, self._size - start) // SECTOR_BYTES
        left = (1 << sectors) - 1
        masks: list[int] = []
        places: list[_Place] = []
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
            if self._writer is not None and image is self._top:
                whole = image.header.block_bytes // SECTOR_BYTES
                shift = whole - within // SECTOR_BYTES - sectors
                bits = self._writer.bits(block) >> shift & left
            else:
                bits = image.read_bits(at, within // SECTOR_BYTES, sectors) & left
            if bits:
                masks.append(bits)
                places.append((image.fd, at + image.bitmap_bytes + within))
                left ^= bits
                if not left:
                    break
        return masks, places, sectors

    def _is_inside_file(self, place: _Place, sectors: int) -> bool:
        """Is it whole? A file that was cut must be read with care, so its last block is never direct."""
        return all(
            place[1] + sectors * SECTOR_BYTES <= image.file_bytes for image in self._images if image.fd == place[0]
        )

    def _keep_direct(self, table: dict[int, tuple[int, int]], granule: int, place: _Place) -> None:
        if len(table) >= DIRECT_LIMIT:
            table.clear()
        table[granule] = place

    def _keep_writable(self, granule: int, place: _Place) -> None:
        if place[0] == self._top.fd and not self._read_only:
            self._keep_direct(self.direct_write, granule, place)

    # ------------------------------------------------------------------ writing

    def pwrite(self, offset: int, buffer: Buffer) -> None:
        self.pwritev(offset, (memoryview(buffer),))

    def pwritev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write the buffers (of bytes) one after the other from the offset on."""
        length = sum(map(len, buffers))
        self._check_range(offset, length)
        self._check_writable()
        place = self.direct_write.get(offset >> self.block_shift)
        within = offset & self._mask
        if place is not None and within + length <= self._granule:
            self._io.write_all(place[0], buffers, place[1] + within)
            return
        if not length:
            return
        pieces = list(self._pieces(offset, length))
        for (at, count), part in zip(pieces, _split(buffers, [(0, 0, count) for _, count in pieces]), strict=True):
            self._write_piece(at, part, count)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """A range cut at the granules' borders: (offset, length)."""
        end = offset + length
        while offset < end:
            count = min(end - offset, self._granule - (offset & self._mask))
            yield offset, count
            offset += count

    def _write_piece(self, offset: int, buffers: Sequence[Buffer], length: int) -> None:
        """Write inside one granule."""
        granule = offset >> self.block_shift
        within = offset & self._mask
        place = self.direct_write.get(granule)
        if place is not None:
            self._io.write_all(place[0], buffers, place[1] + within)
            return
        with self._write_lock:
            self._check_open()
            writer = self._writer
            if writer is None:
                place = (self._top.fd, granule << self.block_shift)
                with self._lock:
                    self._keep_writable(granule, place)
                self._io.write_all(place[0], buffers, place[1] + within)
                return
            if writer.is_full:
                writer.flush()
            if writer.is_child:
                self._write_child(writer, granule, offset, buffers, length)
                return
            block, within = divmod(offset, self._top.block_bytes)
            data = writer.data_offset(block)
            if data is None:
                writer.write_new(block, within, buffers, length)
                self._forget_block(block)
            else:
                self._io.write_all(self._top.fd, buffers, data + within)
            if granule not in self.direct_write:
                self._lookup(granule)

    def _write_child(
        self, writer: TopWriter, granule: int, offset: int, buffers: Sequence[Buffer], length: int
    ) -> None:
        """Write inside one granule of a differencing disk; sectors that become the child's are completed first."""
        block, within = divmod(offset, self._top.block_bytes)
        data = writer.data_offset(block)
        first, end = within // SECTOR_BYTES, -(-(within + length) // SECTOR_BYTES)
        wanted = bitmap.mask(first, end - first, self._top.block_bytes // SECTOR_BYTES)
        if data is not None and writer.bits(block) & wanted == wanted:
            self._io.write_all(self._top.fd, buffers, data + within)
            return
        head, tail = within % SECTOR_BYTES, -(within + length) % SECTOR_BYTES
        if head or tail:
            buffers = [self._read_bytes(offset - head, head), *buffers, self._read_bytes(offset + length, tail)]
            within, length = within - head, length + head + tail
        if data is None:
            writer.write_new(block, within, buffers, length)
        else:
            self._io.write_all(self._top.fd, buffers, data + within)
            writer.set_bits(block, first, end - first)
        self._forget_granule(granule, first, end - first)

    def _read_bytes(self, offset: int, length: int) -> bytearray:
        buffer = bytearray(length)
        self.preadv(offset, (memoryview(buffer),))
        return buffer

    def _forget_block(self, block: int) -> None:
        """A block of a dynamic disk was allocated: nothing that was known about its granules holds."""
        per_block = self._top.block_bytes >> self.block_shift
        with self._lock:
            self._zero.difference_update(range(block * per_block, (block + 1) * per_block))

    def _forget_granule(self, granule: int, first: int, count: int) -> None:
        """Sectors of a granule became the child's: mend its owner map where that is simple, or resolve it anew."""
        with self._lock:
            self._zero.discard(granule)
            self.direct_read.pop(granule, None)
            levels = self._mixed.get(granule)
            if levels is None:
                return
            owners, unit, places = levels[0]
            first %= self._granule // SECTOR_BYTES
            if places[0][0] != self._top.fd or first % unit or count % unit:
                del self._mixed[granule]
                return
            start, units = first // unit, count // unit
            owners = owners[:start] + b"\x01" * units + owners[start + units :]
            if owners.count(1) == len(owners):
                del self._mixed[granule]
            else:
                self._mixed[granule] = ((owners, unit, places), *levels[1:])

    def flush(self) -> None:
        if self._read_only:
            self._check_open()
            return
        with self._write_lock:
            self._check_open()
            self._flush()

    def _flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()
        else:
            self._io.fdatasync(self._top.fd)

    def discard(self, offset: int, length: int) -> None:
        """Punch holes where the top alone holds the data; elsewhere nothing changes. Reads zeros or as before."""
        self._check_range(offset, length)
        self._check_writable()
        start = -(-offset // SECTOR_BYTES) * SECTOR_BYTES
        end = (offset + length) // SECTOR_BYTES * SECTOR_BYTES
        for at, count in self._pieces(start, end - start):
            with self._write_lock:
                self._check_open()
                place = self._place_in_top(at, count)
                if place is not None:
                    self._io.discard(self._top.fd, place, count)

    def write_zeroes(self, offset: int, length: int) -> None:
        self._check_range(offset, length)
        self._check_writable()
        for at, count in self._pieces(offset, length):
            self._zero_piece(at, count)

    def _zero_piece(self, offset: int, length: int) -> None:
        """Zeros inside one granule: none written where there are none to hide, holes where the file can have them."""
        with self._write_lock:
            self._check_open()
            place = self._place_in_top(offset, length)
            if place is not None:
                self._io.write_zeros(self._top.fd, place, length)
                return
        if all(fd == _NOWHERE for fd, _, _ in self._segments(offset, length)):
            return
        for start in range(0, length, len(ZEROS)):
            step = min(len(ZEROS), length - start)
            self._write_piece(offset + start, [ZEROS[:step]], step)

    def _place_in_top(self, offset: int, length: int) -> int | None:
        """Where a range inside one granule lies in the top, when nothing but data must change to write it."""
        if self._writer is None:
            return offset
        block, within = divmod(offset, self._top.block_bytes)
        data = self._writer.data_offset(block)
        if data is None:
            return None
        if self._writer.is_child:
            first, end = within // SECTOR_BYTES, -(-(within + length) // SECTOR_BYTES)
            wanted = bitmap.mask(first, end - first, self._top.block_bytes // SECTOR_BYTES)
            if self._writer.bits(block) & wanted != wanted:
                return None
        return data + within

    # ------------------------------------------------------------------ what is where

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        self._check_range(offset, length)
        end = offset + length
        start, kind = offset, None
        while offset < end:
            stop, found = self._extent_at(offset, end)
            if kind is not None and found is not kind:
                yield Extent(start, offset - start, kind)
                start = offset
            kind, offset = found, stop
        if kind is not None:
            yield Extent(start, end - start, kind)

    def _extent_at(self, offset: int, end: int) -> tuple[int, ExtentKind]:
        """The kind of what is at the offset, and how far, at least, it reaches."""
        if self._top.header is None:
            return self._extent_of_fixed(offset, end)
        stop = min(end, (offset | self._mask) + 1)
        fd, _, count = self._segments(offset, stop - offset)[0]
        if fd != _NOWHERE:
            return offset + count, ExtentKind.DATA
        if offset + count < stop or self._images[-1].header is None:
            return offset + count, ExtentKind.HOLE
        with self._lock:
            self._check_open()
            following = [
                bat_table.next_allocated(image.bat, min(len(image.bat), (stop - 1) // image.block_bytes + 1))
                * image.block_bytes
                for image in self._images
                if stop % image.block_bytes == 0
            ]
        if len(following) == len(self._images):
            stop = max(stop, min(end, *following))
        return stop, ExtentKind.HOLE

    def _extent_of_fixed(self, offset: int, end: int) -> tuple[int, ExtentKind]:
        with self._lock:  # lseek moves a position that nothing else uses
            self._check_open()
            try:
                data = os.lseek(self._top.fd, offset, os.SEEK_DATA)
            except OSError:
                return end, ExtentKind.DATA  # no such notion here
            if data > offset:
                return min(end, data), ExtentKind.HOLE
            return min(end, os.lseek(self._top.fd, offset, os.SEEK_HOLE)), ExtentKind.DATA

    # ------------------------------------------------------------------ ending

    def close(self) -> None:
        if self._is_closed:
            return
        is_clean = False
        try:
            if not self._read_only:
                with self._write_lock:
                    self._flush()
                    if self._writer is not None:
                        self._writer.close_gap()
                is_clean = True
        finally:
            self._release(is_clean=is_clean)

    def abandon(self) -> None:
        """Give back the descriptors and write nothing more, as if the process were killed."""
        self._release(is_clean=False)

    def _release(self, *, is_clean: bool) -> None:
        with self._write_lock, self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            for table in (self.direct_read, self.direct_write, self._mixed, self._zero):
                table.clear()
            if self._log is not None:
                self._log.close(remove=is_clean)
            if is_clean:
                write_holder(self._top.fd, "")
                end_session(self._top.fd)
            for image in self._images:
                with contextlib.suppress(OSError):
                    unlock_file(image.fd)
                image.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ refusing

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._size:
            raise InvalidError(
                f"{self._top.path}: bytes {offset} to {offset + length} are not on a disk of {self._size} bytes",
                remedy="Keep requests inside the size of the disk.",
                path=self._top.path,
                offset=offset,
            )

    def _check_writable(self) -> None:
        if self._read_only:
            self._check_open()
            raise DiskReadOnlyError(f"{self._top.path} is open for reading only", path=self._top.path)

    def _check_open(self) -> None:
        if self._is_closed:
            raise StateError(f"{self._top.path} was closed", state="closed", required="open", path=self._top.path)


def open_chain(
    path: str,
    *,
    read_only: bool = False,
    pending_path: str | None = None,
    allowed_dirs: Sequence[str] | None = None,
    limit: int = CHAIN_LIMIT,
    holder: str = "",
    file_io: FileIO = SYSTEM,
) -> Chain:
    """Open a disk with all its parents.

    Opening for writing mends what a crash may have left: replays the pending log, writes a missing footer at the end,
    gives orphan room back; `warnings` tells. `allowed_dirs` are the folders that parents may lie in (default: that of
    `path`), `limit` is the longest chain, `holder` is shown to whoever finds the disk busy.

    Raises: NotFoundError, DeniedError; VhdError for what is wrong with a file; DiskBusyError; OSError.
    """
    fd = open_file(path, writable=not read_only)
    images: list[Image] = []
    try:
        lock_file(fd, path, for_writing=not read_only)
        images = open_parents(load_image(fd, path), allowed_dirs=allowed_dirs, limit=limit, lock=True)
        return _assemble(images, read_only=read_only, pending_path=pending_path, holder=holder, file_io=file_io)
    except BaseException:
        for image in images[1:]:
            image.close()
        os.close(fd)
        raise


def _assemble(images: list[Image], *, read_only: bool, pending_path: str | None, holder: str, file_io: FileIO) -> Chain:
    """A chain of files that are locked and belong together; mends the top when it is to be written."""
    top = images[0]
    if read_only:
        return Chain(images, writer=None, read_only=True, file_io=file_io)
    if top.damage:
        raise VhdDamagedError(f"{top.path} can only be read: {'; '.join(top.damage)}", path=top.path, structure="file")
    has_log = pending_path is not None and top.header is not None
    log = PendingLog(pending_path, top.fd, top.footer.unique_id) if pending_path is not None and has_log else None
    said: list[str] = []
    try:
        writer = TopWriter(top, file_io, log) if top.header is not None else None
        if writer is not None:
            said = _recover(writer, log)
            top.warnings = [text for text in top.warnings if not text.startswith("the footer at the end is missing")]
        if log is not None:
            log.begin()
        else:
            start_session(top.fd)
        write_holder(top.fd, holder)
    except BaseException:
        if log is not None:
            log.close(remove=False)
        raise
    chain = Chain(images, writer=writer, read_only=False, file_io=file_io)
    chain._log = log
    chain.warnings[:0] = [f"{top.path}: {text}" for text in said]
    return chain


def _recover(writer: TopWriter, log: PendingLog | None) -> list[str]:
    """Bring the top to the state that was acknowledged last; says what was done."""
    said: list[str] = []
    if log is not None:
        records, is_ours = log.recover()
        if records and is_ours:
            writer.replay(records)
            writer.flush()
            said.append(f"{len(records)} changes of a writer that was killed were carried out")
        elif records:
            said.append(f"{log.path} was of another boot, disk or session: discarded")
    return said + writer.mend()


def _add(found: list[_Segment], fd: int, at: int, length: int) -> None:
    """Append a segment, or lengthen the last one when it goes on there."""
    if found:
        last_fd, last_at, last_length = found[-1]
        if last_fd == fd and (fd == _NOWHERE or last_at + last_length == at):
            found[-1] = (fd, last_at, last_length + length)
            return
    found.append((fd, at, length))


def _split(buffers: Sequence[memoryview], segments: Sequence[_Segment]) -> Iterator[list[memoryview]]:
    """Cut a list of buffers into one list for each segment, without copying."""
    index, start = 0, 0
    for _, _, length in segments:
        part: list[memoryview] = []
        left = length
        while left:
            buffer = buffers[index]
            step = min(left, len(buffer) - start)
            if step:
                part.append(buffer[start : start + step])
            start += step
            left -= step
            if start == len(buffer):
                index, start = index + 1, 0
        yield part
