"""Events: order, cursors without gaps, the ring, readers that come late, a store that fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import pytest

from mullion.base.errors import NoSpaceError
from mullion.model.views import EventView
from mullion.parent.events import Events
from mullion.parent.store import Condition, MemoryStore
from mullion.parent.store.protocol import Write

pytestmark = pytest.mark.unit


def run(scenario: Callable[[MemoryStore], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(scenario(MemoryStore()), 60)

    asyncio.run(main())


async def opened(store: MemoryStore, keep: int = 10_000) -> Events:
    events = Events(store, keep=keep)
    await events.open()
    return events


async def publish(events: Events, count: int, kind: str = "tick") -> None:
    for number in range(count):
        events.publish(kind, f"partition/{number}", {"number": number})
    await events.flush()


def cursors(views: Sequence[EventView]) -> list[int]:
    return [view.cursor for view in views]


def test_events_are_read_in_order_from_a_cursor() -> None:
    async def scenario(store: MemoryStore) -> None:
        events = await opened(store)
        await publish(events, 5)
        page = await events.read()
        assert cursors(page.events) == [1, 2, 3, 4, 5]
        assert page.cursor == 5
        assert not page.truncated
        assert page.events[2].target == "partition/2"
        assert page.events[2].data == {"number": 2}
        assert cursors((await events.read(3)).events) == [4, 5]
        assert cursors((await events.read(1, limit=2)).events) == [2, 3]
        assert cursors((await events.read(-2)).events) == [4, 5]
        assert cursors((await events.read(-100)).events) == [1, 2, 3, 4, 5]
        nothing = await events.read(5)
        assert (nothing.events, nothing.cursor) == ((), 5)
        await events.close()

    run(scenario)


def test_nothing_has_happened_yet() -> None:
    async def scenario(store: MemoryStore) -> None:
        events = await opened(store)
        page = await events.read()
        assert (page.events, page.cursor, page.truncated) == ((), 0, False)
        await events.close()

    run(scenario)


def test_cursors_go_on_after_a_restart() -> None:
    async def scenario(store: MemoryStore) -> None:
        events = await opened(store)
        await publish(events, 3)
        events.publish("last words", "service")
        await events.close()
        events = await opened(store)
        assert events.cursor == 4
        await publish(events, 1)
        page = await events.read(2)
        assert cursors(page.events) == [3, 4, 5]
        assert page.events[1].kind == "last words"
        await events.close()

    run(scenario)


def test_the_ring_forgets_the_oldest_and_says_so() -> None:
    async def scenario(store: MemoryStore) -> None:
        events = await opened(store, keep=10)
        await publish(events, 25)
        assert len(await store.list("events/")) == 10
        page = await events.read(3)
        assert page.truncated
        assert cursors(page.events) == list(range(16, 26))
        assert not (await events.read(15)).truncated
        assert not (await events.read(0)).truncated, "from the oldest on, nothing is missing"
        assert (await events.read(1000)).truncated, "a cursor of another store"
        await events.close()

    run(scenario)


def test_a_long_ring_is_read_from_the_store_where_memory_ends() -> None:
    async def scenario(store: MemoryStore) -> None:
        events = await opened(store)
        await publish(events, 700)
        seen: list[int] = []
        while len(seen) < 700:
            page = await events.read(seen[-1] if seen else 0, limit=100)
            seen += cursors(page.events)
        assert seen == list(range(1, 701))
        await events.close()

    run(scenario)


def test_followers_see_each_event_once_and_end_with_the_service() -> None:
    async def scenario(store: MemoryStore) -> None:
        events = await opened(store)
        await publish(events, 2)

        async def follow() -> list[int]:
            return [view.cursor async for view in events.follow(1)]

        followers = [asyncio.ensure_future(follow()) for _ in range(3)]
        await asyncio.sleep(0)
        await publish(events, 4)
        await events.close()
        assert [await follower for follower in followers] == [[2, 3, 4, 5, 6]] * 3

    run(scenario)


def test_a_follower_is_told_of_the_gap() -> None:
    async def scenario(store: MemoryStore) -> None:
        events = await opened(store, keep=5)
        await publish(events, 12)
        following = events.follow(2)
        gap, first = await anext(following), await anext(following)
        assert (gap.kind, gap.cursor, gap.data) == ("events.truncated", 7, {"after": 2})
        assert first.cursor == 8
        await events.close()

    run(scenario)


def test_wait_ends_with_an_event_or_without_one() -> None:
    async def scenario(store: MemoryStore) -> None:
        events = await opened(store)
        assert not await events.wait(0, 0)
        waiting = asyncio.ensure_future(events.wait(0, 60))
        await publish(events, 1)
        assert await waiting
        idle = asyncio.ensure_future(events.wait(1, 60))
        await asyncio.sleep(0)
        await events.close()
        assert not await idle

    run(scenario)


class FullStore(MemoryStore):
    """A store on a full disk, until there is room."""

    full = True

    async def transact(self, conditions: Sequence[Condition], writes: Sequence[Write]) -> int:
        if self.full:
            raise NoSpaceError("no space left for the store")
        return await super().transact(conditions, writes)


def test_a_full_disk_delays_events_and_counts_what_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        store = FullStore()
        events = Events(store, keep=300, retry_s=0)
        await events.open()
        for number in range(310):
            events.publish("tick", "x", {"number": number})
        waiting = asyncio.ensure_future(events.wait(0, 60))
        while "wait in memory" not in caplog.text:
            await asyncio.sleep(0)
        assert not waiting.done(), "an event was shown that is not stored"
        store.full = False
        assert await waiting
        await events.flush()
        page = await events.read(limit=1000)
        assert [view.data["number"] for view in page.events] == list(range(10, 310))
        assert cursors(page.events)[-1] == 301, "the one that counts the lost, and 300 ticks"
        first = await anext(store.watch("events/", 1))
        assert first.value is not None
        told = msgspec.json.decode(first.value, type=EventView)
        assert (told.cursor, told.kind, told.data) == (1, "events.lost", {"count": 10})
        await events.close()

    with caplog.at_level(logging.ERROR):
        asyncio.run(asyncio.wait_for(main(), 60))


def test_a_full_disk_at_the_end_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        events = Events(FullStore())
        await events.open()
        events.publish("tick", "x")
        await events.close()

    asyncio.run(asyncio.wait_for(main(), 60))
    assert "1 events are lost" in caplog.text
