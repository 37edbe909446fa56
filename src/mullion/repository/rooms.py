"""Memory for pieces and packs, taken once and used again: fresh pages cost more than what is done with them."""

from __future__ import annotations

import mmap
from typing import Final

_PRIVATE: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
"""Shared memory, which is what Python takes, has large pages only where somebody has turned them on for it."""


class Rooms:
    """Pieces of memory of one size. Safe from any thread."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._free: list[mmap.mmap] = []

    def take(self) -> memoryview:
        """A piece with anything in it."""
        try:
            room = self._free.pop()
        except IndexError:
            room = mmap.mmap(-1, self._size_bytes, flags=_PRIVATE)
        return memoryview(room)

    def give(self, view: object) -> None:
        """Give a piece back by any view of it, which must not be used any more; other memory is left alone."""
        if isinstance(view, memoryview) and isinstance(view.obj, mmap.mmap):
            self._free.append(view.obj)
