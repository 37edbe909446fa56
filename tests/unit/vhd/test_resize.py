"""A disk gets another size: what it holds, what its file is like afterwards, and what an end at any instant leaves."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from tests.unit.vhd import craft
from tests.unit.vhd.crash import content_of, end_everywhere, fill_everywhere
from tests.unit.vhd.power_cut import RecordingIO

from mullion.base.errors import ConflictError, InvalidError
from mullion.base.units import GIB, KIB, MIB
from mullion.vhd import create_differencing, create_dynamic, create_fixed, inspect_chain, open_chain
from mullion.vhd.errors import DiskBusyError, NotVhdError, VhdError
from mullion.vhd.geometry import Geometry
from mullion.vhd.layout import Footer
from mullion.vhd.resize import resize

pytestmark = pytest.mark.unit

BLOCK = craft.BLOCK_BYTES
SIZE = craft.SIZE_BYTES
KINDS = ("fixed", "dynamic", "differencing")


def assert_sound(path: str, size_bytes: int) -> None:
    """One size in both footers, an exact BAT, nothing odd, the header where everybody has it."""
    found = inspect_chain(path).files[0]
    assert (found.size_bytes, found.warnings, found.damage) == (size_bytes, (), ())
    footer = Footer.unpack(craft.peek(path, -512, 512))
    geometry = Geometry.for_size(size_bytes)
    assert footer.current_size_bytes == size_bytes
    assert (footer.cylinders, footer.heads, footer.sectors_per_track) == geometry
    if found.block_bytes is not None:
        assert craft.peek(path, 0, 512) == craft.peek(path, -512, 512)
        assert footer.data_offset == 512
        assert int.from_bytes(craft.peek(path, 512 + 28, 4), "big") == -(-size_bytes // found.block_bytes)
    else:
        assert os.path.getsize(path) == size_bytes + 512


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [512, BLOCK, 130 * BLOCK, 3000 * BLOCK])
def test_grow(kind: str, more: int, tmp_path: Path) -> None:
    path = craft.make(tmp_path, kind)
    before = content_of(path)
    original = Footer.unpack(craft.peek(path, -512, 512)).original_size_bytes
    done = resize(path, SIZE + more)
    assert (done.old_bytes, done.size_bytes, done.table) == (SIZE, SIZE + more, "none")
    assert_sound(path, SIZE + more)
    assert content_of(path) == before + bytes(more)
    assert Footer.unpack(craft.peek(path, -512, 512)).original_size_bytes == original
    with open_chain(path) as chain:
        chain.pwrite(SIZE + more - 512, b"e" * 512)
    assert_sound(path, SIZE + more)
    assert content_of(path) == before + bytes(more - 512) + b"e" * 512


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size_bytes", [SIZE - 512, 9 * BLOCK + 8 * KIB, 9 * BLOCK + 5120])
def test_shrink(kind: str, size_bytes: int, tmp_path: Path) -> None:
    path = craft.make(tmp_path, kind)
    before = content_of(path)
    resize(path, size_bytes)
    assert_sound(path, size_bytes)
    assert content_of(path) == before[:size_bytes]


@pytest.mark.parametrize("kind", KINDS)
def test_shrink_drops_blocks_of_zeros_and_gives_their_room_back(kind: str, tmp_path: Path) -> None:
    path = craft.make(tmp_path, kind)
    with open_chain(path) as chain:
        chain.pwrite(9 * BLOCK, bytes(BLOCK))  # hides what the parent has
    before = content_of(path)
    resize(path, 5 * BLOCK)
    assert_sound(path, 5 * BLOCK)
    assert content_of(path) == before[: 5 * BLOCK]
    resize(path, SIZE)
    assert_sound(path, SIZE)
    if kind != "differencing":  # there the parent's old content shows again
        assert content_of(path) == before


@pytest.mark.parametrize("kind", KINDS)
def test_shrink_is_refused_where_data_is_and_says_how_far_it_can(kind: str, tmp_path: Path) -> None:
    path = craft.make(tmp_path, kind)
    raw = Path(path).read_bytes()
    end = 9 * BLOCK + 1024 + 4096
    for size_bytes in (end - 512, 4 * BLOCK, 512):
        with pytest.raises(InvalidError, match=f"in use up to byte {end}"):
            resize(path, size_bytes)
    assert Path(path).read_bytes() == raw
    resize(path, end)
    assert_sound(path, end)


@pytest.mark.parametrize("size_bytes", [0, -512, 1000, 2041 * GIB])
def test_impossible_sizes_are_refused(size_bytes: int, tmp_path: Path) -> None:
    path = craft.make(tmp_path, "dynamic")
    with pytest.raises(InvalidError):
        resize(path, size_bytes)


def test_more_blocks_than_a_table_can_have_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "d.vhd")
    create_dynamic(path, MIB, block_bytes=512)
    with pytest.raises(InvalidError, match="at most"):
        resize(path, 3 * GIB)


def test_a_foreign_file_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "x.vhd"
    path.write_bytes(b"x" * 5000)
    with pytest.raises(NotVhdError):
        resize(str(path), MIB)
    assert path.read_bytes() == b"x" * 5000


def test_a_busy_disk_is_refused(tmp_path: Path) -> None:
    path = craft.make(tmp_path, "dynamic")
    with open_chain(path, holder="partition web"), pytest.raises(DiskBusyError, match="partition web"):
        resize(path, 2 * SIZE)


def test_a_parent_keeps_its_size_unless_forced_to_grow(tmp_path: Path) -> None:
    craft.make(tmp_path, "differencing")
    parent = str(tmp_path / "parent.vhd")
    with pytest.raises(ConflictError, match=r"parent of .*differencing\.vhd") as refused:
        resize(parent, 2 * SIZE)
    assert "--force" in refused.value.remedy
    before = content_of(str(tmp_path / "differencing.vhd"))
    resize(parent, 2 * SIZE, force=True)
    assert content_of(str(tmp_path / "differencing.vhd")) == before
    with pytest.raises(ConflictError):
        resize(parent, SIZE, force=True)


def test_a_table_without_room_goes_behind_the_blocks_and_blocks_behind_it(tmp_path: Path) -> None:
    path = craft.make(tmp_path, "dynamic")
    resize(path, 3000 * BLOCK)
    at = craft.bat_offset(path)
    assert at > craft.entry(path, 9) * 512
    with open_chain(path) as chain:
        chain.pwrite(2000 * BLOCK, b"n" * BLOCK)
    assert craft.entry(path, 2000) * 512 > at
    assert_sound(path, 3000 * BLOCK)


def test_what_lies_behind_the_end_in_the_last_block_does_not_appear(tmp_path: Path) -> None:
    for kind in ("dynamic", "differencing"):
        path = craft.make(tmp_path, kind)
        resize(path, SIZE - 8 * KIB)
        start = craft.entry(path, 9) * 512
        craft.patch(path, start, b"\xff" * 4)  # bits and bytes that a foreign writer left there
        craft.patch(path, start + 512 + 8 * KIB, b"garbage" * 100)
        before = content_of(path)
        resize(path, SIZE)
        expected = before + bytes(8 * KIB)
        if kind == "differencing":
            parent = content_of(str(tmp_path / "parent.vhd"))
            expected = before + parent[len(before) :]
        assert content_of(path) == expected


@pytest.mark.parametrize(
    ("kind", "size_bytes"),
    [
        ("fixed", SIZE + 3 * BLOCK),
        ("fixed", SIZE + 512),
        ("fixed", 5 * BLOCK),
        ("dynamic", SIZE + BLOCK),
        ("dynamic", 400 * BLOCK),
        ("dynamic", 5 * BLOCK),
        ("differencing", 400 * BLOCK),
        ("differencing", 5 * BLOCK),
    ],
)
def test_an_end_at_any_instant_leaves_the_old_size_or_the_new_one(kind: str, size_bytes: int, tmp_path: Path) -> None:
    folder = tmp_path / "disks"
    folder.mkdir()
    path = craft.make(folder, kind)
    with open_chain(path) as chain:
        chain.pwrite(8 * BLOCK, bytes(2 * BLOCK))
        chain.pwrite(7 * BLOCK, b"")
        parts = random.Random(3).randbytes(BLOCK)
        chain.pwrite(3 * BLOCK, parts)
    if size_bytes < SIZE:
        with open_chain(path) as chain:
            chain.write_zeroes(4 * BLOCK, SIZE - 4 * BLOCK)
    before = content_of(path)
    after = (before + bytes(max(0, size_bytes - SIZE)))[:size_bytes]

    def check(found: str, is_over: bool) -> None:
        content = content_of_or_mended(found)
        assert content == after if is_over else content in (before, after)

    def operate(found: str, recording: RecordingIO) -> None:
        resize(found, size_bytes, file_io=recording)
        assert_sound(found, size_bytes)

    assert end_everywhere(folder, os.path.basename(path), operate, check) > 5
    fill_everywhere(folder, os.path.basename(path), operate, check)


def content_of_or_mended(path: str) -> bytes:
    """A fixed disk whose growth was cut off may end in zeros: `repair` finds the footer before them."""
    try:
        return content_of(path)
    except VhdError:
        from mullion.vhd.repair import repair_disk

        repair_disk(path)
        return content_of(path)


def test_children_of_other_disks_and_other_files_are_no_hindrance(tmp_path: Path) -> None:
    path = craft.make(tmp_path, "dynamic")
    other = str(tmp_path / "other.vhd")
    create_fixed(other, SIZE)
    create_differencing(str(tmp_path / "c.vhd"), other)
    (tmp_path / "junk.vhd").write_bytes(b"conectix" + bytes(5000))
    os.mkfifo(tmp_path / "pipe.vhd")
    resize(path, 2 * SIZE)
    assert_sound(path, 2 * SIZE)


def test_the_footer_of_a_growth_that_was_cut_off_is_found_however_far_it_reached(tmp_path: Path) -> None:
    """The file's length was durable, the footer at its new end was not."""
    path = craft.make(tmp_path, "fixed")
    before = content_of(path)
    os.truncate(path, 500 * GIB)
    with pytest.raises(VhdError):
        content_of(path)
    assert content_of_or_mended(path) == before
    assert_sound(path, SIZE)
