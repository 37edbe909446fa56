"""The block vocabulary: what every disk-like thing can do, whatever it is made of.

Images, chains and NBD clients all speak it; `tests/contract/block_device.py` is the suite that each of them passes.
Offsets and lengths are in bytes and may be unaligned; a device that stores sectors does the read-modify-write itself.
A request outside `size_bytes` is refused whole (`InvalidError`): nothing is read or written.

Durability: a write is durable after the next `flush` has returned, not before.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

Buffer = bytes | bytearray | memoryview
WritableBuffer = bytearray | memoryview


class LostDataError(OSError):
    """The storage has not kept what it had taken. Said once: a flush that is repeated finds nothing left to write.

    So it is never answered by repeating the flush, also where room was what the storage lacked: whoever was promised
    something hears of it, and what matters is written again.
    """


def raised_again(failure: OSError) -> OSError:
    """The same error for somebody else who has to hear of it."""
    return type(failure)(failure.errno, failure.strerror)


class ExtentKind(enum.Enum):
    """What a range of a device holds."""

    DATA = "data"  # stored, may be anything
    ZERO = "zero"  # known to read as zeros
    HOLE = "hole"  # not allocated anywhere, reads as zeros


class Extent(NamedTuple):
    """A range of a device that is of one kind; offset and length in bytes."""

    offset: int
    length: int
    kind: ExtentKind


@runtime_checkable
class BlockDevice(Protocol):
    """A disk. Raises: OSError from the storage below, MullionError for what it refuses."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def read_only(self) -> bool: ...

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill the whole buffer from the offset on."""
        ...

    def pwrite(self, offset: int, buffer: Buffer) -> None:
        """Write the whole buffer at the offset."""
        ...

    def flush(self) -> None:
        """Return when all writes that were finished before the call survive a power cut."""
        ...

    def discard(self, offset: int, length: int) -> None:
        """The range is no longer needed: it may be given back, and reads as zeros or as before."""
        ...

    def write_zeroes(self, offset: int, length: int) -> None:
        """The range reads as zeros from now on."""
        ...

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The range in order, without gaps, as few extents as is cheap to find."""
        ...

    def close(self) -> None:
        """Flush what was written and give back the descriptors; may be called again."""
        ...
