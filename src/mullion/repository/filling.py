"""A pack that is put while it is filled: one thread adds chunks, another iterates its bytes as they come.

What is whole is given out in windows, and the rest when the pack is closed; a storage that takes bytes one after the
other has written nearly all of a pack by then. It can be iterated again, from the beginning, for a storage that is
tried again. Its memory is in use until the one who iterates has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Final

from mullion.base.block import Buffer
from mullion.base.units import MIB
from mullion.repository.keys import Keys
from mullion.repository.pack import PackBuilder, PackEntry, pack_name

WINDOW_BYTES: Final = 4 * MIB


class PackDroppedError(Exception):
    """The pack is not wanted any more. It ends who puts it, and gets no farther."""


class FillingPack:
    """A pack, from its first chunk until it is durable."""

    def __init__(self, keys: Keys, room: memoryview) -> None:
        """In memory as `PackBuilder` takes it."""
        self._pack = PackBuilder(keys, room)
        self._changed = threading.Condition()
        self._whole_bytes = 0
        self._rest: Sequence[Buffer] | None = None
        self._is_dropped = False
        self.room = room

    @property
    def pack_id(self) -> bytes:
        return self._pack.pack_id

    @property
    def name(self) -> str:
        """The object's name."""
        return pack_name(self._pack.pack_id)

    @property
    def entries(self) -> list[PackEntry]:
        return self._pack.entries

    @property
    def is_full(self) -> bool:
        return self._pack.is_full

    def add(self, chunk_id: bytes, payload: Buffer, raw_bytes: int, flags: int) -> PackEntry:
        """Encrypt a chunk into the pack, which must not be full, closed or dropped."""
        entry = self._pack.add(chunk_id, payload, raw_bytes, flags)
        if self._pack.size_bytes - self._whole_bytes >= WINDOW_BYTES:
            with self._changed:
                self._whole_bytes = self._pack.size_bytes // WINDOW_BYTES * WINDOW_BYTES
                self._changed.notify_all()
        return entry

    def close(self) -> None:
        """Nothing more comes."""
        rest = self._pack.close()
        with self._changed:
            self._rest = rest
            self._changed.notify_all()

    def drop(self) -> None:
        """End who iterates it, unless it is closed."""
        with self._changed:
            self._is_dropped = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Buffer]:
        """The pack's bytes from the first, waiting for them. Raises: PackDroppedError."""
        given = 0
        while True:
            with self._changed:
                while self._rest is None and self._whole_bytes == given:
                    if self._is_dropped:
                        raise PackDroppedError
                    self._changed.wait()
                whole, rest = self._whole_bytes, self._rest
            for begin in range(given, whole, WINDOW_BYTES):
                yield self.room[begin : begin + WINDOW_BYTES]
            given = whole
            if rest is not None:
                content, *directory = rest
                yield memoryview(content)[given:]
                yield from directory
                return
