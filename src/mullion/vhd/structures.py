"""Reading and judging each structure of a VHD by itself: what is there, or the finding that says why it is not.

Nothing here raises for what a file holds, so that opening and `check` share every judgement: opening turns a finding
into an error, `check` looks further.

Invariants: nothing here writes; memory is bounded by `bat.MAX_BAT_BYTES`, never by a number in the file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from mullion.base.units import SECTOR_BYTES
from mullion.vhd import bat as bat_table
from mullion.vhd.bat import Bat
from mullion.vhd.findings import Finding, Kind
from mullion.vhd.formats import identify
from mullion.vhd.geometry import Geometry
from mullion.vhd.layout import (
    FOOTER_BYTES,
    HEADER_BYTES,
    MAX_LOCATOR_BYTES,
    OLD_FOOTER_BYTES,
    DiskType,
    DynamicHeader,
    Footer,
    LayoutError,
)

_BATMAP_COOKIE: Final = b"tdbatmap"


@dataclass(frozen=True, slots=True)
class FooterRead:
    """A place where a footer should be: what lies there, and the footer or why it is none."""

    offset: int
    raw: bytes
    footer: Footer | None
    error: LayoutError | None

    @property
    def has_cookie(self) -> bool:
        return self.raw[:8] == Footer.COOKIE


@dataclass(frozen=True, slots=True)
class FooterPair:
    """The footer's copy at byte 0 and the footer at the end."""

    front: FooterRead
    tail: FooterRead
    file_bytes: int


def read_footer(fd: int, offset: int, length: int = FOOTER_BYTES) -> FooterRead:
    """What is at that place, taken as a footer."""
    raw = os.pread(fd, length, offset)
    try:
        return FooterRead(offset, raw, Footer.unpack(raw), None)
    except LayoutError as error:
        return FooterRead(offset, raw, None, error)


def read_footers(fd: int, file_bytes: int) -> FooterPair:
    """Both places; at the end also a footer of 511 bytes, where there is none of 512."""
    front = read_footer(fd, 0)
    tail = read_footer(fd, max(0, file_bytes - FOOTER_BYTES))
    if tail.footer is None and file_bytes >= OLD_FOOTER_BYTES:
        old = read_footer(fd, file_bytes - OLD_FOOTER_BYTES, OLD_FOOTER_BYTES)
        if old.footer is not None or (old.has_cookie and not tail.has_cookie):
            tail = old
    return FooterPair(front, tail, file_bytes)


def choose_footer(pair: FooterPair) -> tuple[FooterRead, list[Finding]] | Finding:
    """Which of the two to believe, and what is to be said about the other; a finding when neither will do.

    The copy at byte 0 wins where two valid ones of a dynamic disk disagree: what stands at the end of a damaged file
    may be the guest's data, the first sector of a dynamic disk never is. In a fixed disk it is the other way round.
    """
    front, tail = pair.front, pair.tail
    if tail.footer is not None and tail.footer.disk_type is DiskType.FIXED:
        return tail, []
    if front.footer is not None and front.footer.disk_type is not DiskType.FIXED:
        if tail.footer is None:
            return front, [
                Finding(
                    Kind.FOOTER_MISSING,
                    f"the footer at the end is missing or damaged: {tail.error}",
                    tail.offset,
                )
            ]
        if tail.raw.ljust(FOOTER_BYTES, b"\0") != front.raw:
            what = f"the footer at byte {tail.offset} and its copy at byte 0 disagree"
            return front, [Finding(Kind.FOOTERS_DISAGREE, what, tail.offset)]
        return front, []
    if tail.footer is not None:
        what = f"the copy of the footer at byte 0 is damaged: {front.error or 'it says fixed'}"
        return tail, [Finding(Kind.FOOTER_COPY_BAD, what, 0)]
    return _neither(pair)


def _neither(pair: FooterPair) -> Finding:
    """Tell what is wrong with a file that has no footer that holds: a broken VHD, another format, or anything else."""
    for read in (pair.tail, pair.front):
        if read.error is not None and read.has_cookie:
            at = read.offset + read.error.field_offset
            return Finding(Kind.FOOTER_INVALID, f"no valid footer: {read.error} (byte {at})", at, _LOOK)
    if pair.front.footer is not None:
        what = "no valid footer: the one at byte 0 says fixed, and none is at the end (byte 0)"
        return Finding(Kind.FOOTER_INVALID, what, 0)
    mark = identify(pair.front.raw)
    what = f"is {mark.title}, not a VHD" if mark else "is not a VHD: it has no footer at its end nor at byte 0"
    return Finding(Kind.NOT_VHD, what, pair.tail.offset, _CONVERT)


_LOOK: Final = "See whether it can be mended: mullion vhd check {path}"
_CONVERT: Final = (
    "Choose a VHD file; another format becomes one by: mullion vhd convert {path} NEW.vhd; "
    "whether it was a VHD and can be mended says: mullion vhd check {path}"
)


def judge_fixed(footer: Footer, footer_offset: int) -> Finding | None:
    """Does the file of a fixed disk hold what its footer says?"""
    if footer.current_size_bytes > footer_offset:
        return Finding(
            Kind.SIZE_TOO_LARGE,
            f"the footer says {footer.current_size_bytes} bytes, but only {footer_offset} are in the file",
            footer_offset + 48,
        )
    if footer.current_size_bytes < footer_offset:
        unused = footer_offset - footer.current_size_bytes
        what = f"{unused} bytes between the data and the footer"
        return Finding(Kind.GAP_BEFORE_FOOTER, what, footer.current_size_bytes)
    return None


def read_header(fd: int, footer: Footer, footer_offset: int, end: int) -> DynamicHeader | Finding:
    """The dynamic disk header that a footer points to; it lies before `end`, the tail footer or the file's end."""
    at = footer.data_offset
    raw = read_header_bytes(fd, footer, end)
    if raw is None:
        return Finding(
            Kind.HEADER_MISPLACED,
            f"the dynamic disk header should be at byte {at}, which is outside the file or misplaced",
            footer_offset + 16,
            _NO_HEADER,
        )
    try:
        return DynamicHeader.unpack(raw)
    except LayoutError as error:
        what = f"dynamic disk header at byte {at}: {error}"
        return Finding(Kind.HEADER_INVALID, what, at + error.field_offset, _NO_HEADER)


_NO_HEADER: Final = "Restore the file from a backup: without its header the blocks cannot be found."


def read_header_bytes(fd: int, footer: Footer, end: int) -> bytes | None:
    """The 1024 bytes where the header should be; None where it cannot be."""
    at = footer.data_offset
    raw = os.pread(fd, HEADER_BYTES, at) if at + HEADER_BYTES <= end else b""
    return None if len(raw) != HEADER_BYTES or at % SECTOR_BYTES or at < FOOTER_BYTES else raw


def read_bat(fd: int, header: DynamicHeader, footer: Footer, end: int) -> Bat | Finding:
    """All entries of the BAT, those past the end of the disk as well.

    It lies before `end`, the tail footer or the file's end, and apart from the header: what is written into one of them
    must not change another.
    """
    size_bytes = footer.current_size_bytes
    needed = -(-size_bytes // header.block_bytes)
    entries = header.max_bat_entries

    def finding(kind: Kind, what: str) -> Finding:
        return Finding(kind, f"BAT at byte {header.bat_offset}: {what}", header.bat_offset)

    if entries < needed:
        return finding(
            Kind.BAT_TOO_SMALL,
            f"{entries} entries of {header.block_bytes} bytes do not cover the disk's {size_bytes} bytes",
        )
    entries_end = header.bat_offset + entries * bat_table.ENTRY_BYTES
    if header.bat_offset < FOOTER_BYTES or entries_end > end:
        return finding(
            Kind.BAT_OUTSIDE, f"its {entries} entries reach beyond byte {end}, where what they may take ends"
        )
    if header.bat_offset < footer.data_offset + HEADER_BYTES and footer.data_offset < entries_end:
        return finding(Kind.BAT_OUTSIDE, f"it lies over the dynamic disk header at byte {footer.data_offset}")
    if entries > bat_table.MAX_BAT_ENTRIES:
        return finding(Kind.BAT_TOO_LARGE, f"{entries} entries are more than the supported {bat_table.MAX_BAT_ENTRIES}")
    table = bat_table.load(fd, header.bat_offset, entries)
    return finding(Kind.BAT_UNREADABLE, "it could not be read whole") if table is None else table


def bat_end(header: DynamicHeader) -> int:
    """Where the BAT ends, with its padding."""
    return header.bat_offset + -(-header.max_bat_entries * bat_table.ENTRY_BYTES // SECTOR_BYTES) * SECTOR_BYTES


def locator_ranges(header: DynamicHeader, file_bytes: int) -> tuple[list[tuple[int, int]], int]:
    """What the locators' texts take of the file, and where the room ends that they claim beyond their text.

    Windows claims 64 KiB for a path of 34 bytes and keeps the room free; others put blocks behind the text.
    """
    ranges: list[tuple[int, int]] = []
    claimed_end = 0
    for locator in header.locators:
        space = locator.space_bytes
        used = -(-min(space or 0, locator.data_length) // SECTOR_BYTES) * SECTOR_BYTES
        inside = locator.data_offset + used <= file_bytes
        if locator.platform != bytes(4) and 0 < used <= MAX_LOCATOR_BYTES and inside:
            ranges.append((locator.data_offset, locator.data_offset + used))
            end = locator.data_offset + min(space or 0, MAX_LOCATOR_BYTES)
            if end <= file_bytes:
                claimed_end = max(claimed_end, end)
    return ranges, claimed_end


def batmap_ranges(fd: int, at: int, file_bytes: int) -> list[tuple[int, int]]:
    """XenServer keeps a batmap behind the BAT; we never use it, but must not put a block over it.

    Observed: cookie `tdbatmap`, then u64 offset, u32 size in sectors.
    """
    raw = os.pread(fd, 24, at)
    if raw[:8] != _BATMAP_COOKIE or len(raw) != 24:
        return []
    offset, sectors = int.from_bytes(raw[8:16], "big"), int.from_bytes(raw[16:20], "big")
    ranges = [(at, at + SECTOR_BYTES)]
    if offset + sectors * SECTOR_BYTES <= file_bytes:
        ranges.append((offset, offset + sectors * SECTOR_BYTES))
    return ranges


def footer_oddities(footer: Footer, offset: int, length: int) -> list[Finding]:
    """Harmless deviations of a footer that lies there in `length` bytes."""
    found: list[Finding] = []
    if not footer.has_reserved_feature:
        found.append(Finding(Kind.RESERVED_FEATURE, "the reserved feature bit is clear", offset + 8))
    if footer.saved_state:
        what = "the footer says that a saved state belongs to the disk"
        found.append(Finding(Kind.SAVED_STATE, what, offset + 84))
    if Geometry(footer.cylinders, footer.heads, footer.sectors_per_track).size_bytes == 0:
        found.append(Finding(Kind.GEOMETRY_ZERO, "the geometry is zero", offset + 56))
    if length == OLD_FOOTER_BYTES:
        what = "the footer has 511 bytes, as Virtual PC wrote it before 2004"
        found.append(Finding(Kind.FOOTER_SHORT, what, offset))
    return found
