"""A layer that sees every request in one place, whatever it is called by: `around` is all that a subclass writes."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

from mullion.base.block import Buffer, WritableBuffer
from mullion.provider.layers.device import Layer


class Kind(enum.Enum):
    """What a request does."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"
    DISCARD = "discard"
    WRITE_ZEROES = "write_zeroes"


class GuardedLayer(Layer):
    """Every request but `extents` goes through `around`."""

    def around(self, kind: Kind, offset: int, length: int, act: Callable[[], None]) -> None:
        """Do a request of the layer below, `act`, or something else."""
        act()

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        self.around(Kind.READ, offset, memoryview(buffer).nbytes, lambda: self.below.pread(offset, buffer))

    def pwrite(self, offset: int, buffer: Buffer) -> None:
        self.around(Kind.WRITE, offset, memoryview(buffer).nbytes, lambda: self.below.pwrite(offset, buffer))

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.around(Kind.READ, offset, sum(map(len, buffers)), lambda: self.below.preadv(offset, buffers))

    def pwritev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.around(Kind.WRITE, offset, sum(map(len, buffers)), lambda: self.below.pwritev(offset, buffers))

    def flush(self) -> None:
        self.around(Kind.FLUSH, 0, 0, self.below.flush)

    def discard(self, offset: int, length: int) -> None:
        self.around(Kind.DISCARD, offset, length, lambda: self.below.discard(offset, length))

    def write_zeroes(self, offset: int, length: int) -> None:
        self.around(Kind.WRITE_ZEROES, offset, length, lambda: self.below.write_zeroes(offset, length))
