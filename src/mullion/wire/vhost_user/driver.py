"""The driver's side of a split virtqueue with block requests in it: what the guest's kernel does, one step at a time.

Spec: VIRTIO 1.2, sections 2.7.13 and 2.7.14; tables in `virtio_blk`. For tests, measurements and rehearsal.
Layout in the front-end's memory, from `start` on: descriptors, available ring, used ring, indirect tables (one page a
slot), headers and status bytes; data comes from `data_offset` on, `data_bytes` for each slot.
"""

from __future__ import annotations

import os
import select
import struct
import threading
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from mullion.wire.vhost_user.client import ANSWER_DEADLINE_S, GUEST_BASE, FrontEnd, VringPlace
from mullion.wire.vhost_user.messages import DeviceFeature
from mullion.wire.vhost_user.virtio_blk import BlkRequest, DescriptorFlag

PAGE_BYTES: Final = 4096
_DESCRIPTOR: Final = struct.Struct("<QIHH")
_HEADER: Final = struct.Struct("<IIQ")
_UNTOUCHED: Final = 0xFF


class Shared(Protocol):
    """What a driver needs of a front-end: memory that the device sees at GUEST_BASE, and the features agreed on."""

    memory: memoryview
    features: int


class Segment(NamedTuple):
    """A piece of shared memory, by offset in it, that a request reads from or writes into."""

    offset: int
    length: int
    is_written: bool = False


class Answer(NamedTuple):
    """A finished request: its slot, its status byte and the length in the used ring."""

    slot: int
    status: int
    length: int


class VirtqueueDriver:
    """One queue. A request in slot n uses table page n, or without indirect tables the descriptors from 3 n on."""

    def __init__(
        self, shared: Shared, *, size: int = 64, index: int = 0, start: int = 0, data_bytes: int = 16 * 1024
    ) -> None:
        self.memory = shared.memory
        self.size = size
        available = start + 16 * size
        used = (available + 6 + 2 * size + 3) // 4 * 4
        self._tables = -(-(used + 6 + 8 * size) // PAGE_BYTES) * PAGE_BYTES
        self._headers = self._tables + size * PAGE_BYTES
        self.data_offset = self._headers + size * 32
        self.data_bytes = data_bytes
        kick_fd, call_fd = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
        self.place = VringPlace(index, size, start, available, used, kick_fd, call_fd)
        self.is_indirect = bool(shared.features & DeviceFeature.RING_INDIRECT_DESC)
        self.has_event_idx = bool(shared.features & DeviceFeature.RING_EVENT_IDX)
        self._available = self.memory[available : available + 6 + 2 * size].cast("H")
        self._used = self.memory[used : used + 6 + 8 * size]
        self.available_idx = self._available[1]
        self.seen_idx = int.from_bytes(self._used[2:4], "little")
        self.calls = 0
        self._barrier = threading.Lock()  # taking a free one is a full barrier on x86

    def release(self) -> None:
        """Close the descriptors and let go of the memory."""
        os.close(self.place.kick_fd)
        os.close(self.place.call_fd)
        self._available.release()
        self._used.release()

    def data(self, slot: int) -> memoryview:
        """The data area of a slot."""
        at = self.data_offset + slot * self.data_bytes
        return self.memory[at : at + self.data_bytes]

    def submit(
        self,
        slot: int,
        kind: int,
        sector: int = 0,
        *,
        payload: bytes = b"",
        answer_bytes: int = 0,
        segments: Sequence[Segment] | None = None,
    ) -> int:
        """Make a request available; `segments` instead of one piece at the slot's data. The head's number."""
        if payload:
            self.data(slot)[: len(payload)] = payload
        header = self._headers + slot * 32
        _HEADER.pack_into(self.memory, header, kind, 0, sector)
        self.memory[header + 16] = _UNTOUCHED
        if segments is None:
            length = len(payload) or answer_bytes
            at = self.data_offset + slot * self.data_bytes
            segments = [Segment(at, length, bool(answer_bytes))] if length else []
        chain = [Segment(header, 16), *segments, Segment(header + 16, 1, True)]
        head = slot if self.is_indirect else slot * 3
        table, first = (self._tables + slot * PAGE_BYTES, 0) if self.is_indirect else (self.place.descriptor, head)
        for number, segment in enumerate(chain, start=first):
            is_last = number == first + len(chain) - 1
            flags = (DescriptorFlag.WRITE if segment.is_written else 0) | (0 if is_last else DescriptorFlag.NEXT)
            self.write_descriptor(table, number, (segment.offset + GUEST_BASE, segment.length, flags, number + 1))
        if self.is_indirect:
            indirect = (table + GUEST_BASE, 16 * len(chain), DescriptorFlag.INDIRECT, 0)
            self.write_descriptor(self.place.descriptor, head, indirect)
        self.make_available(head)
        return head

    def write_descriptor(self, table: int, number: int, fields: tuple[int, int, int, int]) -> None:
        """One descriptor of a table: guest address, length, flags, next."""
        address, length, flags, following = fields
        _DESCRIPTOR.pack_into(self.memory, table + 16 * number, address, length, flags, following & 0xFFFF)

    def make_available(self, head: int) -> None:
        self._available[2 + self.available_idx % self.size] = head
        self.available_idx = (self.available_idx + 1) & 0xFFFF
        self._available[1] = self.available_idx

    def kick(self) -> None:
        """Tell the device, whether or not it asked for it."""
        os.eventfd_write(self.place.kick_fd, 1)

    def collect(self) -> list[Answer]:
        """The requests that are finished by now."""
        answers = []
        used_idx = int.from_bytes(self._used[2:4], "little")
        while self.seen_idx != used_idx:
            head, length = struct.unpack_from("<II", self._used, 4 + 8 * (self.seen_idx % self.size))
            slot = head if self.is_indirect else head // 3
            answers.append(Answer(slot, self.memory[self._headers + slot * 32 + 16], length))
            self.seen_idx = (self.seen_idx + 1) & 0xFFFF
        return answers

    def wait(self, count: int = 1) -> list[Answer]:
        """Sleep until so many requests are finished. Raises: TimeoutError."""
        answers = self.collect()
        poll = select.poll()
        poll.register(self.place.call_fd, select.POLLIN)
        while len(answers) < count:
            self._available[0] = 0
            self._available[2 + self.size] = self.seen_idx
            with self._barrier:  # which must be visible before the used ring is read again (2.7.10)
                pass
            if found := self.collect():  # of what comes after these, nobody has been asked to tell
                answers += found
                continue
            if not poll.poll(ANSWER_DEADLINE_S * 1000):
                raise TimeoutError(f"{len(answers)} of {count} requests were answered")
            self.calls += os.eventfd_read(self.place.call_fd)
            answers += self.collect()
        return answers

    # Whole requests.

    def request(self, kind: int, sector: int = 0, payload: bytes = b"", answer_bytes: int = 0) -> tuple[int, bytes]:
        """One request, alone: its status and what it answered."""
        self.submit(0, kind, sector, payload=payload, answer_bytes=answer_bytes)
        self.kick()
        (answer,) = self.wait()
        return answer.status, bytes(self.data(0)[:answer_bytes])

    def read(self, sector: int, length: int) -> bytes:
        """Raises: OSError when the device fails it."""
        status, data = self.request(BlkRequest.IN, sector, answer_bytes=length)
        if status:
            raise OSError(f"reading sector {sector}: status {status}")
        return data

    def write(self, sector: int, data: bytes) -> None:
        """Raises: OSError when the device fails it."""
        status, _data = self.request(BlkRequest.OUT, sector, payload=data)
        if status:
            raise OSError(f"writing sector {sector}: status {status}")


def attach(front_end: FrontEnd, *, wanted: int, size: int = 64) -> VirtqueueDriver:
    """Negotiate, share memory and start queue 0: a driver that is ready for requests."""
    front_end.negotiate(wanted)
    front_end.set_memory()
    driver = VirtqueueDriver(front_end, size=size)
    front_end.start_vring(driver.place)
    return driver
