"""Caps on a provider's disks, seen by clients on its sockets: QEMU's own over NBD, a driver over vhost-user."""

from __future__ import annotations

import dataclasses
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
from tests.framework.providers import DEADLINE_S, WANTED, Control, LoneProvider, make_spec

from mullion.base.errors import MullionError
from mullion.base.units import KIB, MIB
from mullion.provider.layers import Limits
from mullion.vhd import create_dynamic, open_chain
from mullion.wire.nbd import NbdClient
from mullion.wire.vhost_user.client import FrontEnd
from mullion.wire.vhost_user.driver import attach
from mullion.wire.vhost_user.virtio_blk import BlkRequest

pytestmark = pytest.mark.interop

DISK_BYTES = 16 * MIB


@pytest.fixture
def disks(short_tmp: Path) -> list[list[Path]]:
    chains = [[short_tmp / f"d{number}.vhd"] for number in range(2)]
    for (path,) in chains:
        create_dynamic(str(path), DISK_BYTES)
    return chains


def read_for(path: str, seconds: float, size_bytes: int = 4 * KIB) -> int:
    """How many reads were answered within so many seconds, one after another."""
    with NbdClient(path) as client:
        end_s = time.monotonic() + seconds
        count = 0
        buffer = bytearray(size_bytes)
        while time.monotonic() < end_s:
            client.pread(0, buffer)
            count += 1
        return count


def read_twice(path: str) -> None:
    with NbdClient(path) as client:
        for _ in range(2):
            client.pread(0, bytearray(4 * KIB))


def test_no_client_gets_more_than_the_cap_and_taking_it_away_is_felt_at_once(
    short_tmp: Path, disks: list[list[Path]]
) -> None:
    """Only upper bounds hang on time: a slow host can make us slower than the cap, never faster."""
    spec = make_spec(short_tmp, disks[0])
    spec = dataclasses.replace(spec, disks=(dataclasses.replace(spec.disks[0], limits=Limits(iops=50)),))
    (disk,) = spec.disks
    assert disk.nbd is not None
    with LoneProvider(spec), closing(Control(spec.control)) as control:
        begun_s = time.monotonic()
        count = read_for(disk.nbd, 2.0)
        assert count <= 50 * (time.monotonic() - begun_s) + 6
        said = control.ask("status")["disks"][0]["throttle"]
        assert said["limits"] == {"iops": 50}
        assert said["waits"] > 0
        assert said["waited_s"] > 0
        # One request a minute: the client's second read can only end because the cap is taken away.
        assert control.ask("throttle", disk="d0", limits={"bytes_per_s": 100})["limits"] == {"bytes_per_s": 100}
        done = threading.Event()
        reader = threading.Thread(target=lambda: (read_twice(disk.nbd or ""), done.set()))
        reader.start()
        assert not done.wait(1.0)
        control.ask("throttle", disk="d0", limits={})
        assert done.wait(DEADLINE_S)
        reader.join()


def test_rings_and_connections_share_what_the_partition_has(short_tmp: Path, disks: list[list[Path]]) -> None:
    spec = dataclasses.replace(make_spec(short_tmp, *disks), limits=Limits(iops=60))
    first, second = spec.disks
    assert first.vhost_user is not None
    assert second.nbd is not None
    with LoneProvider(spec), closing(Control(spec.control)) as control, FrontEnd(first.vhost_user) as front_end:
        driver = attach(front_end, wanted=WANTED)
        counts: list[int] = []
        reader = threading.Thread(target=lambda: counts.append(read_for(second.nbd or "", 3.0)))
        begun_s = time.monotonic()
        reader.start()
        ring_count = 0
        while time.monotonic() < begun_s + 3.0:
            for slot in range(16):
                driver.submit(slot, BlkRequest.IN, slot * 8, answer_bytes=4096)
            driver.kick()
            answered = 0
            while answered < 16:
                answered += len(driver.wait(1))
            ring_count += 16
        reader.join()
        lasted_s = time.monotonic() - begun_s
        total = ring_count + counts[0]
        assert total <= 60 * lasted_s + 21
        # The ring has 16 ready and the connection one: without turns it would get a seventeenth. A turn lasts 17 ms, so
        # that a client that a loaded machine lets wait does not miss its own.
        assert counts[0] >= total * 0.15
        assert control.ask("status")["limits"] == {"iops": 60}
        driver.release()


def test_a_client_that_goes_away_while_it_waits_frees_its_place(short_tmp: Path, disks: list[list[Path]]) -> None:
    spec = make_spec(short_tmp, disks[0])
    (disk,) = spec.disks
    assert disk.nbd is not None
    with LoneProvider(spec), closing(Control(spec.control)) as control:
        control.ask("throttle", disk="d0", limits={"bytes_per_s": 1})
        with NbdClient(disk.nbd) as first:
            first.pread(0, bytearray(4096))  # on credit: who comes next waits for more than an hour
        for _ in range(2):
            client = NbdClient(disk.nbd, timeout_s=2)
            with pytest.raises((OSError, MullionError)):
                client.pread(0, bytearray(4096))
            client.close()
        deadline_s = time.monotonic() + DEADLINE_S
        while control.ask("status")["disks"][0]["nbd"]["connections"]:
            assert time.monotonic() < deadline_s, "a connection without a client still waits"
            time.sleep(0.05)
        assert control.ask("status")["disks"][0]["throttle"]["waiting"] == 0


def test_the_end_does_not_wait_for_a_cap(short_tmp: Path, disks: list[list[Path]]) -> None:
    spec = make_spec(short_tmp, disks[0])
    spec = dataclasses.replace(spec, disks=(dataclasses.replace(spec.disks[0], limits=Limits(bytes_per_s=1)),))
    nbd = spec.disks[0].nbd
    assert nbd is not None
    provider = LoneProvider(spec)
    client = NbdClient(nbd)
    client.pwrite(0, bytes(4096))
    outcome: list[str] = []

    def write() -> None:
        try:
            client.pwrite(4096, b"x" * 4096)
        except MullionError:
            outcome.append("not answered")
        else:
            outcome.append("done")

    writer = threading.Thread(target=write)
    writer.start()
    with closing(Control(spec.control)) as control:
        while not control.ask("status")["disks"][0]["throttle"]["waiting"]:
            time.sleep(0.01)
    assert provider.terminate() == 0
    writer.join()
    assert outcome == ["done"], "what has arrived is finished, not dropped"
    with suppress(MullionError, OSError):
        client.close()
    with open_chain(str(disks[0][0]), read_only=True) as chain:
        content = bytearray(4096)
        chain.pread(4096, content)
    assert content == b"x" * 4096
