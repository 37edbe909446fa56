"""A chain of VHD files as one disk.

Threads: everything may be called from several threads, and `direct_read` and `direct_write` may be read by anyone
without a lock (see `mapping`). Requests that change nothing but data take no lock; writes that change metadata wait for
each other, and none waits for a flush (`top`) unless too much waits for it. Whoever uses the direct tables must have
stopped before `close`. Locks, in the order in which they are taken: that of the flush, those below the top are made
durable with, that of writes, and the top's own.

The files beneath a chain can be exchanged while it is used (`switching`). What an exchange leaves to be made durable,
a top that is frozen or a file that was emptied, is done before the next flush returns: until then it is not promised.

Durability: see `top` (order of writing) and `pending` (death of the process without a power cut).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self

from mullion.base.block import Buffer, Extent, ExtentKind, WritableBuffer
from mullion.base.errors import InvalidError, StateError
from mullion.base.units import SECTOR_BYTES
from mullion.vhd import bitmap
from mullion.vhd.cells import CELL_BYTES, YOUNG_SECTORS, widened
from mullion.vhd.errors import DiskReadOnlyError, ParentNotFoundError, VhdDamagedError, VhdError
from mullion.vhd.fileio import IOV_LIMIT, PAGED_RUN_BYTES, SYSTEM, ZEROS, FileIO, split_buffers
from mullion.vhd.flushing import FlushBehind, SharedFlush
from mullion.vhd.geometry import SizeFrom
from mullion.vhd.image import Image, load_image, open_file
from mullion.vhd.layer_journal import check_marks
from mullion.vhd.layout import DiskType
from mullion.vhd.locking import lock_content, lock_file, unlock_file, write_holder
from mullion.vhd.mapping import NOWHERE, Mapping, Place, Segment
from mullion.vhd.parents import CHAIN_LIMIT, check_parent, load_parent, open_parents
from mullion.vhd.pending import end_session
from mullion.vhd.recovery import open_top
from mullion.vhd.top import TopWriter


class Unfinished(Protocol):
    """What is to be made durable below the top before a flush of the disk may return."""

    image: Image
    writer: TopWriter | None

    def complete(self) -> None:
        """Do it; it may be called again after an error. Raises: OSError."""
        ...


class Backing(Protocol):
    """What a chain reads where its files have nothing."""

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers one after the other; past its own end with zeros."""

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """As a block device's; past its own end holes."""
        ...


class Chain:
    """A disk made of one or more VHD files; a `BlockDevice`. Make it with `open_chain` or `from_descriptors`.

    For loops that cannot afford a call: `block_shift` is log2 of the granule's bytes; `direct_read` and `direct_write`
    say in which (descriptor, offset) a granule begins that can be read, or overwritten, in one piece; `mixed_read` has
    the levels of `mapping.Level` for the others that were read, and whoever uses one adds its granule to `mixed_used`.
    Units there whose owner's descriptor is `mixed_write_fd` can be overwritten in place (-1: there are none).
    A granule that is in none of them, and any request that is short: `preadv` or `pwritev`.

    `backing`, of a disk that is being restored, is what it reads where no file has anything. It may be set and taken
    away while nobody reads or writes; `filling` brings home what it has.
    """

    def __init__(
        self,
        images: list[Image],
        *,
        read_only: bool,
        pending_path: str | None,
        holder: str,
        file_io: FileIO,
        fills_cells: bool = False,
    ) -> None:
        """Of files that are open, locked and belong together; private to this package."""
        said: list[str] = []
        self._writer: TopWriter | None = None
        self._top = images[0]
        if not read_only:
            if images[-1] is not self._top and images[-1].header is None:
                # It may have been the top of a writer that was killed, and has no log that would say so (`recovery`).
                file_io.sync_file(images[-1].fd)
            self._writer, said = open_top(self._top, pending_path=pending_path, holder=holder, file_io=file_io)
        self._images = images
        self._read_only = read_only
        self._fills_cells_after = 0 if fills_cells else None
        self._cell: memoryview | None = None
        self._io = file_io
        self._is_closed = False
        self._write_lock = threading.Lock()
        self._flushes = SharedFlush()
        self._behind = FlushBehind()
        self._unfinished: list[Unfinished] = []
        self._finish_lock = threading.Lock()
        self.backing: Backing | None = None
        self.filled: Image | None = None
        """The file that gets what the backing has (`filling`), and changes by that; for this package."""
        self._make_map()
        self.warnings: list[str] = [f"{self._top.path}: {text}" for text in said]
        for image in images:
            self.warnings.extend(f"{image.path}: {text}" for text in (*image.warnings, *image.damage))

    def _make_map(self) -> None:
        """Begin with empty tables."""
        self._size = self._top.size_bytes
        lower = {one.image.fd: one.writer for one in self._unfinished if one.writer is not None}
        self._map = Mapping(self._images, self._writer, read_only=self._read_only, lower_writers=lower)
        self._mask = self._map.granule_bytes - 1
        self._cell_sectors = min(CELL_BYTES, self._map.granule_bytes) // SECTOR_BYTES
        self.block_shift: int = self._map.shift
        self.direct_read: dict[int, tuple[int, int]] = self._map.direct_read
        self.direct_write: dict[int, tuple[int, int]] = self._map.direct_write
        self.mixed_read = self._map.mixed
        self.mixed_used = self._map.used
        self.mixed_write_fd: int = -1 if self._read_only else self._top.fd

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
        fills_cells: bool = False,
    ) -> Chain:
        """Make a chain of files that somebody else opened; `paths` are for messages only.

        `fills_cells` is for a disk that runs: its top takes over whole cells before it falls into pieces (`cells`).
        The descriptors become the chain's, and are closed when this raises. The first must be open for writing unless
        `read_only`. Raises: what `open_chain` raises, except for what only finding a parent can meet.
        """
        images: list[Image] = []
        try:
            for number, (fd, path) in enumerate(zip(fds_top_first, paths, strict=True)):
                lock_file(fd, path, for_writing=number == 0 and not read_only)
                if not number and read_only:
                    lock_content(fd, path)
                images.append(load_parent(fd, path) if number else load_image(fd, path))
                if number:
                    check_parent(images[number - 1], images[number])
            check_marks(images)
            if images[-1].kind is DiskType.DIFFERENCING:
                raise ParentNotFoundError(
                    f"{images[-1].path}: its parent was not given", path=images[-1].path, structure="chain"
                )
            return cls(
                images,
                read_only=read_only,
                pending_path=pending_path,
                holder=holder,
                file_io=file_io,
                fills_cells=fills_cells,
            )
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

    # ------------------------------------------------------------------ for what changes a file's structures

    @property
    def images(self) -> list[Image]:
        """The files, top first; for this package."""
        return self._images

    def segments(self, offset: int, length: int) -> list[Segment]:
        """In which file a range lies, and where; for this package."""
        return self._map.segments(offset, length)

    def look_again(self, offset: int, length: int) -> None:
        """A file below the top came to hold what nobody had of a range; for this package."""
        first = offset >> self.block_shift
        self._map.forget_granules(first, ((offset + length - 1) >> self.block_shift) + 1 - first)

    def next_used(self, offset: int) -> int:
        """An offset at or behind this one before which no file has anything; for this package."""
        return min(self._size, self._map.next_used(offset))

    @property
    def writer(self) -> TopWriter | None:
        """Of the top; for this package."""
        return self._writer

    @property
    def file_io(self) -> FileIO:
        """Through which the files are changed; for this package."""
        return self._io

    def settle(self) -> None:
        """Write everything and give back the room that was taken ahead: the file is as its structures say."""
        with self.settled():
            pass

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Settle, and have the top's structures to oneself; meanwhile data is read, and overwritten in place.

        The blocks of the top must stay where they are. What a reader sees must stay the same, unless nobody reads.
        """
        self.complete()
        with self._write_lock:
            self._check_open()
            with self._flushes.told_later():
                self._flush()
            if self._writer is not None:
                self._writer.close_gap()
            try:
                yield
            finally:
                if self._writer is not None:
                    self._writer.restart()

    def renew(self) -> None:
        """Go on after the structures of the top were changed, between `settle` and now; nobody reads or writes."""
        with self._write_lock:
            if self._writer is not None:
                self._writer.restart()
            self._make_map()

    def exchange(self, images: list[Image], writer: TopWriter | None, unfinished: Sequence[Unfinished] = ()) -> None:
        """Stand on other files from now on, which read the same; nobody reads or writes meanwhile. It cannot fail.

        `writer` is that of the new top. The files that are in the chain no more stay open, and are the caller's.
        """
        with self._write_lock:
            if self._fills_cells_after is not None and writer is not self._writer:
                self._fills_cells_after = YOUNG_SECTORS
            self._images, self._top, self._writer = images, images[0], writer
            self._unfinished.extend(unfinished)
            self._make_map()

    def complete(self) -> None:
        """Make durable what exchanges have left. May be repeated after an error.

        Raises: OSError, which the next `flush` raises as well.
        """
        self._complete(told=self._flushes.told_later)

    @contextlib.contextmanager
    def between_flushes(self) -> Iterator[None]:
        """No flush runs in the block: files that an exchange took away are in nobody's hands; for this package."""
        with self._flushes.lock:
            yield

    def _complete(self, told: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext) -> None:
        if not self._unfinished:
            return
        with self._finish_lock, told():
            while self._unfinished:
                self._unfinished[0].complete()
                self._map.forget_writer(self._unfinished[0].image.fd)
                del self._unfinished[0]

    # ------------------------------------------------------------------ reading

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        self.preadv(offset, (memoryview(buffer),))

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers (of bytes) one after the other from the offset on."""
        length = sum(map(len, buffers))
        granule = offset >> self.block_shift
        within = offset & self._mask
        if 0 < length <= self._mask + 1 - within and offset + length <= self._size and len(buffers) <= IOV_LIMIT:
            place = self.direct_read.get(granule) or self._shared_place(granule, within, length)
            if place is not None and os.preadv(place[0], buffers, place[1] + within) == length:
                return
            if len(buffers) == 1 and self._read_shared(granule, within, buffers[0]):
                return
        self._check_range(offset, length)
        self._check_open()
        segments = self._map.segments(offset, length)
        if len(segments) == 1:
            self._read_segment(segments[0], buffers, offset)
            return
        for segment, part in zip(segments, split_buffers(buffers, (length for _, _, length in segments)), strict=True):
            self._read_segment(segment, part, offset)
            offset += segment[2]

    def _shared_place(self, granule: int, within: int, length: int) -> Place | None:
        """Where a granule that files share would begin in the one file that all of this range lies in, if it does."""
        levels = self.mixed_read.get(granule)
        if levels is None:
            return None
        owners, unit_shift, places = levels[0]
        first, last = within >> unit_shift, (within + length - 1) >> unit_shift
        owner = owners[first]
        if first != last and owners.count(owner, first, last + 1) != last + 1 - first:
            return None
        self.mixed_used.add(granule)
        return places[owner]

    def _read_shared(self, granule: int, within: int, buffer: memoryview) -> bool:
        """Read a range of a granule that files share, run by run; False when that takes more than this."""
        levels = self.mixed_read.get(granule)
        if levels is None:
            return False
        owners, unit_shift, places = levels[0]
        end = within + len(buffer)
        self.mixed_used.add(granule)
        for owner, run, after in bitmap.spans(owners, within >> unit_shift, ((end - 1) >> unit_shift) + 1):
            place = places[owner]
            if place is None:
                return False
            low, high = max(within, run << unit_shift), min(end, after << unit_shift)
            if os.preadv(place[0], (buffer[low - within : high - within],), place[1] + low) != high - low:
                return False
        return True

    def _read_segment(self, segment: Segment, buffers: Sequence[memoryview], offset: int) -> None:
        fd, at, _ = segment
        if fd == NOWHERE:
            if self.backing is not None:
                self.backing.preadv(offset, buffers)
                return
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

    def pread_to_pipe(self, offset: int, length: int, pipe_fd: int) -> bool:
        """Append a range to a pipe that does not block, by reference to the page cache; False when it did not go.

        That is so where no file has anything, where the runs in the files are too short to be worth it, and when the
        pipe was full: it may hold part of the range then. What the pipe holds stays what it was when a file loses it.
        """
        self._check_range(offset, length)
        self._check_open()
        segments = self._map.segments(offset, length)
        if any(fd == NOWHERE or count < PAGED_RUN_BYTES for fd, _, count in segments):
            return False
        return all(os.splice(fd, pipe_fd, count, offset_src=at) == count for fd, at, count in segments)

    # ------------------------------------------------------------------ writing

    def pwrite(self, offset: int, buffer: Buffer) -> None:
        self.pwritev(offset, (memoryview(buffer),))

    def pwritev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write the buffers (of bytes) one after the other from the offset on."""
        length = sum(map(len, buffers))
        if offset < 0 or offset + length > self._size or self._read_only:
            self._check_range(offset, length)
            self._check_writable()
        if not length:
            return
        if (offset & self._mask) + length <= self._mask + 1:
            self._write_piece(offset, buffers, length)
            return
        pieces = list(self._pieces(offset, length))
        for (at, count), part in zip(pieces, split_buffers(buffers, (count for _, count in pieces)), strict=True):
            self._write_piece(at, part, count)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """A range cut at the granules' borders: (offset, length)."""
        end = offset + length
        while offset < end:
            count = min(end - offset, self._mask + 1 - (offset & self._mask))
            yield offset, count
            offset += count

    def _write_piece(self, offset: int, buffers: Sequence[Buffer] | None, length: int) -> None:
        """Write inside one granule; None are zeros, in whole sectors."""
        granule = offset >> self.block_shift
        within = offset & self._mask
        place = self.direct_write.get(granule)
        if place is None:
            shared = self._shared_place(granule, within, length)
            place = shared if shared is not None and shared[0] == self.mixed_write_fd else None
        if place is not None:
            self._put(place[1] + within, buffers, length)
            return
        with self._write_lock:
            if self._is_closed:
                self._check_open()
            writer = self._writer
            if writer is None:
                place = self._map.keep_top(granule, granule << self.block_shift)
                self._put(place[1] + within, buffers, length)
                return
            if writer.is_half_full:
                self._relieve(writer)
            if writer.is_child:
                self._write_child(writer, granule, offset, buffers, length)
                return
            block, within = divmod(offset, self._top.block_bytes)
            data = writer.data_offset(block)
            if data is None:
                writer.write_new(block, within, buffers or (), length)
                self._map.forget_block(block)
            else:
                self._put(data + within, buffers, length)
            self._map.resolve(granule)

    def _put(self, at: int, buffers: Sequence[Buffer] | None, length: int) -> None:
        """Write data or zeros at a place in the top file."""
        if buffers is None:
            self._io.write_zeros(self._top.fd, at, length)
        else:
            self._io.write_data(self._top.fd, buffers, at, length)

    def _write_child(
        self, writer: TopWriter, granule: int, offset: int, buffers: Sequence[Buffer] | None, length: int
    ) -> None:
        """Write inside one granule of a differencing disk; sectors that become the child's are completed first."""
        block, within = divmod(offset, writer.block_bytes)
        data = writer.data_offset(block)
        first, end = within // SECTOR_BYTES, -(-(within + length) // SECTOR_BYTES)
        bits = wanted = bitmap.mask(first, end - first, writer.sectors)
        if data is not None and (bits := writer.bits(block)) & wanted == wanted:
            self._put(data + within, buffers, length)
        else:
            if buffers is not None:
                first, end, buffers = self._completed(0 if data is None else bits, writer, offset, buffers, length)
                within, length = first * SECTOR_BYTES, (end - first) * SECTOR_BYTES
            if data is None:
                writer.write_new(block, within, buffers or (), length)  # a new block holds zeros already
            else:
                self._put(data + within, buffers, length)
                bits |= bitmap.mask(first, end - first, writer.sectors)
                writer.keep_bits(block, bits, first, end - first)
            self._map.forget_sectors(granule, first % ((self._mask + 1) // SECTOR_BYTES), end - first)
        self._keep_whole(writer, granule, bits)

    def _completed(
        self, bits: int, writer: TopWriter, offset: int, buffers: Sequence[Buffer], length: int
    ) -> tuple[int, int, Sequence[Buffer]]:
        """What a write is to be, in a block that has these bits: its sectors there and their content.

        They are whole, and all of the cell where that is wanted (`cells`) and the files below can be read.
        """
        within = offset % writer.block_bytes
        first, end = within // SECTOR_BYTES, -(-(within + length) // SECTOR_BYTES)
        after = self._fills_cells_after
        if after is not None and writer.taken_sectors >= after and self.backing is None:
            low, high = widened(bits, writer.sectors, first, end, self._cell_sectors)
            high = min(high, (self._size - offset + within) // SECTOR_BYTES)
            if low < first or end < high:
                with contextlib.suppress(OSError, VhdError):  # whoever reads there hears of it; this write can be done
                    around = within - low * SECTOR_BYTES, high * SECTOR_BYTES - within - length
                    return low, high, self._filled_up(offset, buffers, length, *around)
        around = within - first * SECTOR_BYTES, end * SECTOR_BYTES - within - length
        return first, end, self._surrounded(offset, buffers, length, *around)

    def _filled_up(self, offset: int, buffers: Sequence[Buffer], length: int, head: int, tail: int) -> Sequence[Buffer]:
        """The same as `_surrounded`, of a short write in one piece: two system calls less than in three."""
        if head + length + tail > CELL_BYTES:
            return self._surrounded(offset, buffers, length, head, tail)
        if self._cell is None:
            self._cell = memoryview(bytearray(CELL_BYTES))
        cell = self._cell[: head + length + tail]
        self.preadv(offset - head, (cell,))
        for buffer in buffers:
            cell[head : head + len(buffer)] = buffer
            head += len(buffer)
        return (cell,)

    def _surrounded(
        self, offset: int, buffers: Sequence[Buffer], length: int, head: int, tail: int
    ) -> Sequence[Buffer]:
        """The buffers with so many bytes before and behind them as they are on the disk."""
        if not head and not tail:
            return buffers
        return [self._read_bytes(offset - head, head), *buffers, self._read_bytes(offset + length, tail)]

    def _keep_whole(self, writer: TopWriter, granule: int, bits: int) -> None:
        """Let a granule be direct once the top, of whose block these are the bits, has all of its sectors."""
        start = granule << self.block_shift
        block, within = divmod(start, writer.block_bytes)
        here = min(self._mask + 1, self._size - start) // SECTOR_BYTES
        if bits.bit_count() >= here:
            whole = bitmap.mask(within // SECTOR_BYTES, here, writer.sectors)
            if bits & whole == whole:
                data = writer.data_offset(block)
                assert data is not None
                self._map.keep_top(granule, data + within)

    def _read_bytes(self, offset: int, length: int) -> bytearray:
        buffer = bytearray(length)
        self.preadv(offset, (memoryview(buffer),))
        return buffer

    def _relieve(self, writer: TopWriter) -> None:
        """Much waits for a flush: let one be made behind the requests, or make it here where that cannot be done."""
        if self._io.is_threaded:
            if writer.is_full:
                writer.make_room()
            self._behind.start(writer)
        elif writer.is_full:
            writer.flush()

    def flush(self) -> None:
        """Make all durable that was written before this call; requests go on meanwhile, and those that flush share it.

        Raises: OSError.
        """
        if self._read_only:
            self._check_open()
            return
        self._flushes.run(self._make_durable)

    def flush_ahead(self) -> None:
        """The same, so that a later flush has less to do, and nobody is told that it was done.

        Raises: OSError, which the next `flush` raises as well: whoever asks for that was promised something.
        """
        if not self._read_only:
            self._flushes.run(self._make_durable, is_ahead=True)

    def _make_durable(self) -> None:
        while True:
            self._complete()
            with self._write_lock:
                self._check_open()
                if not self._unfinished:
                    top, writer = self._top, self._writer
                    break
        self._sync(top, writer)
        if self._top is not top:  # an exchange makes that one durable as well, and may have heard what we did not
            with self._finish_lock:
                pass  # it has been kept by now, for `SharedFlush` to tell

    def _flush(self) -> None:
        self._sync(self._top, self._writer)

    def _sync(self, top: Image, writer: TopWriter | None) -> None:
        if writer is not None:
            writer.flush()
        else:
            self._io.sync_file(top.fd)

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
        if self.backing is None and all(fd == NOWHERE for fd, _, _ in self._map.segments(offset, length)):
            return
        head = min(length, -offset % SECTOR_BYTES)
        tail = (offset + length) % SECTOR_BYTES if length > head else 0
        for at, count in ((offset, head), (offset + length - tail, tail)):
            if count:
                self._write_piece(at, [ZEROS[:count]], count)
        if length > head + tail:
            self._write_piece(offset + head, None, length - head - tail)

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
            for stop, found in self._extents_at(offset, end):
                if kind is not None and found is not kind:
                    yield Extent(start, offset - start, kind)
                    start = offset
                kind, offset = found, stop
        if kind is not None:
            yield Extent(start, end - start, kind)

    def _extents_at(self, offset: int, end: int) -> Iterator[tuple[int, ExtentKind]]:
        """What is at the offset: up to where, at least, and its kind; more than one where the backing has it."""
        if self._top.header is None:
            yield self._extent_of_fixed(offset, end)
            return
        stop = min(end, (offset | self._mask) + 1)
        fd, _, count = self._map.segments(offset, stop - offset)[0]
        if fd != NOWHERE:
            yield offset + count, ExtentKind.DATA
            return
        stop = offset + count if offset + count < stop else min(end, self._map.next_used(stop))
        if self.backing is None:
            yield stop, ExtentKind.HOLE
            return
        for extent in self.backing.extents(offset, stop - offset):
            yield extent.offset + extent.length, extent.kind

    def _extent_of_fixed(self, offset: int, end: int) -> tuple[int, ExtentKind]:
        with self._write_lock:  # lseek moves a position that nothing else uses
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
                self.complete()
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
        self._behind.join()
        with self._flushes.lock, self._write_lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._map.clear()
            for writer in (self._writer, *(one.writer for one in self._unfinished)):
                if writer is not None:
                    writer.close_log(remove=is_clean)
            if is_clean:
                write_holder(self._top.fd, "")
                end_session(self._top.fd)
            for image in (*self._images, *(one.image for one in self._unfinished)):
                if image.fd >= 0:
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
    size_from: SizeFrom = SizeFrom.FOOTER,
    fills_cells: bool = False,
) -> Chain:
    """Open a disk with all its parents.

    Opening for writing mends what a crash may have left: replays the pending log, writes a missing footer at the end,
    gives orphan room back; `warnings` tells. `allowed_dirs` are the folders that parents may lie in (default: that of
    `path`), `limit` is the longest chain, `holder` is shown to whoever finds the disk busy. `size_from` says which size
    of the two in its footer the disk has; for writing only the current one. `fills_cells`: see `from_descriptors`.

    Raises: InvalidError, NotFoundError, DeniedError; VhdError for what is wrong with a file; DiskBusyError;
    HalfMergedError; OSError.
    """
    if size_from is not SizeFrom.FOOTER and not read_only:
        raise InvalidError(
            f"{path} can only be read by its CHS size, not written",
            remedy=f"Copy it, and write to the copy: mullion vhd convert {shlex.quote(path)} COPY.vhd --size-from chs",
            path=path,
        )
    fd = open_file(path, writable=not read_only)
    images: list[Image] = []
    try:
        lock_file(fd, path, for_writing=not read_only)
        if read_only:
            lock_content(fd, path)
        images = open_parents(
            load_image(fd, path, size_from=size_from), allowed_dirs=allowed_dirs, limit=limit, lock=True
        )
        check_marks(images)
        return Chain(
            images,
            read_only=read_only,
            pending_path=pending_path,
            holder=holder,
            file_io=file_io,
            fills_cells=fills_cells,
        )
    except BaseException:
        for image in images[1:]:
            image.close()
        os.close(fd)
        raise
