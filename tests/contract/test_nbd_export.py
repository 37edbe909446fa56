"""The NBD export on its socket: many clients, bad ones, slow ones, its start and its end."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.framework.devices import MemoryDevice
from tests.framework.nbd_peer import CLIENT_FLAGS, RawClient, Reply, parse_structured, request, write

from mullion.base.block import Buffer
from mullion.base.errors import AlreadyExistsError, DeadlineError, InvalidError, NotFoundError, UnavailableError
from mullion.base.units import KIB, MIB
from mullion.wire.nbd import Export, NbdClient, NbdServer
from mullion.wire.nbd.export import NbdExport
from mullion.wire.nbd.messages import Chunk, Command, CommandFlag, NbdError
from mullion.wire.nbd.transmission import FLUSH_LIMIT

pytestmark = pytest.mark.contract


@pytest.fixture
def folder(short_tmp: Path) -> Path:
    return short_tmp


@pytest.fixture
def device() -> MemoryDevice:
    return MemoryDevice(8 * MIB)


@pytest.fixture
def export(folder: Path, device: MemoryDevice) -> Iterator[NbdExport]:
    with serving(NbdExport(str(folder / "d.nbd"), device, name="system", read_only=False)) as started:
        yield started


@contextmanager
def serving(export: NbdExport) -> Iterator[NbdExport]:
    export.start()
    try:
        yield export
    finally:
        export.stop()
        for thread in server_threads():
            thread.join(60)  # one that ended by itself just before may be at its last instructions
        assert server_threads() == []


def server_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("nbd-")]


def test_the_socket_is_for_our_user_only_and_gone_in_the_end(folder: Path, device: MemoryDevice) -> None:
    export = NbdExport(str(folder / "d.nbd"), device, name="system", read_only=False)
    with serving(export):
        mode = os.stat(export.path).st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
    assert list(folder.iterdir()) == []
    export.stop()  # again


def test_counters_count_and_survive_the_end(export: NbdExport) -> None:
    with NbdClient(export.path) as client:
        client.pwrite(0, bytes(4096))
        client.pread(0, bytearray(512))
        assert export.counters.connections == 1
        assert export.counters[1:4] == (2, 512, 4096)
    with NbdClient(export.path, "system", read_only=True) as client:
        client.pread(0, bytearray(8))
    export.stop()
    assert export.counters == (0, 6, 520, 4096, 0, 0)  # with a flush and two goodbyes


def test_a_stale_socket_is_replaced_and_a_living_one_is_not(folder: Path, device: MemoryDevice) -> None:
    path = str(folder / "d.nbd")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    first = NbdExport(path, device, name="system", read_only=False)
    with serving(first):
        with pytest.raises(AlreadyExistsError, match="another process"):
            NbdExport(path, device, name="system", read_only=False).start()
        with NbdClient(path) as client:
            assert client.size_bytes == device.size_bytes


def test_a_file_in_the_way_is_not_removed(folder: Path, device: MemoryDevice) -> None:
    (folder / "d.nbd").write_text("precious")
    with pytest.raises(AlreadyExistsError, match="not a socket"):
        NbdExport(str(folder / "d.nbd"), device, name="system", read_only=False).start()
    assert (folder / "d.nbd").read_text() == "precious"


def test_a_path_too_long_for_a_socket_is_refused_with_the_limit(device: MemoryDevice) -> None:
    with pytest.raises(InvalidError, match="107"):
        NbdExport("/tmp/" + "x" * 110, device, name="system", read_only=False).start()


def test_the_end_leaves_a_socket_that_another_server_has_put_there(folder: Path, device: MemoryDevice) -> None:
    path = str(folder / "d.nbd")
    old = NbdExport(path, device, name="system", read_only=False)
    with serving(old):
        os.unlink(path)
        new = NbdExport(path, device, name="system", read_only=False)
        new.start()
        old.stop()
        with NbdClient(path) as client:
            assert client.size_bytes == device.size_bytes
        new.stop()


def test_a_listener_that_was_handed_over_serves_those_who_connected_before(folder: Path, device: MemoryDevice) -> None:
    path = str(folder / "d.nbd")
    with socket.socket(socket.AF_UNIX) as kept_by_the_parent:
        kept_by_the_parent.bind(path)
        kept_by_the_parent.listen(4)
        for _ in range(2):
            early = socket.socket(socket.AF_UNIX)
            early.settimeout(60)
            early.connect(path)
            export = NbdExport(path, device, name="s", read_only=False, listener=kept_by_the_parent.dup())
            with serving(export):
                assert early.recv(8) == b"NBDMAGIC"
            early.close()
            assert os.path.exists(path)


def test_an_unknown_export_is_not_found(export: NbdExport) -> None:
    with pytest.raises(NotFoundError, match="'other'"):
        NbdClient(export.path, "other")


def test_sixteen_clients_and_no_more(export: NbdExport) -> None:
    clients = [NbdClient(export.path) for _ in range(16)]
    with RawClient(export.path) as excess:
        assert excess.is_hung_up()
    with pytest.raises(UnavailableError):
        NbdClient(export.path)
    for index, client in enumerate(clients):
        client.pwrite(index * 512, bytes([index]) * 512)
    first, *others = clients
    for client in others:
        client.close()
    content = bytearray(16 * 512)
    first.pread(0, content)
    assert content == b"".join(bytes([index]) * 512 for index in range(16))
    first.close()


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n" * 8, id="another protocol"),
        pytest.param(CLIENT_FLAGS + b"IHAVEOPT" + struct.pack(">II", 7, 0xFFFFFFFF), id="an endless option"),
        pytest.param(CLIENT_FLAGS + b"IHAVEOPT" + struct.pack(">II", 1, 4) + b"none", id="an unknown export"),
    ],
)
def test_a_bad_negotiation_ends_that_connection_only(export: NbdExport, hostile: bytes) -> None:
    with NbdClient(export.path) as bystander:
        with RawClient(export.path) as client:
            client.send(hostile)
            client.receive(18)
            assert client.is_hung_up()
        bystander.pread(0, bytearray(512))
    assert export.counters.protocol_errors == 1


@pytest.mark.parametrize(
    "hostile", [bytes(28), request(Command.WRITE, 0, 0xFFFFFFFF), request(Command.WRITE, 0, 4096) + b"then nothing"]
)
def test_a_bad_request_ends_that_connection_only(export: NbdExport, device: MemoryDevice, hostile: bytes) -> None:
    with NbdClient(export.path) as bystander, RawClient(export.path) as client:
        assert client.negotiate(b"system") == device.size_bytes
        client.send(hostile)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.is_hung_up()
        bystander.pread(0, bytearray(512))
    assert device.calls[:-1] == []  # nothing but the bystander's flush
    assert device.calls[-1][0] == "flush"


class SlowFlushes(MemoryDevice):
    """Its flushes wait until they may end."""

    def __init__(self) -> None:
        super().__init__(MIB)
        self.began = threading.Semaphore(0)
        self.may_end = threading.Event()

    def flush(self) -> None:
        self.began.release()
        assert self.may_end.wait(60)
        super().flush()


@pytest.fixture
def slow(short_tmp: Path) -> Iterator[tuple[SlowFlushes, NbdExport]]:
    device = SlowFlushes()
    export = NbdExport(str(short_tmp / "slow"), device, name="system", read_only=False)
    with serving(export):
        yield device, export
        device.may_end.set()


FLUSH = request(Command.FLUSH, 0, 0, cookie=1)


@pytest.mark.parametrize("first", [FLUSH, write(0, bytes(512), flags=CommandFlag.FUA, cookie=1)], ids=["FLUSH", "FUA"])
def test_a_flush_holds_up_no_other_request(slow: tuple[SlowFlushes, NbdExport], first: bytes) -> None:
    device, export = slow
    with RawClient(export.path) as client, NbdClient(export.path) as other:
        client.negotiate(b"system")
        client.send(first)
        assert device.began.acquire(timeout=60)
        client.send(write(4096, b"x" * 512, cookie=2))
        assert parse_structured(client.receive(20)) == [Reply(2, 0, b"", (Chunk.NONE,))]
        content = bytearray(512)
        other.pread(4096, content)
        assert content == b"x" * 512
        device.may_end.set()
        assert parse_structured(client.receive(20)) == [Reply(1, 0, b"", (Chunk.NONE,))]
        assert export.counters.errors == 0


def test_flushes_that_wait_are_few_and_become_one(slow: tuple[SlowFlushes, NbdExport]) -> None:
    device, export = slow
    with RawClient(export.path) as client:
        client.negotiate(b"system")
        client.send(FLUSH)
        assert device.began.acquire(timeout=60)
        client.send(b"".join(request(Command.FLUSH, 0, 0, cookie=2 + n) for n in range(FLUSH_LIMIT + 9)))
        assert device.began.acquire(timeout=60)  # one more than may wait is carried out by the connection's own thread
        device.may_end.set()
        replies = parse_structured(client.receive(20 * (FLUSH_LIMIT + 10)))
    assert {reply.cookie for reply in replies} == set(range(1, FLUSH_LIMIT + 11))
    assert device.flushes < FLUSH_LIMIT


def test_an_end_waits_for_flushes_and_answers_them(slow: tuple[SlowFlushes, NbdExport]) -> None:
    device, export = slow
    with RawClient(export.path) as client:
        client.negotiate(b"system")
        client.send(FLUSH)
        assert device.began.acquire(timeout=60)
        ending = threading.Thread(target=export.stop)
        ending.start()
        device.may_end.set()
        assert parse_structured(client.receive(20)) == [Reply(1, 0, b"", (Chunk.NONE,))]
        assert client.is_hung_up()
        ending.join(60)
        assert not ending.is_alive()


def test_a_client_that_does_not_read_its_replies_blocks_nobody_and_no_end(export: NbdExport) -> None:
    with RawClient(export.path) as lazy, NbdClient(export.path, read_only=True) as busy:
        lazy.negotiate()
        lazy.socket.setblocking(False)
        flood = itertools.repeat(request(Command.READ, 0, MIB) * 256)
        with pytest.raises(BlockingIOError):  # when the server is stuck in sending and takes no more
            list(map(lazy.socket.send, flood))
        for _ in range(50):
            busy.pread(0, bytearray(64 * KIB))
        server = export._server
        assert server is not None
        server.stop(grace_s=0.05)


def test_a_negotiation_has_a_deadline_as_a_whole(folder: Path, device: MemoryDevice) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "d.nbd"))
        listener.listen(4)
        server = NbdServer(listener.dup(), [Export("system", device)], handshake_timeout_s=0.5)
        server.start()
        with RawClient(str(folder / "d.nbd")) as slow:
            slow.receive(18)
            assert slow.is_hung_up()
        server.stop()
        assert server.counters.protocol_errors == 1


def test_simple_replies_for_a_client_that_asks_for_no_others(export: NbdExport, device: MemoryDevice) -> None:
    with RawClient(export.path) as client:
        client.negotiate(structured=False)
        payload = os.urandom(100_000)
        client.send(write(1000, payload, cookie=1) + request(Command.READ, 1000, len(payload), cookie=2))
        assert client.simple_reply() == (0, 1)
        assert client.simple_reply() == (0, 2)
        assert client.receive(len(payload)) == payload
        client.send(request(Command.READ, device.size_bytes, 1, cookie=3))
        assert client.simple_reply() == (NbdError.EINVAL, 3)


class SlowDevice(MemoryDevice):
    """A disk whose writes wait until the test lets them go."""

    def __init__(self) -> None:
        super().__init__(MIB)
        self.entered = threading.Event()
        self.may_go_on = threading.Event()

    def pwrite(self, offset: int, buffer: Buffer) -> None:
        self.entered.set()
        assert self.may_go_on.wait(60)
        super().pwrite(offset, buffer)


def test_the_end_finishes_what_was_asked_for(folder: Path) -> None:
    device = SlowDevice()
    export = NbdExport(str(folder / "d.nbd"), device, name="system", read_only=False)
    export.start()
    with RawClient(export.path) as client:
        client.negotiate()
        client.send(write(0, b"a" * 512, cookie=1) + write(512, b"b" * 512, cookie=2))
        assert device.entered.wait(60)
        ending = threading.Thread(target=export.stop)
        ending.start()
        device.may_go_on.set()
        assert [client.structured_reply()[:2] for _ in range(2)] == [(1, 0), (2, 0)]
        assert client.is_hung_up()
        ending.join()
    assert device.content[:1024] == b"a" * 512 + b"b" * 512


def test_a_device_that_hangs_is_reported_by_the_end(folder: Path) -> None:
    device = SlowDevice()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "d.nbd"))
        listener.listen(4)
        server = NbdServer(listener.dup(), [Export("system", device)])
        server.start()
        with RawClient(str(folder / "d.nbd")) as client:
            client.negotiate()
            client.send(write(0, b"a" * 512))
            assert device.entered.wait(60)
            with pytest.raises(DeadlineError, match="1 requests to system"):
                server.stop(grace_s=0.05)
            device.may_go_on.set()
            assert client.is_hung_up()
    for thread in server_threads():
        thread.join()


class FullDevice(MemoryDevice):
    def pwrite(self, offset: int, buffer: Buffer) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_client_hears_of_a_full_storage(folder: Path) -> None:
    export = NbdExport(str(folder / "d.nbd"), FullDevice(MIB), name="system", read_only=False)
    with serving(export), NbdClient(export.path) as client:
        with pytest.raises(OSError, match="No space left") as raised:
            client.pwrite(0, b"x")
        assert raised.value.errno == errno.ENOSPC
        assert export.counters.errors == 1
