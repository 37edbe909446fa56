"""The ladder against guests that the fake plays: who obeys what, and in which order it shows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from mullion.base.paths import PartitionPaths
from mullion.hypervisor.cmdline import MachineSpec
from mullion.hypervisor.fake import FakeMachine
from mullion.hypervisor.states import ShutdownOutcome, ShutdownStage
from mullion.model.definition import Accelerator, PartitionDefinition

pytestmark = pytest.mark.unit

SPEC = MachineSpec(PartitionDefinition("p"), "uuid", PartitionPaths("/d", "/r"), Accelerator.TCG)
OFF = [("off", "asked"), ("off", "done")]


def climb(
    *,
    has_agent: bool = False,
    obeys_acpi: bool = False,
    timeout_s: float = 30.0,
    prepare: Callable[[FakeMachine], None],
) -> list[tuple[str, str]]:
    async def told() -> list[tuple[str, str]]:
        machine = FakeMachine(SPEC, has_agent=has_agent, obeys_acpi=obeys_acpi)
        await machine.resume()
        prepare(machine)
        steps = [step async for step in machine.shutdown(timeout_s)]
        assert machine.exit_report is not None
        assert [step.elapsed_s for step in steps] == sorted(step.elapsed_s for step in steps)
        return [(step.stage.value, step.outcome.value) for step in steps]

    return asyncio.run(told())


def test_an_agent_is_enough() -> None:
    assert climb(has_agent=True, prepare=lambda _: None) == [("agent", "asked"), ("agent", "done"), *OFF]


def test_without_an_agent_the_button() -> None:
    steps = climb(obeys_acpi=True, prepare=lambda _: None)
    assert steps == [("agent", "refused"), ("acpi", "asked"), ("acpi", "done"), *OFF]


@pytest.mark.parametrize("what", [FakeMachine.power_off, FakeMachine.panic])
def test_a_guest_that_is_down_is_turned_off_at_once(what: Callable[[FakeMachine], None]) -> None:
    assert climb(prepare=what) == OFF


def test_a_machine_that_ended_by_itself_is_done() -> None:
    assert climb(prepare=FakeMachine.die) == OFF


def test_a_guest_that_waits_for_its_disk_is_resumed_and_asked() -> None:
    steps = climb(has_agent=True, prepare=FakeMachine.fail_io)
    assert steps == [("resume", "done"), ("agent", "asked"), ("agent", "done"), *OFF]


def test_the_stages_and_outcomes_are_what_the_api_shows() -> None:
    assert [stage.value for stage in ShutdownStage] == ["resume", "agent", "acpi", "off"]
    assert [outcome.value for outcome in ShutdownOutcome] == ["asked", "done", "refused", "timed-out"]
