"""The pending log: acknowledged metadata that is not in the disk file yet, kept where `kill -9` cannot reach it.

A write that allocates puts its data into the file at once, but the BAT entry or bitmap bits that make it visible must
not reach the platter before the data does, so they wait in memory for the next flush. Should the process be killed
meanwhile, the guest would lose writes that it was told are done, although the machine never went down. Therefore each
change is also stored in a small file, mapped into memory and never synced: the page cache keeps it past the death of
the process, and after a power cut, when its records may be ahead of the data, the boot id does not match any more.

There are two areas. A flush takes what lies in one of them, while new records go to the other, which is empty; at its
end the first is emptied. So requests go on while a flush runs, and none waits unless the other area fills meanwhile.

File (little-endian, this machine only):

    0    8   magic "MULPEND2"            88   16  session, also the attribute user.mullion.session of the top file
    8    36  boot id, ASCII              104  8   generation of the first area
    44   16  unique id of the top disk   112  8   generation of the second area
    72   8   device of the top file      4096 ... records of 24 bytes, of the first area
    80   8   inode of the top file       then as many of the second area

Record:

    0    4   block          8   4   count, sectors (BITS)
    4    4   ALLOC: sector of the bitmap; BITS: first sector
    12   4   kind           16  8   seal: the generation

Invariants: a record counts when its seal is the header's generation, and all before it do; the seal is one aligned
store, made last. Generations only grow, so a reset is one store as well.

Durability: none against a power cut, by intent. `os.posix_fallocate` makes the room, so a full file system is an error
at opening, not a SIGBUS later. A log whose boot, disk, file or session is another's is discarded: the session changes
with each opening for writing, so a log left behind by a provider cannot be replayed over what others wrote since.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import uuid
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple

from mullion.base.process import boot_id
from mullion.base.units import KIB

LOG_BYTES: Final = 512 * KIB
SESSION_ATTRIBUTE: Final = "user.mullion.session"

_MAGIC: Final = b"MULPEND2"
_HEADER: Final = struct.Struct("<8s36s16s12xQQ16s")
_GENERATION_WORDS: Final = (104 // 8, 112 // 8)
_RECORDS_OFFSET: Final = 4096
_RECORD: Final = struct.Struct("<IIII")
_RECORD_BYTES: Final = 24
RECORD_LIMIT: Final = (LOG_BYTES - _RECORDS_OFFSET) // (2 * _RECORD_BYTES)
"""Of one area."""
_AREA_OFFSETS: Final = (_RECORDS_OFFSET, _RECORDS_OFFSET + RECORD_LIMIT * _RECORD_BYTES)


class RecordKind(IntEnum):
    """What a record changes."""

    ALLOC = 1
    BITS = 2


_BITS: Final = int(RecordKind.BITS)


class Record(NamedTuple):
    """One change: ALLOC (block, sector, 0) or BITS (block, first sector, sectors)."""

    kind: int
    block: int
    first: int
    length: int


def log_path(folder: str, disk_id: str, top_fd: int) -> str:
    """Where the log of a disk's top is kept: each file has one of its own, so that an exchange of tops mixes nothing.

    The name is made of what the file is and not of what it says, so whoever opens it knows whether there is a log.
    """
    status = os.fstat(top_fd)
    return f"{folder}/{disk_id}-{status.st_dev:x}-{status.st_ino:x}"


def start_session(top_fd: int) -> None:
    """Mark the file with a new session: best effort, since not every file system keeps attributes."""
    with contextlib.suppress(OSError):
        os.setxattr(top_fd, SESSION_ATTRIBUTE, uuid.uuid4().bytes)


def has_session(top_fd: int) -> bool:
    """Did the last writer not end cleanly? False as well where the file system keeps no attributes."""
    try:
        return bool(os.getxattr(top_fd, SESSION_ATTRIBUTE))
    except OSError:
        return False


def end_session(top_fd: int) -> None:
    """Take the mark away after a clean close."""
    with contextlib.suppress(OSError):
        os.removexattr(top_fd, SESSION_ATTRIBUTE)


class PendingLog:
    """The log of one disk that is open for writing. Used by one thread at a time."""

    def __init__(self, path: str, top_fd: int, unique_id: bytes) -> None:
        """Open or make the log. Raises: OSError, with ENOSPC when there is no room for it."""
        self.path = path
        self._top_fd = top_fd
        self._unique_id = unique_id
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        try:
            if os.fstat(fd).st_size != LOG_BYTES or os.pread(fd, len(_MAGIC), 0) != _MAGIC:
                os.ftruncate(fd, 0)
            os.posix_fallocate(fd, 0, LOG_BYTES)
            self._map = mmap.mmap(fd, LOG_BYTES)
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("Q")
        self._area = 0
        self._generation = 0
        self._next = 0
        self._use(0)

    def recover(self) -> tuple[list[Record], bool]:
        """What the process before us acknowledged: (records, whether the log belongs to this boot and disk)."""
        found = [record for area in self._areas_by_age() for record in self._sealed_records(area)]
        return found, self._map[: _HEADER.size] == self._header(self._session_of_file())

    def begin(self) -> None:
        """Start a session of our own on an empty log, which makes every older log of this disk worthless."""
        start_session(self._top_fd)
        for area in self._areas_by_age():
            self._empty(area)
        self._map[: _HEADER.size] = self._header(self._session_of_file())
        self._use(self._areas_by_age()[0])

    def append(self, records: Sequence[Record]) -> None:
        """Keep changes that are about to be acknowledged. The caller has seen to it that there is room."""
        for kind, block, first, count in records:
            self._append(block, first, count, kind)

    def append_bits(self, block: int, first: int, count: int) -> None:
        """The same for one BITS record."""
        self._append(block, first, count, _BITS)

    def _append(self, block: int, first: int, count: int, kind: int) -> None:
        at = self._next
        _RECORD.pack_into(self._map, at, block, first, count, kind)
        self._words[(at + 16) >> 3] = self._generation
        self._next = at + _RECORD_BYTES

    def switch(self) -> None:
        """From now on records go to the other area, which is empty."""
        self._use(1 - self._area)

    def empty_other(self) -> None:
        """All changes of the area that was in use before the last `switch` are in the disk file."""
        self._empty(1 - self._area)

    def _use(self, area: int) -> None:
        self._area = area
        self._generation = self._words[_GENERATION_WORDS[area]]
        self._next = _AREA_OFFSETS[area]

    def _empty(self, area: int) -> None:
        self._words[_GENERATION_WORDS[area]] = max(self._words[word] for word in _GENERATION_WORDS) + 1

    def _areas_by_age(self) -> list[int]:
        """The area with the older records first."""
        return sorted((0, 1), key=lambda area: self._words[_GENERATION_WORDS[area]])

    def close(self, *, remove: bool) -> None:
        """Let the mapping go; `remove` when nothing is pending any more."""
        if not self._map.closed:
            self._words.release()
            self._map.close()
            if remove:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path)

    def _header(self, session: bytes) -> bytes:
        status = os.fstat(self._top_fd)
        return _HEADER.pack(_MAGIC, boot_id().encode(), self._unique_id, status.st_dev, status.st_ino, session)

    def _session_of_file(self) -> bytes:
        try:
            return os.getxattr(self._top_fd, SESSION_ATTRIBUTE)[:16]
        except OSError:
            return bytes(16)  # no attributes here: the boot, the disk's id and the inode must do

    def _sealed_records(self, area: int) -> list[Record]:
        generation = self._words[_GENERATION_WORDS[area]]
        found: list[Record] = []
        while generation and len(found) < RECORD_LIMIT:
            at = _AREA_OFFSETS[area] + len(found) * _RECORD_BYTES
            if self._words[(at + 16) >> 3] != generation:
                break
            block, first, count, kind = _RECORD.unpack_from(self._map, at)
            found.append(Record(kind, block, first, count))
        return found
