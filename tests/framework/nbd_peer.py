"""The other end of an NBD conversation, byte by byte: what a program that is not ours, or means harm, may send.

`negotiation` and `request` make bytes; `Replies` takes them apart; `Pump` feeds a `Transmission` without a socket;
`RawClient` is a socket on which a test says exactly what it wants.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple

from mullion.wire.nbd import Export, Transmission
from mullion.wire.nbd.messages import Chunk, Command, Option
from mullion.wire.nbd.transmission import BUFFER_BYTES

IHAVEOPT = b"IHAVEOPT"
CLIENT_FLAGS = struct.pack(">I", 3)


def option(number: int, data: bytes = b"") -> bytes:
    return IHAVEOPT + struct.pack(">II", number, len(data)) + data


def named(name: bytes, rest: bytes = b"") -> bytes:
    return struct.pack(">I", len(name)) + name + rest


def meta_context(name: bytes, *queries: bytes) -> bytes:
    return named(name, struct.pack(">I", len(queries)) + b"".join(named(query) for query in queries))


def request(
    command: int, offset: int = 0, length: int = 0, *, cookie: int = 1, flags: int = 0, payload: bytes = b""
) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + payload


def write(offset: int, payload: bytes, *, cookie: int = 1, flags: int = 0) -> bytes:
    return request(Command.WRITE, offset, len(payload), cookie=cookie, flags=flags, payload=payload)


class Reply(NamedTuple):
    """One simple reply, or all chunks of a structured one: `data` is what was read or the payload of a status."""

    cookie: int
    error: int
    data: bytes
    chunks: tuple[int, ...]


def parse_structured(stream: bytes) -> list[Reply]:
    """Take a stream of whole structured replies apart; anything out of order fails the test."""
    replies = []
    position = 0
    error, data, chunks, expected_offset = 0, b"", [], None
    while position < len(stream):
        magic, flags, kind, cookie, length = struct.unpack_from(">IHHQI", stream, position)
        assert magic == 0x668E33EF
        payload = stream[position + 20 : position + 20 + length]
        assert len(payload) == length
        position += 20 + length
        chunks.append(kind)
        if kind == Chunk.OFFSET_DATA:
            offset = struct.unpack_from(">Q", payload)[0]
            assert expected_offset in (None, offset)
            expected_offset = offset + length - 8
            data += payload[8:]
        elif kind == Chunk.ERROR:
            error = struct.unpack_from(">I", payload)[0]
        else:
            data += payload
        if flags & 1:
            replies.append(Reply(cookie, error, data, tuple(chunks)))
            error, data, chunks, expected_offset = 0, b"", [], None
    assert not chunks, "the last reply has no end"
    return replies


class Pump:
    """Feeds a `Transmission` as the server does, in pieces of any length."""

    def __init__(self, export: Export, *, is_structured: bool = True, has_allocation: bool = True) -> None:
        self.sent = bytearray()
        self.sends = 0
        self.transmission = Transmission(
            export,
            is_structured=is_structured,
            contexts=list(enumerate(export.contexts, 1)) if has_allocation else [],
            send=self._send,
        )
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._start = self._end = 0

    def _send(self, view: memoryview) -> None:
        self.sends += 1
        self.sent += view

    def feed(self, data: bytes, pieces: Iterable[int] = ()) -> None:
        """Give it the data, first in pieces of the lengths asked for, then as much at once as fits."""
        lengths = iter(pieces)
        position = 0
        while position < len(data) and not self.transmission.is_closed:
            wanted = self.transmission.wanted
            assert 0 < wanted <= BUFFER_BYTES
            if self._start == self._end or self._start + wanted > BUFFER_BYTES:
                rest = bytes(self._buffer[self._start : self._end])
                self._buffer[: len(rest)] = rest
                self._start, self._end = 0, len(rest)
            taken = data[position : position + min(next(lengths, BUFFER_BYTES), BUFFER_BYTES - self._end)]
            self._buffer[self._end : self._end + len(taken)] = taken
            position += len(taken)
            self._end += len(taken)
            self._start = self.transmission.feed(self._buffer, self._start, self._end)
            assert self._start <= self._end
            self.transmission.send_replies()

    def ask(self, data: bytes, pieces: Iterable[int] = ()) -> list[Reply]:
        self.sent.clear()
        self.feed(data, pieces)
        return parse_structured(bytes(self.sent))


class RawClient:
    """A socket on which a test says exactly what it wants."""

    def __init__(self, path: str, *, timeout_s: float = 60.0) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(timeout_s)
        self.socket.connect(path)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = self.socket.recv(length - len(data))
            if not piece:
                raise EOFError(f"the server hung up after {len(data)} of {length} bytes")
            data += piece
        return bytes(data)

    def is_hung_up(self) -> bool:
        """Read to the end; True when there was nothing but the end."""
        try:
            return self.socket.recv(65536) == b""
        except ConnectionResetError:
            return True

    def negotiate(self, name: bytes = b"", *, structured: bool = True) -> int:
        """Up to the transmission phase; the export's size."""
        assert self.receive(18)[:16] == b"NBDMAGICIHAVEOPT"
        self.send(CLIENT_FLAGS)
        if structured:
            self.send(option(Option.STRUCTURED_REPLY))
            assert self.receive(20)[12:16] == b"\0\0\0\1"
        self.send(option(Option.EXPORT_NAME, name))
        size_bytes: int = struct.unpack(">QH", self.receive(10))[0]
        return size_bytes

    def simple_reply(self) -> tuple[int, int]:
        """Error and cookie of a simple reply."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698
        return error, cookie

    def structured_reply(self) -> Reply:
        """All chunks of one reply."""
        stream = b""
        while True:
            head = self.receive(20)
            stream += head + self.receive(struct.unpack_from(">I", head, 16)[0])
            if head[5] & 1:
                return parse_structured(stream)[0]
