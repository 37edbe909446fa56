"""The shutdown ladder: ask through the agent, press the ACPI button, and when time is up turn off.

    not running ──────────────────────────────► OFF
    paused ─► RESUME ─┐
    running ──────────┴► AGENT ─► ACPI ─► OFF          each rung reports that it began and how it ended

The agent is asked first because it works without a desktop's consent; it gets half of the time when it has taken the
request, and no time when it does not answer. The button is pressed even when the agent was asked: guests take
a second request well. OFF follows in any case: QEMU flushes its disks and ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Final

from mullion.base.errors import MullionError
from mullion.hypervisor.errors import AgentError, AgentRefusedError, MachineGoneError
from mullion.hypervisor.states import MachineControl, ShutdownOutcome, ShutdownStage, ShutdownStep
from mullion.model.states import PartitionState

PING_S: Final = 2.0
POLL_S: Final = 0.25
"""How often the state is read besides events: events may be lost, the state is not."""


async def shutdown_ladder(machine: MachineControl, timeout_s: float) -> AsyncIterator[ShutdownStep]:
    """Bring a machine down, rung by rung; when the iterator ends, QEMU has ended.

    Raises: what `quit` raises; all else is part of a step.
    """
    begun_s = time.monotonic()
    deadline_s = begun_s + timeout_s

    def step(stage: ShutdownStage, outcome: ShutdownOutcome, detail: str) -> ShutdownStep:
        return ShutdownStep(stage, outcome, detail, time.monotonic() - begun_s)

    async for rung in _ask(machine, deadline_s, timeout_s):
        yield step(*rung)
    yield step(ShutdownStage.OFF, ShutdownOutcome.ASKED, "turning off")
    report = await machine.quit()
    yield step(ShutdownStage.OFF, ShutdownOutcome.DONE, str(report))


_Rung = tuple[ShutdownStage, ShutdownOutcome, str]


async def _ask(machine: MachineControl, deadline_s: float, timeout_s: float) -> AsyncIterator[_Rung]:
    """Every rung that needs the guest's consent."""
    try:
        status = await machine.state()
        if status.state is PartitionState.PAUSED and status.reason != "not-begun" and timeout_s > 0:
            await machine.resume()
            yield ShutdownStage.RESUME, ShutdownOutcome.DONE, "a paused guest cannot shut down: it runs again"
        elif status.state is not PartitionState.RUNNING or timeout_s <= 0:
            return
        async for rung in _ask_agent(machine, deadline_s, timeout_s):
            yield rung
        if await _is_down(machine):
            return
        await machine.powerdown()
        yield ShutdownStage.ACPI, ShutdownOutcome.ASKED, "the power button was pressed"
        if await _comes_down(machine, deadline_s):
            yield ShutdownStage.ACPI, ShutdownOutcome.DONE, "the guest has powered off"
        else:
            yield ShutdownStage.ACPI, ShutdownOutcome.TIMED_OUT, f"the guest did not power off within {timeout_s:g} s"
    except MachineGoneError:
        return
    except MullionError as error:  # the monitor does not answer or refuses: nothing is left but to turn off
        yield ShutdownStage.ACPI, ShutdownOutcome.REFUSED, error.message


async def _ask_agent(machine: MachineControl, deadline_s: float, timeout_s: float) -> AsyncIterator[_Rung]:
    if not await machine.agent_ping(min(PING_S, timeout_s)):
        yield ShutdownStage.AGENT, ShutdownOutcome.REFUSED, "the guest agent does not answer"
        return
    try:
        await machine.agent_shutdown()
    except (AgentError, AgentRefusedError) as error:
        yield ShutdownStage.AGENT, ShutdownOutcome.REFUSED, error.message
        return
    yield ShutdownStage.AGENT, ShutdownOutcome.ASKED, "the guest agent took the request"
    if await _comes_down(machine, deadline_s - timeout_s / 2):
        yield ShutdownStage.AGENT, ShutdownOutcome.DONE, "the guest has powered off"
    else:
        yield ShutdownStage.AGENT, ShutdownOutcome.TIMED_OUT, f"the guest did not power off within {timeout_s / 2:g} s"


async def _is_down(machine: MachineControl) -> bool:
    """Whether the guest can be asked no more: it has powered off, panicked or gone."""
    if machine.exit_report is not None:
        return True
    status = await machine.state()
    return status.state in (PartitionState.STOPPED, PartitionState.FAILED)


async def _comes_down(machine: MachineControl, deadline_s: float) -> bool:
    told = asyncio.Event()
    unsubscribe = machine.subscribe(lambda _event: told.set())
    try:
        while not await _is_down(machine):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            told.clear()
            try:
                async with asyncio.timeout(min(POLL_S, left_s)):
                    await told.wait()
            except TimeoutError:
                continue
        return True
    finally:
        unsubscribe()
