"""What journals of merges have in common: ids and paths in their JSON, believed as little as a disk."""

from __future__ import annotations

import os
from typing import Final

_PATH_LIMIT: Final = 4096


def read_id(value: object) -> bytes:
    """An id of 16 bytes in hex. Raises: ValueError."""
    if not isinstance(value, str) or len(value) != 32:
        raise ValueError("an id is not 16 bytes")
    return bytes.fromhex(value)


def read_path(value: object, folder: str) -> str:
    """A path, relative to the journal's folder. Raises: ValueError."""
    if not isinstance(value, str) or not 0 < len(value) <= _PATH_LIMIT or "\0" in value:
        raise ValueError("a path is none")
    return os.path.normpath(os.path.join(folder, value))
