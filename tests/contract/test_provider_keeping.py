"""The parent keeps a killed provider's connections: the next one goes on, or the front-end is hung up on; never neither."""

from __future__ import annotations

import json
import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from tests.framework.providers import DEADLINE_S, WANTED, Control, LoneProvider, spec_of_two
from tests.framework.ring_load import RingLoad

from mullion.base.errors import InvalidError
from mullion.base.units import MIB
from mullion.provider.front_end import FrontEnd as KeptFrontEnd
from mullion.provider.front_end import SetupMessage
from mullion.provider.keeping import Keeper, Keeping
from mullion.provider.spec import ProviderSpec
from mullion.wire.vhost_user.client import USER_BASE, FrontEnd, VringPlace
from mullion.wire.vhost_user.driver import VirtqueueDriver, attach
from mullion.wire.vhost_user.messages import U64, Request, VringAddress, VringState

pytestmark = pytest.mark.contract

DISK_BYTES = 16 * MIB
KILLS = 5
KILLS_AT_RANDOM = 12


@pytest.fixture
def spec(short_tmp: Path) -> ProviderSpec:
    return spec_of_two(short_tmp, DISK_BYTES)


class Parent:
    """Starts providers one after the other, and keeps what they say."""

    def __init__(self, spec: ProviderSpec, started: ExitStack) -> None:
        self._spec, self._started = spec, started
        self._disks = [disk.id for disk in spec.disks]
        self._keeper = Keeper(self._disks)
        self._theirs: socket.socket | None = None
        started.callback(self.close)
        self._begin()

    def close(self) -> None:
        self._keeper.close()
        if self._theirs is not None:
            self._theirs.close()

    def _begin(self) -> None:
        self.provider = self._started.enter_context(LoneProvider(self._spec))
        assert self.provider.ready.get("ready") is True, self.provider.ready
        control = Control(self._spec.control)
        assert control.ask("keep", fds=self._keeper.fds) == {"kept": self._disks}
        if self._theirs is not None:
            self._theirs.close()
        self._theirs = socket.socket(fileno=os.dup(self._keeper.fds[0]))
        self._keeper.given()
        for disk in self._disks:
            copy = self._keeper.copy_of(disk)
            if copy is not None:
                assert control.ask("adopt", fds=copy.fds, disk=disk, front_end=copy.to_wire()) == {"disk": disk}
        control.close()

    def kill(self, *, start: bool = True) -> list[str]:
        """Kill the provider, and start the next one with what was kept: which disks' connections are handed on."""
        self.provider.kill()
        good = self._keeper.take()
        self._keeper.close()
        self._keeper = Keeper(self._disks)
        self._keeper.expect(good)
        handed = list(good)
        if start:
            self._begin()
        return handed

    def fill_channel(self) -> None:
        """Leave the provider no room to say anything, as a parent does that has more to do."""
        assert self._theirs is not None
        self._theirs.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                self._theirs.send(b'{"disk": "d1", "number": 0, "front_end": null}')

    def listen_until_kept(self, disk: str) -> None:
        """Take what is said until it is what is."""
        deadline_s = time.monotonic() + DEADLINE_S
        slot = self._disks.index(disk)
        while memoryview(os.pread(self._keeper.fds[1], 16, 0)).cast("Q")[slot] % 2:
            assert time.monotonic() < deadline_s
            self._keeper.receive()
            time.sleep(0.001)

    def wait_kept(self, disk: str) -> None:
        wait_kept(self._keeper, self._disks.index(disk))


def attached(spec: ProviderSpec, started: ExitStack, *, disk: int = 0) -> tuple[FrontEnd, VirtqueueDriver]:
    """A front-end of a disk, whose first ring runs."""
    front_end = started.enter_context(FrontEnd(str(spec.disks[disk].vhost_user)))
    driver = attach(front_end, wanted=WANTED)
    started.callback(driver.release)
    return front_end, driver


def wait_kept(keeper: Keeper, slot: int) -> None:
    """Until the provider has said how the connection of a disk is now."""
    deadline_s = time.monotonic() + DEADLINE_S
    while (number := memoryview(os.pread(keeper.fds[1], 16, 0)).cast("Q")[slot]) % 2 or not number:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


@pytest.mark.parametrize("has_inflight", [True, False])
def test_a_killed_provider_is_not_missed(spec: ProviderSpec, started: ExitStack, has_inflight: bool) -> None:
    parent = Parent(spec, started)
    front_end = started.enter_context(FrontEnd(str(spec.disks[0].vhost_user)))
    if has_inflight:
        front_end.set_inflight(*front_end.get_inflight(1, 64))
    driver = attach(front_end, wanted=WANTED)
    load = RingLoad(driver, random.Random(7), DISK_BYTES)
    for _ in range(KILLS):
        load.begin(50)
        parent.wait_kept("d0")
        assert parent.kill() == ["d0"]
        load.begin(50)
        load.end()
        assert int.from_bytes(front_end.config(60)[:8], "little") == DISK_BYTES // 512
    load.check()
    assert parent.provider.terminate() == 0
    with pytest.raises(ConnectionError):
        front_end.config(60)
    driver.release()


def test_killed_between_two_starts_of_a_ring(spec: ProviderSpec, started: ExitStack) -> None:
    """As while a guest is paused, when QEMU before 9.1 may lose a back end that it sees go."""
    parent = Parent(spec, started)
    front_end, driver = attached(spec, started)
    load = RingLoad(driver, random.Random(8), DISK_BYTES)
    for _ in range(KILLS):
        load.begin(20)
        load.end()
        base = front_end.stop_vring(0)
        assert base == driver.available_idx
        parent.wait_kept("d0")
        assert parent.kill() == ["d0"]
        load.begin(5)  # nobody takes them before the ring is started
        time.sleep(0.05)
        load.collect()
        assert driver.seen_idx == base
        front_end.start_vring(driver.place, base)
        load.end()
    load.check()


def test_what_was_said_of_a_ring_is_kept_in_whatever_order_it_comes(spec: ProviderSpec, started: ExitStack) -> None:
    parent = Parent(spec, started)
    front_end = started.enter_context(FrontEnd(str(spec.disks[0].vhost_user)))
    front_end.negotiate(WANTED)
    front_end.set_memory()
    driver = VirtqueueDriver(front_end)
    started.callback(driver.release)
    index = driver.place.index
    front_end.tell(Request.SET_VRING_KICK, U64(index).pack(), (driver.place.kick_fd,))
    parent.wait_kept("d0")
    assert parent.kill() == ["d0"]
    user = (USER_BASE + driver.place.descriptor, USER_BASE + driver.place.used, USER_BASE + driver.place.available)
    front_end.tell(Request.SET_VRING_NUM, VringState(index, driver.place.size).pack())
    front_end.tell(Request.SET_VRING_ADDR, VringAddress(index, 0, *user, 0).pack())
    front_end.tell(Request.SET_VRING_CALL, U64(index).pack(), (driver.place.call_fd,))
    front_end.tell(Request.SET_VRING_ENABLE, VringState(index, 1).pack())
    assert driver.read(0, 512) == bytes(512)


def test_a_front_end_that_says_something_while_nobody_listens_is_answered(
    spec: ProviderSpec, started: ExitStack
) -> None:
    parent = Parent(spec, started)
    front_end, _ = attached(spec, started, disk=1)
    parent.wait_kept("d1")
    found: list[int] = []

    def stop() -> None:
        parent.provider.process.wait(DEADLINE_S)
        found.append(front_end.stop_vring(0))

    asking = threading.Thread(target=stop)
    asking.start()
    assert parent.kill() == ["d1"]
    asking.join(DEADLINE_S)
    assert found == [0]


def converse(front_end: FrontEnd, place: VringPlace, is_over: threading.Event, outcome: list[str]) -> None:
    """Stop and start a ring, as QEMU does, until that is over or the connection has ended."""
    try:
        while not is_over.is_set():
            base = front_end.stop_vring(0)
            front_end.set_memory()
            front_end.start_vring(place, base)
            assert front_end.config(8) == (DISK_BYTES // 512).to_bytes(8, "little")
        outcome.append("answered")
    except ConnectionError:
        outcome.append("hung up")


def test_killed_at_any_instant_of_a_conversation_it_goes_on_or_ends(spec: ProviderSpec, started: ExitStack) -> None:
    """Who asks is answered, once, or hears that the connection has ended."""
    parent = Parent(spec, started)
    choose = random.Random(5)
    ends = {"answered": 0, "hung up": 0}
    for _ in range(KILLS_AT_RANDOM):
        front_end = FrontEnd(str(spec.disks[0].vhost_user))
        driver = attach(front_end, wanted=WANTED)
        parent.wait_kept("d0")
        outcome: list[str] = []
        is_over = threading.Event()
        talking = threading.Thread(target=converse, args=(front_end, driver.place, is_over, outcome))
        talking.start()
        time.sleep(choose.random() * 0.02)
        handed = parent.kill()
        is_over.set()
        talking.join(DEADLINE_S)
        (end,) = outcome
        assert bool(handed) == (end == "answered")
        ends[end] += 1
        if end == "answered":
            driver.read(0, 4096)
        driver.release()
        front_end.close()
    assert ends["hung up"] > 0, ends


def test_a_connection_that_has_ended_is_not_kept(spec: ProviderSpec, started: ExitStack) -> None:
    parent = Parent(spec, started)
    front_end = FrontEnd(str(spec.disks[0].vhost_user))
    front_end.negotiate(WANTED)
    parent.wait_kept("d0")
    front_end.close()
    control = Control(spec.control)
    deadline_s = time.monotonic() + DEADLINE_S
    while control.ask("status")["disks"][0]["vhost_user"]["connected"]:
        assert time.monotonic() < deadline_s
    control.close()
    assert parent.kill() == []


def test_what_a_provider_cannot_say_is_no_copy(spec: ProviderSpec, started: ExitStack) -> None:
    """Its parent takes nothing: the connection is hung up rather than handed on as it was."""
    parent = Parent(spec, started)
    front_end, _ = attached(spec, started)
    parent.wait_kept("d0")
    parent.fill_channel()
    for _ in range(5):
        front_end.config(60)
        time.sleep(0.01)
    assert parent.kill() == []
    with pytest.raises(ConnectionError):
        front_end.config(60)


def test_what_could_not_be_said_is_said_later(spec: ProviderSpec, started: ExitStack) -> None:
    parent = Parent(spec, started)
    front_end, _ = attached(spec, started)
    parent.wait_kept("d0")
    parent.fill_channel()
    front_end.config(60)
    parent.listen_until_kept("d0")
    assert parent.kill() == ["d0"]
    front_end.config(60)


def test_another_parent_asks_for_all_anew(spec: ProviderSpec, started: ExitStack) -> None:
    parent = Parent(spec, started)
    front_end, _ = attached(spec, started)
    parent.wait_kept("d0")
    control = Control(spec.control)
    with ExitStack() as later:
        for _ in range(3):
            keeper = Keeper(["d0", "d1"])
            later.callback(keeper.close)
            assert control.ask("keep", fds=keeper.fds)["kept"] == ["d0", "d1"]
            keeper.given()
        front_end.config(60)
        wait_kept(keeper, 0)
        control.close()
        assert parent.kill(start=False) == [], "it is the first parent's no more"
        taken = keeper.take()
        assert list(taken) == ["d0"]
        with pytest.raises(ConnectionError):
            front_end.config(60)  # the first one has hung it up
        close(taken["d0"].fds)


@pytest.mark.parametrize(
    ("fields", "fds"),
    [
        ({"disk": "d9", "front_end": [[1, "", 0]]}, 1),
        ({"disk": "d0"}, 0),
        ({"disk": "d0", "front_end": 5}, 0),
        ({"disk": "d0", "front_end": [[1, "zz", 0]]}, 0),
        ({"disk": "d0", "front_end": [[1, "00", 2]]}, 1),
    ],
)
def test_what_cannot_be_adopted_is_refused(
    spec: ProviderSpec, started: ExitStack, fields: dict[str, object], fds: int
) -> None:
    Parent(spec, started)
    control = Control(spec.control)
    with socket.socket() as some:
        answer = control.ask("adopt", fds=[some.fileno()] * fds, **fields)
    assert answer["error"]["code"] == "invalid"
    assert control.ask("keep")["error"]["code"] == "invalid"
    with socket.socket() as some, open(os.devnull, "rb") as nothing:
        assert control.ask("keep", fds=[some.fileno(), nothing.fileno()])["error"]["code"] == "invalid"
    assert control.ask("status")["disks"][0]["state"] == "ok"
    control.close()


def test_what_breaks_the_protocol_is_hung_up(spec: ProviderSpec, started: ExitStack) -> None:
    Parent(spec, started)
    control = Control(spec.control)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        bad = [[8, "00", 0]]
        assert control.ask("adopt", fds=[theirs.fileno()], disk="d0", front_end=bad) == {"disk": "d0"}
        ours.settimeout(DEADLINE_S)
        assert ours.recv(1) == b""
    front_end = started.enter_context(FrontEnd(str(spec.disks[0].vhost_user)))
    front_end.negotiate(WANTED)
    control.close()


# The two ends by themselves.


@pytest.fixture
def keeper(started: ExitStack) -> Keeper:
    made = Keeper(["a", "b"])
    started.callback(made.close)
    return made


def keeping_of(keeper: Keeper) -> Keeping:
    return Keeping([os.dup(fd) for fd in keeper.fds], ["a", "b"])


def connection() -> tuple[KeptFrontEnd, socket.socket]:
    ours, theirs = socket.socketpair()
    return KeptFrontEnd(theirs.detach(), [SetupMessage(1, b"x"), SetupMessage(2, b"", (os.memfd_create("m"),))]), ours


def close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def test_only_what_is_true_now_is_taken(keeper: Keeper) -> None:
    keeping = keeping_of(keeper)
    ends = []
    for disk in ("a", "b"):
        front_end, end = connection()
        ends.append(end)
        keeping.changes(disk)
        keeping.is_now(disk, front_end)
        keeping.is_now(disk, front_end)
        close(front_end.fds)
    keeping.changes("b")
    taken = keeper.take()
    assert list(taken) == ["a"]
    assert [message[:2] for message in taken["a"].messages] == [(1, b"x"), (2, b"")]
    assert ends[1].recv(1) == b"", "b is hung up"
    close(taken["a"].fds)
    assert ends[0].recv(1) == b""
    for disk in ("a", "b"):
        keeping.leave(disk)
    for end in ends:
        end.close()


def test_what_is_handed_on_is_good_until_its_provider_begins(started: ExitStack) -> None:
    front_end, end = connection()
    first = Keeper(["a", "b"])
    first.expect({"a": front_end})
    assert list(first.take()) == ["a"]
    first.close()
    second = Keeper(["a", "b"])
    second.expect({"a": front_end})
    started.callback(second.close)
    keeping = keeping_of(second)
    keeping.changes("a")
    assert second.take() == {}
    assert end.recv(1) == b""
    end.close()
    for disk in ("a", "b"):
        keeping.leave(disk)


@pytest.mark.parametrize(
    "said",
    [
        b"\xff",
        b"[]",
        b'{"disk": "a"}',
        b"[" * 60_000,
        json.dumps({"disk": "c", "number": 2, "front_end": None}).encode(),
        json.dumps({"disk": "a", "number": "x", "front_end": None}).encode(),
        json.dumps({"disk": "a", "number": 2, "front_end": [[1, "", 7]]}).encode(),
        json.dumps({"disk": "a", "number": 2, "front_end": None}).encode(),
        b'{"disk": "a", "number": 1e999, "front_end": null}',
        b'{"disk": "a", "number": 2, "front_end": [[1e999, "", 2]]}',
        b'{"disk": "a", "number": 2, "front_end": [[1, "", -1]]}',
        bytes(70_000),
    ],
)
def test_what_no_provider_says_counts_for_nothing(keeper: Keeper, said: bytes) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with socket.socket(fileno=os.dup(keeper.fds[0])) as channel, open(os.devnull, "rb") as some:
        socket.send_fds(channel, [said], [some.fileno()] * 3)
    with pytest.raises(InvalidError):
        keeper.receive()
    assert keeper.take() == {}
    wait_closed(before)


def wait_closed(count: int) -> None:
    """Until no more descriptors than that are open."""
    deadline_s = time.monotonic() + DEADLINE_S
    while len(os.listdir("/proc/self/fd")) > count:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def test_the_page_stays_as_large_as_it_is(keeper: Keeper) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(keeper.fds[1], 0)


def test_a_connection_that_is_no_socket_is_closed_all_the_same(keeper: Keeper) -> None:
    before = len(os.listdir("/proc/self/fd"))
    keeping = keeping_of(keeper)
    with open(os.devnull, "rb") as nothing:
        keeping.is_now("a", KeptFrontEnd(nothing.fileno(), []))
    good, end = connection()
    keeping.is_now("b", good)
    close(good.fds)
    keeping.changes("a")
    taken = keeper.take()
    assert list(taken) == ["b"]
    close(taken["b"].fds)
    end.close()
    for disk in ("a", "b"):
        keeping.leave(disk)
    wait_closed(before)


def test_a_provider_that_talks_on_and_on_is_heard_a_little_at_a_time(keeper: Keeper) -> None:
    keeping = keeping_of(keeper)
    for _ in range(40):
        assert keeping.is_now("a", None)
    assert keeper.receive()
    assert select.select([keeper.channel], [], [], 0)[0]
    assert keeper.take() == {}
    assert not select.select([keeper.channel], [], [], 0)[0]
    for disk in ("a", "b"):
        keeping.leave(disk)


def test_a_descriptor_that_does_not_close_holds_up_nobody(keeper: Keeper) -> None:
    """A socket that lingers for as long as nobody reads what it was given."""
    keeping = keeping_of(keeper)
    with socket.create_server(("127.0.0.1", 0)) as server:
        lingering = socket.create_connection(server.getsockname())
        reading, _ = server.accept()
    lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
    lingering.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            lingering.send(bytes(1 << 16))
    lingering.setblocking(True)
    assert keeping.is_now("a", KeptFrontEnd(lingering.fileno(), []))
    lingering.close()  # that which is sent is the last one now
    assert keeping.is_now("a", None)
    assert keeper.receive()
    assert keeper.copy_of("a") is None
    reading.close()  # with data unread: a reset, which ends the lingering
    for disk in ("a", "b"):
        keeping.leave(disk)
