"""The differencing disks that were made on a file: they read wrong when it changes."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import Final

from mullion.vhd.layout import FOOTER_BYTES, HEADER_BYTES, DiskType, DynamicHeader, Footer, LayoutError

FILES_LIMIT: Final = 10_000
"""Files of a folder that are looked at."""


def find_children(path: str, unique_id: bytes) -> Iterator[str]:
    """The differencing disks in the folder of `path` whose parent has this id; what cannot be read is none.

    Children elsewhere are not found: nothing in a parent says that it has any.
    """
    folder = os.path.dirname(os.path.realpath(path))
    with os.scandir(folder) as entries:
        for _, entry in zip(range(FILES_LIMIT), entries, strict=False):
            with contextlib.suppress(OSError, LayoutError):
                if entry.is_file(follow_symlinks=False) and _parent_id(entry.path) == unique_id:
                    yield os.path.join(os.path.dirname(path), entry.name)


def _parent_id(path: str) -> bytes | None:
    """The parent's id that a differencing disk names; None for any other file. Raises: LayoutError; OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if not stat.S_ISREG(os.fstat(fd).st_mode) or size < FOOTER_BYTES + HEADER_BYTES:
            return None
        raw = os.pread(fd, FOOTER_BYTES, 0)
        if raw[:8] != Footer.COOKIE:
            raw = os.pread(fd, FOOTER_BYTES, size - FOOTER_BYTES)
        footer = Footer.unpack(raw)
        if footer.disk_type is not DiskType.DIFFERENCING or footer.data_offset > size:
            return None
        return DynamicHeader.unpack(os.pread(fd, HEADER_BYTES, footer.data_offset)).parent_unique_id
    finally:
        os.close(fd)
