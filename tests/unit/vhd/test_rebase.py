"""A child gets another parent, and reads as before, whenever it ends."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from tests.unit.vhd import craft
from tests.unit.vhd.crash import content_of, end_everywhere, fill_everywhere
from tests.unit.vhd.power_cut import RecordingIO

from mullion.base.errors import InvalidError, NotFoundError
from mullion.vhd import create_differencing, create_dynamic, create_fixed, inspect_chain, open_chain
from mullion.vhd.errors import ChainCycleError, DiskBusyError, ParentNotFoundError, VhdError
from mullion.vhd.fileio import SYSTEM
from mullion.vhd.parent_header import set_parent
from mullion.vhd.rebase import rebase

pytestmark = pytest.mark.unit

BLOCK = craft.BLOCK_BYTES
SIZE = craft.SIZE_BYTES


def scribble(path: str, seed: int, *, rounds: int = 12) -> None:
    choose = random.Random(seed)
    with open_chain(path) as chain:
        for _ in range(rounds):
            offset = choose.randrange(chain.size_bytes)
            chain.pwrite(
                offset, choose.randbytes(min(choose.choice([100, 512, 5000, 20000]), chain.size_bytes - offset))
            )


def family(folder: Path) -> tuple[str, str, str]:
    """A child over `old`, which has a sibling `new`, both over `base`."""
    base, old, new, child = (str(folder / f"{name}.vhd") for name in ("base", "old", "new", "child"))
    create_dynamic(base, SIZE, block_bytes=BLOCK)
    scribble(base, 1)
    create_differencing(old, base)
    scribble(old, 2)
    create_differencing(new, base, block_bytes=2 * BLOCK)
    scribble(new, 3)
    create_differencing(child, old)
    scribble(child, 4)
    return old, new, child


def test_another_parent_and_the_same_content(tmp_path: Path) -> None:
    old, new, child = family(tmp_path)
    before = content_of(child)
    done = rebase(child, new)
    assert not done.is_same_disk
    assert 0 < done.copied_bytes < SIZE
    os.unlink(old)
    assert content_of(child) == before
    found = inspect_chain(child)
    assert found.paths[1].endswith("new.vhd")
    assert (found.files[0].warnings, found.files[0].damage) == ((), ())


def test_sectors_that_both_parents_read_alike_are_not_copied(tmp_path: Path) -> None:
    old, new, child = family(tmp_path)
    copy = str(tmp_path / "copy.vhd")
    create_fixed(copy, SIZE)
    with open_chain(copy) as chain:
        chain.pwrite(0, content_of(old))
    raw = Path(child).stat().st_size
    before = content_of(child)
    assert rebase(child, copy).copied_bytes == 0
    assert Path(child).stat().st_size <= raw + 4096
    assert content_of(child) == before
    assert new


@pytest.mark.parametrize("sectors", [-5, 7])
def test_parents_of_other_sizes(sectors: int, tmp_path: Path) -> None:
    _, _, child = family(tmp_path)
    other = str(tmp_path / "other.vhd")
    create_dynamic(other, SIZE + sectors * 512, block_bytes=512)
    scribble(other, 9)
    before = content_of(child)
    rebase(child, other)
    assert content_of(child) == before


def test_to_the_grandparent_and_back(tmp_path: Path) -> None:
    old, _, child = family(tmp_path)
    before = content_of(child)
    assert rebase(child, str(tmp_path / "base.vhd")).copied_bytes > 0
    assert content_of(child) == before
    rebase(child, old)
    assert content_of(child) == before


def test_the_same_parent_at_another_path(tmp_path: Path) -> None:
    old, _, child = family(tmp_path)
    before = content_of(child)
    folder = tmp_path / "Ordner mit ünïcödé 磁盘"
    folder.mkdir()
    moved = shutil.copy(old, folder / "ancien.vhd")
    shutil.copy(tmp_path / "base.vhd", folder)
    os.unlink(old)
    with pytest.raises(ParentNotFoundError):
        content_of(child)
    done = rebase(child, str(moved))
    assert (done.is_same_disk, done.copied_bytes) == (True, 0)
    assert content_of(child) == before
    raw = Path(child).read_bytes()
    assert ".\\Ordner mit ünïcödé 磁盘\\ancien.vhd".encode("utf-16-le") in raw
    assert str(moved).replace("/", "\\").encode("utf-16-le") in raw
    assert "ancien.vhd".encode("utf-16-be") in raw[512:1536]


def test_a_parent_outside_of_the_folder_is_trusted_afterwards(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    old, _, child = family(here)
    before = content_of(child)
    moved = shutil.move(old, there)
    shutil.copy(here / "base.vhd", there)
    rebase(child, str(moved))
    assert content_of(child) == before


def test_unsafe_changes_the_name_alone(tmp_path: Path) -> None:
    old, new, child = family(tmp_path)
    os.unlink(old)
    with pytest.raises(ParentNotFoundError) as refused:
        rebase(child, new)
    assert "--unsafe" in refused.value.remedy
    assert rebase(child, new, unsafe=True).copied_bytes == 0
    assert inspect_chain(child).paths[1].endswith("new.vhd")


def test_many_times_does_not_grow_the_file(tmp_path: Path) -> None:
    old, new, child = family(tmp_path)
    rebase(child, new)
    rebase(child, old)
    rebase(child, new)
    rebase(child, old)
    size = os.path.getsize(child)
    for parent in (new, old, new, old):
        rebase(child, parent)
    assert os.path.getsize(child) <= size


def test_a_cycle_is_opened_by_an_unsafe_rebase(tmp_path: Path) -> None:
    _, new, child = family(tmp_path)
    grandchild = str(tmp_path / "grandchild.vhd")
    create_differencing(grandchild, child)
    with open_chain(grandchild, read_only=True) as chain:
        unique_id = chain.unique_id
    with open_chain(child) as chain:
        set_parent(chain.images[0], grandchild, unique_id, SYSTEM)
    with pytest.raises(ChainCycleError) as caught:
        rebase(child, new)
    assert "--unsafe" in caught.value.remedy
    rebase(child, new, unsafe=True)
    with open_chain(grandchild, read_only=True) as chain:
        assert new in chain.paths


def test_refused(tmp_path: Path) -> None:
    old, new, child = family(tmp_path)
    grandchild = str(tmp_path / "grandchild.vhd")
    create_differencing(grandchild, child)
    raw = Path(child).read_bytes()
    with pytest.raises(ChainCycleError):
        rebase(child, child)
    with pytest.raises(ChainCycleError):
        rebase(child, grandchild)
    with pytest.raises(InvalidError, match="is dynamic: it has no parent"):
        rebase(str(tmp_path / "base.vhd"), new)
    with pytest.raises(NotFoundError):
        rebase(child, str(tmp_path / "nothing.vhd"))
    with pytest.raises(NotFoundError):
        rebase(str(tmp_path / "nothing.vhd"), new)
    with open_chain(child, read_only=True), pytest.raises(DiskBusyError):
        rebase(child, new)
    (tmp_path / "junk.vhd").write_bytes(b"junk" * 1000)
    with pytest.raises(VhdError):
        rebase(child, str(tmp_path / "junk.vhd"))
    assert Path(child).read_bytes() == raw
    assert old


@pytest.mark.parametrize("is_same", [True, False])
def test_an_end_at_any_instant_changes_nothing_that_is_read(is_same: bool, tmp_path: Path) -> None:
    folder = tmp_path / "disks"
    folder.mkdir()
    old, _, child = family(folder)
    before = content_of(child)
    if is_same:
        shutil.copy(old, folder / "renamed.vhd")

    def check(found: str, is_over: bool) -> None:
        assert content_of(found) == before
        if is_over:
            files = inspect_chain(found).files
            assert files[1].path.endswith("renamed.vhd" if is_same else "new.vhd")
            assert (files[0].warnings, files[0].damage) == ((), ())

    def operate(found: str, recording: RecordingIO) -> None:
        parent = os.path.join(os.path.dirname(found), "renamed.vhd" if is_same else "new.vhd")
        rebase(found, parent, file_io=recording)

    assert end_everywhere(folder, "child.vhd", operate, check) > 8
    fill_everywhere(folder, "child.vhd", operate, check)
