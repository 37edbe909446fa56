"""What a top takes over beside what is written: the rest of a cell, where the write would leave it in pieces."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.contract.block_device import all_of, read
from tests.unit.vhd.freezing import freeze

import mullion.vhd.chain
from mullion.base.units import KIB, MIB, SECTOR_BYTES
from mullion.vhd import Chain, create_differencing, create_dynamic, open_chain
from mullion.vhd.cells import CELL_BYTES, widened
from mullion.vhd.switching import held_bytes

pytestmark = pytest.mark.unit

PAGE = 4 * KIB
CELL_SECTORS = CELL_BYTES // SECTOR_BYTES


@st.composite
def writes(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """A bitmap, its sectors, the sectors of a write and of a cell."""
    cell = draw(st.sampled_from([1, 2, 8]))
    sectors = cell * draw(st.integers(1, 4))
    first = draw(st.integers(0, sectors - 1))
    end = draw(st.integers(first + 1, sectors))
    return draw(st.integers(0, (1 << sectors) - 1)), sectors, first, end, cell


@given(writes())
def test_widened_takes_what_the_top_lacks_and_never_what_it_has(write: tuple[int, int, int, int, int]) -> None:
    bits, sectors, first, end, cell = write
    held = [bool(bits >> sectors - 1 - sector & 1) for sector in range(sectors)]
    low, high = widened(*write)
    start = first // cell * cell
    if first == start or held[first - 1]:  # enters a cell, or goes on where the top has something
        assert (low, high) == (first, end)
        return
    assert start <= low < first
    assert end <= high <= max(end, start + cell)
    assert not any(held[low:first])
    assert not any(held[end:high])
    assert low == start or held[low - 1]
    assert high >= start + cell or held[high]


@pytest.fixture
def disk(tmp_path: Path) -> tuple[str, bytes]:
    """A child, and what its parent holds: 4 MiB in blocks of 2 MiB."""
    content = os.urandom(4 * MIB)
    parent, child = str(tmp_path / "parent.vhd"), str(tmp_path / "child.vhd")
    create_dynamic(parent, len(content))
    with open_chain(parent) as chain:
        chain.pwrite(0, content)
    create_differencing(child, parent)
    return child, content


def held_of(chain: Chain) -> int:
    return held_bytes(chain.images[0], chain.writer)


def test_a_write_in_the_midst_of_a_cell_takes_all_of_it(disk: tuple[str, bytes], tmp_path: Path) -> None:
    path, content = disk
    wanted = bytearray(content)
    with open_chain(path, pending_path=str(tmp_path / "pending"), fills_cells=True) as chain:
        for offset in (3 * CELL_BYTES + PAGE, 3 * CELL_BYTES + 9 * PAGE + 100, 4 * MIB - 700):
            chain.pwrite(offset, b"new" * 100)
            wanted[offset : offset + 300] = b"new" * 100
        assert held_of(chain) == 2 * CELL_BYTES
        assert all_of(chain) == wanted
        chain.flush()
        chain.pwrite(3 * CELL_BYTES, b"in place")
        wanted[3 * CELL_BYTES :][:8] = wanted[3 * CELL_BYTES : 3 * CELL_BYTES + 8] = b"in place"
        assert chain.writer is not None
        assert not chain.writer.has_pending
    with open_chain(path, read_only=True) as chain:
        assert all_of(chain) == wanted


def test_a_stream_takes_no_more_than_it_writes(disk: tuple[str, bytes]) -> None:
    path, content = disk
    with open_chain(path, fills_cells=True) as chain:
        for offset in range(CELL_BYTES, 3 * CELL_BYTES - PAGE, PAGE):
            chain.pwrite(offset, b"s" * PAGE)
            assert held_of(chain) == offset + PAGE - CELL_BYTES
        assert read(chain, 3 * CELL_BYTES - PAGE, PAGE) == content[3 * CELL_BYTES - PAGE : 3 * CELL_BYTES]


def test_a_cell_that_is_held_in_part_is_filled_up_around_it(disk: tuple[str, bytes]) -> None:
    path, content = disk
    wanted = bytearray(content)
    with open_chain(path) as chain:  # a tool's: no more than is written
        chain.pwrite(5 * PAGE, b"a" * PAGE)
        wanted[5 * PAGE : 6 * PAGE] = b"a" * PAGE
        assert held_of(chain) == PAGE
    with open_chain(path, fills_cells=True) as chain:
        for number in (9, 2):
            chain.pwrite(number * PAGE, b"b" * PAGE)
            wanted[number * PAGE : (number + 1) * PAGE] = b"b" * PAGE
        assert held_of(chain) == CELL_BYTES
        assert all_of(chain) == wanted


def test_threads_that_share_cells_lose_nothing(disk: tuple[str, bytes], tmp_path: Path) -> None:
    """One fills a cell up while others write into it for the first time, or what it holds already."""
    path, content = disk
    wanted = bytearray(content)
    writers = 4
    sectors = [list(range(number, MIB // SECTOR_BYTES, writers)) for number in range(writers)]
    for number, mine in enumerate(sectors):
        Random(number).shuffle(mine)

    def write(number: int) -> None:
        for letter in (b"1", b"2"):
            for sector in sectors[number]:
                chain.pwrite(sector * SECTOR_BYTES, letter * SECTOR_BYTES)
                assert read(chain, sector * SECTOR_BYTES, SECTOR_BYTES) == letter * SECTOR_BYTES

    with open_chain(path, pending_path=str(tmp_path / "pending"), fills_cells=True) as chain:
        with ThreadPoolExecutor(writers) as pool:
            for done in [pool.submit(write, number) for number in range(writers)]:
                done.result()
        wanted[:MIB] = b"2" * MIB
        assert all_of(chain) == wanted
        assert 0 not in chain.direct_write  # it is half of a block
        assert held_of(chain) == MIB


def test_what_cannot_be_read_below_does_not_keep_a_write_from_being_done(disk: tuple[str, bytes]) -> None:
    path, _ = disk
    with open_chain(path, fills_cells=True) as chain:
        chain.pread(0, bytearray(1))
        os.truncate(chain.paths[1], os.path.getsize(chain.paths[1]) - 2 * MIB)
        chain.pwrite(4 * MIB - CELL_BYTES + PAGE, b"w" * PAGE)
        assert read(chain, 4 * MIB - CELL_BYTES + PAGE, PAGE) == b"w" * PAGE
        assert held_of(chain) == PAGE


def test_a_new_top_of_a_running_disk_is_young_for_a_while(
    disk: tuple[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mullion.vhd.chain, "YOUNG_SECTORS", 2 * PAGE // SECTOR_BYTES)
    path, content = disk
    top = str(tmp_path / "top.vhd")
    wanted = bytearray(content)
    with open_chain(path, fills_cells=True) as chain:
        freeze(chain, top)
        for number, held in ((1, 1), (33, 2), (65, 3), (97, 3 + 16), (129, 3 + 2 * 16)):
            chain.pwrite(number * PAGE, b"t" * PAGE)
            wanted[number * PAGE : (number + 1) * PAGE] = b"t" * PAGE
            assert held_of(chain) == held * PAGE
        assert all_of(chain) == wanted
