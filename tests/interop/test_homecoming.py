"""A real provider over a backup that comes by NBD: requests wait for the server, and all comes home in spite of kills."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.framework.providers import DEADLINE_S, Control, LoneProvider, make_spec
from tests.unit.repository.disks import MemoryDisk

from mullion.base.block import Extent, ExtentKind, WritableBuffer
from mullion.base.errors import UnavailableError
from mullion.base.units import MIB
from mullion.provider.spec import ProviderSpec
from mullion.vhd import create_differencing, create_dynamic, open_chain
from mullion.wire.nbd import NbdClient, NbdExport

pytestmark = pytest.mark.interop

SIZE_BYTES = 24 * MIB
GATE_BYTES = 4 * MIB


class GatedDisk(MemoryDisk):
    """A backup's disk that gives nothing behind its first MiBs until it is opened."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.is_open = threading.Event()

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        if offset >= GATE_BYTES:
            assert self.is_open.wait(DEADLINE_S)
        super().pread(offset, buffer)


@pytest.fixture
def spec(short_tmp: Path) -> ProviderSpec:
    """A provider of one empty disk with a child, whose backup is at `d0.home`."""
    base, top = short_tmp / "base.vhd", short_tmp / "top.avhd"
    create_dynamic(str(base), SIZE_BYTES)
    create_differencing(str(top), str(base))
    made = make_spec(short_tmp, [top, base])
    (disk,) = made.disks
    return dataclasses.replace(made, disks=(dataclasses.replace(disk, backing=str(short_tmp / "d0.home")),))


@pytest.fixture
def content() -> bytes:
    """Data, with a hole of 6 MiB in it."""
    chance = random.Random(3)
    return chance.randbytes(10 * MIB) + bytes(6 * MIB) + chance.randbytes(SIZE_BYTES - 16 * MIB)


@contextlib.contextmanager
def served(spec: ProviderSpec, disk: MemoryDisk) -> Iterator[None]:
    """The backup server, in this process."""
    export = NbdExport(str(spec.disks[0].backing), disk, name="d0", read_only=True)
    export.start()
    try:
        yield
    finally:
        export.stop()


def backing(spec: ProviderSpec) -> dict[str, object] | None:
    control = Control(spec.control)
    try:
        found: dict[str, object] | None = control.ask("status")["disks"][0]["backing"]
        return found
    finally:
        control.close()


def wait_for(spec: ProviderSpec, what: str, wanted: object) -> dict[str, object]:
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        state = backing(spec)
        assert state is not None
        if state[what] == wanted or (callable(wanted) and wanted(state[what])):
            return state
        assert time.monotonic() < deadline_s, state
        time.sleep(0.02)


def read_all(spec: ProviderSpec) -> bytes:
    buffer = bytearray(SIZE_BYTES)
    with NbdClient(str(spec.disks[0].nbd), "d0") as client:
        client.pread(0, buffer)
    return bytes(buffer)


def test_requests_wait_for_the_server_and_all_comes_home(spec: ProviderSpec, content: bytes) -> None:
    with LoneProvider(spec) as provider:
        assert provider.ready["ready"]
        found: list[bytes] = []
        reader = threading.Thread(target=lambda: found.append(read_all(spec)))
        reader.start()
        wait_for(spec, "reason", lambda reason: reason is not None)
        with NbdClient(str(spec.disks[0].nbd), "d0") as client:
            client.pwrite(SIZE_BYTES - MIB, b"new" * 1024)  # needs nothing of the backup
        with served(spec, MemoryDisk(content)):
            reader.join(DEADLINE_S)
            state = wait_for(spec, "is_home", True)
            assert state["reason"] is None
            assert state["total_bytes"] == SIZE_BYTES - 6 * MIB
            control = Control(spec.control)
            assert control.ask("release-backing", disk="d0")["disk"] == "d0"
            assert control.ask("release-backing", disk="d0")["disk"] == "d0"
            control.close()
        wanted = bytearray(content)
        wanted[SIZE_BYTES - MIB : SIZE_BYTES - MIB + 3072] = b"new" * 1024
        assert found == [bytes(wanted)]
        assert backing(spec) is None
        assert read_all(spec) == bytes(wanted)
        assert provider.terminate() == 0
    with open_chain(spec.disks[0].chain[0], read_only=True) as chain:
        buffer = bytearray(SIZE_BYTES)
        chain.pread(0, buffer)
        assert buffer == wanted
        holes = [extent for extent in chain.extents(0, SIZE_BYTES) if extent.kind is ExtentKind.HOLE]
        assert holes == [Extent(10 * MIB, 6 * MIB, ExtentKind.HOLE)], "what is a hole in the backup is one at home"


def read_all_in_vain(spec: ProviderSpec) -> None:
    with contextlib.suppress(UnavailableError):
        read_all(spec)


def test_a_provider_ends_while_requests_wait_and_the_next_one_serves_them(spec: ProviderSpec, content: bytes) -> None:
    with LoneProvider(spec) as provider:
        with NbdClient(str(spec.disks[0].nbd), "d0") as client:
            client.pwrite(MIB, b"flushed" * 512)  # whole sectors: needs nothing of the backup
            client.flush()
        reader = threading.Thread(target=read_all_in_vain, args=(spec,))
        reader.start()
        wait_for(spec, "is_waited_for", True)
        begun_s = time.monotonic()
        assert provider.terminate() == 1, "what waits cannot be finished"
        assert time.monotonic() - begun_s < DEADLINE_S
        reader.join()
    with LoneProvider(spec), served(spec, MemoryDisk(content)):
        wanted = bytearray(content)
        wanted[MIB : MIB + 3584] = b"flushed" * 512
        assert read_all(spec) == bytes(wanted)


def test_a_killed_provider_goes_on_with_what_is_home(spec: ProviderSpec, content: bytes) -> None:
    disk = GatedDisk(content)
    with served(spec, disk):
        with LoneProvider(spec) as provider:
            wait_for(spec, "done_bytes", GATE_BYTES)
            with NbdClient(str(spec.disks[0].nbd), "d0") as client:
                client.pwrite(MIB + 1000, b"x" * 3000)
                client.write_zeroes(2 * MIB, MIB)
                client.flush()
            control = Control(spec.control)
            refused = control.ask("release-backing", disk="d0")
            assert refused["error"]["code"] == "wrong-state"
            control.close()
            provider.kill()
        already = disk.read_bytes
        with LoneProvider(spec):
            disk.is_open.set()
            wait_for(spec, "is_home", True)
            wanted = bytearray(content)
            wanted[MIB + 1000 : MIB + 4000] = b"x" * 3000
            wanted[2 * MIB : 3 * MIB] = bytes(MIB)
            assert read_all(spec) == bytes(wanted)
    assert already >= GATE_BYTES
