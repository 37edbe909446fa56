"""The layers of one partition's disks: what nobody needs any more is dropped or merged, while the partition runs.

    wake ─► for each disk: plan (`layers`) ─► act ─► plan again ─► nothing to do: sleep

A merge into the layer below goes on in a worker process while the partition runs; its steps are in the record, so the
next parent goes on where this one ended. The head is never merged while it is written: a child is put on top first, and
what comes together in that one meanwhile is merged next, until little is left. That little is the provider's own to
merge, in one short pause (`collapse`).

Invariants: the partition's lock is held while anything but the copying is done. Every step may be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from mullion.base.errors import MullionError
from mullion.base.files import sync_folder
from mullion.base.units import MIB, format_size
from mullion.model.views import MergeView
from mullion.parent.events import Events
from mullion.parent.operations import Operation
from mullion.parent.store import Condition
from mullion.parent.store.protocol import Write
from mullion.services.checkpoint.branching import is_served, put_on_top, served_chains, settle
from mullion.services.checkpoint.layers import (
    Drop,
    Merge,
    begin_merge,
    children_of,
    end_copy,
    end_merge,
    plan_layers,
    without,
)
from mullion.services.checkpoint.merging import (
    MergeStatus,
    follow_rate,
    forget_merge,
    grows_fixed,
    merge_layer,
    merge_now,
    relink,
)
from mullion.services.checkpoint.record import CheckpointRecord
from mullion.services.partition.exchange import Exchange, exchange_chains
from mullion.services.partition.partition import Partition
from mullion.services.partition.record import DiskLayers
from mullion.services.partition.saving import unstamp

log = logging.getLogger(__name__)

COLLAPSE_BYTES: Final = 4 * MIB
"""So much of a head may be merged while the guest's requests wait."""
_COLLAPSE_LIMIT_BYTES: Final = 256 * MIB
_PATIENCE: Final = 3
"""After so many layers that did not get smaller more may be merged in the pause: twice as much each time."""
_RETRY_S: Final = 10.0
_FOLLOW_S: Final = 0.2

MovePins = Callable[[str, str], tuple[list[Condition], list[Write], list[CheckpointRecord]]]


@dataclass(slots=True)
class MergeSlots:
    """How many merges of a host go on at the same time, and how fast each may be unless its partition says so."""

    slots: asyncio.Semaphore
    bytes_per_s: int


@dataclass(slots=True)
class _Work:
    """What is going on with a disk."""

    merge: Merge
    status: MergeStatus = field(default_factory=MergeStatus)
    reason: str | None = None


class LayerKeeper:
    """The task that keeps a partition's layers as few as its checkpoints need."""

    def __init__(
        self,
        partition: Partition,
        *,
        pinned: Callable[[], Collection[str]],
        in_use: Callable[[], Collection[str]],
        move_pins: MovePins,
        keep: Callable[[CheckpointRecord, int], None],
        slots: MergeSlots,
        events: Events,
    ) -> None:
        self.partition = partition
        self._pinned = pinned
        self._in_use = in_use
        self._move_pins = move_pins
        self._keep = keep
        self._slots = slots
        self._events = events
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._work: dict[str, _Work] = {}
        self._limits: dict[str, int] = {}
        self._last_held: dict[str, int] = {}
        self._attempts: dict[str, int] = {}
        self._trouble: str | None = None
        self._task: asyncio.Task[None] | None = None

    # -- life ----------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"layers of {self.partition.name}")

    def wake(self) -> None:
        """Something has changed: look what is to be done."""
        self._idle.clear()
        self._wake.set()

    async def close(self) -> None:
        """Let go: a worker goes on, and the next parent goes on with it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def follow(self, operation: Operation) -> Mapping[str, object]:
        """The work of an operation that lasts until nothing is left to be merged."""
        while not self._idle.is_set():
            for view in self.views():
                share = view.done_bytes / view.total_bytes if view.total_bytes else None
                operation.stage(f"{view.disk}: {view.reason or _merge_stage(view)}", share)
            if self._trouble is not None and not self._work:
                operation.stage(self._trouble)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FOLLOW_S):
                    await self._idle.wait()
        return {}

    def views(self) -> tuple[MergeView, ...]:
        """What is being merged."""
        return tuple(
            MergeView(
                disk,
                work.merge.upper,
                work.merge.lower,
                "waiting" if work.reason else work.status.state,
                work.status.done_bytes,
                work.status.total_bytes,
                work.status.bytes_per_s,
                work.reason,
                work.status.limit_bytes_per_s,
            )
            for disk, work in self._work.items()
        )

    @property
    def rate(self) -> int:
        """How fast a layer may be merged: bytes a second, 0 for no limit."""
        rate = self.partition.record.merge_rate
        return self._slots.bytes_per_s if rate is None else rate

    async def follow_rate(self) -> None:
        """The rate has changed: a merge that is going on keeps the new one when this returns."""
        for work in tuple(self._work.values()):
            await follow_rate(work.status, self.rate)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while await self._turn():
                    self._trouble = None
                self._trouble = None
                if not self._wake.is_set():
                    self._idle.set()
            except Exception as error:  # the root of this task: it must outlive whatever one round met
                self._failed(error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_RETRY_S):
                        await self._wake.wait()
                self._wake.set()

    def _failed(self, error: Exception) -> None:
        log.error("%s: layers: %s", self.partition.name, error, exc_info=not isinstance(error, MullionError | OSError))
        self._trouble = f"waits: {error}; tried again every {_RETRY_S:.0f} s"
        for work in self._work.values():
            work.reason = self._trouble

    async def _turn(self) -> bool:
        """Do one thing for the first disk that needs one; whether there was one."""
        for disk_id in tuple(self.partition.record.layers):
            if await self._step(disk_id):
                return True
        return False

    async def _step(self, disk_id: str) -> bool:
        async with self.partition.lock:
            await settle(self.partition)
            layers = self.partition.record.layers.get(disk_id)
            if layers is None:
                return False
            act = plan_layers(layers, self._pinned(), self._in_use())
            match act:
                case None:
                    await self._tidy(disk_id, layers)
                    return False
                case Drop():
                    await self._drop(disk_id, layers, act.path)
                    return True
                case Merge():
                    work = self._work.get(disk_id)
                    if work is None or work.merge != act:
                        work = self._work[disk_id] = _Work(act)
                    if act.upper == layers.head and layers.merging is None:
                        await self._merge_head(disk_id, layers, act)
                        return True
                    if layers.merging is None:
                        layers = begin_merge(layers, act)
                        await self._save(disk_id, layers)
        if layers.merging is not None and not layers.merging.is_copied:
            await self._copy(disk_id, act, work)
        async with self.partition.lock:
            await self._relink(disk_id, act)
        del self._work[disk_id]
        return True

    async def _tidy(self, disk_id: str, layers: DiskLayers) -> None:
        """A disk that is one file again needs no layers."""
        self._work.pop(disk_id, None)
        for known in (self._limits, self._last_held, self._attempts):
            known.pop(disk_id, None)
        if len(layers.parents) == 1 and layers.parents.get(layers.head, "") is None and not self._pins(layers.head):
            await self._save(disk_id, None)

    def _pins(self, path: str) -> bool:
        return path in self._pinned() or path in self._in_use()

    async def _save(self, disk_id: str, layers: DiskLayers | None, **also: object) -> int:
        known = dict(self.partition.record.layers)
        if layers is None:
            del known[disk_id]
        else:
            known[disk_id] = layers
        return await self.partition.save(layers=known, **also)  # type: ignore[arg-type]  # fields and writes

    async def _drop(self, disk_id: str, layers: DiskLayers, path: str) -> None:
        """Remove a file that is in no chain; durable before the record forgets it."""
        await asyncio.to_thread(_remove_file, path)
        await self._save(disk_id, without(layers, path))

    # -- merging -------------------------------------------------------------------------------------------------------

    async def _copy(self, disk_id: str, act: Merge, work: _Work) -> None:
        """Have a worker write the upper layer into the lower one, durable when this returns; without the lock."""
        async with self._slots.slots:
            begun_s = time.monotonic()
            work.reason = None
            await merge_layer(self.partition, disk_id, act, work.status, lambda: self.rate)
        log.info(
            "%s: %s merged into %s in %.1f s", self.partition.name, act.upper, act.lower, time.monotonic() - begun_s
        )
        async with self.partition.lock:
            await self._save(disk_id, end_copy(self.partition.record.layers[disk_id]))

    async def _relink(self, disk_id: str, act: Merge) -> None:
        """What lies on the upper layer is put on the lower one, which holds the same; then the upper one is alone."""
        layers = self.partition.record.layers[disk_id]
        if layers.merging is None:
            return
        work = self._work.get(disk_id)
        if work is not None:
            work.status.state = "relinking"
        if not is_served(self.partition):
            await unstamp(self.partition)
        for child in children_of(layers.parents)[act.upper]:
            if child != layers.head or not is_served(self.partition):
                await asyncio.to_thread(relink, child, act.lower, self._pending_dir)
        if is_served(self.partition):
            await self._shorten_served(disk_id, layers, act)
        await asyncio.to_thread(forget_merge, act.lower)
        conditions, writes, moved = self._move_pins(act.upper, act.lower)
        revision = await self._save(disk_id, end_merge(layers), conditions=conditions, writes=writes)
        for record in moved:
            self._keep(record, revision)

    async def _shorten_served(self, disk_id: str, layers: DiskLayers, act: Merge) -> None:
        served = await served_chains(self.partition)
        chain = (served or {}).get(disk_id, ())
        if act.upper not in chain:
            return
        shorter = tuple(path for path in chain if path != act.upper)
        is_parent_of_head = layers.parents[layers.head] == act.upper
        await exchange_chains(self.partition, [Exchange(disk_id, shorter, set_parent=is_parent_of_head)])

    async def _merge_head(self, disk_id: str, layers: DiskLayers, act: Merge) -> None:
        """The head is to be merged into its parent: what is small at once, else a child is put over it first."""
        if not is_served(self.partition):
            await unstamp(self.partition)
        held = await asyncio.to_thread(_held_bytes, layers.head)
        limit = self._limit_for(disk_id, held)
        if held > limit or await self._outgrows(layers.head):
            await put_on_top(self.partition, disk_id)
            return
        if not is_served(self.partition):
            await asyncio.to_thread(merge_now, act.upper, act.lower, self._pending_dir)
            await self._save(disk_id, msgspec.structs.replace(layers, head=act.lower))
            return
        chain = next(disk.chain for disk in self.partition.runtime.disks if disk.id == disk_id)
        await exchange_chains(
            self.partition,
            [Exchange(disk_id, chain[1:], (act.lower,), collapse=True, limit_bytes=max(limit, held))],
        )
        await self._save(disk_id, msgspec.structs.replace(layers, head=act.lower))

    async def _outgrows(self, head: str) -> bool:
        """Must a fixed disk grow for a head that is served? It does beneath a frozen layer, not in the pause."""
        if not is_served(self.partition):
            return False
        return grows_fixed(await asyncio.to_thread(self.partition.surroundings.preparer.disks.inspect, head))

    @property
    def _pending_dir(self) -> str:
        return self.partition.runtime.paths.pending_dir

    def _limit_for(self, disk_id: str, held: int) -> int:
        """How much may be merged in a pause: more, when the guest writes as fast as it is merged."""
        limit = self._limits.setdefault(disk_id, COLLAPSE_BYTES)
        attempts = self._attempts[disk_id] = self._attempts.get(disk_id, 0) + 1
        if attempts > _PATIENCE and held * 2 > self._last_held.get(disk_id, 0):
            limit = self._limits[disk_id] = min(limit * 2, _COLLAPSE_LIMIT_BYTES)
        self._last_held[disk_id] = held
        return limit


def _merge_stage(view: MergeView) -> str:
    """`merging web-1a2b.avhd into web.vhd, 64 MiB/s of at most 64 MiB/s`."""
    what = f"merging {os.path.basename(view.upper)} into {os.path.basename(view.lower)}"
    if view.limit_bytes_per_s is None:
        return what
    limit = f"of at most {format_size(view.limit_bytes_per_s)}/s" if view.limit_bytes_per_s else "without a limit"
    return f"{what}, {format_size(view.bytes_per_s)}/s {limit}"


def _held_bytes(path: str) -> int:
    return os.stat(path).st_blocks * 512


def _remove_file(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sync_folder(os.path.dirname(path))
