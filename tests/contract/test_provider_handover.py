"""A provider hands its work to a newer process: the front-end keeps its connection, its ring and all in it."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.framework.providers import WANTED, Control, LoneProvider, spec_of_two
from tests.framework.ring_load import RingLoad, pattern

from mullion.base.units import MIB
from mullion.provider.handover import HandOverError, Offer, TakeOver, give
from mullion.provider.spec import ProviderSpec
from mullion.vhd import open_chain
from mullion.wire.nbd import NbdClient
from mullion.wire.vhost_user.client import FrontEnd
from mullion.wire.vhost_user.driver import VirtqueueDriver, attach

pytestmark = pytest.mark.contract

DISK_BYTES = 16 * MIB
ROUNDS = 5


@pytest.fixture
def spec(short_tmp: Path) -> ProviderSpec:
    return spec_of_two(short_tmp, DISK_BYTES)


def successor(spec: ProviderSpec) -> LoneProvider:
    return LoneProvider(dataclasses.replace(spec, takes_over=True))


def load_on(driver: VirtqueueDriver) -> RingLoad:
    return RingLoad(driver, random.Random(7), DISK_BYTES)


@pytest.mark.parametrize("has_inflight", [True, False])
def test_a_front_end_notices_nothing(spec: ProviderSpec, started: ExitStack, has_inflight: bool) -> None:
    provider = started.enter_context(LoneProvider(spec))
    front_end = started.enter_context(FrontEnd(str(spec.disks[0].vhost_user)))
    if has_inflight:
        front_end.set_inflight(*front_end.get_inflight(1, 64))
    driver = attach(front_end, wanted=WANTED)
    load = load_on(driver)
    for _ in range(ROUNDS):
        load.begin(50)
        newer = started.enter_context(successor(spec))
        assert newer.ready.get("ready") is True, newer.ready
        assert provider.end() == 0, Path(spec.log).read_text()
        provider = newer
        load.begin(50)
        load.end()
        assert int.from_bytes(front_end.config(60)[:8], "little") == DISK_BYTES // 512
        control = Control(spec.control)
        assert control.ask("status")["pid"] == newer.process.pid
        peer = control.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        assert struct.unpack("3i", peer)[0] == newer.process.pid, "the next parent finds it by that"
        control.close()
        with NbdClient(str(spec.disks[1].nbd)) as nbd:
            nbd.pwrite(0, pattern(1))
    load.check()
    driver.release()
    assert provider.terminate() == 0
    assert not Path(spec.control).exists()
    with open_chain(spec.disks[0].chain[0], read_only=True) as disk:
        assert disk.warnings == []
        found = bytearray(4096)
        for sector, number in load.written.items():
            disk.pread(sector * 512, found)
            assert found == pattern(number)


def test_when_the_newer_one_fails_the_present_one_goes_on(
    spec: ProviderSpec, started: ExitStack, tmp_path: Path
) -> None:
    provider = started.enter_context(LoneProvider(spec))
    front_end = started.enter_context(FrontEnd(str(spec.disks[0].vhost_user)))
    front_end.set_inflight(*front_end.get_inflight(1, 64))
    load = load_on(attach(front_end, wanted=WANTED))
    control = Control(spec.control)
    limits = control.ask("throttle", disk="d1", limits={"iops": 100_000})["limits"]

    load.begin(30)
    fewer = dataclasses.replace(spec, disks=spec.disks[:1])
    assert started.enter_context(successor(fewer)).ready["error"]["code"] == "hand-over"
    load.begin(30)
    load.end()

    with TakeOver(spec.control) as other:  # killed before it has taken it
        load.begin(20)  # no more than there is room for: nobody answers before we have hung up
        offer = other.offer()
        assert [disk.chain for disk in offer.disks] == [disk.chain for disk in spec.disks]
        assert offer.disks[0].front_end is not None
        offer.close()
    load.begin(30)
    load.end()

    status = control.ask("status")
    assert status["pid"] == provider.process.pid
    assert status["disks"][1]["throttle"]["limits"] == limits
    assert status["disks"][0]["vhost_user"]["connected"] is True
    with NbdClient(str(spec.disks[1].nbd)) as nbd:
        nbd.pwrite(0, pattern(1))
    newer = started.enter_context(successor(spec))
    assert newer.ready.get("ready") is True
    load.begin(30)
    load.end()
    assert provider.end() == 0
    control.close()


def test_a_newer_one_that_hangs_is_ended_before_the_present_one_goes_on(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the files open: what it did with them later would meet what the present one writes."""
    monkeypatch.setattr("mullion.provider.handover.TAKE_S", 0.1)
    path = str(short_tmp / "control")
    hanging = (
        "import sys\n"
        "from mullion.provider.handover import TakeOver\n"
        f"with TakeOver({path!r}) as other:\n"
        "    other.offer()\n"
        "    sys.stdin.read()\n"
    )
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as opened:
        listener.bind(path)
        listener.listen()
        newer = opened.enter_context(subprocess.Popen([sys.executable, "-c", hanging], stdin=subprocess.PIPE))
        opened.callback(newer.kill)
        connection, _ = listener.accept()
        opened.enter_context(connection)
        _, fds, _, _ = socket.recv_fds(connection, 4096, 1)
        channel = opened.enter_context(socket.socket(fileno=fds[0]))
        offer = Offer(os.dup(listener.fileno()))
        opened.callback(offer.close)
        assert not give(channel, offer)
        assert newer.wait() == -signal.SIGKILL


def test_what_cannot_be_handed_over_is_said(spec: ProviderSpec, started: ExitStack) -> None:
    started.enter_context(LoneProvider(spec))
    front_end = started.enter_context(FrontEnd(str(spec.disks[0].vhost_user)))
    driver = attach(front_end, wanted=WANTED)
    driver.make_available(9999)  # a head beyond the ring
    driver.kick()
    control = Control(spec.control)
    while control.ask("status")["disks"][0]["state"] != "broken":
        pass
    refused = started.enter_context(successor(spec)).ready["error"]
    assert refused["code"] == "hand-over"
    assert "d0" in refused["message"]
    assert control.ask("hand-over")["error"]["code"] == "invalid"
    assert control.ask("status")["disks"][1]["state"] == "ok"
    control.close()


def test_what_is_no_offer_is_refused() -> None:
    good = {
        "version": 1,
        "begun_s": 1.5,
        "disks": [{"id": "d", "chain": ["/d"], "vhost_user": True, "front_end": None, "nbd": False}],
    }
    assert Offer.from_wire(good, [3, 4, 5]).fds() == [3, 4, 5]
    disk = {"id": "d", "chain": ["/d"], "vhost_user": True, "front_end": [[1, "zz", 0]], "nbd": False}
    for fields, fds in (
        (good, [3, 4]),
        (good, [3, 4, 5, 6]),
        ({**good, "version": 2}, [3, 4, 5]),
        ({**good, "disks": None}, [3]),
        ({**good, "disks": [{}]}, [3]),
        ({**good, "disks": [disk]}, [3, 4, 5, 6]),
        ({**good, "disks": [{**disk, "front_end": [[1]]}]}, [3, 4, 5, 6]),
    ):
        with pytest.raises(HandOverError):
            Offer.from_wire(fields, fds)
