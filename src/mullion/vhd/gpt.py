"""Moving the backup of a GUID partition table to another end of its disk.

Spec: UEFI 2.10, section 5.3: the primary header in sector 1, its entries behind it; the backup header in the last
sector of the disk, its entries before it; each header names the other's place and the sectors that partitions may use.
The byte table is in `partitions`.

Durability: the table is valid by at least one copy at every instant:

    1  new backup, entries then header; the primary still names the old one      flush
    2  primary header, one sector: it names the new backup                       flush
    3  size in the protective MBR, one sector; zeros over the old entries        flush
    4  zeros over the old backup's header                                        flush

A crash leaves a primary that is whole, so the same can be done again. Where the new backup overlaps the old one, when
the disk grew by less than the table's length, the primary alone is valid until 1 is done.
Not handled: tables of 4 KiB sectors, headers of more than 92 bytes: refused, nothing is changed.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from typing import Final

from mullion.base.block import BlockDevice
from mullion.base.units import SECTOR_BYTES
from mullion.vhd.partitions import GPT_TABLE_LIMIT_BYTES, PROTECTIVE_TYPE, GptHeader

_PRIMARY_SECTOR: Final = 1
_MIN_ENTRY_BYTES: Final = 128
_USED: Final = struct.Struct("<16s16xQQ")
_MBR_ENTRIES_AT: Final = 446
_MBR_SIZE_LIMIT: Final = 0xFFFF_FFFF


class GptError(ValueError):
    """There is a GPT, and it is not sound enough to be changed; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Gpt:
    """A primary table that agrees with itself, and the backup it names, if that agrees with it."""

    header: GptHeader
    entries: bytes
    backup: GptHeader | None

    @property
    def table_sectors(self) -> int:
        return -(-len(self.entries) // SECTOR_BYTES)

    @property
    def last_used_sector(self) -> int:
        """The last sector of any partition, or the last before the usable ones."""
        ends = [self.header.first_usable_sector - 1]
        for at in range(0, len(self.entries), self.header.entry_bytes):
            kind, _, last = _USED.unpack_from(self.entries, at)
            if any(kind):
                ends.append(last)
        return max(ends)

    @property
    def least_sectors(self) -> int:
        """The shortest disk that has room for the partitions and the backup behind them."""
        return self.last_used_sector + 1 + self.table_sectors + 1

    def backup_range(self) -> tuple[int, int] | None:
        """Where the backup lies: (offset, end) in bytes; None when there is none that agrees with the primary."""
        if self.backup is None:
            return None
        return self.backup.entries_sector * SECTOR_BYTES, (self.backup.my_sector + 1) * SECTOR_BYTES


def load_gpt(device: BlockDevice) -> Gpt | None:
    """The GPT of a disk; None where there is none.

    Raises: GptError when there is one that is not sound; what reading the device raises.
    """
    sectors = device.size_bytes // SECTOR_BYTES
    if sectors < 3:
        return None
    protective = _read(device, 0, 1)
    primary = _read(device, _PRIMARY_SECTOR, 1)
    if primary[:8] != b"EFI PART":
        if _protective_entry(protective) is None:
            return None
        raise GptError("the primary header is missing")
    header = _header(primary, _PRIMARY_SECTOR, sectors)
    entries = _entries(device, header, sectors)
    if header.entries_sector <= _PRIMARY_SECTOR or header.first_usable_sector <= header.entries_sector:
        raise GptError("the primary entries are not between their header and the usable sectors")
    gpt = Gpt(header, entries, None)
    _check_partitions(gpt)
    backup = _backup(device, header, sectors)
    if backup is not None and not _agree(header, backup):
        raise GptError("the primary table and its backup differ")
    return replace(gpt, backup=backup)


def leftover_range(device: BlockDevice, gpt: Gpt) -> tuple[int, int] | None:
    """A backup of this table in the last sector that the primary does not name any more: (offset, end) in bytes.

    A move that was cut off before its last step leaves one.
    """
    sectors = device.size_bytes // SECTOR_BYTES
    if gpt.header.other_sector == sectors - 1:
        return None
    try:
        header = _header(_read(device, sectors - 1, 1), sectors - 1, sectors)
    except GptError:
        return None
    is_ours = header.disk_id == gpt.header.disk_id and header.table_bytes == gpt.header.table_bytes
    if not is_ours or header.entries_sector != sectors - 1 - gpt.table_sectors:
        return None
    return header.entries_sector * SECTOR_BYTES, device.size_bytes


def move_backup(device: BlockDevice, gpt: Gpt, size_bytes: int) -> bool:
    """Put the backup at the end of a disk of that size, which is the device's or less; False when it is there.

    Raises: GptError, with nothing changed, when partitions are in the way; OSError.
    """
    last = size_bytes // SECTOR_BYTES - 1
    table = last - gpt.table_sectors
    if gpt.least_sectors > last + 1:
        raise GptError(f"its partitions reach to sector {gpt.last_used_sector}: no room for the backup behind them")
    if gpt.header.other_sector == last and gpt.backup is not None:
        return False
    primary = replace(gpt.header, other_sector=last, last_usable_sector=table - 1)
    backup = replace(primary, my_sector=last, other_sector=_PRIMARY_SECTOR, entries_sector=table)
    device.pwrite(table * SECTOR_BYTES, gpt.entries.ljust(gpt.table_sectors * SECTOR_BYTES, b"\0"))
    device.pwrite(last * SECTOR_BYTES, _sector(backup.pack()))
    device.flush()
    device.pwrite(_PRIMARY_SECTOR * SECTOR_BYTES, _sector(primary.pack()))
    device.flush()
    _move_protective_end(device, size_bytes)
    old = gpt.backup_range()
    if old is not None:
        _wipe(device, old, (table * SECTOR_BYTES, size_bytes))
    return True


def _wipe(device: BlockDevice, old: tuple[int, int], kept: tuple[int, int]) -> None:
    """Zeros over the old backup, its header last: while the header is there, `leftover_range` knows the rest."""
    header = old[1] - SECTOR_BYTES
    for first, last in ((old[0], header), (header, old[1])):
        for start, end in ((first, min(last, kept[0])), (max(first, kept[1]), last)):
            if start < end:
                device.write_zeroes(start, end - start)
        device.flush()


def _header(raw: bytes, sector: int, sectors: int) -> GptHeader:
    try:
        header = GptHeader.unpack(raw)
    except ValueError as error:
        raise GptError(str(error)) from error
    if header.header_bytes != GptHeader.STRUCT.size:
        raise GptError(f"its header has {header.header_bytes} bytes, which is not supported")
    if header.my_sector != sector:
        raise GptError(f"the header in sector {sector} says that it is in sector {header.my_sector}")
    if not header.first_usable_sector <= header.last_usable_sector < sectors or header.other_sector >= sectors:
        raise GptError("its header names sectors that are not on the disk")
    return header


def _entries(device: BlockDevice, header: GptHeader, sectors: int) -> bytes:
    if header.entry_bytes < _MIN_ENTRY_BYTES or header.entry_bytes % 8 or header.entry_count == 0:
        raise GptError(f"its entries have {header.entry_bytes} bytes, which is not supported")
    if header.table_bytes > GPT_TABLE_LIMIT_BYTES:
        raise GptError(f"{header.entry_count} entries are more than are supported")
    count = -(-header.table_bytes // SECTOR_BYTES)
    if header.entries_sector + count > sectors:
        raise GptError("its entries are not on the disk")
    entries = _read(device, header.entries_sector, count)[: header.table_bytes]
    if zlib.crc32(entries) != header.entries_crc:
        raise GptError("its entries' checksum is wrong")
    return entries


def _check_partitions(gpt: Gpt) -> None:
    header = gpt.header
    if header.entries_sector + gpt.table_sectors > header.first_usable_sector:
        raise GptError("the primary entries reach into the usable sectors")
    for at in range(0, len(gpt.entries), header.entry_bytes):
        kind, first, last = _USED.unpack_from(gpt.entries, at)
        if any(kind) and not header.first_usable_sector <= first <= last <= header.last_usable_sector:
            raise GptError(f"partition {at // header.entry_bytes + 1} is not inside the usable sectors")


def _backup(device: BlockDevice, primary: GptHeader, sectors: int) -> GptHeader | None:
    """The backup that the primary names; None when it does not hold: then the primary alone is the table."""
    if not primary.last_usable_sector < primary.other_sector < sectors:
        raise GptError("the primary header names a backup that is not behind the usable sectors")
    try:
        backup = _header(_read(device, primary.other_sector, 1), primary.other_sector, sectors)
        _entries(device, backup, sectors)
    except GptError:
        return None
    is_behind = primary.last_usable_sector < backup.entries_sector < backup.my_sector
    return backup if is_behind else None


def _agree(one: GptHeader, two: GptHeader) -> bool:
    same = ("disk_id", "entry_count", "entry_bytes", "entries_crc", "first_usable_sector")
    return all(getattr(one, name) == getattr(two, name) for name in same)


def _protective_entry(mbr: bytes | bytearray) -> int | None:
    """Where the MBR's entry is that covers the whole disk for those who know no GPT."""
    if mbr[510:512] != b"\x55\xaa":
        return None
    places = range(_MBR_ENTRIES_AT, _MBR_ENTRIES_AT + 64, 16)
    return next((at for at in places if mbr[at + 4] == PROTECTIVE_TYPE), None)


def _move_protective_end(device: BlockDevice, size_bytes: int) -> None:
    """The entry that protects the table covers the disk as it is now; one that a hybrid MBR has is left alone."""
    mbr = bytearray(_read(device, 0, 1))
    at = _protective_entry(mbr)
    others = [mbr[place + 4] for place in range(_MBR_ENTRIES_AT, _MBR_ENTRIES_AT + 64, 16) if place != at]
    if at is None or any(others) or mbr[at + 8 : at + 12] != b"\1\0\0\0":
        return
    count = min(size_bytes // SECTOR_BYTES - 1, _MBR_SIZE_LIMIT).to_bytes(4, "little")
    if mbr[at + 12 : at + 16] != count:
        mbr[at + 12 : at + 16] = count
        device.pwrite(0, bytes(mbr))


def _sector(raw: bytes) -> bytes:
    return raw.ljust(SECTOR_BYTES, b"\0")


def _read(device: BlockDevice, sector: int, count: int) -> bytes:
    raw = bytearray(count * SECTOR_BYTES)
    device.pread(sector * SECTOR_BYTES, raw)
    return bytes(raw)
