"""Events: what happened, in order, with a cursor at which a reader resumes.

Events are hints for people and programs: the truth is in the store and in what is observed. Cursors grow by one
without gaps. The last 10,000 events are kept; a reader that wants older ones is told that some are gone.

Durability: an event is shown to readers only after it is in the store, so that a cursor that anybody has seen never
comes to mean another event. A crash can lose events that were published in the last milliseconds, unseen by all.
While the store cannot write, events wait in memory (as many as are kept); what is dropped then is counted in an event
`events.lost`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

import msgspec

from mullion.base.errors import MullionError
from mullion.base.units import utc_now
from mullion.model.views import EventView
from mullion.parent.store import Delete, Put, Store
from mullion.parent.store.protocol import Write

log = logging.getLogger(__name__)
KEPT_EVENTS: Final = 10_000
_TAIL: Final = 256
_BATCH: Final = 200
_RETRY_S: Final = 1.0


class EventPage(msgspec.Struct, frozen=True):
    """Events in order. `cursor` is where to go on; `truncated` says that events before the first are gone."""

    events: tuple[EventView, ...]
    cursor: int
    truncated: bool = False


class _Pending(msgspec.Struct):
    at: str
    kind: str
    target: str
    data: dict[str, object]


class Events:
    """The ordered events of one host. `open` it before use; call it from its event loop only."""

    def __init__(
        self,
        store: Store,
        *,
        keep: int = KEPT_EVENTS,
        prefix: str = "events/",
        clock: Callable[[], str] = utc_now,
        retry_s: float = _RETRY_S,
    ) -> None:
        self._store = store
        self._keep = keep
        self._prefix = prefix
        self._clock = clock
        self._retry_s = retry_s
        self._first = 1
        self._last = 0
        self._tail: deque[EventView] = deque(maxlen=_TAIL)
        self._pending: deque[_Pending] = deque()
        self._lost = 0
        self._writing = 0
        self._published = 0
        self._stored = 0
        self._work = asyncio.Event()
        self._moved = asyncio.Event()
        self._closing = asyncio.Event()
        self._closed = False
        self._writer: asyncio.Task[None] | None = None

    @property
    def cursor(self) -> int:
        """The cursor of the last event that readers can see."""
        return self._last

    async def open(self) -> None:
        """Find where the ring stands, and begin to write."""
        oldest = await self._store.list(self._prefix, limit=1)
        newest = await self._store.list(self._prefix, limit=1, descending=True)
        if oldest and newest:
            self._first, self._last = self._cursor_of(oldest[0].key), self._cursor_of(newest[0].key)
        self._writer = asyncio.create_task(self._write_all(), name="events")

    def publish(self, kind: str, target: str, data: Mapping[str, object] | None = None) -> None:
        """Something happened: readers see it as soon as it is in the store. Never blocks and never fails."""
        self._published += 1
        if len(self._pending) >= max(self._keep, _BATCH) + self._writing:
            del self._pending[self._writing]  # the oldest that is not being written at this moment
            self._lost += 1
        self._pending.append(_Pending(self._clock(), kind, target, dict(data or {})))
        self._work.set()

    async def read(self, after: int = 0, limit: int = 100) -> EventPage:
        """Events after a cursor. 0 begins with the oldest that is kept; -n with the last n.

        A cursor that is no longer kept, or that is of another store, gives the oldest events and `truncated`.
        """
        truncated = False
        if after < 0:
            after = max(self._last + after, self._first - 1)
        elif after == 0:
            after = self._first - 1
        elif after < self._first - 1 or after > self._last:
            after, truncated = self._first - 1, True
        if after >= self._last:
            return EventPage((), self._last, truncated)
        if self._tail and self._tail[0].cursor <= after + 1:
            start = after + 1 - self._tail[0].cursor
            found = tuple(self._tail[index] for index in range(start, min(start + limit, len(self._tail))))
        else:
            found = await self._read_stored(after, limit)
            truncated = truncated or (bool(found) and found[0].cursor > after + 1)  # dropped while we were reading
        return EventPage(found, found[-1].cursor if found else after, truncated)

    async def wait(self, after: int, timeout_s: float) -> bool:
        """Wait for an event after the cursor; False when none came in time, or when the service ends."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._last <= after and not self._closed:
                    await self._moved.wait()
        return self._last > after

    async def follow(self, after: int = 0) -> AsyncIterator[EventView]:
        """Events after a cursor (as in `read`), then new ones as they come. Ends when the service ends.

        Where events are gone, one of kind `events.truncated` stands in their place.
        """
        while True:
            page = await self.read(after, _BATCH)
            if page.truncated:
                yield EventView(self._first - 1, self._clock(), "events.truncated", "events", {"after": after})
            for event in page.events:
                yield event
            after = page.cursor
            while self._last <= after:
                if self._closed:
                    return
                await self._moved.wait()

    async def flush(self) -> None:
        """Wait until all that was published before the call can be read, or until the service ends."""
        goal = self._published
        while self._stored < goal and not self._closed:
            await self._moved.wait()

    async def close(self) -> None:
        """Write what is left, and end the readers. May be called again."""
        self._closing.set()
        self._work.set()
        if self._writer is not None:
            await asyncio.wait([self._writer])
        self._closed = True
        self._wake()

    async def _write_all(self) -> None:
        """The writer's task: the only one that moves the cursor."""
        failing = False
        while self._pending or not self._closing.is_set():
            if not self._pending:
                self._work.clear()
                await self._work.wait()
                continue
            try:
                await self._write_some()
                failing = False
            except MullionError as error:
                if self._closing.is_set():
                    log.error("%d events are lost: %s", len(self._pending), error)
                    return
                if not failing:
                    log.error("events cannot be stored, they wait in memory: %s", error)
                failing = True
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._retry_s):
                        await self._closing.wait()

    async def _write_some(self) -> None:
        """Give the oldest pending events their cursors, store them, show them."""
        lost, count = self._lost, min(len(self._pending), _BATCH)
        batch = list(itertools.islice(self._pending, count))
        if lost:
            batch.insert(0, _Pending(self._clock(), "events.lost", "events", {"count": lost}))
        views = [
            EventView(cursor, pending.at, pending.kind, pending.target, pending.data)
            for cursor, pending in enumerate(batch, self._last + 1)
        ]
        last = views[-1].cursor
        first = max(self._first, min(last - self._keep + 1, self._first + 2 * _BATCH))
        writes: list[Write] = [Put(self._key(view.cursor), msgspec.json.encode(view)) for view in views]
        writes += [Delete(self._key(cursor)) for cursor in range(self._first, first)]
        self._writing = count
        try:
            await self._store.transact((), writes)
        finally:
            self._writing = 0
        for _ in range(count):
            self._pending.popleft()
        self._lost -= lost
        self._stored += count + lost
        self._first, self._last = first, last
        self._tail.extend(views)
        self._wake()

    async def _read_stored(self, after: int, limit: int) -> tuple[EventView, ...]:
        entries = await self._store.list(self._prefix, after=self._key(after), limit=limit)
        return tuple(msgspec.json.decode(entry.value, type=EventView) for entry in entries)

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    def _key(self, cursor: int) -> str:
        return f"{self._prefix}{cursor:016}"

    def _cursor_of(self, key: str) -> int:
        return int(key.removeprefix(self._prefix))
