"""The hot loop by itself: what it publishes, and where it says it stands. What it serves: `test_ring.py`."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator

import pytest
from tests.framework.virtqueue import GranuleDisk, GuestSide

from mullion.provider import ring
from mullion.provider.hot_loop import UNANSWERED, HotLoop
from mullion.provider.memory import GuestFault
from mullion.wire.vhost_user.virtio_blk import BlkRequest

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("each_implementation")]

SIZE = 8


@pytest.fixture
def side() -> Iterator[GuestSide]:
    made = GuestSide(GranuleDisk(1 << 20), queue_size=SIZE)
    yield made
    made.close()


def hot_loop(side: GuestSide) -> HotLoop:
    place, memory = side.driver.place, side.guest_memory.largest
    assert memory is not None
    return ring.HotLoop(
        size=SIZE,
        descriptors=side.memory[place.descriptor : place.descriptor + 16 * SIZE],
        available=side.memory[place.available : place.available + 6 + 2 * SIZE],
        used=side.memory[place.used : place.used + 6 + 8 * SIZE],
        base=memory.guest_address,
        memory=memory.view,
        event_idx=True,
        barrier=threading.Lock(),
    )


def used_ring(side: GuestSide) -> tuple[int, list[tuple[int, int]]]:
    """Its index, and (head, length) of all elements."""
    used = side.memory[side.driver.place.used :]
    words = used[4 : 4 + 8 * SIZE].cast("I").tolist()
    return used[:4].cast("H")[1], list(zip(words[::2], words[1::2], strict=True))


def test_what_is_answered_later_is_published_by_somebody_else(side: GuestSide) -> None:
    """The available and the used ring go on from indices of their own, and wrap on their own."""
    for slot in range(4):
        kind = BlkRequest.FLUSH if slot in (0, 2) else BlkRequest.IN
        side.driver.submit(slot, kind, 8 * slot, answer_bytes=512 if kind is BlkRequest.IN else 0)
    heads = side.memory[side.driver.place.available + 4 :][:8].cast("H").tolist()
    left_over: list[int] = []

    def serve(head: int) -> int:
        left_over.append(head)
        return UNANSWERED

    loop = hot_loop(side)
    loop.run(side.disk, serve, 0, 0xFFFF, 4)
    assert left_over == [heads[0], heads[2]]
    assert (loop.available_index, loop.used_index, loop.moved_bytes) == (4, 1, 1024)
    index, elements = used_ring(side)
    assert index == 1
    assert (elements[7], elements[0]) == ((heads[1], 513), (heads[3], 513))


def test_a_request_that_cannot_be_served_is_not_taken(side: GuestSide) -> None:
    side.driver.submit(0, BlkRequest.IN, 0, answer_bytes=512)
    side.driver.submit(1, BlkRequest.FLUSH)

    def serve(_head: int) -> int:
        raise GuestFault("a lie")

    loop = hot_loop(side)
    with pytest.raises(GuestFault, match="a lie"):
        loop.run(side.disk, serve, 0, 0, 2)
    assert (loop.available_index, loop.used_index, loop.moved_bytes) == (1, 1, 512)
    assert used_ring(side)[0] == 1


class Holding:
    """A disk that somebody wants, or nobody."""

    def __init__(self, is_held: bool = False) -> None:
        self.is_held = is_held


def event_index(side: GuestSide) -> int:
    """Up to where the device said that it needs no kick (2.7.10)."""
    return side.memory[side.driver.place.used + 4 + 8 * SIZE :][:2].cast("H")[0]


def no_serve(head: int) -> int:
    raise AssertionError(f"request {head} is a plain one")


def test_a_sweep_asks_for_a_kick_before_it_wakes_the_driver(side: GuestSide) -> None:
    side.driver.submit(0, BlkRequest.IN, 0, answer_bytes=512)
    side.driver.submit(1, BlkRequest.IN, 1, answer_bytes=512)
    seen: list[tuple[int, int]] = []
    loop = hot_loop(side)
    assert loop.sweep(
        side.disk, no_serve, lambda: seen.append((event_index(side), used_ring(side)[0])), Holding(), 0, 0, 9
    )
    assert seen == [(2, 2)]
    assert (loop.available_index, loop.used_index, loop.moved_bytes) == (2, 2, 1024)


def test_what_comes_while_the_driver_is_woken_is_served_too(side: GuestSide) -> None:
    """The driver was asked for a kick and gives none: it sees no need for one before the index that it was given."""
    side.driver.submit(0, BlkRequest.IN, 0, answer_bytes=512)
    loop = hot_loop(side)
    calls: list[int] = []

    def serve(head: int) -> int:
        side.driver.submit(1, BlkRequest.IN, 1, answer_bytes=512)
        calls.append(head)
        return 1

    side.driver.submit(2, BlkRequest.GET_ID, answer_bytes=20)
    assert loop.sweep(side.disk, serve, lambda: None, Holding(), 0, 0, 9)
    assert (len(calls), loop.available_index, used_ring(side)[0]) == (1, 3, 3)


@pytest.mark.parametrize(
    ("holding", "budget", "taken"),
    [(Holding(is_held=True), 9, 0), (Holding(), 0, 0), (Holding(), 9, 2)],
    ids=["wanted by somebody", "nothing left of its turn", "a request is answered later"],
)
def test_a_sweep_ends_when_its_turn_does(side: GuestSide, holding: Holding, budget: int, taken: int) -> None:
    for slot, kind in ((0, BlkRequest.IN), (1, BlkRequest.FLUSH)):
        side.driver.submit(slot, kind, 0, answer_bytes=512 if kind is BlkRequest.IN else 0)
    loop = hot_loop(side)

    def serve(_head: int) -> int:
        side.driver.submit(2, BlkRequest.IN, 0, answer_bytes=512)
        return UNANSWERED

    calls: list[int] = []
    assert not loop.sweep(side.disk, serve, lambda: calls.append(1), holding, 0, 0, budget)
    assert (loop.available_index, loop.used_index) == (taken, min(taken, 1))
    assert bool(calls) == bool(taken)


def test_a_sweep_leaves_a_lie_to_the_ring(side: GuestSide) -> None:
    side.memory[side.driver.place.available + 2 :][:2] = (SIZE + 1).to_bytes(2, "little")
    loop = hot_loop(side)
    assert not loop.sweep(side.disk, no_serve, lambda: None, Holding(), 0, 0, 9)
    assert loop.pending(0) == SIZE + 1
    assert (loop.available_index, used_ring(side)[0]) == (0, 0)


class Attended:
    """A ring that is swept whenever it is kicked; by its calls it does what the test wants to happen then."""

    def __init__(self, side: GuestSide, on_notify: Callable[[int], None]) -> None:
        self.blk = self.lane = self
        self.device = side.disk
        self.is_limited = False
        self.holding = Holding()
        self.seat = threading.Lock()
        self.kept: list[int] = []
        self.kick, self.other = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
        self.epoll = select.epoll()
        self.epoll.register(self.kick, select.EPOLLIN | select.EPOLLET)
        self.epoll.register(self.other, select.EPOLLIN)
        self._loop = hot_loop(side)
        self._on_notify = on_notify
        self._notified = 0

    def serve(self, _head: int) -> int:
        raise GuestFault("a lie")

    def keep(self) -> None:
        assert not self.seat.locked()
        self.kept.append(self._loop.available_index)

    def notify(self) -> None:
        assert self.seat.locked()
        self._notified += 1
        self._on_notify(self._notified)

    def attend(self) -> list[tuple[int, int]]:
        return self._loop.attend(self, self.notify, self.holding, self.seat, self.epoll, self.kick)

    def close(self) -> None:
        self.epoll.close()
        os.close(self.kick)
        os.close(self.other)


def test_kicks_are_served_until_something_else_comes(side: GuestSide) -> None:
    def on_notify(number: int) -> None:
        used_event[0] = number  # the driver asks to hear of the next one (2.7.7.1)
        if number < 3:
            side.driver.submit(number, BlkRequest.IN, 0, answer_bytes=512)
            os.eventfd_write(attended.kick, 1)
        else:
            os.eventfd_write(attended.other, 1)

    used_event = side.memory[side.driver.place.available + 4 + 2 * SIZE :][:2].cast("H")
    attended = Attended(side, on_notify)
    side.driver.submit(0, BlkRequest.IN, 0, answer_bytes=512)
    os.eventfd_write(attended.kick, 1)
    assert attended.attend() == [(attended.other, select.EPOLLIN)]
    assert attended.kept == [3]
    assert not attended.seat.locked()
    assert used_ring(side)[0] == 3
    attended.close()


@pytest.mark.parametrize("reason", ["held", "capped", "both events"])
def test_what_is_not_only_a_kick_is_left_to_who_waits(side: GuestSide, reason: str) -> None:
    attended = Attended(side, lambda _number: None)
    side.driver.submit(0, BlkRequest.IN, 0, answer_bytes=512)
    os.eventfd_write(attended.kick, 1)
    attended.holding.is_held = reason == "held"
    attended.is_limited = reason == "capped"
    if reason == "both events":
        os.eventfd_write(attended.other, 1)
    expected = {attended.kick} if reason != "both events" else {attended.kick, attended.other}
    assert {fd for fd, _event in attended.attend()} == expected
    assert (attended.kept, used_ring(side)[0]) == ([0], 0)
    attended.close()


def test_a_ring_that_breaks_is_kept_as_far_as_it_came(side: GuestSide) -> None:
    attended = Attended(side, lambda _number: None)
    side.driver.submit(0, BlkRequest.IN, 0, answer_bytes=512)
    side.driver.submit(1, BlkRequest.GET_ID, answer_bytes=20)
    os.eventfd_write(attended.kick, 1)
    with pytest.raises(GuestFault, match="a lie"):
        attended.attend()
    assert (attended.kept, used_ring(side)[0]) == ([1], 1)
    assert not attended.seat.locked()
    attended.close()
