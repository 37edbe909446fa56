"""What one VHD file says about itself: every field, decoded, and how its blocks lie.

Works on any `Image`, also on one that `salvage` made of a damaged file. Field names are those of `mullion vhd info
--format json`, which docs/formats/vhd.md lists; they are stable.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass
from functools import reduce
from itertools import islice, repeat
from operator import add, or_, sub
from typing import Final

from mullion.base.units import MIB, SECTOR_BYTES, format_time
from mullion.vhd import bat as bat_table
from mullion.vhd.create import DATA_ALIGNMENT
from mullion.vhd.geometry import Geometry
from mullion.vhd.image import Image
from mullion.vhd.layout import EPOCH_S, DiskType
from mullion.vhd.locking import is_locked_for_writing, read_holder
from mullion.vhd.parents import read_locator
from mullion.vhd.pending import has_session

CREATORS: Final = {
    b"vpc ": "Microsoft Virtual PC",
    b"vs  ": "Microsoft Virtual Server",
    b"win ": "Windows or Hyper-V",
    b"qemu": "QEMU",
    b"qem2": "QEMU",
    b"d2v\0": "disk2vhd",
    b"tap\0": "XenServer (blktap)",
    b"CTXS": "Citrix XenConvert",
    b"vbox": "VirtualBox",
    b"dutl": "DiscUtils",
    b"xo  ": "Xen Orchestra",
    b"wa\0\0": "Windows Azure",
}
HOST_SYSTEMS: Final = {b"Wi2k": "Windows", b"Mac ": "Macintosh", bytes(4): "not said"}
CHS_SIZED_BY_QEMU: Final = (b"win ", b"qem2", b"d2v\0", b"CTXS", b"tap\0")
"""Creators from whose disks QEMU before 10.0 takes the current size, as everybody else does."""

_TEMPORARY: Final = 1
_MAX_ALIGNMENT: Final = MIB
_PIECE: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class LocatorFacts:
    """One parent locator: its fields, what it says, and what is wrong with that."""

    platform: str
    offset: int
    data_space: int
    data_length: int
    text: str | None
    complaint: str | None


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """The blocks of a dynamic or differencing disk."""

    block_bytes: int
    total: int
    allocated: int
    runs: int
    """Runs of blocks that follow each other on the disk and in the file: 1 is not fragmented at all."""
    data_alignment_bytes: int
    """The largest power of two, up to 1 MiB, at whose multiples the data of all blocks begins; 0 without blocks."""
    header_offset: int
    bat_offset: int
    bat_entries: int


@dataclass(frozen=True, slots=True)
class ParentFacts:
    """What a differencing disk says about its parent."""

    unique_id: str
    timestamp: str | None
    name: str | None
    locators: tuple[LocatorFacts, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """One file."""

    path: str
    type: str
    size_bytes: int
    chs_size_bytes: int
    original_size_bytes: int
    cylinders: int
    heads: int
    sectors_per_track: int
    qemu_size_bytes: int
    """The size that QEMU before 10.0 takes it for."""
    file_bytes: int
    stored_bytes: int
    """What the file takes on its file system: holes take nothing."""
    allocated_bytes: int
    unique_id: str
    created: str
    creator_application: str
    creator_name: str
    creator_version: str
    creator_host_os: str
    creator_host_os_name: str
    is_temporary: bool
    saved_state: bool
    footer_offset: int
    blocks: BlockFacts | None
    parent: ParentFacts | None
    holder: str | None
    """Who has it open for writing now."""
    was_killed: bool
    """Did the last writer of ours not end cleanly?"""


def describe(image: Image) -> Facts:
    """The facts of a file that is open. Raises: OSError."""
    footer = image.footer
    geometry = Geometry(footer.cylinders, footer.heads, footer.sectors_per_track)
    is_held = is_locked_for_writing(image.fd)
    creator = footer.creator_application
    return Facts(
        path=image.path,
        type=image.kind.word,
        size_bytes=image.size_bytes,
        chs_size_bytes=geometry.size_bytes,
        original_size_bytes=footer.original_size_bytes,
        cylinders=footer.cylinders,
        heads=footer.heads,
        sectors_per_track=footer.sectors_per_track,
        qemu_size_bytes=_qemu_size(image, geometry),
        file_bytes=image.file_bytes,
        stored_bytes=os.fstat(image.fd).st_blocks * 512,
        allocated_bytes=image.allocated_bytes,
        unique_id=footer.unique_id.hex(),
        created=_time(footer.timestamp),
        creator_application=_mark(creator),
        creator_name=CREATORS.get(creator, "unknown"),
        creator_version=f"{footer.creator_version >> 16}.{footer.creator_version & 0xFFFF}",
        creator_host_os=_mark(footer.creator_host_os),
        creator_host_os_name=HOST_SYSTEMS.get(footer.creator_host_os, "unknown"),
        is_temporary=bool(footer.features & _TEMPORARY),
        saved_state=bool(footer.saved_state),
        footer_offset=image.footer_offset,
        blocks=_blocks(image),
        parent=_parent(image),
        holder=(read_holder(image.fd) or "another process") if is_held else None,
        was_killed=has_session(image.fd) and not is_held,
    )


def _qemu_size(image: Image, geometry: Geometry) -> int:
    if image.footer.creator_application in CHS_SIZED_BY_QEMU or geometry.is_largest:
        return image.size_bytes
    return geometry.size_bytes


def _time(timestamp: int) -> str:
    return format_time((timestamp + EPOCH_S) * 1_000_000_000)


def _mark(raw: bytes) -> str:
    """Four bytes as text: what is not ASCII in hexadecimal."""
    text = raw.rstrip(b"\0").decode("ascii", "replace")
    return text if text.isprintable() and "\ufffd" not in text else raw.hex()


def _blocks(image: Image) -> BlockFacts | None:
    header = image.header
    if header is None:
        return None
    allocated = image.bat.count_allocated()
    return BlockFacts(
        block_bytes=header.block_bytes,
        total=len(image.bat),
        allocated=allocated,
        runs=allocated - _count_followers(image),
        data_alignment_bytes=_data_alignment(image) if allocated else 0,
        header_offset=image.footer.data_offset,
        bat_offset=header.bat_offset,
        bat_entries=header.max_bat_entries,
    )


def _count_followers(image: Image) -> int:
    """Blocks that lie right behind the one before them, but for a gap that aligns them; in pieces, to bound memory."""
    span = image.span_bytes // SECTOR_BYTES
    near = range(span, span + DATA_ALIGNMENT // SECTOR_BYTES)
    found = 0
    for index in range(0, len(image.bat), _PIECE):
        part = image.bat[index : index + _PIECE + 1]
        found += sum(map(near.__contains__, map(sub, islice(part, 1, None), part)))
    return found


def _data_alignment(image: Image) -> int:
    bitmap_sectors = image.bitmap_bytes // SECTOR_BYTES
    merged = 0
    for index in range(0, len(image.bat), _PIECE):
        part = image.bat[index : index + _PIECE]
        if part.count(bat_table.UNALLOCATED):
            part = array("I", [entry for entry in part if entry != bat_table.UNALLOCATED])
        merged = reduce(or_, map(add, part, repeat(bitmap_sectors)), merged)
    return min(_MAX_ALIGNMENT, (merged & -merged) * SECTOR_BYTES)


def _parent(image: Image) -> ParentFacts | None:
    header = image.header
    if header is None or image.kind is not DiskType.DIFFERENCING:
        return None
    locators = tuple(
        LocatorFacts(
            _mark(locator.platform),
            locator.data_offset,
            locator.data_space,
            locator.data_length,
            *read_locator(image, locator),
        )
        for locator in header.locators
        if locator.platform != bytes(4)
    )
    stamp = header.parent_timestamp
    return ParentFacts(header.parent_unique_id.hex(), _time(stamp) if stamp else None, header.parent_name, locators)
