"""Schedules run when they are due: once, whatever was missed, and whatever becomes of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from mullion.base.errors import InvalidError, StateError
from mullion.model.views import EventView
from mullion.parent.events import Events
from mullion.parent.schedules import ScheduleRecord, Schedules
from mullion.parent.store import MemoryStore

pytestmark = pytest.mark.unit

NOON_S = 1_777_000_000.0


class Host:
    """Schedules over a store, with a clock of ours; a run is noted, and fails when it is told to."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        self.store = store or MemoryStore()
        self.events = Events(self.store)
        self.now_s = NOON_S
        self.runs: list[str] = []
        self.fault: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.schedules = Schedules(self.store, self.events, clock=lambda: self.now_s)
        self.schedules.register("checkpoint", self._run)

    async def _run(self, record: ScheduleRecord) -> str:
        self.runs.append(record.name)
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return "made it"

    async def open(self) -> Host:
        await self.events.open()
        await self.schedules.open()
        return self

    async def close(self) -> None:
        await self.schedules.close()
        await self.events.close()

    async def at(self, seconds: float) -> None:
        """The clock shows so many seconds after noon; what is due then runs to its end."""
        self.now_s = NOON_S + seconds
        await asyncio.gather(*self.schedules.begin_due())

    async def set(self, rule: str, name: str = "it") -> None:
        await self.schedules.set("checkpoint", "web", name, rule, {"keep": 2})

    @property
    def record(self) -> ScheduleRecord:
        found = self.schedules.get("checkpoint", "web", "it")
        assert found is not None
        return found

    async def said(self, kind: str) -> list[EventView]:
        await self.events.flush()
        return [event for event in (await self.events.read(limit=1000)).events if event.kind == kind]


def run(scenario: Callable[[Host], Awaitable[None]]) -> None:
    async def main() -> None:
        host = await Host().open()
        try:
            await scenario(host)
        finally:
            await host.close()

    asyncio.run(main())


def test_a_schedule_runs_when_it_is_due_and_once() -> None:
    async def scenario(host: Host) -> None:
        await host.set("every 1h")
        await host.at(3599)
        assert host.runs == []
        await host.at(3600)
        await host.at(3601)
        assert host.runs == ["it"]
        assert (host.record.last_result, host.record.last_s) == ("made it", NOON_S + 3600)
        await host.at(5 * 3600 + 100)  # three were missed
        await host.at(5 * 3600 + 200)
        assert host.runs == ["it", "it"]
        assert host.schedules.next_of(host.record) == NOON_S + 6 * 3600

    run(scenario)


def test_what_was_missed_while_the_service_was_down_runs_once_after_its_start() -> None:
    async def scenario(host: Host) -> None:
        await host.set("every 1h")
        await host.schedules.close()
        again = Host(host.store)
        again.now_s = NOON_S + 7 * 3600
        await again.open()
        while not again.record.last_result:
            await asyncio.sleep(0)
        assert again.runs == ["it"]
        assert again.record.options == {"keep": 2}
        await again.close()

    run(scenario)


def test_a_run_that_fails_is_shown_with_its_reason_and_the_next_one_comes() -> None:
    async def scenario(host: Host) -> None:
        await host.set("every 1h")
        host.fault = StateError("it is saved", state="saved", required="running")
        await host.at(3600)
        error = host.record.last_error
        assert error is not None
        assert (error.code, error.message) == ("wrong-state", "it is saved")
        (event,) = await host.said("schedule.failed")
        assert event.target == "partition/web"
        assert (event.data["schedule"], event.data["message"]) == ("it", "it is saved")
        host.fault = ValueError("a fault of ours")
        await host.at(7200)
        assert host.record.last_error is not None
        assert host.record.last_error.code == "internal"
        host.fault = None
        await host.at(3 * 3600)
        assert host.record.last_error is None

    run(scenario)


def test_a_run_that_takes_long_is_not_begun_again() -> None:
    async def scenario(host: Host) -> None:
        await host.set("every 1h")
        host.gate.clear()
        host.now_s = NOON_S + 3600
        (long,) = host.schedules.begin_due()
        await asyncio.sleep(0)
        host.now_s = NOON_S + 3 * 3600
        assert host.schedules.begin_due() == ()
        host.gate.set()
        await long
        assert host.runs == ["it"]
        while host.schedules.next_of(host.record) <= host.now_s:
            await asyncio.sleep(0)
        assert host.runs == ["it", "it"]  # two more had become due meanwhile: one run

    run(scenario)


def test_a_schedule_that_was_removed_while_it_ran_stays_removed() -> None:
    async def scenario(host: Host) -> None:
        await host.set("every 1h")
        host.gate.clear()
        host.now_s = NOON_S + 3600
        (long,) = host.schedules.begin_due()
        await asyncio.sleep(0)
        await host.schedules.remove_target("checkpoint", "web")
        host.gate.set()
        await long
        assert host.schedules.list("checkpoint") == ()
        assert await host.store.list("schedules/") == []

    run(scenario)


def test_changing_the_options_keeps_the_times_and_changing_the_rule_does_not() -> None:
    async def scenario(host: Host) -> None:
        await host.set("every 1h")
        await host.at(3600)
        host.now_s = NOON_S + 3700
        await host.schedules.set("checkpoint", "web", "it", "every 1h", {"keep": 5})
        assert host.schedules.next_of(host.record) == NOON_S + 7200
        await host.set("every 2h")
        assert host.schedules.next_of(host.record) == NOON_S + 3700 + 7200
        assert host.record.last_result == "made it"
        with pytest.raises(InvalidError):
            await host.set("now and then")
        assert host.record.rule == "every 2h"

    run(scenario)


def test_the_loop_wakes_for_a_new_schedule_and_for_a_clock_that_was_set() -> None:
    async def scenario(host: Host) -> None:
        await host.set("every 1min")
        host.now_s = NOON_S + 60
        await host.set("every 1h", "other")  # what changes the schedules wakes the loop
        while not host.record.last_result:
            await asyncio.sleep(0)
        assert host.runs == ["it"]

    run(scenario)


@pytest.mark.parametrize("rule", ["every 1h", "daily 02:30", "weekly sun 03:00"])
def test_a_clock_that_was_set_back_by_years_stops_no_schedule(rule: str) -> None:
    async def scenario(host: Host) -> None:
        await host.set(rule)
        await host.at(8 * 86_400)
        assert host.runs == ["it"]
        years_s = -10 * 366 * 86_400.0
        await host.at(years_s)
        await host.schedules.follow_clock()
        due_s = host.schedules.next_of(host.record) - NOON_S
        assert years_s < due_s <= years_s + 8 * 86_400
        reopened = await Host(host.store).open()
        try:
            assert reopened.record == host.record  # a service that is started again each day counts on
        finally:
            await reopened.close()
        await host.at(due_s - 1)
        assert host.runs == ["it"]
        await host.at(due_s)
        assert host.runs == ["it", "it"]

    run(scenario)


def test_a_clock_that_is_kept_in_step_brings_no_run_twice() -> None:
    async def scenario(host: Host) -> None:
        await host.set("every 1h")
        await host.at(3600)
        await host.at(3598)
        await host.schedules.follow_clock()
        await host.at(3601)
        assert host.runs == ["it"]

    run(scenario)
