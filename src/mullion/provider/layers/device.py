"""The frame of a layer: a disk over a disk that hands everything on. Layers override what they are for.

Its tables of places are empty, so that the ring comes with every request, by `preadv` and `pwritev`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NoReturn

from mullion.base.block import Buffer, Extent, WritableBuffer
from mullion.provider.device import DirectDevice

_NOWHERE: Final[Mapping[int, NoReturn]] = {}


class Layer:
    """A `DirectDevice` over another, which it does not own: closing it closes nothing."""

    def __init__(self, below: DirectDevice) -> None:
        self.below = below
        self.mixed_used: set[int] = set()
        self.mixed_write_fd = -1
        self.direct_read: Mapping[int, tuple[int, int]] = _NOWHERE
        self.direct_write: Mapping[int, tuple[int, int]] = _NOWHERE
        self.mixed_read: Mapping[int, tuple[tuple[bytes, int, tuple[tuple[int, int] | None, ...]], ...]] = _NOWHERE

    @property
    def block_shift(self) -> int:
        return self.below.block_shift

    @property
    def size_bytes(self) -> int:
        return self.below.size_bytes

    @property
    def read_only(self) -> bool:
        return self.below.read_only

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        self.below.pread(offset, buffer)

    def pwrite(self, offset: int, buffer: Buffer) -> None:
        self.below.pwrite(offset, buffer)

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.below.preadv(offset, buffers)

    def pwritev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.below.pwritev(offset, buffers)

    def flush(self) -> None:
        self.below.flush()

    def discard(self, offset: int, length: int) -> None:
        self.below.discard(offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        self.below.write_zeroes(offset, length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return self.below.extents(offset, length)

    def close(self) -> None:
        """Nothing is owned here."""
