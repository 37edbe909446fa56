"""The client with several requests under way: servers that answer out of order, fail some, or lie."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mullion.base.units import KIB, MIB
from mullion.wire.nbd import NbdClient, NbdProtocolError
from mullion.wire.nbd.client import AHEAD_BYTES, MAX_IN_FLIGHT, PIECE_BYTES

pytestmark = pytest.mark.contract

SIZE_BYTES = 8 * MIB + 512
CONTENT = random.Random(9).randbytes(SIZE_BYTES)
Request = tuple[int, int, int]
"""Cookie, offset, length."""
Answer = Callable[[list[Request]], list[bytes]]


def data(cookie: int, offset: int, length: int) -> bytes:
    """A reply to a READ in two chunks, the second half first."""
    half = length // 2
    parts = [(offset + half, length - half, 1 if not half else 0), *([(offset, half, 1)] if half else [])]
    return b"".join(
        struct.pack(">IHHQIQ", 0x668E33EF, done, 1, cookie, size + 8, at) + CONTENT[at : at + size]
        for at, size, done in parts
    )


def failure(cookie: int, number: int) -> bytes:
    return struct.pack(">IHHQIIH", 0x668E33EF, 1, 0x8001, cookie, 6, number, 0)


class Server:
    """Negotiates, then hands over the requests in batches: whatever has come when the socket runs dry."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._answer = answer
        self.requests: list[Request] = []
        self.most_at_once = 0
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        # A client that was lied to hangs up, whatever is on its way.
        with self._listener, self._listener.accept()[0] as client, contextlib.suppress(ConnectionError):
            self._negotiate(client)
            while header := client.recv(28, socket.MSG_WAITALL):
                batch = []
                while len(header) == 28:
                    _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", header)
                    if command == 2:
                        return
                    batch.append((cookie, offset, length))
                    try:
                        header = client.recv(28, socket.MSG_DONTWAIT)
                    except BlockingIOError:
                        break
                self.requests += batch
                self.most_at_once = max(self.most_at_once, len(batch))
                for reply in self._answer(batch):
                    client.sendall(reply)

    def _negotiate(self, client: socket.socket) -> None:
        client.sendall(struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3))
        client.recv(4, socket.MSG_WAITALL)
        while True:
            _, option, length = struct.unpack(">QII", client.recv(16, socket.MSG_WAITALL))
            if length:
                client.recv(length, socket.MSG_WAITALL)
            head = struct.pack(">QI", 0x3E889045565A9, option)
            if option == 7:
                client.sendall(head + struct.pack(">IIHQH", 3, 12, 0, SIZE_BYTES, 0b11))
            client.sendall(head + struct.pack(">II", 1, 0))
            if option == 7:
                return


@contextmanager
def connected(folder: Path, answer: Answer) -> Iterator[tuple[NbdClient, Server]]:
    server = Server(folder / "s", answer)
    client = NbdClient(str(folder / "s"), timeout_s=60)
    try:
        yield client, server
    finally:
        client.close()
        server.thread.join(60)
        assert not server.thread.is_alive()


def reversed_data(batch: list[Request]) -> list[bytes]:
    return [data(*request) for request in reversed(batch)]


@pytest.mark.parametrize("sizes", [[2 * MIB], [4 * KIB], [512, 300 * KIB, MIB, 7, 3 * MIB]])
def test_a_disk_read_from_end_to_end_by_a_server_that_answers_backwards(short_tmp: Path, sizes: list[int]) -> None:
    with connected(short_tmp, reversed_data) as (client, server):
        offset, number = 0, 0
        while offset < SIZE_BYTES:
            buffer = bytearray(min(sizes[number % len(sizes)], SIZE_BYTES - offset))
            client.pread(offset, buffer)
            assert buffer == CONTENT[offset : offset + len(buffer)]
            offset, number = offset + len(buffer), number + 1
        assert server.most_at_once <= MAX_IN_FLIGHT
        asked = sum(length for _, _, length in server.requests)
        assert asked == SIZE_BYTES, "nothing is asked for twice"
        assert max(length for _, _, length in server.requests) <= PIECE_BYTES


def test_reads_here_and_there_among_sequential_ones(short_tmp: Path) -> None:
    choose = random.Random(3)
    with connected(short_tmp, reversed_data) as (client, _server):
        offset = 0
        for _ in range(300):
            if choose.random() < 0.3:
                offset = choose.randrange(SIZE_BYTES)
            buffer = bytearray(min(choose.choice([0, 1, 4 * KIB, 700 * KIB, 2 * MIB]), SIZE_BYTES - offset))
            client.pread(offset, buffer)
            assert buffer == CONTENT[offset : offset + len(buffer)]
            offset += len(buffer)


def test_what_failed_ahead_fails_only_who_wants_it(short_tmp: Path) -> None:
    bad = 3 * MIB

    def answer(batch: list[Request]) -> list[bytes]:
        return [failure(c, errno.EIO) if o <= bad < o + n else data(c, o, n) for c, o, n in batch]

    with connected(short_tmp, answer) as (client, _server):
        for offset in (0, MIB, 2 * MIB):
            buffer = bytearray(MIB)
            client.pread(offset, buffer)
            assert buffer == CONTENT[offset : offset + MIB]
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output"):
                client.pread(3 * MIB, bytearray(MIB))
        buffer = bytearray(2 * MIB)
        client.pread(4 * MIB, buffer)
        assert buffer == CONTENT[4 * MIB : 6 * MIB]


def test_a_buffer_is_not_touched_after_the_read_of_it_failed(short_tmp: Path) -> None:
    def answer(batch: list[Request]) -> list[bytes]:
        return [failure(c, errno.EIO) if o == 0 else data(c, o, n) for c, o, n in batch]

    with connected(short_tmp, answer) as (client, _server):
        buffer = bytearray(6 * MIB)
        with pytest.raises(OSError, match="Input/output"):
            client.pread(0, buffer)
        before = bytes(buffer)
        client.pread(MIB, bytearray(MIB))
        assert buffer == before


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (lambda c, o, n: data(c + 100, o, n), "no request under way"),
        (lambda c, o, n: data(c, o, n) * 2, "no request under way"),
        (lambda c, o, n: struct.pack(">IHHQIQ", 0x668E33EF, 1, 1, c, n + 9, o) + bytes(n + 1), "in reply to a READ"),
        (lambda c, o, n: struct.pack(">IHHQIQI", 0x668E33EF, 1, 2, c, 12, o, 2**32 - 1), "in reply to a READ"),
        (lambda c, o, n: (struct.pack(">IHHQIQ", 0x668E33EF, 0, 1, c, 520, o) + bytes(512)) * 9, "with more"),
        (lambda c, o, n: struct.pack(">IHHQIQ", 0x668E33EF, 1, 1, c, 520, o) + bytes(512), "answered with 512"),
        (lambda c, o, n: struct.pack(">IHHQI", 0x668E33EF, 1, 5, c, 8) + bytes(8), "unexpected chunk"),
        (lambda c, o, n: struct.pack(">IIQ", 0x67446698, 0, c) + bytes(n), "simple reply"),
    ],
)
def test_a_server_that_lies_loses_the_connection(
    short_tmp: Path, lie: Callable[[int, int, int], bytes], said: str
) -> None:
    def answer(batch: list[Request]) -> list[bytes]:
        return [lie(*request) for request in batch]

    with connected(short_tmp, answer) as (client, _server):
        with pytest.raises(NbdProtocolError, match=said):
            read_twice(client)
        client.close()


def read_twice(client: NbdClient) -> None:
    for offset in (0, 4 * KIB):
        client.pread(offset, bytearray(4 * KIB))


def test_no_more_is_read_ahead_than_said(short_tmp: Path) -> None:
    with connected(short_tmp, reversed_data) as (client, server):
        client.pread(0, bytearray(4 * KIB))
        client.pread(4 * KIB, bytearray(4 * KIB))
        client.pread(4 * MIB, bytearray(512))  # elsewhere: what was read ahead is dropped
        asked = sum(length for _, _, length in server.requests)
        assert asked <= 8 * KIB + AHEAD_BYTES + PIECE_BYTES + 512
