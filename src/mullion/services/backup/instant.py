"""Partitions that start before their blocks are there: these come home from the backup while the guest runs.

    NAME-disk0.vhd        empty at first: the definition's file, where what comes home is put, block by block
    NAME-disk0-….avhd     the head over it: what the guest writes

What neither has the provider reads from the backup's disk (`provider.backing`), which a server offers (`server`). When
all of it is there, durable: the record says so ─► the provider lets go of the backup ─► the server ends, when nobody
else reads there (`checkpoint.backings`) ─► the head is merged as after any checkpoint.

Meanwhile there may be checkpoints and all that is made of them: what is frozen lies above the definition's file, whose
content, with the backup below it, stays the same.

A crash anywhere goes on: what came home is in the file, the record says what is missing, the provider waits for a
server, and this operation, which is resumed, starts one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import signal
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

import msgspec

from mullion.base.errors import AlreadyExistsError, MullionError, OperationFailedError, UnavailableError
from mullion.base.paths import HostPaths
from mullion.base.pidfd import wait_process
from mullion.base.process import Spawned, read_identity
from mullion.host import make_folder
from mullion.model.definition import PartitionDefinition
from mullion.model.states import OperationState
from mullion.model.views import BackupDiskView, BackupView
from mullion.parent.events import Events
from mullion.parent.operations import Operation, Operations
from mullion.services.backup.record import note_files, unfinished
from mullion.services.backup.repositories import RepositorySource
from mullion.services.backup.worker_link import start_server
from mullion.services.checkpoint.controller import CheckpointController
from mullion.services.partition.controller import PartitionController
from mullion.services.partition.partition import Partition
from mullion.services.partition.record import BackupOrigin, DiskLayers
from mullion.vhd import create_differencing, create_dynamic
from mullion.vhd.storage import storage_explained

log = logging.getLogger(__name__)

KIND: Final = "backup.homecoming"
_PREFIX: Final = "homecoming/"
_POLL_S: Final = 0.25
_RETRY_S: Final = 2.0
_START_S: Final = 300.0
"""A repository may be far away, and its index long."""
_STOP_S: Final = 15.0
"""It waits for what it is reading; nobody waits for that any more."""


class Homecomings:
    """The partitions that were restored instantly and are not whole yet. `source` is where a repository is."""

    def __init__(
        self,
        *,
        operations: Operations,
        events: Events,
        paths: HostPaths,
        partitions: PartitionController,
        checkpoints: CheckpointController,
        source: Callable[[str | None], RepositorySource],
    ) -> None:
        self._operations = operations
        self._events = events
        self._paths = paths
        self._partitions = partitions
        self._checkpoints = checkpoints
        self._source = source
        self._servers: dict[str, Spawned] = {}
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """Who starts or ends a partition's server."""
        self._keeping: dict[str, asyncio.Task[None]] = {}

    def open(self) -> None:
        """After a crash the operations go on."""
        self._operations.register_resume(KIND, self._follow)
        self._checkpoints.backings.serve = self._serve_readers

    async def close(self) -> None:
        """Let go of the servers; they go on."""
        for task in self._keeping.values():
            task.cancel()
        await asyncio.gather(*self._keeping.values(), return_exceptions=True)

    async def resume(self) -> None:
        """Begin what a crash kept from beginning."""
        for partition in self._partitions.all():
            if partition.record.origin is not None:
                self._keep(partition)
            running = self._operations.list(target=f"{_PREFIX}{partition.name}", state=OperationState.RUNNING)
            if partition.record.coming_home and not running:
                await self._begin(partition.name)

    def origins(self, repository: str) -> list[tuple[str, BackupOrigin]]:
        """The partitions whose blocks come from a repository, and from which backup."""
        return [
            (partition.name, partition.record.origin)
            for partition in self._partitions.all()
            if partition.record.origin is not None and partition.record.origin.repository == repository
        ]

    async def _begin(self, name: str) -> str:
        return (await self._operations.start(KIND, f"{_PREFIX}{name}", self._follow)).id

    async def create(self, wanted: PartitionDefinition, view: BackupView, disks: Mapping[str, str]) -> str:
        """Make a partition whose disks are a backup's; the operation that brings them home.

        Notes of the files that are made for it stay beside its disks (`note_files`) for the caller to take away. When
        it is cancelled the files stay too, for the store may have the partition or not.
        Raises: AlreadyExistsError; NoSpaceError; what making a partition raises.
        """
        layers: dict[str, DiskLayers] = {}
        made: list[str] = []
        try:
            for disk in view.disks:
                base = disks[disk.id]
                await asyncio.to_thread(_check_free, base)
                head = f"{os.path.splitext(base)[0]}-{secrets.token_hex(4)}.avhd"
                await asyncio.to_thread(note_files, base, (base, head))
                await asyncio.to_thread(_make_files, base, head, disk, made)
                layers[disk.id] = DiskLayers(head, {base: None, head: base}, is_coming_home=True)
            origin = BackupOrigin(view.repository, view.id, tuple(disks))
            await self._partitions.create(wanted, layers=layers, origin=origin)
        except Exception:
            for path in (*made, *map(unfinished, disks.values())):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            raise
        return await self._begin(wanted.name)

    # -- the operation -------------------------------------------------------------------------------------------------

    async def _follow(self, operation: Operation) -> Mapping[str, object]:
        """Keep a server for the partition while it runs, until all is home."""
        name = operation.target.removeprefix(_PREFIX)
        partition = next((one for one in self._partitions.all() if one.name == name), None)
        if partition is None:
            _gone(name)
        while not await self._turn(operation, partition):
            await asyncio.sleep(_POLL_S)
            if not self._is_there(partition):
                await self._end_server(partition)
                _gone(name)
        await self._let_go(partition)
        self._checkpoints.wake(partition)
        self._events.publish("backup.home", f"partition/{name}")
        return {"partition": name}

    def _is_there(self, partition: Partition) -> bool:
        return any(partition is one for one in self._partitions.all())

    async def _turn(self, operation: Operation, partition: Partition) -> bool:
        """Do what can be done now; whether all is home, and nobody reads the backup any more."""
        try:
            if not partition.has_processes():
                if not self._checkpoints.backings.is_used(partition.name):
                    await self._end_server(partition)
                operation.stage("waiting until the partition is started")
                return not partition.record.coming_home
            if partition.record.coming_home:
                await self._ensure_server(partition)
            link = partition.runtime.link
            if link is None:
                return False
            backings = {disk["id"]: disk["backing"] for disk in (await link.request("status"))["disks"]}
            reading = {disk: backing for disk, backing in backings.items() if backing is not None}
            for disk in [disk for disk, backing in reading.items() if backing["is_home"]]:
                await self._come_home(partition, disk)
                del reading[disk]
            reasons = [str(backing["reason"]) for backing in reading.values() if backing["reason"]]
            partition.runtime.waits_for_backup = reasons[0] if reasons else None
            if reading:
                _say(operation, reading)
            return not reading and not partition.record.coming_home
        except (MullionError, OSError) as error:
            why = error.message if isinstance(error, MullionError) else str(error)
            partition.runtime.waits_for_backup = why
            operation.stage(f"waiting: {why}")
            return False

    async def _come_home(self, partition: Partition, disk: str) -> None:
        """All of a disk is there: first the record says so, then the provider reads on without the backup."""
        async with partition.lock:
            if disk in partition.record.coming_home:
                layers = dict(partition.record.layers)
                layers[disk] = msgspec.structs.replace(layers[disk], is_coming_home=False)
                await partition.save(layers=layers)
            if partition.runtime.link is not None:
                await partition.runtime.link.request("release-backing", disk=disk)

    # -- readers of frozen layers --------------------------------------------------------------------------------------

    async def _serve_readers(self, partition: Partition) -> Mapping[str, str]:
        """Where they read what no file has, until none is left. Raises: as `_ensure_server`."""
        self._keep(partition)  # first: when this fails, and all is home meanwhile, somebody must forget the backup
        await self._ensure_server(partition)
        return {disk: partition.runtime.paths.backing(disk) for disk in partition.record.coming_home}

    def _keep(self, partition: Partition) -> None:
        if partition.name not in self._keeping:
            task = asyncio.create_task(self._keep_server(partition), name=f"readers of {partition.name}'s backup")
            self._keeping[partition.name] = task

    async def _keep_server(self, partition: Partition) -> None:
        """Until nobody reads any more; then it ends, if the partition does not need it either."""
        try:
            while True:
                await self._await_readers(partition)
                if not partition.record.coming_home or not partition.has_processes():
                    await self._let_go(partition)
                if not self._checkpoints.backings.is_used(partition.name):  # else somebody came meanwhile
                    return
        finally:
            del self._keeping[partition.name]  # at once: who comes from now on begins another

    async def _await_readers(self, partition: Partition) -> None:
        """Keep a server until nobody reads any more."""
        while self._checkpoints.backings.is_used(partition.name):
            try:
                await self._ensure_server(partition)
            except (MullionError, OSError) as error:
                log.warning("%s: its readers wait for backup: %s", partition.name, error)
                await asyncio.sleep(_RETRY_S)
            await asyncio.sleep(_POLL_S)

    async def _let_go(self, partition: Partition) -> None:
        """End the server when nobody reads there, and forget the backup when nobody ever will."""
        if self._checkpoints.backings.is_used(partition.name):
            return
        await self._end_server(partition)
        if not partition.record.coming_home and self._is_there(partition):
            async with partition.lock:
                await partition.save(origin=None)

    # -- the server ----------------------------------------------------------------------------------------------------

    async def _ensure_server(self, partition: Partition) -> None:
        """One that is alive; an earlier service's is taken over. Raises: what keeps it from starting."""
        async with self._turns[partition.name]:
            if not self._is_alive(partition):
                await self._start_server(partition)

    async def _start_server(self, partition: Partition) -> None:
        paths = partition.runtime.paths
        origin = partition.record.origin
        assert origin is not None, "blocks are missing"
        uid, gid = partition.record.run_as or (None, None)
        await asyncio.to_thread(make_folder, paths.backing_dir, 0o750, group=gid)
        request = {
            "action": "serve",
            **self._source(origin.repository)._asdict(),
            "backup": origin.backup,
            "disks": {disk: paths.backing(disk) for disk in origin.disks or partition.record.coming_home},
            "identity": paths.backup_server_identity,
            "uid": uid,
            "gid": gid,
        }
        try:
            async with asyncio.timeout(_START_S):
                self._servers[partition.name] = await start_server(request, self._paths.log)
        except TimeoutError as error:
            raise UnavailableError(
                f"repository {origin.repository} did not give backup {origin.backup} within {_START_S:g} s",
                remedy="Look after the way to it; it is tried again.",
            ) from error
        log.info("%s: a server of backup %s is there", partition.name, origin.backup)

    def _is_alive(self, partition: Partition) -> bool:
        process = self._servers.get(partition.name)
        if process is not None and process.poll() is not None:  # which also reaps it
            del self._servers[partition.name]
        identity = read_identity(partition.runtime.paths.backup_server_identity)
        return identity is not None and identity.is_alive

    async def _end_server(self, partition: Partition) -> None:
        """End it, if there is one, and remove what leads to it."""
        async with self._turns[partition.name]:
            if partition.name not in self._servers and not os.path.exists(partition.runtime.paths.backing_dir):
                return
            identity = read_identity(partition.runtime.paths.backup_server_identity)
            if identity is not None and identity.send_signal(signal.SIGTERM):
                try:
                    async with asyncio.timeout(_STOP_S):
                        await wait_process(identity)
                except TimeoutError:
                    log.warning("%s: the server of its backup did not end in time; killed", partition.name)
                    identity.send_signal(signal.SIGKILL)
            await asyncio.to_thread(shutil.rmtree, partition.runtime.paths.backing_dir, ignore_errors=True)
            process = self._servers.pop(partition.name, None)
            if process is not None:
                await asyncio.to_thread(process.wait)


def _say(operation: Operation, reading: Mapping[str, Mapping[str, Any]]) -> None:
    reasons = [str(backing["reason"]) for backing in reading.values() if backing["reason"]]
    total = sum(backing["total_bytes"] for backing in reading.values())
    done = sum(backing["done_bytes"] for backing in reading.values())
    what = f"waiting: {reasons[0]}" if reasons else f"{', '.join(reading)} coming home"
    operation.stage(what, done / total if total else None)


def _check_free(base: str) -> None:
    """Before a file is noted as ours, which a crash removes. Raises: AlreadyExistsError."""
    if os.path.lexists(base):
        raise AlreadyExistsError(
            f"{base} exists already", remedy="Restore under another name (--as), or move that file away.", path=base
        )


def _make_files(base: str, head: str, disk: BackupDiskView, made: list[str]) -> None:
    """The two files of a disk; `made` gets what is there."""
    with storage_explained(base):
        create_dynamic(base, disk.size_bytes)
        made.append(base)
        create_differencing(head, base)
        made.append(head)


def _gone(name: str) -> NoReturn:
    raise OperationFailedError(
        f"partition {name} was deleted before all of its blocks were there",
        remedy="The backup is whole: restore it again (mullion backup restore).",
    )
