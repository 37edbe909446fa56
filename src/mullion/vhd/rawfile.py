"""A raw disk file, read as a block device: the content itself, with nothing around it.

Invariants: only a regular file is opened; what it holds is never taken for a structure; its size is the file's when it
was opened, and a file that was cut since gives an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from mullion.base.block import Buffer, Extent, ExtentKind, WritableBuffer
from mullion.base.errors import InvalidError
from mullion.vhd.errors import DiskReadOnlyError, VhdDamagedError
from mullion.vhd.image import open_file
from mullion.vhd.locking import lock_file
from mullion.vhd.mapping import Segment
from mullion.vhd.zeros import next_data, next_hole


class RawFile:
    """A raw file that is open for reading; a `BlockDevice`."""

    read_only = True

    def __init__(self, path: str) -> None:
        """Raises: NotFoundError, DeniedError, NotVhdError for what is not a regular file; DiskBusyError; OSError."""
        self._fd = open_file(path)
        try:
            lock_file(self._fd, path, for_writing=False)
        except BaseException:
            os.close(self._fd)
            raise
        self.path = path
        self.size_bytes: int = os.fstat(self._fd).st_size
        self.warnings: list[str] = []

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,)

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        self._check_range(offset, len(buffer))
        left = memoryview(buffer)
        while left:
            count = os.preadv(self._fd, [left], offset)
            if not count:
                raise VhdDamagedError(
                    f"{self.path} was cut to {offset} bytes while it was read",
                    path=self.path,
                    structure="raw disk",
                    offset=offset,
                    remedy="Find out what writes to the file; then try again.",
                )
            left, offset = left[count:], offset + count

    def segments(self, offset: int, length: int) -> list[Segment]:
        """Where a range lies, as `Chain.segments` says it."""
        self._check_range(offset, length)
        return [(self._fd, offset, length)]

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        self._check_range(offset, length)
        end = offset + length
        while offset < end:
            data = next_data(self._fd, offset, end)
            if data > offset:
                yield Extent(offset, data - offset, ExtentKind.HOLE)
            if data < end:
                hole = next_hole(self._fd, data, end)
                yield Extent(data, hole - data, ExtentKind.DATA)
                data = hole
            offset = data

    def pwrite(self, offset: int, buffer: Buffer) -> None:
        raise self._read_only_error()

    def discard(self, offset: int, length: int) -> None:
        raise self._read_only_error()

    def write_zeroes(self, offset: int, length: int) -> None:
        raise self._read_only_error()

    def flush(self) -> None:
        """Nothing was written."""

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_only_error(self) -> DiskReadOnlyError:
        return DiskReadOnlyError(f"{self.path} is open for reading only", path=self.path)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise InvalidError(
                f"{self.path}: bytes {offset} to {offset + length} are not on a disk of {self.size_bytes} bytes",
                remedy="Keep requests inside the size of the disk.",
                path=self.path,
                offset=offset,
            )
