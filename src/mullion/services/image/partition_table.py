"""Writes a master boot record: boot code and up to four primary partitions.

Spec: UEFI 2.10 section 5.2.1 (the layout that BIOS and UEFI firmware both read).

 offset size type field
      0  440 u8   boot code
    440    4 u32  disk signature
    446   16      partition record 1 … 4: +0 u8 0x80 if active · +1 3*u8 first CHS · +4 u8 type · +5 3*u8 last CHS ·
                  +8 u32 first sector · +12 u32 sectors
    510    2 u16  0xAA55

Invariants: partitions lie after sector 0, in order, without overlap; CHS fields hold 0xFE 0xFF 0xFF ("use the sector
numbers"), which is what a disk beyond 8 GB needs and every loader since accepts.
Not handled: extended partitions, disks beyond 2 TiB.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from mullion.base.errors import InvalidError
from mullion.base.units import SECTOR_BYTES

TYPE_LINUX: Final = 0x83
TYPE_EFI_SYSTEM: Final = 0xEF
_BOOT_CODE_BYTES: Final = 440


@dataclass(frozen=True, slots=True)
class PartitionRecord:
    """A primary partition."""

    STRUCT: ClassVar[struct.Struct] = struct.Struct("<B3sB3sII")

    type: int
    first_sector: int
    sectors: int
    is_active: bool = False

    def pack(self) -> bytes:
        chs = b"\xfe\xff\xff"
        return self.STRUCT.pack(0x80 if self.is_active else 0, chs, self.type, chs, self.first_sector, self.sectors)


def pack_boot_record(boot_code: bytes, signature: int, partitions: Sequence[PartitionRecord]) -> bytes:
    """The disk's first sector.

    Raises: InvalidError when the boot code is too long, or the partitions are too many, overlap or exceed 32 bits.
    """
    if len(boot_code) > _BOOT_CODE_BYTES:
        raise InvalidError(f"boot code of {len(boot_code)} bytes: the boot record holds {_BOOT_CODE_BYTES}")
    if len(partitions) > 4:
        raise InvalidError(f"{len(partitions)} partitions: the boot record holds 4")
    free = 1
    for number, partition in enumerate(partitions, start=1):
        end = partition.first_sector + partition.sectors
        if partition.first_sector < free or partition.sectors < 1 or end > 1 << 32:
            raise InvalidError(f"partition {number}: sectors {partition.first_sector} to {end} do not fit")
        free = end
    records = b"".join(partition.pack() for partition in partitions).ljust(64, b"\0")
    sector = struct.pack("<440sIH64sH", boot_code, signature, 0, records, 0xAA55)
    assert len(sector) == SECTOR_BYTES
    return sector
