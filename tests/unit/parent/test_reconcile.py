"""The reconciling driver: repeats until the plan is empty, one round at a time, again after a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from mullion.base.errors import OperationFailedError, UnavailableError
from mullion.parent.reconcile import FIRST_PAUSE_S, LONGEST_PAUSE_S, Reconciler, wait_for_hint

pytestmark = pytest.mark.unit


class World:
    """Numbers that should become other numbers, one step at a time."""

    def __init__(self) -> None:
        self.wanted: dict[str, int] = {}
        self.found: dict[str, int] = {}
        self.failures = 0
        self.pauses: list[float] = []
        self.inside: set[str] = set()
        self.reconciler = Reconciler(observe=self.observe, plan=plan, apply=self.apply, pause=self.pause)

    async def observe(self, target: str) -> tuple[int, int]:
        return self.wanted.get(target, 0), self.found.get(target, 0)

    async def apply(self, target: str, step: int) -> None:
        assert target not in self.inside, "two rounds of one target overlap"
        self.inside.add(target)
        await asyncio.sleep(0)
        self.inside.discard(target)
        if self.failures:
            self.failures -= 1
            raise UnavailableError("the host does not answer")
        self.found[target] = self.found.get(target, 0) + step

    async def pause(self, _hint: asyncio.Event, pause_s: float) -> None:
        self.pauses.append(pause_s)
        await asyncio.sleep(0)

    def want(self, target: str, value: int) -> None:
        self.wanted[target] = value
        self.reconciler.hint(target)


def plan(situation: tuple[int, int]) -> list[int]:
    wanted, found = situation
    return [0] if wanted < 0 else [1 if wanted > found else -1] * min(abs(wanted - found), 3)


def run(scenario: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        await asyncio.wait_for(scenario(world), 60)
        await world.reconciler.close()

    asyncio.run(main())


def test_reaches_what_is_wanted_in_several_rounds() -> None:
    async def scenario(world: World) -> None:
        world.want("web", 7)
        world.want("db", 2)
        await world.reconciler.settled("web")
        await world.reconciler.settled("db")
        assert world.found == {"web": 7, "db": 2}
        world.want("web", 1)
        await world.reconciler.settled("web")
        assert world.found["web"] == 1

    run(scenario)


def test_hints_during_a_round_lead_to_another() -> None:
    async def scenario(world: World) -> None:
        for value in (3, 9, 5, 12, 4):
            world.want("web", value)
            await asyncio.sleep(0)
        await world.reconciler.settled("web")
        assert world.found["web"] == 4

    run(scenario)


def test_a_failure_is_told_and_tried_again_with_growing_pauses() -> None:
    async def scenario(world: World) -> None:
        world.failures = 10
        world.want("web", 1)
        with pytest.raises(UnavailableError):
            await world.reconciler.settled("web")
        assert isinstance(world.reconciler.error("web"), UnavailableError)
        while world.found.get("web") != 1:
            await asyncio.sleep(0)
        world.want("web", 2)
        await world.reconciler.settled("web")
        assert world.reconciler.error("web") is None
        assert world.pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
        assert world.pauses[-1] == LONGEST_PAUSE_S
        assert len(world.pauses) == 10

    run(scenario)


def test_a_plan_that_never_gets_empty_is_an_error() -> None:
    async def scenario(world: World) -> None:
        world.want("web", -1)
        with pytest.raises(OperationFailedError, match="web does not become"):
            await world.reconciler.settled("web")

    run(scenario)


def test_a_hint_ends_the_pause() -> None:
    async def main() -> None:
        hint = asyncio.Event()
        pausing = asyncio.ensure_future(wait_for_hint(hint, 3600))
        await asyncio.sleep(0)
        hint.set()
        await pausing
        hint.clear()
        await wait_for_hint(hint, 0)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_forgotten_and_closed_targets_are_left_alone() -> None:
    async def scenario(world: World) -> None:
        world.want("web", 1)
        await world.reconciler.settled("web")
        await world.reconciler.forget("web")
        await world.reconciler.forget("never known")
        await world.reconciler.settled("web")
        world.want("db", 1)
        waiting = asyncio.ensure_future(world.reconciler.settled("db"))
        await asyncio.sleep(0)
        await world.reconciler.close()
        await waiting
        world.want("late", 1)
        await world.reconciler.settled("late")
        assert "late" not in world.found
        assert len(asyncio.all_tasks()) <= 2, "a task was left behind"

    run(scenario)
