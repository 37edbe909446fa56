"""A machine without QEMU: the same surface, states and failures, for tests of the layers above.

`tests/contract/test_machine_contract.py` runs one suite on this and on the real one. A fake guest has an agent or not,
and obeys the power button or not; `panic`, `power_off`, `fail_io` and `die` are what a test does to it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Self

from mullion.base.process import ProcessIdentity, boot_id
from mullion.hypervisor.cmdline import MachineSpec, cmdline
from mullion.hypervisor.errors import AgentError, MachineGoneError, MonitorRefusedError
from mullion.hypervisor.shutdown import shutdown_ladder
from mullion.hypervisor.states import (
    ENDED_RUN_STATES,
    EventCallback,
    ExitReport,
    MachineEvent,
    MachineStatus,
    ShutdownStep,
    status_of,
)


class FakeMachine:
    """A partition's machine in memory. `has_agent` and `obeys_acpi` describe the guest."""

    def __init__(self, spec: MachineSpec, *, has_agent: bool = False, obeys_acpi: bool = False) -> None:
        self.spec = spec
        self.has_agent = has_agent
        self.obeys_acpi = obeys_acpi
        self.argv = cmdline(spec)  # refuses what the real one refuses
        self.resets = 0
        self._run_state = "prelaunch"
        self._exit_report: ExitReport | None = None
        self._exited = asyncio.Event()
        self._subscribers: list[EventCallback] = []
        # Our own pid with a start time that nobody has: never alive, never signalled.
        self._identity = ProcessIdentity(os.getpid(), 0, boot_id())

    @classmethod
    async def start(cls, spec: MachineSpec) -> Self:
        return cls(spec)

    @property
    def identity(self) -> ProcessIdentity:
        return self._identity

    @property
    def exit_report(self) -> ExitReport | None:
        return self._exit_report

    async def state(self) -> MachineStatus:
        self._check_alive()
        return status_of(self._run_state)

    async def resume(self) -> None:
        self._check_alive()
        if self._run_state in ("shutdown", "internal-error"):
            raise MonitorRefusedError(
                "QEMU refused cont: Resetting the Virtual Machine is required", command="cont", reason="GenericError"
            )
        if self._run_state != "running":
            self._enter("running", "RESUME")

    async def pause(self) -> None:
        self._check_alive()
        if self._run_state == "running":
            self._enter("paused", "STOP")

    async def reset(self) -> None:
        self._check_alive()
        self.resets += 1
        self._tell("RESET")
        if self._run_state in ENDED_RUN_STATES:
            self._enter("running", "RESUME")
        elif self._run_state != "running":
            self._run_state = "prelaunch"

    async def powerdown(self) -> None:
        self._check_alive()
        self._tell("POWERDOWN")
        if self.obeys_acpi and self._run_state == "running":
            self.power_off()

    async def agent_ping(self, timeout_s: float = 2.0) -> bool:
        return self.has_agent and self._run_state == "running" and self._exit_report is None

    async def agent_shutdown(self) -> None:
        if not await self.agent_ping():
            raise AgentError("the guest agent did not answer")
        self.power_off()

    def shutdown(self, timeout_s: float) -> AsyncIterator[ShutdownStep]:
        return shutdown_ladder(self, timeout_s)

    async def quit(self) -> ExitReport:
        return self._end(0)

    async def kill(self) -> ExitReport:
        return self._end(137)

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

    async def close(self) -> None:
        self._subscribers.clear()

    def power_off(self) -> None:
        """The guest powers off; the machine stays, as with -no-shutdown."""
        self._enter("shutdown", "SHUTDOWN")

    def panic(self) -> None:
        self._enter("guest-panicked", "GUEST_PANICKED")

    def fail_io(self) -> None:
        self._enter("io-error", "BLOCK_IO_ERROR")

    def die(self, status: int = 137, log_excerpt: str = "") -> None:
        """QEMU ends, unasked."""
        self._end(status, log_excerpt)

    def _check_alive(self) -> None:
        if self._exit_report is not None:
            raise MachineGoneError(str(self._exit_report), pid=self._identity.pid)

    def _enter(self, run_state: str, event: str) -> None:
        self._run_state = run_state
        self._tell(event)

    def _tell(self, event: str) -> None:
        for callback in tuple(self._subscribers):
            callback(MachineEvent(event, {}, time.time()))

    def _end(self, status: int, log_excerpt: str = "") -> ExitReport:
        if self._exit_report is None:
            self._exit_report = ExitReport(status, log_excerpt)
            self._exited.set()
        return self._exit_report
