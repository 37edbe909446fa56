"""New children over a partition's disks: the step from which checkpoints, their application and merges are made.

    1  the record knows the children, as files that nobody needs yet
    2  the files are made, empty and durable
    3  the record names them as heads: the commit point
    4  the provider, where there is one, switches to them

A crash before 3 leaves files that `plan_layers` drops; after 3 the next parent does 4 (`settle`). An empty child reads
as its parent does, so following the record is right in either case.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from mullion.base.errors import MullionError, UnavailableError
from mullion.parent.store import Condition
from mullion.parent.store.protocol import Write
from mullion.services.checkpoint.layers import chain_of, with_child
from mullion.services.partition.exchange import Exchange, exchange_chains, take_merged_heads
from mullion.services.partition.partition import Partition
from mullion.services.partition.record import DiskLayers
from mullion.services.partition.saving import unstamp
from mullion.vhd import create_differencing
from mullion.vhd.storage import storage_explained

log = logging.getLogger(__name__)


def layers_of(partition: Partition, disk_id: str) -> DiskLayers:
    """The layers of a disk, also of one that has no checkpoint yet."""
    known = partition.record.layers.get(disk_id)
    if known is not None:
        return known
    disk = next(disk for disk in partition.record.definition.disks if disk.id == disk_id)
    path = partition.surroundings.preparer.disks.resolve(disk.path)
    return DiskLayers(path, {path: None})


def is_served(partition: Partition) -> bool:
    """Whether a provider has the disks open."""
    return partition.runtime.provider is not None


async def note_children(
    partition: Partition,
    parents: Mapping[str, str],
    *,
    writes: Sequence[Write] = (),
    conditions: Sequence[Condition] = (),
) -> dict[str, str]:
    """Step 1: names for a child over one file of each disk; the children by disk. The caller holds the lock."""
    layers = dict(partition.record.layers)
    children: dict[str, str] = {}
    for disk_id, parent in parents.items():
        known = layers_of(partition, disk_id)
        children[disk_id] = _child_path(known)
        layers[disk_id] = with_child(known, children[disk_id], parent)
    await partition.save(layers=layers, writes=writes, conditions=conditions)
    return children


async def make_children(children: Mapping[str, str], parents: Mapping[str, str]) -> None:
    """Step 2. Raises: NoSpaceError, AlreadyExistsError, VhdError, OSError; what was made is dropped later."""
    for disk_id, child in children.items():
        with storage_explained(child):
            await asyncio.to_thread(create_differencing, child, parents[disk_id], lock_parent=False)


async def add_children(partition: Partition, parents: Mapping[str, str]) -> dict[str, str]:
    """Steps 1 and 2."""
    children = await note_children(partition, parents)
    await make_children(children, parents)
    return children


def _child_path(layers: DiskLayers) -> str:
    """Beside the definition's file: on the same filesystem, found by whoever looks there."""
    base = next(path for path, parent in layers.parents.items() if parent is None)
    return f"{os.path.splitext(base)[0]}-{secrets.token_hex(4)}.avhd"


async def commit_children(partition: Partition, children: Mapping[str, str], **changes: Any) -> int:
    """Step 3; its revision. `changes` are other fields of the record, and writes, that come with it."""
    layers = dict(partition.record.layers)
    for disk_id, child in children.items():
        layers[disk_id] = msgspec.structs.replace(layers[disk_id], head=child)
    return await partition.save(layers=layers, **changes)


async def switch_to_heads(partition: Partition, disk_ids: Sequence[str]) -> Mapping[str, Any]:
    """Step 4 for disks whose head is a new child. Raises: as `exchange_chains`."""
    served = {disk.id: disk.chain for disk in partition.runtime.disks}
    exchanges = []
    for disk_id in disk_ids:
        head = partition.record.layers[disk_id].head
        exchanges.append(Exchange(disk_id, (head, *served[disk_id]), (head,)))
    return await exchange_chains(partition, exchanges)


async def put_on_top(partition: Partition, disk_id: str) -> None:
    """All steps for one disk: its head is frozen. Raises: as `make_children` and `freeze_heads`."""
    children = await add_children(partition, {disk_id: layers_of(partition, disk_id).head})
    await freeze_heads(partition, children)


async def freeze_heads(
    partition: Partition,
    children: Mapping[str, str],
    *,
    on_commit: Callable[[int], None] = lambda _revision: None,
    **changes: Any,
) -> float:
    """Steps 3 and 4; milliseconds for which requests waited. When the provider refuses, the heads are as before.

    `changes` come with step 3, and `on_commit` hears its revision. Raises: what the provider refuses.
    """
    before = {disk: partition.record.layers[disk].head for disk in children}
    if not is_served(partition):
        await unstamp(partition)
    on_commit(await commit_children(partition, children, **changes))
    if not is_served(partition):
        return 0.0
    try:
        answer = await switch_to_heads(partition, list(children))
    except MullionError as error:
        if not await _serves(partition, before):
            # It has switched, or is gone: then the next one is started with the new heads.
            log.warning("%s: the provider's answer to a switch was lost: %s", partition.name, error)
            return 0.0
        layers = dict(partition.record.layers)
        for disk_id, head in before.items():
            layers[disk_id] = msgspec.structs.replace(layers[disk_id], head=head)
        await partition.save(layers=layers)  # the children are files that nobody needs, again
        raise
    return float(answer.get("stall_ms", 0.0))


async def _serves(partition: Partition, heads: Mapping[str, str]) -> bool:
    """Whether a provider that can be asked serves these heads."""
    served = await served_chains(partition)
    return served is not None and all(served.get(disk, ("",))[0] == head for disk, head in heads.items())


async def served_chains(partition: Partition) -> dict[str, tuple[str, ...]] | None:
    """What the provider says it serves; None when it cannot be asked."""
    link = partition.runtime.link
    if link is None:
        return None
    try:
        status = await link.request("status")
    except MullionError:
        return None
    return {disk["id"]: tuple(disk["chain"]) for disk in status.get("disks", ())}


async def settle(partition: Partition) -> None:
    """Have the provider serve the record's heads, where a parent died between record and provider.

    The caller holds the partition's lock. Raises: UnavailableError when the provider cannot be asked.
    """
    await take_merged_heads(partition)
    if not is_served(partition) or not partition.record.layers:
        return
    served = await served_chains(partition)
    if served is None:
        raise UnavailableError(f"the provider of partition {partition.name} cannot be asked which disks it serves")
    exchanges = []
    for disk_id, layers in partition.record.layers.items():
        chain = served.get(disk_id)
        if chain is None or chain[0] == layers.head:
            continue
        ours = chain_of(layers, layers.head)
        base = ours[-1]
        below = chain[chain.index(base) + 1 :] if base in chain else ()
        new = tuple(path for path in ours if path not in chain)
        exchanges.append(Exchange(disk_id, (*ours, *below), new))
    if exchanges:
        log.warning("%s: the provider did not serve the newest heads: switched now", partition.name)
        await exchange_chains(partition, exchanges)
