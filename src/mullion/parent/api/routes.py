"""The kernel's own addresses: operations and events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Final

import msgspec
from litestar import Response, get, post
from litestar.di import NamedDependency
from litestar.params import PathParameter, QueryParameter, SkipValidation
from litestar.response import Stream

from mullion.base.units import utc_now
from mullion.model.states import OperationState
from mullion.model.views import EventView, OperationView
from mullion.parent.events import EventPage, Events
from mullion.parent.operations import Operations

MAX_WAIT_S: Final = 60.0
_HEARTBEAT_S: Final = 15.0
_OperationId = Annotated[str, PathParameter(description="the operation's id", max_length=64)]
_After = Annotated[
    int,
    QueryParameter(
        ge=-10_000, le=2**53, description="cursor of the last event seen; 0: from the oldest; -n: the last n events"
    ),
]
_WaitS = Annotated[float, QueryParameter(ge=0, le=MAX_WAIT_S, description="how long to wait, in seconds")]


def accepted(view: OperationView) -> Response[OperationView]:
    """The answer to a request that began an operation: 202 with its address."""
    return Response(view, status_code=202, headers={"location": f"/1.0/operations/{view.id}"})


@get("/1.0/operations", tags=["operations"])
async def list_operations(
    operations: NamedDependency[SkipValidation[Operations]],
    target: Annotated[str | None, QueryParameter(description="only those of this target")] = None,
    status: Annotated[OperationState | None, QueryParameter(description="only those in this state")] = None,
) -> list[OperationView]:
    """The operations that are kept, oldest first."""
    return list(operations.list(target=target, state=status))


@get("/1.0/operations/{operation_id:str}", tags=["operations"])
async def show_operation(
    operations: NamedDependency[SkipValidation[Operations]], operation_id: _OperationId
) -> OperationView:
    """One operation as it is now."""
    return operations.get(operation_id)


@post("/1.0/operations/{operation_id:str}/cancel", tags=["operations"], status_code=202)
async def cancel_operation(
    operations: NamedDependency[SkipValidation[Operations]], operation_id: _OperationId
) -> Response[OperationView]:
    """Ask an operation to stop and roll back; wait for its end to know that it has."""
    return accepted(await operations.cancel(operation_id))


@get("/1.0/operations/{operation_id:str}/wait", tags=["operations"])
async def wait_for_operation(
    operations: NamedDependency[SkipValidation[Operations]],
    closing: NamedDependency[SkipValidation[asyncio.Event]],
    operation_id: _OperationId,
    timeout_s: _WaitS = 30.0,
) -> OperationView:
    """The operation once it has ended, or as it is when the time is over."""
    operations.get(operation_id)
    await _unless(closing, operations.wait(operation_id, timeout_s))
    return operations.get(operation_id)


@get("/1.0/events", tags=["events"])
async def read_events(
    events: NamedDependency[SkipValidation[Events]],
    closing: NamedDependency[SkipValidation[asyncio.Event]],
    after: _After = 0,
    limit: Annotated[int, QueryParameter(ge=1, le=1000)] = 100,
    wait_s: _WaitS = 0.0,
) -> EventPage:
    """Events after a cursor; with `wait_s`, an answer as soon as there is one."""
    page = await events.read(after, limit)
    if not page.events and wait_s:
        await _unless(closing, events.wait(page.cursor, wait_s))
        page = await events.read(page.cursor or after, limit)
    return page


@get("/1.0/events/stream", tags=["events"], include_in_schema=False)
async def stream_events(
    events: NamedDependency[SkipValidation[Events]],
    closing: NamedDependency[SkipValidation[asyncio.Event]],
    after: _After = 0,
) -> Stream:
    """Events after a cursor and all that come, one JSON object a line; an empty line every 15 s shows life."""
    return Stream(_lines(events, closing, after), media_type="application/x-ndjson")


ROUTES: Final = (list_operations, show_operation, cancel_operation, wait_for_operation, read_events, stream_events)


async def _lines(events: Events, closing: asyncio.Event, after: int) -> AsyncIterator[bytes]:
    cursor = after
    while not closing.is_set():
        page = await events.read(cursor, 200)
        if page.truncated:
            first = page.events[0].cursor if page.events else page.cursor + 1
            gap = EventView(first - 1, utc_now(), "events.truncated", "events", {"after": cursor})
            yield msgspec.json.encode(gap) + b"\n"
        for event in page.events:
            yield msgspec.json.encode(event) + b"\n"
        cursor = page.cursor
        if not page.events and not await _unless(closing, events.wait(cursor, _HEARTBEAT_S)):
            yield b"\n"


async def _unless(closing: asyncio.Event, waiting: object) -> bool:
    """Wait for a coroutine, but not longer than the service lives; its answer, or False."""
    task = asyncio.ensure_future(waiting)  # type: ignore[call-overload]
    end = asyncio.ensure_future(closing.wait())
    try:
        await asyncio.wait([task, end], return_when=asyncio.FIRST_COMPLETED)
        return bool(task.result()) if task.done() else False
    finally:
        for one in (task, end):
            one.cancel()
        await asyncio.wait([task, end])
