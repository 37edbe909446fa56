"""`NbdClient` is a block device, and what it says and does is what the device behind the export says and does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.block_device import BlockDeviceContract
from tests.framework.devices import MemoryDevice

from mullion.base.block import BlockDevice, ExtentKind
from mullion.base.errors import DeniedError, InvalidError, UnavailableError
from mullion.base.units import MIB
from mullion.vhd import create_dynamic, open_chain
from mullion.wire.nbd import NbdClient
from mullion.wire.nbd.export import NbdExport

pytestmark = pytest.mark.contract

SIZE_BYTES = 40 * MIB + 512


@pytest.fixture
def behind() -> MemoryDevice:
    return MemoryDevice(SIZE_BYTES)


@pytest.fixture
def path(behind: MemoryDevice, short_tmp: Path) -> Iterator[str]:
    export = NbdExport(f"{short_tmp}/d.nbd", behind, name="system", read_only=False)
    export.start()
    yield export.path
    export.stop()


@pytest.fixture
def client(path: str) -> Iterator[NbdClient]:
    with NbdClient(path) as connected:
        yield connected


class TestNbdClient(BlockDeviceContract):
    """The client passes the suite of block devices, with memory and with a VHD behind the export."""

    @pytest.fixture(params=["memory", "dynamic VHD"])
    def device(self, request: pytest.FixtureRequest, short_tmp: Path) -> Iterator[NbdClient]:
        served: BlockDevice = MemoryDevice(5 * MIB + 512)
        if request.param == "dynamic VHD":
            create_dynamic(f"{short_tmp}/disk.vhd", 5 * MIB + 512)
            served = open_chain(f"{short_tmp}/disk.vhd")
        export = NbdExport(f"{short_tmp}/d.nbd", served, name="system", read_only=False)
        export.start()
        with NbdClient(export.path) as connected:
            yield connected
        export.stop()
        served.close()


def test_the_size_is_that_of_the_device(client: NbdClient) -> None:
    assert client.size_bytes == SIZE_BYTES
    assert not client.read_only


def test_flush_reaches_the_device(client: NbdClient, behind: MemoryDevice) -> None:
    client.pwrite(0, b"x")
    assert behind.flushes == 0
    client.flush()
    assert behind.flushes == 1


def test_more_than_one_request_may_carry(client: NbdClient, behind: MemoryDevice) -> None:
    content = random.Random(4).randbytes(SIZE_BYTES)
    client.pwrite(0, content)
    assert behind.content == content
    back = bytearray(SIZE_BYTES)
    client.pread(0, back)
    assert back == content


def test_buffers_of_any_shape(client: NbdClient, behind: MemoryDevice) -> None:
    whole = bytearray(b"abcdefgh")
    client.pwrite(0, memoryview(whole).cast("I"))
    client.pread(2, memoryview(whole)[4:6])
    assert whole == b"abcdcdgh"
    client.pread(0, bytearray())
    client.pwrite(0, b"")
    assert behind.content[:8] == b"abcdefgh"


def test_extents_are_those_of_the_device(client: NbdClient, behind: MemoryDevice) -> None:
    assert [extent.kind for extent in client.extents(0, SIZE_BYTES)] == [ExtentKind.HOLE]
    choose = random.Random(5)
    for _ in range(200):
        behind.pwrite(choose.randrange(SIZE_BYTES - 1), b"x")
        behind.write_zeroes(choose.randrange(SIZE_BYTES // 8192) * 8192, 8192)
    for offset, length in ((0, SIZE_BYTES), (12345, 30 * MIB), (SIZE_BYTES - 512, 512), (7, 0)):
        assert list(client.extents(offset, length)) == list(behind.extents(offset, length))


def test_extents_of_a_very_scattered_disk_need_several_requests(client: NbdClient, behind: MemoryDevice) -> None:
    for granule in range(0, SIZE_BYTES // 4096, 2):
        behind.pwrite(granule * 4096, b"x")
    assert list(client.extents(0, SIZE_BYTES)) == list(behind.extents(0, SIZE_BYTES))


@pytest.mark.parametrize(("offset", "length"), [(SIZE_BYTES, 1), (SIZE_BYTES - 1, 2), (-1, 1), (1 << 63, 4096)])
def test_a_request_outside_is_refused_whole(client: NbdClient, behind: MemoryDevice, offset: int, length: int) -> None:
    for attempt in (
        lambda: client.pread(offset, bytearray(length)),
        lambda: client.pwrite(offset, b"x" * length),
        lambda: client.discard(offset, length),
        lambda: client.write_zeroes(offset, length),
        lambda: list(client.extents(offset, length)),
    ):
        with pytest.raises(InvalidError, match="outside"):
            attempt()
    assert behind.calls == []


def test_a_read_only_client_does_not_write(path: str, behind: MemoryDevice) -> None:
    with NbdClient(path, read_only=True) as client:
        assert client.read_only
        for attempt in (
            lambda: client.pwrite(0, b"x"),
            lambda: client.discard(0, 512),
            lambda: client.write_zeroes(0, 512),
        ):
            with pytest.raises(DeniedError):
                attempt()
    assert behind.calls == []


def test_close_flushes_and_may_be_repeated(path: str, behind: MemoryDevice) -> None:
    client = NbdClient(path)
    client.pwrite(0, b"x")
    client.close()
    client.close()
    assert behind.flushes == 1
    with pytest.raises(UnavailableError, match="is closed"):
        client.pread(0, bytearray(1))


def test_nobody_there(path: str) -> None:
    with pytest.raises(UnavailableError, match="No such file"):
        NbdClient(path + "x")
