"""A file system that remembers: what a power cut, or a death at any instant, can leave of a file.

`RecordingIO` does all writes for real and notes, for each sector, every content it had since the file's last sync. A
power cut then picks for each sector any of them, and for the file's length any length it had: writes between two syncs
reach the platter in any order or not at all, torn at sectors.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence

from mullion.base.block import Buffer
from mullion.vhd.fileio import FileIO

SECTOR = 512


class KilledError(BaseException):
    """The process ends here. Not an Exception, so that nothing can go on after it."""


class RecordingIO(FileIO):
    """Records one file; `fuse` counts changes down to the one that fails, with ENOSPC or by killing."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fuse: int | None = None
        self.fuse_kills = True
        self.changes = 0
        self._versions: dict[int, list[bytes]] = {}
        self._synced = self._content()
        self._lengths = [len(self._synced)]

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        whole = b"".join(bytes(buffer) for buffer in buffers)
        if self._burns():
            if self.fuse_kills:
                os.pwrite(fd, whole[: self._half(offset, len(whole))], offset)
                self._note(offset, len(whole))
                raise KilledError
            if half := self._half(offset, len(whole)):  # the system takes what fits, and says so at the next call
                written = os.pwrite(fd, whole[:half], offset)
                self._note(offset, written)
                self.fuse = 0
                return written
            self.fuse = None
            raise OSError(errno.ENOSPC, "no space left")
        written = os.pwrite(fd, whole, offset)
        self._note(offset, written)
        return written

    def ftruncate(self, fd: int, length: int) -> None:
        self._burn_or_go()
        before = os.fstat(fd).st_size
        os.ftruncate(fd, length)
        self._lengths.append(length)
        self._note(min(before, length), abs(before - length))

    def punch_hole(self, fd: int, offset: int, length: int) -> None:
        if self._burns():
            if self.fuse_kills:
                raise KilledError
            raise OSError(errno.EOPNOTSUPP, "no holes here")
        super().punch_hole(fd, offset, length)
        self._note(offset, length)

    def fdatasync(self, fd: int) -> None:
        self._burn_or_go()
        self._synced = self._content()
        self._versions.clear()
        self._lengths = [len(self._synced)]

    def cut_power(self, choose: random.Random) -> None:
        """Leave in the file one of the states that the platter may be in."""
        content = bytearray(self._synced)
        end = max([len(content), *self._lengths])
        content.extend(bytes(end - len(content)))
        for sector, versions in self._versions.items():
            at = sector * SECTOR
            if at < end:
                old = bytes(content[at : at + SECTOR])
                content[at : at + SECTOR] = choose.choice([old, *versions])[: len(old)]
        del content[choose.choice(self._lengths) :]
        with open(self.path, "r+b") as file:
            file.write(content)
            file.truncate(len(content))

    def _half(self, offset: int, length: int) -> int:
        """About half of a write: a death or a full file system stops it between two pages, never inside a sector."""
        return max(0, (offset + length // 2) // SECTOR * SECTOR - offset)

    def _content(self) -> bytes:
        with open(self.path, "rb") as file:
            return file.read()

    def _note(self, offset: int, length: int) -> None:
        with open(self.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            self._lengths.append(size)
            for sector in range(offset // SECTOR, -(-(offset + length) // SECTOR)):
                file.seek(sector * SECTOR)
                self._versions.setdefault(sector, []).append(file.read(SECTOR).ljust(SECTOR, b"\0"))

    def _burns(self) -> bool:
        self.changes += 1
        if self.fuse is None:
            return False
        self.fuse -= 1
        return self.fuse < 0

    def _burn_or_go(self) -> None:
        if self._burns():
            if self.fuse_kills:
                raise KilledError
            self.fuse = None
            raise OSError(errno.ENOSPC, "no space left")
