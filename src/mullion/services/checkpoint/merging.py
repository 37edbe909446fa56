"""The merge of one layer into the one below it, as the keeper has it done: by a worker, or at once.

What a merge is, and why it may be repeated, says `mullion.vhd.layer_merge`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import MullionError, OperationFailedError, UnavailableError
from mullion.services.checkpoint.layers import Merge
from mullion.services.checkpoint.merge_link import MergeWorker, check_complete
from mullion.services.partition.partition import Partition
from mullion.vhd.fileio import SYSTEM
from mullion.vhd.inspection import ChainInfo
from mullion.vhd.layer_journal import forget_layer_merge
from mullion.vhd.layout import DiskType
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
    """Measured, since the rate was set."""
    limit_bytes_per_s: int | None = None
    """The rate that the worker keeps, 0 for none; None while there is no worker that says it."""
    worker: MergeWorker | None = None


async def merge_layer(
    partition: Partition, _disk_id: str, act: Merge, status: MergeStatus, rate: Callable[[], int]
) -> None:
    """Have a worker write the upper layer into the lower one, both frozen; durable when this returns.

    `rate` says how fast it may be at any time, in bytes a second; 0 is without a limit. Cancelled, it lets go of the
    worker, which goes on; called again, also by the next parent, it goes on with that one.
    Raises: what refuses the layers; NoSpaceError; VhdError; OperationFailedError when the worker was killed.
    """
    worker = MergeWorker(partition.name, partition.runtime.paths, act.upper, act.lower)
    if await worker.adopt():
        with contextlib.suppress(MullionError):  # it has just ended: `wait` says how
            await worker.set_rate(rate())
    else:
        surroundings = partition.surroundings
        await worker.start(
            surroundings.fleet,
            run_as=partition.record.run_as,
            bytes_per_s=rate(),
            inspect=surroundings.preparer.disks.inspect,
        )
    status.worker = worker
    following = asyncio.create_task(_follow(worker, status, rate), name=f"{partition.name}: merge's progress")
    try:
        result = await worker.wait()
    finally:
        status.worker = status.limit_bytes_per_s = None
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


async def follow_rate(status: MergeStatus, rate: int) -> None:
    """Have a merge that is going on keep another rate, at once; nothing where none is going on."""
    if status.worker is None:
        return
    with contextlib.suppress(UnavailableError):  # it has just ended
        await status.worker.set_rate(rate)
        status.limit_bytes_per_s = rate


async def _follow(worker: MergeWorker, status: MergeStatus, rate: Callable[[], int]) -> None:
    """Keep the status up to date, and the worker's rate, which may have changed while it was started."""
    told = ""
    while True:
        try:
            await _look(worker, status, rate)
        except Exception as error:  # the root of this task: it must go on for as long as the merge does
            if repr(error) != told:
                log.exception("a merge is not followed, and looked at again")
            told = repr(error)
        await asyncio.sleep(_LOOK_S)


async def _look(worker: MergeWorker, status: MergeStatus, rate: Callable[[], int]) -> None:
    progress = await worker.status()
    if progress is None:
        return
    status.limit_bytes_per_s = progress.bytes_per_s
    if progress.bytes_per_s != rate():
        await follow_rate(status, rate())
    status.state = progress.state
    status.done_bytes, status.total_bytes = progress.done_bytes, progress.total_bytes
    status.bytes_per_s = progress.speed_bytes_per_s


def merge_now(upper: str, lower: str, pending_dir: str) -> None:
    """Write a head that nobody has open into its parent, and leave its file. Raises: as `merge`; ConflictError."""
    check_complete(upper, pending_dir)
    check_complete(lower, pending_dir)
    merge(upper, into_path=lower, keep=True)


def grows_fixed(chain: ChainInfo) -> bool:
    """Would the merge of a head into its parent make a fixed disk larger?"""
    head, parent = chain.files[:2]
    return parent.type is DiskType.FIXED and head.size_bytes > parent.size_bytes


def forget_merge(lower: str) -> None:
    """Remove what a finished merge has left beside the layer. May be repeated. Raises: OSError."""
    forget_layer_merge(lower, SYSTEM)


def relink(child: str, parent: str, pending_dir: str) -> None:
    """Put a frozen layer on another parent that holds the same. Raises: as `relink_frozen`; ConflictError."""
    check_complete(child, pending_dir)
    relink_frozen(child, parent)
