"""Messages of the vhost-user protocol, as far as a block back-end needs them.

Spec: QEMU, "Vhost-user Protocol", sections "Message Specification" and "Front-end message types".
All integers are in the byte order of the host (both ends are on one), here little-endian. A message is a header of 12
bytes and a payload; descriptors travel beside the header's first byte (SCM_RIGHTS).

| offset | size | type | field of the header |
|---|---|---|---|
| 0 | 4 | u32 | request |
| 4 | 4 | u32 | flags: bits 0-1 version (1), bit 2 reply, bit 3 need_reply |
| 8 | 4 | u32 | size of the payload |

| payload | fields (offset size) |
|---|---|
| u64 | value (0 8) |
| vring state | index (0 4), num (4 4) |
| vring address | index (0 4), flags (4 4), descriptor (8 8), used (16 8), available (24 8), log (32 8) |
| memory table | count (0 4), padding (4 4), regions |
| memory region | guest address (0 8), size (8 8), user address (16 8), mmap offset (24 8) |
| config space | offset (0 4), size (4 4), flags (8 4), content (12 …) |
| log | mmap size (0 8), mmap offset (8 8) |
| inflight | mmap size (0 8), mmap offset (8 8), queues (16 2), queue size (18 2), padding to 24 bytes |

Invariants: a payload has exactly the size that its table says; sizes and counts are checked before anything is read.
Not handled: IOMMU, post-copy, crypto sessions, shared objects, memory slots: those features are not offered.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from mullion.base.errors import MullionError

VERSION: Final = 1
HEADER_BYTES: Final = 12
MAX_PAYLOAD_BYTES: Final = 1024
"""Above the largest payload that is handled (a memory table of 8 regions: 264 bytes)."""
MAX_REGIONS: Final = 8
"""Regions of one SET_MEM_TABLE (VHOST_MEMORY_BASELINE_NREGIONS); as many descriptors come with it."""
MAX_FDS: Final = 8
CONFIG_SPACE_BYTES: Final = 256
VRING_INDEX_MASK: Final = 0xFF
VRING_LOG: Final = 1
"""Bit of a vring address's flags: writes to the used ring are logged, at the guest address `log`."""
VRING_NO_FD: Final = 0x100
"""Bit 8 of the u64 of SET_VRING_KICK, _CALL and _ERR: no descriptor comes with it."""


class ProtocolError(MullionError):
    """The peer of a vhost-user connection broke the protocol: the connection cannot go on."""

    code = "vhost-user-protocol"
    default_remedy = "Reset or restart the partition: its QEMU sent something that the protocol does not allow."


class Request(enum.IntEnum):
    """Front-end message types."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32


class BackendRequest(enum.IntEnum):
    """Back-end message types, on the socket that comes with SET_BACKEND_REQ_FD."""

    CONFIG_CHANGE = 2


class Flag(enum.IntFlag):
    """Bits of the header's flags above the version."""

    REPLY = 0x4
    NEED_REPLY = 0x8


class ProtocolFeature(enum.IntFlag):
    """Protocol features (bit numbers of the specification)."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    CONFIGURE_MEM_SLOTS = 1 << 15


class DeviceFeature(enum.IntFlag):
    """Feature bits of the ring and of the transport; those of the block device are in `virtio_blk`."""

    LOG_ALL = 1 << 26
    RING_INDIRECT_DESC = 1 << 28
    RING_EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32


def _unpack(layout: struct.Struct, payload: bytes, what: str) -> tuple[int, ...]:
    if len(payload) != layout.size:
        raise ProtocolError(f"{what}: the payload has {len(payload)} bytes, it must have {layout.size}")
    return layout.unpack(payload)


@dataclass(frozen=True, slots=True)
class Header:
    """What precedes every message."""

    STRUCT: ClassVar = struct.Struct("<III")

    request: int
    flags: int
    size: int

    @classmethod
    def unpack(cls, buffer: bytes) -> Self:
        request, flags, size = _unpack(cls.STRUCT, buffer, "header")
        if flags & 0x3 != VERSION:
            raise ProtocolError(f"message {request}: version {flags & 0x3} of the protocol, only {VERSION} is known")
        if size > MAX_PAYLOAD_BYTES:
            raise ProtocolError(f"message {request}: a payload of {size} bytes, the limit is {MAX_PAYLOAD_BYTES}")
        return cls(request, flags, size)

    def pack(self) -> bytes:
        return self.STRUCT.pack(self.request, self.flags, self.size)


@dataclass(frozen=True, slots=True)
class U64:
    """A single number: features, an acknowledgement, a vring index with bit 8."""

    STRUCT: ClassVar = struct.Struct("<Q")

    value: int

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        (value,) = _unpack(cls.STRUCT, payload, "u64")
        return cls(value)

    def pack(self) -> bytes:
        return self.STRUCT.pack(self.value)


@dataclass(frozen=True, slots=True)
class VringState:
    """A vring's size, base or enabled state."""

    STRUCT: ClassVar = struct.Struct("<II")

    index: int
    num: int

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        return cls(*_unpack(cls.STRUCT, payload, "vring state"))

    def pack(self) -> bytes:
        return self.STRUCT.pack(self.index, self.num)


@dataclass(frozen=True, slots=True)
class VringAddress:
    """Where the three parts of a vring are, as addresses of the front-end's process."""

    STRUCT: ClassVar = struct.Struct("<IIQQQQ")

    index: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        return cls(*_unpack(cls.STRUCT, payload, "vring address"))

    def pack(self) -> bytes:
        return self.STRUCT.pack(self.index, self.flags, self.descriptor, self.used, self.available, self.log)


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """A range of guest memory; addresses and sizes in bytes."""

    STRUCT: ClassVar = struct.Struct("<QQQQ")

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        region = cls(*_unpack(cls.STRUCT, payload, "memory region"))
        for first in (region.guest_address, region.user_address, region.mmap_offset):
            if region.size == 0 or first + region.size > 1 << 64:
                raise ProtocolError(f"memory region at {region.guest_address:#x}: size {region.size:#x} is impossible")
        return region

    def pack(self) -> bytes:
        return self.STRUCT.pack(self.guest_address, self.size, self.user_address, self.mmap_offset)


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """All of the guest's memory that a back-end may touch."""

    STRUCT: ClassVar = struct.Struct("<II")

    regions: tuple[MemoryRegion, ...]

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        count, _padding = _unpack(cls.STRUCT, payload[: cls.STRUCT.size], "memory table")
        each = MemoryRegion.STRUCT.size
        if count > MAX_REGIONS or len(payload) != cls.STRUCT.size + count * each:
            raise ProtocolError(
                f"memory table: {count} regions in {len(payload)} bytes, the limit is {MAX_REGIONS} regions"
            )
        starts = range(cls.STRUCT.size, len(payload), each)
        return cls(tuple(MemoryRegion.unpack(payload[start : start + each]) for start in starts))

    def pack(self) -> bytes:
        return self.STRUCT.pack(len(self.regions), 0) + b"".join(region.pack() for region in self.regions)


@dataclass(frozen=True, slots=True)
class Config:
    """A range of the device's configuration space; the content is as long as `size` says."""

    STRUCT: ClassVar = struct.Struct("<III")

    offset: int
    size: int
    flags: int
    content: bytes

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        head = cls.STRUCT.size
        offset, size, flags = _unpack(cls.STRUCT, payload[:head], "config space")
        if size > CONFIG_SPACE_BYTES or offset + size > CONFIG_SPACE_BYTES or len(payload) != head + size:
            raise ProtocolError(f"config space: offset {offset}, size {size}, payload of {len(payload)} bytes")
        return cls(offset, size, flags, payload[head:])

    def pack(self) -> bytes:
        return self.STRUCT.pack(self.offset, self.size, self.flags) + self.content


@dataclass(frozen=True, slots=True)
class Log:
    """The shared dirty log, in bytes."""

    STRUCT: ClassVar = struct.Struct("<QQ")

    mmap_size: int
    mmap_offset: int

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        return cls(*_unpack(cls.STRUCT, payload, "dirty log description"))

    def pack(self) -> bytes:
        return self.STRUCT.pack(self.mmap_size, self.mmap_offset)


@dataclass(frozen=True, slots=True)
class Inflight:
    """The shared region that keeps track of requests in flight; 24 bytes with the padding of the C structure.

    A reply of 20 bytes sends QEMU 7.2 into an endless reconnect (observed).
    """

    STRUCT: ClassVar = struct.Struct("<QQHH4x")

    mmap_size: int
    mmap_offset: int
    queues: int
    queue_size: int

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        # Front-ends compiled without the padding are tolerated.
        if len(payload) == cls.STRUCT.size - 4:
            payload += bytes(4)
        return cls(*_unpack(cls.STRUCT, payload, "inflight description"))

    def pack(self) -> bytes:
        return self.STRUCT.pack(self.mmap_size, self.mmap_offset, self.queues, self.queue_size)
