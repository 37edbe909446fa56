"""The back-end's session: when rings start and stop, what is refused, where descriptors go. No sockets."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mullion.wire.vhost_user import Inflight, Log, MemoryRegion, ProtocolError, Reply, Session, Vring
from mullion.wire.vhost_user.messages import (
    U64,
    Config,
    DeviceFeature,
    Flag,
    Header,
    MemoryTable,
    ProtocolFeature,
    Request,
    VringAddress,
    VringState,
)

pytestmark = pytest.mark.unit

FEATURES = int(DeviceFeature.VERSION_1 | DeviceFeature.RING_EVENT_IDX)
REGION = MemoryRegion(0, 4096, 0x1000, 0)


class RecordingBackend:
    """Keeps what it is told, and every descriptor that it owns."""

    device_features = FEATURES
    queue_count = 2

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.owned: list[int] = []
        self.failure: Exception | None = None

    def config_space(self) -> bytes:
        return b"config"

    def map_memory(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> None:
        self.owned += fds
        self._fail()
        self.calls.append(("map", len(regions)))

    def start_vring(self, vring: Vring, features: int) -> None:
        self._fail()
        self.calls.append(("start", vring.index, vring.size, vring.base, features))

    def stop_vring(self, index: int) -> int:
        self.calls.append(("stop", index))
        return 7

    def set_call_fd(self, index: int, fd: int | None) -> None:
        self._own("call", index, fd)

    def set_error_fd(self, index: int, fd: int | None) -> None:
        self._own("error", index, fd)

    def create_inflight(self, queues: int, queue_size: int) -> tuple[Inflight, int]:
        return Inflight(1024, 0, queues, queue_size), 99

    def use_inflight(self, inflight: Inflight, fd: int) -> None:
        self.owned.append(fd)
        self.calls.append(("inflight", inflight.queues))

    def use_log(self, log: Log, fd: int) -> None:
        self.owned.append(fd)
        self._fail()
        self.calls.append(("log", log.mmap_size, log.mmap_offset))

    def set_backend_fd(self, fd: int | None) -> None:
        self._own("backend", 0, fd)

    def close_fd(self, fd: int) -> None:
        self.owned.append(fd)
        self.calls.append(("close", fd))

    def _own(self, name: str, index: int, fd: int | None) -> None:
        if fd is not None:
            self.owned.append(fd)
            self.calls.append((name, index, fd))

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


class Peer:
    """Feeds messages whole."""

    def __init__(self) -> None:
        self.backend = RecordingBackend()
        self.session = Session(self.backend)

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> list[Reply]:
        replies = self.session.receive(Header(request, 1 | flags, len(payload)).pack(), fds)
        return replies + (self.session.receive(payload, ()) if payload else [])

    def negotiate(self) -> None:
        offered = U64.unpack(self.send(Request.GET_PROTOCOL_FEATURES)[0].data[12:]).value
        self.send(Request.SET_PROTOCOL_FEATURES, U64(offered).pack())
        self.send(Request.SET_FEATURES, U64(FEATURES | DeviceFeature.PROTOCOL_FEATURES).pack())

    def acknowledged(self, request: int, payload: bytes, fds: Sequence[int] = ()) -> bool:
        (reply,) = self.send(request, payload, fds, Flag.NEED_REPLY)
        return U64.unpack(reply.data[12:]).value == 0

    def start(self, index: int = 0, *, enable: bool = True) -> None:
        self.send(Request.SET_MEM_TABLE, MemoryTable((REGION,)).pack(), [50])
        self.send(Request.SET_VRING_NUM, VringState(index, 128).pack())
        self.send(Request.SET_VRING_BASE, VringState(index, 3).pack())
        self.send(Request.SET_VRING_ADDR, VringAddress(index, 0, 1, 2, 3, 0).pack())
        self.send(Request.SET_VRING_KICK, U64(index).pack(), [60])
        if enable:
            self.send(Request.SET_VRING_ENABLE, VringState(index, 1).pack())


@pytest.fixture
def peer() -> Peer:
    peer = Peer()
    peer.negotiate()
    return peer


def calls(peer: Peer, *names: str) -> list[tuple[object, ...]]:
    return [call for call in peer.backend.calls if call[0] in names]


def test_offer(peer: Peer) -> None:
    (reply,) = peer.send(Request.GET_FEATURES)
    header, value = Header.unpack(reply.data[:12]), U64.unpack(reply.data[12:]).value
    assert (header.request, header.flags) == (Request.GET_FEATURES, 1 | Flag.REPLY)
    assert value == FEATURES | DeviceFeature.PROTOCOL_FEATURES
    (reply,) = peer.send(Request.GET_PROTOCOL_FEATURES)
    assert ProtocolFeature(U64.unpack(reply.data[12:]).value) == (
        ProtocolFeature.MQ
        | ProtocolFeature.LOG_SHMFD
        | ProtocolFeature.REPLY_ACK
        | ProtocolFeature.BACKEND_REQ
        | ProtocolFeature.CONFIG
        | ProtocolFeature.INFLIGHT_SHMFD
    )


def test_ring_starts_when_it_is_enabled_and_stops_with_get_base(peer: Peer) -> None:
    peer.start(enable=False)
    assert calls(peer, "start") == []
    peer.send(Request.SET_VRING_ENABLE, VringState(0, 1).pack())
    assert calls(peer, "start") == [("start", 0, 128, 3, FEATURES | DeviceFeature.PROTOCOL_FEATURES)]
    (reply,) = peer.send(Request.GET_VRING_BASE, VringState(0, 0).pack())
    assert VringState.unpack(reply.data[12:]) == VringState(0, 7)
    assert calls(peer, "stop", "close") == [("stop", 0), ("close", 60)]
    peer.send(Request.SET_VRING_ENABLE, VringState(0, 1).pack())
    assert len(calls(peer, "start")) == 1, "it has no kick any more"


def test_ring_is_enabled_at_once_without_protocol_features() -> None:
    peer = Peer()
    peer.send(Request.SET_FEATURES, U64(FEATURES).pack())
    peer.start(enable=False)
    assert len(calls(peer, "start")) == 1


def test_disable_and_enable(peer: Peer) -> None:
    peer.start()
    peer.send(Request.SET_VRING_ENABLE, VringState(0, 0).pack())
    peer.send(Request.SET_VRING_ENABLE, VringState(0, 1).pack())
    assert [call[0] for call in calls(peer, "start", "stop")] == ["start", "stop", "start"]


def test_new_memory_stops_and_starts_all_rings(peer: Peer) -> None:
    peer.start(0)
    peer.start(1)
    peer.backend.calls.clear()
    peer.send(Request.SET_MEM_TABLE, MemoryTable((REGION,)).pack(), [51])
    assert [call[:2] for call in peer.backend.calls] == [
        ("stop", 0),
        ("stop", 1),
        ("map", 1),
        ("start", 0),
        ("start", 1),
    ]


def test_inflight_region(peer: Peer) -> None:
    (reply,) = peer.send(Request.GET_INFLIGHT_FD, Inflight(0, 0, 2, 128).pack())
    assert reply.fds == (99,)
    assert len(reply.data) == 12 + 24
    assert Inflight.unpack(reply.data[12:]) == Inflight(1024, 0, 2, 128)
    peer.send(Request.SET_INFLIGHT_FD, Inflight(1024, 0, 2, 128).pack(), [70])
    assert calls(peer, "inflight") == [("inflight", 2)]


def test_dirty_log_starts_rings_anew_and_is_answered_unasked(peer: Peer) -> None:
    peer.start(0)
    peer.backend.calls.clear()
    (reply,) = peer.send(Request.SET_LOG_BASE, Log(4096, 512).pack(), [72])
    assert U64.unpack(reply.data[12:]).value == 0
    assert [call[:3] for call in peer.backend.calls] == [("stop", 0), ("log", 4096, 512), ("start", 0, 128)]
    assert peer.acknowledged(Request.SET_LOG_FD, b"", [73])
    assert peer.backend.owned == [50, 72, 73]


def test_socket_for_messages_of_the_back_end(peer: Peer) -> None:
    assert peer.acknowledged(Request.SET_BACKEND_REQ_FD, b"", [74])
    assert calls(peer, "backend") == [("backend", 0, 74)]
    assert not peer.acknowledged(Request.SET_BACKEND_REQ_FD, b"", [])


def test_an_inflight_region_that_cannot_be_sent_is_closed(peer: Peer) -> None:
    with pytest.raises(ProtocolError, match="do not belong"):
        peer.send(Request.GET_INFLIGHT_FD, Inflight(0, 0, 2, 128).pack(), [71])
    assert ("close", 99) in peer.backend.calls


def test_config_space_is_padded(peer: Peer) -> None:
    (reply,) = peer.send(Request.GET_CONFIG, Config(2, 10, 0, bytes(10)).pack())
    assert Config.unpack(reply.data[12:]).content == b"nfig" + bytes(6)


def test_bytes_may_come_one_by_one(peer: Peer) -> None:
    message = Header(Request.GET_VRING_BASE, 1, 8).pack() + VringState(1, 0).pack()
    replies: list[Reply] = []
    for number in range(len(message)):
        replies += peer.session.receive(message[number : number + 1], ())
    assert len(replies) == 1


def test_refusals_are_acknowledged_as_such(peer: Peer) -> None:
    refused: list[tuple[int, bytes, list[int]]] = [
        (Request.SET_FEATURES, U64(1 << 60).pack(), []),
        (Request.SET_PROTOCOL_FEATURES, U64(1 << 60).pack(), []),
        (Request.SET_VRING_NUM, VringState(0, 100).pack(), []),
        (Request.SET_VRING_NUM, VringState(0, 2048).pack(), []),
        (Request.SET_VRING_NUM, VringState(0, 0).pack(), []),
        (Request.SET_VRING_NUM, VringState(2, 128).pack(), []),
        (Request.SET_VRING_BASE, VringState(0, 65536).pack(), []),
        (Request.SET_VRING_ENABLE, VringState(0, 2).pack(), []),
        (Request.SET_VRING_KICK, U64(0).pack(), []),
        (Request.SET_VRING_KICK, U64(0x100).pack(), []),
        (Request.SET_VRING_CALL, U64(0x1000).pack(), []),
        (Request.SET_MEM_TABLE, MemoryTable((REGION,)).pack(), []),
        (Request.SET_CONFIG, Config(0, 1, 0, b"x").pack(), []),
        (Request.SET_LOG_BASE, U64(0).pack(), []),
        (Request.SET_LOG_BASE, Log(4096, 0).pack(), []),
        (Request.SET_INFLIGHT_FD, Inflight(1, 0, 1, 1).pack(), []),
        (Request.SET_VRING_KICK, U64(5).pack(), [80]),
        (4711, b"", []),
    ]
    for request, payload, fds in refused:
        assert not peer.acknowledged(request, payload, fds), (request, payload)
    assert peer.backend.owned == [80], "a descriptor of a refused message is closed"
    assert peer.acknowledged(Request.SET_VRING_NUM, VringState(0, 256).pack()), "and the session goes on"


def test_failure_of_the_back_end_is_refused(peer: Peer) -> None:
    peer.backend.failure = OSError(12, "Cannot allocate memory")
    assert not peer.acknowledged(Request.SET_MEM_TABLE, MemoryTable((REGION,)).pack(), [50])
    with pytest.raises(ProtocolError, match="Cannot allocate"):
        peer.send(Request.SET_MEM_TABLE, MemoryTable((REGION,)).pack(), [51])
    assert peer.backend.owned == [50, 51]


@pytest.mark.parametrize(
    ("message", "fds"),
    [
        (Header(Request.SET_FEATURES, 2, 8).pack(), []),
        (Header(Request.SET_FEATURES, 1, 1 << 30).pack(), []),
        (Header(4711, 1, 0).pack(), []),
        (Header(Request.GET_QUEUE_NUM, 1, 0).pack(), [80]),
        (Header(Request.GET_QUEUE_NUM, 1, 0).pack(), list(range(80, 89))),
    ],
)
def test_what_ends_the_connection(peer: Peer, message: bytes, fds: list[int]) -> None:
    with pytest.raises(ProtocolError):
        peer.session.receive(message, fds)
    peer.session.close()
    assert peer.backend.owned[-len(fds) :] == list(reversed(fds)) or not fds


def test_close_stops_rings_and_gives_descriptors_back(peer: Peer) -> None:
    peer.start()
    peer.session.close()
    assert calls(peer, "stop", "close") == [("stop", 0), ("close", 60)]
    assert sorted(peer.backend.owned) == [50, 60]


requests = st.sampled_from([*Request, 0, 23, 99])
payloads = st.one_of(
    st.binary(max_size=64),
    st.builds(VringState, st.integers(0, 3), st.sampled_from([0, 1, 2, 128, 65535])).map(VringState.pack),
    st.builds(U64, st.sampled_from([0, 1, 2, 256, FEATURES, 1 << 30])).map(U64.pack),
    st.builds(VringAddress, st.integers(0, 2), *[st.integers(0, 9)] * 5).map(VringAddress.pack),
    st.just(MemoryTable((REGION,)).pack()),
    st.builds(Inflight, *[st.integers(0, 200)] * 4).map(Inflight.pack),
)


@settings(max_examples=200)
@given(st.lists(st.tuples(requests, payloads, st.integers(0, 2), st.sampled_from([0, 8])), max_size=30))
def test_any_messages_leave_every_descriptor_with_the_back_end(
    messages: list[tuple[int, bytes, int, int]],
) -> None:
    peer = Peer()
    peer.negotiate()
    given_fds: list[int] = []
    try:
        for request, payload, count, flags in messages:
            fds = list(range(1000 + len(given_fds), 1000 + len(given_fds) + count))
            given_fds += fds
            peer.send(request, payload, fds, flags)
    except ProtocolError:
        pass
    peer.session.close()
    assert sorted(peer.backend.owned) == given_fds
    running = 0
    for call in calls(peer, "start", "stop"):
        running += 1 if call[0] == "start" else -1
        assert 0 <= running <= 2
    assert running == 0
