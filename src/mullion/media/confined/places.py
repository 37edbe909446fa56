"""Where a file's bytes lie on its volume, so that the other side may read them there: inside the confined process.

The library reads a file through its runs; bytes that are taken past it must be those that it would give. So they are
only where each run says its place, and where the library gives the same at both ends.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import pytsk3

from mullion.base.units import KIB, MIB

DATA_ATTRIBUTE: Final = 0x80
_CONTENT_ATTRIBUTES: Final = (1, DATA_ATTRIBUTE)
"""The default attribute of filesystems that have no others, and that of NTFS."""
_COMPRESSED_FLAG: Final = int(pytsk3.TSK_FS_ATTR_COMP)
_NONRESIDENT_FLAG: Final = int(pytsk3.TSK_FS_ATTR_NONRES)
_HOLE_FLAGS: Final = int(pytsk3.TSK_FS_ATTR_RUN_FLAG_SPARSE) | int(pytsk3.TSK_FS_ATTR_RUN_FLAG_FILLER)
_EXTENTS_FROM_BYTES: Final = MIB
"""Files that hold less are read through the library."""
_PROBE_BYTES: Final = 64 * KIB
_EXFAT_FIRST_INODE: Final = 3
"""The library's number of the first entry in the cluster heap."""
_EXFAT_ENTRY_BYTES: Final = 32
_EXFAT_ENTRIES_LIMIT: Final = 19
_EXFAT_STREAM: Final = 0xC0

ReadVolume = Callable[[int, int], bytes]
"""Bytes of the volume: offset and length."""


class Extent(NamedTuple):
    """Content as it lies on the volume; offset and length in bytes."""

    offset: int
    length: int


class StoredRange(NamedTuple):
    """A part of a file that is no hole, from `start` to `end`; `place` is where it begins on the volume, when known."""

    start: int
    end: int
    place: int | None


def stored_ranges(file: Any, wanted: tuple[int, ...], size: int, block_bytes: int) -> list[StoredRange]:
    """The parts of a file that are not holes; all of it where the library keeps no runs."""
    for attribute in file:
        info = attribute.info
        is_meant = (int(info.type), int(info.id)) == wanted if wanted else int(info.type) in _CONTENT_ATTRIBUTES
        if not is_meant or (
            not wanted and info.name and int(info.type) == DATA_ATTRIBUTE and bytes(info.name) != b"N/A"
        ):
            continue
        if not int(info.flags) & _NONRESIDENT_FLAG or int(info.flags) & _COMPRESSED_FLAG:
            break
        stored = []
        for run in attribute:
            start, end = int(run.offset) * block_bytes, (int(run.offset) + int(run.len)) * block_bytes
            if not int(run.flags) & _HOLE_FLAGS and start < size:
                stored.append(StoredRange(start, min(end, size), int(run.addr) * block_bytes))
        if all(one.end <= two.start for one, two in itertools.pairwise(stored)):
            return stored
        break
    return [StoredRange(0, size, None)] if size else []


def find_plain_end(file: Any, attribute: tuple[int, ...], ranges: Sequence[StoredRange], read: ReadVolume) -> int:
    """Up to which byte a file is what lies in its runs; 0 where that is not sure, or not worth asking.

    NTFS keeps how far a file has ever been written; the rest reads as zeros, whatever lies there. The library knows
    that, and does not say it: but a byte that it does not give as zero is before that end.
    """
    if sum(end - start for start, end, _ in ranges) < _EXTENTS_FROM_BYTES:
        return 0
    head, tail = ranges[0], ranges[-1]
    head_bytes, tail_bytes = (min(_PROBE_BYTES, end - start) for start, end, _ in (head, tail))
    last = bytes(file.read_random(tail.end - tail_bytes, tail_bytes, *attribute))
    written = len(last.rstrip(b"\0"))
    if not written or not _lies_at(tail, tail.end - tail_bytes, last, read):
        return 0
    first = bytes(file.read_random(head.start, head_bytes, *attribute))
    return tail.end - tail_bytes + written if _lies_at(head, head.start, first, read) else 0


def _lies_at(one: StoredRange, start: int, content: bytes, read: ReadVolume) -> bool:
    """Whether what the library gives for a part of a file is what lies there."""
    return one.place is not None and bool(content) and read(one.place + start - one.start, len(content)) == content


def exfat_written_bytes(read: ReadVolume, inode: int, sector_bytes: int, size: int) -> int:
    """How much of a file of exFAT was ever written: behind that it reads as zeros, which the library does not know.

    Its number for a file says where in the cluster heap the folder's entries for it are (exFAT specification, sections
    3.1.8, 6.3.3, 7.4 and 7.6). Not handled: an entry set that goes on in a cluster elsewhere.
    """
    (heap_sector,) = struct.unpack_from("<I", read(0, 512), 88)
    place = heap_sector * sector_bytes + (inode - _EXFAT_FIRST_INODE) * _EXFAT_ENTRY_BYTES
    entries = read(place, _EXFAT_ENTRIES_LIMIT * _EXFAT_ENTRY_BYTES)
    entries = entries[: (1 + entries[1]) * _EXFAT_ENTRY_BYTES] if len(entries) > 1 else b""
    total = 0
    for index, byte in enumerate(entries):
        if index not in (2, 3):
            total = ((total << 15 | total >> 1) + byte) & 0xFFFF
    if len(entries) <= 2 * _EXFAT_ENTRY_BYTES or total != int.from_bytes(entries[2:4], "little"):
        return size
    (written,) = struct.unpack_from("<Q", entries, _EXFAT_ENTRY_BYTES + 8)
    return min(int(written), size) if entries[_EXFAT_ENTRY_BYTES] == _EXFAT_STREAM else size
