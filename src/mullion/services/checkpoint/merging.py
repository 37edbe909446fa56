"""The merge of one layer into the one below it, as the keeper has it done: by a worker, or at once.

What a merge is, and why it may be repeated, says `mullion.vhd.layer_merge`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import MullionError, OperationFailedError
from mullion.services.checkpoint.layers import Merge
from mullion.services.checkpoint.merge_link import MergeWorker, check_complete
from mullion.services.partition.partition import Partition
from mullion.vhd.fileio import SYSTEM
from mullion.vhd.layer_journal import forget_layer_merge
from mullion.vhd.merge import merge
from mullion.vhd.relink import relink_frozen

log = logging.getLogger(__name__)

_LOOK_S: Final = 0.5


@dataclass(slots=True)
class MergeStatus:
    """How far a merge is."""

    state: str = "copying"
    done_bytes: int = 0
    total_bytes: int = 0
    bytes_per_s: int = 0


async def merge_layer(partition: Partition, _disk_id: str, act: Merge, status: MergeStatus, bytes_per_s: int) -> None:
    """Have a worker write the upper layer into the lower one, both frozen; durable when this returns.

    Cancelled, it lets go of the worker, which goes on; called again, also by the next parent, it goes on with that one.
    Raises: what refuses the layers; NoSpaceError; VhdError; OperationFailedError when the worker was killed.
    """
    worker = MergeWorker(partition.name, partition.runtime.paths, act.upper, act.lower)
    if await worker.adopt():
        with contextlib.suppress(MullionError):  # it has just ended: `wait` says how
            await worker.set_rate(bytes_per_s)
    else:
        surroundings = partition.surroundings
        await worker.start(
            surroundings.fleet,
            run_as=partition.record.run_as,
            bytes_per_s=bytes_per_s,
            inspect=surroundings.preparer.disks.inspect,
        )
    following = asyncio.create_task(_follow(worker, status), name=f"{partition.name}: merge's progress")
    try:
        result = await worker.wait()
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await worker.release()
    for note in result.notes:
        log.warning("%s: %s", partition.name, note)
    if not result.is_done:
        raise OperationFailedError(
            f"the merge of {act.upper} into {act.lower} was stopped",
            remedy="It goes on by itself in some seconds.",
        )


async def _follow(worker: MergeWorker, status: MergeStatus) -> None:
    while True:
        progress = await worker.status()
        if progress is not None:
            status.state = progress.state
            status.done_bytes, status.total_bytes = progress.done_bytes, progress.total_bytes
            status.bytes_per_s = progress.speed_bytes_per_s
        await asyncio.sleep(_LOOK_S)


def merge_now(upper: str, lower: str, pending_dir: str) -> None:
    """Write a head that nobody has open into its parent, and leave its file. Raises: as `merge`; ConflictError."""
    check_complete(upper, pending_dir)
    check_complete(lower, pending_dir)
    merge(upper, into_path=lower, keep=True)


def forget_merge(lower: str) -> None:
    """Remove what a finished merge has left beside the layer. May be repeated. Raises: OSError."""
    forget_layer_merge(lower, SYSTEM)


def relink(child: str, parent: str, pending_dir: str) -> None:
    """Put a frozen layer on another parent that holds the same. Raises: as `relink_frozen`; ConflictError."""
    check_complete(child, pending_dir)
    relink_frozen(child, parent)
