"""While the guest's memory is copied, every page that the device writes to is marked, and no other device's mark lost."""

from __future__ import annotations

import os
import random
import struct

import pytest
from tests.framework.virtqueue import ALL_FEATURES, GranuleDisk, GuestSide

from mullion.provider.dirty_log import DirtyLog
from mullion.provider.memory import GuestFault
from mullion.provider.ring import Drained
from mullion.wire.vhost_user import Log
from mullion.wire.vhost_user.client import GUEST_BASE
from mullion.wire.vhost_user.driver import Segment
from mullion.wire.vhost_user.messages import DeviceFeature
from mullion.wire.vhost_user.virtio_blk import BlkRequest

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("each_implementation")]

MEMORY_BYTES = 1024 * 1024
WINDOW_BYTES = 8 * 4096
"""Of memory, for a byte of the log."""
LOG_BYTES = (GUEST_BASE + MEMORY_BYTES) >> 15


class Logged:
    """A guest whose memory is being copied, and the marks so far."""

    def __init__(self, log_bytes: int = LOG_BYTES, features: int = ALL_FEATURES) -> None:
        self.fd = os.memfd_create("log")
        os.ftruncate(self.fd, 4096 + log_bytes)
        self.guest = GuestSide(GranuleDisk(MEMORY_BYTES), memory_bytes=MEMORY_BYTES, features=features)
        self.guest.new_ring(log=DirtyLog(Log(log_bytes, 4096), self.fd))

    def marked(self, offset: int) -> bool:
        page = (GUEST_BASE + offset) >> 12
        return bool(os.pread(self.fd, 1, 4096 + (page >> 3))[0] >> (page & 7) & 1)

    def marked_windows(self) -> set[int]:
        """Which of the ranges that a byte of the log stands for are marked."""
        return {at // WINDOW_BYTES for at in range(0, MEMORY_BYTES, WINDOW_BYTES) if self.marked(at)}

    def close(self) -> None:
        self.guest.close()
        os.close(self.fd)


RANGE = struct.pack("<QII", 8, 16, 0)
REQUESTS: dict[str, tuple[int, int, bytes, tuple[int, ...]]] = {
    "a read": (BlkRequest.IN, 8, b"", (4096,)),
    "a read into many pieces": (BlkRequest.IN, 8, b"", (512, 1024, 12 * 1024, 512, 3072)),
    "a read across windows": (BlkRequest.IN, 0, b"", (2 * WINDOW_BYTES + 1024,)),
    "a read of what is not there": (BlkRequest.IN, 1 << 40, b"", (4096, 512)),
    "a read of nothing": (BlkRequest.IN, 0, b"", ()),
    "a write": (BlkRequest.OUT, 8, b"x" * 512, ()),
    "a write that is refused": (BlkRequest.OUT, 1 << 40, b"x" * 512, ()),
    "a flush": (BlkRequest.FLUSH, 0, b"", ()),
    "the identity": (BlkRequest.GET_ID, 0, b"", (20,)),
    "the identity into pieces": (BlkRequest.GET_ID, 0, b"", (3, 17)),
    "a discard": (BlkRequest.DISCARD, 0, RANGE, ()),
    "zeros": (BlkRequest.WRITE_ZEROES, 0, RANGE, ()),
    "what is not known": (77, 0, b"", (4096,)),
}
"""Kind, sector, what the device reads, and the lengths of the pieces into which it may write."""


@pytest.mark.parametrize("features", [ALL_FEATURES, 0, int(DeviceFeature.RING_INDIRECT_DESC)])
@pytest.mark.parametrize("name", REQUESTS)
def test_all_that_a_request_writes_is_marked_and_nothing_else(name: str, features: int) -> None:
    """Each part of it lies far from the others, so that none is marked by the way."""
    logged = Logged(features=features)
    guest, (kind, sector, payload, lengths) = logged.guest, REQUESTS[name]
    guest.disk.fill(0, random.Random(1).randbytes(MEMORY_BYTES))
    guest.drain()  # with nothing to do: marks the used ring
    os.pwrite(logged.fd, bytes(LOG_BYTES), 4096)
    at = 8 * WINDOW_BYTES - GUEST_BASE % WINDOW_BYTES
    read_from = [Segment(at, len(payload))] if payload else []
    guest.memory[at : at + len(payload)] = payload
    written = []
    for number, length in enumerate(lengths):
        at += 4 * WINDOW_BYTES
        written.append(Segment(at + 100 * number, length, True))
    guest.driver.submit(0, kind, sector, segments=[*read_from, *written])
    before = bytes(guest.memory)
    assert guest.drain() is Drained.IDLE
    assert len(guest.driver.collect()) == 1
    after = bytes(guest.memory)
    changed = {at for at in range(0, MEMORY_BYTES, 4096) if before[at : at + 4096] != after[at : at + 4096]}
    assert all(logged.marked(at) for at in changed)
    status, used = guest.driver.data_offset - guest.queue_size * 32 + 16, guest.driver.place.used
    assert {status // 4096, used // 4096} <= {at // 4096 for at in changed}, "they do change"
    allowed = {status // WINDOW_BYTES, used // WINDOW_BYTES}
    for segment in written:
        allowed |= set(range(segment.offset // WINDOW_BYTES, (segment.offset + segment.length - 1) // WINDOW_BYTES + 1))
    assert logged.marked_windows() == allowed
    logged.close()


def test_what_an_earlier_provider_had_taken_is_marked_when_it_is_served_again() -> None:
    logged = Logged()
    guest = logged.guest
    guest.disk.fill(0, b"?" * 65536)
    targets = [12 * WINDOW_BYTES, 16 * WINDOW_BYTES]
    heads = [
        guest.driver.submit(slot, BlkRequest.IN, 0, segments=[Segment(target, 4096, True)])
        for slot, target in enumerate(targets)
    ]
    queue = guest.inflight.queue(0, guest.queue_size)
    for head, counter in zip(heads, (7, 5), strict=True):  # taken out of order by the one before
        queue.entries[2 * head], queue.entries[2 * head + 1] = 1, counter
    guest.new_ring(log=DirtyLog(Log(LOG_BYTES, 4096), logged.fd))
    assert guest.drain() is Drained.IDLE
    assert [answer.slot for answer in guest.driver.collect()] == [1, 0]
    for target in targets:
        assert bytes(guest.memory[target : target + 4096]) == b"?" * 4096
        assert logged.marked(target)
    logged.close()


@pytest.mark.parametrize("is_direct", [True, False])
def test_every_changed_page_is_marked(is_direct: bool) -> None:
    logged = Logged()
    guest = logged.guest
    if not is_direct:
        guest.disk.direct_read = {}
    guest.disk.fill(0, os.urandom(65536))
    for slot in range(8):
        guest.driver.submit(slot, BlkRequest.IN, slot * 8, answer_bytes=12 * 1024)
    before = bytes(guest.memory)
    assert guest.drain() is Drained.IDLE
    assert [answer.status for answer in guest.driver.collect()] == [0] * 8
    after = bytes(guest.memory)
    changed = [at for at in range(0, MEMORY_BYTES, 4096) if before[at : at + 4096] != after[at : at + 4096]]
    assert len(changed) > 24
    assert all(logged.marked(at) for at in changed)
    untouched = guest.driver.data_offset + 12 * guest.driver.data_bytes
    assert not logged.marked(-(-untouched // 32768) * 32768), "a page far from any request is not copied again"
    logged.close()


def test_writes_mark_status_and_used_ring_only() -> None:
    logged = Logged()
    status, _ = logged.guest.request(BlkRequest.OUT, 8, payload=b"x" * 512)
    assert status == 0
    assert logged.marked(logged.guest.driver.place.used)
    data = logged.guest.driver.data_offset + 8 * logged.guest.driver.data_bytes
    assert not logged.marked(-(-data // 32768) * 32768)
    assert logged.guest.disk.content(4096, 512) == b"x" * 512
    logged.close()


def test_marks_of_other_devices_stay() -> None:
    fd = os.memfd_create("log")
    os.write(fd, b"\x01\x80\x01\x80")
    log = DirtyLog(Log(4, 0), fd)
    log.mark(0x8000, 1)
    assert os.pread(fd, 4, 0) == b"\x01\xff\x01\x80"
    log.mark(0x7FFF, 0x8002)
    assert os.pread(fd, 4, 0) == b"\xff\xff\xff\x80"
    log.mark(0, 0)
    os.close(fd)


def test_memory_beyond_the_log_breaks_the_ring() -> None:
    logged = Logged((GUEST_BASE >> 15) + 1)
    logged.guest.driver.submit(0, BlkRequest.IN, 0, answer_bytes=4096)
    with pytest.raises(GuestFault, match="outside the dirty log"):
        logged.guest.drain()
    logged.close()


@pytest.mark.parametrize("log", [Log(0, 0), Log(8192, 0), Log(4096, 4096), Log(1 << 63, 1 << 63)])
def test_impossible_log_is_refused(log: Log) -> None:
    fd = os.memfd_create("log")
    os.ftruncate(fd, 4096)
    with pytest.raises(GuestFault, match="dirty log"):
        DirtyLog(log, fd)
    os.close(fd)
