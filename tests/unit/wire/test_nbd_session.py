"""The negotiation, against the bytes of the specification."""

from __future__ import annotations

import struct

import pytest
from tests.framework.devices import MemoryDevice
from tests.framework.nbd_peer import CLIENT_FLAGS, meta_context, named, option

from mullion.wire.nbd import Export, Handshake, NbdProtocolError
from mullion.wire.nbd.messages import Info, Option, OptionReply, TransmissionFlag
from mullion.wire.nbd.session import HandshakeState

pytestmark = pytest.mark.unit

SIZE_BYTES = 1 << 20


@pytest.fixture
def exports() -> list[Export]:
    return [Export("system", MemoryDevice(SIZE_BYTES)), Export("ünicode", MemoryDevice(4096), read_only=True)]


@pytest.fixture
def handshake(exports: list[Export]) -> Handshake:
    started = Handshake(exports)
    assert talk(started, CLIENT_FLAGS) == b""
    return started


def talk(handshake: Handshake, data: bytes) -> bytes:
    """Give it the data as its wishes go; all of it must be wanted."""
    replies = b""
    while data:
        assert handshake.wanted
        assert len(data) >= handshake.wanted, f"{handshake.wanted} bytes wanted, {len(data)} left"
        piece, data = data[: handshake.wanted], data[handshake.wanted :]
        replies += handshake.receive(piece)
    return replies


def replies_of(stream: bytes, number: int) -> list[tuple[int, bytes]]:
    """Kind and data of each option reply."""
    found = []
    while stream:
        magic, answered, kind, length = struct.unpack_from(">QIII", stream)
        assert (magic, answered) == (0x0003E889045565A9, number)
        found.append((kind, stream[20 : 20 + length]))
        stream = stream[20 + length :]
    return found


def ask(handshake: Handshake, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
    return replies_of(talk(handshake, option(number, data)), number)


def test_the_greeting_is_fixed_newstyle_without_zeroes(exports: list[Export]) -> None:
    assert Handshake(exports).greeting == b"NBDMAGICIHAVEOPT\x00\x03"


def test_go_opens_the_export_and_says_its_size_and_flags(handshake: Handshake, exports: list[Export]) -> None:
    replies = ask(handshake, Option.GO, named(b"system", b"\0\0"))
    flags = exports[0].flags
    assert replies == [
        (OptionReply.INFO, struct.pack(">HQH", Info.EXPORT, SIZE_BYTES, flags)),
        (OptionReply.ACK, b""),
    ]
    assert handshake.state is HandshakeState.READY
    assert handshake.export is exports[0]
    assert not handshake.is_structured
    assert not handshake.contexts
    assert TransmissionFlag.READ_ONLY not in flags
    assert TransmissionFlag.CAN_MULTI_CONN | TransmissionFlag.SEND_FUA | TransmissionFlag.SEND_TRIM in flags


def test_info_answers_like_go_and_stays(handshake: Handshake) -> None:
    wishes = struct.pack(">HHHH", 3, Info.NAME, Info.BLOCK_SIZE, 77)
    replies = ask(handshake, Option.INFO, named(b"", wishes))
    assert replies[1:] == [
        (OptionReply.INFO, b"\0\1system"),
        (OptionReply.INFO, struct.pack(">HIII", Info.BLOCK_SIZE, 1, 4096, 32 << 20)),
        (OptionReply.ACK, b""),
    ]
    assert handshake.state is HandshakeState.HEADER
    assert ask(handshake, Option.GO, named("ünicode".encode(), b"\0\0"))[-1] == (OptionReply.ACK, b"")
    assert handshake.export is not None
    assert handshake.export.name == "ünicode"


def test_a_read_only_export_says_so() -> None:
    for export in (Export("a", MemoryDevice(512), read_only=True), Export("a", MemoryDevice(512, read_only=True))):
        assert TransmissionFlag.READ_ONLY in export.flags
        assert TransmissionFlag.SEND_TRIM not in export.flags


@pytest.mark.parametrize(("flags", "padding"), [(1, 124), (3, 0)])
def test_export_name_is_answered_with_zeroes_unless_the_client_declined(
    exports: list[Export], flags: int, padding: int
) -> None:
    handshake = Handshake(exports)
    talk(handshake, struct.pack(">I", flags))
    reply = talk(handshake, option(Option.EXPORT_NAME, b"system"))
    assert reply == struct.pack(">QH", SIZE_BYTES, exports[0].flags) + bytes(padding)
    assert handshake.state is HandshakeState.READY


def test_export_name_of_an_unknown_export_hangs_up(handshake: Handshake) -> None:
    with pytest.raises(NbdProtocolError, match="not here"):
        talk(handshake, option(Option.EXPORT_NAME, b"other"))


def test_list_names_every_export(handshake: Handshake) -> None:
    assert ask(handshake, Option.LIST) == [
        (OptionReply.SERVER, named(b"system")),
        (OptionReply.SERVER, named("ünicode".encode())),
        (OptionReply.ACK, b""),
    ]


def test_abort_is_acknowledged_and_closes(handshake: Handshake) -> None:
    assert ask(handshake, Option.ABORT) == [(OptionReply.ACK, b"")]
    assert handshake.state is HandshakeState.CLOSED


def test_the_allocation_context_is_listed_and_set(handshake: Handshake) -> None:
    assert ask(handshake, Option.STRUCTURED_REPLY) == [(OptionReply.ACK, b"")]
    ack = (OptionReply.ACK, b"")
    for queries in ((), (b"base:",), (b"qemu:dirty", b"base:allocation")):
        listed = ask(handshake, Option.LIST_META_CONTEXT, meta_context(b"system", *queries))
        assert listed == [(OptionReply.META_CONTEXT, b"\0\0\0\0base:allocation"), ack]
    assert ask(handshake, Option.LIST_META_CONTEXT, meta_context(b"system", b"qemu:")) == [ack]
    assert ask(handshake, Option.SET_META_CONTEXT, meta_context(b"system", b"base:")) == [ack]
    chosen = ask(handshake, Option.SET_META_CONTEXT, meta_context(b"system", b"base:allocation"))
    assert chosen == [(OptionReply.META_CONTEXT, b"\0\0\0\1base:allocation"), ack]
    ask(handshake, Option.GO, named(b"", b"\0\0"))  # the same export under the default name
    assert handshake.is_structured
    assert [(number, context.name) for number, context in handshake.contexts] == [(1, "base:allocation")]


@pytest.mark.parametrize("undo", [meta_context(b"system"), meta_context(b"other", b"base:allocation"), b"\xff"])
def test_a_second_choice_of_contexts_replaces_the_first_even_when_it_is_refused(
    handshake: Handshake, undo: bytes
) -> None:
    ask(handshake, Option.STRUCTURED_REPLY)
    ask(handshake, Option.SET_META_CONTEXT, meta_context(b"system", b"base:allocation"))
    ask(handshake, Option.SET_META_CONTEXT, undo)
    ask(handshake, Option.GO, named(b"system", b"\0\0"))
    assert not handshake.contexts


def test_contexts_of_one_export_are_not_those_of_another(handshake: Handshake) -> None:
    ask(handshake, Option.STRUCTURED_REPLY)
    ask(handshake, Option.SET_META_CONTEXT, meta_context(b"system", b"base:allocation"))
    ask(handshake, Option.GO, named("ünicode".encode(), b"\0\0"))
    assert not handshake.contexts


@pytest.mark.parametrize(
    ("number", "data", "reply"),
    [
        (Option.STARTTLS, b"", OptionReply.ERR_UNSUP),
        (11, b"", OptionReply.ERR_UNSUP),  # extended headers
        (0xFFFFFFFF, b"x" * 65536, OptionReply.ERR_UNSUP),
        (Option.LIST, b"x", OptionReply.ERR_INVALID),
        (Option.STRUCTURED_REPLY, b"x", OptionReply.ERR_INVALID),
        (Option.SET_META_CONTEXT, meta_context(b"system", b"base:allocation"), OptionReply.ERR_INVALID),
        (Option.GO, b"", OptionReply.ERR_INVALID),
        (Option.GO, named(b"system"), OptionReply.ERR_INVALID),
        (Option.GO, named(b"system", b"\0\1"), OptionReply.ERR_INVALID),
        (Option.GO, named(b"system", b"\0\0x"), OptionReply.ERR_INVALID),
        (Option.GO, b"\xff\xff\xff\xff", OptionReply.ERR_INVALID),
        (Option.GO, named(b"x" * 4097, b"\0\0"), OptionReply.ERR_INVALID),
        (Option.GO, named(b"other", b"\0\0"), OptionReply.ERR_UNKNOWN),
        (Option.GO, named(b"\xff\xfe", b"\0\0"), OptionReply.ERR_UNKNOWN),
        (Option.INFO, named(b"other", b"\0\0"), OptionReply.ERR_UNKNOWN),
    ],
)
def test_a_mistake_is_answered_and_the_negotiation_goes_on(
    handshake: Handshake, number: int, data: bytes, reply: OptionReply
) -> None:
    answers = ask(handshake, number, data)
    assert [kind for kind, _ in answers] == [reply]
    assert answers[0][1].decode()  # the reason in words
    assert ask(handshake, Option.GO, named(b"system", b"\0\0"))[-1] == (OptionReply.ACK, b"")


@pytest.mark.parametrize(
    "queries",
    [struct.pack(">I", 0xFFFFFFFF), struct.pack(">II", 1, 0xFFFFFFFF), struct.pack(">I", 0) + b"x", b"", b"\0\0"],
)
def test_hostile_queries_are_refused(handshake: Handshake, queries: bytes) -> None:
    ask(handshake, Option.STRUCTURED_REPLY)
    answers = ask(handshake, Option.LIST_META_CONTEXT, named(b"system", queries))
    assert [kind for kind, _ in answers] == [OptionReply.ERR_INVALID]


def test_wrong_magic_flags_and_lengths_close_the_connection(exports: list[Export]) -> None:
    with pytest.raises(NbdProtocolError, match="unknown flags 0x4"):
        talk(Handshake(exports), struct.pack(">I", 4))
    for hostile in (b"IHAVEOPX" + bytes(8), b"IHAVEOPT" + struct.pack(">II", 7, 65537)):
        handshake = Handshake(exports)
        talk(handshake, CLIENT_FLAGS)
        with pytest.raises(NbdProtocolError):
            talk(handshake, hostile)
    old = Handshake(exports)
    talk(old, bytes(4))
    with pytest.raises(NbdProtocolError, match="fixed newstyle"):
        talk(old, option(Option.LIST))
