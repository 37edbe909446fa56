"""`NbdClient` is a block device, and what it says and does is what the device behind the export says and does."""

from __future__ import annotations

import random
import tempfile
import threading
from collections.abc import Iterator

import pytest
from tests.framework.devices import MemoryDevice

from mullion.base.block import BlockDevice, ExtentKind
from mullion.base.errors import DeniedError, InvalidError, UnavailableError
from mullion.base.units import KIB, MIB
from mullion.provider.nbd_export import NbdExport
from mullion.wire.nbd import NbdClient

pytestmark = pytest.mark.contract

SIZE_BYTES = 40 * MIB + 512


@pytest.fixture
def behind() -> MemoryDevice:
    return MemoryDevice(SIZE_BYTES)


@pytest.fixture
def path(behind: MemoryDevice) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="mn-", dir="/tmp") as folder:
        export = NbdExport(f"{folder}/d.nbd", behind, name="system", read_only=False)
        export.start()
        yield export.path
        export.stop()


@pytest.fixture
def client(path: str) -> Iterator[NbdClient]:
    with NbdClient(path) as connected:
        yield connected


def test_it_is_a_block_device(client: NbdClient) -> None:
    assert isinstance(client, BlockDevice)
    assert client.size_bytes == SIZE_BYTES
    assert not client.read_only


def test_random_requests_do_what_a_bytearray_does(client: NbdClient, behind: MemoryDevice) -> None:
    choose = random.Random(3)
    model = bytearray(SIZE_BYTES)
    for _ in range(400):
        offset = choose.randrange(SIZE_BYTES)
        length = min(choose.choice([1, 511, 4096, 65536, 300 * KIB]), SIZE_BYTES - offset)
        action = choose.choice(["read", "write", "zero", "discard", "flush"])
        if action == "read":
            content = bytearray(length)
            client.pread(offset, content)
            assert content == model[offset : offset + length]
        elif action == "write":
            model[offset : offset + length] = payload = choose.randbytes(length)
            client.pwrite(offset, payload)
        elif action == "zero":
            model[offset : offset + length] = bytes(length)
            client.write_zeroes(offset, length)
        elif action == "discard":
            client.discard(offset, length)
            model[offset : offset + length] = behind.content[offset : offset + length]
        else:
            flushes = behind.flushes
            client.flush()
            assert behind.flushes == flushes + 1
    assert behind.content == model


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


def test_threads_may_share_a_client(client: NbdClient, behind: MemoryDevice) -> None:
    def work(index: int) -> None:
        for round_number in range(60):
            block = bytes([index, round_number]) * 2048
            client.pwrite(index * 4096, block)
            back = bytearray(4096)
            client.pread(index * 4096, back)
            wrong.extend([index] if back != block else [])

    wrong: list[int] = []
    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [behind.content[index * 4096] for index in range(6)] == list(range(6))


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
