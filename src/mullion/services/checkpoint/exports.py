"""Checkpoints offered to other programs over NBD: which ones, where, and for how long their files stay as they are.

An exporter outlives the service. The next one adopts it before any layer is merged: what an exporter reads is held, as
a backup's files are, until it has ended, by whatever cause.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Final

from mullion.base.errors import InvalidError, NotFoundError
from mullion.base.paths import HostPaths
from mullion.base.pidfd import wait_process
from mullion.model.views import ExportedDiskView, ExportView
from mullion.parent.events import Events
from mullion.provider.export_spec import ExportedDisk
from mullion.services.checkpoint.backings import ReadableDisk
from mullion.services.checkpoint.certificates import CLIENT_FOLDER, ensure_certificates
from mullion.services.checkpoint.controller import CheckpointController
from mullion.services.checkpoint.export_link import ExportLink, ExportState, Listener, find_exports
from mullion.services.partition.controller import PartitionController
from mullion.services.partition.partition import Partition

log = logging.getLogger(__name__)

_PORT_LIMIT: Final = 65535


class CheckpointExports:
    """The exporters of this host. `open` before the checkpoints are opened."""

    def __init__(
        self, *, checkpoints: CheckpointController, partitions: PartitionController, events: Events, paths: HostPaths
    ) -> None:
        self._checkpoints = checkpoints
        self._partitions = partitions
        self._events = events
        self._paths = paths
        self._watches: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def open(self) -> None:
        """Adopt what runs."""
        for partition in self._partitions.all():
            for link in await asyncio.to_thread(find_exports, partition.name, partition.runtime.paths):
                state = await link.status()
                if state is not None:
                    self._watch(partition, link, state)
        self._partitions.on_deleted.append(self._end_all)

    async def close(self) -> None:
        """Let go; exporters go on."""
        for task in self._watches.values():
            task.cancel()
        await asyncio.gather(*self._watches.values(), return_exceptions=True)

    async def start(
        self, name: str, checkpoint: str, *, since: str | None, listen: str | None, tls: str | None
    ) -> ExportView:
        """Offer a checkpoint's disks; with `since` also what has changed since that one, as a dirty bitmap.

        Without `listen` (HOST:PORT, port 0 for any) on a unix socket. With it by TLS only: with the certificates in the
        folder `tls`, or with some that are made for it. Raises: NotFoundError; InvalidError; AlreadyExistsError.
        """
        partition = self._partitions.find(name)
        record = self._checkpoints.find(name, checkpoint)
        listener = await self._listener(listen, tls)
        link = ExportLink(name, partition.runtime.paths, record.name)
        async with contextlib.AsyncExitStack() as stack:
            readable = await stack.enter_async_context(self._checkpoints.reading(name, record.id))
            before: Mapping[str, ReadableDisk] = {}
            bitmap = None
            if since is not None:
                older = self._checkpoints.find(name, since)
                before = await stack.enter_async_context(self._checkpoints.reading(name, older.id))
                bitmap = f"since-{older.name}"
            disks = []
            for disk, one in readable.items():
                known = before.get(disk)
                if since is not None and (known is None or known.files[0] not in one.files):
                    raise InvalidError(
                        f"disk {disk} of checkpoint {record.name} was not made from that of {since}",
                        remedy=f"Choose an earlier one of the same branch: mullion checkpoint list {name}",
                    )
                older_files = known.files if known is not None and bitmap else None
                disks.append(ExportedDisk(disk, one.files, older_files, bitmap, one.backing))
            state = await link.start(
                partition.surroundings.fleet, disks, listener=listener, run_as=partition.record.run_as
            )
            self._watch(partition, link, state)
        self._events.publish("checkpoint.exported", f"partition/{name}", {"checkpoint": record.name})
        return self._view(name, state)

    async def _listener(self, listen: str | None, tls: str | None) -> Listener | None:
        if listen is None:
            if tls is not None:
                raise InvalidError("certificates without an address", remedy="Give --listen HOST:PORT with --tls.")
            return None
        host, _, port = listen.rpartition(":")
        host = host.strip("[]")
        if not host or not port.isdecimal() or int(port) > _PORT_LIMIT:
            raise InvalidError(f"{listen!r} is not HOST:PORT", remedy="Write 192.0.2.7:10809, or [2001:db8::1]:0.")
        folder = tls if tls is not None else f"{self._paths.secrets}/export-tls"
        if tls is None:
            await asyncio.to_thread(ensure_certificates, folder, [host])
        elif not os.path.isabs(folder) or not os.path.isdir(folder):
            raise InvalidError(
                f"there is no folder {folder}", remedy="Give the absolute path of one, or leave it away."
            )
        return Listener(host, int(port), folder)

    async def list(self) -> tuple[ExportView, ...]:
        """What is offered now."""
        found = []
        for name, export in sorted(self._watches):
            state = await ExportLink(name, self._partitions.find(name).runtime.paths, export).status()
            if state is not None:
                found.append(self._view(name, state))
        return tuple(found)

    async def stop(self, name: str, export: str) -> None:
        """End one; its clients are hung up on. Raises: NotFoundError."""
        partition = self._partitions.find(name)
        if (name, export) not in self._watches:
            raise NotFoundError(
                f"partition {name} has no export {export!r}", remedy="List them: mullion checkpoint exports"
            )
        await ExportLink(name, partition.runtime.paths, export).stop()
        await asyncio.gather(self._watches[name, export], return_exceptions=True)

    async def _end_all(self, partition: Partition) -> None:
        for name, export in [key for key in self._watches if key[0] == partition.name]:
            await ExportLink(name, partition.runtime.paths, export).stop()

    def _watch(self, partition: Partition, link: ExportLink, state: ExportState) -> None:
        """Hold what it reads until it has ended."""
        tops = [chain[0] for disk in state.disks for chain in (disk.chain, disk.since) if chain is not None]
        self._checkpoints.hold(tops)
        is_backed = any(disk.backing is not None for disk in state.disks)
        if is_backed:
            self._checkpoints.backings.hold(partition.name)
        key = (partition.name, link.id)
        ending = self._until_end(key, link, tops, is_backed=is_backed)
        task = asyncio.create_task(ending, name=f"export {partition.name}/{link.id}")
        self._watches[key] = task

    async def _until_end(self, key: tuple[str, str], link: ExportLink, tops: Sequence[str], *, is_backed: bool) -> None:
        identity = link.identity
        if identity is not None:
            await wait_process(identity)
        del self._watches[key]
        self._checkpoints.release(tops)
        if is_backed:
            self._checkpoints.backings.release(key[0])
        self._events.publish("checkpoint.export-ended", f"partition/{key[0]}", {"export": key[1]})

    def _view(self, name: str, state: ExportState) -> ExportView:
        return ExportView(
            id=state.id,
            partition=name,
            pid=state.pid,
            address=None if state.host is None else f"{state.host}:{state.port}",
            tls=state.tls,
            client_certificates=None if state.tls is None else f"{state.tls}/{CLIENT_FOLDER}",
            connections=state.connections,
            bytes_read=state.bytes_read,
            disks=tuple(ExportedDiskView(disk.id, disk.uri, disk.size_bytes, disk.context) for disk in state.disks),
        )
