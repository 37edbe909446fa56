"""The journal of ext3 and ext4 (JBD2), replayed in memory: what mounting the filesystem would write, nothing written.

Spec: Linux, Documentation/filesystems/ext4/journal.rst, and fs/jbd2/recovery.c for the order. All big-endian.

    block   0 magic 0xC03B3998 · 4 type · 8 sequence
    type 1  descriptor: from 12 on tags, each for one block of data that follows · 2  commit · 5  revoke
            3, 4  superblock: 12 block size · 16 blocks · 20 first · 24 sequence · 28 start · 40 incompatible features ·
            84 blocks of fast commits
    tag     0 block (4) · 4 checksum (2) · 6 flags (2) · [8 upper half of block (4)]    with checksums v3:
            0 block (4) · 4 flags (4) · 8 upper half of block (4) · 12 checksum (4)     then 16 of a UUID, unless flag 2

A transaction counts when its commit block is there with its sequence; the first one that does not ends the log. A block
that is revoked in a later transaction, or the same, is left as it is.

Invariants: every number is a foreign one: tags, blocks and steps are bounded, places are checked by whoever reads them.
Not handled: checksums (a disk of one instant has whole commits only, and what is read is never written back); fast
commits and journals on other devices, which are said.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

MAGIC: Final = 0xC03B3998
BLOCKS_LIMIT: Final = 1_000_000
"""As many as the largest journal that mke2fs makes has, four times over."""

_HEADER: Final = struct.Struct(">III")
_SUPERBLOCK: Final = struct.Struct(">IIIIII")
_DESCRIPTOR, _COMMIT, _SUPER_V1, _SUPER_V2, _REVOKE = 1, 2, 3, 4, 5
_64BIT, _CSUM_V2, _CSUM_V3, _FAST_COMMIT = 0x2, 0x8, 0x10, 0x20
_KNOWN: Final = 0x1 | _64BIT | 0x4 | _CSUM_V2 | _CSUM_V3 | _FAST_COMMIT
_ESCAPE, _SAME_UUID, _LAST = 1, 2, 8
_FAST_COMMIT_BLOCKS: Final = 256
"""Of a journal that does not say how many."""


class JournalError(Exception):
    """A journal that cannot be replayed, and why."""


class Place(NamedTuple):
    """Where the journal has the newer content of a block."""

    block: int
    """Of the journal."""
    is_escaped: bool
    """Its first four bytes are the journal's magic, and zeros in the journal."""


@dataclass(frozen=True, slots=True)
class Journal:
    """What a journal's superblock says, and how its blocks are read."""

    read: Callable[[int], bytes]
    block_bytes: int
    first: int
    end: int
    """Behind the last block of ordinary transactions."""
    sequence: int
    start: int
    features: int

    @property
    def tag_bytes(self) -> int:
        """As jbd2's `journal_tag_bytes`."""
        if self.features & _CSUM_V3:
            return 16
        return 8 + (2 if self.features & _CSUM_V2 else 0) + (4 if self.features & _64BIT else 0)

    def after(self, block: int, count: int = 1) -> int:
        """The block so many later; the log is a ring."""
        return self.first + (block - self.first + count) % (self.end - self.first)


@dataclass(slots=True)
class _Transaction:
    blocks: list[tuple[int, Place]] = field(default_factory=list)
    revoked: list[int] = field(default_factory=list)


def open_journal(read: Callable[[int], bytes], block_bytes: int) -> Journal | None:
    """The journal behind `read`, which gives its blocks; None when there is nothing to replay. Raises: JournalError."""
    raw = read(0)
    magic, kind, _ = _HEADER.unpack_from(raw)
    if magic != MAGIC or kind not in (_SUPER_V1, _SUPER_V2):
        raise JournalError("its superblock is none")
    size, blocks, first, sequence, start, _errno = _SUPERBLOCK.unpack_from(raw, 12)
    features = int.from_bytes(raw[40:44], "big") if kind == _SUPER_V2 else 0
    if not start:
        return None
    if features & ~_KNOWN:
        raise JournalError(f"it uses features that are not known: {features & ~_KNOWN:#x}")
    fast = 0
    if features & _FAST_COMMIT:
        fast = int.from_bytes(raw[84:88], "big") or _FAST_COMMIT_BLOCKS
    end = blocks - fast
    if size != block_bytes or not 0 < first < end <= BLOCKS_LIMIT or not first <= start < end:
        raise JournalError("its superblock says what cannot be")
    return Journal(read, block_bytes, first, end, sequence, start, features)


def find_newer(journal: Journal) -> dict[int, Place]:
    """Which blocks of the filesystem the journal has newer, and where. Raises: JournalError."""
    transactions = list(_transactions(journal))
    revoked: dict[int, int] = {}
    for number, transaction in enumerate(transactions):
        revoked |= dict.fromkeys(transaction.revoked, number)
    newer: dict[int, Place] = {}
    for number, transaction in enumerate(transactions):
        for block, place in transaction.blocks:
            if revoked.get(block, -1) < number:
                newer[block] = place
            else:
                newer.pop(block, None)
    return newer


def content(journal: Journal, place: Place) -> bytes:
    """The newer content of a block."""
    raw = journal.read(place.block)
    return MAGIC.to_bytes(4, "big") + raw[4:] if place.is_escaped else raw


def _transactions(journal: Journal) -> Iterator[_Transaction]:
    """Those that were committed, in order."""
    at, sequence, walked = journal.start, journal.sequence, 0
    found = _Transaction()
    while walked < journal.end - journal.first:  # never around the ring twice
        raw = journal.read(at)
        magic, kind, number = _HEADER.unpack_from(raw)
        if magic != MAGIC or number != sequence:
            return
        step = 1
        if kind == _DESCRIPTOR:
            tags = list(_tags(journal, raw))
            for offset, (block, flags) in enumerate(tags):
                found.blocks.append((block, Place(journal.after(at, 1 + offset), bool(flags & _ESCAPE))))
            step += len(tags)
        elif kind == _REVOKE:
            found.revoked += _revoked(journal, raw)
        elif kind == _COMMIT:
            yield found
            found = _Transaction()
            sequence = (sequence + 1) & 0xFFFFFFFF
        else:
            return
        at, walked = journal.after(at, step), walked + step


def _tags(journal: Journal, raw: bytes) -> Iterator[tuple[int, int]]:
    """Block and flags of each tag of a descriptor."""
    tail = 4 if journal.features & (_CSUM_V2 | _CSUM_V3) else 0
    at, width = _HEADER.size, journal.tag_bytes
    while at + width <= journal.block_bytes - tail:
        block = int.from_bytes(raw[at : at + 4], "big")
        if journal.features & _CSUM_V3:
            flags, upper = struct.unpack_from(">II", raw, at + 4)
        else:
            (flags,) = struct.unpack_from(">H", raw, at + 6)
            upper = int.from_bytes(raw[at + 8 : at + 12], "big") if journal.features & _64BIT else 0
        if journal.features & _64BIT:
            block |= upper << 32
        yield block, flags
        if flags & _LAST:
            return
        at += width + (0 if flags & _SAME_UUID else 16)


def _revoked(journal: Journal, raw: bytes) -> Iterator[int]:
    """The blocks that a revoke block names."""
    width = 8 if journal.features & _64BIT else 4
    used = min(int.from_bytes(raw[12:16], "big"), journal.block_bytes)
    for at in range(16, used - width + 1, width):
        yield int.from_bytes(raw[at : at + width], "big")
