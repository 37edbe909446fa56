"""The hash of a disk's content: what a guest would see, whatever kind of file it is in.

So a chain, its flattened copy and the raw disk have one hash. Holes are hashed without being read.
"""

from __future__ import annotations

import hashlib
from typing import Final

from mullion.base.block import BlockDevice, ExtentKind
from mullion.base.progress import Progress, no_progress
from mullion.base.units import GIB, KIB, MIB
from mullion.vhd.copying import read_source
from mullion.vhd.fileio import ZEROS

_BUFFER_BYTES: Final = 256 * KIB
"""Small enough to stay in a processor's cache between reading and hashing."""


def hash_content(source: BlockDevice, *, progress: Progress = no_progress) -> str:
    """SHA-256 of a disk's content, in hexadecimal. Hashing leaves the interpreter's lock to other threads.

    Raises: what reading the source raises.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    total = source.size_bytes
    report_at, step = 0, min(max(total // 200, 16 * MIB), GIB)
    for offset, length, kind in source.extents(0, total):
        at, end = offset, offset + length
        while at < end:
            if kind is ExtentKind.DATA:
                part = buffer[: min(len(buffer), end - at)]
                read_source(source, at, part)
            else:
                part = ZEROS[: min(len(ZEROS), end - at)]
            digest.update(part)
            at += len(part)
            if at >= report_at:
                progress("hashing", at, total)
                report_at = at + step
    return digest.hexdigest()
