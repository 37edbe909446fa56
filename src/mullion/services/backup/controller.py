"""Backups: what administrators ask of them.

    create:  checkpoint ─► worker reads the frozen files into the repository ─► base := this one ─► the last one's goes

The guest writes into its child meanwhile and never waits for the repository. The checkpoint of the last backup stays,
because what lies above it is what has changed: exact, and it survives stop, crash and migration. A backup that is
interrupted at any instant leaves the base as it was, a checkpoint that the next one takes away, and packs that it uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn

import msgspec

from mullion.base.errors import AlreadyExistsError, ConflictError, InvalidError, NotFoundError
from mullion.base.paths import HostPaths
from mullion.hypervisor.firmware_state import restore_firmware_state
from mullion.model.definition import PartitionDefinition, PowerState
from mullion.model.parse import complete
from mullion.model.views import BackupView, OperationView
from mullion.parent.events import Events
from mullion.parent.operations import InterruptedError as OperationInterruptedError
from mullion.parent.operations import Operation, Operations
from mullion.parent.store import Condition, Delete, Put, Store
from mullion.services.backup.instant import Homecomings
from mullion.services.backup.passphrase import PassphraseChanges
from mullion.services.backup.record import (
    BASES,
    MARK,
    BackupBase,
    base_key,
    give_up,
    noted_files,
    unfinished,
    unfinished_in,
)
from mullion.services.backup.repositories import Repositories
from mullion.services.checkpoint.controller import CheckpointController
from mullion.services.checkpoint.record import CheckpointRecord
from mullion.services.disk.controller import DiskController
from mullion.services.partition.controller import PartitionController
from mullion.services.partition.partition import Partition

log = logging.getLogger(__name__)

_FIRMWARE: Final = "restored-firmware"


class BackupController:
    """Backups in the repositories that are known."""

    def __init__(
        self,
        *,
        store: Store,
        events: Events,
        operations: Operations,
        paths: HostPaths,
        partitions: PartitionController,
        checkpoints: CheckpointController,
        disks: DiskController,
    ) -> None:
        self._store = store
        self._events = events
        self._operations = operations
        self._paths = paths
        self._partitions = partitions
        self._checkpoints = checkpoints
        self._disks = disks
        self.repositories = Repositories(store, events, paths)
        self.passphrases = PassphraseChanges(operations, events, self.repositories)
        self.homecomings = Homecomings(
            operations=operations,
            events=events,
            paths=paths,
            partitions=partitions,
            checkpoints=checkpoints,
            source=self.repositories.source,
        )
        self._bases: dict[str, tuple[BackupBase, int]] = {}
        self.check_unscheduled: Callable[[str], None] = lambda _repository: None
        """Refuses to let a repository go that schedules back up into; set by who knows them."""

    async def open(self) -> None:
        """Read what is known."""
        await self.repositories.open()
        for entry in await self._store.list(BASES):
            base = BackupBase.decode(entry.value)
            self._bases[base.key] = (base, entry.revision)
        self._partitions.on_deleted.append(self._forget_partition)
        self.homecomings.open()
        self.passphrases.open()
        self._operations.register_resume("backup.create", self._give_up_backup)
        self._operations.register_resume("backup.restore", self._end_restore)

    async def _give_up_backup(self, operation: Operation) -> NoReturn:
        """The service ended during a backup: its checkpoint goes, so that nothing grows until the next one."""
        name = operation.target.removeprefix("backup/")
        used = {base.checkpoint for base, _ in self._bases.values()}
        stale = [
            record
            for record in self._checkpoints.records(name)
            if record.schedule.startswith(MARK) and record.id not in used
        ]
        if stale:
            await self._checkpoints.remove(name, stale)
        raise OperationInterruptedError(
            f"the backup of {name} was interrupted: the service ended before it was done",
            remedy=f"Start it again: mullion backup create {name}. What was stored already is used.",
            operation=operation.id,
        )

    async def _end_restore(self, operation: Operation) -> Mapping[str, object]:
        """The service ended during a restore: go on where the store has its partition, give it up otherwise."""
        kind, _, name = operation.target.partition("/")
        found = [one for one in self._partitions.all() if one.name == name and kind == "partition"]
        notes = [(one, note) for one in found for note in await asyncio.to_thread(self._notes_of, one)]
        if not notes:
            await self._give_up_restore(operation)
        folder = self._firmware_folder(name)
        if os.path.isdir(folder) and os.listdir(folder):
            await self._restore_firmware(found[0], folder)
        for _, note in notes:
            await asyncio.to_thread(_unlink, note)
        await asyncio.to_thread(self._remove_firmware, name)
        self._events.publish("backup.restored", operation.target)
        return {"partition": name}

    def _files_of(self, partition: Partition) -> set[str]:
        """All that a partition's disks lie in."""
        named = {self._disks.resolve(disk.path) for disk in partition.record.definition.disks}
        return named | partition.record.files

    def _notes_of(self, partition: Partition) -> list[str]:
        """The notes of a restore that made this very partition, and was not ended."""
        files = self._files_of(partition)
        notes = [note for note in map(unfinished, sorted(files)) if os.path.lexists(note)]
        return [note for note in notes if not files.isdisjoint(noted_files(note))]

    async def _restore_firmware(self, partition: Partition, folder: str) -> None:
        run_as = partition.record.run_as
        await asyncio.to_thread(restore_firmware_state, partition.runtime.paths, folder, run_as)

    async def _give_up_restore(self, operation: Operation) -> NoReturn:
        """The service ended during a restore: what was not finished goes."""
        used = {file for partition in self._partitions.all() for file in self._files_of(partition)}
        for path in await asyncio.to_thread(unfinished_in, self._paths.disks):
            if used.isdisjoint(await asyncio.to_thread(noted_files, path)):  # otherwise of one that is to be finished
                log.info("%s was not restored to its end: removed", path)
                await asyncio.to_thread(give_up, path)
        kind, _, name = operation.target.partition("/")
        if kind == "partition":
            await asyncio.to_thread(self._remove_firmware, name)
        raise OperationInterruptedError(
            f"the restore of {operation.target} was interrupted: the service ended before it was done",
            remedy="Start it again; under another name where its disks are there already (`mullion disk list`).",
            operation=operation.id,
        )

    async def _forget_partition(self, partition: Partition) -> None:
        """Its backups stay; there is nothing to build on any more."""
        for base, _ in [known for known in self._bases.values() if known[0].partition == partition.name]:
            await self._set_base(base, None)

    # -- repositories --------------------------------------------------------------------------------------------------

    async def remove_repository(self, name: str) -> None:
        """Forget a repository, with its passphrase and the checkpoints that its backups build on; its files stay.

        Raises: NotFoundError; ConflictError while a partition or a schedule needs it, or somebody reads such a
        checkpoint.
        """
        name = self.repositories.choose(name)
        self.check_unscheduled(name)
        for partition, origin in self.homecomings.origins(name):
            raise ConflictError(
                f"repository {name} is needed: partition {partition} is coming home from backup {origin.backup}",
                remedy="Let that partition run until all is home: mullion operation list",
            )
        for one in self._partitions.all():  # also what the first backup of one is being made of
            await self._drop_stale(one.name, name, keep=None, spare_read=False)
        for base, _ in [known for known in self._bases.values() if known[0].repository == name]:
            await self._set_base(base, None)
        await self.repositories.remove(name)

    # -- reading -------------------------------------------------------------------------------------------------------

    async def list(self, repository: str | None, partition: str | None) -> tuple[BackupView, ...]:
        """The backups in a repository, oldest first. Raises: as `Repositories.choose`; what the repository raises."""
        chosen = self.repositories.choose(repository)
        found = await self.repositories.ask(chosen, "list", partition=partition)
        return tuple(_view(chosen, fields) for fields in found["backups"])

    async def show(self, repository: str | None, backup: str) -> BackupView:
        """Raises: as `list`; NotFoundError."""
        chosen = self.repositories.choose(repository)
        return _view(chosen, await self.repositories.ask(chosen, "show", backup=backup))

    # -- making --------------------------------------------------------------------------------------------------------

    async def create(
        self, partition: str, repository: str | None, *, consistent: bool = False, full: bool = False
    ) -> OperationView:
        """Begin to back a partition up; `full` reads everything again.

        Raises: NotFoundError; as `Repositories.choose`.
        """
        self._partitions.find(partition)
        chosen = self.repositories.choose(repository)

        async def work(operation: Operation) -> Mapping[str, object]:
            return await self._create(operation, partition, chosen, consistent=consistent, full=full)

        return await self._operations.start("backup.create", f"backup/{partition}", work, cancellable=True)

    async def _create(
        self, operation: Operation, name: str, repository: str, *, consistent: bool, full: bool
    ) -> Mapping[str, object]:
        partition = self._partitions.find(name)
        known = self._bases.get(base_key(name, repository))
        base = known[0] if known is not None and not full else None
        await self._drop_stale(name, repository, keep=base.checkpoint if base is not None else None)
        checkpoint = await self._checkpoints.make(
            operation.stage,
            name,
            f"backup-{repository}-{uuid.uuid4().hex[:6]}",
            consistent=consistent,
            description=f"of a backup to {repository}",
            schedule=f"{MARK}{repository}",
        )
        try:
            made = await self._store_disks(operation, partition, repository, checkpoint, base)
        except BaseException:
            with contextlib.suppress(NotFoundError):  # the partition was deleted meanwhile
                await asyncio.shield(self._checkpoints.remove(name, [checkpoint]))
            raise
        if all(partition is not one for one in self._partitions.all()):
            return _result(repository, made)  # deleted meanwhile: the backup is good, nothing builds on it
        await self._set_base(
            known[0] if known is not None else None, BackupBase(name, repository, made["id"], checkpoint.id)
        )
        await self._drop_stale(name, repository, keep=checkpoint.id)
        self._events.publish("backup.created", f"partition/{name}", {"backup": made["id"], "repository": repository})
        return _result(repository, made)

    async def _store_disks(
        self,
        operation: Operation,
        partition: Partition,
        repository: str,
        checkpoint: CheckpointRecord,
        base: BackupBase | None,
    ) -> Mapping[str, Any]:
        """Have a worker read the checkpoint into the repository; its manifest."""
        since = self._since(partition.name, base)
        async with self._checkpoints.reading(partition.name, checkpoint.id) as readable:
            disks = [
                {
                    "id": disk,
                    "top": one.files[0],
                    "folders": sorted({os.path.dirname(path) for path in one.files}),
                    "since": since.get(disk) if since.get(disk) in one.files else None,
                    "backing": one.backing,
                }
                for disk, one in readable.items()
            ]
            return await self.repositories.ask(
                repository,
                "backup",
                operation,
                partition=partition.name,
                partition_id=partition.record.uuid,
                definition=msgspec.json.encode(checkpoint.definition).decode(),
                base=base.backup if base is not None and since else None,
                notes={"consistency": checkpoint.consistency.value},
                disks=disks,
                blobs=_blobs(checkpoint),
            )

    def _since(self, partition: str, base: BackupBase | None) -> dict[str, str]:
        """For each disk the file above which lies what has changed since the base; nothing when that is gone."""
        if base is None:
            return {}
        with contextlib.suppress(NotFoundError):
            return {disk.id: disk.path for disk in self._checkpoints.find(partition, base.checkpoint).disks}
        return {}

    async def _drop_stale(self, partition: str, repository: str, *, keep: str | None, spare_read: bool = True) -> None:
        """Checkpoints of backups that nothing builds on: of the one before, and of those that were interrupted.

        One that somebody reads, as an export does, goes after the next backup. Raises: ConflictError for such a one
        when it is not spared.
        """
        for record in self._checkpoints.records(partition):
            if record.schedule != f"{MARK}{repository}" or record.id == keep:
                continue
            try:
                await self._checkpoints.remove(partition, [record])
            except ConflictError as error:
                if not spare_read:
                    raise
                log.info("checkpoint %s stays until the next backup: %s", record.name, error)
            except NotFoundError:
                log.info("checkpoint %s was deleted by somebody else", record.name)

    async def _set_base(self, before: BackupBase | None, base: BackupBase | None) -> None:
        key = before.key if before is not None else base.key if base is not None else ""
        known = self._bases.get(key)
        revision = await self._store.transact(
            [Condition(key, known[1] if known is not None else 0)],
            [Put(key, base.encode()) if base is not None else Delete(key)],
        )
        if base is not None:
            self._bases[key] = (base, revision)
        else:
            self._bases.pop(key, None)

    # -- keeping -------------------------------------------------------------------------------------------------------

    async def verify(self, repository: str | None, *, read_data: bool, part: tuple[int, int]) -> OperationView:
        """Begin to check a repository; `part` (number, of how many) reads the data of that share only."""
        chosen = self.repositories.choose(repository)

        async def work(operation: Operation) -> Mapping[str, object]:
            return await self.repositories.ask(chosen, "verify", operation, read_data=read_data, part=list(part))

        return await self._operations.start(
            "backup.verify", f"repository/{chosen}", work, cancellable=True, exclusive=False
        )

    async def repair(self, repository: str | None, *, read_data: bool, discard: bool) -> OperationView:
        """Begin to make a repository's index again, and to leave damaged packs behind; `discard` deletes those.

        Cancelled at any instant, it leaves the repository as it was or better.
        """
        chosen = self.repositories.choose(repository)

        async def work(operation: Operation) -> Mapping[str, object]:
            return await self.repositories.ask(chosen, "repair", operation, read_data=read_data, discard=discard)

        return await self._operations.start("backup.repair", f"repository/{chosen}", work, cancellable=True)

    async def prune(
        self,
        repository: str | None,
        *,
        partition: str | None,
        partition_id: str | None = None,
        keep: Mapping[str, int],
        forget: Sequence[str],
        dry_run: bool,
    ) -> OperationView:
        """Begin to forget backups: those that are named, or those that no rule of `keep` keeps.

        With `partition`, and more exactly with `partition_id`, only those of one partition are judged.
        Raises: as `Repositories.choose`; InvalidError unless it is one of the two.
        """
        chosen = self.repositories.choose(repository)
        if bool(forget) == any(keep.values()):
            raise InvalidError(
                "backups are forgotten by name, or by the rules that keep the others: one of the two",
                remedy="Give `forget`, or at least one rule of `keep`.",
                field="keep",
            )

        async def work(operation: Operation) -> Mapping[str, object]:
            return await self.repositories.ask(
                chosen,
                "prune",
                operation,
                partition=partition,
                partition_id=partition_id,
                keep=dict(keep),
                forget=list(forget),
                dry_run=dry_run,
                spared=[origin.backup for _, origin in self.homecomings.origins(chosen)],
            )

        return await self._operations.start("backup.prune", f"repository/{chosen}", work, cancellable=True)

    # -- restoring -----------------------------------------------------------------------------------------------------

    async def restore(
        self,
        repository: str | None,
        backup: str,
        *,
        name: str | None,
        disk: str | None,
        path: str | None,
        instant: bool = False,
    ) -> OperationView:
        """Begin to bring back a whole partition as a new one, or one disk into a new file.

        An `instant` one can be started at once; its blocks come home meanwhile, by another operation.
        Raises: as `show`; AlreadyExistsError; InvalidError.
        """
        chosen = self.repositories.choose(repository)
        if (disk is None and path is not None) or (disk is not None and (name is not None or instant)):
            raise InvalidError(
                "a whole partition has a name and may be instant, one disk has a path: not both",
                remedy="Give disk and path, or name and instant.",
                field="disk",
            )
        view = await self.show(chosen, backup)
        if disk is not None:
            if path is None or disk not in {one.id for one in view.disks}:
                raise InvalidError(
                    f"backup {view.id} has no disk {disk!r}" if path else "one disk needs a path to be restored to",
                    remedy=f"Its disks: {', '.join(one.id for one in view.disks)}; and give a new path.",
                    field="disk",
                )
            return await self._restore_disk(chosen, view, disk, self._disks.resolve(path))
        return await self._restore_partition(chosen, view, name or view.partition, instant=instant)

    async def _restore_disk(self, repository: str, view: BackupView, disk: str, path: str) -> OperationView:
        async def work(operation: Operation) -> Mapping[str, object]:
            try:
                await self._bring_back(operation, repository, view, {disk: path}, {}, is_noted=False)
            finally:
                _unlink(unfinished(path))
            return {"path": path}

        return await self._operations.start("backup.restore", f"disk/{path}", work, cancellable=True)

    async def _restore_partition(self, repository: str, view: BackupView, name: str, *, instant: bool) -> OperationView:
        if any(partition.name == name for partition in self._partitions.all()):
            raise AlreadyExistsError(
                f"there is a partition {name!r}",
                remedy="Give the restored one another name (--as), or delete that one first.",
            )
        definition = msgspec.json.decode(view.definition.encode(), type=PartitionDefinition)
        complete(msgspec.structs.replace(definition, name=name))  # the name becomes one of files before it is created
        paths = {disk.id: self._disks.resolve(f"{name}-{disk.id}") for disk in view.disks}
        attached = tuple(msgspec.structs.replace(disk, path=paths.get(disk.id, disk.path)) for disk in definition.disks)
        wanted = msgspec.structs.replace(
            definition,
            name=name,
            uuid=definition.uuid if name == view.partition else "",
            disks=attached,
            power=PowerState.STOPPED,
        )

        async def work(operation: Operation) -> Mapping[str, object]:
            folder = self._firmware_folder(name)
            for made in (os.path.dirname(folder), folder):
                os.makedirs(made, mode=0o750, exist_ok=True)
            os.makedirs(self._paths.disks, mode=0o750, exist_ok=True)
            blobs = {blob: f"{folder}/{blob}" for blob in view.blobs}
            is_made = is_left = False
            try:
                result: dict[str, object] = {"partition": name, "disks": paths}
                await self._bring_back(operation, repository, view, {} if instant else paths, blobs, is_noted=True)
                operation.point_of_no_return()  # files must not go while the store may have a partition of them
                if instant:
                    result["homecoming"] = await self.homecomings.create(wanted, view, paths)
                else:
                    await self._partitions.create(wanted)
                is_made = True
                if view.blobs:
                    await self._restore_firmware(self._partitions.find(name), folder)
            except asyncio.CancelledError:
                is_left = not operation.may_cancel  # the service ends: the next one sees whether the store has it
                raise
            finally:
                if not is_left:
                    await asyncio.to_thread(self._tidy, name, paths.values(), is_made=is_made)
            self._events.publish("backup.restored", f"partition/{name}", {"backup": view.id})
            return result

        return await self._operations.start("backup.restore", f"partition/{name}", work, cancellable=True)

    def _firmware_folder(self, name: str) -> str:
        """Where the firmware's state lies until the partition is there."""
        return f"{self._paths.partition(name).data}/{_FIRMWARE}"

    def _remove_firmware(self, name: str) -> None:
        """With the partition's folder, when nothing else has come to lie in it. Blocking; may be repeated."""
        folder = self._firmware_folder(name)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(folder))

    async def _bring_back(
        self,
        operation: Operation,
        repository: str,
        view: BackupView,
        disks: Mapping[str, str],
        blobs: Mapping[str, str],
        *,
        is_noted: bool,
    ) -> None:
        """Have a worker restore disks and blobs; the caller takes away what it leaves. Raises: as `_ask`."""
        request = {"backup": view.id, "disks": dict(disks), "blobs": dict(blobs), "is_noted": is_noted}
        await self.repositories.ask(repository, "restore", operation, **request)

    def _tidy(self, name: str, disks: Iterable[str], *, is_made: bool) -> None:
        """The end of a restore: notes go, and what they tell of where there is no partition."""
        for note in filter(os.path.lexists, map(unfinished, disks)):
            if is_made:
                os.unlink(note)
            else:
                give_up(note)
        self._remove_firmware(name)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _result(repository: str, made: Mapping[str, Any]) -> dict[str, object]:
    """What a backup's operation ends with."""
    return {
        "backup": made["id"],
        "repository": repository,
        "read_bytes": sum(disk["read_bytes"] for disk in made["disks"]),
        "new_bytes": made["new_bytes"],
    }


def _blobs(checkpoint: CheckpointRecord) -> dict[str, str]:
    """What a checkpoint has of a partition's firmware: files by their names."""
    folder = checkpoint.firmware
    return {} if folder is None else {name: f"{folder}/{name}" for name in sorted(os.listdir(folder))}


def _view(repository: str, fields: Mapping[str, Any]) -> BackupView:
    return msgspec.convert({**fields, "repository": repository}, BackupView)
