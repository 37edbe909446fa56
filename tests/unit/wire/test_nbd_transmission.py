"""The request loop: each command, each refusal, any fragmentation, and a full storage."""

from __future__ import annotations

import errno
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.framework.devices import MemoryDevice
from tests.framework.nbd_peer import Pump, Reply, request, write

from mullion.base.block import Buffer, LostDataError, WritableBuffer
from mullion.base.errors import DeniedError, NoSpaceError
from mullion.base.units import KIB, MIB
from mullion.wire.nbd import Export, NbdProtocolError
from mullion.wire.nbd.messages import Chunk, Command, CommandFlag, NbdError
from mullion.wire.nbd.transmission import PIECE_BYTES

pytestmark = pytest.mark.unit

SIZE_BYTES = 4 * MIB
FUA, DF, REQ_ONE = CommandFlag.FUA, CommandFlag.DF, CommandFlag.REQ_ONE


@pytest.fixture
def device() -> MemoryDevice:
    filled = MemoryDevice(SIZE_BYTES)
    filled.content[:] = random.Random(1).randbytes(SIZE_BYTES)
    return filled


@pytest.fixture
def pump(device: MemoryDevice) -> Pump:
    return Pump(Export("disk", device))


def done(cookie: int = 1) -> Reply:
    return Reply(cookie, 0, b"", (Chunk.NONE,))


def failed(error: int, cookie: int = 1) -> Reply:
    return Reply(cookie, error, b"", (Chunk.ERROR,))


class TestRead:
    @pytest.mark.parametrize("length", [1, 512, 4096, 256 * KIB, 256 * KIB + 1, MIB, 3 * MIB])
    @pytest.mark.parametrize("flags", [0, FUA, DF])
    def test_data_of_any_length(self, pump: Pump, device: MemoryDevice, length: int, flags: int) -> None:
        offset = 12345
        [reply] = pump.ask(request(Command.READ, offset, length, flags=flags, cookie=9))
        assert (reply.cookie, reply.error) == (9, 0)
        assert reply.data == device.content[offset : offset + length]
        assert flags != DF or reply.chunks == (Chunk.OFFSET_DATA,)
        assert pump.transmission.bytes_read == length

    def test_many_at_once_are_answered_in_order_and_sent_together(self, pump: Pump, device: MemoryDevice) -> None:
        offsets = [index * 4096 for index in range(16)]
        stream = b"".join(request(Command.READ, offset, 4096, cookie=offset) for offset in offsets)
        replies = pump.ask(stream)
        assert [reply.cookie for reply in replies] == offsets
        assert all(reply.data == device.content[reply.cookie : reply.cookie + 4096] for reply in replies)
        assert pump.sends == 1

    def test_nothing_is_read_for_a_length_of_zero(self, pump: Pump) -> None:
        assert pump.ask(request(Command.READ, 0, 0)) == [done()]

    def test_the_last_byte_and_not_one_more(self, pump: Pump, device: MemoryDevice) -> None:
        [reply] = pump.ask(request(Command.READ, SIZE_BYTES - 1, 1))
        assert reply.data == device.content[-1:]
        assert pump.ask(request(Command.READ, SIZE_BYTES - 1, 2)) == [failed(NbdError.EINVAL)]
        assert pump.ask(request(Command.READ, (1 << 64) - 1, 4096)) == [failed(NbdError.EINVAL)]

    def test_simple_replies_carry_the_data_behind_the_header(self, device: MemoryDevice) -> None:
        pump = Pump(Export("disk", device), is_structured=False, has_allocation=False)
        pump.feed(request(Command.READ, 7, 600 * KIB, cookie=5) + request(Command.READ, SIZE_BYTES, 1, cookie=6))
        good = struct.pack(">IIQ", 0x67446698, 0, 5) + device.content[7 : 7 + 600 * KIB]
        assert bytes(pump.sent) == good + struct.pack(">IIQ", 0x67446698, NbdError.EINVAL, 6)

    def test_too_long_is_refused_before_the_device_is_asked(self) -> None:
        pump = Pump(Export("disk", MemoryDevice(64 * MIB)))
        assert pump.ask(request(Command.READ, 0, 32 * MIB + 1)) == [failed(NbdError.EINVAL)]


class TestWrite:
    @pytest.mark.parametrize("length", [1, 4096, MIB, MIB + 1, 2 * MIB + 4097])
    def test_payload_of_any_length(self, pump: Pump, device: MemoryDevice, length: int) -> None:
        payload = random.Random(length).randbytes(length)
        before = bytes(device.content)
        assert pump.ask(write(100, payload)) == [done()]
        assert device.content == before[:100] + payload + before[100 + length :]
        assert pump.transmission.bytes_written == length
        assert all(size <= PIECE_BYTES for _, _, size in device.calls)
        assert device.flushes == 0

    def test_the_device_gets_a_short_payload_in_one_call(self, pump: Pump, device: MemoryDevice) -> None:
        pump.ask(write(0, bytes(PIECE_BYTES)), pieces=[1000, 1, 65536])
        assert device.calls == [("pwrite", 0, PIECE_BYTES)]

    def test_a_long_payload_is_written_while_it_comes(self, pump: Pump, device: MemoryDevice) -> None:
        pump.feed(write(0, bytes(3 * PIECE_BYTES))[: 28 + 2 * PIECE_BYTES])
        assert device.calls == [("pwrite", 0, PIECE_BYTES), ("pwrite", PIECE_BYTES, PIECE_BYTES)]
        assert not pump.sent

    @pytest.mark.parametrize("length", [0, 4096, 2 * MIB])
    def test_force_unit_access_flushes_before_the_answer(self, pump: Pump, device: MemoryDevice, length: int) -> None:
        assert pump.ask(write(0, bytes(length), flags=FUA)) == [done()]
        assert device.calls[-1][0] == "flush"

    @pytest.mark.parametrize("length", [4096, 2 * MIB])
    def test_a_refused_payload_is_consumed_and_not_written(self, pump: Pump, device: MemoryDevice, length: int) -> None:
        before = bytes(device.content)
        stream = write(SIZE_BYTES - 1, bytes(length)) + write(0, bytes(length), flags=DF, cookie=2)
        replies = pump.ask(stream + request(Command.FLUSH, cookie=3))
        assert replies == [failed(NbdError.ENOSPC), failed(NbdError.EINVAL, 2), done(3)]
        assert device.content == before
        assert pump.transmission.errors == 2

    def test_a_payload_over_the_limit_closes_the_connection(self, pump: Pump) -> None:
        with pytest.raises(NbdProtocolError, match="33554433 bytes"):
            pump.feed(request(Command.WRITE, 0, 32 * MIB + 1))


class TestOthers:
    def test_flush(self, pump: Pump, device: MemoryDevice) -> None:
        assert pump.ask(request(Command.FLUSH) + request(Command.FLUSH, cookie=2, flags=FUA)) == [done(), done(2)]
        assert device.flushes == 2

    def test_replies_do_not_wait_for_a_flush_behind_them(self, device: MemoryDevice) -> None:
        pump = Pump(Export("disk", device))
        seen = []
        device.flush = lambda: seen.append(len(pump.sent))  # type: ignore[method-assign]
        pump.feed(request(Command.READ, 0, 512) + request(Command.FLUSH))
        assert seen == [28 + 512]

    @pytest.mark.parametrize(("command", "call"), [(Command.TRIM, "discard"), (Command.WRITE_ZEROES, "write_zeroes")])
    def test_trim_and_write_zeroes(self, pump: Pump, device: MemoryDevice, command: Command, call: str) -> None:
        assert pump.ask(request(command, 8192, 3 * MIB)) == [done()]
        assert pump.ask(request(command, 0, 4096, flags=FUA)) == [done()]
        assert pump.ask(request(command, 0, 0)) == [done()]
        assert device.calls == [(call, 8192, 3 * MIB), (call, 0, 4096), ("flush", 0, 0)]

    def test_no_hole_is_allowed_for_write_zeroes(self, pump: Pump) -> None:
        assert pump.ask(request(Command.WRITE_ZEROES, 0, 512, flags=CommandFlag.NO_HOLE)) == [done()]

    def test_goodbye_ends_it_unanswered(self, pump: Pump) -> None:
        assert pump.ask(request(Command.READ, 0, 1) + request(Command.DISC) + b"never looked at" * 9)[1:] == []
        assert pump.transmission.is_closed

    def test_wrong_magic_closes_the_connection(self, pump: Pump) -> None:
        with pytest.raises(NbdProtocolError, match="0x00000000"):
            pump.feed(bytes(28))

    @pytest.mark.parametrize(
        ("stream", "error"),
        [
            (request(Command.CACHE, 0, 512), NbdError.EINVAL),
            (request(Command.RESIZE, 0, 512), NbdError.EINVAL),
            (request(0xFFFF, 0, 512), NbdError.EINVAL),
            (request(Command.READ, 0, 512, flags=0x8000), NbdError.EINVAL),
            (request(Command.FLUSH, flags=REQ_ONE), NbdError.EINVAL),
            (request(Command.WRITE_ZEROES, 0, 512, flags=CommandFlag.FAST_ZERO), NbdError.EINVAL),
            (request(Command.TRIM, SIZE_BYTES, 1), NbdError.EINVAL),
            (request(Command.WRITE_ZEROES, SIZE_BYTES, 1), NbdError.ENOSPC),
            (request(Command.BLOCK_STATUS, 0, 0), NbdError.EINVAL),
            (request(Command.BLOCK_STATUS, SIZE_BYTES, 1), NbdError.EINVAL),
        ],
    )
    def test_refusals(self, pump: Pump, device: MemoryDevice, stream: bytes, error: NbdError) -> None:
        assert pump.ask(stream + request(Command.FLUSH, cookie=2)) == [failed(error), done(2)]
        assert device.calls == [("flush", 0, 0)]
        assert pump.transmission.requests == 2
        assert pump.transmission.errors == 1

    @pytest.mark.parametrize(
        "stream", [write(0, bytes(512)), request(Command.TRIM, 0, 512), request(Command.WRITE_ZEROES, 0, 512)]
    )
    def test_a_read_only_export_is_not_written(self, device: MemoryDevice, stream: bytes) -> None:
        pump = Pump(Export("disk", device, read_only=True))
        assert pump.ask(stream) == [failed(NbdError.EPERM)]
        assert device.calls == []


class TestBlockStatus:
    def test_extents_become_states_and_equal_neighbours_one(self) -> None:
        device = MemoryDevice(1 * MIB)
        device.pwrite(4096, bytes(8192))
        device.write_zeroes(16384, 4096)
        pump = Pump(Export("disk", device))
        [reply] = pump.ask(request(Command.BLOCK_STATUS, 0, MIB))
        words = struct.unpack(f">{len(reply.data) // 4}I", reply.data)
        assert words == (1, 4096, 3, 8192, 0, 4096, 3, 4096, 2, MIB - 20480, 3)
        assert reply.chunks == (Chunk.BLOCK_STATUS,)
        [reply] = pump.ask(request(Command.BLOCK_STATUS, 6000, 8000, flags=REQ_ONE))
        assert struct.unpack(">III", reply.data) == (1, 12288 - 6000, 0)

    def test_a_scattered_disk_is_answered_in_part(self) -> None:
        device = MemoryDevice(64 * MIB)
        for granule in range(0, 64 * MIB // 4096, 2):
            device.pwrite(granule * 4096, b"x")
        [reply] = Pump(Export("disk", device)).ask(request(Command.BLOCK_STATUS, 0, 64 * MIB))
        assert len(reply.data) == 4 + 8 * 4096

    def test_without_the_context_there_is_none(self, device: MemoryDevice) -> None:
        pump = Pump(Export("disk", device), has_allocation=False)
        assert pump.ask(request(Command.BLOCK_STATUS, 0, 512)) == [failed(NbdError.EINVAL)]


class FailingDevice(MemoryDevice):
    """Raises what it is told to, as often as it is told to."""

    def __init__(self, error: Exception, times: int = 1 << 30) -> None:
        super().__init__(SIZE_BYTES)
        self.error = error
        self.times = times

    def _fail(self) -> None:
        if self.times:
            self.times -= 1
            raise self.error

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        self._fail()
        super().pread(offset, buffer)

    def pwrite(self, offset: int, buffer: Buffer) -> None:
        self._fail()
        super().pwrite(offset, buffer)

    def flush(self) -> None:
        self._fail()
        super().flush()


class TestDeviceErrors:
    @pytest.mark.parametrize(
        ("raised", "answered"),
        [
            (OSError(errno.EIO, "broken"), NbdError.EIO),
            (OSError(errno.EBADF, "gone"), NbdError.EIO),
            (OSError("no number"), NbdError.EIO),
            (OSError(errno.ENOSPC, "full"), NbdError.ENOSPC),
            (OSError(errno.EDQUOT, "quota"), NbdError.ENOSPC),
            (OSError(errno.EROFS, "read-only filesystem"), NbdError.EPERM),
            (NoSpaceError("full"), NbdError.ENOSPC),
            (DeniedError("no"), NbdError.EIO),
        ],
    )
    @pytest.mark.parametrize("length", [4096, 2 * MIB])
    def test_each_error_has_its_number_and_the_connection_goes_on(
        self, raised: Exception, answered: NbdError, length: int
    ) -> None:
        device = FailingDevice(raised)
        pump = Pump(Export("disk", device))
        replies = pump.ask(write(0, bytes(length)) + request(Command.READ, 0, length, cookie=2))
        assert replies == [failed(answered), failed(answered, 2)]
        assert pump.transmission.errors == 2
        assert pump.ask(request(Command.FLUSH) + request(Command.READ, 0, 64, flags=DF, cookie=2)) == [
            failed(answered),
            failed(answered, 2),
        ]
        device.times = 0
        assert [reply.error for reply in pump.ask(write(0, bytes(length)) + request(Command.FLUSH))] == [0, 0]

    def test_a_long_read_that_breaks_in_the_middle_ends_with_an_error(self, device: MemoryDevice) -> None:
        real = device.pread

        def pread(offset: int, buffer: WritableBuffer) -> None:
            if offset >= MIB:
                raise OSError(errno.EIO, "bad sector")
            real(offset, buffer)

        device.pread = pread  # type: ignore[method-assign]
        [reply] = Pump(Export("disk", device)).ask(request(Command.READ, 0, 2 * MIB))
        assert reply.error == NbdError.EIO
        assert reply.data == device.content[:MIB]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_storage_is_told_at_once_and_the_next_write_may_succeed(number: int) -> None:
    device = FailingDevice(OSError(number, "full"), times=1)
    pump = Pump(Export("disk", device))
    assert pump.ask(write(0, b"x" * 512)) == [failed(NbdError.ENOSPC)]
    assert pump.ask(write(0, b"x" * 512)) == [done()]
    assert device.content[:512] == b"x" * 512


def test_a_flush_that_has_lost_something_never_succeeds_again() -> None:
    """QEMU tells its guest of no error: it stops it, and repeats the request until that is answered well."""
    device = FailingDevice(LostDataError(errno.EIO, "lost"), times=1)
    export = Export("disk", device)
    for _ in range(2):  # and it connects again
        pump = Pump(export)
        assert pump.ask(request(Command.FLUSH, 0, 0)) == [failed(NbdError.EIO)]
        assert pump.ask(write(0, b"x" * 512, flags=FUA)) == [failed(NbdError.EIO)]
        assert pump.ask(write(0, b"x" * 512)) == [done()]
    assert device.content[:512] == b"x" * 512


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    pieces=st.lists(st.one_of(st.integers(1, 60), st.integers(1, 2 * MIB)), max_size=40),
)
def test_the_outcome_does_not_depend_on_how_the_bytes_arrive(seed: int, pieces: list[int]) -> None:
    choose = random.Random(seed)
    stream = b""
    for cookie in range(choose.randrange(1, 12)):
        length = choose.choice([1, 28, 511, 4096, 65536, MIB - 1, MIB, MIB + 5, 2 * MIB])
        offset = choose.randrange(SIZE_BYTES)
        if choose.random() < 0.6:
            stream += write(offset, choose.randbytes(length), cookie=cookie)
        else:
            stream += request(choose.choice([0, 3, 4, 6, 7]), offset, length, cookie=cookie)
    whole, parts = MemoryDevice(SIZE_BYTES), MemoryDevice(SIZE_BYTES)
    replies = Pump(Export("disk", whole)).ask(stream)
    assert Pump(Export("disk", parts)).ask(stream, pieces) == replies
    assert parts.content == whole.content
