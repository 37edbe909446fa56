"""Making broken VHDs: change a field, put the checksum right again."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from mullion.base.units import KIB
from mullion.vhd import create_differencing, create_dynamic, create_fixed, open_chain
from mullion.vhd.layout import checksum

BLOCK_BYTES = 16 * KIB
SIZE_BYTES = 10 * BLOCK_BYTES
HEADER = 512
BAT = 1536


def make(folder: Path, kind: str) -> str:
    """A small disk of this kind with three blocks written; a child lies over `parent.vhd`."""
    path = str(folder / f"{kind}.vhd")
    if kind == "fixed":
        create_fixed(path, SIZE_BYTES)
    elif kind == "dynamic":
        create_dynamic(path, SIZE_BYTES, block_bytes=BLOCK_BYTES)
    else:
        parent = str(folder / "parent.vhd")
        create_dynamic(parent, SIZE_BYTES, block_bytes=BLOCK_BYTES)
        write(parent, b"p")
        create_differencing(path, parent)
    write(path, b"x")
    return path


def write(path: str, letter: bytes) -> None:
    with open_chain(path) as chain:
        for block in (0, 4, 9):
            chain.pwrite(block * BLOCK_BYTES + 1024, letter * 4096)


def patch(path: str, offset: int, content: bytes) -> None:
    """Overwrite bytes; a negative offset counts from the end."""
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        file.write(content)


def peek(path: str, offset: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        return file.read(length)


def set_footer(path: str, field_offset: int, content: bytes) -> None:
    """Change a field of the footer, and of its copy where there is one, with good checksums."""
    for at in (0, -512):
        if peek(path, at, 8) == b"conectix":
            patch(path, at + field_offset, content)
            patch(path, at + 64, struct.pack(">I", checksum(peek(path, at, 512), 64)))


def set_header(path: str, field_offset: int, content: bytes) -> None:
    """Change a field of the dynamic disk header, with a good checksum."""
    patch(path, HEADER + field_offset, content)
    patch(path, HEADER + 36, struct.pack(">I", checksum(peek(path, HEADER, 1024), 36)))


def bat_offset(path: str) -> int:
    return int.from_bytes(peek(path, HEADER + 16, 8), "big")


def set_entry(path: str, block: int, sector: int) -> None:
    patch(path, bat_offset(path) + 4 * block, struct.pack(">I", sector))


def entry(path: str, block: int) -> int:
    return int.from_bytes(peek(path, bat_offset(path) + 4 * block, 4), "big")
