"""One partition's QEMU, as the parent drives it: start or adopt, run, pause, reset, end.

What is true is asked from QEMU (`query-status`) and from the kernel (pidfd); events are a hint. The machine keeps one
session on its first monitor, opens it again when it is lost, and takes the rescue monitor while somebody else holds the
first. `close` lets go without touching the guest: the next parent adopts it.

Invariants: signals and adoption go by pid + start time + boot id, and adoption also by the UUID that QEMU itself
reports; a stranger that got the pid later is never touched. When `exit_report` is set QEMU has ended for good.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final, Self

from mullion.base.errors import DeadlineError
from mullion.base.paths import PartitionPaths
from mullion.base.pidfd import wait_process
from mullion.base.process import ProcessIdentity, read_identity
from mullion.hypervisor.agent import GuestAgent
from mullion.hypervisor.cmdline import MachineSpec
from mullion.hypervisor.errors import MachineGoneError, MonitorError, MonitorRefusedError, StartFailedError
from mullion.hypervisor.launch import Launched, launch, log_excerpt, read_exit_status
from mullion.hypervisor.qmp import COMMAND_S, GREETING_S, QmpSession
from mullion.hypervisor.saved_state import Gate, Progress, load_state, write_state
from mullion.hypervisor.shutdown import shutdown_ladder
from mullion.hypervisor.state_file import StateAbout, StateInfo
from mullion.hypervisor.states import (
    ENDED_RUN_STATES,
    EventCallback,
    ExitReport,
    MachineEvent,
    MachineStatus,
    ShutdownStep,
    status_of,
)

START_S: Final = 60.0
"""How long QEMU may take to its first answer; the hosts that need more are broken."""
QUIT_S: Final = 10.0
"""How long `quit` may take before QEMU is killed. It holds no data of the disks: the provider has every write. It takes
that long when a request waits for a provider that is away."""
EXIT_FILE_S: Final = 2.0
"""How long after QEMU's end its wrapper may take to write the status, where we cannot wait for the wrapper itself."""
POLL_S: Final = 0.002

_let_go: Final[dict[ProcessIdentity, Launched]] = {}
"""Wrappers, still our children, of machines that were closed: who adopts one again in this process reaps it too."""

log = logging.getLogger(__name__)


class Machine:
    """A running QEMU. Made by `start` or `adopt`, never directly; ends with `quit`, `kill` or `close`."""

    def __init__(self, paths: PartitionPaths, identity: ProcessIdentity, launched: Launched | None) -> None:
        self.paths = paths
        self.agent = GuestAgent(paths.agent)
        self._identity = identity
        self._launched = launched
        self._subscribers: list[EventCallback] = []
        self._session: QmpSession | None = None
        self._opening = asyncio.Lock()
        self._exit_report: ExitReport | None = None
        self._exited = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, spec: MachineSpec) -> Self:
        """Start QEMU with its processors stopped (`resume` begins the guest); return when its monitor answers.

        Raises: StartFailedError with QEMU's words; MissingToolError; InvalidError; DeadlineError (QEMU is killed then).
        """
        launched = launch(spec)
        machine: Self | None = None
        try:
            async with asyncio.timeout(START_S):
                machine = cls(spec.paths, await _wait_identity(launched, spec.paths), launched)
                await machine._connect_first(launched)
        except BaseException as error:  # a cancelled start, too, leaves no process behind
            _kill_both(launched)
            if machine is not None:
                await machine._release()
            if isinstance(error, TimeoutError):
                raise DeadlineError(
                    f"partition {spec.definition.name}: QEMU did not answer within {START_S:g} s",
                    remedy=f"Read {spec.paths.qemu_log}; run by hand: {launched.command}",
                ) from error
            raise
        log.info("partition %s: QEMU runs, pid %d", spec.definition.name, machine.identity.pid)
        return machine

    @classmethod
    async def adopt(cls, paths: PartitionPaths, identity: ProcessIdentity, uuid: str) -> Self:
        """Take over a QEMU that an earlier parent started, without disturbing the guest.

        Raises: MachineGoneError when that process has ended (or the pid is another's) or is not this partition's
        QEMU; MonitorError when both monitors are held.
        """
        if not identity.is_alive:
            raise MachineGoneError(f"process {identity.pid} of an earlier start has ended", pid=identity.pid)
        machine = cls(paths, identity, _let_go.pop(identity, None))
        try:
            await machine._ensure_session()
            answer = await machine.execute("query-uuid")
            found = answer.get("UUID") if isinstance(answer, Mapping) else None
            if found != uuid:
                raise MachineGoneError(
                    f"{paths.qmp} is answered by a machine with UUID {found}, not {uuid}",
                    remedy="Another service uses the same run folder: give each its own (setting run_dir).",
                )
        except BaseException:
            await machine.close()
            raise
        machine._watch()
        return machine

    @property
    def identity(self) -> ProcessIdentity:
        return self._identity

    @property
    def exit_report(self) -> ExitReport | None:
        return self._exit_report

    async def state(self) -> MachineStatus:
        answer = await self.execute("query-status")
        return status_of(str(answer.get("status")) if isinstance(answer, Mapping) else "unknown")

    async def resume(self) -> None:
        await self.execute("cont")

    async def pause(self) -> None:
        await self.execute("stop")

    async def reset(self) -> None:
        status = await self.state()
        await self.execute("system_reset")
        if status.run_state not in ENDED_RUN_STATES:
            return None
        # The command only asks for it: QEMU refuses to go on until it has happened, and then waits for us.
        for _ in range(int(COMMAND_S / POLL_S)):
            if (await self.state()).run_state not in ENDED_RUN_STATES:
                return await self.resume()
            await asyncio.sleep(POLL_S)
        raise DeadlineError(f"QEMU did not reset a guest that is over within {COMMAND_S:g} s", pid=self._identity.pid)

    async def powerdown(self) -> None:
        await self.execute("system_powerdown")

    async def agent_ping(self, timeout_s: float = 2.0) -> bool:
        return await self.agent.ping(timeout_s)

    async def agent_shutdown(self) -> None:
        # The agent says nothing when it obeys, and a quick guest is down before we have given up waiting for a refusal.
        asked = asyncio.create_task(self.agent.shutdown(), name=f"agent shutdown {self._identity.pid}")
        down = asyncio.create_task(self._wait_event("SHUTDOWN"), name=f"shutdown event {self._identity.pid}")
        try:
            await asyncio.wait((asked, down), return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                await asked
        finally:
            asked.cancel()
            down.cancel()
            await asyncio.gather(asked, down, return_exceptions=True)

    def shutdown(self, timeout_s: float) -> AsyncIterator[ShutdownStep]:
        return shutdown_ladder(self, timeout_s)

    async def quit(self) -> ExitReport:
        if self._exit_report is not None:
            return self._exit_report
        try:
            await self.execute("quit", timeout_s=QUIT_S)
            async with asyncio.timeout(QUIT_S):
                return await self.wait_exit()
        except MachineGoneError:
            # QEMU often hangs up before its answer; a lost monitor alone looks the same, so see whether it ends.
            try:
                async with asyncio.timeout(QUIT_S):
                    return await self.wait_exit()
            except TimeoutError:
                return await self.kill()
        except (MonitorError, MonitorRefusedError, DeadlineError, TimeoutError) as error:
            log.warning("QEMU %d does not end by `quit` (%s): it is killed", self._identity.pid, error)
            return await self.kill()

    async def kill(self) -> ExitReport:
        self._identity.send_signal(signal.SIGKILL)
        return await self.wait_exit()

    async def wait_exit(self) -> ExitReport:
        await self._exited.wait()
        assert self._exit_report is not None
        return self._exit_report

    def subscribe(self, callback: EventCallback) -> Callable[[], None]:
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            if callback in self._subscribers:
                self._subscribers.remove(callback)

        return unsubscribe

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float = COMMAND_S
    ) -> object:
        """Run any QMP command.

        Raises: MonitorRefusedError, MachineGoneError, MonitorError, DeadlineError.
        """
        session = await self._ensure_session()
        return await session.execute(command, arguments, timeout_s=timeout_s)

    async def give_descriptor(self, name: str, fd: int) -> None:
        """Have QEMU take a copy of a descriptor under this name. Raises: as `execute`."""
        session = await self._ensure_session()
        await session.give_descriptor(name, fd)

    async def write_state(
        self,
        path: str,
        about: StateAbout,
        *,
        live: bool = False,
        gate: Gate | None = None,
        on_progress: Progress | None = None,
    ) -> StateInfo:
        """Write memory and devices of a paused guest into a file (`saved_state.write_state`)."""
        return await write_state(self, path, about, live=live, gate=gate, on_progress=on_progress)

    async def load_state(self, path: str, seal: str, *, on_progress: Progress | None = None) -> None:
        """Load a state into a machine that was started for it, `loads_state` (`saved_state.load_state`)."""
        await load_state(self, path, seal, on_progress=on_progress)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await self._release()
        if self._launched is not None and self._exit_report is None:
            _let_go[self._identity] = self._launched

    async def _release(self) -> None:
        await self.agent.close()
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _wait_event(self, name: str) -> None:
        came = asyncio.Event()
        unsubscribe = self.subscribe(lambda event: came.set() if event.name == name else None)
        try:
            await came.wait()
        finally:
            unsubscribe()

    async def _ensure_session(self) -> QmpSession:
        """The session that is open, or a new one on the first monitor that answers."""
        async with self._opening:
            if self._exit_report is not None:
                raise MachineGoneError(str(self._exit_report), pid=self._identity.pid)
            if self._session is not None:
                if self._session.is_open:
                    return self._session
                await self._session.close()
                self._session = None
            try:
                self._session = await QmpSession.open(self.paths.qmp, self._tell, timeout_s=GREETING_S)
            except MonitorError:
                log.warning("%s is held by another client: the rescue monitor is used", self.paths.qmp)
                self._session = await QmpSession.open(self.paths.qmp_rescue, self._tell, timeout_s=GREETING_S)
            return self._session

    def _tell(self, event: MachineEvent) -> None:
        for callback in tuple(self._subscribers):
            callback(event)

    async def _connect_first(self, launched: Launched) -> None:
        """The first session: QEMU listens already, but greets only when it is ready; or it ends before."""
        try:
            self._session = await QmpSession.open(self.paths.qmp, self._tell, timeout_s=START_S)
            await self._session.execute("query-status", timeout_s=START_S)
        except MachineGoneError as error:
            raise await _start_failed(launched, self.paths) from error
        self._watch()

    def _watch(self) -> None:
        self._tasks.append(asyncio.create_task(self._watch_exit(), name=f"machine exit {self._identity.pid}"))
        self._tasks.append(asyncio.create_task(self._watch_session(), name=f"machine monitor {self._identity.pid}"))

    async def _watch_exit(self) -> None:
        await wait_process(self._identity)
        status = await self._exit_status()
        self._exit_report = ExitReport(status, log_excerpt(self.paths.qemu_log))
        log.info("QEMU %d: %s", self._identity.pid, self._exit_report)
        self._exited.set()
        await self._release()

    async def _exit_status(self) -> int | None:
        if self._launched is not None:
            await _reap(self._launched)
            return read_exit_status(self.paths.exit_file)
        for _ in range(int(EXIT_FILE_S / POLL_S)):
            if (status := read_exit_status(self.paths.exit_file)) is not None:
                return status
            await asyncio.sleep(POLL_S)
        return None

    async def _watch_session(self) -> None:
        """Keep a session open, so that events arrive although nobody asks anything."""
        while self._exit_report is None:
            session = self._session
            if session is not None:
                await session.wait_closed()
            try:
                await self._ensure_session()
            except (MachineGoneError, MonitorError) as error:
                log.debug("no monitor of QEMU %d: %s", self._identity.pid, error)
                await asyncio.sleep(0.5)


async def _wait_identity(launched: Launched, paths: PartitionPaths) -> ProcessIdentity:
    """QEMU's identity, which the wrapper writes within milliseconds."""
    while True:
        if (identity := read_identity(paths.qemu_identity)) is not None:
            return identity
        if launched.wrapper.poll() is not None:
            raise await _start_failed(launched, paths)
        await asyncio.sleep(POLL_S)


async def _start_failed(launched: Launched, paths: PartitionPaths) -> StartFailedError:
    await _reap(launched)
    report = ExitReport(read_exit_status(paths.exit_file), log_excerpt(paths.qemu_log))
    words = f": {report.log_excerpt}" if report.log_excerpt else ""
    return StartFailedError(
        f"{report} while it started{words}",
        exit_status=report.status,
        log_excerpt=report.log_excerpt,
        command=launched.command,
    )


def _kill_both(launched: Launched) -> None:
    """End a wrapper that is still our child, and its QEMU: they are a process group of their own."""
    if launched.wrapper.poll() is None:
        os.killpg(launched.wrapper.pid, signal.SIGKILL)
        launched.wrapper.wait()


async def _reap(launched: Launched) -> None:
    """Wait for our child, the wrapper: it ends when QEMU has ended."""
    identity = ProcessIdentity.of(launched.wrapper.pid)
    if identity is not None:
        await wait_process(identity)
    await asyncio.to_thread(launched.wrapper.wait)
