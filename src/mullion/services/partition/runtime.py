"""One partition's processes: what they are now, and the acts that the plan's steps stand for.

A runtime holds connections, never truth: it can be dropped at any instant and made again by `adopt`.
Whatever it notices (an end, a QMP event, a provider's word) it only says to `wake`; the controller looks and plans.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from mullion.base.errors import MullionError, UnavailableError
from mullion.base.paths import PartitionPaths
from mullion.base.pidfd import wait_process
from mullion.base.process import ProcessIdentity, read_identity, write_identity
from mullion.base.units import MIB
from mullion.hypervisor import ExitReport, Machine, MachineSpec
from mullion.hypervisor.errors import MachineGoneError
from mullion.hypervisor.launch import log_excerpt, read_exit_status
from mullion.model.definition import Bus, PartitionDefinition, Transport
from mullion.model.states import PartitionState
from mullion.services.partition.provider_link import ProviderFleet, ProviderLink
from mullion.services.partition.record import GuestStatus, Observed

log = logging.getLogger(__name__)

_KILL_DEADLINE_S: Final = 10.0
_FLUSH_DEADLINE_S: Final = 120.0
_LINK_RETRY_S: Final = 0.2
_ROOM_POLL_S: Final = 0.5
_ROOM_BYTES: Final = 16 * MIB
_IO_RETRY_S: Final = 10.0
"""Failed I/O of an unknown reason is tried again after this time."""


@dataclass(frozen=True, slots=True)
class PreparedDisk:
    """A disk of the definition, found: its chain of files, top first."""

    id: str
    bus: Bus
    read_only: bool
    chain: tuple[str, ...]
    transport: Transport


@dataclass(frozen=True, slots=True)
class Stall:
    """Why a disk cannot go on. `by_provider`: the provider repeats the request; otherwise QEMU does, on `cont`."""

    reason: str
    by_provider: bool = False


@dataclass(slots=True)
class GuestFacts:
    """What was learnt of the guest since it was let run."""

    released_s: float | None = None  # time.monotonic() when it was let go
    boot_s: float | None = None
    agent_answers: bool = False
    addresses: tuple[str, ...] = ()


@dataclass(slots=True)
class Runtime:
    """The processes of one partition, as far as this parent is connected to them."""

    name: str
    paths: PartitionPaths
    wake: Callable[[], None] = lambda: None
    machine: Machine | None = None
    provider: ProcessIdentity | None = None
    link: ProviderLink | None = None
    disks: tuple[PreparedDisk, ...] = ()
    stalls: dict[str, Stall] = field(default_factory=dict)
    guest: GuestFacts = field(default_factory=GuestFacts)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    # -- looking -------------------------------------------------------------------------------------------------------

    async def observe(self, definition: PartitionDefinition) -> Observed:
        """Look at the processes now."""
        return Observed(
            guest=await self._guest_status(),
            provider_alive=self.provider is not None and self.provider.is_alive,
            needs_provider=bool(definition.disks),
            is_stalled=bool(self.stalls),
        )

    async def _guest_status(self) -> GuestStatus:
        if self.machine is None or self.machine.exit_report is not None:
            return GuestStatus.ABSENT
        try:
            status = await self.machine.state()
        except MachineGoneError:
            return GuestStatus.ABSENT
        if status.reason == "io-error":
            await self._note_io_error()
        match status.state:
            case PartitionState.RUNNING:
                return GuestStatus.RUNNING
            case PartitionState.STOPPED:
                return GuestStatus.POWERED_OFF
            case PartitionState.FAILED:
                return GuestStatus.PANICKED
            case _:
                return GuestStatus.PRELAUNCH if status.reason == "not-begun" else GuestStatus.PAUSED

    async def adopt(self, uuid: str) -> ExitReport | None:
        """Connect to whatever of this partition still runs.

        Answers with how QEMU ended when it ran once and does not any more.
        """
        provider = read_identity(self.paths.provider_identity)
        if provider is not None and provider.is_alive:
            self._hold_provider(provider)
        qemu = read_identity(self.paths.qemu_identity)
        if qemu is None:
            return None
        if not qemu.is_alive:
            return self._past_end()
        try:
            machine = await Machine.adopt(self.paths, qemu, uuid)
        except MachineGoneError:
            return self._past_end()
        self._hold_machine(machine)
        return None

    def _past_end(self) -> ExitReport:
        """How a QEMU ended that nobody watched."""
        return ExitReport(read_exit_status(self.paths.exit_file), log_excerpt(self.paths.qemu_log))

    async def release(self) -> None:
        """Let go of the connections; the processes run on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.link is not None:
            await self.link.close()
            self.link = None
        if self.machine is not None:
            await self.machine.close()
            self.machine = None

    def run(self, work: Coroutine[Any, Any, None], what: str) -> None:
        """A task that ends with this runtime; its fault is logged, not lost."""
        task = asyncio.create_task(work, name=f"{self.name}: {what}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: %s", task.get_name(), error, exc_info=error)

    # -- the provider --------------------------------------------------------------------------------------------------

    async def start_provider(self, fleet: ProviderFleet, spec: Mapping[str, Any]) -> None:
        """Start the provider and keep its identity.

        Raises: what `ProviderFleet.spawn` raises.
        """
        identity = await fleet.spawn(spec)
        write_identity(self.paths.provider_identity, identity)
        self._hold_provider(identity)

    def _hold_provider(self, identity: ProcessIdentity) -> None:
        self.provider = identity
        self.run(self._watch_provider(identity), "provider's end")
        self.run(self._connect_provider(identity), "provider's link")

    async def _watch_provider(self, identity: ProcessIdentity) -> None:
        await wait_process(identity)
        if self.provider == identity:
            log.warning("%s: the provider (pid %d) has ended", self.name, identity.pid)
            self.provider = None
            self.wake()

    async def _connect_provider(self, identity: ProcessIdentity) -> None:
        while self.provider == identity and identity.is_alive:
            link = ProviderLink(self.paths.provider_control, self._provider_said)
            try:
                await link.open()
                status = await link.request("status")
            except MullionError as error:
                log.warning("%s: %s", self.name, error)
                await link.close()
                await asyncio.sleep(_LINK_RETRY_S)
                continue
            self.link = link
            for disk in status.get("disks", ()):
                if disk.get("state") == "no_space":
                    self._stalled(disk["id"], disk)
            return

    def _provider_said(self, event: Mapping[str, Any] | None) -> None:
        match event:
            case None:
                self.link = None
            case {"event": "no_space", "disk": disk}:
                self._stalled(disk, event)
            case {"event": "space", "disk": disk}:
                self.stalls.pop(disk, None)
        self.wake()

    # -- disks that cannot go on ---------------------------------------------------------------------------------------

    def _stalled(self, disk_id: str, said: Mapping[str, Any]) -> None:
        """The provider holds a write until there is room; it tells when the write has gone through."""
        self.stalls[disk_id] = Stall(str(said.get("reason") or "no space left"), by_provider=True)
        self.wake()

    async def _note_io_error(self) -> None:
        """QEMU has stopped the guest because requests of a disk failed; `cont` repeats them. See to it that it comes.

        The state survives us: a parent that adopts such a guest finds it in `query-block` again.
        """
        if any(not stall.by_provider for stall in self.stalls.values()):
            return
        blocks = await self._machine().execute("query-block")
        found = {}
        for block in blocks if isinstance(blocks, list) else ():
            if block.get("io-status") in ("nospace", "failed"):
                disk_id = str(block.get("qdev", "")).rpartition("/peripheral/disk-")[2].partition("/")[0]
                found[disk_id] = Stall("no space left" if block["io-status"] == "nospace" else "I/O error")
        self.stalls |= found or {"": Stall("I/O error")}
        self.run(self._retry_io(), "retry of failed I/O")

    async def _retry_io(self) -> None:
        """Let the guest go on when there is room again, or every now and then when the reason is another."""
        waited_s = 0.0
        while self.machine is not None and self.machine.exit_report is None:
            await asyncio.sleep(_ROOM_POLL_S)
            waited_s += _ROOM_POLL_S
            lacks_space = any(stall.reason == "no space left" for stall in self.stalls.values())
            if (lacks_space and self._has_room()) or waited_s >= _IO_RETRY_S:
                self.stalls = {disk: stall for disk, stall in self.stalls.items() if stall.by_provider}
                self.wake()
                return

    def _has_room(self) -> bool:
        """Whether every writable disk's filesystem has room for a few new blocks."""
        tops = [disk.chain[0] for disk in self.disks if not disk.read_only]
        return all(st.f_bavail * st.f_frsize >= _ROOM_BYTES for st in map(os.statvfs, tops))

    async def stop_provider(self) -> None:
        """Have the provider flush and end; killed when it does not (what was flushed is safe either way)."""
        identity, self.provider = self.provider, None
        self.stalls.clear()
        if self.link is not None:
            await self.link.close()
            self.link = None
        if identity is None:
            return
        if identity.send_signal(signal.SIGTERM):
            try:
                await asyncio.wait_for(wait_process(identity), _FLUSH_DEADLINE_S)
            except TimeoutError:
                log.error("%s: the provider did not end within %g s; killed", self.name, _FLUSH_DEADLINE_S)
                identity.send_signal(signal.SIGKILL)
                await asyncio.wait_for(wait_process(identity), _KILL_DEADLINE_S)

    # -- QEMU ----------------------------------------------------------------------------------------------------------

    async def start_machine(self, spec: MachineSpec) -> None:
        """Start QEMU with its processors stopped. Raises: StartFailedError, MissingToolError."""
        self.guest = GuestFacts()
        self._hold_machine(await Machine.start(spec))

    def _hold_machine(self, machine: Machine) -> None:
        self.machine = machine
        machine.subscribe(lambda _event: self.wake())
        self.run(self._watch_machine(machine), "QEMU's end")

    async def _watch_machine(self, machine: Machine) -> None:
        await machine.wait_exit()
        if self.machine is machine:
            self.wake()

    async def resume(self) -> None:
        machine = self._machine()
        if self.guest.released_s is None:
            self.guest.released_s = time.monotonic()
        await machine.resume()

    async def pause(self) -> None:
        await self._machine().pause()

    async def quit_machine(self) -> ExitReport | None:
        """End QEMU. Answers how it ended."""
        machine, self.machine = self.machine, None
        if machine is None:
            return None
        report = await machine.quit()
        await machine.close()
        return report

    async def drop_machine(self) -> ExitReport | None:
        """Forget a QEMU that has ended by itself."""
        machine, self.machine = self.machine, None
        if machine is None:
            return None
        report = await machine.wait_exit()
        await machine.close()
        return report

    def _machine(self) -> Machine:
        if self.machine is None:
            raise UnavailableError(f"partition {self.name} has no QEMU", remedy="Start it first.")
        return self.machine

    # -- files ---------------------------------------------------------------------------------------------------------

    def clean(self) -> None:
        """Remove sockets, identities and all else that the processes left in the run folder.

        Pending logs stay: they hold what was acknowledged and not flushed when a provider was killed.
        """
        try:
            entries = list(os.scandir(self.paths.run))
        except FileNotFoundError:
            return
        for entry in entries:
            if entry.path == self.paths.pending_dir:
                with contextlib.suppress(OSError):
                    os.rmdir(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)
        with contextlib.suppress(OSError):
            os.rmdir(self.paths.run)
