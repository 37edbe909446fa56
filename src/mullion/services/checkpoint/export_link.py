"""The parent's end of an exporter: it is started through the zygote, adopted by the next parent, asked and ended.

An exporter (`mullion.provider.exporter`) needs no parent. What leads back to it lies in a folder of its own, because it
may run while the partition does not: `ID.pid` (its identity), `ID.control`, and `ID.nbd`, where clients connect unless
they do so by TCP. A partition may have several, each under an id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from mullion.base.errors import AlreadyExistsError, InvalidError, MullionError
from mullion.base.paths import PartitionPaths
from mullion.base.pidfd import wait_process
from mullion.base.process import ProcessIdentity, read_identity
from mullion.provider.export_spec import ExportedDisk, ExportSpec
from mullion.services.partition.provider_link import ProviderFleet, ProviderLink
from mullion.wire.nbd.messages import DIRTY_BITMAP_PREFIX

log = logging.getLogger(__name__)

_STOP_DEADLINE_S: Final = 30.0
"""Clients are hung up on after ten seconds."""
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True, slots=True)
class Listener:
    """Where clients connect by TCP, and the folder of the certificates of `wire.nbd.tls`."""

    host: str
    port: int
    """0 is any that is free."""
    tls: str


@dataclass(frozen=True, slots=True)
class ExportedDiskState:
    """One disk of an export."""

    id: str
    uri: str
    """As nbdinfo, nbdcopy, qemu-img and libvirt take it."""
    size_bytes: int
    context: str | None
    """The metadata context that tells what has changed."""
    chain: tuple[str, ...]
    since: tuple[str, ...] | None
    backing: str | None


@dataclass(frozen=True, slots=True)
class ExportState:
    """What an exporter says of itself."""

    id: str
    pid: int
    uptime_s: float
    host: str | None
    port: int | None
    tls: str | None
    connections: int
    requests: int
    bytes_read: int
    errors: int
    disks: tuple[ExportedDiskState, ...]


class ExportLink:
    """One exporter of a partition, or the want of one."""

    def __init__(self, name: str, paths: PartitionPaths, export_id: str) -> None:
        """Raises: InvalidError for an id that is no file name."""
        if not _ID.fullmatch(export_id):
            raise InvalidError(
                f"an export cannot be called {export_id!r}",
                remedy="Use at most 40 letters, digits, dots, dashes and underscores.",
            )
        self._name = name
        self._paths = paths
        self.id = export_id

    def _file(self, kind: str) -> str:
        return f"{self._paths.export_dir}/{self.id}.{kind}"

    @property
    def identity(self) -> ProcessIdentity | None:
        """Of the exporter, when it is alive."""
        identity = read_identity(self._file("pid"))
        return identity if identity is not None and identity.is_alive else None

    async def start(
        self,
        fleet: ProviderFleet,
        disks: Sequence[ExportedDisk],
        *,
        listener: Listener | None = None,
        run_as: tuple[int, int] | None = None,
    ) -> ExportState:
        """Start it and return when it serves; by default on a unix socket.

        Every file of the disks has to stay as it is, and where it is opened from, until the exporter has opened it; the
        tops, also of `since`, until it has ended. Raises: AlreadyExistsError while one of that id runs; what
        `ProviderFleet.spawn_export` raises.
        """
        if self.identity is not None:
            raise AlreadyExistsError(
                f"{self._name}: export {self.id} is there already", remedy="End it first, or choose another name."
            )
        await asyncio.to_thread(self._make_folders)
        uid, gid = run_as or (None, None)
        spec = ExportSpec(
            self._name,
            tuple(disks),
            control=self._file("control"),
            identity=self._file("pid"),
            log=self._paths.export_log,
            unix=self._file("nbd") if listener is None else None,
            host=None if listener is None else listener.host,
            port=0 if listener is None else listener.port,
            tls=None if listener is None else listener.tls,
            uid=uid,
            gid=gid,
        )
        await fleet.spawn_export(spec.to_wire())
        return await self._ask()

    def _make_folders(self) -> None:
        os.makedirs(self._paths.export_dir, mode=0o750, exist_ok=True)
        os.makedirs(self._paths.data, mode=0o750, exist_ok=True)

    async def status(self) -> ExportState | None:
        """What it says of itself; None when there is none, or it cannot be asked: it has just ended, as a rule."""
        if self.identity is None:
            return None
        try:
            return await self._ask()
        except MullionError as error:
            log.warning("%s: the exporter of %s cannot be asked: %s", self._name, self.id, error)
            return None

    async def _ask(self) -> ExportState:
        link = ProviderLink(self._file("control"), lambda _event: None)
        await link.open()
        try:
            said = await link.request("status")
        finally:
            await link.close()
        disks = tuple(
            ExportedDiskState(
                str(disk["id"]),
                self._uri(str(disk["id"]), said["host"], said["port"]),
                int(disk["size_bytes"]),
                None if disk["bitmap"] is None else DIRTY_BITMAP_PREFIX + str(disk["bitmap"]),
                tuple(map(str, disk["chain"])),
                None if disk["since"] is None else tuple(map(str, disk["since"])),
                disk["backing"],
            )
            for disk in said["disks"]
        )
        return ExportState(
            id=self.id,
            pid=int(said["pid"]),
            uptime_s=float(said["uptime_s"]),
            host=said["host"],
            port=said["port"],
            tls=said["tls"],
            connections=int(said["connections"]),
            requests=int(said["requests"]),
            bytes_read=int(said["bytes_read"]),
            errors=int(said["errors"]),
            disks=disks,
        )

    def _uri(self, disk: str, host: str | None, port: int | None) -> str:
        if host is None:
            return f"nbd+unix:///{quote(disk, safe='')}?socket={quote(self._file('nbd'), safe='/')}"
        return f"nbds://{f'[{host}]' if ':' in host else host}:{port}/{quote(disk, safe='')}"

    async def stop(self) -> None:
        """End the exporter, hang up on its clients, and remove what leads to it; may be called again."""
        identity = self.identity
        if identity is not None and identity.send_signal(signal.SIGTERM):
            try:
                async with asyncio.timeout(_STOP_DEADLINE_S):
                    await wait_process(identity)
            except TimeoutError:
                log.error("%s: the exporter of %s did not end in time; killed", self._name, self.id)
                identity.send_signal(signal.SIGKILL)
                await wait_process(identity)
        for kind in ("pid", "control", "nbd"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._file(kind))


def find_exports(name: str, paths: PartitionPaths) -> list[ExportLink]:
    """The exporters that are alive, also those of an earlier parent."""
    try:
        found = sorted(os.listdir(paths.export_dir))
    except FileNotFoundError:
        return []
    ids = [entry.removesuffix(".pid") for entry in found if entry.endswith(".pid")]
    links = [ExportLink(name, paths, export_id) for export_id in ids if _ID.fullmatch(export_id)]
    return [link for link in links if link.identity is not None]
