"""A file system that remembers: what a power cut, or a death at any instant, can leave of a folder of files.

`RecordingIO` does all writes for real and notes, for each sector, every content it had since the file's last sync. A
power cut then picks for each sector any of them, and for a file's length any length it had: writes between two syncs
reach the platter in any order or not at all, torn at sectors. A name that was removed comes back, or not, unless its
folder was synced. A file is known from its first change on; what it held before is taken as durable.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from mullion.base.block import Buffer
from mullion.vhd.fileio import FileIO
from mullion.vhd.publish import new_file

SECTOR = 512


class KilledError(BaseException):
    """The process ends here. Not an Exception, so that nothing can go on after it."""


class Pin:
    """Keeps the inode of an open file from passing to another one, and nothing else of it: no lock stays."""

    def __init__(self, fd: int) -> None:
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC)

    def __del__(self) -> None:
        os.close(self._fd)


@dataclass
class Past:
    """What is known of one file since its last sync."""

    path: str
    pin: Pin
    synced: bytes
    versions: dict[int, list[bytes]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    unwritten: dict[int, bytes] = field(default_factory=dict)
    """Sectors that count as written and are not: what the platter has there."""

    def on_platter(self, content: bytes) -> bytes:
        """What the platter has once all that does not count as written is."""
        there = bytearray(content)
        for sector, old in self.unwritten.items():
            at = sector * SECTOR
            if at + len(old) <= len(there):
                there[at : at + len(old)] = old
        return bytes(there)

    def become_durable(self, content: bytes) -> None:
        self.synced = self.on_platter(content)
        self.versions.clear()
        self.lengths = [len(content)]


class RecordingIO(FileIO):
    """Records every file that is changed; `fuse` counts changes down to the one that fails, with ENOSPC or by killing."""

    is_threaded = False

    def __init__(self) -> None:
        self.fuse: int | None = None
        self.fuse_kills = True
        self.changes = 0
        self._files: dict[tuple[int, int], Past] = {}
        self._removed: list[tuple[str, str]] = []
        """Names that a power cut may bring back: (path, where its file is kept meanwhile)."""
        self.loses: random.Random | None = None
        """A sync that fails has lost some of what it was to write, which counts as written from then on."""

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        past = self._past(fd)
        whole = b"".join(bytes(buffer) for buffer in buffers)
        if self._burns():
            if self.fuse_kills:
                os.pwrite(fd, whole[: self._half(offset, len(whole))], offset)
                self._note(past, fd, offset, len(whole))
                raise KilledError
            if half := self._half(offset, len(whole)):  # the system takes what fits, and says so at the next call
                written = os.pwrite(fd, whole[:half], offset)
                self._note(past, fd, offset, written)
                self.fuse = 0
                return written
            self.fuse = None
            raise OSError(errno.ENOSPC, "no space left")
        written = os.pwrite(fd, whole, offset)
        self._note(past, fd, offset, written)
        return written

    def copy_range(self, source_fd: int, source_offset: int, fd: int, offset: int, length: int) -> None:
        content = os.pread(source_fd, length, source_offset)
        assert len(content) == length
        self.write_all(fd, [content], offset)

    def ftruncate(self, fd: int, length: int) -> None:
        past = self._past(fd)
        self._burn_or_go()
        before = os.fstat(fd).st_size
        os.ftruncate(fd, length)
        past.lengths.append(length)
        self._note(past, fd, min(before, length), abs(before - length))

    def punch_hole(self, fd: int, offset: int, length: int) -> None:
        past = self._past(fd)
        if self._burns():
            if self.fuse_kills:
                raise KilledError
            raise OSError(errno.EOPNOTSUPP, "no holes here")
        super().punch_hole(fd, offset, length)
        self._note(past, fd, offset, length)

    def fdatasync(self, fd: int) -> None:
        past = self._past(fd)
        try:
            self._burn_or_go()
        except OSError:
            if self.loses is not None:
                self._lose(past, fd, self.loses)
            raise
        past.become_durable(_content(fd))

    def forget_cached(self, fd: int) -> None:
        past = self._past(fd)
        with open(past.path, "r+b") as file:
            file.write(past.on_platter(_content(fd)))
        past.unwritten.clear()

    def _lose(self, past: Past, fd: int, choose: random.Random) -> None:
        """A sync has failed: each page holds what it held, is clean, and may be an older one on the platter."""
        content = _content(fd)
        before = past.synced.ljust(len(content), b"\0")
        for sector, versions in past.versions.items():
            at = sector * SECTOR
            if at < len(content):
                there = choose.choice([before[at : at + SECTOR], *versions])
                past.unwritten[sector] = there[: len(content) - at]
        past.become_durable(content)

    def remove_file(self, path: str) -> None:
        self._burn_or_go()
        folder = f"{os.path.dirname(path)}/removed"
        os.makedirs(folder, exist_ok=True)
        kept = f"{folder}/{self.changes}"
        os.rename(path, kept)
        self._removed.append((path, kept))

    def sync_folder(self, folder: str) -> None:
        self._burn_or_go()
        for path, kept in [pair for pair in self._removed if os.path.dirname(pair[0]) == folder]:
            os.unlink(kept)
            self._removed.remove((path, kept))

    def put_file(self, path: str, content: bytes) -> None:
        self._burn_or_go()
        with new_file(path, replace=True, durable=False) as fd:
            os.write(fd, content)

    def cut_power(self, choose: random.Random) -> None:
        """Leave in each file one of the states that the platter may be in, and what is left is durable."""
        for path, kept in self._removed:
            if choose.random() < 0.5 and not os.path.exists(path):
                os.rename(kept, path)
            else:
                os.unlink(kept)
        self._removed.clear()
        for identity, past in self._files.items():
            if os.path.exists(past.path) and _identity(os.stat(past.path)) == identity:
                self._cut(past, choose)
        self._files.clear()

    def _cut(self, past: Past, choose: random.Random) -> None:
        content = bytearray(past.synced)
        end = max([len(content), *past.lengths])
        content.extend(bytes(end - len(content)))
        for sector, versions in past.versions.items():
            at = sector * SECTOR
            if at < end:
                old = bytes(content[at : at + SECTOR])
                content[at : at + SECTOR] = choose.choice([old, *versions])[: len(old)]
        del content[choose.choice(past.lengths) :]
        status = os.stat(past.path)
        with open(past.path, "r+b") as file:
            file.write(content)
            file.truncate(len(content))
        os.utime(past.path, ns=(status.st_atime_ns, status.st_mtime_ns))  # nobody wrote to it since

    def _past(self, fd: int) -> Past:
        identity = _identity(os.fstat(fd))
        found = self._files.get(identity)
        if found is None:
            synced = _content(fd)
            found = Past(os.readlink(f"/proc/self/fd/{fd}"), Pin(fd), synced, lengths=[len(synced)])
            self._files[identity] = found
        return found

    def _half(self, offset: int, length: int) -> int:
        """About half of a write: a death or a full file system stops it between two pages, never inside a sector."""
        return max(0, (offset + length // 2) // SECTOR * SECTOR - offset)

    def _note(self, past: Past, fd: int, offset: int, length: int) -> None:
        past.lengths.append(os.fstat(fd).st_size)
        first, end = offset // SECTOR, -(-(offset + length) // SECTOR)
        raw = os.pread(fd, (end - first) * SECTOR, first * SECTOR).ljust((end - first) * SECTOR, b"\0")
        for sector in range(first, end):
            at = (sector - first) * SECTOR
            past.unwritten.pop(sector, None)
            past.versions.setdefault(sector, []).append(raw[at : at + SECTOR])

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


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)
