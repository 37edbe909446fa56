"""The partition table of a disk, MBR or GPT, read from whatever a guest left there.

Spec: UEFI 2.10, section 5 "GUID Partition Table (GPT) Disk Layout" (5.2.3 protective MBR, 5.3.2 header, 5.3.3 entries);
for MBR section 5.2.1 and, for logical partitions, what everybody does. Integers are little-endian, sectors 512 bytes.

MBR (sector 0)                           GPT header (sector 1; backup in the last sector)
    446  4 x 16  entries                     0   8  "EFI PART"           40  8  first usable sector
    510  2       55 aa                       8   4  revision             48  8  last usable sector
Entry of an MBR                              12  4  header size          56  16 GUID of the disk
    0  1  80 active, 00 not                  16  4  CRC-32 of it         72  8  sector of the entries
    4  1  type, 00 unused                    24  8  its own sector       80  4  number of entries
    8  4  first sector                       32  8  the other's sector   84  4  bytes of an entry
    12 4  sectors                                                        88  4  CRC-32 of the entries
Entry of a GPT: 0 16 type · 16 16 id · 32 8 first · 40 8 last sector · 48 8 flags · 56 72 name in UTF-16

Invariants: nothing is written; memory and time are bounded by `GPT_TABLE_LIMIT_BYTES` and `LOGICAL_LIMIT`, never by a
number on the disk; a partition that is returned lies on the disk whole. Numbers are those that Linux gives: primary
from 1, logical from 5, of a GPT the entry's place.
Not handled: sectors of 4 KiB (a VHD has none), BSD labels, the volumes in dynamic disks of Windows.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from mullion.base.block import BlockDevice
from mullion.base.units import MIB, SECTOR_BYTES

LOGICAL_LIMIT: Final = 128
"""Logical partitions that are followed."""
GPT_TABLE_LIMIT_BYTES: Final = MIB
GPT_SIGNATURE: Final = b"EFI PART"
PROTECTIVE_TYPE: Final = 0xEE
EXTENDED_TYPES: Final = (0x05, 0x0F, 0x85)

_MBR_ENTRY: Final = struct.Struct("<B3xB3xII")
_MBR_ENTRIES_AT: Final = 446
_GPT_ENTRY: Final = struct.Struct("<16s16sQQQ72s")
_BOOT_SECTORS: Final = ((3, b"NTFS    "), (3, b"EXFAT   "), (54, b"FAT"), (82, b"FAT32"))
"""What tells a filesystem's first sector, which ends in 55 aa too, from an MBR."""


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition; offset and length in bytes."""

    number: int
    offset: int
    length: int
    kind: str
    """Of an MBR two hexadecimal digits, of a GPT the type's GUID."""
    name: str = ""


@dataclass(frozen=True, slots=True)
class PartitionTable:
    """What was found: `scheme` is `mbr` or `gpt`; `problems` says in words what was left out, and why."""

    scheme: str
    partitions: tuple[Partition, ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GptHeader:
    """A GPT header that agrees with its own checksum."""

    STRUCT: ClassVar[struct.Struct] = struct.Struct("<8sIIIIQQQQ16sQIII")

    revision: int
    header_bytes: int
    my_sector: int
    other_sector: int
    first_usable_sector: int
    last_usable_sector: int
    disk_id: bytes
    entries_sector: int
    entry_count: int
    entry_bytes: int
    entries_crc: int

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        """Read a sector. Raises: ValueError that says what is wrong."""
        (
            magic,
            revision,
            header_bytes,
            crc,
            _,
            mine,
            other,
            first,
            last,
            disk_id,
            entries,
            count,
            size,
            entries_crc,
        ) = cls.STRUCT.unpack_from(raw)
        if magic != GPT_SIGNATURE:
            raise ValueError("there is no GPT header")
        if not cls.STRUCT.size <= header_bytes <= len(raw):
            raise ValueError(f"its header says that it has {header_bytes} bytes")
        if zlib.crc32(raw[:16] + bytes(4) + raw[20:header_bytes]) != crc:
            raise ValueError("its header's checksum is wrong")
        return cls(revision, header_bytes, mine, other, first, last, disk_id, entries, count, size, entries_crc)

    def pack(self) -> bytes:
        """The header as the first bytes of its sector, with its checksum."""
        raw = self.STRUCT.pack(
            GPT_SIGNATURE, self.revision, self.STRUCT.size, 0, 0, self.my_sector, self.other_sector,
            self.first_usable_sector, self.last_usable_sector, self.disk_id, self.entries_sector, self.entry_count,
            self.entry_bytes, self.entries_crc,
        )  # fmt: skip
        return raw[:16] + zlib.crc32(raw).to_bytes(4, "little") + raw[20:]

    @property
    def table_bytes(self) -> int:
        return self.entry_count * self.entry_bytes


def read_partitions(device: BlockDevice) -> PartitionTable | None:
    """The table of a disk, or None where there is none: an empty disk, or a filesystem without a table.

    Raises: what reading the device raises.
    """
    sector = _read(device, 0)
    if sector[510:512] != b"\x55\xaa" or any(sector[at:].startswith(mark) for at, mark in _BOOT_SECTORS):
        return None
    entries = [_MBR_ENTRY.unpack_from(sector, _MBR_ENTRIES_AT + 16 * index) for index in range(4)]
    if any(active & 0x7F for active, *_ in entries):
        return None  # a boot sector of another kind
    problems: list[str] = []
    if any(kind == PROTECTIVE_TYPE for _, kind, _, _ in entries):
        table = _read_gpt(device, problems)
        if table is not None:
            return table
    found: list[Partition] = []
    for number, (_, kind, first, count) in enumerate(entries, 1):
        if kind in (0, PROTECTIVE_TYPE) or count == 0:
            continue
        partition = _checked(device, _of_mbr(number, kind, first, count), problems)
        found += _logical(device, first, problems) if partition and kind in EXTENDED_TYPES else partition
    return PartitionTable("mbr", tuple(sorted(found, key=lambda part: part.number)), tuple(problems))


def find_gpt(device: BlockDevice) -> tuple[GptHeader, bytes, tuple[str, ...]] | None:
    """The header, the raw entries and the complaints of the disk's GPT: the primary, or the backup in the last sector.

    None when neither can be believed.
    """
    problems: list[str] = []
    gpt = _find_gpt(device, problems)
    return None if gpt is None else (*gpt, tuple(problems))


def _find_gpt(device: BlockDevice, problems: list[str]) -> tuple[GptHeader, bytes] | None:
    last = device.size_bytes // SECTOR_BYTES - 1
    for name, sector in (("primary", 1), ("backup", last)):
        try:
            header = GptHeader.unpack(_read(device, sector))
            return header, _read_entries(device, header)
        except ValueError as error:
            problems.append(f"the {name} GPT at byte {sector * SECTOR_BYTES}: {error}")
    return None


def _read_entries(device: BlockDevice, header: GptHeader) -> bytes:
    if header.entry_bytes < _GPT_ENTRY.size or header.entry_bytes % 8 or header.table_bytes > GPT_TABLE_LIMIT_BYTES:
        raise ValueError(f"{header.entry_count} entries of {header.entry_bytes} bytes are not supported")
    start = header.entries_sector * SECTOR_BYTES
    if start + header.table_bytes > device.size_bytes:
        raise ValueError("its entries lie outside the disk")
    raw = bytearray(header.table_bytes)
    device.pread(start, raw)
    if zlib.crc32(raw) != header.entries_crc:
        raise ValueError("its entries' checksum is wrong")
    return bytes(raw)


def _read_gpt(device: BlockDevice, problems: list[str]) -> PartitionTable | None:
    gpt = _find_gpt(device, problems)
    if gpt is None:
        return None
    header, raw = gpt
    found: list[Partition] = []
    for index in range(header.entry_count):
        kind, _, first, last, _, name = _GPT_ENTRY.unpack_from(raw, index * header.entry_bytes)
        if not any(kind):
            continue
        text = name.decode("utf-16-le", "replace").partition("\0")[0]
        title = "".join(char if char.isprintable() else "?" for char in text)
        length = (last - first + 1) * SECTOR_BYTES
        partition = Partition(index + 1, first * SECTOR_BYTES, length, str(uuid.UUID(bytes_le=kind)), title)
        found += _checked(device, partition, problems)
    return PartitionTable("gpt", tuple(found), tuple(problems))


def _logical(device: BlockDevice, extended: int, problems: list[str]) -> Iterator[Partition]:
    """Follow the chain of extended boot records: an entry for the partition, one for the next record."""
    seen: set[int] = set()
    record, number = extended, 5
    while record not in seen and len(seen) < LOGICAL_LIMIT:
        seen.add(record)
        if (record + 1) * SECTOR_BYTES > device.size_bytes:
            problems.append(f"an extended boot record would lie at byte {record * SECTOR_BYTES}, outside the disk")
            return
        sector = _read(device, record)
        if sector[510:512] != b"\x55\xaa":
            problems.append(f"there is no extended boot record at byte {record * SECTOR_BYTES}")
            return
        following = None
        for index in range(2):
            _, kind, first, count = _MBR_ENTRY.unpack_from(sector, _MBR_ENTRIES_AT + 16 * index)
            if kind in EXTENDED_TYPES:
                following = extended + first
            elif kind and count:
                yield from _checked(device, _of_mbr(number, kind, record + first, count), problems)
                number += 1
        if following is None:
            return
        record = following
    problems.append(
        f"the extended boot records do not end: the one at byte {record * SECTOR_BYTES} is followed no more"
    )


def _of_mbr(number: int, kind: int, first: int, count: int) -> Partition:
    return Partition(number, first * SECTOR_BYTES, count * SECTOR_BYTES, f"{kind:02x}")


def _checked(device: BlockDevice, partition: Partition, problems: list[str]) -> list[Partition]:
    """The partition when it lies on the disk, else nothing and a complaint."""
    end = partition.offset + partition.length
    if partition.offset >= SECTOR_BYTES and partition.length > 0 and end <= device.size_bytes:
        return [partition]
    problems.append(f"partition {partition.number} (bytes {partition.offset} to {end}) does not lie on the disk")
    return []


def _read(device: BlockDevice, sector: int) -> bytes:
    """One sector; zeros where the disk has none."""
    raw = bytearray(SECTOR_BYTES)
    if sector >= 0 and (sector + 1) * SECTOR_BYTES <= device.size_bytes:
        device.pread(sector * SECTOR_BYTES, raw)
    return bytes(raw)
