"""The block device of virtio: feature bits, request types, configuration space and the layout of a split virtqueue.

Spec: OASIS "Virtual I/O Device (VIRTIO) Version 1.2", sections 2.7 (split virtqueues) and 5.2 (block device).
All integers are little-endian.

| offset | size | type | configuration space (5.2.4) |
|---|---|---|---|
| 0 | 8 | u64 | capacity in sectors of 512 bytes |
| 8 | 4 | u32 | size_max (not offered: 0) |
| 12 | 4 | u32 | seg_max |
| 16 | 4 | u16, u8, u8 | cylinders, heads, sectors (not offered: 0) |
| 20 | 4 | u32 | blk_size |
| 24 | 8 | u8, u8, u16, u32 | physical block exponent, alignment offset, minimum and optimal I/O size in blocks |
| 32 | 2 | u8, u8 | writeback (not offered), unused |
| 34 | 2 | u16 | num_queues |
| 36 | 12 | u32, u32, u32 | max_discard_sectors, max_discard_seg, discard_sector_alignment |
| 48 | 12 | u32, u32, u8, u8[3] | max_write_zeroes_sectors, max_write_zeroes_seg, may_unmap, unused |

| offset | size | type | request |
|---|---|---|---|
| 0 | 4 | u32 | type |
| 4 | 4 | u32 | reserved (priority in old drivers) |
| 8 | 8 | u64 | sector |
| 16 | n | bytes | data, or segments of 16 bytes for discard and write zeroes: sector u64, sectors u32, flags u32 |
| 16 + n | 1 | u8 | status, written by the device |

| part of a split queue of N | size |
|---|---|
| descriptors: address u64, length u32, flags u16, next u16 | 16 N |
| available ring: flags u16, idx u16, N of head u16, used_event u16 | 6 + 2 N |
| used ring: flags u16, idx u16, N of (head u32, length u32), avail_event u16 | 6 + 8 N |
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import ClassVar, Final

SECTOR_BYTES: Final = 512
SEG_MAX: Final = 254
"""Data segments of one request: a queue of 256 less header and status, as QEMU's own virtio-blk offers. A MiB in pages
is two requests so. In a smaller queue a driver needs indirect descriptors for that many, which we offer."""
MAX_QUEUES: Final = 16
MAX_QUEUE_SIZE: Final = 1024
MAX_RANGE_SECTORS: Final = 4194304
"""Sectors of one discard or write zeroes segment: 2 GiB."""
MAX_RANGE_SEGMENTS: Final = 32
SERIAL_BYTES: Final = 20
"""Length of the answer to GET_ID (5.2.6): ASCII, padded with zeros."""


class BlkFeature(enum.IntFlag):
    """Feature bits of the block device (5.2.3)."""

    SEG_MAX = 1 << 2
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14


class BlkRequest(enum.IntEnum):
    """Request types (5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class BlkStatus(enum.IntEnum):
    """What the device writes into the last byte of a request."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


class DescriptorFlag(enum.IntFlag):
    """Flags of a descriptor (2.7.5)."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4


@dataclass(frozen=True, slots=True)
class ConfigSpace:
    """What the guest is told about the disk; sizes in the specification's units."""

    STRUCT: ClassVar = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")

    capacity_sectors: int
    queues: int
    physical_block_exponent: int = 3

    def pack(self) -> bytes:
        return self.STRUCT.pack(
            self.capacity_sectors,
            0,
            SEG_MAX,
            0,
            0,
            0,
            SECTOR_BYTES,
            self.physical_block_exponent,
            0,
            8,
            0,
            1,
            0,
            self.queues,
            MAX_RANGE_SECTORS,
            MAX_RANGE_SEGMENTS,
            1 << self.physical_block_exponent,
            MAX_RANGE_SECTORS,
            MAX_RANGE_SEGMENTS,
            1,
        )
