"""Block devices for tests: in memory, and over a raw file. Both keep to `mullion.base.block.BlockDevice`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

from mullion.base.block import Buffer, Extent, ExtentKind, WritableBuffer
from mullion.base.errors import DeniedError, InvalidError

GRANULE_BYTES = 4096


class MemoryDevice:
    """A disk in a bytearray that knows which granules were never written or were given back."""

    def __init__(self, size_bytes: int, *, read_only: bool = False) -> None:
        self.content = bytearray(size_bytes)
        self.read_only = read_only
        self.flushes = 0
        self.calls: list[tuple[str, int, int]] = []
        self._kinds = [ExtentKind.HOLE] * -(-size_bytes // GRANULE_BYTES)
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        return len(self.content)

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        length = memoryview(buffer).nbytes
        self._check(offset, length)
        with self._lock:
            memoryview(buffer)[:] = self.content[offset : offset + length]

    def pwrite(self, offset: int, buffer: Buffer) -> None:
        length = memoryview(buffer).nbytes
        self._check(offset, length, writing=True)
        with self._lock:
            self.calls.append(("pwrite", offset, length))
            self.content[offset : offset + length] = buffer
            self._mark(offset, length, ExtentKind.DATA, inner=False)

    def flush(self) -> None:
        with self._lock:
            self.flushes += 1
            self.calls.append(("flush", 0, 0))

    def discard(self, offset: int, length: int) -> None:
        self._zero("discard", offset, length, ExtentKind.HOLE)

    def write_zeroes(self, offset: int, length: int) -> None:
        self._zero("write_zeroes", offset, length, ExtentKind.ZERO)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        self._check(offset, length)
        end = offset + length
        while offset < end:
            kind = self._kinds[offset // GRANULE_BYTES]
            stop = offset
            while stop < end and self._kinds[stop // GRANULE_BYTES] is kind:
                stop = (stop // GRANULE_BYTES + 1) * GRANULE_BYTES
            stop = min(stop, end)
            yield Extent(offset, stop - offset, kind)
            offset = stop

    def close(self) -> None:
        pass

    def _zero(self, call: str, offset: int, length: int, kind: ExtentKind) -> None:
        self._check(offset, length, writing=True)
        with self._lock:
            self.calls.append((call, offset, length))
            self.content[offset : offset + length] = bytes(length)
            self._mark(offset, length, kind, inner=True)

    def _mark(self, offset: int, length: int, kind: ExtentKind, *, inner: bool) -> None:
        """Granules touched, or with `inner` only those that lie wholly inside (or end with the disk)."""
        first, last = offset // GRANULE_BYTES, -(-(offset + length) // GRANULE_BYTES)
        if inner:
            first = -(-offset // GRANULE_BYTES)
            if offset + length < len(self.content):
                last = (offset + length) // GRANULE_BYTES
        for granule in range(first, last):
            self._kinds[granule] = kind

    def _check(self, offset: int, length: int, *, writing: bool = False) -> None:
        if offset < 0 or offset + length > len(self.content):
            raise InvalidError(f"{length} bytes at {offset} are outside the disk")
        if writing and self.read_only:
            raise DeniedError("the disk is read-only")


class RawFileDevice:
    """A disk that is a raw file: the thinnest device there is, for comparing with other programs."""

    read_only = False

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.size_bytes = os.fstat(self._fd).st_size

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        if os.preadv(self._fd, [buffer], offset) != memoryview(buffer).nbytes:
            raise OSError(5, "short read")

    def pwrite(self, offset: int, buffer: Buffer) -> None:
        if os.pwrite(self._fd, buffer, offset) != memoryview(buffer).nbytes:
            raise OSError(5, "short write")

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        self.write_zeroes(offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        self.pwrite(offset, bytes(length))

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What SEEK_DATA and SEEK_HOLE of lseek(2) say."""
        end = offset + length
        while offset < end:
            try:
                data = min(os.lseek(self._fd, offset, os.SEEK_DATA), end)
            except OSError:  # ENXIO: nothing but a hole up to the end
                data = end
            if data > offset:
                yield Extent(offset, data - offset, ExtentKind.HOLE)
            offset = data
            if offset < end:
                hole = min(os.lseek(self._fd, offset, os.SEEK_HOLE), end)
                yield Extent(offset, hole - offset, ExtentKind.DATA)
                offset = hole

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
