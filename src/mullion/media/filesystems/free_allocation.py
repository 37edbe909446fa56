"""The allocation tables of NTFS, FAT, exFAT and ext, read with suspicion: which bytes of a volume are free for sure.

Each function gives (offset, length) in bytes from the start of the volume, ascending, and raises `DoubtError` before it
gives anything it is not sure of. ext is sure group by group: one whose bitmap disagrees with its counter is left out.

Sources: Microsoft, "FAT: General Overview of On-Disk Format" 1.03 and "exFAT file system specification"; the Linux
kernel's Documentation/filesystems/ext4; NTFS as described by the Linux-NTFS project ($Boot, $Volume, $LogFile,
$Bitmap). Integers are little-endian, bit 0 of a bitmap's byte comes first.

Invariants: what is read at once is at most `_PIECE_BYTES`, whatever a number in the volume says.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from mullion.base.block import BlockDevice
from mullion.base.units import MIB

Range = tuple[int, int]
_PIECE_BYTES: Final = MIB
_RUN: Final = re.compile(rb"\x00+|\xff+|[^\x00\xff]+", re.DOTALL)


class DoubtError(Exception):
    """The free space of a volume cannot be relied on; the text says why."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """The bytes of a volume."""

    device: BlockDevice
    offset: int
    length: int

    def read(self, at: int, count: int) -> bytes:
        """Exactly these bytes of the volume. Raises: DoubtError when they are not all in it."""
        if at < 0 or count < 0 or count > _PIECE_BYTES or at + count > self.length:
            raise DoubtError(f"its structures point to byte {at}, outside of it")
        buffer = bytearray(count)
        self.device.pread(self.offset + at, buffer)
        return bytes(buffer)

    def fields(self, layout: str, at: int) -> tuple[int, ...]:
        return struct.unpack(layout, self.read(at, struct.calcsize(layout)))

    def pieces(self, at: int, count: int) -> Iterator[bytes]:
        """A long range, piece by piece."""
        for start in range(at, at + count, _PIECE_BYTES):
            yield self.read(start, min(_PIECE_BYTES, at + count - start))


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise DoubtError(what)


def clear_bits(pieces: Iterable[bytes], count: int) -> Iterator[Range]:
    """The runs of clear bits among the first `count` of a bitmap: (first, length), neighbours not joined."""
    base = 0
    for piece in pieces:
        for match in _RUN.finditer(piece):
            first, run = base + match.start() * 8, match.group()
            if first >= count:
                return
            if run[0] == 0:
                yield first, min(len(run) * 8, count - first)
            elif run[0] != 0xFF or run.strip(b"\xff"):
                yield from _clear_bits_of(run, first, count)
        base += len(piece) * 8


def _clear_bits_of(run: bytes, first: int, count: int) -> Iterator[Range]:
    """Of mixed bytes."""
    for index, byte in enumerate(run):
        at = first + index * 8
        for bit in range(8):
            if not byte >> bit & 1 and at + bit < count:
                yield at + bit, 1


# ---------------------------------------------------------------------------------------------------------------- FAT


def fat(volume: Bytes) -> Iterator[Range]:
    """FAT12, FAT16, FAT32. What is free has a zero entry in all copies of the table, which must be equal."""
    sector_bytes, cluster_sectors, reserved, copies, root_entries, total16 = volume.fields("<HBHBHH", 11)
    (table16,) = volume.fields("<H", 22)
    total32, table32, flags32 = volume.fields("<IIH", 32)
    table_sectors, total = table16 or table32, total16 or total32
    _require(sector_bytes in (512, 1024, 2048, 4096), "its sector size is none")
    _require(cluster_sectors > 0 and cluster_sectors & (cluster_sectors - 1) == 0, "its cluster size is none")
    _require(copies in (1, 2) and reserved > 0 and table_sectors > 0, "its table is missing")
    _require(total * sector_bytes <= volume.length, "it is longer than its partition")
    root_sectors = -(-root_entries * 32 // sector_bytes)
    data_sector = reserved + copies * table_sectors + root_sectors
    _require(data_sector < total, "it has no data")
    clusters = (total - data_sector) // cluster_sectors
    bits = 12 if clusters < 4085 else 16 if clusters < 65525 else 32
    _require(bits == 32 or table16 != 0, "its size fits no FAT")
    _require(bits != 32 or not flags32 & 0x80, "only one copy of its table is in use")
    table_bytes = (clusters + 2) * bits // 8 + 1
    _require(table_bytes - 1 <= table_sectors * sector_bytes, "its table is too short")
    start = reserved * sector_bytes
    if copies == 2:
        other = start + table_sectors * sector_bytes
        for one, two in zip(volume.pieces(start, table_bytes), volume.pieces(other, table_bytes), strict=True):
            _require(one == two, "the two copies of its table differ")
    _require_clean_fat(volume, start, bits)
    cluster_bytes = cluster_sectors * sector_bytes
    entries = _fat12_entries(volume, start, clusters) if bits == 12 else _fat_entries(volume, start, clusters, bits)
    for first, length in entries:
        yield data_sector * sector_bytes + first * cluster_bytes, length * cluster_bytes


def _require_clean_fat(volume: Bytes, start: int, bits: int) -> None:
    """The second entry has two bits that are set while the volume is unmounted and without errors; FAT12 has none."""
    if bits == 16:
        _require(volume.fields("<H", start + 2)[0] >> 14 == 3, "it was not unmounted")
    elif bits == 32:
        _require(volume.fields("<I", start + 4)[0] >> 26 & 3 == 3, "it was not unmounted")


def _fat12_entries(volume: Bytes, start: int, clusters: int) -> Iterator[Range]:
    table = volume.read(start, (clusters + 2) * 3 // 2 + 1)
    for cluster in range(2, clusters + 2):
        pair = table[cluster * 3 // 2] | table[cluster * 3 // 2 + 1] << 8
        if not (pair >> 4 if cluster & 1 else pair & 0xFFF):
            yield cluster - 2, 1


def _fat_entries(volume: Bytes, start: int, clusters: int, bits: int) -> Iterator[Range]:
    size, mask = bits // 8, 0xFFFF if bits == 16 else 0x0FFFFFFF
    number = 0
    for piece in volume.pieces(start + 2 * size, clusters * size):
        if not any(piece):
            yield number, len(piece) // size
        else:
            entries = array("H" if bits == 16 else "I", piece)
            for index, entry in enumerate(entries):
                if not entry & mask:
                    yield number + index, 1
        number += len(piece) // size


# -------------------------------------------------------------------------------------------------------------- exFAT


def exfat(volume: Bytes) -> Iterator[Range]:
    """exFAT: the allocation bitmap, which a directory entry of type 0x81 in the root names."""
    sectors, fat_at, _, heap_at, clusters, root = volume.fields("<QIIIII", 72)
    flags, sector_shift, cluster_shift, copies = volume.fields("<HBBB", 106)
    _require(9 <= sector_shift <= 12 and cluster_shift <= 25 - sector_shift, "its cluster size is none")
    _require(copies == 1 and not flags & 0b111, "it was not unmounted, or has two tables")
    cluster_bytes = 1 << (sector_shift + cluster_shift)
    heap = heap_at << sector_shift
    _require(sectors << sector_shift <= volume.length, "it is longer than its partition")
    _require(heap + clusters * cluster_bytes <= volume.length, "its clusters reach out of it")

    def place(cluster: int) -> int:
        _require(2 <= cluster < clusters + 2, f"it has no cluster {cluster}")
        return heap + (cluster - 2) * cluster_bytes

    first, length = _exfat_bitmap(volume, place(root), min(cluster_bytes, _PIECE_BYTES))
    _require(length == -(-clusters // 8), "its bitmap has not one bit for each cluster")
    for index in range(-(-length // cluster_bytes) - 1):  # in one piece, as everybody makes it
        following = volume.fields("<I", (fat_at << sector_shift) + (first + index) * 4)[0]
        _require(following == first + index + 1, "its bitmap is in several pieces")
    start = place(first)
    for cluster in (root, first):
        byte = volume.read(start + (cluster - 2) // 8, 1)[0]
        _require(bool(byte >> (cluster - 2) % 8 & 1), "its bitmap says that it is itself free")
    for number, count in clear_bits(volume.pieces(start, length), clusters):
        yield heap + number * cluster_bytes, count * cluster_bytes


def _exfat_bitmap(volume: Bytes, root: int, count: int) -> Range:
    """First cluster and length of the bitmap, from the root's first cluster."""
    directory = volume.read(root, count)
    for at in range(0, count, 32):
        if directory[at] == 0x81 and not directory[at + 1] & 1:
            first, length = struct.unpack_from("<IQ", directory, at + 20)
            return first, length
        if directory[at] == 0:
            break
    raise DoubtError("its bitmap is not where everybody puts it")


# --------------------------------------------------------------------------------------------------------------- NTFS

_DATA: Final = 0x80
_VOLUME_INFORMATION: Final = 0x70
_ATTRIBUTE_LIST: Final = 0x20
_END: Final = 0xFFFFFFFF
_HARMLESS_FLAGS: Final = 0x88
"""Mounted on NT 4; and one without a name that Windows 10 leaves on every volume (seen in the fixtures)."""
_RUN_LIMIT: Final = 4096


@dataclass(frozen=True, slots=True)
class _Ntfs:
    """Sizes from the boot sector."""

    volume: Bytes
    cluster_bytes: int
    clusters: int
    table_at: int
    record_bytes: int

    def attributes(self, number: int) -> dict[int, bytes]:
        """The unnamed attributes of one of the first records of the MFT, whole, by type."""
        raw = bytearray(self.volume.read(self.table_at + number * self.record_bytes, self.record_bytes))
        _require(raw[:4] == b"FILE", f"its record {number} is none")
        fixups_at, fixups = struct.unpack_from("<HH", raw, 4)
        _require(fixups == self.record_bytes // 512 + 1 and fixups_at + 2 * fixups <= 512, "a record is torn")
        for index in range(1, fixups):
            end = index * 512
            _require(raw[end - 2 : end] == raw[fixups_at : fixups_at + 2], f"its record {number} is torn")
            raw[end - 2 : end] = raw[fixups_at + 2 * index : fixups_at + 2 * index + 2]
        found: dict[int, bytes] = {}
        at = struct.unpack_from("<H", raw, 20)[0]
        while at + 24 <= len(raw):
            kind, length = struct.unpack_from("<II", raw, at)
            if kind == _END:
                return found
            _require(24 <= length <= len(raw) - at, f"its record {number} is damaged")
            if raw[at + 9] == 0:
                found[kind] = bytes(raw[at : at + length])
            at += length
        raise DoubtError(f"its record {number} does not end")

    def runs(self, attribute: bytes) -> tuple[list[Range], int]:
        """Where a stored attribute lies, (offset, length) in bytes, and how long it is."""
        _require(attribute[8] == 1 and len(attribute) >= 64, "a system file is inside its record")
        lowest, _, at = struct.unpack_from("<QQH", attribute, 16)
        (flags,) = struct.unpack_from("<H", attribute, 12)
        _, size, initialized = struct.unpack_from("<QQQ", attribute, 40)
        _require(lowest == 0 and flags == 0 and size == initialized, "a system file is not whole")
        runs: list[Range] = []
        cluster = 0
        while at < len(attribute) and attribute[at]:
            count_bytes, place_bytes = attribute[at] & 15, attribute[at] >> 4
            _require(0 < count_bytes <= 8 and 0 < place_bytes <= 8 and len(runs) < _RUN_LIMIT, "a run is none")
            count = int.from_bytes(attribute[at + 1 : at + 1 + count_bytes], "little")
            step = attribute[at + 1 + count_bytes : at + 1 + count_bytes + place_bytes]
            cluster += int.from_bytes(step, "little", signed=True)
            _require(cluster >= 0 and count > 0 and cluster + count <= self.clusters, "a run leads out of it")
            runs.append((cluster * self.cluster_bytes, count * self.cluster_bytes))
            at += 1 + count_bytes + place_bytes
        _require(sum(length for _, length in runs) >= size, "a system file is shorter than it says")
        return runs, size


def ntfs(volume: Bytes) -> Iterator[Range]:
    """NTFS: the content of $Bitmap, when the volume's flags and its log say that it was unmounted."""
    boot = _ntfs_boot(volume)
    _require_clean_ntfs(boot)
    attributes = boot.attributes(6)
    _require(_DATA in attributes and _ATTRIBUTE_LIST not in attributes, "its bitmap is in several records")
    runs, size = boot.runs(attributes[_DATA])
    _require(size * 8 >= boot.clusters, "its bitmap is too short")
    for place in (0, boot.table_at, *(start for start, _ in runs)):
        cluster = place // boot.cluster_bytes
        byte = volume.read(_within(runs, cluster // 8), 1)[0]
        _require(bool(byte >> cluster % 8 & 1), "its bitmap says that it is itself free")
    for first, count in clear_bits(_stored(volume, runs, size), boot.clusters):
        yield first * boot.cluster_bytes, count * boot.cluster_bytes


def _ntfs_boot(volume: Bytes) -> _Ntfs:
    sector_bytes, cluster_sectors = volume.fields("<HB", 11)
    sectors, table = volume.fields("<QQ", 40)
    (record,) = volume.fields("<b", 64)
    _require(sector_bytes in (512, 1024, 2048, 4096), "its sector size is none")
    cluster_sectors = 1 << (256 - cluster_sectors) if cluster_sectors > 128 else cluster_sectors
    cluster_bytes = sector_bytes * cluster_sectors
    _require(512 <= cluster_bytes <= 2 * MIB and cluster_bytes & (cluster_bytes - 1) == 0, "its cluster size is none")
    record_bytes = record * cluster_bytes if record > 0 else 1 << -record
    _require(record_bytes in (1024, 2048, 4096), "the size of its records is none")
    _require(sectors * sector_bytes <= volume.length, "it is longer than its partition")
    return _Ntfs(volume, cluster_bytes, sectors // cluster_sectors, table * cluster_bytes, record_bytes)


def _require_clean_ntfs(boot: _Ntfs) -> None:
    information = boot.attributes(3).get(_VOLUME_INFORMATION, b"")
    _require(len(information) >= 36 and information[8] == 0, "its flags are missing")
    (content_at,) = struct.unpack_from("<H", information, 20)
    flags = struct.unpack_from("<H", information, content_at + 10)[0] if content_at + 12 <= len(information) else 1
    _require(not flags & ~_HARMLESS_FLAGS, "it is marked as dirty, or as to be checked")
    log = boot.attributes(2)
    _require(_DATA in log, "its log is missing")
    runs, size = boot.runs(log[_DATA])
    _require(size >= 8192, "its log is too short")
    page = boot.volume.read(runs[0][0], 512)
    if page[:4] == b"\xff" * 4:
        return  # emptied: there is nothing in it
    _require(page[:4] == b"RSTR", "its log is damaged")
    (page_bytes,) = struct.unpack_from("<I", page, 16)
    _require(512 <= page_bytes <= 65536, "its log is damaged")
    for restart in (page, boot.volume.read(_within(runs, page_bytes), 512)):
        if restart[:4] == b"RSTR":
            (area,) = struct.unpack_from("<H", restart, 24)
            _require(area + 16 <= 510, "its log is damaged")
            in_use, marks = struct.unpack_from("<HH", restart, area + 12)
            _require(in_use == 0xFFFF or bool(marks & 2), "its log holds what was not finished: it was not shut down")


def _within(runs: list[Range], at: int) -> int:
    """The place in the volume of a byte of a stored attribute."""
    for start, length in runs:
        if at < length:
            return start + at
        at -= length
    raise DoubtError("a system file is too short")


def _stored(volume: Bytes, runs: list[Range], size: int) -> Iterator[bytes]:
    for start, length in runs:
        count = min(length, size)
        yield from volume.pieces(start, count)
        size -= count


# ---------------------------------------------------------------------------------------------------------------- ext

_EXT_CLEAN: Final = 1
_EXT_ERRORS: Final = 2
_INCOMPATIBLE: Final = 0x2 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000
"""filetype, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed; not recover: a journal that must be replayed."""
_READ_ONLY: Final = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x400 | 0x1000 | 0x2000 | 0x8000
"""All but bigalloc, snapshots and an orphan file that is in use."""
_BLOCK_UNINIT: Final = 2


def ext(volume: Bytes) -> Iterator[Range]:
    """ext2, ext3, ext4: the block bitmaps, each held against the counter of its group."""
    raw = volume.read(1024, 1024)
    blocks, first_block, block_shift = struct.unpack_from("<I12xII", raw, 4)
    (group_blocks,) = struct.unpack_from("<I", raw, 32)
    (state,) = struct.unpack_from("<H", raw, 58)
    _, incompatible, read_only = struct.unpack_from("<III", raw, 92)
    _require(state & (_EXT_CLEAN | _EXT_ERRORS) == _EXT_CLEAN, "it was not unmounted, or has errors")
    _require(
        not incompatible & ~_INCOMPATIBLE, f"its features {incompatible:#x} are not known, or its journal is not empty"
    )
    _require(not read_only & ~_READ_ONLY, f"its features {read_only:#x} are not known")
    is_64bit = bool(incompatible & 0x80)
    descriptor_bytes = struct.unpack_from("<H", raw, 254)[0] if is_64bit else 32
    if is_64bit:
        blocks |= struct.unpack_from("<I", raw, 336)[0] << 32
    _require(block_shift <= 6 and descriptor_bytes in (32, 64), "its sizes are none")
    block_bytes = 1024 << block_shift
    _require(0 < group_blocks <= block_bytes * 8, "its groups are none")
    _require(first_block < blocks and blocks * block_bytes <= volume.length, "it is longer than its partition")
    groups = -(-(blocks - first_block) // group_blocks)
    for group in range(groups):
        descriptor = volume.read((first_block + 1) * block_bytes + group * descriptor_bytes, descriptor_bytes)
        start = first_block + group * group_blocks
        count = min(group_blocks, blocks - start)
        for first, length in _ext_group(volume, descriptor, count, block_bytes):
            yield (start + first) * block_bytes, length * block_bytes


def _ext_group(volume: Bytes, descriptor: bytes, count: int, block_bytes: int) -> list[Range]:
    """The free blocks of one group; none when its bitmap was never written, or has not as many as the counter says."""
    (bitmap_block,) = struct.unpack_from("<I", descriptor, 0)
    free, flags = struct.unpack_from("<H4xH", descriptor, 12)
    if len(descriptor) == 64:
        bitmap_block |= struct.unpack_from("<I", descriptor, 32)[0] << 32
        free |= struct.unpack_from("<H", descriptor, 44)[0] << 16
    if flags & _BLOCK_UNINIT or not free:
        return []
    runs = list(clear_bits([volume.read(bitmap_block * block_bytes, block_bytes)], count))
    return runs if sum(length for _, length in runs) == free else []
