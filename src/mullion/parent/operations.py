"""Operations: work that takes longer than a second, with progress, an end that is kept, and a way to stop it.

An operation is in the store before its work begins, and again when it has ended; progress in between is in memory and
in the events. States: running, then exactly one of succeeded, failed, cancelled (`TRANSITIONS` below).

After a crash (`recover`): what was running is handed to the function that its kind has registered, under the same id;
where there is none it has failed, with code `interrupted`. The same happens after an orderly end of the service:
`close` gives running work a moment, then cancels its task *without* `cancel_requested`, which tells the work not to
roll back: it goes on, or is cleaned up, at the next start.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from calendar import timegm
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import msgspec

from mullion.base import log as logs
from mullion.base.errors import (
    ConflictError,
    InvalidError,
    MullionError,
    NotFoundError,
    OperationCancelledError,
    OperationFailedError,
    StateError,
    UnavailableError,
)
from mullion.base.units import format_time, utc_now
from mullion.model.states import OperationState
from mullion.model.views import OperationView
from mullion.parent.events import Events
from mullion.parent.faults import error_view
from mullion.parent.store import Condition, Delete, Put, Store

log = logging.getLogger(__name__)
KEPT_OPERATIONS: Final = 1000
KEPT_S: Final = 7 * 86400
CLOSE_GRACE_S: Final = 5.0
_PROGRESS_STEP: Final = 0.05

TRANSITIONS: Final[Mapping[OperationState, frozenset[OperationState]]] = {
    OperationState.PENDING: frozenset({OperationState.RUNNING, OperationState.CANCELLED}),
    OperationState.RUNNING: frozenset({OperationState.SUCCEEDED, OperationState.FAILED, OperationState.CANCELLED}),
    OperationState.SUCCEEDED: frozenset(),
    OperationState.FAILED: frozenset(),
    OperationState.CANCELLED: frozenset(),
}


class InterruptedError(OperationFailedError):  # noqa: A001 - the operation's own word, and its stable code
    """The service ended while the operation was running, and it cannot be resumed."""

    code = "interrupted"
    default_remedy = "Look at what it has left with the target's `show` command, then start it again."


class Operation:
    """The handle by which an operation's work reports progress. One per operation, in its own task."""

    def __init__(self, owner: Operations, view: OperationView, cancellable: bool, exclusive: bool) -> None:
        self._owner = owner
        self.view = view
        self.exclusive = exclusive
        self.ended = asyncio.Event()
        self.work: asyncio.Task[Mapping[str, object] | None] | None = None
        self.keeper: asyncio.Task[None] | None = None
        self.cancel_requested = False
        """Somebody wants it cancelled: roll back. False when the task is cancelled because the service ends."""
        self.may_cancel = cancellable
        self._announced = 0.0

    @property
    def id(self) -> str:
        return self.view.id

    @property
    def target(self) -> str:
        return self.view.target

    def stage(self, text: str, progress: float | None = None) -> None:
        """Say what is being done now; `progress` from 0 to 1, and it never falls."""
        view = self.view
        done = view.progress if progress is None else max(view.progress, min(progress, 1.0))
        self.view = msgspec.structs.replace(view, stage=text, progress=done, updated_at=self._owner.clock())
        if text != view.stage or done - self._announced >= _PROGRESS_STEP:
            self._announced = done
            self._owner.announce(self.view, "operation.stage")

    def point_of_no_return(self) -> None:
        """From here on it cannot be cancelled."""
        self.may_cancel = False
        self.view = msgspec.structs.replace(self.view, cancellable=False, updated_at=self._owner.clock())


Work = Callable[[Operation], Awaitable[Mapping[str, object] | None]]
"""What an operation does. Its mapping (JSON values) is the result. On CancelledError it rolls back if the handle's
`cancel_requested` is set, and raises it again."""


class Operations:
    """All operations of this host. `open`, `register_resume` for each kind that can, `recover`, then `start`."""

    def __init__(
        self,
        store: Store,
        events: Events,
        *,
        keep: int = KEPT_OPERATIONS,
        keep_s: float = KEPT_S,
        prefix: str = "operations/",
        clock: Callable[[], str] = utc_now,
    ) -> None:
        self.clock = clock
        self._store = store
        self._events = events
        self._keep = keep
        self._keep_s = keep_s
        self._prefix = prefix
        self._operations: dict[str, Operation] = {}
        self._resume: dict[str, Work] = {}
        self._unsaved: set[str] = set()
        self._closing = False

    async def open(self) -> None:
        """Read the operations that are kept."""
        entries = await self._store.list(self._prefix)
        views = [msgspec.json.decode(entry.value, type=OperationView) for entry in entries]
        for view in sorted(views, key=lambda view: view.created_at):
            operation = Operation(self, view, view.cancellable, exclusive=True)
            if view.state.is_final:
                operation.ended.set()
            self._operations[view.id] = operation

    def register_resume(self, kind: str, work: Work) -> None:
        """After a crash, operations of this kind go on with this work; it must cope with any half-done state."""
        self._resume[kind] = work

    async def recover(self) -> list[OperationView]:
        """Resume, or fail, what was running when the service ended; what was found, in its new state."""
        found = [item for item in self._operations.values() if not item.view.state.is_final]
        for operation in found:
            view = operation.view
            work = self._resume.get(view.kind)
            if work is not None:
                log.info("operation %s (%s of %s) is resumed", view.id, view.kind, view.target)
                self._spawn(operation, work)
                continue
            where = f", at the stage {view.stage!r}" if view.stage else ""
            error = InterruptedError(
                f"{view.kind} of {view.target} was interrupted{where}: the service ended before it was done",
                operation=view.id,
            )
            await self._end(operation, OperationState.FAILED, error=error)
        return [item.view for item in found]

    async def start(
        self, kind: str, target: str, work: Work, *, cancellable: bool = False, exclusive: bool = True
    ) -> OperationView:
        """Begin an operation and answer at once; the work runs in a task of its own.

        Raises: ConflictError that names the operation that is running on the target, if either is exclusive (two that
        are not may run together); UnavailableError while the service ends; what the store raises.
        """
        if self._closing:
            raise UnavailableError("the service is ending", remedy="Start it again: `mullion serve --detach`.")
        for other in self._operations.values():
            if other.view.target == target and not other.view.state.is_final and (exclusive or other.exclusive):
                raise ConflictError(
                    f"{other.view.kind} of {target} is going on (operation {other.id})",
                    remedy=f"Wait for it: mullion operation show {other.id}"
                    + (f", or cancel it: mullion operation cancel {other.id}" if other.may_cancel else ""),
                    operation=other.id,
                    target=target,
                )
        now = self.clock()
        view = OperationView(
            new_id(), kind, target, OperationState.RUNNING, created_at=now, updated_at=now, cancellable=cancellable
        )
        operation = Operation(self, view, cancellable, exclusive)
        self._operations[view.id] = operation  # before the store has it, so that no second one begins meanwhile
        try:
            await self._store.transact(
                [Condition(self._key(view.id), 0)], [Put(self._key(view.id), msgspec.json.encode(view))]
            )
        except BaseException:
            del self._operations[view.id]
            raise
        self.announce(view, "operation.started")
        self._spawn(operation, work)
        return view

    def get(self, operation_id: str) -> OperationView:
        return self._find(operation_id).view

    def list(self, *, target: str | None = None, state: OperationState | None = None) -> tuple[OperationView, ...]:
        """Operations, oldest first."""
        return tuple(
            item.view
            for item in self._operations.values()
            if target in (None, item.view.target) and state in (None, item.view.state)
        )

    async def cancel(self, operation_id: str) -> OperationView:
        """Ask an operation to stop and roll back; it has ended when `wait` says so. One that is cancelled stays so.

        Raises: NotFoundError; StateError when it has ended otherwise or cannot be cancelled any more.
        """
        operation = self._find(operation_id)
        view = operation.view
        if operation.cancel_requested or view.state is OperationState.CANCELLED:
            return view
        if view.state.is_final or not operation.may_cancel or operation.work is None:
            state = view.state.value if view.state.is_final else "past the point where it can be cancelled"
            raise StateError(
                f"operation {operation_id} ({view.kind} of {view.target}) is {state}",
                state=state,
                required="running and cancellable",
                remedy="Wait for its end, then undo what it did by the opposite command.",
                operation=operation_id,
            )
        operation.cancel_requested = True
        operation.stage("cancelling")
        operation.work.cancel()
        return operation.view

    async def wait(self, operation_id: str, timeout_s: float | None = None) -> OperationView:
        """The operation when it has ended, or as it is after the timeout. Raises: NotFoundError."""
        operation = self._find(operation_id)
        try:
            async with asyncio.timeout(timeout_s):
                await operation.ended.wait()
        except TimeoutError:
            pass
        return operation.view

    async def close(self, grace_s: float = CLOSE_GRACE_S) -> None:
        """Take no more work; give what runs a moment to end, then leave it for the next start."""
        self._closing = True
        running = [item for item in self._operations.values() if item.keeper is not None and item.work is not None]
        if not running:
            return
        await asyncio.wait([item.keeper for item in running if item.keeper], timeout=grace_s)
        for item in running:
            if item.work is not None:
                item.work.cancel()
        keepers = [item.keeper for item in running if item.keeper is not None]
        if keepers:
            _done, stuck = await asyncio.wait(keepers, timeout=CLOSE_GRACE_S)
            for task in stuck:
                log.error("%s does not let itself be stopped", task.get_name())

    def announce(self, view: OperationView, kind: str) -> None:
        data: dict[str, object] = {"operation": view.id, "kind": view.kind, "state": view.state.value}
        data |= {"stage": view.stage, "progress": view.progress}
        if view.error is not None:
            data |= {"code": view.error.code, "message": view.error.message}
        self._events.publish(kind, view.target, data)

    def _spawn(self, operation: Operation, work: Work) -> None:
        """Two tasks: the work, which may be cancelled at any time, and its keeper, which never is."""
        view = operation.view
        with logs.bind(operation=view.id, target=view.target):
            operation.work = asyncio.create_task(_call(work, operation), name=f"work of operation {view.id}")
            operation.keeper = asyncio.create_task(
                self._keep_end(operation, operation.work), name=f"operation {view.id}, {view.kind} of {view.target}"
            )

    async def _keep_end(self, operation: Operation, work: asyncio.Task[Mapping[str, object] | None]) -> None:
        """Whatever happens to the work, the operation ends in one state."""
        view = operation.view
        begun_s = time.monotonic()
        log.info("%s begins", view.kind)
        await asyncio.wait([work])
        operation.work = None
        if not work.cancelled():
            error = work.exception()
            if error is None:
                await self._end(operation, OperationState.SUCCEEDED, result=work.result())
            else:
                await self._end(operation, OperationState.FAILED, error=error)
        elif operation.cancel_requested:
            cancelled = OperationCancelledError(f"{view.kind} of {view.target} was cancelled", operation=view.id)
            await self._end(operation, OperationState.CANCELLED, error=cancelled)
        elif self._closing:
            log.info("%s is left for the next start: the service ends", view.kind)
        else:
            stray = OperationFailedError(f"{view.kind} of {view.target} was given up from within", operation=view.id)
            await self._end(operation, OperationState.FAILED, error=stray)
        log.info("%s is %s after %.3f s", view.kind, operation.view.state.value, time.monotonic() - begun_s)
        operation.keeper = None

    async def _end(
        self,
        operation: Operation,
        state: OperationState,
        *,
        error: BaseException | None = None,
        result: Mapping[str, object] | None = None,
    ) -> None:
        assert state in TRANSITIONS[operation.view.state]
        operation.may_cancel = False
        view = msgspec.structs.replace(
            operation.view,
            state=state,
            updated_at=self.clock(),
            progress=1.0 if state is OperationState.SUCCEEDED else operation.view.progress,
            cancellable=False,
            result=dict(result) if result is not None else None,
            error=error_view(error) if error is not None else None,
        )
        await self._save(view)
        operation.view = view
        operation.ended.set()
        self.announce(view, f"operation.{state.value}")

    async def _save(self, view: OperationView) -> None:
        """Keep the end of an operation, with earlier ends that could not be kept, and forget old ones.

        A store that cannot write does not make an end undone: it is shown, logged, and kept with the next one.
        """
        again = [self._operations[known].view for known in self._unsaved if known in self._operations]
        old = self._too_old()
        writes = [Put(self._key(item.id), msgspec.json.encode(item)) for item in (*again, view)]
        try:
            await self._store.transact((), [*writes, *(Delete(self._key(known)) for known in old)])
        except MullionError as error:
            self._unsaved.add(view.id)
            log.error("the end of operation %s cannot be stored yet: %s", view.id, error)
            return
        self._unsaved.clear()
        for known in old:
            del self._operations[known]

    def _too_old(self) -> set[str]:
        limit = _limit(self.clock(), self._keep_s)
        ended = [item.id for item in self._operations.values() if item.ended.is_set() and item.id not in self._unsaved]
        surplus = len(self._operations) - self._keep
        return {
            known
            for number, known in enumerate(ended)
            if number < surplus or self._operations[known].view.updated_at < limit
        }

    def _find(self, operation_id: str) -> Operation:
        found = self._operations.get(operation_id)
        if found is None:
            raise NotFoundError(
                f"there is no operation {operation_id!r}",
                remedy="List them with `mullion operation list`; only the last thousand, and seven days, are kept.",
                operation=operation_id,
            )
        return found

    def _key(self, operation_id: str) -> str:
        return f"{self._prefix}{operation_id}"


async def _call(work: Work, operation: Operation) -> Mapping[str, object] | None:
    result = await work(operation)
    try:
        msgspec.json.encode(result)
    except TypeError as error:
        raise InvalidError(f"the result cannot be written as JSON: {error}", remedy="Report it: a fault.") from error
    return result


def new_id() -> str:
    """An id that is unique and roughly sorts by its time: 11 hex digits of milliseconds since 1970, 6 of chance."""
    return f"{time.time_ns() // 1_000_000:011x}-{os.urandom(3).hex()}"


def _limit(now: str, keep_s: float) -> str:
    """The RFC 3339 time `keep_s` before now."""
    return format_time(int((timegm(time.strptime(now[:19], "%Y-%m-%dT%H:%M:%S")) - keep_s) * 1e9))
