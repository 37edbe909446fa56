"""New disks: whole under their name, or not there.

Layout of what is written, the way Windows 8 and later do it: block data begins at multiples of 4 KiB, the sector bitmap
right before it, the footer in the last sector before a multiple of 4 KiB.

    fixed         data, footer
    dynamic       footer copy, header 512, BAT 1536, footer
    differencing  footer copy, header 512, locator texts 2048, BAT, footer

Creator application is `win `, host OS `Wi2k`. The field tells readers how to find the size rather than who wrote the
file: QEMU before 10.0 takes the size from the CHS geometry, which can hold few sizes exactly, unless the creator is one
of five marks, of which `win ` is the one whose layout this is. All other readers take the current size anyway.

Durability: that of `publish`, unless the caller says that he syncs himself (`durable=False`).
"""

from __future__ import annotations

import os
import time
import uuid
from itertools import repeat
from typing import Final

from mullion.base.errors import InvalidError
from mullion.base.units import GIB, KIB, MIB, SECTOR_BYTES, format_size
from mullion.vhd.bat import ENTRY_BYTES, MAX_BAT_BYTES
from mullion.vhd.fileio import SYSTEM
from mullion.vhd.geometry import Geometry
from mullion.vhd.image import load_image, open_file
from mullion.vhd.layer_journal import check_whole
from mullion.vhd.layout import (
    ALL_ONES,
    EPOCH_S,
    FOOTER_BYTES,
    HEADER_BYTES,
    MAX_BLOCK_BYTES,
    MIN_BLOCK_BYTES,
    DiskType,
    DynamicHeader,
    Footer,
    ParentLocator,
)
from mullion.vhd.locking import lock_file
from mullion.vhd.parents import note_parent, trust_folder
from mullion.vhd.publish import new_file

MAX_SIZE_BYTES: Final = 2040 * GIB
DEFAULT_BLOCK_BYTES: Final = 2 * MIB
DATA_ALIGNMENT: Final = 4 * KIB

_CREATOR: Final = b"win "
_CREATOR_VERSION: Final = 0x000A_0000
_HOST_OS: Final = b"Wi2k"
_BLANK: Final = b"\xff" * (64 * KIB)
HEADER_OFFSET: Final = FOOTER_BYTES
BODY_OFFSET: Final = HEADER_OFFSET + HEADER_BYTES
"""Where a new dynamic disk has its BAT."""
LOCATOR_OFFSET: Final = 2048
"""Where a new child has the texts of its parent locators; the BAT follows."""


def footer_place(end: int) -> int:
    """Where the footer goes behind data that ends at `end`: the last sector before a multiple of 4 KiB."""
    return _round_up(end + FOOTER_BYTES, DATA_ALIGNMENT) - FOOTER_BYTES


def create_fixed(path: str, size_bytes: int, *, preallocate: bool = False, durable: bool = True) -> None:
    """Create a fixed disk of exactly this size; sparse, unless room is to be allocated at once.

    Raises: InvalidError for a size that is not a multiple of 512 up to 2040 GiB; AlreadyExistsError; OSError.
    """
    footer = new_footer(DiskType.FIXED, size_bytes, ALL_ONES)
    with new_file(path, durable=durable) as fd:
        if preallocate:
            os.posix_fallocate(fd, 0, size_bytes + FOOTER_BYTES)
        os.ftruncate(fd, size_bytes + FOOTER_BYTES)
        SYSTEM.write_all(fd, [footer.pack()], size_bytes)


def create_dynamic(path: str, size_bytes: int, *, block_bytes: int = DEFAULT_BLOCK_BYTES, durable: bool = True) -> None:
    """Create an empty dynamic disk of exactly this size.

    Raises: InvalidError for an impossible size or block size; AlreadyExistsError; OSError.
    """
    footer = new_footer(DiskType.DYNAMIC, size_bytes, HEADER_OFFSET)
    entries = count_blocks(size_bytes, block_bytes)
    header = DynamicHeader(BODY_OFFSET, entries, block_bytes)
    with new_file(path, durable=durable) as fd:
        _write_sparse(fd, footer, header, [])


def create_differencing(
    path: str,
    parent_path: str,
    *,
    size_bytes: int | None = None,
    block_bytes: int | None = None,
    durable: bool = True,
    lock_parent: bool = True,
) -> None:
    """Create an empty child of a disk. Size and block size are the parent's, if not given.

    `lock_parent=False` is for a parent that its writer is about to freeze: only its id and its sizes are read.

    Raises: InvalidError; AlreadyExistsError; NotFoundError and VhdError for what is wrong with the parent;
    DiskBusyError when somebody writes to it; OSError.
    """
    parent_fd = open_file(parent_path)
    try:
        if lock_parent:
            lock_file(parent_fd, parent_path, for_writing=False)  # a disk that changes is no parent
        parent = load_image(parent_fd, parent_path)
        check_whole(parent, None)
        parent_real = os.readlink(f"/proc/self/fd/{parent_fd}")
    finally:
        os.close(parent_fd)
    size_bytes = parent.size_bytes if size_bytes is None else size_bytes
    if block_bytes is None:
        block_bytes = parent.block_bytes if parent.header else DEFAULT_BLOCK_BYTES
    folder = os.path.realpath(os.path.dirname(path) or ".")
    footer = new_footer(DiskType.DIFFERENCING, size_bytes, HEADER_OFFSET)
    texts, locators, body = name_parent(parent_real, folder, LOCATOR_OFFSET)
    header = DynamicHeader(
        body,
        count_blocks(size_bytes, block_bytes),
        block_bytes,
        parent.footer.unique_id,
        0,  # as Windows 10 does: the file's modification time changes with every copy
        parent_name(parent_real),
        locators,
    )
    with new_file(path, durable=durable) as fd:
        _write_sparse(fd, footer, header, texts)
        trust_folder(fd, os.path.dirname(parent_real))
        note_parent(fd, parent_real)


def new_footer(kind: DiskType, size_bytes: int, data_offset: int) -> Footer:
    """The footer of a new disk, with an id of its own. Raises: InvalidError for an impossible size."""
    if size_bytes <= 0 or size_bytes % SECTOR_BYTES or size_bytes > MAX_SIZE_BYTES:
        raise InvalidError(
            f"a VHD cannot have {size_bytes} bytes",
            remedy=f"Give a multiple of 512 bytes, at most {MAX_SIZE_BYTES // GIB} GiB.",
            size_bytes=size_bytes,
        )
    geometry = Geometry.for_size(size_bytes)
    return Footer(
        features=2,
        data_offset=data_offset,
        timestamp=max(0, int(time.time()) - EPOCH_S),
        creator_application=_CREATOR,
        creator_version=_CREATOR_VERSION,
        creator_host_os=_HOST_OS,
        original_size_bytes=size_bytes,
        current_size_bytes=size_bytes,
        cylinders=geometry.cylinders,
        heads=geometry.heads,
        sectors_per_track=geometry.sectors_per_track,
        disk_type=kind,
        unique_id=uuid.uuid4().bytes,
    )


def count_blocks(size_bytes: int, block_bytes: int) -> int:
    """Exactly as many as the size needs. Raises: InvalidError for an impossible block size, or too many."""
    if not MIN_BLOCK_BYTES <= block_bytes <= MAX_BLOCK_BYTES or block_bytes & (block_bytes - 1):
        raise InvalidError(
            f"a block cannot have {block_bytes} bytes",
            remedy="Give a power of two from 512 bytes to 256 MiB; Windows knows 512 KiB and 2 MiB.",
            block_bytes=block_bytes,
        )
    blocks = -(-size_bytes // block_bytes)
    if blocks * ENTRY_BYTES > MAX_BAT_BYTES:
        raise InvalidError(
            f"{format_size(size_bytes)} in blocks of {format_size(block_bytes)} make {blocks} blocks",
            remedy=f"Choose larger blocks: at most {MAX_BAT_BYTES // ENTRY_BYTES} are supported.",
            block_bytes=block_bytes,
        )
    return blocks


def name_parent(
    parent: str, folder: str, offset: int
) -> tuple[list[tuple[int, bytes]], tuple[ParentLocator, ...], int]:
    """The texts with their places from `offset` on, the locators that point to them, and where their room ends.

    `parent` is an absolute path, `folder` the child's. Raises: InvalidError when the path cannot be written into a VHD.
    """
    relative = os.path.relpath(parent, folder)
    if not relative.startswith(".."):
        relative = f"./{relative}"
    texts: list[tuple[int, bytes]] = []
    locators: list[ParentLocator] = []
    for platform, path in ((b"W2ru", relative), (b"W2ku", parent)):
        raw = _encode(path, "utf-16-le")
        space = _round_up(len(raw), SECTOR_BYTES)
        locators.append(ParentLocator(platform, space, len(raw), offset))
        texts.append((offset, raw))
        offset += space
    return texts, tuple(locators), offset


def parent_name(parent: str) -> bytes:
    """The header's field of that name. Raises: InvalidError."""
    raw = _encode(os.path.basename(parent), "utf-16-be")
    if len(raw) > 510:
        raise InvalidError(
            f"the parent's name is too long for a VHD: {os.path.basename(parent)}",
            remedy="Rename the parent to at most 255 characters.",
        )
    return raw


def _encode(path: str, encoding: str) -> bytes:
    try:
        if "\\" in path:
            raise ValueError
        return path.replace("/", "\\").encode(encoding)
    except ValueError:
        raise InvalidError(
            f"the parent's path cannot be written into a VHD: {path!r}",
            remedy="Rename it: the path must be valid Unicode and without backslashes.",
        ) from None


def _write_sparse(fd: int, footer: Footer, header: DynamicHeader, texts: list[tuple[int, bytes]]) -> None:
    raw_footer = footer.pack()
    bat_bytes = _round_up(header.max_bat_entries * ENTRY_BYTES, SECTOR_BYTES)
    end = footer_place(header.bat_offset + bat_bytes)
    SYSTEM.write_all(fd, [raw_footer, header.pack()], 0)
    for offset, raw in texts:
        SYSTEM.write_all(fd, [raw], offset)
    whole, rest = divmod(bat_bytes, len(_BLANK))
    SYSTEM.write_all(fd, [*repeat(_BLANK, whole), _BLANK[:rest]], header.bat_offset)
    SYSTEM.write_all(fd, [raw_footer], end)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
