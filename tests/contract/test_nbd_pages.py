"""READs that go from the page cache to the socket by reference: the bytes, the errors, and who is held up (nobody)."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.framework.nbd_peer import RawClient, request

from mullion.base.block import WritableBuffer
from mullion.base.units import KIB, MIB
from mullion.provider.turnstile import HeldDevice, Turnstile, holding
from mullion.vhd import Chain, create_differencing, create_dynamic, open_chain
from mullion.wire.nbd import NbdExport
from mullion.wire.nbd.messages import Chunk, Command, NbdError

pytestmark = pytest.mark.contract

SIZE_BYTES = 16 * MIB


class Watched(HeldDevice):
    """Counts how data were read."""

    paged_bytes = copied_bytes = 0

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        super().pread(offset, buffer)
        self.copied_bytes += len(buffer)

    def pread_to_pipe(self, offset: int, length: int, pipe_fd: int) -> bool:
        is_done = super().pread_to_pipe(offset, length, pipe_fd)
        self.paged_bytes += length * is_done
        return is_done


class Served:
    """A chain of two files whose content is known, over NBD."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.top = folder / "top.vhd"
        base = str(folder / "base.vhd")
        self.content = bytearray(SIZE_BYTES)
        choose = random.Random(7)
        create_dynamic(base, SIZE_BYTES)
        with open_chain(base) as chain:
            self._put(chain, 0, choose.randbytes(5 * MIB))
        create_differencing(str(self.top), base)
        self.chain = stack.enter_context(open_chain(str(self.top)))
        for offset in (MIB + 4096, MIB + 300 * KIB, 2 * MIB + 512):
            self._put(self.chain, offset, choose.randbytes(64 * KIB + 512))
        self.turnstile = Turnstile("system")
        self.device = Watched(self.chain, self.turnstile)
        self.export = NbdExport(str(folder / "d.nbd"), self.device, name="system", read_only=False)
        self.export.start()
        stack.callback(self.export.stop)
        self.client = stack.enter_context(RawClient(self.export.path))
        assert self.client.negotiate() == SIZE_BYTES

    def _put(self, chain: Chain, offset: int, data: bytes) -> None:
        chain.pwrite(offset, data)
        self.content[offset : offset + len(data)] = data

    def write(self, offset: int, data: bytes) -> None:
        self._put(self.chain, offset, data)

    def wait_for_paged(self, size_bytes: int) -> None:
        """Until so much has been handed to a pipe."""
        deadline_s = time.monotonic() + 60
        while self.device.paged_bytes < size_bytes:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)


@pytest.fixture
def served(short_tmp: Path) -> Iterator[Served]:
    with ExitStack() as stack:
        yield Served(short_tmp, stack)


def test_any_range_is_as_on_the_disk(served: Served) -> None:
    """From one file, from both in turns, with sectors and holes: in one piece, or not at all by reference."""
    choose = random.Random(3)
    ranges = [(0, 5 * MIB), (0, SIZE_BYTES), (1, 32 * KIB), (SIZE_BYTES - 40 * KIB, 40 * KIB)]
    for _ in range(60):
        length = choose.choice((32 * KIB - 1, 32 * KIB, 100 * KIB, 256 * KIB, MIB)) + choose.choice((0, 0, 1, 511, 512))
        ranges.append((choose.randrange(0, SIZE_BYTES - length), length))
    for cookie, (offset, length) in enumerate(ranges):
        served.client.send(request(Command.READ, offset, length, cookie=cookie))
        reply = served.client.structured_reply()
        assert reply.cookie == cookie
        assert reply.data == served.content[offset : offset + length]
    assert served.device.paged_bytes > 10 * MIB
    assert served.device.copied_bytes > 10 * MIB


def test_replies_stay_in_order_with_those_that_are_copied(served: Served) -> None:
    wanted = [(number * 4096, 4096 if number % 2 else 128 * KIB) for number in range(40)]
    served.client.send(
        b"".join(request(Command.READ, offset, length, cookie=offset) for offset, length in wanted)
        + request(Command.FLUSH, cookie=99)
    )
    for offset, length in wanted:
        reply = served.client.structured_reply()
        assert (reply.cookie, reply.data) == (offset, served.content[offset : offset + length])
    assert served.client.structured_reply().cookie == 99


def test_a_client_that_does_not_read_holds_up_no_exchange_of_files(served: Served) -> None:
    """What is in the socket refers to the files' pages; those who hold the disk do not wait for them to be taken."""
    served.client.send(b"".join(request(Command.READ, number * MIB, MIB, cookie=number) for number in range(5)))
    served.wait_for_paged(1)
    with holding([served.turnstile], 30):
        pass
    for number in range(5):
        assert served.client.structured_reply().data == served.content[number * MIB : (number + 1) * MIB]


def test_what_the_socket_refers_to_outlives_the_file(served: Served) -> None:
    """The first piece of a long READ is in the socket when its file is cut to nothing: it arrives as it was."""
    served.write(8 * MIB, b"\x5a" * MIB)
    served.client.send(request(Command.READ, 8 * MIB, 256 * KIB))
    served.wait_for_paged(256 * KIB)
    os.truncate(served.top, 0)
    assert served.client.structured_reply().data == b"\x5a" * 256 * KIB
    # What is read now is gone: an error that names it, on a connection that goes on.
    served.client.send(request(Command.READ, 8 * MIB, 256 * KIB, cookie=2) + request(Command.READ, 0, MIB, cookie=3))
    reply = served.client.structured_reply()
    assert (reply.error, reply.chunks) == (NbdError.EIO, (Chunk.ERROR,))
    assert served.client.structured_reply().data == served.content[:MIB]


def test_a_write_is_seen_by_the_reads_that_follow_it(served: Served) -> None:
    choose = random.Random(5)
    for number in range(20):
        data = choose.randbytes(64 * KIB)
        served.write(number * 32 * KIB, data)
        served.client.send(request(Command.READ, number * 32 * KIB, 64 * KIB))
        assert served.client.structured_reply().data == data
    assert served.device.paged_bytes


def test_the_descriptors_are_given_back(served: Served) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with RawClient(served.export.path) as client:
            client.negotiate()
            client.send(request(Command.READ, 0, MIB))
            client.structured_reply()
    served.client.send(request(Command.READ, 0, 4096))
    served.client.structured_reply()
    deadline_s = time.monotonic() + 60
    while len(os.listdir("/proc/self/fd")) > before:  # the threads close them when they have seen the end
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
