"""Zeros in a file: whether a range is all zeros, and which runs of it are; holes are never read."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Final

from mullion.base.units import KIB, MIB

UNIT_BYTES: Final = 4 * KIB
"""What file systems give back; shorter runs of zeros are data."""
_FIRST_LOOK_BYTES: Final = 4 * KIB
_PIECE_BYTES: Final = 256 * KIB
_RUN_BYTES: Final = MIB
_ZEROS: Final = bytes(_PIECE_BYTES)
_ZERO_RUN: Final = bytes(64 * KIB)
_ZERO_UNIT: Final = bytes(UNIT_BYTES)


def next_data(fd: int, offset: int, end: int) -> int:
    """The first byte from the offset on that may be other than zero, as the file system knows it; `end` for none."""
    try:
        return min(end, os.lseek(fd, offset, os.SEEK_DATA))
    except OSError as error:
        return end if error.errno == errno.ENXIO else offset  # behind the last data, or no such notion here


def next_hole(fd: int, offset: int, end: int) -> int:
    """Where the data that begins at the offset ends."""
    try:
        return min(end, os.lseek(fd, offset, os.SEEK_HOLE))
    except OSError:
        return end


def data_end(fd: int, end: int) -> int:
    """Where the last data of a file ends, as the file system knows it: holes behind it are skipped without reading."""
    low, high = 0, end
    while low < high:  # whether there is data behind an offset changes once, from yes to no
        middle = (low + high) // 2
        if next_data(fd, middle, end) < end:
            low = middle + 1
        else:
            high = middle
    return low


def is_zero(fd: int, offset: int, length: int) -> bool:
    """Does a range of a file hold nothing but zeros? What lies past the file's end does."""
    end = offset + length
    step = _FIRST_LOOK_BYTES
    while (offset := next_data(fd, offset, end)) < end:
        piece = os.pread(fd, min(step, end - offset), offset)
        if piece != _ZEROS[: len(piece)]:
            return False
        if not piece:
            return True
        offset += len(piece)
        step = _PIECE_BYTES
    return True


def runs(content: bytes) -> Iterator[tuple[int, int, bool]]:
    """Divide bytes into runs: (offset, length, whether it is all zeros), in units of 4 KiB from the first byte on."""
    start, kind = 0, None
    for at, is_zeros in _pieces(content):
        if kind is not None and is_zeros is not kind:
            yield start, at - start, kind
            start = at
        kind = is_zeros
    if kind is not None:
        yield start, len(content) - start, kind


def _pieces(content: bytes) -> Iterator[tuple[int, bool]]:
    for outer in range(0, len(content), len(_ZERO_RUN)):
        part = content[outer : outer + len(_ZERO_RUN)]
        if part == _ZERO_RUN[: len(part)]:
            yield outer, True
            continue
        for at in range(0, len(part), UNIT_BYTES):
            unit = part[at : at + UNIT_BYTES]
            yield outer + at, unit == _ZERO_UNIT[: len(unit)]


def file_runs(fd: int, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """The runs of a range of a file, holes as zeros: (offset in the file, length, whether it is all zeros)."""
    end = offset + length
    while offset < end:
        data = next_data(fd, offset, end)
        if data > offset:
            yield offset, data - offset, True
            offset = data
            continue
        content = os.pread(fd, min(_RUN_BYTES, next_hole(fd, offset, end) - offset), offset)
        if not content:
            return
        for at, count, is_zeros in runs(content):
            yield offset + at, count, is_zeros
        offset += len(content)
