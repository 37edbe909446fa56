"""The ring under a cap: nobody sleeps, nothing is lost, nothing is paid twice, and nothing is had for free."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

import pytest
from tests.framework.virtqueue import GranuleDisk, GuestSide

from mullion.provider.dirty_log import DirtyLog
from mullion.provider.layers import Limits, Throttle
from mullion.provider.memory import GuestFault
from mullion.provider.ring import Drained
from mullion.wire.vhost_user import Log
from mullion.wire.vhost_user.client import GUEST_BASE
from mullion.wire.vhost_user.driver import Segment
from mullion.wire.vhost_user.virtio_blk import BlkRequest, BlkStatus

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("each_implementation")]


class CappedGuest(GuestSide):
    """A guest whose caps go by a clock that the test turns."""

    def __init__(self) -> None:
        self.now_s = 0.0
        super().__init__(GranuleDisk(1024 * 1024))
        self.throttle = Throttle(lambda: self.now_s)
        self.new_ring()

    def cap(self, **limits: int) -> None:
        self.throttle.set_limits("disk", Limits(**limits))


@pytest.fixture
def guest() -> Iterator[CappedGuest]:
    side = CappedGuest()
    yield side
    side.close()


def submit(guest: CappedGuest, count: int, *, size_bytes: int = 4096) -> None:
    for slot in range(count):
        guest.driver.submit(slot, BlkRequest.IN, slot * 8, answer_bytes=size_bytes)


def test_requests_come_as_the_cap_allows_and_all_in_the_end(guest: CappedGuest) -> None:
    guest.cap(iops=100)
    submit(guest, 10)
    served = 0
    while guest.drain() is Drained.CAPPED:
        assert 0 < guest.ring.wait_s <= 0.011
        served += len(guest.driver.collect())
        guest.now_s += guest.ring.wait_s
    served += len(guest.driver.collect())
    assert served == 10
    assert guest.now_s == pytest.approx(0.1, abs=0.015)


def test_asking_early_and_often_changes_nothing(guest: CappedGuest) -> None:
    guest.cap(iops=10)
    submit(guest, 3)
    for _ in range(290):
        guest.drain()
        guest.now_s += 0.001
    assert len(guest.driver.collect()) == 2
    guest.now_s += 0.02
    assert guest.drain() is Drained.IDLE
    assert len(guest.driver.collect()) == 1


def test_a_flush_and_an_unknown_request_are_free(guest: CappedGuest) -> None:
    guest.cap(iops=1)
    for slot in range(8):
        guest.driver.submit(slot, BlkRequest.FLUSH if slot % 2 else 99)
    assert guest.drain() is Drained.IDLE
    assert len(guest.driver.collect()) == 8


def test_without_a_cap_the_disk_is_served_as_ever_and_what_is_waiting_goes(guest: CappedGuest) -> None:
    guest.cap(iops=1)
    submit(guest, 12)
    assert guest.drain() is Drained.CAPPED
    guest.cap()
    assert guest.drain() is Drained.IDLE
    assert len(guest.driver.collect()) == 12


def test_a_write_that_finds_no_space_is_not_paid_twice(guest: CappedGuest) -> None:
    guest.disk.close()
    guest.disk = GranuleDisk(1024 * 1024, is_direct=lambda _granule: False)
    guest.new_ring()
    guest.cap(iops=10)
    guest.now_s = 100.0
    guest.disk.failure = OSError(errno.ENOSPC, "full")
    for slot in range(2):
        guest.driver.submit(slot, BlkRequest.OUT, 0, payload=bytes(512))
    for _ in range(50):
        assert guest.drain() is Drained.STALLED
    guest.disk.failure = None
    assert guest.drain() is Drained.CAPPED
    assert [answer.status for answer in guest.driver.collect()] == [BlkStatus.OK]
    guest.now_s += 0.1
    assert guest.drain() is Drained.IDLE


def test_those_before_a_broken_request_are_served(guest: CappedGuest) -> None:
    guest.cap(iops=1000)
    guest.now_s = 10.0
    submit(guest, 3)
    guest.driver.make_available(guest.queue_size + 7)
    with pytest.raises(GuestFault):
        guest.drain()
    assert len(guest.driver.collect()) == 3


def test_a_request_that_grows_after_it_was_asked_for_is_paid_with_the_next(guest: CappedGuest) -> None:
    """The guest owns the descriptors: what it changes between the look and the service has to be found out."""
    guest.cap(bytes_per_s=100_000)
    guest.now_s = 10.0
    assert guest.drain() is Drained.IDLE
    real_ask = guest.ring._turn.ask
    at = guest.driver.data_offset

    def grow(is_write: bool, size_bytes: int) -> float:
        left_s = real_ask(is_write, size_bytes)
        if not left_s and size_bytes == 512:
            table = guest.driver._tables  # of slot 0; its second descriptor is the data
            struct.pack_into("<QI", guest.driver.memory, table + 16, at + GUEST_BASE, 12_800)
        return left_s

    guest.ring._turn.ask = grow  # type: ignore[method-assign]
    guest.driver.submit(0, BlkRequest.IN, 0, segments=[Segment(at, 512, True)])
    assert guest.drain() is Drained.IDLE
    guest.driver.submit(1, BlkRequest.IN, 0, answer_bytes=1024)
    assert guest.drain() is Drained.CAPPED
    guest.now_s += guest.ring.wait_s
    assert guest.drain() is Drained.IDLE
    guest.driver.submit(2, BlkRequest.IN, 0, answer_bytes=1024)
    assert guest.drain() is Drained.CAPPED
    assert guest.ring.wait_s == pytest.approx((12_800 + 2 * 1024 - 10_000) / 100_000, abs=0.006)


def test_a_ring_that_ends_does_not_hold_up_the_next(guest: CappedGuest) -> None:
    guest.cap(iops=10)
    submit(guest, 3)
    guest.now_s = 5.0
    while guest.ring.requests < 1:
        guest.drain()
    assert guest.drain() is Drained.CAPPED
    guest.ring.leave()
    guest.new_ring()
    guest.now_s += 1.0
    guest.drain()
    guest.now_s += 1.0
    assert guest.drain() is Drained.IDLE
    assert len(guest.driver.collect()) == 3


def test_a_cap_holds_while_the_guests_memory_is_copied(guest: CappedGuest) -> None:
    """Requests go another way then, and are paid for all the same."""
    fd = os.memfd_create("log")
    os.ftruncate(fd, 4096)
    guest.new_ring(log=DirtyLog(Log(4096, 0), fd))
    os.close(fd)
    guest.cap(iops=100)
    guest.now_s = 5.0
    submit(guest, 14)
    assert guest.drain() is Drained.CAPPED
    assert len(guest.driver.collect()) == 10
    guest.now_s += 0.02
    guest.drain()
    assert len(guest.driver.collect()) == 2
