"""A filesystem that is soon full. Needs root, as `make test` has it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

Folder = TypeVar("Folder", str, Path)


@contextlib.contextmanager
def small_filesystem(folder: Folder, size_bytes: int, mode: int = 0o1777) -> Iterator[Folder]:
    """A tmpfs on a folder that is made for it; at the end of the block nothing may be open there."""
    os.makedirs(folder)
    options = f"size={size_bytes},mode={mode:o}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
