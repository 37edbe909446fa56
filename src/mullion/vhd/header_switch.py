"""The dynamic disk header and the footer changed together, in one instant.

Spec: "Hard Disk Footer Format" (current size, data offset), "Dynamic Disk Header Format". The header is two sectors
under one checksum and has no copy, and what it says (the entries of the BAT) must fit what the footer says (the size).
Neither can be overwritten in place and stay whole. But one sector decides about both: the copy of the footer at byte 0
holds the size and says where the header is. So the new header is written where nothing is, the copy of the footer is
changed, and the header goes home by the same way:

    1  free room: what the new header points to, and the new header behind everything      fdatasync
    2  footer copy: new size, header there. From here on the disk is the new one           fdatasync
    3  the header at its own place, which nothing points to now                            fdatasync
    4  footer copy: header at its own place                                                fdatasync
    5  footer at the end, file cut behind it (`TopWriter.mend` does the same after a crash)

Durability: a crash before 2 leaves the old disk and orphan bytes, later the new one. From 1 to 5 there is no footer at
the end, because 1 overwrites it: the state that any crash of a writer leaves and the next writer mends. A crash between
2 and 4 leaves the header at the end of the file, which the format allows; the next change brings it home.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from mullion.base.units import MIB, SECTOR_BYTES
from mullion.vhd.file_end import write_end
from mullion.vhd.fileio import FileIO
from mullion.vhd.image import Image
from mullion.vhd.layout import FOOTER_BYTES, HEADER_BYTES, DynamicHeader, Footer
from mullion.vhd.offline import reload

HOME: Final = FOOTER_BYTES
"""Where everybody has the header."""

Piece = tuple[int, bytes]
"""Offset in the file, bytes."""


def switch_header(
    image: Image, footer: Footer, header: DynamicHeader, file_io: FileIO, *, pieces: Sequence[Piece] = ()
) -> None:
    """Make the disk what the footer and the header say. `pieces` go to room that is free before and used after.

    The file is open for writing, locked, mended, and has nothing pending. `image` describes it afterwards; after an
    error it must be loaded anew. The footer's data offset is set here. Raises: OSError.
    """
    assert image.header is not None
    away = _sector_up(max([image.footer_offset, *(offset + len(raw) for offset, raw in pieces)]))
    try:
        _write_unseen(image, header, away, pieces, file_io)
    except OSError:
        with contextlib.suppress(OSError):  # the old end again; the first error is the one to tell
            file_io.write_all(image.fd, [image.footer_raw], image.footer_offset)
            file_io.ftruncate(image.fd, image.footer_offset + FOOTER_BYTES)
        raise
    _write_copy(image, replace(footer, data_offset=away), file_io)
    if is_home_free(image, header, pieces):
        file_io.write_all(image.fd, [header.pack()], HOME)
        file_io.sync_file(image.fd)
        _write_copy(image, replace(footer, data_offset=HOME), file_io)
    reload(image)
    end_file(image, file_io)


def _write_unseen(image: Image, header: DynamicHeader, away: int, pieces: Sequence[Piece], file_io: FileIO) -> None:
    """Everything that nothing points to yet, durably."""
    for offset, raw in pieces:
        for at in range(0, len(raw), MIB):
            file_io.write_all(image.fd, [raw[at : at + MIB]], offset + at)
    # Zeros behind it, so that nothing of the header can pass for a footer at the end of the file.
    file_io.write_all(image.fd, [header.pack(), bytes(FOOTER_BYTES)], away)
    file_io.sync_file(image.fd)


def end_file(image: Image, file_io: FileIO) -> None:
    """Put the footer right behind what is in use, and end the file there."""
    write_end(image, image.data_end(), file_io)
    reload(image)


def is_away(image: Image) -> bool:
    """Is the header where a change that was cut off left it, and could it go home?"""
    header = image.header
    return header is not None and image.footer.data_offset != HOME and is_home_free(image, header, ())


def is_home_free(image: Image, header: DynamicHeader, pieces: Iterable[Piece]) -> bool:
    """May the header lie at its usual place? True as well when that is where it is."""
    at = image.footer.data_offset
    taken = [(start, end) for start, end in image.metadata if (start, end) != (at, at + HEADER_BYTES)]
    taken += [(offset, offset + len(raw)) for offset, raw in pieces]
    taken += [(header.bat_offset, header.bat_offset + 1)]
    is_block_in_way = min(image.bat) * SECTOR_BYTES < HOME + HEADER_BYTES
    return not is_block_in_way and all(end <= HOME or start >= HOME + HEADER_BYTES for start, end in taken)


def _write_copy(image: Image, footer: Footer, file_io: FileIO) -> None:
    file_io.write_all(image.fd, [footer.pack()], 0)
    file_io.sync_file(image.fd)


def _sector_up(offset: int) -> int:
    return -(-offset // SECTOR_BYTES) * SECTOR_BYTES
