"""The ring against a driver in the same process: every request, every framing, every way to lie."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator

import pytest
from tests.framework.virtqueue import ALL_FEATURES, GranuleDisk, GuestSide

from mullion.provider.inflight import InflightQueue
from mullion.provider.memory import GuestFault
from mullion.provider.ring import Drained
from mullion.wire.vhost_user.client import GUEST_BASE
from mullion.wire.vhost_user.driver import Segment, VirtqueueDriver
from mullion.wire.vhost_user.messages import DeviceFeature
from mullion.wire.vhost_user.virtio_blk import BlkRequest, BlkStatus, DescriptorFlag

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("each_implementation")]

DISK_BYTES = 300 * 1024  # the last granule is not whole
INDIRECT = int(DeviceFeature.RING_INDIRECT_DESC)
EVENT_IDX = int(DeviceFeature.RING_EVENT_IDX)
PLAIN = int(DeviceFeature.VERSION_1)


@pytest.fixture(
    params=[PLAIN, PLAIN | INDIRECT, PLAIN | EVENT_IDX, ALL_FEATURES], ids=["plain", "indirect", "event", "all"]
)
def features(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=[True, False], ids=["direct", "through-the-chain"])
def guest(request: pytest.FixtureRequest, features: int) -> Iterator[GuestSide]:
    is_direct: bool = request.param
    side = GuestSide(GranuleDisk(DISK_BYTES, is_direct=lambda _granule: is_direct), features=features)
    yield side
    side.close()


@pytest.fixture
def plain_guest() -> Iterator[GuestSide]:
    side = GuestSide(GranuleDisk(DISK_BYTES))
    yield side
    side.close()


def pattern(number: int, length: int = 4096) -> bytes:
    return struct.pack("<I", number) * (length // 4)


def test_what_is_written_is_read(guest: GuestSide) -> None:
    for number in range(40):  # more than the ring has
        sector = number * 13 % 500
        assert guest.request(BlkRequest.OUT, sector, pattern(number))[0] == BlkStatus.OK
        assert guest.disk.content(sector * 512, 4096) == pattern(number)
        assert guest.request(BlkRequest.IN, sector, answer_bytes=4096) == (BlkStatus.OK, pattern(number))
    assert guest.ring.requests == 80
    assert guest.ring.bytes == 80 * 4096


def test_fast_path_does_not_call_the_device(plain_guest: GuestSide) -> None:
    plain_guest.request(BlkRequest.OUT, 8, pattern(1))
    plain_guest.request(BlkRequest.IN, 8, answer_bytes=4096)
    assert plain_guest.disk.calls == []


def test_granule_that_files_share(features: int) -> None:
    """Units of 4 KiB by owner: the ring goes to the right file, and to the device where an owner is unknown.

    Where owners meet Python goes to the device, which is a fake and says so by other content.
    """
    side = GuestSide(GranuleDisk(DISK_BYTES, is_direct=lambda granule: granule != 1), features=features)
    other = GranuleDisk(DISK_BYTES)
    for unit in range(32):
        side.disk.fill(unit * 4096, pattern(unit))
        other.fill(unit * 4096, pattern(100 + unit))
    owners = bytes([1, 2, 2, 0] * 4)
    side.disk.mixed_read[1] = ((owners, 12, (None, (side.disk.fd, 65536), (other.fd, 65536))),)
    for unit, expected in ((0, 16), (1, 117), (2, 118), (3, 19), (4, 20), (5, 121)):
        assert side.request(BlkRequest.IN, 128 + unit * 8, answer_bytes=4096) == (BlkStatus.OK, pattern(expected))
    assert side.request(BlkRequest.IN, 136, answer_bytes=8192)[1] == pattern(117) + pattern(118)
    assert side.disk.calls == [("read", 65536 + 3 * 4096, 4096)]
    answer = side.request(BlkRequest.IN, 128, answer_bytes=8192)
    went_to_the_device = side.disk.calls[1:] == [("read", 65536, 8192)]
    assert went_to_the_device or not side.disk.calls[1:]
    assert answer == (BlkStatus.OK, pattern(16) + pattern(17 if went_to_the_device else 117))
    assert side.disk.mixed_used == {1}
    other.close()
    side.close()


def test_shared_granule_read_in_pieces_across_its_owners(features: int, each_implementation: str) -> None:
    """Borders of files, of sectors and of the driver's pieces, none at the same place as another."""
    side = GuestSide(GranuleDisk(DISK_BYTES, is_direct=lambda granule: granule != 1), features=features)
    files = [side.disk, GranuleDisk(DISK_BYTES)]
    content = [os.urandom(65536) for _file in files]
    for file, data in zip(files, content, strict=True):
        file.fill(65536, data)
    owners = bytes([1, 1, 2, 1, 2, 2, 1, 2] * 16)
    side.disk.mixed_read[1] = ((owners, 9, (None, *((file.fd, 65536) for file in files))),)
    expected = b"".join(content[owner - 1][unit * 512 : unit * 512 + 512] for unit, owner in enumerate(owners))
    at = side.driver.data_offset
    cuts = [(0, 1), (4, 1027), (1100, 2), (2000, 4500), (7000, 6 * 512 + 3 * 512 - 5530 + 4096)]
    length = sum(size for _start, size in cuts)
    assert length % 512 == 0
    side.driver.submit(0, BlkRequest.IN, 128 + 3, segments=[Segment(at + start, size, True) for start, size in cuts])
    side.drain()
    (answer,) = side.driver.collect()
    if each_implementation == "compiled":
        assert side.disk.calls == []
        got = b"".join(bytes(side.memory[at + start : at + start + size]) for start, size in cuts)
        assert got == expected[3 * 512 : 3 * 512 + length]
    else:
        assert side.disk.calls == [("read", 65536 + 3 * 512, length)]
    assert (answer.status, answer.length) == (BlkStatus.OK, length + 1)
    files[1].close()
    side.close()


@pytest.mark.parametrize("read_only", [False, True])
def test_only_the_tops_units_of_a_shared_granule_are_overwritten_in_place(features: int, read_only: bool) -> None:
    disk = GranuleDisk(DISK_BYTES, is_direct=lambda granule: granule != 1, read_only=read_only)
    side = GuestSide(disk, features=features)
    below = GranuleDisk(DISK_BYTES)
    owners = bytes([1, 1, 2, 0] * 4)
    disk.mixed_read[1] = ((owners, 12, (None, (disk.fd, 65536), (below.fd, 65536))),)
    disk.mixed_write_fd = disk.fd
    expected = BlkStatus.IOERR if read_only else BlkStatus.OK
    for unit, units in ((0, 1), (1, 1), (4, 2), (2, 1), (3, 1), (1, 2)):
        assert side.request(BlkRequest.OUT, 128 + unit * 8, pattern(unit, units * 4096))[0] == expected
    if read_only:
        assert disk.calls == []
        assert disk.content(65536, 65536) == bytes(65536)
    else:
        assert disk.calls == [("write", 65536 + unit * 4096, units * 4096) for unit, units in ((2, 1), (3, 1), (1, 2))]
        assert disk.content(65536 + 4 * 4096, 8192) == pattern(4, 8192)
        assert disk.mixed_used == {1}
    assert below.content(0, DISK_BYTES) == bytes(DISK_BYTES)
    below.close()
    side.close()


def test_a_shared_granule_without_units_of_the_top_is_written_by_the_device(plain_guest: GuestSide) -> None:
    below = GranuleDisk(DISK_BYTES)
    plain_guest.disk.direct_read = plain_guest.disk.direct_write = {}
    plain_guest.disk.mixed_read[0] = ((bytes([1, 2] * 8), 12, (None, (below.fd, 0), (below.fd, 65536))),)
    plain_guest.disk.mixed_write_fd = plain_guest.disk.fd
    assert plain_guest.request(BlkRequest.OUT, 0, pattern(1))[0] == BlkStatus.OK
    assert plain_guest.disk.calls == [("write", 0, 4096)]
    assert below.content(0, DISK_BYTES) == bytes(DISK_BYTES)
    below.close()


def test_request_across_granules(guest: GuestSide) -> None:
    data = os.urandom(8192)
    assert guest.request(BlkRequest.OUT, 120, data)[0] == BlkStatus.OK
    assert guest.disk.content(120 * 512, 8192) == data
    assert guest.request(BlkRequest.IN, 120, answer_bytes=8192) == (BlkStatus.OK, data)


def test_length_in_used_ring(guest: GuestSide) -> None:
    guest.driver.submit(0, BlkRequest.IN, 0, answer_bytes=512)
    guest.driver.submit(1, BlkRequest.OUT, 0, payload=bytes(512))
    guest.driver.submit(2, BlkRequest.IN, 10_000, answer_bytes=512)
    guest.drain()
    assert [(answer.status, answer.length) for answer in guest.driver.collect()] == [(0, 513), (0, 1), (1, 1)]


def test_flush_and_serial(guest: GuestSide) -> None:
    assert guest.request(BlkRequest.FLUSH)[0] == BlkStatus.OK
    assert guest.disk.calls[-1] == ("flush", 0, 0)
    assert guest.request(BlkRequest.GET_ID, answer_bytes=20) == (BlkStatus.OK, b"SERIAL-1".ljust(20, b"\0"))


def test_room_for_an_answer_that_is_longer_than_its_length_can_be_told() -> None:
    """The same memory again and again, 5 GiB of it: the used ring has 32 bits for how much was written (2.7.8)."""
    large = GuestSide(GranuleDisk(DISK_BYTES), memory_bytes=64 << 20)
    pieces = [Segment(1 << 20, 60 << 20, True)] * 90
    large.driver.submit(0, BlkRequest.GET_ID, segments=pieces)
    large.drain()
    (answer,) = large.driver.collect()
    assert (answer.status, answer.length) == (BlkStatus.OK, 0xFFFFFFFF)
    large.close()


@pytest.mark.parametrize("kind", [BlkRequest.DISCARD, BlkRequest.WRITE_ZEROES])
def test_ranges(guest: GuestSide, kind: BlkRequest) -> None:
    ranges = struct.pack("<QIIQII", 8, 16, 0, 100, 0, 0)
    assert guest.request(kind, payload=ranges)[0] == BlkStatus.OK
    assert guest.disk.calls == [("discard" if kind is BlkRequest.DISCARD else "write_zeroes", 4096, 8192)]


@pytest.mark.parametrize(
    ("kind", "ranges", "status"),
    [
        (BlkRequest.DISCARD, struct.pack("<QII", 0, 8, 1), BlkStatus.UNSUPP),
        (BlkRequest.WRITE_ZEROES, struct.pack("<QII", 0, 8, 2), BlkStatus.UNSUPP),
        (BlkRequest.DISCARD, struct.pack("<QII", 596, 8, 0), BlkStatus.IOERR),
        (BlkRequest.DISCARD, struct.pack("<QII", 2**63, 8, 0), BlkStatus.IOERR),
        (BlkRequest.DISCARD, struct.pack("<QII", 0, 2**32 - 1, 0), BlkStatus.IOERR),
        (BlkRequest.DISCARD, b"", BlkStatus.IOERR),
        (BlkRequest.DISCARD, bytes(24), BlkStatus.IOERR),
        (BlkRequest.DISCARD, bytes(16 * 33), BlkStatus.IOERR),
        (BlkRequest.DISCARD, struct.pack("<QIIQII", 0, 8, 0, 596, 8, 0), BlkStatus.IOERR),
    ],
)
def test_bad_ranges_are_refused_whole(
    plain_guest: GuestSide, kind: BlkRequest, ranges: bytes, status: BlkStatus
) -> None:
    assert plain_guest.request(kind, payload=ranges)[0] == status
    assert plain_guest.disk.calls == []


def test_unknown_request(guest: GuestSide) -> None:
    assert guest.request(99, answer_bytes=512)[0] == BlkStatus.UNSUPP


@pytest.mark.parametrize(("sector", "length"), [(593, 4096), (600, 512), (2**55, 512), (2**64 - 1, 512), (0, 100)])
@pytest.mark.parametrize("kind", [BlkRequest.IN, BlkRequest.OUT])
def test_outside_the_disk(guest: GuestSide, kind: BlkRequest, sector: int, length: int) -> None:
    before = guest.disk.content(0, DISK_BYTES)
    if kind is BlkRequest.IN:
        status, _data = guest.request(kind, sector, answer_bytes=length)
    else:
        status, _data = guest.request(kind, sector, b"\xff" * length)
    assert status == BlkStatus.IOERR
    assert guest.disk.content(0, DISK_BYTES + 4096) == before


def test_last_sectors_of_the_disk(guest: GuestSide) -> None:
    assert guest.request(BlkRequest.OUT, 592, pattern(7))[0] == BlkStatus.OK
    assert guest.request(BlkRequest.IN, 592, answer_bytes=4096) == (BlkStatus.OK, pattern(7))


def test_read_only_disk() -> None:
    side = GuestSide(GranuleDisk(DISK_BYTES, read_only=True))
    assert side.request(BlkRequest.OUT, 0, pattern(1))[0] == BlkStatus.IOERR
    assert side.request(BlkRequest.WRITE_ZEROES, payload=struct.pack("<QII", 0, 8, 0))[0] == BlkStatus.IOERR
    assert side.request(BlkRequest.IN, 0, answer_bytes=4096) == (BlkStatus.OK, bytes(4096))
    assert side.request(BlkRequest.FLUSH)[0] == BlkStatus.OK
    assert side.disk.calls == []
    side.close()


@pytest.mark.parametrize("is_direct", [True, False])
def test_failing_storage_is_an_error_status(is_direct: bool) -> None:
    side = GuestSide(GranuleDisk(DISK_BYTES, is_direct=lambda _granule: is_direct))
    side.disk.failure = OSError(errno.EIO, "Input/output error")
    if is_direct:
        bad = os.open("/", os.O_RDONLY)  # a descriptor that fails every read and write
        side.disk.direct_read = side.disk.direct_write = {0: (bad, 0)}
    for kind in (BlkRequest.IN, BlkRequest.OUT):
        payload = b"" if kind is BlkRequest.IN else bytes(512)
        assert side.request(kind, 0, payload, answer_bytes=0 if payload else 512)[0] == BlkStatus.IOERR
    assert side.request(BlkRequest.FLUSH)[0] == BlkStatus.IOERR
    if is_direct:
        os.close(bad)
    side.close()


def test_data_in_many_pieces(guest: GuestSide) -> None:
    driver = guest.driver
    data = os.urandom(4096)
    at = driver.data_offset
    guest.memory[at : at + 100] = data[:100]
    guest.memory[at + 1000 : at + 1000 + 3996] = data[100:]
    driver.submit(0, BlkRequest.OUT, 3, segments=[Segment(at, 100), Segment(at + 1000, 3996)])
    guest.drain()
    assert [answer.status for answer in driver.collect()] == [BlkStatus.OK]
    assert guest.disk.content(3 * 512, 4096) == data
    pieces = [Segment(at + 8192, 1, True), Segment(at + 9000, 4095, True)]
    driver.submit(0, BlkRequest.IN, 3, segments=pieces)
    guest.drain()
    assert [answer.status for answer in driver.collect()] == [BlkStatus.OK]
    assert bytes(guest.memory[at + 8192 : at + 8193]) + bytes(guest.memory[at + 9000 : at + 13095]) == data


@pytest.mark.parametrize("segments", [[(0, 300 * 1024)], [(0, 100), (4096, 70_000), (80_000, 3), (90_000, 237_097)]])
@pytest.mark.parametrize("sector", [0, 1, 127])
def test_a_long_write_in_a_large_granule(
    segments: list[tuple[int, int]], sector: int, each_implementation: str
) -> None:
    """Aligned pieces of it go into the file one by one (`vhd.fileio`)."""
    disk = GranuleDisk(1 << 21)
    disk.block_shift = 21
    disk.direct_read = disk.direct_write = {0: (disk.fd, 0)}
    side = GuestSide(disk)
    at = 0x40000
    data = os.urandom(300 * 1024)
    given = 0
    for offset, length in segments:
        side.memory[at + offset : at + offset + length] = data[given : given + length]
        given += length
    assert given == len(data)
    side.driver.submit(
        0, BlkRequest.OUT, sector, segments=[Segment(at + offset, length) for offset, length in segments]
    )
    assert side.drain() is Drained.IDLE
    assert [answer.status for answer in side.driver.collect()] == [BlkStatus.OK]
    assert disk.content(0, 1 << 21) == (bytes(sector * 512) + data).ljust(1 << 21, b"\0")
    assert (disk.calls == []) == (each_implementation == "compiled")
    side.close()


def test_any_framing_of_header_and_status(plain_guest: GuestSide) -> None:
    """The header in two pieces, and the status in one piece with the data (2.7.4.1)."""
    driver, memory = plain_guest.driver, plain_guest.memory
    plain_guest.disk.fill(512, pattern(5, 512))
    at = driver.data_offset
    memory[at : at + 16] = struct.pack("<IIQ", BlkRequest.IN, 0, 1)
    next_, write = int(DescriptorFlag.NEXT), int(DescriptorFlag.WRITE)
    driver.write_descriptor(0, 0, (at + GUEST_BASE, 7, next_, 1))
    driver.write_descriptor(0, 1, (at + 7 + GUEST_BASE, 9, next_, 2))
    driver.write_descriptor(0, 2, (at + 4096 + GUEST_BASE, 513, write, 0))
    driver.make_available(0)
    assert plain_guest.drain() is Drained.IDLE
    assert bytes(memory[at + 4096 : at + 4096 + 513]) == pattern(5, 512) + b"\0"


def test_order_and_wrap_of_the_indices() -> None:
    side = GuestSide(GranuleDisk(DISK_BYTES), start_index=65530)
    for round_number in range(5):
        for slot in range(16):
            side.driver.submit(slot, BlkRequest.OUT, slot * 8, payload=pattern(round_number * 100 + slot))
        assert side.drain() is Drained.IDLE
        answers = side.driver.collect()
        assert [answer.slot for answer in answers] == list(range(16))
        assert {answer.status for answer in answers} == {BlkStatus.OK}
    assert side.ring.next_index == (65530 + 80) & 0xFFFF
    assert side.disk.content(15 * 4096, 4096) == pattern(415)
    side.close()


def test_notifications_with_event_idx(plain_guest: GuestSide) -> None:
    available = plain_guest.memory[16 * 16 : 16 * 16 + 6 + 2 * 16].cast("H")
    available[2 + 16] = 2  # tell me when the third is used
    for slot in range(2):
        plain_guest.driver.submit(slot, BlkRequest.FLUSH)
    plain_guest.drain()
    assert plain_guest.notifications == 0
    plain_guest.driver.submit(2, BlkRequest.FLUSH)
    plain_guest.drain()
    assert plain_guest.notifications == 1
    plain_guest.driver.submit(3, BlkRequest.FLUSH)
    plain_guest.drain()
    assert plain_guest.notifications == 1


def test_notifications_without_event_idx() -> None:
    side = GuestSide(GranuleDisk(DISK_BYTES), features=PLAIN)
    available = side.memory[16 * 16 : 16 * 16 + 6 + 2 * 16].cast("H")
    for flags, expected in ((0, 1), (1, 1), (0, 2)):
        available[0] = flags
        side.request(BlkRequest.FLUSH)
        assert side.notifications == expected
    side.close()


def test_ring_asks_for_a_kick_when_it_is_idle(plain_guest: GuestSide) -> None:
    plain_guest.request(BlkRequest.FLUSH)
    used = plain_guest.driver.place.used
    assert int.from_bytes(plain_guest.memory[used + 4 + 8 * 16 : used + 6 + 8 * 16], "little") == 1


def test_much_data_is_announced_before_the_rest_is_served() -> None:
    side = GuestSide(GranuleDisk(64 * 65536), features=PLAIN | INDIRECT, memory_bytes=1024 * 1024)
    length = 65536
    for slot in range(16):
        side.driver.submit(slot, BlkRequest.IN, slot * 128, segments=[Segment(0x40000, length, True)])
    assert side.drain() is Drained.IDLE
    assert side.notifications == 2  # 16 times 64 KiB, one for each 512 KiB
    assert len(side.driver.collect()) == 16
    side.close()


def test_write_without_space_stays_in_the_ring() -> None:
    side = GuestSide(GranuleDisk(DISK_BYTES, is_direct=lambda _granule: False))
    side.disk.room_bytes = 4096
    for slot in range(3):
        side.driver.submit(slot, BlkRequest.OUT, slot * 8, payload=pattern(slot + 1))
    assert side.drain() is Drained.STALLED
    assert [answer.slot for answer in side.driver.collect()] == [0]
    assert side.ring.stall is not None
    assert side.ring.stall.errno == errno.ENOSPC
    assert side.drain() is Drained.STALLED
    assert side.ring.next_index == 1
    side.disk.room_bytes = None
    assert side.drain() is Drained.IDLE
    assert [(answer.slot, answer.status) for answer in side.driver.collect()] == [(1, 0), (2, 0)]
    assert side.disk.content(0, 3 * 4096) == b"".join(pattern(number) for number in (1, 2, 3))
    side.close()


def test_stalled_ring_goes_on_after_a_restart() -> None:
    side = GuestSide(GranuleDisk(DISK_BYTES, is_direct=lambda _granule: False))
    side.disk.room_bytes = 0
    side.driver.submit(0, BlkRequest.OUT, 0, payload=pattern(9))
    assert side.drain() is Drained.STALLED
    side.disk.room_bytes = None
    side.new_ring()
    assert side.drain() is Drained.IDLE
    assert [(answer.slot, answer.status) for answer in side.driver.collect()] == [(0, 0)]
    side.close()


# Starting again after a kill.


@pytest.mark.parametrize("with_inflight", [True, False])
def test_unanswered_requests_are_served_by_the_next_ring(plain_guest: GuestSide, with_inflight: bool) -> None:
    plain_guest.request(BlkRequest.OUT, 0, pattern(1))
    for slot in range(1, 6):
        plain_guest.driver.submit(slot, BlkRequest.OUT, slot * 8, payload=pattern(slot))
    plain_guest.new_ring(with_inflight=with_inflight)
    assert plain_guest.drain() is Drained.IDLE
    assert [answer.slot for answer in plain_guest.driver.collect()] == [1, 2, 3, 4, 5]
    assert plain_guest.disk.content(5 * 4096, 4096) == pattern(5)


def test_request_in_flight_is_served_once_more(plain_guest: GuestSide) -> None:
    """Killed after the I/O, before the used ring, by a back-end that marks its heads."""
    queue = plain_guest.inflight.queue(0, 16)
    plain_guest.driver.submit(3, BlkRequest.OUT, 8, payload=pattern(3))
    plain_guest.driver.submit(4, BlkRequest.OUT, 16, payload=pattern(4))
    queue.header[3] = 3 | plain_guest.ring.next_index << 16
    queue.entries[2 * 3] = 1
    plain_guest.new_ring()
    assert plain_guest.drain() is Drained.IDLE
    assert [answer.slot for answer in plain_guest.driver.collect()] == [3, 4]
    assert [queue.entries[2 * head] for head in range(16)] == [0] * 16


def test_request_already_in_the_used_ring_is_not_served_again(plain_guest: GuestSide) -> None:
    """Killed after `used.idx`, before the flag was cleared."""
    queue = plain_guest.inflight.queue(0, 16)
    plain_guest.request(BlkRequest.FLUSH)
    queue.header[3] = 0  # last_batch_head 0, used_idx as before the request
    queue.entries[0] = 1
    plain_guest.new_ring()
    assert plain_guest.drain() is Drained.IDLE
    assert plain_guest.driver.collect() == []
    assert queue.entries[0] == 0
    assert len([call for call in plain_guest.disk.calls if call[0] == "flush"]) == 1


def test_foreign_region_is_served_in_counter_order(plain_guest: GuestSide) -> None:
    queue = plain_guest.inflight.queue(0, 16)
    for slot in (0, 1, 2, 3):
        plain_guest.driver.submit(slot, BlkRequest.OUT, slot * 8, payload=pattern(slot))
    for head, counter in ((0, 12), (1, 10), (2, 11)):  # an out-of-order back-end had taken three
        queue.entries[2 * head] = 1
        queue.entries[2 * head + 1] = counter
    plain_guest.new_ring()
    assert plain_guest.drain() is Drained.IDLE
    assert [answer.slot for answer in plain_guest.driver.collect()] == [1, 2, 0, 3]


@pytest.mark.parametrize("method", ["begin", "finish"])
def test_killed_again_while_serving_what_was_in_flight(
    plain_guest: GuestSide, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Killed before a head is served, and between its used element and its mark: each is answered exactly once."""
    queue = plain_guest.inflight.queue(0, 16)
    for slot in range(3):
        plain_guest.driver.submit(slot, BlkRequest.OUT, slot * 8, payload=pattern(slot))
        queue.entries[2 * slot] = 1
    for _kill in range(3):
        ring = plain_guest.new_ring()
        with monkeypatch.context() as patch:
            patch.setattr(InflightQueue, method, _raise)
            with pytest.raises(KeyboardInterrupt):
                ring.drain(lambda: None)
    plain_guest.new_ring()
    assert plain_guest.drain() is Drained.IDLE
    assert [answer.slot for answer in plain_guest.driver.collect()] == [0, 1, 2]
    assert [queue.entries[2 * head] & 1 for head in range(16)] == [0] * 16


def _raise(_queue: InflightQueue, _head: int, _used_idx: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("version", "desc_num"), [(2, 16), (1, 8), (1, 0)])
def test_region_of_another_shape_is_refused(plain_guest: GuestSide, version: int, desc_num: int) -> None:
    queue = plain_guest.inflight.queue(0, 16)
    queue.header[2] = version | desc_num << 16
    with pytest.raises(GuestFault, match="inflight region"):
        plain_guest.new_ring()


# Lies. Each breaks the ring, or is answered with an error; never more.


def _indirect(driver: VirtqueueDriver, table: int, length: int, flags: int = int(DescriptorFlag.INDIRECT)) -> None:
    driver.write_descriptor(0, 0, (table, length, flags, 0))
    driver.make_available(0)


def _cycle(driver: VirtqueueDriver) -> None:
    for number in range(2):
        driver.write_descriptor(0, number, (GUEST_BASE, 16, int(DescriptorFlag.NEXT), 1 - number))
    driver.make_available(0)


def _cycle_in_table(driver: VirtqueueDriver) -> None:
    table = driver.data_offset
    driver.write_descriptor(table, 0, (GUEST_BASE, 16, int(DescriptorFlag.NEXT), 0))
    _indirect(driver, table + GUEST_BASE, 48)


def _table_in_table(driver: VirtqueueDriver) -> None:
    table = driver.data_offset
    driver.write_descriptor(table, 0, (table + GUEST_BASE, 16, int(DescriptorFlag.INDIRECT), 0))
    _indirect(driver, table + GUEST_BASE, 16)


def _read_after_write(driver: VirtqueueDriver) -> None:
    driver.write_descriptor(0, 0, (GUEST_BASE, 16, int(DescriptorFlag.NEXT | DescriptorFlag.WRITE), 1))
    driver.write_descriptor(0, 1, (GUEST_BASE, 16, 0, 0))
    driver.make_available(0)


def _piece(address: int, length: int, flags: int = 0) -> Callable[[VirtqueueDriver], None]:
    def write(driver: VirtqueueDriver) -> None:
        driver.write_descriptor(0, 0, (address, length, flags, 0))
        driver.make_available(0)

    return write


def _data_at(address: int, length: int = 4096) -> Callable[[VirtqueueDriver], None]:
    def write(driver: VirtqueueDriver) -> None:
        driver.submit(0, BlkRequest.IN, 0, answer_bytes=4096)
        table = address_of_table(driver)
        driver.write_descriptor(table, 1, (address, length, int(DescriptorFlag.NEXT | DescriptorFlag.WRITE), 2))

    return write


def address_of_table(driver: VirtqueueDriver) -> int:
    address, _length, _flags, _next = struct.unpack_from("<QIHH", driver.memory, 0)
    return int(address) - GUEST_BASE


def _jump(driver: VirtqueueDriver) -> None:
    driver.available_idx = (driver.available_idx + 100) & 0xFFFF
    driver.make_available(0)


MEMORY_END = GUEST_BASE + 1024 * 1024
LIES: dict[str, Callable[[VirtqueueDriver], None]] = {
    "head beyond the ring": lambda driver: driver.make_available(16),
    "head far beyond the ring": lambda driver: driver.make_available(65535),
    "index jumps": _jump,
    "cycle": _cycle,
    "cycle in a table": _cycle_in_table,
    "table in a table": _table_in_table,
    "table outside memory": lambda driver: _indirect(driver, MEMORY_END, 48),
    "table below memory": lambda driver: _indirect(driver, 0, 48),
    "table at the end of memory": lambda driver: _indirect(driver, MEMORY_END - 32, 48),
    "table at the end of the numbers": lambda driver: _indirect(driver, 2**64 - 16, 48),
    "table of an odd length": lambda driver: _indirect(driver, GUEST_BASE, 47),
    "empty table": lambda driver: _indirect(driver, GUEST_BASE, 0),
    "huge table": lambda driver: _indirect(driver, GUEST_BASE, 0x10000),
    "table and next": lambda driver: _indirect(driver, GUEST_BASE, 48, 5),
    "read after write": _read_after_write,
    "short header": _piece(GUEST_BASE, 15),
    "no status": _piece(GUEST_BASE + 0x8000, 16),
    "data outside memory": _data_at(MEMORY_END),
    "data below memory": _data_at(GUEST_BASE - 4096),
    "data across the end of memory": _data_at(MEMORY_END - 100),
    "data at the end of the numbers": _data_at(2**64 - 4096),
    "data of 4 GiB": _data_at(GUEST_BASE, 2**32 - 512),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_lies_break_the_ring_only(plain_guest: GuestSide, lie: Callable[[VirtqueueDriver], None]) -> None:
    before = plain_guest.disk.content(0, DISK_BYTES)
    plain_guest.request(BlkRequest.FLUSH)
    lie(plain_guest.driver)
    with pytest.raises(GuestFault):
        plain_guest.drain()
    assert plain_guest.ring.next_index == 1
    assert plain_guest.driver.collect() == []
    assert plain_guest.disk.content(0, DISK_BYTES) == before


def test_what_was_finished_before_a_lie_is_answered(plain_guest: GuestSide) -> None:
    plain_guest.driver.submit(0, BlkRequest.OUT, 0, payload=pattern(1))
    plain_guest.driver.make_available(99)
    with pytest.raises(GuestFault):
        plain_guest.drain()
    assert [answer.status for answer in plain_guest.driver.collect()] == [BlkStatus.OK]
    assert plain_guest.notifications == 1
