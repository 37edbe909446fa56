"""A load on the ring of a provider's disk: writes and flushes in flight, and what must be on the disk."""

from __future__ import annotations

import random
import struct

from mullion.wire.vhost_user.driver import Answer, VirtqueueDriver
from mullion.wire.vhost_user.virtio_blk import BlkRequest, BlkStatus


def pattern(number: int) -> bytes:
    """4096 bytes that say a number."""
    return struct.pack("<Q", number) * 512


class RingLoad:
    """`written` is by sector the number whose pattern is there."""

    def __init__(self, driver: VirtqueueDriver, choose: random.Random, disk_bytes: int) -> None:
        self._driver = driver
        self._choose = choose
        self._disk_bytes = disk_bytes
        self._free = list(range(20))
        self._in_flight: dict[int, tuple[int, int] | None] = {}
        self._generation = 0
        self.written: dict[int, int] = {}

    def begin(self, count: int) -> None:
        """Ask for so many writes and flushes; waits for an answer only where there is no room."""
        for _ in range(count):
            if not self._free:
                self._take(self._driver.wait())
            slot = self._free.pop()
            sector = self._choose.randrange(self._disk_bytes // 4096) * 8
            if self._choose.random() < 0.3 or sector in [what[0] for what in self._in_flight.values() if what]:
                self._in_flight[slot] = None
                self._driver.submit(slot, BlkRequest.FLUSH)
            else:
                self._generation += 1
                self._in_flight[slot] = sector, self._generation
                self._driver.submit(slot, BlkRequest.OUT, sector, payload=pattern(self._generation))
            self._driver.kick()

    def collect(self) -> None:
        """Take the answers that are there."""
        self._take(self._driver.collect())

    def end(self) -> None:
        """Wait for all answers."""
        self._take(self._driver.wait(len(self._in_flight)))
        assert self._in_flight == {}

    def check(self) -> None:
        """What was written is read through the ring."""
        for sector, number in self.written.items():
            assert self._driver.read(sector, 4096) == pattern(number), sector

    def _take(self, answers: list[Answer]) -> None:
        for answer in answers:
            assert answer.status == BlkStatus.OK
            what = self._in_flight.pop(answer.slot)
            if what is not None:
                self.written[what[0]] = what[1]
            self._free.append(answer.slot)
