"""The provider's process from outside: a front-end on its socket, its control socket, its zygote."""

from __future__ import annotations

import itertools
import json
import os
import random
import select
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from tests.framework.leftovers import processes_naming
from tests.framework.providers import DEADLINE_S, WANTED, Control, LoneProvider, ZygotePeer, make_spec, wait_for_end
from tests.framework.ring_load import RingLoad, pattern

from mullion.base.units import MIB
from mullion.vhd import create_differencing, create_dynamic, create_fixed, open_chain
from mullion.wire.nbd import NbdClient
from mullion.wire.vhost_user.client import GUEST_BASE, FrontEnd
from mullion.wire.vhost_user.driver import Segment, VirtqueueDriver, attach
from mullion.wire.vhost_user.messages import U64, ProtocolError, Request
from mullion.wire.vhost_user.virtio_blk import BlkFeature, BlkRequest, BlkStatus

pytestmark = pytest.mark.contract

DISK_BYTES = 16 * MIB


@pytest.fixture
def folder(short_tmp: Path) -> Path:
    return short_tmp


@pytest.fixture(params=["fixed", "dynamic", "differencing"])
def chain(request: pytest.FixtureRequest, folder: Path) -> list[Path]:
    base, top = folder / "base.vhd", folder / "top.vhd"
    if request.param == "fixed":
        create_fixed(str(base), DISK_BYTES)
        return [base]
    create_dynamic(str(base), DISK_BYTES)
    if request.param == "dynamic":
        return [base]
    with open_chain(str(base)) as disk:
        disk.pwrite(0, b"base" * 1024)
    create_differencing(str(top), str(base))
    return [top, base]


@pytest.fixture
def dynamic(folder: Path) -> list[Path]:
    create_dynamic(str(folder / "d.vhd"), DISK_BYTES)
    return [folder / "d.vhd"]


def test_disk_through_a_ring(folder: Path, chain: list[Path]) -> None:
    spec = make_spec(folder, chain)
    with LoneProvider(spec) as provider:
        assert provider.ready["ready"] is True
        assert provider.ready["disks"] == [{"id": "d0", "size_bytes": DISK_BYTES, "read_only": False, "warnings": []}]
        with FrontEnd(str(spec.disks[0].vhost_user)) as front_end:
            driver = attach(front_end, wanted=WANTED)
            assert int.from_bytes(front_end.config(60)[:8], "little") == DISK_BYTES // 512
            expected = {0: b"base" * 1024 if len(chain) == 2 else bytes(4096)}
            for number in range(1, 60):
                sector = number * 520 % 32000
                driver.write(sector, pattern(number))
                expected[sector] = pattern(number)
            for sector, data in expected.items():
                assert driver.read(sector, 4096) == data
            assert driver.request(BlkRequest.FLUSH)[0] == BlkStatus.OK
            assert driver.request(BlkRequest.GET_ID, answer_bytes=20)[1] == b"serial-0".ljust(20, b"\0")
            zeroed = struct.pack("<QII", 520, 8, 0)
            assert driver.request(BlkRequest.WRITE_ZEROES, payload=zeroed)[0] == BlkStatus.OK
            assert driver.request(BlkRequest.DISCARD, payload=struct.pack("<QII", 1040, 8, 0))[0] == BlkStatus.OK
            assert driver.read(520, 4096) == bytes(4096)
            driver.release()
        expected[520] = bytes(4096)
        del expected[1040]
        with NbdClient(str(spec.disks[0].nbd)) as nbd:
            buffer = bytearray(4096)
            for sector, data in expected.items():
                nbd.pread(sector * 512, buffer)
                assert buffer == data
        assert provider.terminate() == 0
    assert not Path(spec.control).exists()
    assert not Path(str(spec.disks[0].vhost_user)).exists()
    with open_chain(str(chain[0])) as disk:
        for sector, data in expected.items():
            disk.pread(sector * 512, buffer)
            assert buffer == data


@pytest.mark.parametrize("is_indirect", [True, False])
def test_killed_provider_loses_nothing(
    folder: Path, dynamic: list[Path], started: ExitStack, is_indirect: bool
) -> None:
    """Writes and flushes in flight, `kill -9` at any moment, another process on the same ring, memory and region."""
    spec = make_spec(folder, dynamic)
    path = str(spec.disks[0].vhost_user)
    rng = random.Random(7)
    wanted = WANTED if is_indirect else WANTED & ~(1 << 28)
    provider = started.enter_context(LoneProvider(spec))
    front_end = FrontEnd(path)
    memory_fd = os.dup(front_end.memory_fd)
    inflight, inflight_fd = front_end.get_inflight(1, 64)
    front_end.set_inflight(inflight, inflight_fd)
    driver = attach(front_end, wanted=wanted)
    load = RingLoad(driver, rng, DISK_BYTES)
    for _kill in range(5):
        for _request in range(rng.randrange(30, 400)):
            load.begin(1)
            load.collect()
        provider.kill()
        front_end.socket.close()
        provider = started.enter_context(LoneProvider(spec))
        assert provider.ready["ready"] is True
        front_end = _reconnect(path, memory_fd, wanted)
        front_end.set_inflight(inflight, inflight_fd)
        used_idx = struct.unpack_from("<H", front_end.memory, driver.place.used + 2)[0]
        front_end.start_vring(driver.place, base=used_idx)
        load.end()
    load.check()
    driver.release()
    front_end.close()
    os.close(inflight_fd)
    os.close(memory_fd)
    assert provider.terminate() == 0


def test_a_new_provider_calls_for_what_its_predecessor_may_have_left_unannounced(
    folder: Path, dynamic: list[Path], started: ExitStack
) -> None:
    """Killed between the publication of an answer and the call, a provider leaves a driver that waits for ever."""
    spec = make_spec(folder, dynamic)
    path = str(spec.disks[0].vhost_user)
    provider = started.enter_context(LoneProvider(spec))
    front_end = FrontEnd(path)
    memory_fd = os.dup(front_end.memory_fd)
    driver = attach(front_end, wanted=WANTED)
    driver.read(0, 512)
    provider.kill()
    front_end.socket.close()
    with suppress(BlockingIOError):
        os.eventfd_read(driver.place.call_fd)  # as if the last call had never come
    started.enter_context(LoneProvider(spec))
    front_end = _reconnect(path, memory_fd, WANTED)
    used_idx = struct.unpack_from("<H", front_end.memory, driver.place.used + 2)[0]
    front_end.start_vring(driver.place, base=used_idx)
    assert select.select([driver.place.call_fd], [], [], DEADLINE_S)[0], "the driver was not called"
    # Nor may a call be lost that goes to a descriptor which is being replaced.
    os.eventfd_read(driver.place.call_fd)
    front_end.tell(Request.SET_VRING_CALL, U64(0).pack(), (driver.place.call_fd,))
    assert select.select([driver.place.call_fd], [], [], DEADLINE_S)[0], (
        "the driver was not called on its new descriptor"
    )
    driver.release()
    front_end.close()
    os.close(memory_fd)


def _reconnect(path: str, memory_fd: int, wanted: int) -> FrontEnd:
    front_end = FrontEnd(path, memory_fd=os.dup(memory_fd))
    front_end.negotiate(wanted)
    front_end.set_memory()
    return front_end


def test_what_is_read_while_the_memory_is_copied_is_in_the_log(
    folder: Path, dynamic: list[Path], started: ExitStack
) -> None:
    """The log comes over the socket while the ring runs; what was written before is not in it."""
    with open_chain(str(dynamic[0])) as disk:
        disk.pwrite(0, b"read" * 4096)
    spec = make_spec(folder, dynamic)
    started.enter_context(LoneProvider(spec))
    front_end = started.enter_context(FrontEnd(str(spec.disks[0].vhost_user)))
    driver = attach(front_end, wanted=WANTED)

    def read_into(offset: int) -> None:
        driver.submit(0, BlkRequest.IN, 0, segments=[Segment(offset, 4096, True)])
        driver.kick()
        assert [answer.status for answer in driver.wait()] == [BlkStatus.OK]
        assert bytes(front_end.memory[offset : offset + 4096]) == b"read" * 1024

    def is_marked(offset: int) -> bool:
        page = (GUEST_BASE + offset) >> 12
        return bool(log[page >> 3] >> (page & 7) & 1)

    before, during = 2 * MIB, 3 * MIB
    read_into(before)
    log = front_end.start_log([driver.place])
    assert not is_marked(before)
    read_into(during)
    assert front_end.stop_vring(0) == 2
    assert is_marked(during)
    assert is_marked(driver.place.used)
    assert not is_marked(before)
    driver.release()


def test_two_queues(folder: Path, dynamic: list[Path]) -> None:
    spec = make_spec(folder, dynamic)
    with LoneProvider(spec) as provider:
        with FrontEnd(str(spec.disks[0].vhost_user)) as front_end:
            front_end.negotiate(WANTED)
            front_end.set_memory()
            half = len(front_end.memory) // 2
            drivers = [VirtqueueDriver(front_end, index=index, start=index * half) for index in (0, 1)]
            for driver in drivers:
                front_end.start_vring(driver.place)
            for number in range(20):
                for index, driver in enumerate(drivers):
                    driver.submit(0, BlkRequest.OUT, (number * 2 + index) * 8, payload=pattern(number * 2 + index))
                    driver.kick()
                for driver in drivers:
                    assert [answer.status for answer in driver.wait()] == [BlkStatus.OK]
            assert front_end.stop_vring(1) == 20
            for number in range(40):
                assert drivers[0].read(number * 8, 4096) == pattern(number)
            for driver in drivers:
                driver.release()
        assert provider.terminate() == 0


def test_second_front_end_is_turned_away_and_the_next_is_welcome(folder: Path, dynamic: list[Path]) -> None:
    spec = make_spec(folder, dynamic)
    path = str(spec.disks[0].vhost_user)
    with LoneProvider(spec) as provider:
        with FrontEnd(path) as first:
            first.negotiate(WANTED)
            with FrontEnd(path) as second, pytest.raises(ConnectionError):
                second.negotiate(WANTED)
            assert first.ask_number(Request.GET_QUEUE_NUM) >= 1
        with FrontEnd(path) as third:
            driver = attach(third, wanted=WANTED)
            assert driver.read(0, 512) == bytes(512)
            driver.release()
        assert provider.terminate() == 0


def test_broken_ring_is_told_and_a_new_start_mends_it(folder: Path, dynamic: list[Path]) -> None:
    spec = make_spec(folder, dynamic)
    with LoneProvider(spec) as provider:
        control = Control(spec.control)
        assert control.ask("subscribe") == {"subscribed": True}
        with FrontEnd(str(spec.disks[0].vhost_user)) as front_end:
            driver = attach(front_end, wanted=WANTED)
            assert control.receive() == {"event": "connected", "disk": "d0"}
            driver.write(0, pattern(1))
            driver.make_available(4711)
            driver.kick()
            event = control.receive()
            assert (event["event"], event["disk"]) == ("broken", "d0")
            status = control.ask("status")["disks"][0]
            assert status["state"] == "broken"
            assert "4711" in status["reason"]
            assert front_end.stop_vring(0) == 1
            driver.available_idx = 0
            front_end.memory[: driver.data_offset] = bytes(driver.data_offset)
            fresh = VirtqueueDriver(front_end)
            front_end.start_vring(fresh.place)
            assert fresh.read(0, 4096) == pattern(1)
            assert control.ask("status")["disks"][0]["state"] == "ok"
            fresh.release()
            driver.release()
        assert control.receive()["event"] == "disconnected"
        control.close()
        assert provider.terminate() == 0


def test_nonsense_on_the_socket_ends_the_connection_only(folder: Path, dynamic: list[Path]) -> None:
    spec = make_spec(folder, dynamic)
    path = str(spec.disks[0].vhost_user)
    with LoneProvider(spec) as provider:
        for nonsense in (b"GET / HTTP/1.1\r\n\r\n", bytes(12), b"\xff" * 64, struct.pack("<III", 5, 1, 1 << 30)):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.settimeout(DEADLINE_S)
                peer.connect(path)
                peer.sendall(nonsense)
                try:
                    assert peer.recv(1) == b""
                except ConnectionResetError:
                    continue  # unread bytes were there: the same end
        with FrontEnd(path) as front_end:
            front_end.negotiate(WANTED)
            front_end.set_memory()
            driver = VirtqueueDriver(front_end)
            with (folder / "file").open("wb") as file:
                os.dup2(file.fileno(), driver.place.kick_fd)  # epoll does not take a file
            with pytest.raises(ProtocolError):
                front_end.start_vring(driver.place)
            driver.release()
            assert front_end.ask_number(Request.GET_FEATURES) & BlkFeature.FLUSH
        assert provider.terminate() == 0


def test_a_ring_whose_driver_cannot_be_called_leaves_nothing_behind(folder: Path, dynamic: list[Path]) -> None:
    spec = make_spec(folder, dynamic)
    path = str(spec.disks[0].vhost_user)
    with LoneProvider(spec) as provider:
        with FrontEnd(path) as front_end:
            front_end.negotiate(WANTED)
            front_end.set_memory()
            driver = VirtqueueDriver(front_end)
            with dynamic[0].open("rb") as file:
                os.dup2(file.fileno(), driver.place.call_fd)
            with pytest.raises(ProtocolError):
                front_end.start_vring(driver.place)
            driver.release()
        for number in range(3):  # the descriptors of the first come again, as something else
            with FrontEnd(path) as front_end:
                driver = attach(front_end, wanted=WANTED)
                driver.write(0, pattern(number))
                assert front_end.stop_vring(0) == 1
                driver.release()
        assert provider.terminate() == 0
    assert "internal fault" not in Path(spec.log).read_text()


def test_control_socket(folder: Path, dynamic: list[Path]) -> None:
    spec = make_spec(folder, dynamic)
    with LoneProvider(spec) as provider:
        assert os.stat(spec.control).st_mode & 0o777 == 0o600
        control = Control(spec.control)
        status = control.ask("status")
        assert status["partition"] == "test"
        assert status["pid"] == provider.process.pid
        disk = status["disks"][0]
        assert (disk["id"], disk["state"], disk["path"], disk["chain_files"]) == ("d0", "ok", str(dynamic[0]), 1)
        assert disk["vhost_user"]["connected"] is False
        assert control.ask("flush") == {"flushed": ["d0"]}
        assert control.ask("retry") == {"retrying": True}
        control.socket.sendall(b'{"command": "dance", "id": 5}\n')
        answer = control.receive()
        assert (answer["id"], answer["error"]["code"]) == (5, "invalid")
        assert "quit" in answer["error"]["remedy"]
        for bad in (b"{\n", b"[]\n", b"x" * 70_000 + b"\n"):
            other = Control(spec.control)
            other.socket.sendall(bad)
            assert "error" in other.receive()
            assert other.lines.readline() == b""
            other.close()
        crowd = [Control(spec.control) for _ in range(16)]
        assert "16" in crowd[-1].receive()["error"]["message"]
        for client in crowd:
            client.close()
        assert control.ask("quit") == {"quitting": True}
        assert provider.end() == 0
        control.close()


def test_no_space_stalls_and_goes_on(folder: Path) -> None:
    """A file system of 4 MiB in a mount namespace of the provider's own; the room is made through /proc/PID/root."""
    small = folder / "small"
    small.mkdir()
    prefix = ("unshare", "--map-root-user", "--mount", "sh", "-c")
    script = (
        f"mount -t tmpfs -o size=4m none {small} && head -c 3m /dev/zero > {small}/ballast"
        f' && cp {folder}/d.vhd {small}/d.vhd && exec "$@"'
    )
    create_dynamic(str(folder / "d.vhd"), DISK_BYTES)
    spec = make_spec(folder, [small / "d.vhd"])
    with LoneProvider(spec, (*prefix, script, "sh")) as provider:
        assert provider.ready.get("ready") is True, Path(spec.log).read_text()
        control = Control(spec.control)
        control.ask("subscribe")
        with FrontEnd(str(spec.disks[0].vhost_user), memory_bytes=8 * 1024 * 1024) as front_end:
            driver = attach(front_end, wanted=WANTED)
            assert control.receive()["event"] == "connected"
            for slot in range(64):
                for half in range(2):  # 64 times 32 KiB: 2 MiB into 1 MiB
                    driver.data(slot)[half * 8192 : half * 8192 + 8192] = pattern(slot) * 2
                driver.submit(slot, BlkRequest.OUT, slot * 32, payload=bytes(driver.data(slot)))
            driver.kick()
            event = control.receive()
            assert (event["event"], event["disk"], event["filesystem"]) == ("no_space", "d0", str(small))
            status = control.ask("status")["disks"][0]
            assert (status["state"], status["filesystem"]) == ("no_space", str(small))
            answered = driver.collect()
            assert len(answered) < 64
            assert front_end.ask_number(Request.GET_QUEUE_NUM) >= 1, "the front-end is still answered"
            os.unlink(f"/proc/{provider.process.pid}/root{small}/ballast")
            assert control.ask("retry") == {"retrying": True}
            answered += driver.wait(64 - len(answered))
            assert {answer.status for answer in answered} == {BlkStatus.OK}
            assert control.receive() == {"event": "space", "disk": "d0"}
            assert control.ask("status")["disks"][0]["state"] == "ok"
            for slot in range(64):
                assert driver.read(slot * 32, 16384) == pattern(slot) * 4
            driver.release()
        control.close()
        assert provider.terminate() == 0


# The zygote.


@pytest.fixture
def zygote(folder: Path) -> Iterator[ZygotePeer]:
    peer = ZygotePeer(folder)
    yield peer
    assert peer.end() == 0


def test_zygote_spawns_and_reports_the_end(zygote: ZygotePeer, folder: Path, dynamic: list[Path]) -> None:
    spec = make_spec(folder, dynamic)
    answer = zygote.spawn(spec)
    pid = answer["pid"]
    assert (answer["id"], answer["ready"]) == (1, True)
    assert Path(f"/proc/{pid}/comm").read_text() == "mullion-prov\n"
    assert os.getsid(pid) == pid
    assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()
    with FrontEnd(str(spec.disks[0].vhost_user)) as front_end:
        driver = attach(front_end, wanted=WANTED)
        driver.write(0, pattern(1))
        driver.release()
    os.kill(pid, signal.SIGTERM)
    assert zygote.receive() == {"exited": pid, "status": 0}
    with open_chain(str(dynamic[0]), read_only=True) as disk:
        buffer = bytearray(4096)
        disk.pread(0, buffer)
        assert buffer == pattern(1)


def test_a_chain_as_long_as_a_chain_may_be(zygote: ZygotePeer, folder: Path) -> None:
    """The limit is that of the VHD engine: what can be shown can be started."""
    paths = [folder / f"{number:0200}.vhd" for number in range(1024)]
    create_dynamic(str(paths[0]), 1024 * 1024)
    for parent, child in itertools.pairwise(paths):
        create_differencing(str(child), str(parent))
    spec = make_spec(folder, paths[::-1])
    answer = zygote.spawn(spec)
    assert answer.get("ready") is True, answer
    control = Control(spec.control)
    assert control.ask("status")["disks"][0]["chain_files"] == 1024
    assert control.ask("quit") == {"quitting": True}
    control.close()
    assert zygote.receive() == {"exited": answer["pid"], "status": 0}


def test_a_long_log_is_put_aside_when_a_provider_starts(zygote: ZygotePeer, folder: Path, dynamic: list[Path]) -> None:
    spec = make_spec(folder, dynamic)
    log, old = Path(spec.log), Path(f"{spec.log}.1")
    for content, is_long in ((b"x" * (4 * MIB), False), (b"y" * (4 * MIB + 1), True), (b"z" * (4 * MIB + 2), True)):
        log.write_bytes(content)
        pid = zygote.spawn(spec)["pid"]
        os.kill(pid, signal.SIGTERM)
        assert zygote.receive() == {"exited": pid, "status": 0}
        assert log.read_bytes().startswith(b"xxx") is not is_long
        assert f"provider {pid} starts" in log.read_text()[-400:]
        if is_long:
            assert old.read_bytes() == content


def test_zygote_reports_a_kill(zygote: ZygotePeer, folder: Path, dynamic: list[Path]) -> None:
    pid = zygote.spawn(make_spec(folder, dynamic))["pid"]
    os.kill(pid, signal.SIGKILL)
    assert zygote.receive() == {"exited": pid, "status": -9}
    pid = zygote.spawn(make_spec(folder, dynamic))["pid"]  # over the sockets that it left
    os.kill(pid, signal.SIGTERM)
    assert zygote.receive() == {"exited": pid, "status": 0}


def test_zygote_reports_why_a_provider_cannot_start(zygote: ZygotePeer, folder: Path, dynamic: list[Path]) -> None:
    link = folder / "link.vhd"
    link.symlink_to(dynamic[0])
    fifo = folder / "fifo"
    os.mkfifo(fifo)
    (folder / "text").write_bytes(b"text" * 1000)
    for path, code in (
        (folder / "missing.vhd", "not-found"),
        (link, "invalid"),
        (fifo, "invalid"),
        (folder / "text", "not-a-vhd"),
    ):
        answer = zygote.spawn(make_spec(folder, [path]))
        assert answer["id"] == 1
        assert answer["error"]["code"] == code, answer
        assert str(path) in answer["error"]["message"]
        assert answer["error"]["remedy"]
        assert zygote.receive() == {"exited": answer["pid"], "status": 1}
        assert not (folder / "control").exists()
    fields = make_spec(folder, dynamic).to_wire() | {"colour": "red"}
    assert "colour" in zygote.spawn(fields)["error"]["message"]
    zygote.send({"id": 9})
    assert zygote.receive()["error"]["code"] == "operation-failed"


def test_two_providers_of_one_disk(zygote: ZygotePeer, folder: Path, dynamic: list[Path]) -> None:
    first = make_spec(folder, dynamic)
    pid = zygote.spawn(first)["pid"]
    same_sockets = zygote.spawn(first)
    assert same_sockets["error"]["code"] == "already-exists"
    zygote.receive()
    (folder / "other").mkdir()
    same_disk = zygote.spawn(make_spec(folder / "other", dynamic))
    assert same_disk["error"]["code"] == "disk-busy"
    zygote.receive()
    control = Control(first.control)
    assert control.ask("status")["disks"][0]["state"] == "ok"
    control.ask("quit")
    control.close()
    assert zygote.receive() == {"exited": pid, "status": 0}


def test_several_spawns_in_flight(zygote: ZygotePeer, folder: Path) -> None:
    for number in range(4):
        home = folder / str(number)
        home.mkdir()
        create_dynamic(str(home / "d.vhd"), DISK_BYTES)
        zygote.send({"id": f"n{number}", "spawn": make_spec(home, [home / "d.vhd"]).to_wire()})
    answers = [zygote.receive() for _ in range(4)]
    assert sorted(answer["id"] for answer in answers) == ["n0", "n1", "n2", "n3"]
    for answer in answers:
        os.kill(answer["pid"], signal.SIGTERM)
    assert {zygote.receive()["exited"] for _ in range(4)} == {answer["pid"] for answer in answers}


def test_provider_survives_zygote_and_parent(folder: Path, dynamic: list[Path]) -> None:
    peer = ZygotePeer(folder)
    spec = make_spec(folder, dynamic)
    pid = peer.spawn(spec)["pid"]
    assert peer.close() == 0, "the zygote ends with its parent"
    left = [survivor.identity for survivor in processes_naming(folder)]
    assert [identity.pid for identity in left if identity] == [pid], "the next session would not find it"
    control = Control(spec.control)
    assert control.ask("status")["pid"] == pid
    control.ask("quit")
    control.close()
    wait_for_end(pid)


def test_privileges_are_dropped(zygote: ZygotePeer, folder: Path, dynamic: list[Path]) -> None:
    if os.geteuid() != 0:
        answer = zygote.spawn(make_spec(folder, dynamic).to_wire() | {"uid": 0, "gid": 0})
        assert answer["error"]["code"] == "denied"
        zygote.receive()
        return
    pending = folder / "pending"
    pending.mkdir()
    os.chown(pending, 12345, 12345)
    answer = zygote.spawn(make_spec(folder, dynamic).to_wire() | {"uid": 12345, "gid": 12345})
    assert answer.get("ready") is True, answer
    pid = answer["pid"]
    status = Path(f"/proc/{pid}/status").read_text()
    assert "Uid:\t12345\t12345\t12345\t12345" in status
    assert "Gid:\t12345\t12345\t12345\t12345" in status
    assert "CapEff:\t0000000000000000" in status
    assert os.stat(folder / "control").st_uid == 12345
    os.kill(pid, signal.SIGTERM)
    assert zygote.receive() == {"exited": pid, "status": 0}


def test_load_generator(folder: Path, dynamic: list[Path]) -> None:
    """The benchmark's own front-end, written independently in C: fills the disk and checks every byte."""
    program = folder / "loadgen"
    source = Path(__file__).parents[2] / "bench" / "vhost_loadgen.c"
    subprocess.run(["gcc", "-O1", "-o", str(program), str(source)], check=True, timeout=DEADLINE_S)
    spec = make_spec(folder, dynamic)
    with LoneProvider(spec) as provider:
        for kind, options in (
            ("fill", ["bytes=65536"]),
            ("read", ["count=3000"]),
            ("read", ["wait=eventfd", "indirect=0", "count=3000"]),
        ):
            argv = [str(program), str(spec.disks[0].vhost_user), str(provider.process.pid), kind, *options]
            done = subprocess.run(argv, check=False, timeout=DEADLINE_S, capture_output=True)
            assert done.returncode == 0, done
            assert json.loads(done.stdout)["bad"] == 0
        assert provider.terminate() == 0
