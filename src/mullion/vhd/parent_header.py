"""Another parent for a differencing disk: its id, its name and its locators written anew, in one instant.

The header is switched as `header_switch` describes; the new names are its pieces. Names that are in use are never
overwritten: new ones go into the room between header and BAT when the old ones are not there, else behind the last
block. So a disk whose parent changes often does not grow.
"""

from __future__ import annotations

import os
from dataclasses import replace

from mullion.base.units import SECTOR_BYTES
from mullion.vhd import bat as bat_table
from mullion.vhd.create import LOCATOR_OFFSET, name_parent, parent_name
from mullion.vhd.fileio import FileIO
from mullion.vhd.header_switch import switch_header
from mullion.vhd.image import Image
from mullion.vhd.layout import FOOTER_BYTES, MAX_LOCATOR_BYTES
from mullion.vhd.parents import note_parent, real_path, trust_folder


def set_parent(child: Image, parent_path: str, parent_id: bytes, file_io: FileIO) -> None:
    """Name another parent in a differencing disk; its content is not looked at.

    The child is open for writing, locked, mended, and has nothing pending; `child` describes it afterwards, and after
    an error must be loaded anew. Raises: InvalidError when the path cannot be written into a VHD; OSError, after which
    the child has its old parent or the new one.
    """
    assert child.header is not None
    parent = os.path.realpath(parent_path)
    folder = os.path.dirname(real_path(child.fd))
    texts, locators, names_end = name_parent(parent, folder, LOCATOR_OFFSET)
    if not _has_room(child, names_end):
        behind = -(-child.data_end() // SECTOR_BYTES) * SECTOR_BYTES
        texts, locators, _ = name_parent(parent, folder, behind)
    header = replace(
        child.header,
        parent_unique_id=parent_id,
        parent_timestamp=0,  # see create_differencing
        parent_name_raw=parent_name(parent),
        locators=locators,
    )
    switch_header(child, child.footer, header, file_io, pieces=texts)
    trust_folder(child.fd, os.path.dirname(parent))
    note_parent(child.fd, parent)


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
