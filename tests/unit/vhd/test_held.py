"""What may differ between two points of a disk's history, also where they are not above one another."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.unit.vhd import craft
from tests.unit.vhd.crash import content_of
from tests.unit.vhd.test_diff import tower

from mullion.vhd import create_differencing, create_dynamic, open_chain
from mullion.vhd.held import ChangedSince

pytestmark = pytest.mark.unit

BLOCK = craft.BLOCK_BYTES
SIZE = craft.SIZE_BYTES


def dirty_sectors(path: str, since: str, *, seed: int = 1) -> set[int]:
    """What a walk over the disk in random steps says, which must be what one look at all of it says."""
    choose = random.Random(seed)
    with open_chain(path, read_only=True) as chain, open_chain(since, read_only=True) as older:
        changes = ChangedSince(chain, older)
        found: set[int] = set()
        offset = 0
        while offset < chain.size_bytes:
            asked = min(choose.choice([512, 4096, 1000 * 512, chain.size_bytes]), chain.size_bytes - offset)
            runs = list(changes.runs(offset, asked))
            assert sum(length for length, _ in runs) == asked
            assert all(length > 0 for length, _ in runs)
            for length, is_dirty in runs:
                if is_dirty:
                    found |= set(range(offset // 512, (offset + length) // 512))
                offset += length
        whole, position = set(), 0
        for length, is_dirty in changes.runs(0, chain.size_bytes):
            if is_dirty:
                whole |= set(range(position // 512, (position + length) // 512))
            position += length
        assert whole == found
        return found


@pytest.mark.parametrize("blocks", [[BLOCK] * 4, [BLOCK, 512, 4 * BLOCK, 4096]])
def test_an_older_point_of_the_same_chain(blocks: list[int], tmp_path: Path) -> None:
    paths, written = tower(tmp_path, blocks, [SIZE] * 4)
    for since in range(4):
        expected = set[int]().union(*written[since + 1 :])
        assert dirty_sectors(paths[3], paths[since], seed=since) == expected


def test_another_branch_counts_with_what_it_holds_itself(tmp_path: Path) -> None:
    paths, written = tower(tmp_path, [BLOCK] * 3, [SIZE] * 3)
    other = str(tmp_path / "other.vhd")
    create_differencing(other, paths[0])
    with open_chain(other) as chain:
        chain.pwrite(40 * 512, b"o" * 512)
    assert dirty_sectors(paths[2], other) == written[1] | written[2] | {40}
    assert dirty_sectors(other, paths[2]) == written[1] | written[2] | {40}


@pytest.mark.parametrize("sizes", [[SIZE, 2 * SIZE], [2 * SIZE, SIZE]])
def test_a_disk_that_was_resized_differs_past_the_other_end(sizes: list[int], tmp_path: Path) -> None:
    paths, written = tower(tmp_path, [BLOCK] * 2, sizes)
    dirty = dirty_sectors(paths[1], paths[0])
    assert written[1] <= dirty
    old, new = content_of(paths[0]), content_of(paths[1])
    for sector in set(range(len(new) // 512)) - dirty:
        assert new[sector * 512 :][:512] == old[sector * 512 :][:512]
    if sizes[1] > sizes[0]:
        assert set(range(SIZE // 512, 2 * SIZE // 512)) <= dirty


def test_disks_without_a_common_file_differ_everywhere(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.vhd", "b.vhd")]
    for path in paths:
        create_dynamic(path, SIZE, block_bytes=BLOCK)
    assert dirty_sectors(*paths) == set(range(SIZE // 512))
