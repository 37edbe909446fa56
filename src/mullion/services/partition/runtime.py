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
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from mullion.base.errors import MullionError, UnavailableError
from mullion.base.paths import PartitionPaths
from mullion.base.peer import peer_of
from mullion.base.pidfd import wait_process
from mullion.base.process import ProcessIdentity, Spawned, read_identity, write_identity
from mullion.hypervisor import ExitReport, Machine, MachineSpec
from mullion.hypervisor.errors import MachineGoneError
from mullion.hypervisor.launch import log_excerpt, read_exit_status
from mullion.hypervisor.tpm import start_tpm
from mullion.model.definition import PartitionDefinition, Transport
from mullion.model.states import PartitionState
from mullion.services.disk.holders import lock_holders
from mullion.services.partition.front_ends import KeptFrontEnds
from mullion.services.partition.provider_link import ProviderFleet, ProviderLink
from mullion.services.partition.record import GuestStatus, Observed
from mullion.services.partition.run_file import PreparedDisk, Run, read_run
from mullion.services.partition.stalls import Stalls
from mullion.vhd import DiskBusyError

log = logging.getLogger(__name__)

_KILL_DEADLINE_S: Final = 10.0
_FLUSH_DEADLINE_S: Final = 120.0
_LINK_RETRY_S: Final = 0.2
_TPM_END_S: Final = 1.0
_REACH_S: Final = 2.0
_RECONNECT_S: Final = 5.0
_ADOPT_LINK_S: Final = 1.0


async def _nothing() -> None:
    """Nobody has anything to tell."""


@dataclass(slots=True)
class GuestFacts:
    """What was learnt of the guest since it was let run."""

    released_s: float | None = None  # time.monotonic() when it was let go
    agent_answers: bool = False
    addresses: tuple[str, ...] = ()


@dataclass(slots=True)
class Runtime:
    """The processes of one partition, as far as this parent is connected to them."""

    name: str
    paths: PartitionPaths
    wake: Callable[[], None] = lambda: None
    on_linked: Callable[[], Awaitable[None]] = _nothing
    """What is told to a provider as soon as it can be spoken to."""
    machine: Machine | None = None
    provider: ProcessIdentity | None = None
    tpm: ProcessIdentity | None = None
    link: ProviderLink | None = None
    started_with: Run | None = None
    trouble: MullionError | None = None
    """Why the guest has no provider; the parent keeps trying."""
    unreachable: MullionError | None = None
    """Why a QEMU that runs cannot be spoken to."""
    waits_for_backup: str | None = None
    """Why reads wait of blocks that are not home yet; noted by who brings them home."""
    guest: GuestFacts = field(default_factory=GuestFacts)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _is_reconnecting: bool = False
    _is_handing_over: bool = False
    stalls: Stalls = field(init=False)
    front_ends: KeptFrontEnds = field(init=False)

    def __post_init__(self) -> None:
        self.front_ends = KeptFrontEnds(self.name)
        self.stalls = Stalls(
            self.name,
            run=self.run,
            wake=lambda: self.wake(),  # noqa: PLW0108 - it is set later
            is_guest_there=lambda: self.machine is not None and self.machine.exit_report is None,
            tops=lambda: [disk.chain[0] for disk in self.disks if not disk.read_only],
        )

    @property
    def disks(self) -> tuple[PreparedDisk, ...]:
        """The disks that this start found."""
        return self.started_with.disks if self.started_with is not None else ()

    # -- looking -------------------------------------------------------------------------------------------------------

    async def observe(self, definition: PartitionDefinition) -> Observed:
        """Look at the processes now."""
        return Observed(
            guest=await self._guest_status(),
            provider_alive=self.provider is not None and self.provider.is_alive,
            needs_provider=bool(definition.disks),
            is_stalled=self.stalls.hold_guest,
            tpm_alive=self.tpm is not None and self.tpm.is_alive,
            needs_tpm=definition.tpm,
        )

    async def _guest_status(self) -> GuestStatus:
        if self.unreachable is not None:
            return GuestStatus.UNREACHABLE
        if self.machine is None or self.machine.exit_report is not None:
            return GuestStatus.ABSENT
        try:
            status = await self.machine.state()
        except MachineGoneError:
            return GuestStatus.ABSENT
        if status.reason == "io-error":
            await self.stalls.note_qemu(lambda: self._machine().execute("query-block"))
        match status.state:
            case PartitionState.RUNNING:
                return GuestStatus.RUNNING
            case PartitionState.STOPPED:
                return GuestStatus.POWERED_OFF
            case PartitionState.FAILED:
                return GuestStatus.PANICKED
            case _ if status.reason == "inmigrate":
                return GuestStatus.LOADING
            case _:
                return GuestStatus.PRELAUNCH if status.reason == "not-begun" else GuestStatus.PAUSED

    async def adopt(self, uuid: str) -> ExitReport | None:
        """Connect to whatever of this partition still runs.

        Answers with how QEMU ended when it ran once and does not any more.
        """
        self.started_with = read_run(self.paths)
        tpm = read_identity(self.paths.tpm_identity)
        if tpm is not None and tpm.is_alive:
            self._hold_tpm(tpm, None)
        report = await self._adopt_machine(uuid)
        provider = read_identity(self.paths.provider_identity)
        if provider is None or not provider.is_alive:
            provider = _provider_behind(self.paths.provider_control)
        if provider is not None:
            write_identity(self.paths.provider_identity, provider)
            # Whether a disk lacks space is known before it is decided that the guest may run.
            await asyncio.wait([self._hold_provider(provider)], timeout=_ADOPT_LINK_S)
        return report

    async def _adopt_machine(self, uuid: str) -> ExitReport | None:
        qemu = read_identity(self.paths.qemu_identity)
        if qemu is None:
            return None
        if not qemu.is_alive:
            return self._past_end()
        try:
            machine = await Machine.adopt(self.paths, qemu, uuid)
        except MachineGoneError:
            return self._past_end()
        except MullionError as error:
            log.error("%s: QEMU (pid %d) runs and cannot be spoken to: %s", self.name, qemu.pid, error)
            self.unreachable = error
            self.run(self._reach(qemu, uuid), "reaching QEMU")
            return None
        self._hold_machine(machine)
        return None

    async def _reach(self, qemu: ProcessIdentity, uuid: str) -> None:
        """Try again to adopt a QEMU whose monitors did not answer, until they do or it has ended."""
        while self.machine is None:
            await asyncio.sleep(_REACH_S)
            try:
                self._hold_machine(await Machine.adopt(self.paths, qemu, uuid))
            except MachineGoneError:
                break
            except MullionError as error:
                self.unreachable = error
        self.unreachable = None
        self.wake()

    @property
    def has_machine(self) -> bool:
        """Whether a QEMU of this partition runs, reachable or not."""
        return self.machine is not None or self.unreachable is not None

    def _past_end(self) -> ExitReport:
        """How a QEMU ended that nobody watched."""
        return ExitReport(read_exit_status(self.paths.exit_file), log_excerpt(self.paths.qemu_log))

    async def release(self) -> None:
        """Let go of the connections; the processes run on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.front_ends.drop()
        if self.link is not None:
            await self.link.close()
            self.link = None
        if self.machine is not None:
            await self.machine.close()
            self.machine = None

    def run(self, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        """A task that ends with this runtime; its fault is logged, not lost."""
        task = asyncio.create_task(work, name=f"{self.name}: {what}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: %s", task.get_name(), error, exc_info=error)

    # -- the provider --------------------------------------------------------------------------------------------------

    async def start_provider(self, fleet: ProviderFleet, spec: Mapping[str, Any]) -> None:
        """Start the provider and keep its identity.

        Raises: what `ProviderFleet.spawn` raises; of a DiskBusyError it is found out who holds the disk.
        """
        try:
            identity = await fleet.spawn(spec)
        except DiskBusyError as error:
            self.front_ends.hang_up()
            self.trouble = await asyncio.to_thread(_name_holder, error)
            raise self.trouble from error
        except MullionError as error:
            self.front_ends.hang_up()
            self.trouble = error
            raise
        self.trouble = None
        self._is_reconnecting = self.machine is not None
        write_identity(self.paths.provider_identity, identity)
        self._hold_provider(identity)

    async def hand_over_provider(self, fleet: ProviderFleet, spec: Mapping[str, Any]) -> float | None:
        """Have a new provider take over from the present one, which ends; milliseconds for which requests waited.

        Raises: what the new one reports. The present one goes on then, unless it says otherwise by its end.
        """
        self._is_handing_over = True
        try:
            identity = await fleet.spawn({**spec, "takes_over": True})
        except BaseException:
            if self.provider is None:
                self.front_ends.orphan()
            raise
        finally:
            self._is_handing_over = False
        write_identity(self.paths.provider_identity, identity)
        link, self.link = self.link, None
        if link is not None:
            await link.close()
        await asyncio.wait([self._hold_provider(identity)], timeout=_ADOPT_LINK_S)
        status = await self._provider_status()
        waited_ms = status.get("hand_over_ms")
        return None if waited_ms is None else float(waited_ms)

    def _hold_provider(self, identity: ProcessIdentity) -> asyncio.Task[None]:
        """Watch a provider and connect to it; the task of the latter."""
        self.provider = identity
        self.run(self._watch_provider(identity), "provider's end")
        return self.run(self._connect_provider(identity), "provider's link")

    async def _watch_provider(self, identity: ProcessIdentity) -> None:
        await wait_process(identity)
        if self.provider == identity:
            log.warning("%s: the provider (pid %d) has ended", self.name, identity.pid)
            self.provider = None
            if not self._is_handing_over:  # else another one may go on with its connections by now
                self.front_ends.orphan()
            self.wake()

    async def _connect_provider(self, identity: ProcessIdentity) -> None:
        while self.provider == identity and identity.is_alive:
            link = self._new_link()
            try:
                await link.open()
                status = await link.request("status")
                if link.is_lost:
                    raise UnavailableError("the provider closed its control socket as soon as it had answered")
            except BaseException as error:
                await link.close()
                if not isinstance(error, MullionError):
                    raise
                log.warning("%s: %s", self.name, error)
                await asyncio.sleep(_LINK_RETRY_S)
                continue
            self.link = link
            self.stalls.note_status(status)
            try:
                await self.front_ends.link(link, status)
            except (MullionError, OSError) as error:
                log.warning("%s: the provider's connections are not kept: %s", self.name, error)
            try:
                await self.on_linked()
            except MullionError as error:
                log.warning("%s: the provider does not take the caps of the definition: %s", self.name, error)
            return

    def _new_link(self) -> ProviderLink:
        link = ProviderLink(self.paths.provider_control, lambda event: self._provider_said(link, event))
        return link

    def _provider_said(self, link: ProviderLink, event: Mapping[str, Any] | None) -> None:
        match event:
            case None if link is not self.link:
                return  # whoever opens it tries again, or nobody needs it any more
            case None:
                self.link = None
                if self.provider is not None and self.provider.is_alive:
                    self.run(self._connect_provider(self.provider), "provider's link")
            case {"event": "no_space", "disk": disk}:
                self.stalls.note_provider(disk, event)
            case {"event": "space", "disk": disk}:
                self.stalls.forget(disk)
        self.wake()

    async def stop_provider(self) -> None:
        """Have the provider flush and end; killed when it does not (what was flushed is safe either way)."""
        identity, self.provider = self.provider, None
        self.trouble = None
        self.stalls.clear()
        if self.link is not None:
            await self.link.close()
            self.link = None
        if identity is None:
            return
        if identity.send_signal(signal.SIGTERM):
            try:
                async with asyncio.timeout(_FLUSH_DEADLINE_S):
                    await wait_process(identity)
            except TimeoutError:
                log.error("%s: the provider did not end within %g s; killed", self.name, _FLUSH_DEADLINE_S)
                identity.send_signal(signal.SIGKILL)
                async with asyncio.timeout(_KILL_DEADLINE_S):
                    await wait_process(identity)
        self.front_ends.drop()

    # -- the TPM -------------------------------------------------------------------------------------------------------

    async def start_tpm(self, run_as: tuple[int, int] | None) -> None:
        """Start the TPM that QEMU will connect to. Raises: as `mullion.hypervisor.tpm.start_tpm`."""
        self._hold_tpm(*await asyncio.to_thread(start_tpm, self.paths, run_as))

    def _hold_tpm(self, identity: ProcessIdentity, child: Spawned | None) -> None:
        self.tpm = identity
        self.run(self._watch_tpm(identity, child), "TPM's end")

    async def _watch_tpm(self, identity: ProcessIdentity, child: Spawned | None) -> None:
        await wait_process(identity)
        if child is not None:
            await asyncio.to_thread(child.wait)  # it has ended: this only takes its status
        if self.tpm == identity:
            self.tpm = None
            self.wake()

    async def stop_tpm(self) -> None:
        """End the TPM, which writes what it must keep when that changes: it ends with QEMU, or is told to."""
        identity, self.tpm = self.tpm, None
        if identity is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                async with asyncio.timeout(_TPM_END_S):
                    await wait_process(identity)
                return
            except TimeoutError:
                identity.send_signal(number)
        async with asyncio.timeout(_KILL_DEADLINE_S):
            await wait_process(identity)

    # -- QEMU ----------------------------------------------------------------------------------------------------------

    async def start_machine(self, spec: MachineSpec) -> None:
        """Start QEMU with its processors stopped. Raises: StartFailedError, MissingToolError."""
        self.guest = GuestFacts()
        self.stalls.clear()  # of an earlier guest
        self._hold_machine(await Machine.start(spec))

    async def load_machine(self, spec: MachineSpec, path: str, seal: str) -> None:
        """Start QEMU and have it load a saved state; the guest stands still.

        Raises: as `start_machine` and `Machine.load_state`.
        """
        await self.start_machine(spec)
        await self._machine().load_state(path, seal)

    def _hold_machine(self, machine: Machine) -> None:
        self.machine = machine
        machine.subscribe(lambda _event: self.wake())
        self.run(self._watch_machine(machine), "QEMU's end")

    async def _watch_machine(self, machine: Machine) -> None:
        await machine.wait_exit()
        if self.machine is machine:
            self.front_ends.hang_up()
            self.wake()

    async def resume(self) -> None:
        machine = self._machine()
        if self.guest.released_s is None:
            self.guest.released_s = time.monotonic()
        if self._is_reconnecting:
            await self._wait_connected()
        self.stalls.is_retry_due = False  # what is noted from here on is a new verdict
        await machine.resume()
        self.stalls.resumed(self._provider_status)

    async def _provider_status(self) -> Mapping[str, Any]:
        """Raises: UnavailableError when no provider is connected; what `ProviderLink.request` raises."""
        if self.link is None:
            raise UnavailableError(f"partition {self.name} has no provider that could be asked")
        return await self.link.request("status")

    async def _wait_connected(self) -> None:
        """QEMU comes back to a new provider within its reconnect interval; let go on before, the guest's disks fail."""
        self._is_reconnecting = False
        ids = {disk.id for disk in self.disks if disk.transport is Transport.VHOST_USER}
        deadline_s = time.monotonic() + _RECONNECT_S
        while ids and time.monotonic() < deadline_s:
            if self.link is not None:
                status = await self.link.request("status")
                disks = {disk["id"]: disk for disk in status.get("disks", ())}
                if all((disks[id_].get("vhost_user") or {}).get("connected") for id_ in ids):
                    return
            await asyncio.sleep(_LINK_RETRY_S)

    async def pause(self) -> None:
        await self._machine().pause()

    async def quit_machine(self) -> ExitReport | None:
        """End QEMU; one that cannot be spoken to is killed. Answers how it ended."""
        machine, self.machine = self.machine, None
        if machine is None:
            if self.unreachable is not None:
                await self._kill_unreachable()
            return None
        report = await machine.quit()
        await machine.close()
        return report

    async def _kill_unreachable(self) -> None:
        qemu = read_identity(self.paths.qemu_identity)
        if qemu is not None and qemu.send_signal(signal.SIGKILL):
            async with asyncio.timeout(_KILL_DEADLINE_S):
                await wait_process(qemu)
        self.unreachable = None

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
        self.started_with = None


def _name_holder(error: DiskBusyError) -> DiskBusyError:
    """The same error, with the processes that hold the disk, as far as they can be seen."""
    path = str(error.context.get("path", ""))
    holders = lock_holders(path)
    if not holders:
        return error
    who = " and ".join(holders)
    return DiskBusyError(
        f"{path} is locked by {who}", remedy=f"End {who}, or attach another disk.", path=path, holder=who
    )


def _provider_behind(control_path: str) -> ProcessIdentity | None:
    """The provider that listens on a control socket, by the kernel's word; None when nobody does.

    A parent that is killed between a provider's start and the writing of its identity leaves this as the only trace.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(control_path)
        except OSError:
            return None
        return ProcessIdentity.of(peer_of(probe).pid)
