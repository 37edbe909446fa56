"""Read-only disks made of pieces of others: a file as it is, a window of it, several one after the other."""

from __future__ import annotations

import errno
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mullion.base.block import BlockDevice, Buffer, Extent, ExtentKind, WritableBuffer
from mullion.base.errors import InvalidError
from mullion.vhd.errors import DiskReadOnlyError


class ReadOnlyDevice:
    """What all read-only devices share: they know their size, check ranges and refuse what would write."""

    def __init__(self, name: str, size_bytes: int) -> None:
        self._name = name
        self._size_bytes = size_bytes

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def read_only(self) -> bool:
        return True

    def pwrite(self, offset: int, buffer: Buffer) -> None:
        raise self._refusal()

    def flush(self) -> None:
        """There is never anything to flush."""

    def discard(self, offset: int, length: int) -> None:
        raise self._refusal()

    def write_zeroes(self, offset: int, length: int) -> None:
        raise self._refusal()

    def _refusal(self) -> DiskReadOnlyError:
        return DiskReadOnlyError(f"{self._name} is open for reading only", path=self._name)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._size_bytes:
            raise InvalidError(
                f"{self._name}: bytes {offset} to {offset + length} are not on a disk of {self._size_bytes} bytes",
                remedy="Keep requests inside the size of the disk.",
                path=self._name,
                offset=offset,
            )


class FileWindow(ReadOnlyDevice):
    """Bytes of an open file, from an offset on, as a disk. The descriptor is this device's from now on."""

    def __init__(self, fd: int, name: str, offset: int = 0, size_bytes: int | None = None) -> None:
        super().__init__(name, os.fstat(fd).st_size - offset if size_bytes is None else size_bytes)
        self._fd = fd
        self._offset = offset
        self._lock = threading.Lock()

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        view = memoryview(buffer).cast("B")
        self._check_range(offset, len(view))
        at = self._offset + offset
        while view:
            count = os.preadv(self._fd, (view,), at)
            if count == 0:
                raise OSError(errno.EIO, f"the file ends at byte {at}: it became shorter while it was read", self._name)
            view, at = view[count:], at + count

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        self._check_range(offset, length)
        end = offset + length
        while offset < end:
            stop, kind = self._extent_at(offset, end)
            yield Extent(offset, stop - offset, kind)
            offset = stop

    def _extent_at(self, offset: int, end: int) -> tuple[int, ExtentKind]:
        base = self._offset
        with self._lock:  # lseek moves a position that nothing else uses
            try:
                data = os.lseek(self._fd, base + offset, os.SEEK_DATA) - base
                if data > offset:
                    return min(end, data), ExtentKind.HOLE
                return min(end, os.lseek(self._fd, base + offset, os.SEEK_HOLE) - base), ExtentKind.DATA
            except OSError as error:
                # ENXIO: no data to the end of the file; anything else: the file system has no such notion.
                return end, ExtentKind.HOLE if error.errno == errno.ENXIO else ExtentKind.DATA

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Piece(NamedTuple):
    """So many bytes of a device from an offset on; without a device they are zeros."""

    device: BlockDevice | None
    offset: int
    length: int


class Pieces(ReadOnlyDevice):
    """Pieces one after the other. The devices stay the caller's."""

    def __init__(self, name: str, pieces: Sequence[Piece]) -> None:
        super().__init__(name, sum(piece.length for piece in pieces))
        self._pieces = [piece for piece in pieces if piece.length]
        self._starts: list[int] = []
        start = 0
        for piece in self._pieces:
            self._starts.append(start)
            start += piece.length

    def _within(self, offset: int, length: int) -> Iterator[tuple[int, Piece]]:
        """The parts of a range: (offset here, part of a piece)."""
        end = offset + length
        index = bisect_right(self._starts, offset) - 1
        while offset < end:
            piece, skip = self._pieces[index], offset - self._starts[index]
            count = min(end - offset, piece.length - skip)
            yield offset, Piece(piece.device, piece.offset + skip, count)
            offset, index = offset + count, index + 1

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        view = memoryview(buffer).cast("B")
        self._check_range(offset, len(view))
        for at, part in self._within(offset, len(view)):
            target = view[at - offset : at - offset + part.length]
            if part.device is None:
                target[:] = bytes(part.length)
            else:
                part.device.pread(part.offset, target)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        self._check_range(offset, length)
        for at, part in self._within(offset, length):
            if part.device is None:
                yield Extent(at, part.length, ExtentKind.HOLE)
                continue
            for found in part.device.extents(part.offset, part.length):
                yield Extent(at + found.offset - part.offset, found.length, found.kind)

    def close(self) -> None:
        """Nothing of this device's own is open."""
