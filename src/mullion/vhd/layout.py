"""The structures of a VHD as they lie in the file: footer, dynamic disk header, parent locator.

Spec: Virtual Hard Disk Image Format Specification 1.0 (Microsoft, 2006), "Hard Disk Footer Format", "Dynamic Disk
Header Format". All integers are big-endian; a sector is 512 bytes.

Footer, 512 bytes, the last sector of every VHD, with a copy at byte 0 of dynamic and differencing disks:

    0   8   cookie "conectix"            40  8   original size
    8   4   features                     48  8   current size
    12  4   version 0x00010000           56  2,1,1 cylinders, heads, sectors per track
    16  8   data offset (of the header)  60  4   type: 2 fixed, 3 dynamic, 4 differencing
    24  4   timestamp, s since 2000      64  4   checksum
    28  4   creator application          68  16  unique id
    32  4   creator version              84  1   saved state
    36  4   creator host OS              85  427 reserved

Dynamic disk header, 1024 bytes, at the footer's data offset:

    0   8   cookie "cxsparse"            40  16  parent unique id
    8   8   next, all ones               56  4   parent timestamp
    16  8   BAT offset                   60  4   reserved
    24  4   version 0x00010000           64  512 parent name, UTF-16BE
    28  4   maximum BAT entries          576 8x24 parent locators
    32  4   block size                   768 256 reserved
    36  4   checksum

Parent locator, 24 bytes:

    0   4   platform code                12  4   zero
    4   4   data space                   16  8   data offset
    8   4   data length, bytes

Invariants: a checksum is the one's complement of the 32-bit sum of all bytes with the checksum field zero. `unpack`
accepts only what the specification allows, plus these deviations of real writers: a clear reserved feature bit, any
geometry, any timestamp, saved state set, `next` other than all ones, data space in sectors (Xen Orchestra).

Not handled: next structures behind the header (none was ever defined), obsolete locators (`Wi2r`, `Wi2k`, `Mac `).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar, Final, Self

from mullion.base.units import KIB, MIB, SECTOR_BYTES

FOOTER_BYTES: Final = 512
OLD_FOOTER_BYTES: Final = 511
"""Virtual PC before 2004 left out the footer's last byte."""
HEADER_BYTES: Final = 1024
LOCATORS: Final = 8
MAX_LOCATOR_BYTES: Final = 64 * KIB
"""Longer paths are refused; Linux allows 4096 bytes."""
EPOCH_S: Final = 946_684_800
"""2000-01-01 00:00 UTC in Unix time."""
ALL_ONES: Final = 0xFFFF_FFFF_FFFF_FFFF
MIN_BLOCK_BYTES: Final = 512
MAX_BLOCK_BYTES: Final = 256 * MIB

_VERSION: Final = 0x0001_0000
_FEATURE_RESERVED: Final = 2


class DiskType(IntEnum):
    """Footer, offset 60."""

    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4

    @property
    def word(self) -> str:
        return self.name.lower()


class LayoutError(ValueError):
    """A structure is not what the specification says; `field_offset` counts from the structure's start."""

    def __init__(self, message: str, field_offset: int, *, is_absent: bool = False) -> None:
        super().__init__(message)
        self.field_offset = field_offset
        self.is_absent = is_absent


def checksum(raw: bytes, field_offset: int) -> int:
    """The checksum of a structure whose own checksum field lies at `field_offset`."""
    return ~(sum(raw) - sum(raw[field_offset : field_offset + 4])) & 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Footer:
    """Hard disk footer."""

    STRUCT: ClassVar[struct.Struct] = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427s")
    COOKIE: ClassVar[bytes] = b"conectix"
    CHECKSUM_OFFSET: ClassVar[int] = 64

    features: int
    data_offset: int
    timestamp: int
    creator_application: bytes
    creator_version: int
    creator_host_os: bytes
    original_size_bytes: int
    current_size_bytes: int
    cylinders: int
    heads: int
    sectors_per_track: int
    disk_type: DiskType
    unique_id: bytes
    saved_state: int = 0
    reserved: bytes = field(default=bytes(427), repr=False)

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        """Read a footer of 512 bytes, or of 511.

        Raises: LayoutError.
        """
        raw = raw.ljust(FOOTER_BYTES, b"\0") if len(raw) == OLD_FOOTER_BYTES else raw
        if len(raw) != FOOTER_BYTES or raw[:8] != cls.COOKIE:
            raise LayoutError("the cookie is not 'conectix'", 0, is_absent=True)
        fields = cls.STRUCT.unpack(raw)
        _, features, version, data_offset, stamp, creator, creator_version, host_os, original, current = fields[:10]
        cylinders, heads, sectors, kind, stored_sum, unique_id, saved_state, reserved = fields[10:]
        if stored_sum != (actual := checksum(raw, cls.CHECKSUM_OFFSET)):
            raise LayoutError(f"the checksum is {stored_sum:#010x}, its bytes give {actual:#010x}", 64)
        if version != _VERSION:
            raise LayoutError(f"version {version:#010x} is unknown", 12)
        if kind not in (2, 3, 4):
            raise LayoutError(f"disk type {kind} is unknown", 60)
        if current == 0 or current % SECTOR_BYTES or current >= 1 << 63:
            raise LayoutError(f"the current size, {current} bytes, is not a positive multiple of 512", 48)
        return cls(
            features,
            data_offset,
            stamp,
            creator,
            creator_version,
            host_os,
            original,
            current,
            cylinders,
            heads,
            sectors,
            DiskType(kind),
            unique_id,
            saved_state,
            reserved,
        )

    def pack(self) -> bytes:
        """The 512 bytes, with their checksum."""
        raw = bytearray(
            self.STRUCT.pack(
                self.COOKIE,
                self.features | _FEATURE_RESERVED,
                _VERSION,
                self.data_offset,
                self.timestamp,
                self.creator_application,
                self.creator_version,
                self.creator_host_os,
                self.original_size_bytes,
                self.current_size_bytes,
                self.cylinders,
                self.heads,
                self.sectors_per_track,
                self.disk_type,
                0,
                self.unique_id,
                self.saved_state,
                self.reserved,
            )
        )
        struct.pack_into(">I", raw, self.CHECKSUM_OFFSET, checksum(bytes(raw), self.CHECKSUM_OFFSET))
        return bytes(raw)

    @property
    def has_reserved_feature(self) -> bool:
        """Bit 1 of the features; the specification wants it set."""
        return bool(self.features & _FEATURE_RESERVED)


@dataclass(frozen=True, slots=True)
class ParentLocator:
    """Where one platform finds the parent."""

    STRUCT: ClassVar[struct.Struct] = struct.Struct(">4sIIIQ")

    platform: bytes = bytes(4)
    data_space: int = 0
    data_length: int = 0
    data_offset: int = 0

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        """Read one entry; it is judged only when it is used, because a bad one beside a good one does no harm."""
        platform, space, length, _, offset = cls.STRUCT.unpack(raw)
        return cls(platform, space, length, offset)

    def pack(self) -> bytes:
        return self.STRUCT.pack(self.platform, self.data_space, self.data_length, 0, self.data_offset)

    @property
    def space_bytes(self) -> int | None:
        """Room for the data; None when it can be neither sectors (below 512) nor bytes (a multiple of 512)."""
        if self.data_space < SECTOR_BYTES:
            return self.data_space * SECTOR_BYTES
        return None if self.data_space % SECTOR_BYTES else self.data_space


@dataclass(frozen=True, slots=True)
class DynamicHeader:
    """Dynamic disk header."""

    STRUCT: ClassVar[struct.Struct] = struct.Struct(">8sQQIIII16sII512s192s256s")
    COOKIE: ClassVar[bytes] = b"cxsparse"
    CHECKSUM_OFFSET: ClassVar[int] = 36

    bat_offset: int
    max_bat_entries: int
    block_bytes: int
    parent_unique_id: bytes = bytes(16)
    parent_timestamp: int = 0
    parent_name_raw: bytes = field(default=bytes(512), repr=False)
    locators: tuple[ParentLocator, ...] = ()

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        """Read the 1024 bytes.

        Raises: LayoutError.
        """
        if len(raw) != HEADER_BYTES or raw[:8] != cls.COOKIE:
            raise LayoutError("the cookie is not 'cxsparse'", 0, is_absent=True)
        fields = cls.STRUCT.unpack(raw)
        _, _, bat_offset, version, entries, block_bytes, stored_sum, parent_id, stamp, _, name, locators, _ = fields
        if stored_sum != (actual := checksum(raw, cls.CHECKSUM_OFFSET)):
            raise LayoutError(f"the checksum is {stored_sum:#010x}, its bytes give {actual:#010x}", 36)
        if version != _VERSION:
            raise LayoutError(f"version {version:#010x} is unknown", 24)
        if not MIN_BLOCK_BYTES <= block_bytes <= MAX_BLOCK_BYTES or block_bytes & (block_bytes - 1):
            raise LayoutError(f"block size {block_bytes} is not a power of two from 512 bytes to 256 MiB", 32)
        if entries == 0:
            raise LayoutError("the BAT has no entries", 28)
        if bat_offset % SECTOR_BYTES or bat_offset >= 1 << 62:
            raise LayoutError(f"the BAT's offset {bat_offset} is not a multiple of 512", 16)
        size = ParentLocator.STRUCT.size
        entry = tuple(ParentLocator.unpack(locators[i * size : (i + 1) * size]) for i in range(LOCATORS))
        return cls(bat_offset, entries, block_bytes, parent_id, stamp, name, entry)

    def pack(self) -> bytes:
        """The 1024 bytes, with their checksum."""
        locators = b"".join(locator.pack() for locator in self.locators).ljust(LOCATORS * 24, b"\0")
        raw = bytearray(
            self.STRUCT.pack(
                self.COOKIE,
                ALL_ONES,
                self.bat_offset,
                _VERSION,
                self.max_bat_entries,
                self.block_bytes,
                0,
                self.parent_unique_id,
                self.parent_timestamp,
                0,
                self.parent_name_raw,
                locators,
                bytes(256),
            )
        )
        struct.pack_into(">I", raw, self.CHECKSUM_OFFSET, checksum(bytes(raw), self.CHECKSUM_OFFSET))
        return bytes(raw)

    @property
    def parent_name(self) -> str | None:
        """The parent's file name; None when it is not UTF-16."""
        try:
            return self.parent_name_raw.decode("utf-16-be").partition("\0")[0]
        except UnicodeDecodeError:
            return None
