"""Flushes beside the other requests of a ring: who is answered when, and what a kill at any store leaves."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.framework.virtqueue import FlusherByHand, GranuleDisk, GuestSide

from mullion.base.flusher import Flusher
from mullion.provider.blk import BlkDevice, OutOfSpace
from mullion.provider.dirty_log import DirtyLog
from mullion.provider.memory import GuestFault
from mullion.provider.ring import Drained
from mullion.vhd import create_dynamic, open_chain
from mullion.vhd.fileio import FileIO
from mullion.wire.vhost_user import Log
from mullion.wire.vhost_user.client import GUEST_BASE
from mullion.wire.vhost_user.virtio_blk import BlkRequest, BlkStatus

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("each_implementation")]

DISK_BYTES = 300 * 1024
DEADLINE_S = 30.0
FULL = OutOfSpace(OSError(errno.ENOSPC, "full"))


@pytest.fixture
def flusher() -> FlusherByHand:
    return FlusherByHand()


@pytest.fixture
def guest(flusher: FlusherByHand) -> Iterator[GuestSide]:
    side = GuestSide(GranuleDisk(DISK_BYTES), flusher=flusher)
    yield side
    side.close()


def write(side: GuestSide, slot: int) -> None:
    side.driver.submit(slot, BlkRequest.OUT, slot * 8, payload=bytes([slot]) * 4096)


def answers(side: GuestSide) -> list[tuple[int, int]]:
    return [(answer.slot, answer.status) for answer in side.driver.collect()]


def marked(side: GuestSide) -> list[int]:
    entries = side.inflight.queue(0, 16).entries
    return [head for head in range(16) if entries[2 * head] & 1]


def test_requests_behind_a_flush_are_answered_before_it(guest: GuestSide, flusher: FlusherByHand) -> None:
    write(guest, 0)
    for slot in (1, 2):
        guest.driver.submit(slot, BlkRequest.FLUSH)
    write(guest, 3)
    assert guest.drain() is Drained.IDLE
    assert answers(guest) == [(0, 0), (3, 0)]
    assert marked(guest) == [1, 2]
    assert not guest.ring.has_outcome
    flusher.end(count=1)
    assert guest.ring.has_outcome
    write(guest, 4)
    assert guest.drain() is Drained.IDLE
    assert answers(guest) == [(1, 0), (4, 0)]
    flusher.end(BlkStatus.IOERR)
    assert guest.drain() is Drained.IDLE
    assert answers(guest) == [(2, BlkStatus.IOERR)]
    assert marked(guest) == []
    assert guest.ring.requests == 5
    assert guest.ring.next_index == 5


def test_ring_full_of_flushes_goes_round(guest: GuestSide, flusher: FlusherByHand) -> None:
    for _round in range(5):
        for slot in range(16):
            guest.driver.submit(slot, BlkRequest.FLUSH)
        assert guest.drain() is Drained.IDLE
        assert answers(guest) == []
        assert marked(guest) == list(range(16))
        flusher.end()
        assert guest.drain() is Drained.IDLE
        assert answers(guest) == [(slot, 0) for slot in range(16)]


def test_head_that_is_available_again_before_it_was_answered_breaks_the_ring(guest: GuestSide) -> None:
    guest.driver.submit(1, BlkRequest.FLUSH)
    guest.drain()
    guest.driver.make_available(1)
    with pytest.raises(GuestFault, match="once more"):
        guest.drain()


@pytest.mark.parametrize("why", ["no region", "logged", "no thread"])
def test_flush_like_any_other_request(guest: GuestSide, flusher: FlusherByHand, why: str) -> None:
    log_fd = os.memfd_create("log")
    os.ftruncate(log_fd, 1 << 20)
    if why == "no region":
        guest.new_ring(with_inflight=False)
    elif why == "no thread":
        flusher.has_thread = False
    else:
        guest.new_ring(log=DirtyLog(Log(1 << 20, 0), log_fd))
    os.close(log_fd)
    guest.driver.submit(0, BlkRequest.FLUSH)
    write(guest, 1)
    assert guest.drain() is Drained.IDLE
    assert answers(guest) == [(0, 0), (1, 0)]
    assert guest.disk.calls[0] == ("flush", 0, 0)
    assert marked(guest) == []


def test_flush_without_space_is_tried_again_before_anything_else(guest: GuestSide, flusher: FlusherByHand) -> None:
    guest.driver.submit(0, BlkRequest.FLUSH)
    guest.drain()
    flusher.end(FULL)
    guest.disk.failure = OSError(errno.ENOSPC, "full")
    write(guest, 1)
    assert guest.drain() is Drained.STALLED
    assert guest.ring.stall is FULL.error
    assert guest.drain() is Drained.STALLED
    assert answers(guest) == []
    guest.disk.failure = None
    assert guest.drain() is Drained.IDLE
    assert answers(guest) == [(0, 0), (1, 0)]


class SlowDisk(GranuleDisk):
    """Its flushes wait until they may end."""

    def __init__(self) -> None:
        super().__init__(DISK_BYTES)
        self.began = threading.Semaphore(0)
        self.may_end = threading.Event()

    def flush(self) -> None:
        self.began.release()
        assert self.may_end.wait(DEADLINE_S)
        super().flush()


def test_thread_makes_one_flush_of_those_that_wait() -> None:
    disk, woken = SlowDisk(), threading.Semaphore(0)
    flusher = Flusher(BlkDevice(disk, "disk", "serial").flush_aside, woken.release, name="flusher")
    side = GuestSide(disk, flusher=flusher)
    side.driver.submit(0, BlkRequest.FLUSH)
    side.drain()
    assert disk.began.acquire(timeout=DEADLINE_S)
    for slot in range(1, 9):
        side.driver.submit(slot, BlkRequest.FLUSH)
    write(side, 9)
    assert side.drain() is Drained.IDLE
    assert answers(side) == [(9, 0)]
    disk.may_end.set()
    assert woken.acquire(timeout=DEADLINE_S)
    assert woken.acquire(timeout=DEADLINE_S)
    assert side.drain() is Drained.IDLE
    assert answers(side) == [(slot, 0) for slot in range(9)]
    assert disk.calls == [("flush", 0, 0)] * 2
    flusher.stop()
    side.close()


def test_fault_of_ours_fails_a_flush_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    disk = GranuleDisk(DISK_BYTES)
    disk.failure = RuntimeError("a fault")  # type: ignore[assignment]
    assert BlkDevice(disk, "disk", "serial").flush_aside() is BlkStatus.IOERR
    assert "a fault" in caplog.text
    disk.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_sync_without_room_is_told_to_the_guest(number: int, tmp_path: Path) -> None:
    """What it was to write is gone, and a flush that waited for room would say that it is there."""

    class FullSync(FileIO):
        failure: OSError | None = None

        def fdatasync(self, fd: int) -> None:
            failure, self.failure = self.failure, None
            if failure is not None:
                raise failure
            super().fdatasync(fd)

    create_dynamic(str(tmp_path / "d.vhd"), DISK_BYTES)
    full = FullSync()
    with open_chain(str(tmp_path / "d.vhd"), file_io=full) as chain:
        blk = BlkDevice(chain, "disk", "serial")
        chain.pwrite(0, b"x" * 512)
        full.failure = OSError(number, "full")
        assert blk.flush_aside() is BlkStatus.IOERR


def test_ring_that_ends_waits_for_its_flushes() -> None:
    disk = SlowDisk()
    flusher = Flusher(BlkDevice(disk, "disk", "serial").flush_aside, lambda: None, name="flusher")
    side = GuestSide(disk, flusher=flusher)
    for slot in range(3):
        side.driver.submit(slot, BlkRequest.FLUSH)
    side.drain()
    assert disk.began.acquire(timeout=DEADLINE_S)
    threading.Timer(0, disk.may_end.set).start()
    notifications: list[int] = []
    side.ring.come_to_rest(lambda: notifications.append(1))
    assert answers(side) == [(slot, 0) for slot in range(3)]
    assert side.ring.next_index == 3
    assert len(notifications) == 1
    flusher.stop()
    side.close()


def test_what_found_no_space_is_available_again_when_the_ring_ends(guest: GuestSide, flusher: FlusherByHand) -> None:
    for slot in (0, 1):
        guest.driver.submit(slot, BlkRequest.FLUSH)
    for slot in (2, 3):
        write(guest, slot)
    guest.drain()
    flusher.end(FULL)
    guest.ring.come_to_rest(lambda: None)
    assert guest.ring.next_index == 2  # both writes were answered
    assert marked(guest) == []
    flusher.has_thread = False
    guest.new_ring(with_inflight=False)  # as on another host: nothing but the ring is known
    assert guest.drain() is Drained.IDLE
    assert sorted(answers(guest)) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert guest.disk.calls.count(("flush", 0, 0)) == 2


# Killed at any store into the rings or the region; the next ring takes over.


class KilledError(BaseException):
    """The process ends here."""


class Fuse:
    left: int | None = None

    def burn(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KilledError


class Watched:
    """Memory of which the process that stores into it may be killed before each store."""

    def __init__(self, view: memoryview, fuse: Fuse) -> None:
        self._view = view
        self._fuse = fuse

    def __getitem__(self, index: Any) -> Any:
        return self._view[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._fuse.burn()
        self._view[index] = value


def watch(side: GuestSide, fuse: Fuse) -> None:
    ring: Any = side.ring
    for owner, names in ((ring, ("_used", "_used_words", "_available")), (ring._inflight, ("header", "entries"))):
        for name in names:
            setattr(owner, name, Watched(getattr(owner, name), fuse))


@pytest.mark.parametrize("seed", range(60))
def test_killed_at_any_store_each_request_is_answered_once(seed: int) -> None:
    choose = random.Random(seed)
    flusher, fuse = FlusherByHand(), Fuse()
    side = GuestSide(GranuleDisk(DISK_BYTES), flusher=flusher, start_index=choose.choice([0, 65530]))
    watch(side, fuse)
    asked: dict[int, int] = {}
    answered = 0

    def act() -> None:
        what = choose.choice(["drain", "drain", "end", "end", "full", "rest"])
        if what == "end":
            flusher.end(count=choose.randrange(4))
        elif what == "full":
            flusher.end(FULL, count=1)
        elif what == "rest":
            flusher.end(choose.choice([BlkStatus.OK, FULL]))
            side.ring.come_to_rest(lambda: None)
            side.new_ring()
            watch(side, fuse)
        else:
            side.drain()

    for _step in range(150):
        free = [slot for slot in range(16) if slot not in asked]
        if free and choose.random() < 0.7:
            slot = choose.choice(free)
            asked[slot] = choose.choice([BlkRequest.FLUSH, BlkRequest.OUT, BlkRequest.GET_ID])
            if asked[slot] == BlkRequest.OUT:
                write(side, slot)
            else:
                side.driver.submit(slot, asked[slot], answer_bytes=20 if asked[slot] == BlkRequest.GET_ID else 0)
        fuse.left = choose.randrange(16) if choose.random() < 0.3 else None
        try:
            act()
        except KilledError:
            del flusher.asked[:]  # its thread has ended too
            side.new_ring()
            watch(side, fuse)
        fuse.left = None
        for slot, status in answers(side):
            assert status == BlkStatus.OK
            del asked[slot]
            answered += 1
    for _turn in range(4):  # some find outcomes that are to be tried again, or only ask for flushes
        flusher.end()
        side.drain()
        for slot, status in answers(side):
            assert status == BlkStatus.OK
            del asked[slot]
            answered += 1
    assert asked == {}
    assert marked(side) == []
    assert answered > 40
    side.close()


def test_what_a_ring_makes_available_again_is_in_the_dirty_log(guest: GuestSide, flusher: FlusherByHand) -> None:
    """The next ring took over what was in flight, while the memory is copied, and found no space either."""
    guest.driver.submit(0, BlkRequest.FLUSH)
    guest.drain()
    flusher.asked.clear()  # killed
    log_fd = os.memfd_create("log")
    os.ftruncate(log_fd, 1 << 20)
    guest.new_ring(log=DirtyLog(Log(1 << 20, 0), log_fd))
    guest.disk.failure = FULL.error
    assert guest.drain() is Drained.STALLED
    place = (GUEST_BASE + guest.driver.place.available) >> 15
    os.pwrite(log_fd, bytes(1 << 20), 0)
    guest.ring.come_to_rest(lambda: None)
    assert os.pread(log_fd, 1, place) == b"\xff"
    assert guest.ring.next_index == 0
    os.close(log_fd)


class Attended:
    """The ring as a disk with one ring is served: woken by its kick, and asked for nothing else."""

    def __init__(self, guest: GuestSide, flusher: FlusherByHand) -> None:
        self._guest, self._flusher = guest, flusher
        self._kick, self._other = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
        self._epoll = select.epoll()
        self._epoll.register(self._kick, select.EPOLLIN | select.EPOLLET)
        self._epoll.register(self._other, select.EPOLLIN)

    def flush_alone(self) -> bool:
        """Whether a flush with nothing behind it was done on the spot; else it is ended."""
        self._guest.driver.submit(0, BlkRequest.FLUSH)
        self.turn()
        (status,) = [status for slot, status in answers(self._guest) if slot == 0] or [None]
        if status is None:
            self._flusher.end()
            assert self._guest.drain() is Drained.IDLE
            assert answers(self._guest) == [(0, 0)]
        return status == BlkStatus.OK

    def turn(self) -> None:
        """Serve what is available, until that is all, or a flush is under way."""
        memory, place = self._guest.memory, self._guest.driver.place
        memory[place.available + 4 + 2 * 16 :][:2] = memory[place.used + 2 :][
            :2
        ]  # the driver wants to hear of the next
        os.eventfd_write(self._kick, 1)

        def leave() -> None:
            os.eventfd_write(self._other, 1)

        self._flusher.on_ask = leave
        self._guest.ring.attend(leave, threading.Lock(), self._epoll, self._kick)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._other)

    def close(self) -> None:
        self._epoll.close()
        os.close(self._kick)
        os.close(self._other)


@pytest.fixture
def attended(guest: GuestSide, flusher: FlusherByHand) -> Iterator[Attended]:
    made = Attended(guest, flusher)
    yield made
    made.close()


def test_after_some_lonely_flushes_the_next_are_done_on_the_spot(guest: GuestSide, attended: Attended) -> None:
    assert [attended.flush_alone() for _ in range(6)] == [False] * 4 + [True] * 2
    assert guest.disk.calls == [("flush", 0, 0)] * 2
    assert marked(guest) == []
    assert guest.ring.next_index == 6


def test_behind_what_is_done_on_the_spot_nothing_else_waits(
    guest: GuestSide, flusher: FlusherByHand, attended: Attended
) -> None:
    for _ in range(4):
        attended.flush_alone()
    guest.driver.submit(1, BlkRequest.FLUSH)
    write(guest, 2)
    attended.turn()
    assert answers(guest) == [(2, 0)]
    flusher.end()
    guest.drain()
    assert answers(guest) == [(1, 0)]
    assert not attended.flush_alone()


def test_what_comes_during_a_flush_ends_its_loneliness(
    guest: GuestSide, attended: Attended, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(4):
        attended.flush_alone()
    monkeypatch.setattr(guest.disk, "flush", lambda: write(guest, 3))
    guest.driver.submit(0, BlkRequest.FLUSH)
    attended.turn()
    assert answers(guest) == [(0, 0), (3, 0)]
    assert [attended.flush_alone() for _ in range(5)] == [False] * 4 + [True]


def test_flush_that_takes_long_is_done_beside_the_next_time(
    attended: Attended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mullion.provider.ring._LONELY_S", -1)
    assert [attended.flush_alone() for _ in range(6)] == [False] * 4 + [True, False]


def test_flush_of_a_ring_among_others_is_never_done_on_the_spot(guest: GuestSide, attended: Attended) -> None:
    for _ in range(6):
        attended.flush_alone()
    guest.driver.submit(0, BlkRequest.FLUSH)
    assert guest.drain() is Drained.IDLE
    assert answers(guest) == []
    assert marked(guest) == [0]


def test_flush_on_the_spot_that_finds_no_space_is_tried_again_beside(
    guest: GuestSide, flusher: FlusherByHand, attended: Attended
) -> None:
    for _ in range(4):
        attended.flush_alone()
    guest.disk.failure = FULL.error
    guest.driver.submit(0, BlkRequest.FLUSH)
    attended.turn()
    assert (answers(guest), marked(guest), guest.ring.next_index) == ([], [], 4)
    assert guest.drain() is Drained.IDLE
    flusher.end(FULL)
    assert guest.drain() is Drained.STALLED
    guest.disk.failure = None
    assert guest.drain() is Drained.IDLE
    assert answers(guest) == [(0, 0)]
