"""What must have been there: an image of a file that opening refuses, where the rest of the file proves it.

A structure whose checksum alone is wrong is believed when everything else says that it is right: two copies that are
the same; a header whose BAT has exactly as many entries as the disk needs, none of them impossible; a fixed disk's
footer whose size and geometry are those of the file. A footer with something behind it is believed when the disk ends
right before it. Nothing is guessed: what is believed differs from the file in a checksum or in nothing.

Invariants: nothing here writes or raises for what a file holds; every image that comes of a salvage has a finding whose
cure is `REPAIR`.
"""

from __future__ import annotations

import os
import struct
from array import array
from dataclasses import replace
from typing import Final

from mullion.base.units import MIB, SECTOR_BYTES
from mullion.vhd.findings import Finding, Kind
from mullion.vhd.geometry import Geometry
from mullion.vhd.image import Image, begin_image, load_structures
from mullion.vhd.layout import (
    ALL_ONES,
    FOOTER_BYTES,
    DiskType,
    DynamicHeader,
    Footer,
    LayoutError,
    checksum,
)
from mullion.vhd.structures import (
    FooterPair,
    FooterRead,
    choose_footer,
    read_footer,
    read_footers,
    read_header_bytes,
)
from mullion.vhd.zeros import data_end

SEARCH_BYTES: Final = MIB
"""How much of a file's end, and of what lies before a hole there, is searched for a footer."""


def examine(fd: int, path: str) -> Image | list[Finding]:
    """The image of an open regular file, repaired in thought where that can be done; else what is wrong with it."""
    pair = read_footers(fd, os.fstat(fd).st_size)
    chosen = choose_footer(pair)
    if isinstance(chosen, Finding):
        image = _with_checksum(fd, path, pair) or _with_buried_footer(fd, path, pair)
        return image if image is not None else [chosen]
    image = _begin(fd, path, pair, *chosen)
    problem = _load(image)
    if any(finding.kind is Kind.FOOTERS_DISAGREE for finding in image.findings):
        other = _other_reading(fd, path, pair, image, problem)
        if other is not None:
            return other
    return image if problem is None else [*image.findings, problem]


def _other_reading(fd: int, path: str, pair: FooterPair, image: Image, problem: Finding | None) -> Image | None:
    """A better reading of two valid footers that disagree than to believe the one at byte 0.

    Where that leads nowhere, the one at the end may do. Where it cuts off a block that has just the length of the file,
    what is at the end is the guest's data, and the footer is missing.
    """
    if problem is not None:
        other = _begin(fd, path, pair, pair.tail, list(image.findings[:1]))
        return other if _load(other) is None else None
    if not any(finding.kind is Kind.BLOCK_CUT for finding in image.findings):
        return None
    is_data = FooterRead(pair.tail.offset, pair.tail.raw, None, LayoutError("what is there belongs to a block", 0))
    read = FooterPair(pair.front, is_data, pair.file_bytes)
    chosen = choose_footer(read)
    assert not isinstance(chosen, Finding)
    other = _begin(fd, path, read, *chosen)
    is_whole = _load(other) is None and not any(finding.kind is Kind.BLOCK_CUT for finding in other.findings)
    return other if is_whole else None


def _begin(fd: int, path: str, pair: FooterPair, read: FooterRead, findings: list[Finding]) -> Image:
    image = begin_image(fd, path, pair, read, findings)
    image.kept_starts = array("I")  # what is examined is looked at more than once
    return image


def _load(image: Image) -> Finding | None:
    """Load the structures; a header whose checksum alone is wrong will do, when all else proves it right."""
    problem = load_structures(image)
    if problem is None or problem.kind is not Kind.HEADER_INVALID:
        return problem
    raw = read_header_bytes(image.fd, image.footer, image.blocks_end)
    assert raw is not None
    try:
        header = DynamicHeader.unpack(with_checksum(raw, DynamicHeader.CHECKSUM_OFFSET))
    except LayoutError:
        return problem
    trial = replace(image, findings=list(image.findings), metadata=list(image.metadata))
    if load_structures(trial, header) is not None or not _is_consistent(trial):
        return problem
    load_structures(image, header)
    what = f"{problem.what}; the BAT and the size of the disk prove it right"
    image.findings.append(Finding(Kind.HEADER_CHECKSUM, what, problem.offset))
    return None


def with_checksum(raw: bytes, field_offset: int) -> bytes:
    """The bytes of a structure with the checksum that they ought to have."""
    fixed = bytearray(raw)
    struct.pack_into(">I", fixed, field_offset, checksum(raw, field_offset))
    return bytes(fixed)


def _is_consistent(image: Image) -> bool:
    """Do footer, header and BAT agree to the last entry?"""
    return (
        image.header is not None
        and image.header.max_bat_entries == len(image.bat)
        and not any(finding.kind.keeps_from_writing for finding in image.findings)
    )


def _with_checksum(fd: int, path: str, pair: FooterPair) -> Image | None:
    """A file none of whose footers has a right checksum, one of which is right otherwise."""
    mended = FooterPair(_mended(pair.front), _mended(pair.tail), pair.file_bytes)
    chosen = choose_footer(mended)
    if isinstance(chosen, Finding):
        return None
    read, findings = chosen
    assert read.footer is not None
    image = _begin(fd, path, mended, read, findings)
    if (_load(image) if _are_same(pair) else load_structures(image)) is not None:
        return None
    if image.kind is DiskType.FIXED:
        is_proven = _fits_its_file(read.footer, read.offset)
    else:
        is_proven = _is_consistent(image) or _are_same(pair)
    if not is_proven:
        return None
    where = "both footers" if _are_same(pair) else "the footer"
    what = f"the checksum of {where} is wrong; everything else proves it right"
    image.findings.insert(0, Finding(Kind.FOOTER_CHECKSUM, what, read.offset + Footer.CHECKSUM_OFFSET))
    return image


def _mended(read: FooterRead) -> FooterRead:
    if read.footer is not None or not read.has_cookie or len(read.raw) < FOOTER_BYTES - 1:
        return read
    raw = with_checksum(read.raw.ljust(FOOTER_BYTES, b"\0"), Footer.CHECKSUM_OFFSET)
    try:
        return FooterRead(read.offset, raw, Footer.unpack(raw), None)
    except LayoutError as error:
        return FooterRead(read.offset, read.raw, None, error)


def _are_same(pair: FooterPair) -> bool:
    return pair.front.raw == pair.tail.raw


def _fits_its_file(footer: Footer, offset: int) -> bool:
    """Is this the footer of a fixed disk that ends right before it, with nothing odd in it?"""
    size = footer.current_size_bytes
    geometry = Geometry(footer.cylinders, footer.heads, footer.sectors_per_track)
    return (
        footer.disk_type is DiskType.FIXED
        and size == offset
        and footer.data_offset == ALL_ONES
        and footer.original_size_bytes % SECTOR_BYTES == 0
        and (geometry.size_bytes == 0 or geometry == Geometry.for_size(size) or geometry.size_bytes == size)
    )


def _with_buried_footer(fd: int, path: str, pair: FooterPair) -> Image | None:
    """A file with something behind its footer, which makes it the end of a disk no more."""
    for offset in _cookies(fd, pair.file_bytes):
        read = read_footer(fd, offset)
        if read.footer is None:
            continue
        found = FooterPair(pair.front, read, pair.file_bytes)
        findings: list[Finding] = []
        if read.footer.disk_type is DiskType.FIXED:
            if read.footer.current_size_bytes != offset:
                continue
        else:
            chosen = choose_footer(found)
            assert not isinstance(chosen, Finding)
            findings = chosen[1]
        image = _begin(fd, path, found, read, findings)
        if _load(image) is None:
            behind = pair.file_bytes - offset - FOOTER_BYTES
            what = f"{behind} bytes behind the footer belong to nothing: it must be the last of the file"
            image.findings.insert(0, Finding(Kind.FOOTER_BURIED, what, offset))
            return image
    return None


def _cookies(fd: int, file_bytes: int) -> list[int]:
    """Where in the last part of a file's data a sector begins as a footer does, last first; a few at most."""
    end = data_end(fd, file_bytes)  # a growth that was cut off leaves a hole of any length
    begin = max(0, (end - SEARCH_BYTES) // SECTOR_BYTES * SECTOR_BYTES)
    raw = os.pread(fd, min(file_bytes - begin, SEARCH_BYTES + SECTOR_BYTES), begin)
    found: list[int] = []
    at = len(raw)
    while len(found) < 16 and (at := raw.rfind(Footer.COOKIE, 0, at)) >= 0:
        if at % SECTOR_BYTES == 0 and begin + at > 0:
            found.append(begin + at)
    return found
