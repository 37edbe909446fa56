"""The disk that somebody named, whatever its format: a VHD with its parents by the engine.

Invariant: what is written is a VHD, whose engine knows how to write it safely.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from mullion.base.block import BlockDevice
from mullion.vhd import open_chain


def open_disk(
    path: str, *, read_only: bool, purpose: str, allowed_dirs: Sequence[str] | None = None
) -> tuple[BlockDevice, list[str]]:
    """Open a disk and say what is odd about it. `purpose` is shown to whoever finds the disk busy.

    Raises: what `open_chain` raises.
    """
    holder = f"mullion {purpose} (pid {os.getpid()})"
    chain = open_chain(path, read_only=read_only, allowed_dirs=allowed_dirs, holder=holder)
    return chain, chain.warnings
