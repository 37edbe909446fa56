"""The thin seam between the engine and the file system: every change of a file goes through a `FileIO`.

Reading needs no seam. A sync that fails is final: Linux says once that it could not write a page, and counts the page
as written from then on, so that a sync that is repeated succeeds. Hence `sync_file`, which everybody calls and not
`fdatasync`: what it raises is no lack of space that passes, and what is read then is what the storage has.

The model test injects a `FileIO` that records what was written between two syncs, and makes from it the files that a
power cut, or such a sync, could leave behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Final

from mullion.base.block import Buffer, LostDataError
from mullion.base.files import sync_folder
from mullion.base.units import KIB, MIB
from mullion.vhd.publish import new_file

ZEROS: Final = memoryview(bytes(MIB))
"""Shared zeros, to fill buffers from and to write."""

IOV_LIMIT: Final = 1024
"""Buffers in one preadv or pwritev (IOV_MAX of Linux)."""

PAGED_RUN_BYTES: Final = 16 * KIB
"""Below this a copy costs less than to hand on references to pages."""

DATA_PIECE_BYTES: Final = 64 * KIB
"""Of a guest's data in one call. Linux keeps what one call writes in pages as large as that (ext4 since 6.16), and each
4 KiB that are written into one later cost a step for all 4 KiB that it has: 1 MiB a call makes that three times as slow
as this (`python -m bench.disk --only requests`)."""

SHORT_COPY_BYTES: Final = 64 * KIB
"""Below this reading and writing costs less than copy_file_range (ext4, Linux 6: half, in pieces of 4 KiB)."""

_CANNOT_COPY: Final = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ETXTBSY)
_FS_IOC_UNRESVSP64: Final = 0x4030_582B
"""ioctl of every Linux file system that can punch holes, the same as fallocate(PUNCH_HOLE | KEEP_SIZE); linux/falloc.h.
`os` has no fallocate with flags, and `ctypes` would cost every provider a megabyte."""
_FS_IOC_RESVSP64: Final = 0x4030_582A
"""The same as fallocate(KEEP_SIZE)."""
_SPACE_RESERVATION: Final = struct.Struct("hhqqiI16x")
_CANNOT_PUNCH: Final = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL)


class FileIO:
    """Changes of files, straight to the system. Methods raise OSError."""

    is_threaded = True
    """May several threads use it at once?"""

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Write as much as the system takes at once; returns the bytes written."""
        return os.pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        """For `sync_file` only."""
        os.fdatasync(fd)

    def forget_cached(self, fd: int) -> None:
        """Let what is read of a file from now on come from the storage, except for what waits to be written."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def sync_file(self, fd: int) -> None:
        """Make a file durable.

        Raises: LostDataError (EIO): some of what was written since the last sync, no matter by whom, is gone, and is to
        be written again; a repeat would not tell.
        """
        try:
            self.fdatasync(fd)
        except OSError as error:
            # Structures that are read back now must not be pages that count as written and are not there.
            with contextlib.suppress(OSError):  # the first error is the one to tell
                self.forget_cached(fd)
            reason = error.strerror or str(error)
            raise LostDataError(errno.EIO, f"the storage did not keep what was written ({reason})") from error

    def ftruncate(self, fd: int, length: int) -> None:
        os.ftruncate(fd, length)

    def punch_hole(self, fd: int, offset: int, length: int) -> None:
        """Give a range back to the file system; it reads as zeros after."""
        fcntl.ioctl(fd, _FS_IOC_UNRESVSP64, _SPACE_RESERVATION.pack(0, 0, offset, length, 0, 0))

    def reserve(self, fd: int, offset: int, length: int) -> bool:
        """Allocate room, which reads as zeros, without changing the file's length; False where that is not known."""
        try:
            fcntl.ioctl(fd, _FS_IOC_RESVSP64, _SPACE_RESERVATION.pack(0, 0, offset, length, 0, 0))
        except OSError as error:
            if error.errno not in _CANNOT_PUNCH:
                raise
            return False
        return True

    def copy_range(self, source_fd: int, source_offset: int, fd: int, offset: int, length: int) -> None:
        """Copy bytes from file to file without leaving the kernel, where it can; it shares them where it can do that.

        Raises: OSError, with EIO when the source ends too early.
        """
        while length >= SHORT_COPY_BYTES:
            try:
                copied = os.copy_file_range(source_fd, fd, length, source_offset, offset)
            except OSError as error:
                if error.errno not in _CANNOT_COPY:
                    raise
                break
            if not copied:
                break
            source_offset, offset, length = source_offset + copied, offset + copied, length - copied
        while length:
            content = os.pread(source_fd, min(length, MIB), source_offset)
            if not content:
                raise OSError(errno.EIO, "the file that is copied ends too early")
            self.write_all(fd, [content], offset)
            source_offset, offset, length = source_offset + len(content), offset + len(content), length - len(content)

    def remove_file(self, path: str) -> None:
        """Take a name away; durable after `sync_folder`."""
        os.unlink(path)

    def sync_folder(self, folder: str) -> None:
        """Make the names in a folder durable."""
        sync_folder(folder)

    def put_file(self, path: str, content: bytes) -> None:
        """A small file, new or in place of another: durable, and whole or as before, at any instant."""
        with new_file(path, replace=True) as fd:
            SYSTEM.write_all(fd, [content], 0)

    def write_all(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all of the buffers, however many and however short the system's writes are."""
        if len(buffers) == 1:  # nearly always, and then all of it is taken
            written = self.pwritev(fd, buffers, offset)
            if written == len(buffers[0]):
                return
            buffers, offset = [memoryview(buffers[0])[written:]], offset + written
        left: list[Buffer] = list(buffers)
        while left:
            written = self.pwritev(fd, left[:IOV_LIMIT], offset)
            offset += written
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = memoryview(left[0])[written:]

    def write_data(self, fd: int, buffers: Sequence[Buffer], offset: int, length: int) -> None:
        """As `write_all`, of `length` bytes that a guest may write again in smaller pieces."""
        if length <= DATA_PIECE_BYTES:
            self.write_all(fd, buffers, offset)
            return
        first = DATA_PIECE_BYTES - offset % DATA_PIECE_BYTES
        lengths = [first, *repeat(DATA_PIECE_BYTES, (length - first) // DATA_PIECE_BYTES)]
        if rest := length - sum(lengths):
            lengths.append(rest)
        for part in split_buffers([memoryview(buffer) for buffer in buffers], lengths):
            self.write_all(fd, part, offset)
            offset += sum(map(len, part))

    def discard(self, fd: int, offset: int, length: int) -> None:
        """Give a range back where the file system can do so; otherwise nothing happens."""
        try:
            self.punch_hole(fd, offset, length)
        except OSError as error:
            if error.errno not in _CANNOT_PUNCH:
                raise

    def write_zeros(self, fd: int, offset: int, length: int) -> None:
        """Make a range inside the file read as zeros, without using room where the file system can do so."""
        if length <= 0:
            return
        try:
            self.punch_hole(fd, offset, length)
        except OSError as error:
            if error.errno not in _CANNOT_PUNCH:
                raise
            while length:
                step = min(length, len(ZEROS))
                self.write_all(fd, [ZEROS[:step]], offset)
                offset += step
                length -= step


SYSTEM: Final = FileIO()


def split_buffers(buffers: Sequence[memoryview], lengths: Iterable[int]) -> Iterator[list[memoryview]]:
    """Cut a list of buffers (of bytes) into one list for each length, without copying."""
    index, start = 0, 0
    for length in lengths:
        part: list[memoryview] = []
        left = length
        while left:
            buffer = buffers[index]
            step = min(left, len(buffer) - start)
            if step:
                part.append(buffer[start : start + step])
            start += step
            left -= step
            if start == len(buffer):
                index, start = index + 1, 0
        yield part
