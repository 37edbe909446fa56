"""The reconciling driver: brings each target from what is to what is wanted, again and again until nothing is left.

For one target at a time: observe, plan (pure), apply the steps in order, observe again; an empty plan is the end. A
step that fails, or a plan that does not get empty, is tried again with growing pauses (0.5 s doubling to 60 s) or at
the next hint, whichever comes first. Every step may be repeated, so a crash at any point costs nothing but the time.

Targets do not wait for each other; two rounds of one target never overlap.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

from mullion.base import log as logs
from mullion.base.errors import OperationFailedError

log = logging.getLogger(__name__)
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 60.0
MAX_ROUNDS: Final = 10

Situation = TypeVar("Situation")
Step = TypeVar("Step")
Pause = Callable[[asyncio.Event, float], Awaitable[None]]


class _Target:
    """One target's task, its hint, and how its last round ended."""

    def __init__(self) -> None:
        self.hint = asyncio.Event()
        self.hint.set()
        self.asked = 1
        self.settled = 0
        self.error: Exception | None = None
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class Reconciler(Generic[Situation, Step]):
    """`observe(target)` gives what is wanted and what is, `plan(situation)` the steps between, `apply` does one."""

    def __init__(
        self,
        *,
        observe: Callable[[str], Awaitable[Situation]],
        plan: Callable[[Situation], Sequence[Step]],
        apply: Callable[[str, Step], Awaitable[None]],
        pause: Pause | None = None,
    ) -> None:
        self._observe = observe
        self._plan = plan
        self._apply = apply
        self._pause = pause or wait_for_hint
        self._targets: dict[str, _Target] = {}
        self._closed = False

    def hint(self, target: str) -> None:
        """Something about a target may have changed: look at it soon. The first hint begins its task."""
        if self._closed:
            return
        known = self._targets.get(target)
        if known is None:
            known = self._targets[target] = _Target()
            known.task = asyncio.create_task(self._drive(target, known), name=f"reconcile {target}")
        else:
            known.asked += 1
            known.hint.set()

    async def settled(self, target: str) -> None:
        """Wait until all hints so far are reconciled. Raises: the error of the round that they led to."""
        known = self._targets.get(target)
        if known is None:
            return
        goal = known.asked
        while known.settled < goal:
            await known.changed.wait()
        if known.error is not None:
            raise known.error

    def error(self, target: str) -> Exception | None:
        """Why the target is not what it should be; None when it is."""
        known = self._targets.get(target)
        return known.error if known is not None else None

    async def forget(self, target: str) -> None:
        """End a target's task; a step that is being applied is cancelled."""
        known = self._targets.pop(target, None)
        if known is not None:
            await _end([known])

    async def close(self) -> None:
        """End all tasks. May be called again."""
        self._closed = True
        known = list(self._targets.values())
        self._targets.clear()
        await _end(known)

    async def _drive(self, target: str, state: _Target) -> None:
        pause_s = FIRST_PAUSE_S
        with logs.bind(target=target):
            while True:
                await state.hint.wait()
                state.hint.clear()
                goal = state.asked
                try:
                    await self._reconcile(target)
                    state.error = None
                    pause_s = FIRST_PAUSE_S
                except Exception as error:
                    if repr(state.error) != repr(error):
                        log.warning("cannot be reconciled, it is tried again: %s", error, exc_info=error)
                    state.error = error
                state.settled = goal
                state.changed.set()
                state.changed = asyncio.Event()
                if state.error is not None:
                    await self._pause(state.hint, pause_s)
                    state.hint.set()
                    pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    async def _reconcile(self, target: str) -> None:
        steps: Sequence[Step] = ()
        for _ in range(MAX_ROUNDS):
            steps = self._plan(await self._observe(target))
            if not steps:
                return
            for step in steps:
                log.debug("%s", step)
                await self._apply(target, step)
        raise OperationFailedError(
            f"{target} does not become what it should be: after {MAX_ROUNDS} rounds there is still {steps[0]!r} to do",
            target=target,
        )


async def wait_for_hint(hint: asyncio.Event, pause_s: float) -> None:
    """The pause after a failure: over at the next hint, or after its time."""
    try:
        await asyncio.wait_for(hint.wait(), pause_s)
    except TimeoutError:
        return


async def _end(targets: Sequence[_Target]) -> None:
    tasks = [target.task for target in targets if target.task is not None]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for target in targets:
        target.settled = target.asked
        target.changed.set()
