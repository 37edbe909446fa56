"""The merge of one layer into the one below it, as the keeper has it done: by a worker, or at once.

What a merge is, and why it may be repeated, says `mullion.vhd.layer_merge`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from mullion.services.checkpoint.layers import Merge
from mullion.services.partition.partition import Partition
from mullion.vhd.fileio import SYSTEM
from mullion.vhd.layer_journal import forget_layer_merge
from mullion.vhd.layer_merge import LayerFiles
from mullion.vhd.layer_merge import merge_layer as merge_files
from mullion.vhd.merge import merge
from mullion.vhd.pacing import Pace
from mullion.vhd.relink import relink_frozen


@dataclass(slots=True)
class MergeStatus:
    """How far a merge is."""

    state: str = "copying"
    done_bytes: int = 0
    total_bytes: int = 0
    bytes_per_s: int = 0

    def note(self, _what: str, done: int, total: int) -> None:
        self.done_bytes, self.total_bytes = done, total


async def merge_layer(_partition: Partition, _disk_id: str, act: Merge, status: MergeStatus, bytes_per_s: int) -> None:
    """Write the upper layer into the lower one, both frozen; durable when this returns.

    Raises: NoSpaceError; VhdError; OperationFailedError.
    """
    pace = Pace(bytes_per_s)
    status.bytes_per_s = bytes_per_s

    def work() -> None:
        with LayerFiles.open(act.upper, act.lower) as files:
            merge_files(files, pace=pace, progress=status.note)

    working = asyncio.create_task(asyncio.to_thread(work))
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        pace.stop()
        await asyncio.gather(working, return_exceptions=True)
        raise


def merge_now(upper: str, lower: str) -> None:
    """Write a head that nobody has open into its parent, and leave its file. Raises: as `merge`."""
    merge(upper, into_path=lower, keep=True)


def forget_merge(lower: str) -> None:
    """Remove what a finished merge has left beside the layer. May be repeated. Raises: OSError."""
    forget_layer_merge(lower, SYSTEM)


def relink(child: str, parent: str) -> None:
    """Put a frozen layer on another parent that holds the same. Raises: as `relink_frozen`."""
    relink_frozen(child, parent)
