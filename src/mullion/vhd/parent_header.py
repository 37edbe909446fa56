"""Another parent for a differencing disk: the dynamic disk header written anew, whole at every instant.

The header is two sectors under one checksum and has no copy, so it is never overwritten while something points to it.
What points to it is the footer's copy at byte 0: one sector, and the one that readers believe. So the new header is
written elsewhere, the copy of the footer is pointed there, and then the same once more to bring the header home:

    1  behind the last block, over the footer: the new header; names where no others are   fdatasync
    2  footer copy -> the header there; from here on the disk has its new parent           fdatasync
    3  the header at its old place, which nothing points to now                            fdatasync
    4  footer copy -> its old place                                                        fdatasync
    5  the footer at the end, and what lies behind it given back                           fdatasync

Durability: a crash before 2 leaves the old parent, one after 2 the new one. Until 5 the file has no footer at its end,
which is what any writer's crash leaves and the next opening for writing mends. A crash between 2 and 4 leaves the
header behind the blocks for good, which the format allows.

Invariants: names that are in use are never overwritten: new ones go into the room between header and BAT when the old
ones are not there, else behind the last block.
"""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from typing import Final

from mullion.base.units import SECTOR_BYTES
from mullion.vhd import bat as bat_table
from mullion.vhd.create import LOCATOR_OFFSET, name_parent, parent_name
from mullion.vhd.fileio import FileIO
from mullion.vhd.image import Image, load_image
from mullion.vhd.layout import FOOTER_BYTES, HEADER_BYTES, MAX_LOCATOR_BYTES, Footer, checksum
from mullion.vhd.parents import real_path, trust_folder
from mullion.vhd.top import TopWriter

_DATA_OFFSET_FIELD: Final = 16


def set_parent(child: Image, parent_path: str, parent_id: bytes, file_io: FileIO) -> Image:
    """Name another parent in a differencing disk; its content is not looked at.

    The child is open for writing, locked, and was mended by `recovery.open_top`. Returns the child as it is then, on
    the same descriptor. Raises: InvalidError when the path cannot be written into a VHD; OSError, after which the child
    has its old parent or the new one.
    """
    assert child.header is not None
    parent = os.path.realpath(parent_path)
    folder = os.path.dirname(real_path(child.fd))
    end = _round_up(child.data_end())
    texts, locators, names_end = name_parent(parent, folder, LOCATOR_OFFSET)
    if not _has_room(child, names_end):
        texts, locators, end = name_parent(parent, folder, end)
    header = replace(
        child.header,
        parent_unique_id=parent_id,
        parent_timestamp=0,  # see create_differencing
        parent_name_raw=parent_name(parent),
        locators=locators,
    ).pack()
    home = child.footer.data_offset
    _write_header(child, header, end, file_io)
    for offset, raw in texts:
        file_io.write_all(child.fd, [raw], offset)
    file_io.fdatasync(child.fd)
    _point_to(child, end, file_io)
    file_io.write_all(child.fd, [header], home)
    file_io.fdatasync(child.fd)
    _point_to(child, home, file_io)
    changed = load_image(child.fd, child.path)
    TopWriter(changed, file_io, None).mend()
    trust_folder(child.fd, os.path.dirname(parent))
    return changed


def _write_header(child: Image, header: bytes, place: int, file_io: FileIO) -> None:
    """Put the header behind everything, and no footer behind it: two that disagree would need a repair."""
    footer = child.footer_offset // SECTOR_BYTES * SECTOR_BYTES
    header_end = place + HEADER_BYTES
    file_io.write_all(child.fd, [header], place)
    for begin, end in ((footer, place), (max(footer, header_end), _round_up(child.file_bytes))):
        if begin < end:
            file_io.write_all(child.fd, [bytes(end - begin)], begin)


def _point_to(child: Image, place: int, file_io: FileIO) -> None:
    raw = bytearray(child.footer_raw)
    struct.pack_into(">Q", raw, _DATA_OFFSET_FIELD, place)
    struct.pack_into(">I", raw, Footer.CHECKSUM_OFFSET, checksum(bytes(raw), Footer.CHECKSUM_OFFSET))
    file_io.write_all(child.fd, [raw], 0)
    file_io.fdatasync(child.fd)


def _has_room(child: Image, names_end: int) -> bool:
    """Is nothing between the header at its usual place and the BAT, and do the new names fit there?"""
    assert child.header is not None
    bat_offset = child.header.bat_offset
    if child.footer.data_offset != FOOTER_BYTES or names_end > bat_offset:
        return False
    starts = bat_table.allocated_starts(child.bat)
    if starts and starts[0] * SECTOR_BYTES < bat_offset:
        return False
    claims = [
        (locator.data_offset, locator.data_offset + min(locator.space_bytes or 0, MAX_LOCATOR_BYTES))
        for locator in child.header.locators
        if locator.platform != bytes(4)
    ]
    return not any(begin < names_end and end > LOCATOR_OFFSET for begin, end in [*claims, *child.metadata])


def _round_up(offset: int) -> int:
    return -(-offset // SECTOR_BYTES) * SECTOR_BYTES
