"""The line between the confined reader of a filesystem and the process that has the disk.

A frame is one letter, the length of what follows (4 bytes), and that. Integers are little-endian.

    from the disk's side       C  a command, JSON · D  bytes that were asked for
    from the reader's side     R  asks for bytes of the volume: offset 8, length 4 · J  an entry, JSON · B  content
                               Z  so many zeros of content: length 8
                               X  content that lies so on the volume: offset 8, length 8
                               E  the end of an answer, JSON: empty, or an error · H  once: confined and ready
                               N  a note for people, before everything else: UTF-8

One command at a time. The service and its clients use the same frames for what they pass on (C, J, B, Z, N and E).
"""

from __future__ import annotations

import os
import struct
from typing import Final

HEAD: Final = struct.Struct("<cI")
READ: Final = struct.Struct("<QI")
HOLE_BYTES: Final = struct.Struct("<Q")
EXTENT_PLACE: Final = struct.Struct("<QQ")
FRAME_LIMIT_BYTES: Final = 4 << 20
READ_LIMIT_BYTES: Final = 1 << 20

_SMALL_BYTES: Final = 16 << 10

COMMAND: Final = b"C"
DATA: Final = b"D"
WANT: Final = b"R"
ENTRY: Final = b"J"
CONTENT: Final = b"B"
HOLE: Final = b"Z"
EXTENT: Final = b"X"
END: Final = b"E"
READY: Final = b"H"
NOTE: Final = b"N"


def send(fd: int, kind: bytes, payload: bytes = b"") -> None:
    """Send a whole frame. Raises: OSError."""
    head = HEAD.pack(kind, len(payload))
    if len(payload) <= _SMALL_BYTES:
        _write(fd, head + payload)
    else:  # a second call is cheaper than a copy
        _write(fd, head)
        _write(fd, payload)


def _write(fd: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(fd, left) :]


def receive_exactly(fd: int, count: int) -> bytes:
    """So many bytes; fewer only when the other side has closed. Raises: OSError."""
    parts, left = [], count
    while left:
        part = os.read(fd, left)
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
