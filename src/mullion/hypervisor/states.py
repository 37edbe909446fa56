"""The surface of a partition's machine: what it reports and what it can be told, for the real one and its fake.

QEMU's run states (QAPI `RunState`) become the few states of the model; the reason keeps what QEMU said.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from mullion.base.process import ProcessIdentity
from mullion.model.states import PartitionState


@dataclass(frozen=True, slots=True)
class MachineStatus:
    """What the machine is doing; `reason` is None while it simply runs, `run_state` is QEMU's own word."""

    state: PartitionState
    reason: str | None
    run_state: str


RUN_STATES: Final[Mapping[str, tuple[PartitionState, str | None]]] = {
    "running": (PartitionState.RUNNING, None),
    "prelaunch": (PartitionState.PAUSED, "not-begun"),
    "paused": (PartitionState.PAUSED, None),
    "suspended": (PartitionState.PAUSED, "suspended"),
    "io-error": (PartitionState.PAUSED, "io-error"),
    "watchdog": (PartitionState.PAUSED, "watchdog"),
    "debug": (PartitionState.PAUSED, "debug"),
    "save-vm": (PartitionState.PAUSED, "save-vm"),
    "restore-vm": (PartitionState.PAUSED, "restore-vm"),
    "inmigrate": (PartitionState.PAUSED, "inmigrate"),
    "finish-migrate": (PartitionState.PAUSED, "finish-migrate"),
    "postmigrate": (PartitionState.PAUSED, "postmigrate"),
    "colo": (PartitionState.PAUSED, "colo"),
    "shutdown": (PartitionState.STOPPED, "shutdown"),
    "guest-panicked": (PartitionState.FAILED, "guest-panicked"),
    "internal-error": (PartitionState.FAILED, "internal-error"),
}
"""QAPI RunState → state and reason. `shutdown`: the guest has powered off, QEMU waits for `quit` (-no-shutdown)."""

ENDED_RUN_STATES: Final = frozenset({"shutdown", "guest-panicked", "internal-error"})
"""The guest is over; a reset begins a new one."""


def status_of(run_state: str) -> MachineStatus:
    """The meaning of QEMU's run state; one that we do not know counts as paused, and says which."""
    state, reason = RUN_STATES.get(run_state, (PartitionState.PAUSED, run_state))
    return MachineStatus(state, reason, run_state)


@dataclass(frozen=True, slots=True)
class MachineEvent:
    """Something QEMU told; a hint only, since events are lost while nobody listens. `at_s` is seconds since 1970."""

    name: str
    data: Mapping[str, object] = field(default_factory=dict)
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ExitReport:
    """How QEMU ended. `status` is what its wrapper recorded (128 + n for signal n), None when that was killed too."""

    status: int | None
    log_excerpt: str = ""

    @property
    def signal(self) -> int | None:
        return self.status - 128 if self.status is not None and self.status > 128 else None

    @property
    def is_clean(self) -> bool:
        return self.status == 0

    def __str__(self) -> str:
        if self.status is None:
            return "QEMU ended; its exit status is unknown, because its wrapper was killed as well"
        if self.signal is not None:
            try:
                name = signal.Signals(self.signal).name
            except ValueError:
                name = f"signal {self.signal}"
            return f"QEMU was killed by {name} (exit status {self.status})"
        return f"QEMU ended with exit status {self.status}"


class ShutdownStage(enum.Enum):
    """The rungs of the ladder, in order."""

    RESUME = "resume"
    AGENT = "agent"
    ACPI = "acpi"
    OFF = "off"


class ShutdownOutcome(enum.Enum):
    """What a rung brought. A stage reports ASKED first, then how it ended."""

    ASKED = "asked"
    DONE = "done"
    REFUSED = "refused"
    TIMED_OUT = "timed-out"


@dataclass(frozen=True, slots=True)
class ShutdownStep:
    """One visible step of a shutdown; `elapsed_s` counts from its beginning."""

    stage: ShutdownStage
    outcome: ShutdownOutcome
    detail: str
    elapsed_s: float


EventCallback = Callable[[MachineEvent], None]


class MachineControl(Protocol):
    """What the layers above may ask of a machine.

    Raises, any method: MachineGoneError when QEMU has ended, MonitorError when it does not answer.
    """

    @property
    def identity(self) -> ProcessIdentity: ...

    @property
    def exit_report(self) -> ExitReport | None:
        """How it ended, None while it lives."""
        ...

    async def state(self) -> MachineStatus: ...

    async def resume(self) -> None:
        """Let the guest run: begins one that was started paused. Nothing happens when it runs already."""
        ...

    async def pause(self) -> None:
        """Stop the guest's processors; nothing happens when they are stopped already."""
        ...

    async def reset(self) -> None:
        """Press the reset button; a guest that panicked or powered off begins anew."""
        ...

    async def powerdown(self) -> None:
        """Press the ACPI power button: a request to the guest."""
        ...

    async def agent_ping(self, timeout_s: float) -> bool:
        """Whether the guest agent answers within the time."""
        ...

    async def agent_shutdown(self) -> None:
        """Ask the guest to power off through its agent. Raises: AgentError, AgentRefusedError."""
        ...

    def shutdown(self, timeout_s: float) -> AsyncIterator[ShutdownStep]:
        """Agent, then ACPI, then off: within `timeout_s` the guest is asked, afterwards it is turned off."""
        ...

    async def quit(self) -> ExitReport:
        """Turn off: QEMU flushes its disks and ends; killed when it does not."""
        ...

    async def kill(self) -> ExitReport:
        """End QEMU with SIGKILL."""
        ...

    async def wait_exit(self) -> ExitReport: ...

    def subscribe(self, callback: EventCallback) -> Callable[[], None]:
        """Call back for each event, in the event loop; returns the function that ends it."""
        ...

    async def close(self) -> None:
        """Let go of the machine without touching it: it runs on, and can be adopted again."""
        ...
