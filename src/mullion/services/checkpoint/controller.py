"""Checkpoints: what administrators ask of them.

Invariants: a checkpoint is in the store before anything of it is made, and ready when its disks are frozen; what was
promised as ready is there after any crash. One act at a time changes a partition's layers: its lock is held.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from mullion.base.errors import AlreadyExistsError, ConflictError, InvalidError, MullionError, NotFoundError, StateError
from mullion.base.units import utc_now
from mullion.model.definition import PartitionDefinition, PowerState
from mullion.model.states import PartitionState
from mullion.model.views import CheckpointDiskView, CheckpointTreeView, CheckpointView, OperationView
from mullion.parent.events import Events
from mullion.parent.operations import Operation, Operations
from mullion.parent.store import Condition, Delete, Put, Store
from mullion.parent.store.protocol import Write
from mullion.services.checkpoint.backings import Backings, ReadableDisk, until_answered
from mullion.services.checkpoint.branching import (
    add_children,
    commit_children,
    freeze_heads,
    layers_of,
    make_children,
    note_children,
    settle,
)
from mullion.services.checkpoint.capture import (
    check_memory_of,
    held_still,
    move_memory,
    put_back,
    remove_folder,
    sweep_folders,
)
from mullion.services.checkpoint.keeper import LayerKeeper, MergeSlots
from mullion.services.checkpoint.live_memory import LiveMemory, obstacle_to_live
from mullion.services.checkpoint.merge_link import end_worker
from mullion.services.checkpoint.record import PREFIX, CheckpointRecord, Consistency, FrozenDisk
from mullion.services.partition.controller import PartitionController
from mullion.services.partition.partition import Partition
from mullion.services.partition.saving import forget_saved
from mullion.vhd import inspect_chain
from mullion.vhd.pacing import checked_rate

log = logging.getLogger(__name__)

_AT_REST: Final = (PartitionState.STOPPED, PartitionState.FAILED, PartitionState.SAVED)
_CHECKPOINTABLE: Final = (PartitionState.RUNNING, PartitionState.PAUSED, *_AT_REST)


class _Made(NamedTuple):
    record: CheckpointRecord
    stall_ms: float
    """For so long the guest's requests waited."""
    pause_ms: float
    """For so long the guest stood still, where it had to."""


class CheckpointController:
    """The checkpoints of all partitions. `open` completes or drops what a crash left; `close` lets merges go on."""

    def __init__(
        self,
        *,
        store: Store,
        events: Events,
        operations: Operations,
        partitions: PartitionController,
        slots: MergeSlots,
    ) -> None:
        self._store = store
        self._events = events
        self._operations = operations
        self._partitions = partitions
        self._slots = slots
        self._records: dict[str, dict[str, CheckpointRecord]] = {}
        self._revisions: dict[str, int] = {}
        self._readers: Counter[str] = Counter()
        """Tops of chains that somebody reads, and how many do."""
        self._applied: set[str] = set()
        """Ids of the checkpoints that partitions are being brought back to: they stay until that is done."""
        self._keepers: dict[str, LayerKeeper] = {}
        self.backings = Backings()

    # -- life of the service -------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Read the records, settle what a crash left, and begin to merge what nobody needs."""
        for entry in await self._store.list(PREFIX):
            record = CheckpointRecord.decode(entry.value)
            self._keep(record, entry.revision)
        self._partitions.on_deleted.append(self.forget_partition)
        for partition in self._partitions.all():
            try:
                async with partition.lock:
                    await self._settle(partition)
            except (MullionError, OSError) as error:
                log.error("%s: its checkpoints could not be settled yet: %s", partition.name, error)
            self._keeper(partition).wake()

    async def close(self) -> None:
        """Let go of the merges; their workers go on."""
        await asyncio.gather(*(keeper.close() for keeper in self._keepers.values()))

    async def _settle(self, partition: Partition) -> None:
        await settle(partition)
        for record in list(self._of(partition.name).values()):
            if not record.is_ready:
                log.warning("%s: checkpoint %s was not completed before a crash: dropped", partition.name, record.name)
                await self._remove(partition, [record])
        await asyncio.to_thread(sweep_folders, partition, set(self._of(partition.name)))

    async def forget_partition(self, partition: Partition) -> None:
        """A partition is gone with its files: so are its checkpoints."""
        keeper = self._keepers.pop(partition.name, None)
        if keeper is not None:
            await keeper.close()
        await end_worker(partition.name, partition.runtime.paths)
        for record in list(self._of(partition.name).values()):
            await self._forget(record)

    def _keep(self, record: CheckpointRecord, revision: int) -> None:
        self._records.setdefault(record.partition, {})[record.id] = record
        self._revisions[record.key] = revision

    def _of(self, partition: str) -> dict[str, CheckpointRecord]:
        return self._records.get(partition, {})

    def _keeper(self, partition: Partition) -> LayerKeeper:
        keeper = self._keepers.get(partition.name)
        if keeper is None or keeper.partition is not partition:
            keeper = LayerKeeper(
                partition,
                pinned=lambda: self._pinned(partition.name),
                in_use=lambda: set(self._readers),
                move_pins=lambda upper, lower: self._moved_pins(partition.name, upper, lower),
                keep=self._keep,
                slots=self._slots,
                events=self._events,
            )
            self._keepers[partition.name] = keeper
            keeper.begin()
        return keeper

    def _pinned(self, partition: str) -> set[str]:
        return {disk.path for record in self._of(partition).values() for disk in record.disks}

    def wake(self, partition: Partition) -> None:
        """The layers of a partition may be merged again."""
        self._keeper(partition).wake()

    # -- reading -------------------------------------------------------------------------------------------------------

    def tree(self, name: str) -> CheckpointTreeView:
        """All checkpoints of a partition, oldest first, and what is being merged. Raises: NotFoundError."""
        partition = self._partitions.find(name)
        return CheckpointTreeView(
            partition=name,
            present=partition.record.checkpoint,
            checkpoints=tuple(self._view(record) for record in self.records(name) if not record.is_passing),
            merges=self._keeper(partition).views(),
            merge_rate=self._keeper(partition).rate,
            is_merge_rate_own=partition.record.merge_rate is not None,
        )

    async def set_merge_rate(self, name: str, rate: int | None) -> CheckpointTreeView:
        """How fast this partition's layers may be merged from now on, also the one that is being merged: bytes a
        second, 0 for no limit, None for the service's setting. It stays in the partition's record.

        Raises: NotFoundError; InvalidError for a rate at which nothing would ever end.
        """
        partition = self._partitions.find(name)
        if rate is not None:
            checked_rate(rate)
        await partition.save(merge_rate=rate)
        await self._keeper(partition).follow_rate()
        return self.tree(name)

    def get(self, name: str, checkpoint: str) -> CheckpointView:
        """Raises: NotFoundError."""
        return self._view(self.find(name, checkpoint))

    def records(self, name: str) -> tuple[CheckpointRecord, ...]:
        """The checkpoints of a partition, oldest first."""
        return tuple(sorted(self._of(name).values(), key=lambda record: (record.created_at, record.id)))

    def find(self, name: str, checkpoint: str) -> CheckpointRecord:
        """The checkpoint of this name, or id. Raises: NotFoundError."""
        self._partitions.find(name)
        records = self._of(name)
        found = records.get(checkpoint) or next((r for r in records.values() if r.name == checkpoint), None)
        if found is None:
            raise NotFoundError(
                f"partition {name} has no checkpoint {checkpoint!r}",
                remedy=f"List them: mullion checkpoint list {name}",
                partition=name,
            )
        return found

    def _view(self, record: CheckpointRecord) -> CheckpointView:
        return CheckpointView(
            id=record.id,
            name=record.name,
            partition=record.partition,
            parent=record.parent,
            created_at=record.created_at,
            description=record.description,
            schedule=record.schedule,
            consistency=record.consistency.value,
            has_memory=record.saved is not None,
            is_live=record.is_live,
            stood_still_because=record.stood_still_because,
            is_ready=record.is_ready,
            is_present=self._partitions.find(record.partition).record.checkpoint == record.id,
            disks=tuple(
                CheckpointDiskView(disk.id, disk.path, disk.size_bytes, _held_bytes(disk.path)) for disk in record.disks
            ),
        )

    @contextlib.asynccontextmanager
    async def reading(self, name: str, checkpoint: str) -> AsyncIterator[Mapping[str, ReadableDisk]]:
        """A checkpoint's disks, by id, which stay as they are until the block ends.

        Raises: NotFoundError; VhdError; of a disk that is coming home, what keeps its backup from being read.
        """
        record = self.find(name, checkpoint)
        partition = self._partitions.find(name)
        tops = {disk.id: disk.path for disk in record.disks}
        async with self.backings.using(partition) as backings, self._reading(partition, tops, backings) as disks:
            yield disks

    @contextlib.asynccontextmanager
    async def reading_present(
        self, name: str, *, consistent: bool = False
    ) -> AsyncIterator[Mapping[str, ReadableDisk]]:
        """The same of a partition as it is at this instant: by a checkpoint that goes with the block where it runs.

        `consistent` freezes the filesystems of one that runs for that instant. A disk that a stopped partition has is
        read as it is, and locked: the partition cannot be started until the block has ended.
        Raises: NotFoundError; StateError while the partition is between states; what making a checkpoint raises.
        """
        partition = self._partitions.find(name)
        async with contextlib.AsyncExitStack() as stack:
            backings = await stack.enter_async_context(self.backings.using(partition))
            await until_answered(partition, lambda _: None)
            async with partition.lock:
                if partition.has_processes():
                    tops = await self._freeze_present(partition, stack, consistent=consistent)
                else:
                    tops = {disk.id: layers_of(partition, disk.id).head for disk in partition.record.definition.disks}
                disks = await stack.enter_async_context(self._reading(partition, tops, backings))
            yield disks

    async def _freeze_present(
        self, partition: Partition, stack: contextlib.AsyncExitStack, *, consistent: bool
    ) -> dict[str, str]:
        """A checkpoint that goes when the stack is left; the tops of all disks. The caller holds the lock."""
        state = (await partition.view()).state
        _check_state(partition.name, state, (PartitionState.RUNNING, PartitionState.PAUSED), "be read")
        wanted = CheckpointRecord(
            id=secrets.token_hex(4),
            partition=partition.name,
            name="",
            created_at=utc_now(),
            definition=partition.record.definition,
            disks=(),
            consistency=Consistency.FILESYSTEM if consistent else Consistency.CRASH,
            is_passing=True,
        )
        record = (await self._freeze(lambda _: None, partition, wanted)).record
        stack.push_async_callback(self._pass, partition, record)
        unwritten = [disk for disk in partition.record.definition.disks if disk.read_only]
        frozen = {disk.id: disk.path for disk in record.disks}
        return frozen | {disk.id: layers_of(partition, disk.id).head for disk in unwritten}

    async def _pass(self, partition: Partition, record: CheckpointRecord) -> None:
        """Take a passing checkpoint away, also when whoever waits for it is being cancelled."""

        async def remove() -> None:
            async with partition.lock:
                if record.key in self._revisions:  # else the partition is gone
                    await self._remove(partition, [record])
                    self._keeper(partition).wake()

        await asyncio.shield(asyncio.create_task(remove(), name=f"end of {record.key}"))

    @contextlib.asynccontextmanager
    async def _reading(
        self, partition: Partition, tops: Mapping[str, str], backings: Mapping[str, str]
    ) -> AsyncIterator[Mapping[str, ReadableDisk]]:
        """The chains of these tops, by disk id, which stay as they are inside the block."""
        self.hold(tops.values())
        try:
            find = partition.surroundings.preparer.find_chain
            yield {
                disk: ReadableDisk(await asyncio.to_thread(find, partition.name, top), backings.get(disk))
                for disk, top in tops.items()
            }
        finally:
            self.release(tops.values())

    def hold(self, tops: Iterable[str]) -> None:
        """Somebody reads the chains of these files: they stay as they are until they are released."""
        self._readers.update(tops)

    def release(self, tops: Iterable[str]) -> None:
        """What waited for the end of that reading goes on."""
        self._readers.subtract(tops)
        self._readers += Counter()  # without those that nobody reads any more
        for partition in self._partitions.all():
            self._keeper(partition).wake()

    # -- making --------------------------------------------------------------------------------------------------------

    async def create(
        self,
        name: str,
        *,
        checkpoint: str = "",
        memory: bool = False,
        consistent: bool = False,
        description: str = "",
        schedule: str = "",
    ) -> OperationView:
        """Begin to make a checkpoint. Raises: NotFoundError; StateError; InvalidError; AlreadyExistsError."""
        wanted = await self._wanted(
            name, checkpoint, memory=memory, consistent=consistent, description=description, schedule=schedule
        )

        async def work(operation: Operation) -> Mapping[str, object]:
            await until_answered(self._partitions.find(name), operation.stage)
            operation.point_of_no_return()
            made = await self._create(operation.stage, wanted)
            record = made.record
            result = {"checkpoint": record.name, "id": record.id, "stall_ms": round(made.stall_ms, 3)}
            if memory:
                result |= {
                    "is_live": record.is_live,
                    "stood_still_because": record.stood_still_because,
                    "pause_ms": round(made.pause_ms, 3),
                }
            return result

        return await self._operations.start("checkpoint.create", f"partition/{name}", work, cancellable=True)

    async def make(
        self,
        say: Callable[[str], None],
        name: str,
        checkpoint: str,
        *,
        consistent: bool,
        description: str,
        schedule: str,
    ) -> CheckpointRecord:
        """Make a checkpoint as a part of another service's operation. Raises: as `create`; what hinders it."""
        wanted = await self._wanted(
            name, checkpoint, memory=False, consistent=consistent, description=description, schedule=schedule
        )
        await until_answered(self._partitions.find(name), say)
        return (await self._create(say, wanted)).record

    async def _wanted(
        self, name: str, checkpoint: str, *, memory: bool, consistent: bool, description: str, schedule: str
    ) -> CheckpointRecord:
        """A record of what is to be made. Raises: as `create`."""
        partition = self._partitions.find(name)
        if memory and consistent:
            raise InvalidError(
                "a checkpoint with memory freezes no filesystems: what they have not written yet is in the memory",
                remedy="Leave out --consistent; or --memory, where the disks are to be read without it.",
                field="consistent",
            )
        state = (await partition.view()).state
        _check_state(name, state, _CHECKPOINTABLE, "have a checkpoint made")
        if (memory or consistent) and state in _AT_REST:
            what = "memory" if memory else "filesystems to freeze"
            raise StateError(
                f"partition {name} is {state.value}: it has no {what}",
                state=state.value,
                required="running",
                remedy="Leave the option away: the disks of a stopped partition are consistent.",
            )
        return CheckpointRecord(
            id=secrets.token_hex(4),
            partition=name,
            name=self._free_name(name, checkpoint),
            created_at=utc_now(),
            definition=partition.record.definition,
            disks=(),
            consistency=_consistency(state, memory=memory, consistent=consistent),
            description=description,
            schedule=schedule,
        )

    def _free_name(self, partition: str, wanted: str) -> str:
        names = {record.name for record in self._of(partition).values()}
        if wanted:
            if wanted in names:
                raise AlreadyExistsError(
                    f"partition {partition} has a checkpoint {wanted!r} already", remedy="Choose another name."
                )
            return wanted
        stamp = utc_now()[:19].replace(":", "").replace("T", "-")
        return next(n for n in (stamp, *(f"{stamp}-{number}" for number in range(2, 10_000))) if n not in names)

    async def _create(self, say: Callable[[str], None], wanted: CheckpointRecord) -> _Made:
        partition = self._partitions.find(wanted.partition)
        live: LiveMemory | None = None
        async with partition.lock:
            if wanted.consistency is Consistency.MEMORY:
                obstacle = await obstacle_to_live(partition)
                if obstacle is None:
                    live = await LiveMemory.ready(partition, say)
                wanted = msgspec.structs.replace(wanted, is_live=obstacle is None, stood_still_because=obstacle or "")
            made = await self._freeze(say, partition, wanted, live)
        if live is not None:
            made = made._replace(record=await self._complete(partition, made.record, live))
        record = made.record
        self._events.publish(
            "checkpoint.created", f"partition/{partition.name}", {"checkpoint": record.name, "id": record.id}
        )
        self._keeper(partition).wake()
        return made

    async def _complete(self, partition: Partition, record: CheckpointRecord, live: LiveMemory) -> CheckpointRecord:
        """Wait for the memory of a checkpoint whose disks are frozen; then it is ready. Not under the lock: the guest
        runs meanwhile, and its provider may have to be started again.
        """
        try:
            saved = await live.finish()
            async with partition.lock:
                saved = await asyncio.to_thread(move_memory, partition, record, saved)
                ready = msgspec.structs.replace(self._of(record.partition)[record.id], saved=saved, is_ready=True)
                known = self._revisions[record.key]
                self._keep(
                    ready, await self._store.transact([Condition(record.key, known)], [Put(record.key, ready.encode())])
                )
            return ready
        except BaseException:
            await asyncio.shield(self._abandon(partition, record.id, live))
            raise

    async def _abandon(self, partition: Partition, checkpoint_id: str, live: LiveMemory) -> None:
        """Its memory could not be written: a checkpoint that nobody was promised goes, and its layers are merged."""
        await live.give_up()
        async with partition.lock:
            if (record := self._of(partition.name).get(checkpoint_id)) is not None:  # else the partition is gone
                await self._remove(partition, [record])
                self._keeper(partition).wake()

    async def _freeze(
        self,
        say: Callable[[str], None],
        partition: Partition,
        wanted: CheckpointRecord,
        live: LiveMemory | None = None,
    ) -> _Made:
        """Make a checkpoint; the caller holds the lock. What is there now stems from it, unless it is a passing one.

        With `live` it is not ready yet: its memory is being written when this returns.
        """
        written = [disk.id for disk in partition.record.definition.disks if not disk.read_only]
        heads = {disk: layers_of(partition, disk).head for disk in written}
        if not heads:
            raise InvalidError(
                f"partition {partition.name} has no disk that it writes", remedy="There is nothing to freeze."
            )
        say("making the new layers")
        sizes = {id_: await asyncio.to_thread(_size_of, path) for id_, path in heads.items()}
        record = msgspec.structs.replace(
            wanted,
            parent=partition.record.checkpoint,
            disks=tuple(FrozenDisk(id_, path, sizes[id_]) for id_, path in heads.items()),
        )
        children = await note_children(
            partition, heads, writes=[Put(record.key, record.encode())], conditions=[Condition(record.key, 0)]
        )
        self._keep(record, partition.revision)
        try:
            await make_children(children, heads)
            if live is not None:
                await live.prepare()
            begun_s = time.monotonic()
            async with held_still(partition, record, say, is_live=live is not None) as held:
                if live is not None:
                    await live.check_held()
                say("freezing the disks")
                stall_ms = await self._commit(partition, held, children, is_ready=live is None)
                if live is not None:
                    await live.begin()
            pause_ms = (time.monotonic() - begun_s) * 1000
        except BaseException:
            if live is not None:
                await live.give_up()
            await self._remove(partition, [record])  # its layers are merged again, if it came to have any
            self._keeper(partition).wake()
            raise
        return _Made(self._records[record.partition][record.id], stall_ms, pause_ms)

    async def _commit(
        self, partition: Partition, record: CheckpointRecord, children: Mapping[str, str], *, is_ready: bool
    ) -> float:
        """The heads are frozen, and the checkpoint may be ready; milliseconds for which the guest's requests waited."""
        if record.is_passing:
            return await freeze_heads(partition, children)
        ready = msgspec.structs.replace(record, is_ready=is_ready)
        return await freeze_heads(
            partition,
            children,
            checkpoint=record.id,
            writes=[Put(record.key, ready.encode())],
            conditions=[Condition(record.key, self._revisions[record.key])],
            on_commit=lambda revision: self._keep(ready, revision),
        )

    async def _forget(self, record: CheckpointRecord) -> None:
        """Take a record away, with its folder; its layers are the keeper's then."""
        await self._store.transact([Condition(record.key, self._revisions[record.key])], [Delete(record.key)])
        self._drop(record)

    def _drop(self, record: CheckpointRecord) -> None:
        del self._records[record.partition][record.id]
        del self._revisions[record.key]

    # -- applying ------------------------------------------------------------------------------------------------------

    async def apply(self, name: str, checkpoint: str, *, keep_present: str | None = None) -> OperationView:
        """Begin to bring a partition back to a checkpoint; one that runs is turned off and started again.

        `keep_present` keeps what is there now as a checkpoint of this name ("": one is made up).
        Raises: NotFoundError; StateError; AlreadyExistsError.
        """
        partition = self._partitions.find(name)
        record = self.find(name, checkpoint)
        _check_state(name, (await partition.view()).state, _CHECKPOINTABLE, "be brought back to a checkpoint")
        kept_name = None if keep_present is None else self._free_name(name, keep_present)

        async def work(operation: Operation) -> Mapping[str, object]:
            self._applied.add(record.id)
            try:
                return await self._apply(operation, partition, record.id, kept_name)
            finally:
                self._applied.discard(record.id)

        return await self._operations.start("checkpoint.apply", f"partition/{name}", work)

    async def _apply(
        self, operation: Operation, partition: Partition, checkpoint_id: str, kept_name: str | None
    ) -> dict[str, object]:
        record = self.find(partition.name, checkpoint_id)
        if record.saved is not None:
            operation.stage("checking the memory")
            await asyncio.to_thread(check_memory_of, partition, record, record.saved)
        wanted_power = partition.record.desired
        if partition.has_processes():
            operation.stage("turning the partition off")
            await partition.stop(0.0, operation.stage, operation.point_of_no_return)
        async with partition.lock:
            if kept_name is not None:
                kept = CheckpointRecord(
                    id=secrets.token_hex(4),
                    partition=partition.name,
                    name=kept_name,
                    created_at=utc_now(),
                    definition=partition.record.definition,
                    disks=(),
                    consistency=Consistency.CRASH if wanted_power is not PowerState.STOPPED else Consistency.STOPPED,
                    description=f"what was there before {record.name} was applied",
                )
                await self._freeze(operation.stage, partition, kept)
            record = self.find(partition.name, checkpoint_id)  # a merge may have moved its disks meanwhile
            await forget_saved(partition)
            operation.stage("bringing the disks back")
            children = await add_children(partition, {disk.id: disk.path for disk in record.disks})
            saved = await asyncio.to_thread(put_back, partition, record)
            await commit_children(
                partition,
                children,
                checkpoint=record.id,
                failure=None,
                saved=saved,
                definition=_definition_of(record, partition.record.definition),
            )
        self._keeper(partition).wake()
        self._events.publish(
            "checkpoint.applied", f"partition/{partition.name}", {"checkpoint": record.name, "id": record.id}
        )
        if record.saved is not None and wanted_power is PowerState.STOPPED:
            wanted_power = PowerState.PAUSED if record.saved.was_paused else PowerState.RUNNING
        if wanted_power is not PowerState.STOPPED:
            await partition.start(wanted_power, operation.stage)
        return {"checkpoint": record.name, "state": (await partition.view()).state.value, "kept": kept_name}

    # -- deleting ------------------------------------------------------------------------------------------------------

    async def delete(self, name: str, checkpoint: str) -> OperationView:
        """Take a checkpoint away. It is gone at once; the operation lasts until its layers are merged.

        Raises: NotFoundError; ConflictError while somebody reads it.
        """
        partition = self._partitions.find(name)
        record = self.find(name, checkpoint)
        await self.remove(name, [record])
        return await self._operations.start(
            "checkpoint.delete", f"checkpoint/{name}/{record.name}", self._keeper(partition).follow, exclusive=False
        )

    async def remove(self, name: str, records: Sequence[CheckpointRecord]) -> None:
        """Take checkpoints away at once; their layers are merged later. Raises: as `delete`."""
        partition = self._partitions.find(name)
        for record in records:
            self._check_unread(record)
        async with partition.lock:
            records = [self._still(record) for record in records]  # somebody else may have had the lock
            for record in records:
                self._check_unread(record)
            await self._remove(partition, records)
        for record in records:
            self._events.publish(
                "checkpoint.deleted", f"partition/{name}", {"checkpoint": record.name, "id": record.id}
            )
        self._keeper(partition).wake()

    def _still(self, record: CheckpointRecord) -> CheckpointRecord:
        """As it is now. Raises: NotFoundError."""
        found = self._of(record.partition).get(record.id)
        if found is None:
            raise NotFoundError(
                f"checkpoint {record.name} of partition {record.partition} was deleted by somebody else",
                remedy=f"See what there is: mullion checkpoint list {record.partition}",
                partition=record.partition,
            )
        return found

    def _check_unread(self, record: CheckpointRecord) -> None:
        name = record.partition
        if not record.is_ready:
            raise ConflictError(
                f"checkpoint {record.name} of partition {name} is being made",
                remedy="Wait until it is made: mullion operation list",
            )
        if record.id in self._applied:
            raise ConflictError(
                f"checkpoint {record.name} of partition {name} is being applied",
                remedy="Wait until it is applied: mullion operation list",
            )
        if any(self._readers[disk.path] for disk in record.disks):
            raise ConflictError(
                f"checkpoint {record.name} of partition {name} is being read",
                remedy="Wait for the backup, the export or the listing of files that reads it, or end it.",
            )

    async def _remove(self, partition: Partition, records: Sequence[CheckpointRecord]) -> None:
        """Records go, what was made on them stems from their parents; in one instant."""
        gone = {record.id: record.parent for record in records}

        def heir(of: str | None) -> str | None:
            while of in gone:
                of = gone[of]
            return of

        orphans = [
            msgspec.structs.replace(record, parent=heir(record.parent))
            for record in self._of(partition.name).values()
            if record.parent in gone and record.id not in gone
        ]
        writes: list[Write] = [Delete(record.key) for record in records]
        writes += [Put(record.key, record.encode()) for record in orphans]
        conditions = [Condition(record.key, self._revisions[record.key]) for record in (*records, *orphans)]
        revision = await partition.save(
            checkpoint=heir(partition.record.checkpoint), writes=writes, conditions=conditions
        )
        for record in orphans:
            self._keep(record, revision)
        for record in records:
            self._drop(record)
            await asyncio.to_thread(remove_folder, partition, record)

    def _moved_pins(
        self, partition: str, upper: str, lower: str
    ) -> tuple[list[Condition], list[Write], list[CheckpointRecord]]:
        """What has to be written so that checkpoints which name one layer name the other."""
        moved = [
            msgspec.structs.replace(
                record,
                disks=tuple(
                    msgspec.structs.replace(disk, path=lower) if disk.path == upper else disk for disk in record.disks
                ),
            )
            for record in self._of(partition).values()
            if any(disk.path == upper for disk in record.disks)
        ]
        return (
            [Condition(record.key, self._revisions[record.key]) for record in moved],
            [Put(record.key, record.encode()) for record in moved],
            moved,
        )


def _check_state(name: str, state: PartitionState, allowed: Sequence[PartitionState], what: str) -> None:
    if state not in allowed:
        raise StateError(
            f"partition {name} is {state.value}: it cannot {what} now",
            state=state.value,
            required=" or ".join(one.value for one in allowed),
            partition=name,
        )


def _consistency(state: PartitionState, *, memory: bool, consistent: bool) -> Consistency:
    if state in _AT_REST:
        return Consistency.STOPPED
    if memory:
        return Consistency.MEMORY
    return Consistency.FILESYSTEM if consistent else Consistency.CRASH


def _definition_of(record: CheckpointRecord, now: PartitionDefinition) -> PartitionDefinition:
    """The definition of the checkpoint's time; what is wanted of the power stays what it is."""
    return msgspec.structs.replace(record.definition, power=now.power)


def _size_of(path: str) -> int:
    return inspect_chain(path).size_bytes


def _held_bytes(path: str) -> int:
    """What a layer takes on its filesystem; 0 for one that is missing."""
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
