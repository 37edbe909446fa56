"""What is to be done again and again: schedules in the store, and the loop that runs them when they are due.

    schedules/KIND/PARTITION/NAME

A service registers what a run of its kind does; whatever else a schedule says (what to keep, how) are its options,
which only that service reads.

Invariants: a schedule runs once at a time; what was due while the service was down, or while it ran, is one run. A
clock that was set back does not stop a schedule: its times are counted from the present then.
Durability: that it ran, and how that went, is in the store after the run: a run that a crash interrupts is repeated.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec

from mullion.base import log as logs
from mullion.base.errors import MullionError, NotFoundError
from mullion.base.units import format_time
from mullion.model.schedule import next_due, parse_rule
from mullion.model.states import OperationState
from mullion.model.views import ErrorView, OperationView
from mullion.parent.events import Events
from mullion.parent.faults import error_view
from mullion.parent.operations import Operations
from mullion.parent.store import Condition, Delete, Put, Store

log = logging.getLogger(__name__)

_PREFIX: Final = "schedules/"
_LONGEST_SLEEP_S: Final = 60.0
"""Clocks are set while we sleep, and sleep does not notice."""
_SET_BACK_S: Final = 300.0
"""A clock goes back less when it is kept in step: then a schedule waits until the clock gets to its last run again."""
_BUSY_RETRY_S: Final = 15.0
_BUSY_TRIES: Final = 40
"""Ten minutes for a start, a backup or a checkpoint that goes on with the same target."""
_BUSY_CODES: Final = frozenset({"conflict", "repository-busy"})


class ScheduleRecord(msgspec.Struct, frozen=True):
    """A schedule in the store. Times are seconds since 1970."""

    kind: str
    target: str
    """The partition."""
    name: str
    rule: str
    begun_s: float
    options: dict[str, Any] = {}
    last_s: float | None = None
    last_result: str = ""
    """In a few words, of the last run that succeeded."""
    last_error: ErrorView | None = None
    """Of the last run, when it failed."""

    @property
    def key(self) -> str:
        return f"{_PREFIX}{self.kind}/{self.target}/{self.name}"


Run = Callable[[ScheduleRecord], Awaitable[str]]
"""What a run of a kind does; its answer says in a few words what it did. What it raises is the run's failure."""


class Schedules:
    """All schedules of this host. `register` each kind, then `open`."""

    def __init__(self, store: Store, events: Events, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._events = events
        self._clock = clock
        self._runs: dict[str, Run] = {}
        self._records: dict[str, ScheduleRecord] = {}
        self._revisions: dict[str, int] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    def register(self, kind: str, run: Run) -> None:
        """What is done when a schedule of this kind is due."""
        self._runs[kind] = run

    async def open(self) -> None:
        """Read the schedules and begin to run them."""
        for entry in await self._store.list(_PREFIX):
            self._keep(msgspec.json.decode(entry.value, type=ScheduleRecord), entry.revision)
        self._loop = asyncio.create_task(self._run_for_ever(), name="schedules")

    async def close(self) -> None:
        """Begin no more runs, and give up those that go on: they are repeated at the next start."""
        tasks = [task for task in (self._loop, *self._running.values()) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # -- what there is -------------------------------------------------------------------------------------------------

    def list(self, kind: str, target: str | None = None) -> tuple[ScheduleRecord, ...]:
        """By target and name."""
        found = [one for one in self._records.values() if one.kind == kind and target in (None, one.target)]
        return tuple(sorted(found, key=lambda one: one.key))

    def get(self, kind: str, target: str, name: str) -> ScheduleRecord | None:
        """The schedule of that name, if there is one."""
        return self._records.get(ScheduleRecord(kind, target, name, "", 0.0).key)

    def find(self, kind: str, target: str, name: str) -> ScheduleRecord:
        """Raises: NotFoundError."""
        found = self.get(kind, target, name)
        if found is None:
            raise NotFoundError(
                f"partition {target} has no {kind} schedule {name!r}",
                remedy=f"List them: mullion {kind} schedule list {target}",
                partition=target,
            )
        return found

    def view_fields(self, record: ScheduleRecord) -> dict[str, Any]:
        """What every view of a schedule says, whatever it does."""
        return {
            "name": record.name,
            "partition": record.target,
            "rule": record.rule,
            "next_at": format_time(int(self.next_of(record) * 1e9)),
            "last_at": None if record.last_s is None else format_time(int(record.last_s * 1e9)),
            "last_result": record.last_result,
            "last_error": record.last_error,
            "etag": str(self._revisions[record.key]),
        }

    def next_of(self, record: ScheduleRecord) -> float:
        """When it runs next; in the past when it is about to."""
        return next_due(
            parse_rule(record.rule), begun_s=record.begun_s, last_s=record.last_s, now_s=self._clock(), zone=None
        )

    async def set(self, kind: str, target: str, name: str, rule: str, options: dict[str, Any]) -> ScheduleRecord:
        """Make a schedule, or change one: how it ran is kept, and its times are counted anew. Raises: InvalidError."""
        assert kind in self._runs, f"a kind that is registered, not {kind}"
        made = ScheduleRecord(kind, target, name, str(parse_rule(rule)), self._clock(), options)
        before = self._records.get(made.key)
        if before is not None:
            made = msgspec.structs.replace(
                before,
                rule=made.rule,
                options=options,
                begun_s=before.begun_s if before.rule == made.rule else made.begun_s,
                last_s=before.last_s if before.rule == made.rule else None,
            )
        await self._put(made)
        self._publish(made, "schedule.set", {"rule": made.rule})
        self._changed.set()
        return made

    async def remove(self, record: ScheduleRecord) -> None:
        """Forget a schedule; a run of it that goes on comes to its end."""
        await self._store.transact([Condition(record.key, self._revisions[record.key])], [Delete(record.key)])
        del self._records[record.key], self._revisions[record.key]
        self._publish(record, "schedule.removed", {})

    async def remove_target(self, kind: str, target: str) -> None:
        """Forget all schedules of something that is gone."""
        for record in self.list(kind, target):
            await self.remove(record)

    async def _put(self, record: ScheduleRecord) -> None:
        condition = Condition(record.key, self._revisions.get(record.key, 0))
        self._keep(record, await self._store.transact([condition], [Put(record.key, msgspec.json.encode(record))]))

    def _keep(self, record: ScheduleRecord, revision: int) -> None:
        self._records[record.key] = record
        self._revisions[record.key] = revision

    def _publish(self, record: ScheduleRecord, kind: str, data: Mapping[str, object]) -> None:
        said = {"kind": record.kind, "schedule": record.name, **data}
        self._events.publish(kind, f"partition/{record.target}", said)

    # -- the loop ------------------------------------------------------------------------------------------------------

    async def _run_for_ever(self) -> None:
        while True:
            self._changed.clear()
            await self.follow_clock()
            self.begin_due()
            try:
                async with asyncio.timeout(self._sleep_s()):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _sleep_s(self) -> float:
        """Until the next one is due, but not so long that a clock that is set goes unnoticed."""
        idle = [record for record in self._records.values() if record.key not in self._running]
        now_s = self._clock()
        return max(0.0, min([_LONGEST_SLEEP_S, *(self.next_of(record) - now_s for record in idle)]))

    async def follow_clock(self) -> None:
        """Count the times of schedules that ran, or were made, later than the clock shows from the present."""
        now_s = self._clock()
        for key in list(self._records):
            record = self._records.get(key)
            if record is None or key in self._running:  # removed while another was stored
                continue
            ahead_s = max(record.begun_s, record.last_s or 0.0) - now_s
            if ahead_s <= _SET_BACK_S:
                continue
            present = msgspec.structs.replace(
                record,
                begun_s=min(record.begun_s, now_s),
                last_s=None if record.last_s is None else min(record.last_s, now_s),
            )
            log.warning("%s: the clock was set back by %.0f s: counted from now", key, ahead_s)
            try:
                await self._put(present)
            except MullionError as fault:
                log.error("%s: that cannot be stored, and is tried again: %s", key, fault)

    def begin_due(self) -> tuple[asyncio.Task[None], ...]:
        """Begin what is due and does not run already."""
        now_s = self._clock()
        begun = []
        for record in list(self._records.values()):
            if record.key in self._running or record.kind not in self._runs or self.next_of(record) > now_s:
                continue
            task = asyncio.create_task(self._run(record, now_s), name=record.key)
            self._running[record.key] = task
            begun.append(task)
        return tuple(begun)

    async def _run(self, record: ScheduleRecord, now_s: float) -> None:
        """One run: what comes of it is in the store at its end."""
        with logs.bind(schedule=record.name, target=record.target):
            try:
                result, error = await self._runs[record.kind](record), None
            except Exception as fault:
                result, error = "", error_view(fault)
            try:
                await self._note(record, now_s, result, error)
            except MullionError as fault:
                log.error("how a schedule ran cannot be stored; it runs again: %s", fault)
                await asyncio.sleep(_LONGEST_SLEEP_S)
            finally:
                del self._running[record.key]
                self._changed.set()

    async def _note(self, record: ScheduleRecord, now_s: float, result: str, error: ErrorView | None) -> None:
        present = self._records.get(record.key)
        if present is None:  # removed meanwhile
            return
        result = result or present.last_result
        await self._put(msgspec.structs.replace(present, last_s=now_s, last_result=result, last_error=error))
        if error is not None:
            log.warning("a run of the schedule failed: %s", error.message)
            said = {"code": error.code, "message": error.message, "remedy": error.remedy}
            self._publish(record, "schedule.failed", said)


async def run_when_free(operations: Operations, begin: Callable[[], Awaitable[OperationView]]) -> Mapping[str, object]:
    """Begin an operation as soon as nothing else goes on with what it needs, and wait for its end; its result.

    Raises: what `begin` raises; what the operation failed with; ConflictError when it is busy for ten minutes.
    """
    tries = 0
    while True:
        try:
            done = await operations.wait((await begin()).id)
            if done.state is OperationState.SUCCEEDED:
                return done.result or {}
            raise MullionError.from_wire(msgspec.to_builtins(done.error))
        except MullionError as error:
            tries += 1
            if error.to_wire()["code"] not in _BUSY_CODES or tries == _BUSY_TRIES:
                raise
            log.info("the schedule waits: %s", error)
            await asyncio.sleep(_BUSY_RETRY_S)
