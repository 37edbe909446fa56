"""Several contexts of one export, and what BLOCK_STATUS says of them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from tests.framework.devices import MemoryDevice
from tests.framework.nbd_peer import CLIENT_FLAGS, Pump, meta_context, named, option, parse_structured, request

from mullion.base.units import KIB, MIB
from mullion.wire.nbd import Export, Handshake, NbdProtocolError
from mullion.wire.nbd.messages import Command, CommandFlag, Option, OptionReply
from mullion.wire.nbd.session import HandshakeState

pytestmark = pytest.mark.unit

SIZE_BYTES = 4 * MIB


class Stripes:
    """Every second 64 KiB is dirty."""

    def __init__(self) -> None:
        self.taken = 0

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        end = offset + length
        while offset < end:
            size = min(end, (offset // (64 * KIB) + 1) * 64 * KIB) - offset
            self.taken += 1
            yield size, bool(offset // (64 * KIB) % 2)
            offset += size


def export_of(stripes: Stripes) -> Export:
    device = MemoryDevice(SIZE_BYTES)
    device.pwrite(0, b"x" * MIB)
    return Export("disk", device, read_only=True, bitmaps={"since-monday": stripes}, description="a disk")


def parts_of(data: bytes) -> list[tuple[int, list[tuple[int, int]]]]:
    """The payloads of two chunks of known lengths: (context id, [(length, state)])."""
    found = []
    while data:
        number = struct.unpack_from(">I", data)[0]
        runs, data = [], data[4:]
        while len(data) >= 8 and struct.unpack_from(">I", data)[0] not in (1, 2):
            runs.append(struct.unpack_from(">II", data))
            data = data[8:]
        found.append((number, runs))
    return found


def ask(handshake: Handshake, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
    stream, replies = option(number, data), b""
    while stream:
        piece, stream = stream[: handshake.wanted], stream[handshake.wanted :]
        replies += handshake.receive(piece)
    found = []
    while replies:
        _, _, kind, length = struct.unpack_from(">QIII", replies)
        found.append((kind, replies[20 : 20 + length]))
        replies = replies[20 + length :]
    return found


def begun(*, tls: bool = False) -> Handshake:
    handshake = Handshake([export_of(Stripes())], offers_tls=tls, requires_tls=tls)
    handshake.receive(CLIENT_FLAGS)
    return handshake


def contexts(*queries: bytes) -> bytes:
    return meta_context(b"disk", *queries)


GO = named(b"disk", bytes(2))


class TestChoosing:
    @pytest.mark.parametrize(
        ("queries", "names"),
        [
            ((), [b"base:allocation", b"qemu:dirty-bitmap:since-monday"]),
            ((b"base:",), [b"base:allocation"]),
            ((b"qemu:",), [b"qemu:dirty-bitmap:since-monday"]),
            ((b"qemu:dirty-bitmap:",), [b"qemu:dirty-bitmap:since-monday"]),
            ((b"qemu:dirty-bitmap:since-tuesday", b"x-other:"), []),
        ],
    )
    def test_a_list_may_use_wildcards(self, queries: tuple[bytes, ...], names: list[bytes]) -> None:
        handshake = begun()
        ask(handshake, Option.STRUCTURED_REPLY)
        *listed, end = ask(handshake, Option.LIST_META_CONTEXT, contexts(*queries))
        assert end == (OptionReply.ACK, b"")
        assert listed == [(OptionReply.META_CONTEXT, bytes(4) + name) for name in names]

    def test_a_choice_keeps_the_ids_of_the_export(self) -> None:
        handshake = begun()
        ask(handshake, Option.STRUCTURED_REPLY)
        bitmap = b"qemu:dirty-bitmap:since-monday"
        assert ask(handshake, Option.SET_META_CONTEXT, contexts(b"qemu:", bitmap)) == [
            (OptionReply.META_CONTEXT, b"\0\0\0\2" + bitmap),
            (OptionReply.ACK, b""),
        ]
        ask(handshake, Option.GO, GO)
        assert [number for number, _ in handshake.contexts] == [2]

    def test_the_description_is_told_when_it_is_asked_for(self) -> None:
        wish = named(b"disk", struct.pack(">HH", 1, 2))
        assert (OptionReply.INFO, b"\0\2a disk") in ask(begun(), Option.INFO, wish)


class TestStatus:
    def test_both_contexts_answer_one_request(self) -> None:
        pump = Pump(export_of(Stripes()))
        pump.feed(request(Command.BLOCK_STATUS, MIB - 64 * KIB, 192 * KIB))
        [reply] = parse_structured(bytes(pump.sent))
        assert parts_of(reply.data) == [
            (1, [(64 * KIB, 0), (128 * KIB, 3)]),
            (2, [(64 * KIB, 1), (64 * KIB, 0), (64 * KIB, 1)]),
        ]

    def test_one_extent_is_all_that_is_looked_up_when_one_is_wanted(self) -> None:
        stripes = Stripes()
        pump = Pump(export_of(stripes))
        pump.feed(request(Command.BLOCK_STATUS, 0, SIZE_BYTES, flags=CommandFlag.REQ_ONE))
        [reply] = parse_structured(bytes(pump.sent))
        assert parts_of(reply.data) == [(1, [(MIB, 0)]), (2, [(64 * KIB, 0)])]
        assert stripes.taken == 2

    def test_a_bitmap_that_cannot_be_read_fails_the_request_whole(self) -> None:
        class Broken(Stripes):
            def runs(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
                raise OSError(5, "broken")

        pump = Pump(export_of(Broken()))
        pump.feed(request(Command.BLOCK_STATUS, 0, MIB))
        [reply] = parse_structured(bytes(pump.sent))
        assert reply.error == 5
        assert len(reply.chunks) == 1


class TestTls:
    @pytest.mark.parametrize("number", [o for o in Option if o not in (1, 2, 5)])
    def test_nothing_is_told_before_it(self, number: int) -> None:
        handshake = begun(tls=True)
        [(kind, _)] = ask(handshake, number, GO)
        assert kind == OptionReply.ERR_TLS_REQD
        assert handshake.state is HandshakeState.HEADER

    def test_an_old_client_is_hung_up_on(self) -> None:
        with pytest.raises(NbdProtocolError, match="without TLS"):
            ask(begun(tls=True), Option.EXPORT_NAME, b"disk")

    def test_one_may_leave_before_it(self) -> None:
        handshake = begun(tls=True)
        assert ask(handshake, Option.ABORT) == [(OptionReply.ACK, b"")]
        assert handshake.state is HandshakeState.CLOSED

    def test_it_begins_once_and_forgets_what_was_agreed(self) -> None:
        handshake = Handshake([export_of(Stripes())], offers_tls=True)
        handshake.receive(CLIENT_FLAGS)
        ask(handshake, Option.STRUCTURED_REPLY)
        ask(handshake, Option.SET_META_CONTEXT, contexts(b"base:allocation"))
        assert ask(handshake, Option.STARTTLS) == [(OptionReply.ACK, b"")]
        assert (handshake.state, handshake.wanted) == (HandshakeState.TLS, 0)
        handshake.tls_started()
        assert [kind for kind, _ in ask(handshake, Option.STARTTLS)] == [OptionReply.ERR_INVALID]
        assert not handshake.is_structured
        assert ask(handshake, Option.GO, GO)[-1] == (OptionReply.ACK, b"")
        assert handshake.contexts == ()

    def test_it_takes_no_data(self) -> None:
        handshake = begun(tls=True)
        assert [kind for kind, _ in ask(handshake, Option.STARTTLS, b"x")] == [OptionReply.ERR_INVALID]
        assert handshake.state is HandshakeState.HEADER
