"""The numbers and structures of the Network Block Device protocol.

Spec: "The NBD protocol", doc/proto.md of the NetworkBlockDevice project: fixed newstyle negotiation, structured
replies, metadata contexts (`contexts`), TLS (`tls`). Integers are big-endian.

Request (28 bytes)                       Structured reply chunk (20 bytes, then its payload)
    0   4  u32  magic 0x25609513             0   4  u32  magic 0x668E33EF
    4   2  u16  command flags                4   2  u16  flags (bit 0: last chunk of this reply)
    6   2  u16  command                      6   2  u16  chunk type
    8   8  u64  cookie                       8   8  u64  cookie
    16  8  u64  offset                       16  4  u32  payload length
    24  4  u32  length                   Simple reply (16 bytes, then the data of a successful READ)
    then the payload of a WRITE              0   4  u32  magic 0x67446698
Option (16 bytes, then its data)             4   4  u32  error
    0   8  u64  magic "IHAVEOPT"             8   8  u64  cookie
    8   4  u32  option                   Option reply (20 bytes, then its data)
    12  4  u32  data length                  0   8  u64  magic 0x0003E889045565A9
                                             8   4  u32  option
                                             12  4  u32  reply type
                                             16  4  u32  data length

Invariants: no structure has padding; a name is UTF-8 of at most 4096 bytes; an error is 0 or a value of `NbdError`.
Durability: none here; FLUSH and FUA are the session's business.
Not handled: oldstyle negotiation, extended headers (64-bit lengths).
"""

from __future__ import annotations

import enum
import struct
from typing import ClassVar, Final

from mullion.base.errors import MullionError
from mullion.base.units import KIB, MIB

NBD_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF

GREETING: Final = struct.Struct(">QQH")
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION: Final = struct.Struct(">QII")
OPTION_REPLY: Final = struct.Struct(">QIII")
EXPORT_NAME_REPLY: Final = struct.Struct(">QH")
INFO_EXPORT: Final = struct.Struct(">HQH")
INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")
REQUEST: Final = struct.Struct(">IHHQQI")
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
CHUNK: Final = struct.Struct(">IHHQI")
OFFSET_CHUNK: Final = struct.Struct(">IHHQIQ")
"""A chunk header with the offset that opens the payload of OFFSET_DATA, OFFSET_HOLE (and ends that of ERROR_OFFSET)."""
CHUNK_ERROR: Final = struct.Struct(">IH")
CHUNK_HOLE: Final = struct.Struct(">QI")
U16: Final = struct.Struct(">H")
U32: Final = struct.Struct(">I")
U64: Final = struct.Struct(">Q")

EXPORT_NAME_PADDING: Final = bytes(124)
NAME_LIMIT_BYTES: Final = 4096
OPTION_LIMIT_BYTES: Final = 64 * KIB
PAYLOAD_LIMIT_BYTES: Final = 32 * MIB
"""Longest READ and WRITE: what a client may assume that was told no block size (section "Block size constraints")."""
PREFERRED_BLOCK_BYTES: Final = 4096
ALLOCATION_CONTEXT: Final = "base:allocation"
DIRTY_BITMAP_PREFIX: Final = "qemu:dirty-bitmap:"


class HandshakeFlag(enum.IntFlag):
    """Of the greeting, and with the same bits of the client's answer."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class TransmissionFlag(enum.IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Option(enum.IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class OptionReply(enum.IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8
    ERR_TOO_BIG = (1 << 31) + 9


class Info(enum.IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(enum.IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(enum.IntFlag):
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class ChunkFlag(enum.IntFlag):
    DONE = 1


class Chunk(enum.IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


class BlockState(enum.IntFlag):
    """Bits of an extent in the context `base:allocation`."""

    HOLE = 1
    ZERO = 2


class DirtyState(enum.IntFlag):
    """Bits of an extent in a context `qemu:dirty-bitmap:NAME`."""

    DIRTY = 1


class NbdError(enum.IntEnum):
    """Errors on the wire; the values are those of Linux, on every system."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class NbdProtocolError(MullionError):
    """The other end said something that the NBD protocol does not allow: the connection is dead, its owner is not."""

    code: ClassVar[str] = "nbd-protocol"
    exit_code: ClassVar[int] = 7
    http_status: ClassVar[int] = 502
    default_remedy: ClassVar[str] = "Connect again; if it repeats, the program at the other end does not speak NBD."
