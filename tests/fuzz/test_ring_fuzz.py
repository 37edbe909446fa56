"""Hostile guests: whatever is in the rings, tables and headers, a ring ends in an answer or in `GuestFault`.

The guest writes into its memory what it likes; a case is a list of such writes, some of them aimed (descriptors that are
nearly right), some blind. The disk is checked never to be touched outside its size, and each call has to come back.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.framework.virtqueue import ALL_FEATURES, FlusherByHand, GranuleDisk, GuestSide

from mullion.provider.memory import GuestFault
from mullion.provider.ring import Drained
from mullion.wire.vhost_user.client import GUEST_BASE
from mullion.wire.vhost_user.driver import Segment
from mullion.wire.vhost_user.messages import DeviceFeature

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("each_implementation")]

MEMORY_BYTES = 512 * 1024
DISK_BYTES = 200 * 1024
QUEUE_SIZE = 8

offsets = st.integers(0, MEMORY_BYTES - 1)
addresses = st.one_of(
    offsets.map(lambda offset: offset + GUEST_BASE),
    st.sampled_from(
        [
            *(0, 1, GUEST_BASE - 1, GUEST_BASE, GUEST_BASE + MEMORY_BYTES - 1, GUEST_BASE + MEMORY_BYTES),
            *(1 << 31, 1 << 32, 1 << 62, 1 << 63, (1 << 63) - 1, (1 << 64) - 16, (1 << 64) - 1),
        ]
    ),
    st.integers(0, (1 << 64) - 1),
)
lengths = st.one_of(
    st.sampled_from([0, 1, 15, 16, 17, 32, 48, 512, 4096, 65536, 1 << 20, 1 << 31, (1 << 32) - 512, (1 << 32) - 1]),
    st.integers(0, (1 << 32) - 1),
)
flags = st.one_of(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7]), st.integers(0, 65535))
nexts = st.one_of(st.integers(0, QUEUE_SIZE), st.integers(0, 65535))
heads = st.one_of(st.integers(0, QUEUE_SIZE), st.integers(0, 65535))
kinds = st.one_of(st.sampled_from([0, 1, 4, 8, 11, 13]), st.integers(0, (1 << 32) - 1))
sectors = st.one_of(st.integers(0, 450), st.sampled_from([1 << 54, 1 << 55, 1 << 63, (1 << 64) - 1]))

Step = Callable[[GuestSide], None]


def _descriptor(table: int, number: int, fields: tuple[int, int, int, int]) -> Step:
    return lambda side: side.driver.write_descriptor(table, number, fields)


def _available(head: int) -> Step:
    return lambda side: side.driver.make_available(head)


def _jump(index: int) -> Step:
    def step(side: GuestSide) -> None:
        side.driver.available_idx = index
        at = side.driver.place.available + 2
        side.memory[at : at + 2] = struct.pack("<H", index)

    return step


def _bytes(offset: int, data: bytes) -> Step:
    def step(side: GuestSide) -> None:
        side.memory[offset : offset + len(data)] = data[: MEMORY_BYTES - offset]

    return step


def _request(slot: int, kind: int, sector: int, segments: list[Segment]) -> Step:
    return lambda side: side.driver.submit(slot, kind, sector, segments=segments) and None


def _header(slot: int, kind: int, sector: int) -> Step:
    return lambda side: struct.pack_into("<IIQ", side.memory, 0x10000 + 16 * slot, kind, 0, sector)


fields = st.tuples(addresses, lengths, flags, nexts)
segments = st.builds(Segment, offsets, lengths, st.booleans())
steps = st.one_of(
    st.builds(_descriptor, st.sampled_from([0, 0x1000, 0x2000]), st.integers(0, QUEUE_SIZE - 1), fields),
    st.builds(_available, heads),
    st.builds(_jump, st.integers(0, 65535)),
    st.builds(_bytes, offsets, st.binary(max_size=64)),
    st.builds(_request, st.integers(0, 1), kinds, sectors, st.lists(segments, max_size=3)),
    st.builds(_header, st.integers(0, 3), kinds, sectors),
)


class CheckedDisk(GranuleDisk):
    """Refuses to be asked for anything outside of it: the ring has to check before."""

    def preadv(self, offset: int, buffers: object) -> None:
        super().preadv(offset, buffers)  # type: ignore[arg-type]
        self._check()

    def pwritev(self, offset: int, buffers: object) -> None:
        super().pwritev(offset, buffers)  # type: ignore[arg-type]
        self._check()

    def _check(self) -> None:
        _kind, offset, length = self.calls[-1]
        assert 0 <= offset <= offset + length <= self.size_bytes


@settings(max_examples=400)
@given(
    st.lists(steps, min_size=1, max_size=12),
    st.sampled_from([0, int(DeviceFeature.RING_INDIRECT_DESC), int(DeviceFeature.RING_EVENT_IDX), ALL_FEATURES]),
    st.sampled_from([0, 65534]),
    st.booleans(),
    st.sampled_from([None, 1, 2, 4]),
)
def test_hostile_ring(hostile: list[Step], features: int, start: int, is_direct: bool, flush_every: int | None) -> None:
    flusher = FlusherByHand()
    side = GuestSide(
        CheckedDisk(DISK_BYTES, is_direct=lambda granule: is_direct and granule != 1),
        features=features,
        queue_size=QUEUE_SIZE,
        start_index=start,
        memory_bytes=MEMORY_BYTES,
        flusher=None if flush_every is None else flusher,
    )
    try:
        for number, step in enumerate(hostile):
            step(side)
            if flush_every is not None and number % flush_every == 0:
                flusher.end()
            try:
                drained = side.drain()
            except GuestFault:
                flusher.end()
                side.ring.come_to_rest(lambda: None)
                side.new_ring()  # as after a reset of the device: it attaches to whatever is there
            else:
                assert drained is Drained.IDLE
        assert side.disk.content(0, DISK_BYTES + 65536)[DISK_BYTES:] == b""
    except GuestFault:
        pass  # the ring itself was overwritten in a way that cannot be attached to
    finally:
        side.close()


@settings(max_examples=300)
@given(st.binary(min_size=16 + 16 * QUEUE_SIZE, max_size=16 + 16 * QUEUE_SIZE), st.integers(0, 65535))
def test_hostile_inflight_region(content: bytes, used_idx: int) -> None:
    """The region is the front-end's memory as well: any content is a list of heads in the ring, or a fault."""
    side = GuestSide(GranuleDisk(DISK_BYTES), queue_size=QUEUE_SIZE, memory_bytes=MEMORY_BYTES)
    queue = side.inflight.queue(0, QUEUE_SIZE)
    for number, word in enumerate(struct.unpack("<4I", content[:16])):
        queue.header[number] = word
    for number, double in enumerate(struct.unpack(f"<{2 * QUEUE_SIZE}Q", content[16:])):
        queue.entries[number] = double
    try:
        heads_in_flight = queue.recover(used_idx, QUEUE_SIZE)
    except GuestFault:
        return
    finally:
        side.close()
    assert len(set(heads_in_flight)) == len(heads_in_flight)
    assert all(0 <= head < QUEUE_SIZE for head in heads_in_flight)
