"""Ending a disk's file: the footer right behind what is in use.

Durability: the footer that is there stays until the new one is durable; then the file is cut. Where there is no footer
at the end its copy at byte 0 stands in meanwhile.

On a full file system the footer's new place may be a hole that cannot be filled. So what lies behind the data, and
belongs to nothing, is given back first: that frees what an interrupted write had put there.
"""

from __future__ import annotations

from mullion.vhd.create import footer_place
from mullion.vhd.fileio import FileIO
from mullion.vhd.image import Image
from mullion.vhd.layout import FOOTER_BYTES
from mullion.vhd.storage import is_full


def write_end(image: Image, end: int, file_io: FileIO) -> None:
    """Put the footer behind data that ends at byte `end`, and end the file there, durably.

    Raises: OSError. When the file system is full all up to `end` is as before, and so is a footer at the end; where
    there was none the file ends at `end`.
    """
    place = footer_place(end)
    try:
        file_io.write_all(image.fd, [image.footer_raw], place)
    except OSError as error:
        if not is_full(error):
            raise
        if image.has_tail:
            file_io.discard(image.fd, end, image.footer_offset - end)
        else:
            file_io.ftruncate(image.fd, end)
            image.footer_offset = image.file_bytes = end
        file_io.write_all(image.fd, [image.footer_raw], place)
    file_io.sync_file(image.fd)
    file_io.ftruncate(image.fd, place + FOOTER_BYTES)
    file_io.sync_file(image.fd)
    image.footer_offset, image.file_bytes, image.has_tail = place, place + FOOTER_BYTES, True
