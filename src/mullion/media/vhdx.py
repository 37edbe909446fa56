"""VHDX as far as we look into it ourselves: does it have a parent, a log to be replayed, and what does it hold.

Spec: Microsoft [MS-VHDX]: 2.2.2 headers, 2.2.3 region table, 2.5 BAT, 2.6 metadata. Integers are little-endian.

    64 KiB, 128 KiB   headers: "head" · 48 16 id of the log, zero when there is nothing in it
    192 KiB, 256 KiB  region tables: "regi" · 8 4 entries, each 32: 16 id · 8 offset · 4 length
    metadata region   "metadata" · 10 2 entries, from 32 on, each 32: 16 id · 4 offset in the region · 4 length
    BAT region        8 bytes a block: 3 bits of state; after every `chunk` blocks one entry for their bitmaps

What the file holds is read from the BAT here, since QEMU's driver calls everything data. That is done only where no log
could still change the BAT.
"""

from __future__ import annotations

import contextlib
import struct
import uuid
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from mullion.base.block import BlockDevice, Extent, ExtentKind, WritableBuffer
from mullion.base.units import MIB
from mullion.media.errors import ForeignDiskError
from mullion.media.headers import Source
from mullion.media.windows import ReadOnlyDevice

_HEADERS: Final = (64 << 10, 128 << 10)
_REGION_TABLES: Final = (192 << 10, 256 << 10)
_ENTRY_LIMIT: Final = 2047
_METADATA: Final = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
_BAT: Final = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le
_FILE_PARAMETERS: Final = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
_DISK_SIZE: Final = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8").bytes_le
_SECTOR_SIZE: Final = uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f").bytes_le
_PARENT_LOCATOR: Final = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
_HAS_PARENT: Final = 2
_STATE_MASK: Final = 7
_STATE_PRESENT: Final = 6
_BAT_PIECE_ENTRIES: Final = 8192
_MERGE: Final = (
    "QEMU cannot read a VHDX together with its parent. Merge the chain where it was made: `Merge-VHD`, or "
    "`Convert-VHD CHILD WHOLE.vhdx`, in PowerShell on Hyper-V."
)


def has_log(source: Source) -> bool:
    """Does either header, valid or not, name a log? Then it may hold what must be replayed."""
    return any(raw[:4] == b"head" and any(raw[48:64]) for raw in (source.read(at, 64) for at in _HEADERS))


def check_vhdx(source: Source) -> None:
    """Refuse a differencing disk. Raises: ForeignReferenceError with the parent's name; ForeignDiskError."""
    for table_at in _REGION_TABLES:
        regions = _regions(source, table_at)
        if _METADATA in regions:
            start, items = _metadata(source, regions[_METADATA])
            if _FILE_PARAMETERS not in items:
                source.refuse("it has no file parameters", "VHDX metadata", start)
            at = items[_FILE_PARAMETERS][0]
            (flags,) = source.fields("<I", at + 4, "VHDX file parameters")
            if flags & _HAS_PARENT:
                name = _parent(source, *items.get(_PARENT_LOCATOR, (0, 0)))
                what = "it is a differencing disk, its parent is"
                source.refuse_reference(what, name, "VHDX file parameters", at, _MERGE)


def _regions(source: Source, table_at: int) -> dict[bytes, int]:
    """Where each region of a region table begins, by id."""
    if source.read(table_at, 4) != b"regi":
        return {}
    (count,) = source.fields("<I", table_at + 8, "VHDX region table")
    regions: dict[bytes, int] = {}
    for index in range(min(count, _ENTRY_LIMIT)):
        raw = source.read(table_at + 16 + 32 * index, 24)
        if len(raw) == 24:
            regions[raw[:16]] = struct.unpack_from("<Q", raw, 16)[0]
    return regions


def _metadata(source: Source, start: int) -> tuple[int, dict[bytes, tuple[int, int]]]:
    """The items of the metadata table, by id: offset in the file and length."""
    raw = source.read(start, 64 << 10)
    if raw[:8] != b"metadata":
        source.refuse("it has no metadata table", "VHDX metadata", start)
    items: dict[bytes, tuple[int, int]] = {}
    for index in range(min(struct.unpack_from("<H", raw, 10)[0], _ENTRY_LIMIT)):
        entry = raw[32 + 32 * index :][:32]
        if len(entry) == 32:
            offset, length = struct.unpack_from("<II", entry, 16)
            items[entry[:16]] = (start + offset, length)
    return start, items


def _parent(source: Source, at: int, length: int) -> str:
    """The parent's name in a parent locator, for the message."""
    raw = source.read(at, min(length, 64 << 10))
    names: dict[str, str] = {}
    count = struct.unpack_from("<H", raw, 18)[0] if len(raw) >= 20 else 0
    for index in range(min(count, 16)):
        entry = raw[20 + 12 * index :][:12]
        if len(entry) == 12:
            key_at, value_at, key_bytes, value_bytes = struct.unpack("<IIHH", entry)
            key = raw[key_at : key_at + key_bytes].decode("utf-16-le", "replace")
            names[key] = raw[value_at : value_at + value_bytes].decode("utf-16-le", "replace")
    known = ("absolute_win32_path", "relative_path", "volume_path")
    return next((names[key] for key in known if names.get(key)), "of an unknown name")


@dataclass(frozen=True, slots=True)
class BlockMap:
    """Where the BAT is, and how to count in it."""

    source: Source
    bat_at: int
    block_bytes: int
    chunk_blocks: int
    size_bytes: int

    def runs(self, first: int, end: int) -> Iterator[tuple[int, bool]]:
        """(end of the run, present) for the blocks from the first on; neighbours alike are one run, within a piece."""
        while first < end:
            index = first + first // self.chunk_blocks
            left = self.chunk_blocks - first % self.chunk_blocks
            count = min(end - first, left, _BAT_PIECE_ENTRIES)
            raw = self.source.read(self.bat_at + 8 * index, 8 * count)
            if len(raw) != 8 * count:
                self.source.refuse("the file ends inside it", "VHDX BAT", self.bat_at)
            entries = array("Q", raw)
            start = 0
            present = entries[0] & _STATE_MASK >= _STATE_PRESENT
            for place in range(1, count):
                if (entries[place] & _STATE_MASK >= _STATE_PRESENT) is not present:
                    yield first + place, present
                    start, present = place, not present
            if start < count:
                yield first + count, present
            first += count


def read_map(source: Source) -> BlockMap | None:
    """The map of a VHDX, or None when it is not certain: a log, or sizes that nobody writes."""
    if has_log(source):
        return None
    with contextlib.suppress(ForeignDiskError):
        regions = _regions(source, _REGION_TABLES[0])
        _, items = _metadata(source, regions.get(_METADATA, -1))
        if _BAT not in regions or not {_FILE_PARAMETERS, _DISK_SIZE, _SECTOR_SIZE} <= set(items):
            return None
        (block_bytes,) = source.fields("<I", items[_FILE_PARAMETERS][0], "VHDX file parameters")
        (size_bytes,) = source.fields("<Q", items[_DISK_SIZE][0], "VHDX disk size")
        (sector_bytes,) = source.fields("<I", items[_SECTOR_SIZE][0], "VHDX sector size")
        if block_bytes % MIB or not 0 < block_bytes <= 256 * MIB or sector_bytes not in (512, 4096):
            return None
        return BlockMap(source, regions[_BAT], block_bytes, (sector_bytes << 23) // block_bytes, size_bytes)
    return None


class VhdxDisk(ReadOnlyDevice):
    """A VHDX that another device reads, with what is allocated as its BAT says. The device stays the caller's."""

    def __init__(self, device: BlockDevice, blocks: BlockMap) -> None:
        super().__init__(blocks.source.path, device.size_bytes)
        self._device = device
        self._blocks = blocks

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        self._device.pread(offset, buffer)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        self._check_range(offset, length)
        if not length:
            return
        size, end = self._blocks.block_bytes, offset + length
        start, kind = offset, None
        for until, is_present in self._blocks.runs(offset // size, -(-end // size)):
            found = ExtentKind.DATA if is_present else ExtentKind.HOLE
            if kind is not None and found is not kind:
                yield Extent(start, offset - start, kind)
                start = offset
            kind, offset = found, min(end, until * size)
        assert kind is not None
        yield Extent(start, end - start, kind)

    def close(self) -> None:
        """Nothing of this device's own is open."""
