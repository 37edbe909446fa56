"""What the ring needs from a disk beyond the block vocabulary, and how much it may ask in one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from mullion.base.block import BlockDevice

REQUEST_LIMIT_BYTES: Final = 256 * 1024 * 1024
"""Largest data of one request; real drivers stay at a few MiB."""


class DirectDevice(BlockDevice, Protocol):
    """A disk that tells where its granules lie, so that the ring can read and write them without a call.

    A granule (of `1 << block_shift` bytes) that is missing in `direct_read` or `direct_write` goes through `preadv` or
    `pwritev`, which may add it. The tables may lose entries at any time.
    """

    @property
    def block_shift(self) -> int: ...

    @property
    def direct_read(self) -> Mapping[int, tuple[int, int]]:
        """Granule → (descriptor, offset of the granule's first byte in that file), when it lies there in one piece."""
        ...

    @property
    def direct_write(self) -> Mapping[int, tuple[int, int]]:
        """The same, for granules that can be overwritten in place without a change of metadata."""
        ...

    @property
    def mixed_read(self) -> Mapping[int, tuple[tuple[bytes, int, tuple[tuple[int, int] | None, ...]], ...]]:
        """Granule → levels of (owner of each unit, log2 of a unit's bytes, place of each owner), when files share it.

        What the first level's owner has no place for is the business of `preadv`.
        """
        ...

    @property
    def mixed_used(self) -> set[int]:
        """Whoever reads through `mixed_read` adds the granule here, so that it is kept."""
        ...

    @property
    def mixed_write_fd(self) -> int:
        """Units of the first level whose owner's descriptor this is can be overwritten in place, as in `direct_write`.

        -1 when there are none.
        """
        ...

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all buffers from the offset on."""
        ...

    def pwritev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all buffers at the offset."""
        ...
