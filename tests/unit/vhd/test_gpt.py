"""The backup of a GPT follows its disk's end; at every instant one copy is valid; what is not sound is left alone."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.framework.devices import MemoryDevice
from tests.unit.vhd.crash import content_of, end_everywhere
from tests.unit.vhd.power_cut import RecordingIO
from tests.unit.vhd.test_partitions import put_gpt, put_mbr

from mullion.base.errors import InvalidError
from mullion.base.units import KIB, MIB, SECTOR_BYTES
from mullion.vhd import create_differencing, create_dynamic, create_fixed, open_chain
from mullion.vhd.gpt import GptError, load_gpt, move_backup
from mullion.vhd.partitions import GptHeader, find_gpt
from mullion.vhd.resize import resize

pytestmark = pytest.mark.unit

PARTITIONS = ((34, 500, "system"), (600, 1500, "data"))
OLD = MIB


class Disk(MemoryDevice):
    """A device of the old size inside a larger one, which counts its changes and can end at any of them."""

    fuse = -1

    def pwrite(self, offset: int, buffer: bytes | bytearray | memoryview) -> None:
        if self.fuse == 0:
            raise InterruptedError
        self.fuse -= 1
        super().pwrite(offset, buffer)

    def write_zeroes(self, offset: int, length: int) -> None:
        if self.fuse == 0:
            raise InterruptedError
        self.fuse -= 1
        super().write_zeroes(offset, length)


def disk_of(old_bytes: int, size_bytes: int) -> Disk:
    """A disk that had a GPT when it was shorter."""
    small = MemoryDevice(old_bytes)
    put_gpt(small, *PARTITIONS)
    content = bytearray(old_bytes)
    small.pread(0, content)
    disk = Disk(size_bytes)
    disk.pwrite(0, content)
    return disk


def sectors(device: MemoryDevice, first: int, count: int = 1) -> bytes:
    raw = bytearray(count * SECTOR_BYTES)
    device.pread(first * SECTOR_BYTES, raw)
    return bytes(raw)


def assert_moved(device: MemoryDevice, size_bytes: int) -> None:
    last = size_bytes // SECTOR_BYTES - 1
    primary, backup = GptHeader.unpack(sectors(device, 1)), GptHeader.unpack(sectors(device, last))
    assert (primary.my_sector, primary.other_sector, primary.entries_sector) == (1, last, 2)
    assert (backup.my_sector, backup.other_sector, backup.entries_sector) == (last, 1, last - 32)
    assert primary.last_usable_sector == backup.last_usable_sector == last - 33
    for header in (primary, backup):
        assert zlib.crc32(sectors(device, header.entries_sector, 32)) == header.entries_crc
    assert sectors(device, 2, 32) == sectors(device, last - 32, 32)
    gpt = load_gpt(device)
    assert gpt is not None
    assert gpt.backup is not None


@pytest.mark.parametrize("more", [512, 20 * 512, 33 * 512, MIB, 64 * MIB])
def test_the_backup_moves_to_the_new_end(more: int) -> None:
    disk = disk_of(OLD, OLD + more)
    gpt = load_gpt(disk)
    assert gpt is not None
    assert move_backup(disk, gpt, OLD + more)
    assert_moved(disk, OLD + more)
    assert load_gpt(disk) is not None
    if more > 33 * 512:
        assert not any(sectors(disk, OLD // 512 - 33, 33))
    assert struct.unpack("<II", sectors(disk, 0)[446 + 8 : 446 + 16]) == (1, (OLD + more) // 512 - 1)
    again = load_gpt(disk)
    assert again is not None
    assert not move_backup(disk, again, OLD + more)


@pytest.mark.parametrize("more", [512, MIB])
def test_one_copy_is_valid_at_every_instant(more: int) -> None:
    for fuse in range(20):
        disk = disk_of(OLD, OLD + more)
        gpt = load_gpt(disk)
        assert gpt is not None
        disk.fuse = fuse
        try:
            move_backup(disk, gpt, OLD + more)
        except InterruptedError:
            is_over = False
        else:
            is_over = True
        disk.fuse = -1
        found = find_gpt(disk)
        assert found is not None
        assert found[0].my_sector == 1
        assert found[1] == gpt.entries
        again = load_gpt(disk)
        assert again is not None
        move_backup(disk, again, OLD + more)
        assert_moved(disk, OLD + more)
        if is_over:
            return
    pytest.fail("it does not end")


def _spoil(offset: int, content: bytes) -> Callable[[MemoryDevice], None]:
    return lambda device: device.pwrite(offset, content)


def _rewrite(sector: int, **fields: object) -> Callable[[MemoryDevice], None]:
    def change(device: MemoryDevice) -> None:
        header = replace(GptHeader.unpack(sectors(device, sector)), **fields)  # type: ignore[arg-type]
        device.pwrite(sector * SECTOR_BYTES, header.pack().ljust(SECTOR_BYTES, b"\0"))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_spoil(512, bytes(512)), "primary header is missing"),
        (_spoil(512 + 40, b"\x99"), "checksum is wrong"),
        (_spoil(1024 + 5, b"\x99"), "entries' checksum is wrong"),
        (_rewrite(1, my_sector=7), "says that it is in sector 7"),
        (_rewrite(1, other_sector=1 << 40), "not on the disk"),
        (_rewrite(1, other_sector=100), "not behind the usable sectors"),
        (_rewrite(1, first_usable_sector=10), "reach into the usable sectors"),
        (_rewrite(1, last_usable_sector=1000), "partition 2 is not inside"),
        (_rewrite(1, entries_sector=1 << 50), "not on the disk"),
        (_rewrite(1, entry_count=1 << 30), "more than are supported"),
        (_rewrite(1, entry_bytes=1), "not supported"),
        (_rewrite(1, entry_count=0), "not supported"),
        (_rewrite(OLD // 512 - 1, disk_id=b"x" * 16), "differ"),
    ],
)
def test_what_is_not_sound_is_refused_and_not_changed(spoil: Callable[[MemoryDevice], None], message: str) -> None:
    disk = disk_of(OLD, OLD + MIB)
    spoil(disk)
    with pytest.raises(GptError, match=message):
        load_gpt(disk)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 34 * 512 - 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6))
def test_any_bytes_are_refused_or_moved(changes: list[tuple[int, bytes]]) -> None:
    disk = disk_of(OLD, OLD + MIB)
    for offset, content in changes:
        disk.pwrite(offset, content[: 34 * 512 - offset])
    try:
        gpt = load_gpt(disk)
    except GptError:
        return
    if gpt is not None:
        move_backup(disk, gpt, OLD + MIB)
        assert_moved(disk, OLD + MIB)


def make(path: str, kind: str) -> None:
    """A disk of this kind with a GPT and something in its partitions; a child has the table from its parent."""
    base = path if kind != "differencing" else f"{path}.parent"
    if kind == "fixed":
        create_fixed(base, OLD)
    else:
        create_dynamic(base, OLD, block_bytes=32 * KIB)
    with open_chain(base) as chain:
        small = MemoryDevice(OLD)
        put_gpt(small, *PARTITIONS)
        for first, count in ((0, 34), (OLD // 512 - 33, 33)):
            chain.pwrite(first * 512, sectors(small, first, count))
        chain.pwrite(600 * 512, random.Random(1).randbytes(3000))
    if kind == "differencing":
        create_differencing(path, base)


@pytest.mark.parametrize("kind", ["fixed", "dynamic", "differencing"])
def test_a_disk_with_a_gpt_grows_and_shrinks(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / "d.vhd")
    make(path, kind)
    before = content_of(path)
    for size in (OLD + 4 * MIB, OLD + 4 * MIB + 512, OLD + 2 * MIB, 1534 * 512):
        assert resize(path, size).table == "gpt"
        with open_chain(path, read_only=True) as chain:
            assert chain.size_bytes == size
            assert_moved(chain, size)  # type: ignore[arg-type]
        assert content_of(path)[34 * 512 : 1501 * 512] == before[34 * 512 : 1501 * 512]
    with pytest.raises(InvalidError, match=f"in use up to byte {1534 * 512}"):
        resize(path, 1533 * 512)
    if kind == "differencing":
        assert content_of(f"{path}.parent") == before


def test_a_gpt_that_is_not_sound_stays_and_the_disk_grows(tmp_path: Path) -> None:
    path = str(tmp_path / "d.vhd")
    make(path, "dynamic")
    with open_chain(path) as chain:
        chain.pwrite(1024 + 3, b"\x77")
    before = content_of(path)
    done = resize(path, OLD + MIB)
    assert (done.table, done.table_problem) == ("gpt-left", "its entries' checksum is wrong")
    assert content_of(path) == before + bytes(MIB)
    with pytest.raises(InvalidError, match="not sound"):
        resize(path, OLD)


def test_a_parent_that_is_forced_to_grow_keeps_its_table(tmp_path: Path) -> None:
    path = str(tmp_path / "d.vhd")
    make(path, "dynamic")
    create_differencing(str(tmp_path / "c.vhd"), path)
    before = content_of(path)
    assert resize(path, OLD + MIB, force=True).table == "gpt-left"
    assert content_of(path) == before + bytes(MIB)


def test_an_mbr_needs_nothing_and_its_partitions_are_not_cut(tmp_path: Path) -> None:
    path = str(tmp_path / "d.vhd")
    create_dynamic(path, OLD)
    with open_chain(path) as chain:
        put_mbr(chain, 0, (0x83, 64, 1600))  # type: ignore[arg-type]
    assert resize(path, OLD + MIB).table == "mbr"
    with pytest.raises(InvalidError, match=f"in use up to byte {1664 * 512}"):
        resize(path, MIB // 2)
    assert resize(path, 1664 * 512).table == "mbr"


@pytest.mark.parametrize("size", [OLD + MIB, 1600 * 512])
def test_a_resize_that_ends_at_any_instant_leaves_a_valid_table(size: int, tmp_path: Path) -> None:
    folder = tmp_path / "disks"
    folder.mkdir()
    make(str(folder / "d.vhd"), "dynamic")
    before = content_of(str(folder / "d.vhd"))

    def check(path: str, is_over: bool) -> None:
        with open_chain(path, read_only=True) as chain:
            assert chain.size_bytes == size if is_over else chain.size_bytes in (OLD, size)
            gpt = load_gpt(chain)
            assert gpt is not None
            if is_over:
                assert_moved(chain, size)  # type: ignore[arg-type]
        part = slice(34 * 512, 1501 * 512)
        assert content_of(path)[part] == before[part]

    def operate(path: str, recording: RecordingIO) -> None:
        resize(path, size, file_io=recording)

    assert end_everywhere(folder, "d.vhd", operate, check) > 15
