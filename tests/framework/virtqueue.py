"""A guest without a guest: shared memory, a disk with granules in a memory file, and a ring between them."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence

from mullion.base.block import Buffer, Extent, ExtentKind, WritableBuffer
from mullion.base.flusher import Flusher, Outcomes
from mullion.provider.blk import BlkDevice, OutOfSpace
from mullion.provider.dirty_log import DirtyLog
from mullion.provider.inflight import InflightRegion, create_inflight
from mullion.provider.layers import Throttle
from mullion.provider.memory import GuestMemory
from mullion.provider.ring import Drained, FlushOutcome, Ring
from mullion.provider.turnstile import Turnstile
from mullion.wire.vhost_user import MemoryRegion
from mullion.wire.vhost_user.client import GUEST_BASE, USER_BASE
from mullion.wire.vhost_user.driver import VirtqueueDriver
from mullion.wire.vhost_user.messages import VRING_LOG, DeviceFeature, VringAddress
from mullion.wire.vhost_user.virtio_blk import BlkStatus

ALL_FEATURES = int(DeviceFeature.VERSION_1 | DeviceFeature.RING_INDIRECT_DESC | DeviceFeature.RING_EVENT_IDX)


class GranuleDisk:
    """A disk in a memory file, in granules of 64 KiB; `is_direct` decides which granules the ring may touch itself."""

    block_shift = 16

    def __init__(
        self, size_bytes: int, *, read_only: bool = False, is_direct: Callable[[int], bool] = lambda _granule: True
    ) -> None:
        self.fd = os.memfd_create("disk")
        os.ftruncate(self.fd, size_bytes)
        self.size_bytes = size_bytes
        self.read_only = read_only
        granules = [granule for granule in range(-(-size_bytes >> self.block_shift)) if is_direct(granule)]
        self.direct_read = {granule: (self.fd, granule << self.block_shift) for granule in granules}
        self.direct_write = dict(self.direct_read)
        self.mixed_read: dict[int, tuple[tuple[bytes, int, tuple[tuple[int, int] | None, ...]], ...]] = {}
        self.mixed_used: set[int] = set()
        self.mixed_write_fd = -1
        self.room_bytes: int | None = None
        """How many bytes may still be written before the storage is full; None for no end."""
        self.failure: OSError | None = None
        self.calls: list[tuple[str, int, int]] = []

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.calls.append(("read", offset, sum(map(len, buffers))))
        self._fail()
        for buffer in buffers:
            assert os.preadv(self.fd, [buffer], offset) == len(buffer)
            offset += len(buffer)

    def pwritev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.calls.append(("write", offset, sum(map(len, buffers))))
        self._fail()
        for buffer in buffers:
            if self.room_bytes is not None:
                if self.room_bytes < len(buffer):
                    raise OSError(errno.ENOSPC, "No space left on device")
                self.room_bytes -= len(buffer)
            assert os.pwritev(self.fd, [buffer], offset) == len(buffer)
            offset += len(buffer)

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        self.preadv(offset, [memoryview(buffer)])

    def pwrite(self, offset: int, buffer: Buffer) -> None:
        self.pwritev(offset, [memoryview(buffer)])

    def flush(self) -> None:
        self.calls.append(("flush", 0, 0))
        self._fail()

    def discard(self, offset: int, length: int) -> None:
        self.calls.append(("discard", offset, length))
        self._fail()

    def write_zeroes(self, offset: int, length: int) -> None:
        self.calls.append(("write_zeroes", offset, length))
        self._fail()
        os.pwrite(self.fd, bytes(length), offset)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, ExtentKind.DATA)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def content(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, offset)

    def fill(self, offset: int, data: bytes) -> None:
        os.pwrite(self.fd, data, offset)

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


class FlusherByHand(Flusher[FlushOutcome]):
    """Flushes when it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[Outcomes[FlushOutcome], int]] = []
        self.has_thread = True
        self.on_ask: Callable[[], None] = lambda: None

    def ask(self, outcomes: Outcomes[FlushOutcome], head: int) -> bool:
        if self.has_thread:
            self.asked.append((outcomes, head))
            self.on_ask()
        return self.has_thread

    def end(self, outcome: BlkStatus | OutOfSpace = BlkStatus.OK, count: int = 1000) -> None:
        for outcomes, head in self.asked[:count]:
            outcomes.put((head, outcome))
        del self.asked[:count]


class GuestSide:
    """Memory that a ring and a driver share, in this process, and the ring over it."""

    def __init__(
        self,
        disk: GranuleDisk,
        *,
        features: int = ALL_FEATURES,
        queue_size: int = 16,
        start_index: int = 0,
        memory_bytes: int = 1024 * 1024,
        flusher: Flusher[FlushOutcome] | None = None,
    ) -> None:
        """Without a `flusher` a flush is a request like any other."""
        self.disk = disk
        self.flusher = flusher
        self.features = features
        self.queue_size = queue_size
        fd = os.memfd_create("guest")
        os.ftruncate(fd, memory_bytes)
        self.guest_memory = GuestMemory([MemoryRegion(GUEST_BASE, memory_bytes, USER_BASE, 0)], [fd])
        os.close(fd)
        self.memory = self.guest_memory.segments(GUEST_BASE, memory_bytes)[0]
        if start_index:
            available = 16 * queue_size
            used = (available + 6 + 2 * queue_size + 3) // 4 * 4
            for at in (available + 2, used + 2):
                self.memory[at : at + 2] = start_index.to_bytes(2, "little")
        self.driver = VirtqueueDriver(self, size=queue_size, data_bytes=16 * 1024)
        inflight, self._inflight_fd = create_inflight(1, queue_size)
        self.inflight = InflightRegion(inflight, self._inflight_fd)
        self.notifications = 0
        self.throttle = Throttle()
        self.ring = self.new_ring()

    def new_ring(self, *, with_inflight: bool = True, log: DirtyLog | None = None) -> Ring:
        """Attach a ring, as a back-end does when it has been started again."""
        place = self.driver.place
        address = VringAddress(
            0,
            VRING_LOG if log is not None else 0,
            USER_BASE + place.descriptor,
            USER_BASE + place.used,
            USER_BASE + place.available,
            GUEST_BASE + place.used,
        )
        self.turnstile = Turnstile("disk")
        self.ring = Ring(
            BlkDevice(self.disk, "disk", "SERIAL-1"),
            self.guest_memory,
            address,
            self.queue_size,
            features=self.features,
            inflight=self.inflight.queue(0, self.queue_size) if with_inflight else None,
            barrier=threading.Lock(),
            turn=self.throttle.lane("disk").turn(),
            turnstile=self.turnstile,
            log=log,
            flusher=self.flusher,
        )
        return self.ring

    def drain(self) -> Drained:
        return self.ring.drain(self._notify)

    def request(self, kind: int, sector: int = 0, payload: bytes = b"", answer_bytes: int = 0) -> tuple[int, bytes]:
        """One request through the ring: status and answer."""
        self.driver.submit(0, kind, sector, payload=payload, answer_bytes=answer_bytes)
        assert self.drain() is Drained.IDLE
        (answer,) = self.driver.collect()
        return answer.status, bytes(self.driver.data(0)[:answer_bytes])

    def close(self) -> None:
        self.driver.release()
        os.close(self._inflight_fd)
        self.disk.close()

    def _notify(self) -> None:
        self.notifications += 1
