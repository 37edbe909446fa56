"""One suite for every machine: QEMU at its firmware, and the fake."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from tests.framework.machines import Yard, yard

from mullion.base.errors import InvalidError
from mullion.hypervisor import Machine, MachineControl, MachineEvent, MachineSpec, ResolvedDisk
from mullion.hypervisor.errors import MachineGoneError
from mullion.hypervisor.fake import FakeMachine
from mullion.hypervisor.states import ShutdownOutcome, ShutdownStage
from mullion.model.definition import Bus
from mullion.model.states import PartitionState

pytestmark = pytest.mark.contract
__all__ = ["yard"]

Start = Callable[[MachineSpec], Awaitable[MachineControl]]
DEADLINE_S = 60.0


@pytest.fixture(params=[Machine, FakeMachine])
def start(request: pytest.FixtureRequest) -> Start:
    kind: type[Machine] | type[FakeMachine] = request.param
    return kind.start


def driven(start: Start, spec: MachineSpec, story: Callable[[MachineControl], Awaitable[None]]) -> None:
    """Start a machine, tell the story, end it however the story ended."""

    async def told() -> None:
        machine = await start(spec)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await story(machine)
        finally:
            await machine.kill()
            await machine.close()

    asyncio.run(told())


def test_it_starts_stopped_runs_pauses_and_runs(start: Start, yard: Yard) -> None:
    async def story(machine: MachineControl) -> None:
        status = await machine.state()
        assert (status.state, status.reason) == (PartitionState.PAUSED, "not-begun")
        for _ in range(2):  # each may be repeated
            await machine.resume()
            assert (await machine.state()).state is PartitionState.RUNNING
        for _ in range(2):
            await machine.pause()
            status = await machine.state()
            assert (status.state, status.reason) == (PartitionState.PAUSED, None)
        await machine.resume()
        await machine.reset()
        assert (await machine.state()).state is PartitionState.RUNNING
        await machine.pause()
        await machine.reset()  # does not make a paused guest run
        async with asyncio.timeout(DEADLINE_S):
            while (status := await machine.state()).run_state != "prelaunch":
                await asyncio.sleep(0.01)
        assert status.state is PartitionState.PAUSED
        assert machine.exit_report is None

    driven(start, yard.spec(), story)


def test_quit_is_clean_and_may_be_repeated(start: Start, yard: Yard) -> None:
    async def story(machine: MachineControl) -> None:
        report = await machine.quit()
        assert report.is_clean
        assert await machine.quit() == report
        assert await machine.wait_exit() == report
        assert machine.exit_report == report
        assert not machine.identity.is_alive

    driven(start, yard.spec(), story)


def test_kill_says_so(start: Start, yard: Yard) -> None:
    async def story(machine: MachineControl) -> None:
        waiter = asyncio.create_task(machine.wait_exit())
        report = await machine.kill()
        assert (report.status, report.signal) == (137, 9)
        assert await waiter == report

    driven(start, yard.spec(), story)


def test_a_machine_that_ended_refuses(start: Start, yard: Yard) -> None:
    async def story(machine: MachineControl) -> None:
        await machine.quit()
        for request in (machine.state, machine.resume, machine.pause, machine.reset, machine.powerdown):
            with pytest.raises(MachineGoneError, match="exit status 0"):
                await request()
        assert not await machine.agent_ping(0.1)

    driven(start, yard.spec(), story)


def test_events_reach_every_subscriber_until_it_leaves(start: Start, yard: Yard) -> None:
    async def story(machine: MachineControl) -> None:
        first: asyncio.Queue[MachineEvent] = asyncio.Queue()
        second: list[MachineEvent] = []
        machine.subscribe(first.put_nowait)
        leave = machine.subscribe(second.append)
        await machine.resume()
        event = await first.get()
        assert event.name == "RESUME"
        assert event.at_s > 1_500_000_000
        assert [event.name for event in second] == ["RESUME"]
        leave()
        leave()
        await machine.pause()
        assert (await first.get()).name == "STOP"
        assert len(second) == 1

    driven(start, yard.spec(), story)


def test_the_ladder_ends_a_guest_that_hears_nothing(start: Start, yard: Yard) -> None:
    async def story(machine: MachineControl) -> None:
        await machine.resume()
        steps = [(step.stage, step.outcome) async for step in machine.shutdown(0.5)]
        assert steps == [
            (ShutdownStage.AGENT, ShutdownOutcome.REFUSED),
            (ShutdownStage.ACPI, ShutdownOutcome.ASKED),
            (ShutdownStage.ACPI, ShutdownOutcome.TIMED_OUT),
            (ShutdownStage.OFF, ShutdownOutcome.ASKED),
            (ShutdownStage.OFF, ShutdownOutcome.DONE),
        ]
        assert machine.exit_report is not None
        assert machine.exit_report.is_clean

    driven(start, yard.spec(), story)


def test_the_ladder_wakes_a_paused_guest(start: Start, yard: Yard) -> None:
    async def story(machine: MachineControl) -> None:
        await machine.resume()
        await machine.pause()
        steps = [step.stage async for step in machine.shutdown(0.2)]
        assert steps[0] is ShutdownStage.RESUME
        assert steps[-1] is ShutdownStage.OFF

    driven(start, yard.spec(), story)


@pytest.mark.parametrize("begun", [False, True])
def test_the_ladder_asks_nobody_where_nobody_can_answer(start: Start, yard: Yard, begun: bool) -> None:
    async def story(machine: MachineControl) -> None:
        if begun:
            await machine.resume()
        steps = [step.stage async for step in machine.shutdown(0 if begun else 30)]
        assert steps == [ShutdownStage.OFF, ShutdownStage.OFF]

    driven(start, yard.spec(), story)


def test_a_definition_without_a_place_for_its_disk_is_refused(start: Start, yard: Yard) -> None:
    spec = replace(yard.spec(), disks=(ResolvedDisk("d0", Bus.IDE, "/nowhere"),))
    with pytest.raises(InvalidError, match="disk d0"):
        asyncio.run(start(spec))  # type: ignore[arg-type]
