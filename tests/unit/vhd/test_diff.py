"""What changed between two points of a chain, and where two disks differ: exact to the sector."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from tests.unit.vhd import craft
from tests.unit.vhd.crash import content_of
from tests.unit.vhd.test_rebase import scribble

from mullion.base.errors import InvalidError
from mullion.vhd import create_differencing, create_dynamic, create_fixed, open_chain
from mullion.vhd.compare import Comparison
from mullion.vhd.diff import Change, changed, differences

pytestmark = pytest.mark.unit

BLOCK = craft.BLOCK_BYTES
SIZE = craft.SIZE_BYTES


def sectors_of(changes: Iterable[Change]) -> set[int]:
    """The sectors that are named; each once, ascending, whole."""
    found: list[int] = []
    for offset, length, _ in changes:
        assert offset % 512 == 0
        assert length > 0
        assert length % 512 == 0
        found += range(offset // 512, (offset + length) // 512)
    assert found == sorted(set(found))
    return set(found)


def assert_zeros(changes: Iterable[Change], content: bytes) -> None:
    for offset, length, zero in changes:
        if zero:
            assert not any(content[offset : offset + length])


def tower(folder: Path, blocks: list[int], sizes: list[int]) -> tuple[list[str], list[set[int]]]:
    """A chain, base first, and the sectors that were written into each layer."""
    paths: list[str] = []
    written: list[set[int]] = []
    choose = random.Random(7)
    for number, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
        path = str(folder / f"{number}.vhd")
        if number:
            create_differencing(path, paths[-1], size_bytes=size, block_bytes=block)
        else:
            create_dynamic(path, size, block_bytes=block)
        touched: set[int] = set()
        with open_chain(path) as chain:
            for _ in range(10):
                offset = choose.randrange(size)
                length = min(choose.choice([1, 512, 700, 9000]), size - offset)
                chain.pwrite(offset, choose.randbytes(length))
                touched |= set(range(offset // 512, -(-(offset + length) // 512)))
        paths.append(path)
        written.append(touched)
    return paths, written


@pytest.mark.parametrize("blocks", [[BLOCK] * 4, [BLOCK, 512, 4 * BLOCK, 4096]])
def test_between_any_two_points_of_a_chain(blocks: list[int], tmp_path: Path) -> None:
    paths, written = tower(tmp_path, blocks, [SIZE] * 4)
    content = content_of(paths[3])
    for since in range(4):
        found = list(changed(paths[3], since=paths[since]))
        assert sectors_of(found) == set().union(*written[since + 1 :])
        assert_zeros(found, content)
    assert sectors_of(changed(paths[3])) == written[3]


def test_what_a_shorter_layer_hides_has_changed(tmp_path: Path) -> None:
    paths, written = tower(tmp_path, [BLOCK] * 3, [SIZE, 4 * BLOCK, SIZE + BLOCK])
    found = list(changed(paths[2], since=paths[0]))
    hidden = set(range(4 * BLOCK // 512, SIZE // 512))
    assert sectors_of(found) == written[2] | written[1] | hidden
    assert_zeros(found, content_of(paths[2]))


def test_zeros_that_were_written_hide_and_are_named(tmp_path: Path) -> None:
    path = craft.make(tmp_path, "differencing")
    with open_chain(path) as chain:
        chain.write_zeroes(4 * BLOCK, BLOCK)
    found = list(changed(path, since=str(tmp_path / "parent.vhd")))
    assert set(range(4 * BLOCK // 512, 5 * BLOCK // 512)) <= sectors_of(found)
    assert any(change.zero for change in found)


def test_disks_without_a_parent(tmp_path: Path) -> None:
    dynamic = craft.make(tmp_path, "dynamic")
    assert sectors_of(changed(dynamic)) == {
        sector for block in (0, 4, 9) for sector in range(block * BLOCK // 512, (block + 1) * BLOCK // 512)
    }
    fixed = craft.make(tmp_path, "fixed")
    found = list(changed(fixed))
    assert sectors_of(found) == set(range(SIZE // 512))
    assert any(change.zero for change in found)


def test_a_stranger_is_not_below(tmp_path: Path) -> None:
    path = craft.make(tmp_path, "differencing")
    craft.make(tmp_path, "fixed")
    for since in ("fixed.vhd", "nothing.vhd"):
        with pytest.raises(InvalidError, match="is not in the chain"):
            list(changed(path, since=str(tmp_path / since)))
    assert list(changed(path, since=path)) == []


def different(one: bytes, two: bytes) -> set[int]:
    size = max(len(one), len(two))
    one, two = one.ljust(size, b"\0"), two.ljust(size, b"\0")
    return {sector for sector in range(size // 512) if one[sector * 512 :][:512] != two[sector * 512 :][:512]}


@pytest.mark.parametrize("kind", ["fixed", "dynamic", "siblings", "shorter"])
def test_contents_are_compared(kind: str, tmp_path: Path) -> None:
    one, two = str(tmp_path / "one.vhd"), str(tmp_path / "two.vhd")
    if kind == "fixed":
        create_fixed(one, SIZE)
        create_fixed(two, SIZE)
    elif kind == "siblings":
        base = craft.make(tmp_path, "dynamic")
        create_differencing(one, base)
        create_differencing(two, base, block_bytes=512)
    else:
        create_dynamic(one, SIZE, block_bytes=BLOCK)
        create_dynamic(two, SIZE - (5 * 512 if kind == "shorter" else 0), block_bytes=2048)
    scribble(one, 1)
    scribble(two, 2)
    for first, second in ((one, two), (two, one)):
        found = list(differences(first, second))
        assert sectors_of(found) == different(content_of(first), content_of(second))
        assert_zeros(found, content_of(second).ljust(SIZE, b"\0"))
    assert list(differences(one, one)) == []


def test_what_both_have_from_one_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = craft.make(tmp_path, "dynamic")
    scribble(base, 5, rounds=40)
    one, two = str(tmp_path / "one.vhd"), str(tmp_path / "two.vhd")
    create_differencing(one, base)
    create_differencing(two, base)
    with open_chain(two) as chain:
        chain.pwrite(4 * BLOCK, b"t" * 1024)
    read: list[tuple[int, int]] = []
    original = Comparison.read

    def recording(self: Comparison, number: int, offset: int, length: int) -> bytearray:
        read.append((offset, length))
        return original(self, number, offset, length)

    monkeypatch.setattr(Comparison, "read", recording)
    assert sectors_of(differences(one, two)) == {4 * BLOCK // 512, 4 * BLOCK // 512 + 1}
    assert read == [(4 * BLOCK, 1024)] * 2
