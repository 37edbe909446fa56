"""A disk's content, or a part of it, into a pipe or whatever else takes bytes in order.

Into a pipe, from files that are known (a chain, a raw file), the pages of the page cache are spliced: nothing is copied
on our side, and zeros are pages of one small file of them. Into anything else the content is read and written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from typing import Final

from mullion.base.block import BlockDevice, ExtentKind
from mullion.base.progress import Progress, no_progress
from mullion.base.units import GIB, KIB, MIB, SECTOR_BYTES
from mullion.vhd.chain import Chain
from mullion.vhd.copying import TargetKind, read_source
from mullion.vhd.create import new_footer
from mullion.vhd.fileio import ZEROS
from mullion.vhd.layout import ALL_ONES, DiskType
from mullion.vhd.mapping import NOWHERE
from mullion.vhd.rawfile import RawFile

_STEP_BYTES: Final = 16 * MIB
_PIPE_BYTES: Final = MIB
_BUFFER_BYTES: Final = 256 * KIB


def stream_disk(source: BlockDevice, fd: int, kind: TargetKind, *, progress: Progress = no_progress) -> int:
    """Write a whole disk, raw or fixed, into a descriptor; the size of the disk that went there.

    A disk whose size is no multiple of 512 is padded with zeros. Raises: BrokenPipeError when the reader left; what
    reading the source raises; InvalidError when a VHD cannot have this size.
    """
    assert kind is not TargetKind.DYNAMIC, "its BAT comes before what it describes"
    size_bytes = -(-source.size_bytes // SECTOR_BYTES) * SECTOR_BYTES
    tail = bytes(size_bytes - source.size_bytes)
    if kind is TargetKind.FIXED:
        tail += new_footer(DiskType.FIXED, size_bytes, ALL_ONES).pack()
    stream_range(source, fd, 0, source.size_bytes, progress=progress)
    write_bytes(fd, tail)
    return size_bytes


def stream_range(source: BlockDevice, fd: int, offset: int, length: int, *, progress: Progress = no_progress) -> None:
    """Write a range of a disk into a descriptor. Raises: as `stream_disk`."""
    end, begin = offset + length, offset
    report_at = offset
    with _sender(source, fd) as send:
        while offset < end:
            step = min(_STEP_BYTES, end - offset)
            send(offset, step)
            offset += step
            if offset >= report_at or offset == end:
                progress("copying", offset - begin, length)
                report_at = offset + min(max(length // 200, _STEP_BYTES), GIB)


def write_bytes(fd: int, content: bytes | memoryview) -> None:
    """Write all of it, in order."""
    left = memoryview(content)
    while left:
        left = left[os.write(fd, left) :]


@contextlib.contextmanager
def _sender(source: BlockDevice, fd: int) -> Iterator[Callable[[int, int], None]]:
    """What sends a range of the disk, in the way that the descriptor allows."""
    if stat.S_ISFIFO(os.fstat(fd).st_mode) and isinstance(source, Chain | RawFile):
        with contextlib.suppress(OSError):  # above what this user may have: the pipe stays as it is
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        zeros_fd = os.memfd_create("zeros")
        try:
            os.ftruncate(zeros_fd, _STEP_BYTES)
            yield lambda offset, length: _splice(source, zeros_fd, fd, offset, length)
        finally:
            os.close(zeros_fd)
    else:
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        yield lambda offset, length: _copy(source, fd, offset, length, buffer)


def _splice(source: Chain | RawFile, zeros_fd: int, pipe: int, offset: int, length: int) -> None:
    for source_fd, start, count in source.segments(offset, length):
        from_fd, at = (zeros_fd, 0) if source_fd == NOWHERE else (source_fd, start)
        end = at + count
        while at < end:
            try:
                moved = os.splice(from_fd, pipe, end - at, offset_src=at)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                moved = 0  # a file system whose files cannot be spliced
            if not moved:  # or the file ends: then reading says so
                _copy(source, pipe, offset, end - at, memoryview(bytearray(_BUFFER_BYTES)))
                moved = end - at
            at, offset = at + moved, offset + moved


def _copy(source: BlockDevice, fd: int, offset: int, length: int, buffer: memoryview) -> None:
    for start, count, kind in source.extents(offset, length):
        for at in range(start, start + count, len(buffer)):
            part = buffer[: min(len(buffer), start + count - at)]
            if kind is ExtentKind.DATA:
                read_source(source, at, part)
                write_bytes(fd, part)
            else:
                write_bytes(fd, ZEROS[: len(part)])
