"""While the guest's memory is copied, every page that the device writes to is marked, and no other device's mark lost."""

from __future__ import annotations

import os

import pytest
from tests.framework.virtqueue import GranuleDisk, GuestSide

from mullion.provider.dirty_log import DirtyLog
from mullion.provider.memory import GuestFault
from mullion.provider.ring import Drained
from mullion.wire.vhost_user import Log
from mullion.wire.vhost_user.client import GUEST_BASE
from mullion.wire.vhost_user.virtio_blk import BlkRequest

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("each_implementation")]

MEMORY_BYTES = 1024 * 1024
LOG_BYTES = (GUEST_BASE + MEMORY_BYTES) >> 15


class Logged:
    """A guest whose memory is being copied, and the marks so far."""

    def __init__(self, log_bytes: int = LOG_BYTES) -> None:
        self.fd = os.memfd_create("log")
        os.ftruncate(self.fd, 4096 + log_bytes)
        self.guest = GuestSide(GranuleDisk(MEMORY_BYTES), memory_bytes=MEMORY_BYTES)
        self.guest.new_ring(log=DirtyLog(Log(log_bytes, 4096), self.fd))

    def marked(self, offset: int) -> bool:
        page = (GUEST_BASE + offset) >> 12
        return bool(os.pread(self.fd, 1, 4096 + (page >> 3))[0] >> (page & 7) & 1)

    def close(self) -> None:
        self.guest.close()
        os.close(self.fd)


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
