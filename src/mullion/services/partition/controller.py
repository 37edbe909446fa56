"""Partitions: what administrators ask of them, and the loop that brings each to what is wanted of it.

    ask (start, stop …) ─► record in the store ─┐
    something ended, QEMU or the provider spoke ┴─► reconcile: observe → plan → apply, one at a time per partition

Invariants: a partition is reconciled by one task at a time; what is wanted is in the store before anything is done
about it; a start that fails leaves the partition `failed` with its reason, and no process, socket or lock of it behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Final

import msgspec

from mullion.base.errors import AlreadyExistsError, ConflictError, NotFoundError, StateError, UnavailableError
from mullion.base.paths import HostPaths
from mullion.base.units import utc_now
from mullion.hypervisor.console import ConsoleHub
from mullion.model.definition import PartitionDefinition, PowerState
from mullion.model.parse import complete
from mullion.model.states import OperationState, PartitionState
from mullion.model.views import OperationView, PartitionView
from mullion.parent.events import Events
from mullion.parent.operations import Operation, Operations, Work
from mullion.parent.store import Condition, Delete, Put, Store
from mullion.services.disk.controller import DiskController
from mullion.services.partition.partition import Partition, Surroundings
from mullion.services.partition.record import PREFIX, BackupOrigin, DiskLayers, PartitionRecord, key_of
from mullion.services.partition.runtime import Runtime
from mullion.services.partition.saving import changed_since
from mullion.services.partition.upkeep import resize_disk, upgrade_provider

log = logging.getLogger(__name__)

_AT_REST: Final = (PartitionState.STOPPED, PartitionState.FAILED, PartitionState.SAVED)
_SAVED_REMEDY: Final = (
    "It does not run. Let it go on: mullion partition restore {name}; or throw its memory away: "
    "mullion partition discard-state {name}"
)
_ROLL_BACK_S: Final = 30.0
_UP: Final = (PartitionState.RUNNING, PartitionState.PAUSED)


class PartitionController:
    """All partitions of this host. `open` adopts what runs; `close` lets go of it."""

    def __init__(
        self,
        *,
        store: Store,
        events: Events,
        operations: Operations,
        paths: HostPaths,
        disks: DiskController,
        surroundings: Surroundings,
        allocate_uid: Callable[[Collection[int]], int] | None,
    ) -> None:
        self._store = store
        self._events = events
        self._operations = operations
        self._paths = paths
        self._disks = disks
        self._surroundings = surroundings
        self._allocate_uid = allocate_uid
        self._partitions: dict[str, Partition] = {}
        self.on_deleted: list[Callable[[Partition], Awaitable[None]]] = []
        """What other services do when a partition is gone from the store."""
        for kind, work in (
            ("partition.start", self._start),
            ("partition.stop", self._stop),
            ("partition.pause", self._pause),
            ("partition.resume", self._resume),
            ("partition.restore", self._start),
            ("partition.discard-state", self._discard_state),
        ):
            operations.register_resume(kind, work)

    # -- life of the service -------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Read the records, adopt what runs, and begin to reconcile."""
        for entry in await self._store.list(PREFIX):
            record = PartitionRecord.decode(entry.value)
            self._hold(record, entry.revision)
        await asyncio.gather(*(partition.adopt() for partition in self._partitions.values()))

    async def close(self) -> None:
        """Let go of every partition; what runs goes on."""
        await asyncio.gather(*(partition.release() for partition in self._partitions.values()))

    def _hold(self, record: PartitionRecord, revision: int) -> Partition:
        name = record.definition.name
        partition = Partition(
            record,
            revision,
            runtime=Runtime(name, self._paths.partition(name)),
            surroundings=self._surroundings,
            store=self._store,
            events=self._events,
        )
        self._partitions[name] = partition
        return partition

    def holders(self) -> Mapping[str, str]:
        """Which file is open for writing in which partition."""
        return {path: partition.name for partition in self._partitions.values() for path in partition.held_files()}

    def attached(self) -> Mapping[str, str]:
        """Which file is named by the definition of which partition, or is a layer of a disk of it."""
        named = {
            self._disks.resolve(disk.path): partition.name
            for partition in self._partitions.values()
            for disk in partition.record.definition.disks
        }
        made = {
            path: partition.name
            for partition in self._partitions.values()
            for layers in partition.record.layers.values()
            for path in layers.parents
        }
        return named | made

    # -- reading -------------------------------------------------------------------------------------------------------

    async def list(self) -> tuple[PartitionView, ...]:
        """All partitions, by name."""
        found = [self._partitions[name] for name in sorted(self._partitions)]
        return tuple(await asyncio.gather(*(partition.view() for partition in found)))

    async def get(self, name: str) -> PartitionView:
        """Raises: NotFoundError."""
        return await self.find(name).view()

    def all(self) -> tuple[Partition, ...]:
        return tuple(self._partitions.values())

    def find(self, name: str) -> Partition:
        """Raises: NotFoundError."""
        try:
            return self._partitions[name]
        except KeyError:
            raise NotFoundError(
                f"there is no partition {name!r}", remedy="List them: mullion partition list", partition=name
            ) from None

    def count_states(self) -> dict[str, int]:
        """How many partitions were in which state when last looked at."""
        counts: dict[str, int] = {}
        for partition in self._partitions.values():
            state = partition.last_state.value
            counts[state] = counts.get(state, 0) + 1
        return counts

    # -- definitions ---------------------------------------------------------------------------------------------------

    async def create(
        self,
        definition: PartitionDefinition,
        *,
        layers: Mapping[str, DiskLayers] | None = None,
        origin: BackupOrigin | None = None,
    ) -> PartitionView:
        """Keep a new definition; one that is wanted running is started. `layers` and `origin` are of its record.

        Raises: AlreadyExistsError; InvalidError.
        """
        definition = complete(definition)
        name = definition.name
        if name in self._partitions:
            raise AlreadyExistsError(
                f"there is a partition {name!r} already",
                remedy=f"Choose another name, or look at it: mullion partition show {name}",
                partition=name,
            )
        wanted, definition = definition.power, msgspec.structs.replace(definition, power=PowerState.STOPPED)
        paths = self._paths.partition(name)
        self._surroundings.preparer.check_definition(definition, paths)
        used = [p.record.user_id for p in self._partitions.values() if p.record.user_id is not None]
        record = PartitionRecord(
            definition=definition,
            uuid=definition.uuid or str(uuid.uuid4()),
            created_at=utc_now(),
            user_id=self._allocate_uid(used) if self._allocate_uid is not None else None,
            layers=dict(layers or {}),
            origin=origin,
        )
        partition = self._hold(record, 0)  # before the store has it, so that no second one takes the name or the id
        try:
            partition.revision = await self._store.transact(
                [Condition(key_of(name), 0)], [Put(key_of(name), record.encode())]
            )
        except BaseException:
            del self._partitions[name]
            raise
        self._events.publish("partition.created", f"partition/{name}")
        partition.begin()
        if wanted is not PowerState.STOPPED:
            await self.start(name, paused=wanted is PowerState.PAUSED)
        return await partition.view()

    async def update(self, name: str, definition: PartitionDefinition) -> PartitionView:
        """Replace the definition. A running partition takes it over at its next start; power and caps act at once.

        Raises: NotFoundError; InvalidError; ConflictError for another name.
        """
        definition = complete(definition)
        partition = self.find(name)
        if definition.name != name:
            raise ConflictError(
                f"the definition is of {definition.name!r}, not of {name!r}", remedy="A partition cannot be renamed."
            )
        record = partition.record
        if definition.uuid not in ("", record.uuid):
            raise ConflictError(
                f"the uuid of partition {name} is {record.uuid}", remedy="Leave it out: it cannot be changed."
            )
        self._surroundings.preparer.check_definition(definition, partition.runtime.paths)
        self._check_layers(partition, definition)
        await partition.save(definition=msgspec.structs.replace(definition, power=record.desired))
        self._events.publish("partition.updated", f"partition/{name}")
        with contextlib.suppress(UnavailableError):  # a provider that dies just now: the next one starts with them
            await partition.follow_limits()
        await self._follow_power(name, definition.power)
        return await partition.view()

    def _check_layers(self, partition: Partition, definition: PartitionDefinition) -> None:
        """A disk that has checkpoints stays where it is. Raises: ConflictError."""
        wanted = {disk.id: self._disks.resolve(disk.path) for disk in definition.disks}
        for disk in partition.record.definition.disks:
            if disk.id in partition.record.layers and wanted.get(disk.id) != self._disks.resolve(disk.path):
                raise ConflictError(
                    f"disk {disk.id} of partition {partition.name} has checkpoints: it can be neither taken out nor "
                    "exchanged",
                    remedy=f"Delete its checkpoints first: mullion checkpoint list {partition.name}",
                    disk=disk.id,
                )

    async def _follow_power(self, name: str, power: PowerState) -> None:
        """Begin the act that brings about the power that is wanted, if one is needed: of a failed partition, too."""
        state = (await self.get(name)).state
        if power is PowerState.STOPPED:
            if state in _UP:
                await self.stop(name)
        elif state in _AT_REST:
            await self.start(name, paused=power is PowerState.PAUSED)
        elif power is PowerState.PAUSED and state is PartitionState.RUNNING:
            await self.pause(name)
        elif power is PowerState.RUNNING and state is PartitionState.PAUSED:
            await self.resume(name)

    async def delete(self, name: str, *, with_disks: bool = False) -> None:
        """Forget a partition that is stopped, with its folder; its disks stay unless asked for.

        Raises: NotFoundError; StateError while it runs; ConflictError when a disk is in use elsewhere.
        """
        partition = self.find(name)
        async with partition.lock:
            view = await partition.view()
            if view.state not in _AT_REST:
                raise StateError(
                    f"partition {name} is {view.state.value}",
                    state=view.state.value,
                    required="stopped",
                    remedy=f"Stop it first: mullion partition stop {name}",
                )
            if partition.record.layers and not with_disks:
                raise ConflictError(
                    f"partition {name} has checkpoints: what its disks hold is spread over several files",
                    remedy=f"Delete its checkpoints first (mullion checkpoint list {name}), or: "
                    f"mullion partition delete {name} --with-disks",
                )
            doomed = self._own_disks(partition) if with_disks else ()
            for path in doomed:
                await self._disks.check_delete(path, owner=name, going=doomed)
            await partition.shut()
            await self._store.transact([Condition(key_of(name), partition.revision)], [Delete(key_of(name))])
            del self._partitions[name]
        await partition.release()
        paths = partition.runtime.paths
        for tell in self.on_deleted:
            await tell(partition)
        for path in doomed:
            await asyncio.to_thread(os.unlink, path)
        for folder in (paths.run, paths.data):
            if os.path.isdir(folder):
                await asyncio.to_thread(shutil.rmtree, folder)
        self._events.publish("partition.deleted", f"partition/{name}", {"disks": list(doomed)})

    def _own_disks(self, partition: Partition) -> tuple[str, ...]:
        """The disk files that go with a partition: writable, present and in no other definition."""
        others = {
            self._disks.resolve(disk.path)
            for other in self._partitions.values()
            if other is not partition
            for disk in other.record.definition.disks
        }
        made = [path for layers in partition.record.layers.values() for path in reversed(layers.parents)]
        named = [self._disks.resolve(disk.path) for disk in partition.record.definition.disks if not disk.read_only]
        own = tuple(dict.fromkeys([*made, *named]))
        for path in own:
            if path in others:
                raise ConflictError(
                    f"the disk {path} is attached to another partition too",
                    remedy="Delete the partition without its disks.",
                    path=path,
                )
        return tuple(path for path in own if os.path.exists(path))

    # -- acting --------------------------------------------------------------------------------------------------------

    async def start(self, name: str, *, paused: bool = False, discard_state: bool = False) -> OperationView:
        """Begin to start a partition; a saved one goes on where it was, unless its state is to be thrown away.

        Raises: NotFoundError; StateError; ConflictError while another act goes on.
        """

        async def work(operation: Operation) -> Mapping[str, object]:
            if discard_state:
                await self._target(operation).discard_state()
            return await self._start(operation, paused=paused)

        return await self._act(name, "start", _AT_REST, work, cancellable=True)

    async def save(self, name: str) -> OperationView:
        """Begin to put memory and devices of a partition into a file and to end its processes.

        Raises: as `start`.
        """
        return await self._act(name, "save", _UP, self._save, cancellable=True)

    async def restore(self, name: str) -> OperationView:
        """Begin to let a saved partition go on where it was. Raises: as `start`."""
        partition = self.find(name)
        saved = partition.record.saved
        if saved is None:
            state = (await partition.view()).state.value
            raise StateError(
                f"partition {name} is {state}: there is no saved state to restore",
                state=state,
                required="saved",
                remedy=f"Start it: mullion partition start {name}" if state in ("stopped", "failed") else None,
                partition=name,
            )
        paused = saved.was_paused

        async def work(operation: Operation) -> Mapping[str, object]:
            return await self._start(operation, paused=paused)

        return await self._act(name, "restore", (PartitionState.SAVED,), work, cancellable=True)

    async def discard_state(self, name: str) -> OperationView:
        """Begin to throw away the state of a saved partition, which is stopped then. Raises: as `start`."""
        return await self._act(name, "discard-state", (PartitionState.SAVED,), self._discard_state)

    async def stop(self, name: str, *, force: bool = False, timeout_s: float | None = None) -> OperationView:
        """Begin to stop one: the guest is asked for `timeout_s` (default: its definition's), by `force` not."""

        async def work(operation: Operation) -> Mapping[str, object]:
            return await self._stop(operation, timeout_s=0.0 if force else timeout_s)

        if force:
            await self._supersede(name)
        allowed = (*_UP, PartitionState.FAILED) if self.find(name).has_processes() else _UP
        return await self._act(name, "stop", allowed, work, cancellable=True)

    async def _supersede(self, name: str) -> None:
        """Cancel what goes on with a partition, so that it can be turned off at once."""
        target = f"partition/{name}"
        for view in self._operations.list(target=target, state=OperationState.RUNNING):
            if view.cancellable:
                await self._operations.cancel(view.id)
                await self._operations.wait(view.id, _ROLL_BACK_S)

    async def pause(self, name: str) -> OperationView:
        return await self._act(name, "pause", (PartitionState.RUNNING,), self._pause)

    async def resume(self, name: str) -> OperationView:
        return await self._act(name, "resume", (PartitionState.PAUSED,), self._resume)

    async def reset(self, name: str) -> OperationView:
        allowed = (*_UP, PartitionState.FAILED) if self.find(name).has_processes() else _UP
        return await self._act(name, "reset", allowed, self._reset)

    async def resize_disk(self, name: str, disk_id: str, size_bytes: int) -> OperationView:
        """Begin to let a disk of a partition that is up grow. Raises: StateError."""

        async def work(_operation: Operation) -> Mapping[str, object]:
            return await resize_disk(self.find(name), disk_id, size_bytes)

        return await self._act(name, "resize-disk", _UP, work)

    async def upgrade_provider(self, name: str) -> OperationView:
        """Begin to replace the provider of a partition by one of the code that is installed now. Raises: StateError."""

        async def work(operation: Operation) -> Mapping[str, object]:
            return await upgrade_provider(self.find(name), operation.stage)

        return await self._act(name, "upgrade-provider", (*_UP, PartitionState.FAILED), work)

    def console(self, name: str) -> ConsoleHub:
        """The serial console of a partition, shared by all who look at it.

        Raises: NotFoundError; StateError when the partition does not run.
        """
        partition = self.find(name)
        if partition.runtime.machine is None:
            state, log_path = partition.last_state.value, partition.console.log_path
            raise StateError(
                f"partition {name} is {state}: it has no console",
                state=state,
                required="running or paused",
                remedy=f"Start it first: mullion partition start {name}; its last output is in {log_path}",
            )
        return partition.console

    async def _act(
        self, name: str, action: str, allowed: tuple[PartitionState, ...], work: Work, *, cancellable: bool = False
    ) -> OperationView:
        state = (await self.get(name)).state
        if state not in allowed:
            raise StateError(
                f"partition {name} is {state.value}: it cannot {action}",
                state=state.value,
                required=" or ".join(one.value for one in allowed),
                remedy=_SAVED_REMEDY.format(name=name) if state is PartitionState.SAVED else None,
                partition=name,
            )
        return await self._operations.start(f"partition.{action}", f"partition/{name}", work, cancellable=cancellable)

    async def _start(self, operation: Operation, *, paused: bool | None = None) -> Mapping[str, object]:
        partition = self._target(operation)
        desired = partition.record.desired
        if paused is not None or desired is PowerState.STOPPED:
            desired = PowerState.PAUSED if paused else PowerState.RUNNING
        is_other = changed_since(partition.record)
        try:
            await partition.start(desired, operation.stage)
            view = await partition.view()
        except asyncio.CancelledError:
            if operation.cancel_requested:
                await partition.roll_back()
            raise
        result: dict[str, object] = {"state": view.state.value, "accelerator": view.accelerator}
        if is_other:
            result["note"] = (
                "it goes on as it was when it was saved; its changed definition takes effect at the next start"
            )
        return result

    async def _save(self, operation: Operation) -> Mapping[str, object]:
        partition = self._target(operation)
        saved = await partition.save_state(operation.stage, operation.point_of_no_return)
        return {"state": PartitionState.SAVED.value, "file_bytes": saved.file_bytes}

    async def _discard_state(self, operation: Operation) -> Mapping[str, object]:
        partition = self._target(operation)
        await partition.discard_state()
        return {"state": (await partition.view()).state.value}

    async def _stop(self, operation: Operation, *, timeout_s: float | None = None) -> Mapping[str, object]:
        partition = self._target(operation)
        if timeout_s is None:
            timeout_s = float(partition.record.definition.shutdown_timeout_s)
        how = await partition.stop(timeout_s, operation.stage, operation.point_of_no_return)
        return {"state": PartitionState.STOPPED.value, "how": how}

    async def _pause(self, operation: Operation) -> Mapping[str, object]:
        return await self._set_desired(operation, PowerState.PAUSED)

    async def _resume(self, operation: Operation) -> Mapping[str, object]:
        return await self._set_desired(operation, PowerState.RUNNING)

    async def _set_desired(self, operation: Operation, desired: PowerState) -> Mapping[str, object]:
        partition = self._target(operation)
        await partition.save(desired=desired)
        await partition.reconcile(operation.stage)
        return {"state": (await partition.view()).state.value}

    async def _reset(self, operation: Operation) -> Mapping[str, object]:
        partition = self._target(operation)
        await partition.reset()
        return {"state": (await partition.view()).state.value}

    def _target(self, operation: Operation) -> Partition:
        return self.find(operation.target.removeprefix("partition/"))
