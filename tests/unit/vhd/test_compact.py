"""A file gets shorter and the disk stays the same, whatever lies where, and whenever it ends."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from tests.unit.vhd import craft
from tests.unit.vhd.crash import content_of, end_everywhere, fill_everywhere
from tests.unit.vhd.power_cut import RecordingIO

from mullion.base.errors import ConflictError
from mullion.base.units import KIB, MIB
from mullion.vhd import create_differencing, create_dynamic, create_fixed, inspect_chain, open_chain
from mullion.vhd.compact import compact
from mullion.vhd.errors import ParentNotFoundError
from mullion.vhd.freemap import FreeMap
from mullion.vhd.resize import resize

pytestmark = pytest.mark.unit

BLOCK = craft.BLOCK_BYTES
SIZE = craft.SIZE_BYTES


def filled(path: str, seed: int, blocks: range, block_bytes: int = BLOCK) -> None:
    """Every block has data, in an order of its own."""
    choose = random.Random(seed)
    order = list(blocks)
    choose.shuffle(order)
    with open_chain(path) as chain:
        for block in order:
            length = min(block_bytes, chain.size_bytes - block * block_bytes)
            chain.pwrite(block * block_bytes, choose.randbytes(length))


def assert_sound(path: str) -> None:
    found = inspect_chain(path).files[0]
    assert (found.warnings, found.damage) == ((), ())


def length_for(path: str, blocks: int) -> int:
    """How long a file of ours is with that many blocks, from where its first block can begin."""
    bat_end = craft.bat_offset(path) + 512
    data = -(-(bat_end + 512) // 4096) * 4096
    end = data - 512 + (blocks - 1) * (BLOCK + 4096) + BLOCK + 512 if blocks else bat_end
    return -(-(end + 512) // 4096) * 4096


@pytest.mark.parametrize("zeroed", [range(0), range(3), range(7, 10), range(0, 10, 2), range(10)])
def test_zero_blocks_go_and_the_file_gets_shorter(zeroed: range, tmp_path: Path) -> None:
    path = str(tmp_path / "d.vhd")
    create_dynamic(path, SIZE, block_bytes=BLOCK)
    filled(path, 1, range(10))
    with open_chain(path) as chain:
        for block in zeroed:
            chain.pwrite(block * BLOCK, bytes(BLOCK))
    before = content_of(path)
    done = compact(path)
    assert content_of(path) == before
    assert_sound(path)
    assert done.blocks_removed == len(zeroed)
    assert [craft.entry(path, block) == 0xFFFF_FFFF for block in range(10)] == [block in zeroed for block in range(10)]
    assert os.path.getsize(path) == done.file_bytes == length_for(path, 10 - len(zeroed))
    again = compact(path)
    assert (again.blocks_removed, again.blocks_moved, again.file_bytes) == (0, 0, done.file_bytes)


def test_what_an_interrupted_write_took_counts(tmp_path: Path) -> None:
    path = str(tmp_path / "disk.vhd")
    create_dynamic(path, 64 * MIB)
    chain = open_chain(path)
    chain.pwrite(0, bytes(512))
    chain.abandon()
    taken = os.path.getsize(path)
    done = compact(path)
    assert (done.old_file_bytes, done.file_bytes) == (taken, os.path.getsize(path))
    assert done.file_bytes < taken - 32 * MIB


def test_data_stays_where_it_can_be_written(tmp_path: Path) -> None:
    path = str(tmp_path / "d.vhd")
    create_dynamic(path, SIZE, block_bytes=BLOCK)
    filled(path, 2, range(10))
    with open_chain(path) as chain:
        chain.write_zeroes(2 * BLOCK, 4 * BLOCK)
    compact(path)
    expected = bytearray(content_of(path))
    with open_chain(path) as chain:
        chain.pwrite(3 * BLOCK + 100, b"new")
    expected[3 * BLOCK + 100 : 3 * BLOCK + 103] = b"new"
    assert content_of(path) == expected
    assert_sound(path)


def test_what_lies_behind_the_end_of_the_disk_does_not_keep_a_block(tmp_path: Path) -> None:
    path = str(tmp_path / "d.vhd")
    create_dynamic(path, BLOCK + 512, block_bytes=BLOCK)
    with open_chain(path) as chain:
        chain.pwrite(BLOCK, bytes(512))
    craft.patch(path, craft.entry(path, 1) * 512 + 512 + 512, b"behind the end")
    assert compact(path).blocks_removed == 1


def test_a_block_of_zeros_keeps_hiding_the_parent(tmp_path: Path) -> None:
    path = craft.make(tmp_path, "differencing")
    with open_chain(path) as chain:
        chain.pwrite(0, bytes(2 * BLOCK))
        chain.pwrite(5 * BLOCK, bytes(BLOCK))
    before = content_of(path)
    assert compact(path).blocks_removed == 0
    assert content_of(path) == before


def test_a_block_with_a_clear_bitmap_goes(tmp_path: Path) -> None:
    path = craft.make(tmp_path, "differencing")
    craft.patch(path, craft.entry(path, 4) * 512, bytes(4))
    before = content_of(path)
    assert compact(path).blocks_removed == 1
    assert content_of(path) == before


def test_against_the_parent_what_reads_the_same_goes(tmp_path: Path) -> None:
    path = craft.make(tmp_path, "differencing")
    with open_chain(path) as chain:
        chain.pwrite(4 * BLOCK + 1024, b"p" * 4096)
        chain.pwrite(5 * BLOCK, bytes(BLOCK))
    before = content_of(path)
    assert compact(path, against_parent=True).blocks_removed == 2
    assert content_of(path) == before
    assert_sound(path)


def test_the_parent_is_only_needed_to_compare_with_it(tmp_path: Path) -> None:
    path = craft.make(tmp_path, "differencing")
    (tmp_path / "parent.vhd").rename(tmp_path / "gone.vhd")
    with pytest.raises(ParentNotFoundError):
        compact(path, against_parent=True)
    compact(path)
    (tmp_path / "gone.vhd").rename(tmp_path / "parent.vhd")
    assert_sound(path)


def test_free_ranges_count_as_zeros(tmp_path: Path) -> None:
    path = str(tmp_path / "d.vhd")
    create_dynamic(path, SIZE, block_bytes=BLOCK)
    filled(path, 3, range(10))
    before = content_of(path)
    free = [(4 * BLOCK, BLOCK), (0, 2 * BLOCK), (7 * BLOCK, 512), (7 * BLOCK + 512, BLOCK - 513), (2 * BLOCK, 100)]
    assert compact(path, free=free).blocks_removed == 3
    expected = bytes(2 * BLOCK) + before[2 * BLOCK : 4 * BLOCK] + bytes(BLOCK) + before[5 * BLOCK :]
    assert content_of(path) == expected


def test_free_sectors_of_a_child_let_a_block_go(tmp_path: Path) -> None:
    path = craft.make(tmp_path, "differencing")
    assert compact(path, free=[(4 * BLOCK + 1024, 4096), (9 * BLOCK + 1025, 4096)]).blocks_removed == 1
    assert craft.entry(path, 4) == 0xFFFF_FFFF


def test_free_ranges_of_a_parent_need_force(tmp_path: Path) -> None:
    craft.make(tmp_path, "differencing")
    parent = str(tmp_path / "parent.vhd")
    with pytest.raises(ConflictError, match="free space must not change"):
        compact(parent, free=[(0, BLOCK)])
    before = content_of(str(tmp_path / "differencing.vhd"))
    compact(parent)
    assert content_of(str(tmp_path / "differencing.vhd")) == before


def test_a_fixed_disk_gets_holes_and_keeps_its_length(tmp_path: Path) -> None:
    path = str(tmp_path / "f.vhd")
    create_fixed(path, 4 * MIB)
    with open_chain(path) as chain:
        chain.pwrite(0, bytes(2 * MIB) + b"x" * MIB)
    before = content_of(path)
    done = compact(path)
    assert content_of(path) == before
    assert done.file_bytes == done.old_file_bytes == 4 * MIB + 512
    assert done.room_bytes <= MIB + 16 * KIB < 3 * MIB <= done.old_room_bytes
    compact(path, free=[(2 * MIB + 5, 64 * KIB)])
    changed = content_of(path)
    assert not any(changed[2 * MIB + 4096 : 2 * MIB + 64 * KIB])
    assert changed[: 2 * MIB + 4096] == before[: 2 * MIB + 4096]
    assert changed[2 * MIB + 64 * KIB :] == before[2 * MIB + 64 * KIB :]


def test_a_table_behind_the_blocks_comes_down(tmp_path: Path) -> None:
    path = str(tmp_path / "d.vhd")
    create_dynamic(path, SIZE, block_bytes=BLOCK)
    filled(path, 4, range(10))
    resize(path, 1000 * BLOCK)
    filled(path, 5, range(10, 16))
    with open_chain(path) as chain:
        chain.pwrite(0, bytes(8 * BLOCK))
    before = content_of(path)
    far = craft.bat_offset(path)
    done = compact(path)
    assert content_of(path) == before
    assert craft.bat_offset(path) < far
    assert_sound(path)
    assert done.file_bytes < 8 * (BLOCK + 4096) + 4 * 1000 + 16 * KIB + BLOCK
    assert compact(path).file_bytes == done.file_bytes


def test_blocks_that_another_maker_put_close_together_stay_so(tmp_path: Path) -> None:
    """Spans of a block and its bitmap without gaps, as QEMU writes them."""
    path = str(tmp_path / "d.vhd")
    create_dynamic(path, SIZE, block_bytes=BLOCK)
    content = random.Random(6).randbytes(SIZE)
    footer = craft.peek(path, 0, 512)
    with open(path, "r+b") as file:
        for block in range(10):
            file.seek(2048 + block * (BLOCK + 512))
            file.write(b"\xff" * 512 + (bytes(BLOCK) if block in (1, 4) else content[block * BLOCK :][:BLOCK]))
        file.write(footer)
        file.truncate()
    for block in range(10):
        craft.set_entry(path, block, (2048 + block * (BLOCK + 512)) // 512)
    before = content_of(path)
    done = compact(path)
    assert (done.blocks_removed, done.blocks_moved) == (2, 2)
    assert content_of(path) == before
    assert done.file_bytes <= 2048 + 8 * (BLOCK + 512) + 4096


@pytest.mark.parametrize("kind", ["dynamic", "differencing", "grown"])
def test_an_end_at_any_instant_costs_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mullion.vhd.compact._BATCH_BLOCKS", 2)
    folder = tmp_path / "disks"
    folder.mkdir()
    name = "differencing.vhd" if kind == "differencing" else "d.vhd"
    path = str(folder / name)
    if kind == "differencing":
        create_dynamic(str(folder / "parent.vhd"), SIZE, block_bytes=BLOCK)
        filled(str(folder / "parent.vhd"), 8, range(10))
        create_differencing(path, str(folder / "parent.vhd"))
    else:
        create_dynamic(path, SIZE, block_bytes=BLOCK)
    filled(path, 7, range(10))
    if kind == "grown":
        resize(path, 200 * BLOCK)
        filled(path, 9, range(10, 12))
    with open_chain(path) as chain:
        for block in (0, 3, 4):
            chain.pwrite(block * BLOCK, bytes(BLOCK))
    if kind == "differencing":
        for block in (0, 3, 4, 6):
            craft.patch(path, craft.entry(path, block) * 512, bytes(512))
    before = content_of(path)

    def check(found: str, is_over: bool) -> None:
        assert content_of(found) == before
        if is_over:
            assert_sound(found)
            assert compact(found).blocks_moved == 0

    def operate(found: str, recording: RecordingIO) -> None:
        compact(found, file_io=recording)

    assert end_everywhere(folder, name, operate, check) > 10
    fill_everywhere(folder, name, operate, check)


def test_a_free_map_merges_and_cuts() -> None:
    free = FreeMap([(50, 10), (0, 10), (5, 10), (60, 5), (90, 0), (200, 50)])
    assert list(free.free(0, 300)) == [(0, 15), (50, 15), (200, 50)]
    assert list(free.used(0, 300)) == [(15, 35), (65, 135), (250, 50)]
    assert list(free.used(10, 45)) == [(15, 35)]
    assert list(free.used(52, 5)) == []
    assert list(free.free(14, 1)) == [(14, 1)]
    assert list(free.used(300, 10)) == [(300, 10)]
    assert list(FreeMap([]).used(5, 7)) == [(5, 7)]
