"""The batmap of XenServer: one bit a block, set when all sectors of the block are in the file.

Spec: none; observed in `libvhd` and in real files. It is a hint: a clear bit is never wrong. A set bit of a block that
was taken out of the BAT would be wrong as soon as the block is allocated again, so whoever takes out blocks clears it.

Header, 512 bytes, right behind the BAT:

    0   8   cookie "tdbatmap"            20  4   version 0x00010002
    8   8   offset of the bits           24  4   checksum of the bits
    16  4   size of the bits, sectors    28  ...  marker and reserved

Invariants: bit of block 0 is the most significant of byte 0; the checksum is that of the footer over the bits alone.
Durability: bits and checksum are two sectors, so a crash between them leaves a checksum that is wrong; the next
compaction writes both anew.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Self

from mullion.base.units import SECTOR_BYTES
from mullion.vhd.bat import MAX_BAT_ENTRIES
from mullion.vhd.image import Image
from mullion.vhd.structures import bat_end

COOKIE: Final = b"tdbatmap"
_FIELDS: Final = struct.Struct(">8sQIII")
_BITS_LIMIT: Final = MAX_BAT_ENTRIES // 8


@dataclass(frozen=True, slots=True)
class Batmap:
    """A batmap as it lies in a file."""

    header_offset: int
    offset: int
    version: int
    rest: bytes
    """What follows the checksum in the header."""
    bits: bytes

    @classmethod
    def load(cls, image: Image) -> Self | None:
        """The batmap of an open disk; None where there is none, or none that can be believed."""
        if image.header is None:
            return None
        at = bat_end(image.header)
        raw = os.pread(image.fd, SECTOR_BYTES, at)
        if raw[:8] != COOKIE or len(raw) != SECTOR_BYTES:
            return None
        _, offset, sectors, version, _ = _FIELDS.unpack_from(raw)
        if sectors * SECTOR_BYTES > _BITS_LIMIT or offset + sectors * SECTOR_BYTES > image.file_bytes:
            return None
        bits = os.pread(image.fd, sectors * SECTOR_BYTES, offset)
        return cls(at, offset, version, raw[_FIELDS.size :], bits)

    def covers(self, blocks: int) -> bool:
        return len(self.bits) * 8 >= blocks

    def without(self, blocks: Iterable[int]) -> Self:
        """The same with the bits of these blocks clear."""
        bits = bytearray(self.bits)
        for block in blocks:
            if block >> 3 < len(bits):
                bits[block >> 3] &= 0xFF ^ (0x80 >> (block & 7))
        return replace(self, bits=bytes(bits))

    def moved(self, header_offset: int, blocks: int) -> Self:
        """The same for another place, its bits right behind the header, with room for that many blocks."""
        size = -(-blocks // (8 * SECTOR_BYTES)) * SECTOR_BYTES
        bits = self.bits[:size].ljust(size, b"\0")
        return replace(self, header_offset=header_offset, offset=header_offset + SECTOR_BYTES, bits=bits)

    def pack(self) -> bytes:
        """The header's sector."""
        sectors = len(self.bits) // SECTOR_BYTES
        checksum = ~sum(self.bits) & 0xFFFF_FFFF
        return _FIELDS.pack(COOKIE, self.offset, sectors, self.version, checksum) + self.rest

    def pieces(self) -> list[tuple[int, bytes]]:
        """What to write, and where."""
        return [(self.offset, self.bits), (self.header_offset, self.pack())]
