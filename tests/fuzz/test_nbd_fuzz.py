"""Hostile bytes for each side of NBD: they may be refused, and nothing else may happen."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.framework.devices import MemoryDevice
from tests.framework.nbd_peer import CLIENT_FLAGS, Pump, meta_context, named, option, request

from mullion.base.errors import MullionError
from mullion.base.units import MIB
from mullion.wire.nbd import Export, Handshake, NbdClient, NbdProtocolError
from mullion.wire.nbd.messages import OPTION_LIMIT_BYTES, Chunk
from mullion.wire.nbd.session import HandshakeState

pytestmark = pytest.mark.fuzz

SIZE_BYTES = 1 * MIB

OPTION_DATA = st.one_of(
    st.binary(max_size=80),
    st.builds(named, st.sampled_from([b"", b"disk", b"\xff", b"x" * 4097]), st.binary(max_size=20)),
    st.builds(meta_context, st.sampled_from([b"", b"disk", b"no"]), st.sampled_from([b"base:", b"base:allocation"])),
)
OPTIONS = st.builds(option, st.integers(0, 12), OPTION_DATA)
CONVERSATIONS = st.one_of(
    st.binary(max_size=300),
    st.lists(st.one_of(OPTIONS, st.binary(max_size=30)), max_size=12).map(lambda parts: CLIENT_FLAGS + b"".join(parts)),
)


@settings(max_examples=1500, deadline=None)
@given(CONVERSATIONS)
def test_any_negotiation_ends_in_a_known_state(stream: bytes) -> None:
    handshake = Handshake([Export("disk", MemoryDevice(SIZE_BYTES))])
    try:
        while handshake.state not in (HandshakeState.READY, HandshakeState.CLOSED):
            assert 0 < handshake.wanted <= OPTION_LIMIT_BYTES
            if len(stream) < handshake.wanted:
                return
            piece, stream = stream[: handshake.wanted], stream[handshake.wanted :]
            assert len(handshake.receive(piece)) < 1000
    except NbdProtocolError:
        return
    assert (handshake.export is not None) == (handshake.state is HandshakeState.READY)


NEAR = st.one_of(
    st.integers(0, SIZE_BYTES), st.sampled_from([SIZE_BYTES - 1, SIZE_BYTES, 2**32 - 1, 2**63, 2**64 - 1]).map(int)
)
REQUESTS = st.builds(
    request,
    st.integers(0, 9),
    NEAR,
    NEAR.map(lambda number: number & 0xFFFFFFFF),
    cookie=st.integers(0, 2**64 - 1),
    flags=st.one_of(st.just(0), st.integers(0, 0xFFFF)),
    payload=st.binary(max_size=600),
)


@settings(max_examples=1500, deadline=None)
@given(
    stream=st.lists(st.one_of(REQUESTS, st.binary(max_size=60)), max_size=10).map(b"".join),
    pieces=st.lists(st.integers(1, 500), max_size=20),
    structured=st.booleans(),
    read_only=st.booleans(),
)
def test_any_requests_leave_the_device_within_its_bounds(
    stream: bytes, pieces: list[int], structured: bool, read_only: bool
) -> None:
    device = MemoryDevice(SIZE_BYTES)
    pump = Pump(Export("disk", device, read_only=read_only), is_structured=structured)
    try:
        pump.feed(stream, pieces)
    except NbdProtocolError:
        pass
    assert len(device.content) == SIZE_BYTES
    for call, offset, length in device.calls:
        assert offset + length <= SIZE_BYTES
        assert not read_only or call == "flush"
    # Every request outside the device was refused by the loop, none by the device.
    assert pump.transmission.errors <= pump.transmission.requests


def scripted_reply(choose: random.Random) -> bytes:
    """Something like an answer to a READ of 4096 bytes at 0 with the client's first cookie."""
    stream = b""
    for _ in range(choose.randrange(1, 4)):
        kind = choose.choice([*map(int, Chunk), choose.randrange(65536)])
        payload = choose.choice(
            [
                b"",
                choose.randbytes(choose.randrange(40)),
                struct.pack(">Q", choose.choice([0, 1, 4095, 2**64 - 1])) + choose.randbytes(choose.choice([1, 4096])),
                struct.pack(">QI", choose.choice([0, 4000, 2**63]), choose.choice([0, 96, 4096, 2**32 - 1])),
                struct.pack(">IH", choose.randrange(200), choose.randrange(70)) + b"words",
                struct.pack(">IIIII", 1, 4096, choose.randrange(4), choose.choice([0, 2**32 - 1]), 7),
            ]
        )
        magic = choose.choice([0x668E33EF] * 8 + [0x67446698, 0])
        length = choose.choice([len(payload)] * 6 + [0, 2**32 - 1])
        cookie = choose.choice([1] * 8 + [2])
        stream += struct.pack(">IHHQI", magic, choose.randrange(2), kind, cookie, length) + payload
    return stream


@pytest.mark.parametrize("start", range(0, 400, 100))
def test_any_server_is_answered_with_an_error_that_says_so(start: int) -> None:
    with tempfile.TemporaryDirectory(prefix="mn-", dir="/tmp") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = str(Path(folder) / "h.nbd")
        listener.bind(path)
        listener.listen(1)
        for seed in range(start, start + 100):
            choose = random.Random(seed)
            greeting = b"NBDMAGICIHAVEOPT\x00\x03"
            replies = [(8, 1, b""), (10, 4, b"\0\0\0\1base:allocation"), (10, 1, b"")]
            replies += [(7, 3, struct.pack(">HQH", 0, SIZE_BYTES, 1)), (7, 1, b"")]
            stream = bytearray(
                greeting
                + b"".join(
                    struct.pack(">QIII", 0x0003E889045565A9, number, kind, len(data)) + data
                    for number, kind, data in replies
                )
            )
            if seed % 2:  # half of the servers are wrong already here
                stream[choose.randrange(len(stream))] ^= 1 << choose.randrange(8)
            stream += scripted_reply(choose)

            def serve(data: bytes = bytes(stream)) -> None:
                server, _ = listener.accept()
                with server, contextlib.suppress(ConnectionError):  # the client may hang up at any byte
                    server.sendall(data)
                    server.shutdown(socket.SHUT_WR)
                    while server.recv(65536):
                        pass

            thread = threading.Thread(target=serve)
            thread.start()
            with contextlib.suppress(MullionError, OSError), NbdClient(path, read_only=True) as client:
                if seed % 3:
                    client.pread(0, bytearray(min(4096, client.size_bytes)))
                for extent in client.extents(0, min(4096, client.size_bytes)):
                    assert 0 < extent.length <= 4096
            thread.join()
