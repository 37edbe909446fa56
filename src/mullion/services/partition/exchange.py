"""The chains of a partition's disks while it runs, and what the record says of them.

The record says which file is a disk's head; the provider serves a chain; `run.json` tells a new parent and a new
provider what that is. Order of every change: files → record → provider → `run.json`. So whoever finds them apart
follows the record, with one exception: a head of no bytes was merged into its parent by the provider, which cannot
write the record, and the parent is the head then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from mullion.base.errors import UnavailableError
from mullion.services.partition.record import DiskLayers
from mullion.services.partition.run_file import PreparedDisk, write_run

if TYPE_CHECKING:
    from mullion.services.partition.partition import Partition


@dataclass(frozen=True, slots=True)
class Exchange:
    """A disk's chain from now on. `new` are the files of it that the provider does not have open yet."""

    id: str
    chain: tuple[str, ...]
    new: tuple[str, ...] = ()
    set_parent: bool = False
    collapse: bool = False
    limit_bytes: int | None = None


async def exchange_chains(partition: Partition, exchanges: Sequence[Exchange]) -> Mapping[str, Any]:
    """Have the provider exchange chains, all of them at one instant; its answer. The caller holds the partition's lock.

    Raises: UnavailableError when there is no provider; what the provider refuses, and then nothing has changed.
    """
    link = partition.runtime.link
    if link is None:
        raise UnavailableError(f"partition {partition.name} has no provider that could be asked")
    if (why := await awaited_backup(partition)) is not None:
        raise UnavailableError(
            f"partition {partition.name}: its disks cannot be held while requests wait for their backup: {why}",
            remedy="Mend the way to the backup repository, then try again.",
        )
    fds: list[int] = []
    try:
        for one in exchanges:
            fds += await asyncio.to_thread(_open_files, one.new, partition.record.run_as)
        answer = await link.request("switch", fds=fds, disks=[_wire(one) for one in exchanges])
    finally:
        for fd in fds:
            os.close(fd)
    note_chains(partition, {one.id: one.chain for one in exchanges})
    return answer


async def awaited_backup(partition: Partition) -> str | None:
    """Why requests wait for a block that only a backup has, and keep their disk from being held; None when none does.

    Raises: UnavailableError when the provider cannot be asked.
    """
    link = partition.runtime.link
    if link is None or not partition.record.coming_home:
        return None
    backings = [disk["backing"] for disk in (await link.request("status"))["disks"]]
    return next((str(one["reason"]) for one in backings if one is not None and one["is_waited_for"]), None)


def _wire(one: Exchange) -> dict[str, object]:
    fields: dict[str, object] = {"id": one.id, "chain": list(one.chain), "new": list(one.new)}
    if one.set_parent:
        fields["set_parent"] = True
    if one.collapse:
        fields["collapse"] = True
        fields["limit_bytes"] = one.limit_bytes
    return fields


def _open_files(paths: Sequence[str], run_as: tuple[int, int] | None) -> list[int]:
    """Descriptors to write to, of files that are the partition's from now on."""
    fds: list[int] = []
    try:
        for path in paths:
            fds.append(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC))
            if run_as is not None:
                os.fchown(fds[-1], *run_as)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def note_chains(partition: Partition, chains: Mapping[str, tuple[str, ...]]) -> None:
    """Keep what is served now; files that are not written any more are the service's again."""
    runtime = partition.runtime
    run = runtime.started_with
    if run is None:
        return
    disks = tuple(_with_chain(disk, chains.get(disk.id, disk.chain)) for disk in run.disks)
    runtime.started_with = msgspec.structs.replace(run, disks=disks)
    write_run(runtime.paths, runtime.started_with)
    for before, now in zip(run.disks, disks, strict=True):
        if before.chain[0] != now.chain[0]:
            give_back(before.chain[0], partition.record.run_as)


def give_back(path: str, run_as: tuple[int, int] | None) -> None:
    """A file that the partition does not write any more is the service's."""
    if run_as is not None:
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(path).st_uid == run_as[0]:
                os.chown(path, os.geteuid(), os.getegid(), follow_symlinks=False)


def _with_chain(disk: PreparedDisk, chain: tuple[str, ...]) -> PreparedDisk:
    return msgspec.structs.replace(disk, chain=chain)


async def follow_heads(partition: Partition) -> None:
    """Before a provider is started: the chains are those of the record's heads, as the files themselves name them.

    A provider that was killed may have put a head on another parent without anybody having heard of it. The caller
    holds the lock. Raises: what `Preparer.find_chain` raises.
    """
    await take_merged_heads(partition)
    heads = partition.record.heads
    run = partition.runtime.started_with
    if run is None:
        return
    preparer = partition.surroundings.preparer
    chains = {
        disk.id: await asyncio.to_thread(preparer.find_chain, partition.name, heads[disk.id])
        for disk in run.disks
        if disk.id in heads and not disk.read_only
    }
    if any(disk.chain != chains.get(disk.id, disk.chain) for disk in run.disks):
        note_chains(partition, chains)


async def take_merged_heads(partition: Partition) -> None:
    """Where the provider has merged a head into its parent, which it says by emptying it: the parent is the head."""
    layers = {disk: merged_away(found) for disk, found in partition.record.layers.items()}
    if layers != partition.record.layers:
        await partition.save(layers=layers)


def merged_away(layers: DiskLayers) -> DiskLayers:
    """The layers without a head of no bytes."""
    parent = layers.parents.get(layers.head)
    try:
        is_empty = os.path.getsize(layers.head) == 0
    except FileNotFoundError:
        return layers
    if not is_empty or parent is None:
        return layers
    return msgspec.structs.replace(layers, head=parent)
