"""What is done to the disks of a partition while its guest uses them: a larger size, a newer provider.

The caller of both is an operation; each holds the partition's lock, so that nothing else is changed meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from mullion.base.errors import MullionError, NotFoundError, StateError
from mullion.hypervisor.errors import MonitorRefusedError
from mullion.model.definition import Transport
from mullion.provider.handover import HandOverError
from mullion.services.partition.partition import Partition

log = logging.getLogger(__name__)

_RESIZE_DEADLINE_S: Final = 120.0
_SEEN_DEADLINE_S: Final = 10.0
_SEEN_RETRY_S: Final = 0.1


async def resize_disk(partition: Partition, disk_id: str, size_bytes: int) -> Mapping[str, Any]:
    """Have a disk in use grow, and the guest see it; the operation's result.

    Raises: NotFoundError for a disk that the partition does not have; StateError when it has no provider; what the
    provider refuses.
    """
    async with partition.lock:
        disk = next((disk for disk in partition.runtime.disks if disk.id == disk_id), None)
        if disk is None:
            ids = ", ".join(disk.id for disk in partition.runtime.disks)
            raise NotFoundError(
                f"partition {partition.name} runs without a disk {disk_id!r}", remedy=f"Its disks: {ids or 'none'}."
            )
        answer = await partition.ask_provider(
            "resize", disk=disk_id, size_bytes=size_bytes, deadline_s=_RESIZE_DEADLINE_S
        )
        is_seen = answer["announced"]
        if disk.transport is Transport.NBD:
            is_seen = await _tell_qemu(partition, disk_id, size_bytes)
    return {
        "disk": disk_id,
        "old_bytes": answer["old_bytes"],
        "size_bytes": answer["size_bytes"],
        "stall_ms": answer["stall_ms"],
        "seen": is_seen,
        "note": "the guest sees the new size" if is_seen else "the guest sees the new size at its next start",
    }


async def _tell_qemu(partition: Partition, disk_id: str, size_bytes: int) -> bool:
    """QEMU asks an NBD server for the size when it connects again; then it is told to believe it (observed: 7.2)."""
    machine = partition.runtime.machine
    deadline_s = time.monotonic() + _SEEN_DEADLINE_S
    while machine is not None and time.monotonic() < deadline_s:
        try:
            await machine.execute("block_resize", {"node-name": f"disk-{disk_id}", "size": size_bytes})
        except MonitorRefusedError:  # it is not connected again yet
            await asyncio.sleep(_SEEN_RETRY_S)
        except MullionError:
            return False
        else:
            return True
    return False


async def upgrade_provider(partition: Partition, say: Callable[[str], None]) -> Mapping[str, Any]:
    """Replace the process that serves the disks by one of the code that is installed now; the operation's result.

    The old one hands over what it serves, and the guest's requests wait for milliseconds. When the new one does not
    take it, the old one goes on, and the operation fails. Where the old one cannot hand over (its code is older than
    that, or blocks are coming home) it ends as at a stop, with all that was written durable, and requests wait until
    QEMU has found the new one; when that cannot start, the reconciling goes on to try.
    Raises: StateError; what the new provider refuses.
    """
    async with partition.lock:
        runtime = partition.runtime
        before = runtime.provider
        if before is None:
            raise StateError(
                f"partition {partition.name} has no provider",
                state=partition.last_state.value,
                required="running",
                remedy="None is needed: the next start uses the code that is installed then.",
            )
        say("starting the new code")
        await partition.surroundings.fleet.renew()
        begun_s = time.monotonic()
        say("handing over to it")
        is_handed_over = True
        try:
            gap_ms = await partition.hand_over_provider()
        except MullionError as error:
            if error.code != HandOverError.code:
                raise
            log.info("%s: its provider is replaced: %s", partition.name, error)
            say("replacing the provider")
            is_handed_over = False
            await partition.replace_provider()
            gap_ms = (time.monotonic() - begun_s) * 1000
        after = runtime.provider
    return {
        "old_pid": before.pid,
        "pid": None if after is None else after.pid,
        "is_handed_over": is_handed_over,
        "gap_ms": None if gap_ms is None else round(gap_ms, 1),
    }
