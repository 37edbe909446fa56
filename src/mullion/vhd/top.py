"""The file at the top of a chain while it is written: room for new blocks, changes that wait, the order of writing.

Durability (FORMAT: "Writing safely"). Between two flushes the file gets data, the bitmaps of blocks that no BAT entry
points to yet, and a footer at its new end. `flush` then does, in this order:

    1  take what has changed until now     4  write its BAT entries, and its bitmap bits of older blocks
    2  write the bitmaps of its new blocks 5  fdatasync
    3  fdatasync                           6  free its area of the pending log

Requests go on meanwhile: what they change is taken by the next flush, and shows in nothing that this one writes. So all
that 4 makes visible was there before 3 began. A flush that fails is repeated by the next one, with what it had taken,
before that one takes anything: a block whose BAT entry may be on the platter already is not new any more.

A crash before 4 leaves the state of the last flush and orphan bytes behind the last block; the tail footer may be gone,
because a new block is written over it, and the copy at byte 0 stands in. During 4 each sector of BAT and bitmap is old
or new, and what the new ones point to is durable. So a BAT entry never precedes its bitmap, a bit never its data.

Room is taken in batches: the footer goes to the far end once, then blocks fill the gap without more metadata. Closing,
and the next opening after a crash, give the unused rest back (`mend`); on a full file system that may have to wait.

No space: data, bitmap and footer of a new block are written before anything is recorded. A slot whose write failed is
emptied and used again, or, where holes cannot be punched, never used again; either way nothing became visible and the
request can be repeated.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from mullion.base.block import Buffer, raised_again
from mullion.base.units import MIB, SECTOR_BYTES
from mullion.vhd import bat as bat_table
from mullion.vhd import bitmap
from mullion.vhd.create import DATA_ALIGNMENT, footer_place
from mullion.vhd.errors import VhdDamagedError, VhdUnsupportedError
from mullion.vhd.file_end import write_end
from mullion.vhd.fileio import FileIO
from mullion.vhd.findings import Kind
from mullion.vhd.image import Image
from mullion.vhd.layout import FOOTER_BYTES, DiskType
from mullion.vhd.pending import RECORD_LIMIT, PendingLog, Record, RecordKind
from mullion.vhd.storage import is_full

RESERVE_BYTES: Final = 64 * MIB
"""Room that is taken at once for new blocks; sparse, so it costs nothing until it is used."""
_RESERVE_BLOCKS: Final = 256
_CACHED_BITMAP_BYTES: Final = MIB
_DIRTY_BITMAP_BYTES: Final = 2 * MIB
_RECORDS_PER_WRITE: Final = 2
_BLANK_ENTRY: Final = bat_table.UNALLOCATED.to_bytes(bat_table.ENTRY_BYTES, "big")


Run = tuple[int, Sequence[Buffer]]
"""Offset in a block, content."""


@dataclass(slots=True)
class _Changes:
    """Metadata that waits for a flush, or is being flushed."""

    bat: set[int] = field(default_factory=set)
    """Sectors of the BAT."""
    new_blocks: set[int] = field(default_factory=set)
    bits: dict[int, int] = field(default_factory=dict)
    """Block → all of its bitmap."""
    records: int = 0

    def __bool__(self) -> bool:
        return bool(self.bat or self.bits)


class TopWriter:
    """A dynamic or differencing disk that is open for writing.

    Threads: `bits`, `data_offset` and whatever flushes may be called by anyone; the chain serialises everything else.
    """

    def __init__(self, image: Image, file_io: FileIO) -> None:
        self.image = image
        self.is_child = image.kind is DiskType.DIFFERENCING
        self._io = file_io
        self._log: PendingLog | None = None
        self.taken_sectors = 0
        """How many became the disk's own since it was opened, in blocks that it had."""
        self.block_bytes = image.block_bytes
        self.sectors = self.block_bytes // SECTOR_BYTES
        """Of a block."""
        self._bitmap_bytes = image.bitmap_bytes
        self._full_bitmap = b"\xff" * self._bitmap_bytes
        """Of a dynamic disk's block."""
        self._next = image.footer_offset
        self._has_grown = False
        self._flush_lock = threading.Lock()
        """Held while a flush runs; taken before `_state`, behind all others."""
        self._failure: OSError | None = None
        self._is_retired = False
        self._state = threading.Lock()
        """Guards what follows, and the log."""
        self._waiting = _Changes()
        self._taken: _Changes | None = None
        """What the flush that runs has taken, or the one that failed."""
        self._clean_bits: OrderedDict[int, int] = OrderedDict()
        self._clean_limit = max(4, _CACHED_BITMAP_BYTES // self._bitmap_bytes)
        self._dirty_limit = max(4, _DIRTY_BITMAP_BYTES // self._bitmap_bytes)

    def keep_log(self, log: PendingLog) -> None:
        """Keep what waits in this log from now on; nothing waits yet."""
        assert not self.has_pending
        self._log = log

    def restart(self) -> None:
        """The structures of the file were changed by somebody else, while nothing was pending and no room taken."""
        assert not self.has_pending
        self._next = self.image.footer_offset
        self._has_grown = self._has_grown or not self.image.has_tail  # a change that was cut off: closing ends the file
        with self._state:
            self._clean_bits.clear()

    @property
    def is_full(self) -> bool:
        """Too much waits: `flush` or `make_room` before the next write."""
        waiting = self._waiting
        return waiting.records > RECORD_LIMIT - _RECORDS_PER_WRITE or len(waiting.bits) >= self._dirty_limit

    @property
    def is_half_full(self) -> bool:
        """It is time to flush behind the requests."""
        waiting = self._waiting
        return waiting.records > RECORD_LIMIT // 2 or len(waiting.bits) > self._dirty_limit // 2

    @property
    def has_pending(self) -> bool:
        return self._taken is not None or bool(self._waiting)

    @property
    def has_failed(self) -> bool:
        """A flush that nobody waited for did not succeed: the next one tells."""
        return self._failure is not None

    def data_offset(self, block: int) -> int | None:
        """Where the block's data begins in the file; None when it is not allocated."""
        start = self.image.block_start(block)
        return None if start is None else start + self._bitmap_bytes

    def bits(self, block: int) -> int:
        """The sector bitmap of a differencing disk's block, waiting changes included."""
        with self._state:
            return self._bits(block)

    def _bits(self, block: int) -> int:
        found = self._waiting.bits.get(block)
        if found is None and self._taken is not None:
            found = self._taken.bits.get(block)
        if found is not None:
            return found
        found = self._clean_bits.get(block)
        if found is not None:
            self._clean_bits.move_to_end(block)
            return found
        start = self.image.block_start(block)
        found = 0 if start is None else self.image.read_bits(start, 0, self.sectors)
        self._keep_clean(block, found)
        return found

    def write_new(self, block: int, within: int, buffers: Sequence[Buffer], length: int) -> None:
        """Allocate a block and write into it; in a differencing disk the range is in whole sectors.

        Raises: OSError, with nothing changed that can be seen; VhdUnsupportedError at the format's limit.
        """
        first, count = within // SECTOR_BYTES, length // SECTOR_BYTES
        if self.is_child:
            bits = bitmap.mask(first, count, self.sectors)
            raw = bitmap.to_raw(bits, self.sectors, self._bitmap_bytes)
        else:
            bits, raw = 0, self._full_bitmap
        entry = self._write_slot(raw, [(within, buffers)])
        records = [Record(RecordKind.ALLOC, block, entry, 0)]
        if self.is_child and count:
            records.append(Record(RecordKind.BITS, block, first, count))
        with self._state:
            self._record(records)
            self._allocate(block, entry)
            if self.is_child:
                self._waiting.bits[block] = bits

    def write_runs(self, block: int, runs: Sequence[Run]) -> None:
        """Allocate a dynamic disk's block that has data in some runs, and zeros elsewhere. Raises: as `write_new`."""
        entry = self._write_slot(self._full_bitmap, runs)
        with self._state:
            self._record([Record(RecordKind.ALLOC, block, entry, 0)])
            self._allocate(block, entry)

    def write_runs_again(self, block: int, runs: Sequence[Run]) -> None:
        """Write the same runs of a block that has them, or lost them in a flush that failed. Raises: OSError."""
        start = self.image.block_start(block)
        assert start is not None
        self._write_block(start, self._full_bitmap, runs)

    def _write_slot(self, raw: bytes, runs: Sequence[Run]) -> int:
        """Write a block into room of its own: the BAT entry that it is to have. Raises: as `write_new`."""
        start = self._take_slot()
        try:
            self._write_block(start, raw, runs)
        except OSError:
            self._give_back(start)
            raise
        return start // SECTOR_BYTES

    def _write_block(self, start: int, raw: bytes, runs: Sequence[Run]) -> None:
        """Write the bitmap of a block, and data."""
        self._io.write_all(self.image.fd, [raw], start)
        for within, buffers in runs:
            self._io.write_data(self.image.fd, buffers, start + self._bitmap_bytes + within, sum(map(len, buffers)))

    def write_empty(self, block: int) -> int:
        """Allocate a block without content, and return where its data begins. Raises: as `write_new`."""
        self.write_new(block, 0, (), 0)
        data = self.data_offset(block)
        assert data is not None
        return data

    def set_bits(self, block: int, first: int, count: int) -> None:
        """Make sectors visible whose data was written into an allocated block."""
        self.keep_bits(block, self.bits(block) | bitmap.mask(first, count, self.sectors), first, count)

    def keep_bits(self, block: int, bits: int, first: int, count: int) -> None:
        """The same, for a caller that knows what the block's bitmap is with them."""
        self.taken_sectors += count
        with self._state:
            if self._log is not None:
                self._log.append_bits(block, first, count)
            waiting = self._waiting
            waiting.records += 1
            waiting.bits[block] = bits
            self._clean_bits.pop(block, None)

    def flush(self) -> None:
        """Make all durable that was written before this call. May be repeated after an OSError.

        Raises: OSError, also that of a flush that nobody waited for.
        """
        with self._flush_lock:
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise raised_again(failure) from failure
            if not self._is_retired:
                for _ in self.flush_steps():
                    pass

    def flush_steps(self) -> Iterator[None]:
        """The steps of `flush`, for one thread at a time; requests may go on between them and during each."""
        if self._taken is not None:
            yield from self._write_out(self._taken)
        if self._waiting:
            yield from self._write_out(self._take())
        else:
            self._io.sync_file(self.image.fd)

    def flush_behind(self) -> None:
        """Flush what waits, if that is much or was taken already. Raises: OSError, which the next `flush` tells too."""
        with self._flush_lock:
            if not self._is_retired and (self._taken is not None or self.is_half_full):
                self._flush_some()

    def make_room(self) -> None:
        """When too much waits, let it be taken by `flush_behind`; a flush that runs is waited for.

        Raises: OSError, when an earlier flush had failed and does so again.
        """
        with self._flush_lock:
            if self.is_full:
                if self._taken is not None:
                    self._flush_some()
                self._take()

    @contextlib.contextmanager
    def retired(self) -> Iterator[None]:
        """No flush writes during the block, nor after it when it ends well: the file counts no more."""
        with self._flush_lock:
            yield
            self._is_retired = True

    def _flush_some(self) -> None:
        """What an earlier flush has taken, or else what waits."""
        try:
            for _ in self._write_out(self._take() if self._taken is None else self._taken):
                pass
        except OSError as error:
            self._failure = error
            raise

    def _take(self) -> _Changes:
        """Take what waits for a flush; what changes from now on is the next one's."""
        assert self._taken is None
        with self._state:
            self._taken, self._waiting = self._waiting, _Changes()
            if self._log is not None:
                self._log.switch()
            return self._taken

    def _write_out(self, taken: _Changes) -> Iterator[None]:
        for block in sorted(taken.new_blocks & taken.bits.keys()):
            self._write_bitmap(block, taken.bits[block])
        yield
        self._io.sync_file(self.image.fd)
        yield
        for index in sorted(taken.bat):
            self._write_bat_sector(index)
        for block in sorted(taken.bits.keys() - taken.new_blocks):
            self._write_bitmap(block, taken.bits[block])
        yield
        self._io.sync_file(self.image.fd)
        yield
        with self._state:
            assert self._taken is taken, "one flush at a time"
            self._taken = None
            if self._log is not None:
                self._log.empty_other()
            for block, bits in taken.bits.items():
                if block not in self._waiting.bits:
                    self._keep_clean(block, bits)

    def replay(self, records: Sequence[Record], path: str) -> None:
        """Take over what a killed writer had acknowledged, from the log at `path`; the next flush writes it.

        Raises: VhdDamagedError when the records do not fit the disk.
        """
        table = self.image.bat
        for kind, block, first, count in records:
            known = block < len(table)
            if known and kind == RecordKind.ALLOC and table[block] in (bat_table.UNALLOCATED, first):
                if table[block] == first:  # perhaps on the platter, so that its bitmap follows its data
                    self._waiting.bat.add(block // bat_table.ENTRIES_PER_SECTOR)
                else:
                    self._allocate(block, first)
                if self.is_child:
                    self._waiting.bits[block] = 0
            elif known and kind == RecordKind.BITS and self.is_child and 0 < count <= self.sectors - first:
                self._waiting.bits[block] = self.bits(block) | bitmap.mask(first, count, self.sectors)
            else:
                raise self._bad_log(path, f"a record of kind {kind} for block {block}")
        self._waiting.records = len(records)
        self.image.check_entries()
        if self.image.damage:
            raise self._bad_log(path, self.image.damage[-1])

    def mend(self) -> list[str]:
        """Put the footer right behind the last block, when it is missing or a crash left it far out."""
        image = self.image
        end = image.data_end()
        place = footer_place(end)
        unused = image.blocks_end - end
        was_missing = not image.has_tail
        is_far = unused >= image.span_bytes and image.footer_offset > place
        if not (was_missing or is_far):
            return []
        if not self._end_at(end):
            return [f"there is no room for the footer behind the last block, at byte {place}: left for a later opening"]
        said: list[str] = []
        if was_missing:
            said.append(f"the footer at the end was missing: it was written again at byte {place}")
        if is_far or (was_missing and end + unused > place + FOOTER_BYTES):
            said.append(f"{unused} bytes behind the last block belonged to nothing: given back")
        return said

    def close_gap(self) -> None:
        """Give back the room that was taken for blocks and not used. Nothing may be pending."""
        if self._has_grown:
            self._has_grown = not self._end_at(self.image.data_end())

    def close_log(self, *, remove: bool) -> None:
        """Let the pending log go; `remove` it when nothing waits any more."""
        with self._flush_lock:
            if self._log is not None:
                self._log.close(remove=remove)

    def _end_at(self, end: int) -> bool:
        """End the file behind data that ends at `end`; False when the full file system has no room for the footer."""
        image = self.image
        try:
            write_end(image, end, self._io)
        except OSError as error:
            if not is_full(error):
                raise
            if not image.has_tail:
                self._next = image.footer_offset
            self._has_grown = True  # closing tries again
            return False
        image.findings = [found for found in image.findings if found.kind is not Kind.FOOTER_MISSING]
        self._next = image.footer_offset
        return True

    def _take_slot(self) -> int:
        start = self._align(self._next)
        if start + self.image.span_bytes > self.image.footer_offset:
            self._grow(start)
        self._next = start + self.image.span_bytes
        return start

    def _align(self, offset: int) -> int:
        """The first place for a bitmap from which on the data that follows it is aligned."""
        data = -(-(offset + self._bitmap_bytes) // DATA_ALIGNMENT) * DATA_ALIGNMENT
        return data - self._bitmap_bytes

    def _grow(self, start: int) -> None:
        """Move the footer out to make room for blocks from `start` on. One write grows the file and ends it well."""
        image = self.image
        stride = -(-image.span_bytes // DATA_ALIGNMENT) * DATA_ALIGNMENT
        wanted = max(1, min(_RESERVE_BLOCKS, RESERVE_BYTES // stride, len(image.bat) - image.bat.count_allocated()))
        possible = (bat_table.UNALLOCATED * SECTOR_BYTES - 1 - start) // stride + 1
        if possible <= 0:
            raise VhdUnsupportedError(
                f"{image.path} has reached 2 TiB, the largest file that a BAT can address",
                path=image.path,
                structure="BAT",
                remedy="Copy its content to a new disk, which wastes no room on gaps.",
            )
        place = footer_place(start + (min(wanted, possible) - 1) * stride + image.span_bytes)
        try:
            self._io.write_all(image.fd, [image.footer_raw], place)
        except OSError:
            with contextlib.suppress(OSError):  # the old end is the good one still; the first error is the one to tell
                self._io.ftruncate(image.fd, image.file_bytes)
            raise
        image.footer_offset, image.file_bytes, image.has_tail = place, place + FOOTER_BYTES, True
        self._has_grown = True

    def _give_back(self, start: int) -> None:
        """A slot whose write failed: empty it for the next one, or leave it as a gap for ever."""
        span = self.image.span_bytes
        with contextlib.suppress(OSError):
            self._io.punch_hole(self.image.fd, start, span)
            if self._next == start + span:
                self._next = start

    def _allocate(self, block: int, entry: int) -> None:
        self.image.bat[block] = entry
        self._waiting.bat.add(block // bat_table.ENTRIES_PER_SECTOR)
        self._waiting.new_blocks.add(block)

    def _record(self, records: Sequence[Record]) -> None:
        if self._log is not None:
            self._log.append(records)
        self._waiting.records += len(records)

    def _write_bitmap(self, block: int, bits: int) -> None:
        start = self.image.block_start(block)
        assert start is not None
        raw = bitmap.to_raw(bits, self.sectors, self._bitmap_bytes)
        self._io.write_all(self.image.fd, [raw], start)

    def _write_bat_sector(self, index: int) -> None:
        """Without the blocks that were allocated since this flush began."""
        header = self.image.header
        assert header is not None
        with self._state:
            raw = bytearray(bat_table.raw_sector(self.image.bat, index))
            if index in self._waiting.bat:
                first = index * bat_table.ENTRIES_PER_SECTOR
                for at in range(0, len(raw), bat_table.ENTRY_BYTES):
                    if first + at // bat_table.ENTRY_BYTES in self._waiting.new_blocks:
                        raw[at : at + bat_table.ENTRY_BYTES] = _BLANK_ENTRY
        self._io.write_all(self.image.fd, [raw], header.bat_offset + index * SECTOR_BYTES)

    def _keep_clean(self, block: int, bits: int) -> None:
        self._clean_bits[block] = bits
        self._clean_bits.move_to_end(block)
        while len(self._clean_bits) > self._clean_limit:
            self._clean_bits.popitem(last=False)

    def _bad_log(self, path: str, what: str) -> VhdDamagedError:
        return VhdDamagedError(
            f"{path}: the pending log does not fit {self.image.path}: {what}",
            path=path,
            structure="pending log",
            remedy=f"Remove {path}: writes since the last flush of this disk are lost then.",
        )
