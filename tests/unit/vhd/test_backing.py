"""A chain over a backing: what no file has is read there, comes home, and never hides what was written."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.unit.vhd.power_cut import KilledError, RecordingIO

from mullion.base.block import ExtentKind
from mullion.base.units import KIB, MIB, SECTOR_BYTES
from mullion.vhd import Chain, create_differencing, create_dynamic, open_chain

pytestmark = pytest.mark.unit

SIZE_BYTES = 5 * MIB + 3 * SECTOR_BYTES


class Content:
    """What a backup's disk would give; shorter than the disk, as after a growth."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            buffer[:] = self.content[offset : offset + len(buffer)].ljust(len(buffer), b"\0")
            offset += len(buffer)


@pytest.fixture
def content() -> bytes:
    return random.Random(7).randbytes(5 * MIB)


@pytest.fixture
def top(tmp_path: Path) -> str:
    """A differencing disk over an empty one."""
    create_dynamic(str(tmp_path / "base.vhd"), SIZE_BYTES)
    create_differencing(str(tmp_path / "top.avhd"), str(tmp_path / "base.vhd"))
    return str(tmp_path / "top.avhd")


def read(chain: Chain, offset: int = 0, length: int = SIZE_BYTES) -> bytes:
    buffer = bytearray(length)
    chain.pread(offset, buffer)
    return bytes(buffer)


def bring_home(chain: Chain, content: bytes) -> None:
    for offset in range(0, len(content), 64 * KIB):
        chain.fill(offset, content[offset : offset + 64 * KIB])


def test_what_no_file_has_is_read_from_the_backing(top: str, content: bytes) -> None:
    with open_chain(top) as chain:
        chain.backing = Content(content)
        assert read(chain) == content.ljust(SIZE_BYTES, b"\0")
        assert read(chain, 1_000_001, 77) == content[1_000_001:][:77]
        chain.pwrite(700, b"x" * 100)  # parts of two sectors, which are completed from the backing
        wanted = content[:700] + b"x" * 100 + content[800 : 8 * KIB]
        assert read(chain, 0, 8 * KIB) == wanted
        chain.backing = None
        whole_sectors = wanted[SECTOR_BYTES : 2 * SECTOR_BYTES]
        assert read(chain, 0, 2 * SECTOR_BYTES) == bytes(SECTOR_BYTES) + whole_sectors


def test_nothing_counts_as_a_hole_before_all_is_home(top: str, content: bytes) -> None:
    with open_chain(top) as chain:
        assert {extent.kind for extent in chain.extents(0, SIZE_BYTES)} == {ExtentKind.HOLE}
        chain.backing = Content(content)
        assert {extent.kind for extent in chain.extents(0, SIZE_BYTES)} == {ExtentKind.DATA}


@pytest.mark.parametrize("is_home_first", [False, True])
def test_zeros_stay_zeros(top: str, content: bytes, is_home_first: bool) -> None:
    """What the guest has zeroed or discarded does not show the backup's data again."""
    with open_chain(top) as chain:
        chain.backing = Content(content)
        if is_home_first:
            bring_home(chain, content)
        chain.write_zeroes(MIB - 100, 64 * KIB)
        bring_home(chain, content)
        chain.backing = None
        assert read(chain, MIB - 100, 64 * KIB) == bytes(64 * KIB)
        assert read(chain, 0, MIB - 100) == content[: MIB - 100]


def test_any_order_of_writes_and_homecoming_is_right(top: str, content: bytes) -> None:
    """And what came home is durable after a flush: it is there when the chain is opened without the backing."""
    chance = random.Random(11)
    wanted = bytearray(content.ljust(SIZE_BYTES, b"\0"))
    pieces = [(offset, min(64 * KIB, len(content) - offset)) for offset in range(0, len(content), 64 * KIB)]
    chance.shuffle(pieces)
    with open_chain(top) as chain:
        chain.backing = Content(content)
        for offset, length in pieces:
            for _ in range(3):
                at, count = chance.randrange(SIZE_BYTES), chance.choice((1, 512, 4096, 70_000))
                count = min(count, SIZE_BYTES - at)
                if chance.random() < 0.3:
                    chain.write_zeroes(at, count)
                    wanted[at : at + count] = bytes(count)
                else:
                    data = os.urandom(count)
                    chain.pwrite(at, data)
                    wanted[at : at + count] = data
            if chain.lacks(offset, length):
                chain.fill(offset, content[offset : offset + length])
            assert not chain.lacks(offset, length)
            chain.fill(offset, content[offset : offset + length])  # again: nothing changes
        assert read(chain) == bytes(wanted)
        chain.flush()
        chain.abandon()
    with open_chain(top) as chain:
        assert read(chain) == bytes(wanted)


def test_a_power_cut_at_any_change_shows_what_was_flushed_and_never_less_than_the_backup(
    tmp_path: Path, content: bytes
) -> None:
    """What came home is either there or still asked of the backing; what was written and not flushed, either or."""
    fuse = 0
    while True:
        fuse += 1
        folder = tmp_path / str(fuse)
        folder.mkdir()
        create_dynamic(str(folder / "base.vhd"), SIZE_BYTES)
        create_differencing(str(folder / "top.avhd"), str(folder / "base.vhd"))
        file_io = RecordingIO()
        allowed = [{content[at : at + SECTOR_BYTES]} for at in range(0, 64 * KIB, SECTOR_BYTES)]
        chain = open_chain(str(folder / "top.avhd"), file_io=file_io)
        chain.backing = Content(content)
        file_io.fuse = fuse
        try:
            _live(chain, content, allowed, random.Random(fuse % 4))
            return
        except KilledError:
            chain.abandon()
            file_io.cut_power(random.Random(fuse))
        with open_chain(str(folder / "top.avhd")) as again:
            again.backing = Content(content)
            for number, values in enumerate(allowed):
                assert read(again, number * SECTOR_BYTES, SECTOR_BYTES) in values, (fuse, number)
        shutil.rmtree(folder)


def _live(chain: Chain, content: bytes, allowed: list[set[bytes]], chance: random.Random) -> None:
    """Writes, homecoming and flushes in the first 64 KiB; `allowed` is what each sector may hold after a power cut."""
    for _ in range(12):
        first = chance.randrange(len(allowed))
        count = chance.randrange(1, min(20, len(allowed) - first + 1))
        match chance.randrange(3):
            case 0:
                data = [chance.randbytes(SECTOR_BYTES) for _ in range(count)]
                for number, sector in enumerate(data, first):
                    allowed[number].add(sector)
                chain.pwrite(first * SECTOR_BYTES, b"".join(data))
            case 1:
                offset = first * SECTOR_BYTES
                chain.fill(offset, content[offset : offset + count * SECTOR_BYTES])
            case 2:
                chain.flush()
                for number, values in enumerate(allowed):
                    values.intersection_update({read(chain, number * SECTOR_BYTES, SECTOR_BYTES)})
    chain.close()
