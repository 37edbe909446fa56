"""Another parent for a child: at whatever instant the power goes, the child has its old parent or the new one.

And the new one for good, once it was said to be done, whatever earlier attempts met.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.vhd.power_cut import KilledError, RecordingIO

from mullion.vhd import create_differencing, create_dynamic, inspect_chain, open_chain
from mullion.vhd.fileio import SYSTEM, FileIO
from mullion.vhd.image import load_image, open_file
from mullion.vhd.parent_header import set_parent
from mullion.vhd.relink import relink_frozen
from mullion.vhd.switching import name_other_parent

pytestmark = pytest.mark.unit

SIZE = 64 * 1024


def make(folder: Path) -> str:
    """A child of `old.vhd`; `new with ä.vhd` is another disk."""
    for name in ("old", "new with ä"):
        create_dynamic(str(folder / f"{name}.vhd"), SIZE, block_bytes=4096)
    child = str(folder / "child.vhd")
    create_differencing(child, str(folder / "old.vhd"))
    with open_chain(child) as chain:
        chain.pwrite(5000, b"c" * 9000)
    return child


def move(child: str, parent: str, file_io: FileIO) -> None:
    fd = open_file(child, writable=True)
    try:
        parent_fd = open_file(parent)
        parent_id = load_image(parent_fd, parent).footer.unique_id
        os.close(parent_fd)
        set_parent(load_image(fd, child), parent, parent_id, file_io)
    finally:
        os.close(fd)


def content(path: str) -> bytes:
    with open_chain(path, read_only=True) as chain:
        buffer = bytearray(chain.size_bytes)
        chain.pread(0, buffer)
        return bytes(buffer)


def test_the_parent_changes_and_nothing_else(tmp_path: Path) -> None:
    child = make(tmp_path)
    before, length = content(child), os.path.getsize(child)
    for name in ("new with ä", "old", "new with ä", "old"):
        move(child, str(tmp_path / f"{name}.vhd"), SYSTEM)
        info = inspect_chain(child)
        assert os.path.basename(info.paths[1]) == f"{name}.vhd"
        assert not info.files[0].warnings
        assert not info.files[0].damage
        assert content(child) == before
    assert os.path.getsize(child) <= length + 4096


@pytest.mark.parametrize("ends_by", ["kill", "power"])
def test_any_instant(ends_by: str, tmp_path: Path) -> None:
    choose = random.Random(7)
    source = tmp_path / "source"
    source.mkdir()
    before = content(make(source))
    seen = set()
    for fuse in range(14):
        for _ in range(4 if ends_by == "power" else 1):
            folder = tmp_path / "try"
            shutil.copytree(source, folder)
            child, new = str(folder / "child.vhd"), str(folder / "new with ä.vhd")
            file_io = RecordingIO()
            file_io.fuse = fuse
            try:
                move(child, new, file_io)
            except KilledError:
                if ends_by == "power":
                    file_io.cut_power(choose)
            seen.add(os.path.basename(inspect_chain(child).paths[1]))
            assert content(child) == before
            with open_chain(child) as chain:
                chain.pwrite(60_000, b"n" * 512)
            assert not inspect_chain(child).files[0].warnings
            shutil.rmtree(folder)
    assert seen == {"old.vhd", "new with ä.vhd"}


def relink(child: str, base: str, file_io: FileIO) -> None:
    relink_frozen(child, base, file_io=file_io)


def rename_in_use(child: str, base: str, file_io: FileIO) -> None:
    """Twice, if it fails: as one provider does, which is told to try again; it is killed afterwards."""
    chain = open_chain(child, file_io=file_io)
    try:
        name_other_parent(chain, chain.images[2])
    except OSError:
        name_other_parent(chain, chain.images[2])
    finally:
        chain.abandon()


@pytest.mark.parametrize("work", [relink, rename_in_use])
def test_what_failed_is_done_again_for_good(work: Callable[[str, str, FileIO], None], tmp_path: Path) -> None:
    """The file system was full, or its disk failed, at any step: what was written then may never reach the platter."""
    choose = random.Random(11)
    source = tmp_path / "source"
    source.mkdir()
    create_dynamic(str(source / "base.vhd"), SIZE, block_bytes=4096)
    create_differencing(str(source / "old.vhd"), str(source / "base.vhd"))
    create_differencing(str(source / "child.vhd"), str(source / "old.vhd"))
    for fuse in range(16):
        for _ in range(3):
            folder = tmp_path / "try"
            shutil.copytree(source, folder)
            child, base = str(folder / "child.vhd"), str(folder / "base.vhd")
            file_io = RecordingIO()
            file_io.fuse, file_io.fuse_kills = fuse, False
            try:
                work(child, base, file_io)
            except OSError:
                file_io.fuse = None
                work(child, base, file_io)
            os.unlink(folder / "old.vhd")  # as is done once it is said that nothing lies on it
            file_io.cut_power(choose)
            assert inspect_chain(child).paths[1:] == (base,)
            shutil.rmtree(folder)
