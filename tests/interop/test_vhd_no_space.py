"""A file system that is really full: a tmpfs of a few MiB."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.block_device import all_of
from tests.framework.small_filesystem import small_filesystem

from mullion.base.units import KIB, MIB
from mullion.vhd import Chain, create_differencing, create_dynamic, create_fixed, inspect_chain, open_chain
from mullion.vhd.compact import compact

pytestmark = pytest.mark.interop

ROOM_BYTES = 4 * MIB


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_filesystem(tmp_path / "small", ROOM_BYTES) as folder:
        yield folder


def is_refused(chain: Chain, offset: int, content: bytes) -> bool:
    """Write; True when the file system is full, and anything else that goes wrong is an error."""
    try:
        chain.pwrite(offset, content)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return True
    return False


@pytest.mark.parametrize("kind", ["fixed", "dynamic", "differencing"])
def test_writes_stop_and_go_on_when_there_is_room(kind: str, small: Path, tmp_path: Path) -> None:
    path = str(small / "disk.vhd")
    size = 16 * MIB
    if kind == "fixed":
        create_fixed(path, size)
    elif kind == "dynamic":
        create_dynamic(path, size, block_bytes=512 * KIB)
    else:
        create_dynamic(str(tmp_path / "parent.vhd"), size)
        create_differencing(path, str(tmp_path / "parent.vhd"), block_bytes=512 * KIB)
    ballast = small / "ballast"
    ballast.write_bytes(bytes(MIB))
    model = bytearray(size)
    refused: list[int] = []
    with open_chain(path, pending_path=str(tmp_path / "pending"), allowed_dirs=[str(tmp_path)]) as chain:
        step = 96 * KIB
        for offset in range(0, size - step, 2 * step):
            content = os.urandom(step)
            if is_refused(chain, offset, content):
                refused.append(offset)
                if len(refused) > 3:
                    break
            else:
                model[offset : offset + step] = content
        assert len(refused) > 3
        chain.flush()
        for offset in refused:  # a part of a refused request may be there, in blocks that had their room before
            now = bytearray(step)
            chain.pread(offset, now)
            model[offset : offset + step] = now
        assert all_of(chain) == model
        ballast.unlink()
        for offset in refused:
            content = os.urandom(step)
            chain.pwrite(offset, content)
            model[offset : offset + step] = content
        chain.flush()
        assert all_of(chain) == model
    with open_chain(path, read_only=True, allowed_dirs=[str(tmp_path)]) as chain:
        assert all_of(chain) == model
    assert inspect_chain(path, allowed_dirs=[str(tmp_path)]).files[0].warnings == ()


def test_no_room_for_the_pending_log(small: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "disk.vhd")
    create_dynamic(path, 16 * MIB)
    (small / "ballast").write_bytes(bytes(ROOM_BYTES))
    with pytest.raises(OSError, match="No space") as caught:
        open_chain(path, pending_path=str(small / "pending"))
    assert caught.value.errno == errno.ENOSPC
    open_chain(path).close()


def test_no_room_to_create(small: Path) -> None:
    (small / "ballast").write_bytes(bytes(ROOM_BYTES))
    for create in (create_fixed, create_dynamic):
        with pytest.raises(OSError, match="No space"):
            create(str(small / "disk.vhd"), 16 * MIB)
    with pytest.raises(OSError, match="No space"):
        create_fixed(str(small / "disk.vhd"), 16 * MIB, preallocate=True)
    assert sorted(os.listdir(small)) == ["ballast"]


@pytest.mark.parametrize("at_end", ["far", "missing"])
def test_an_interrupted_write_on_a_full_filesystem_is_mended(at_end: str, small: Path) -> None:
    path = str(small / "disk.vhd")
    create_dynamic(path, 16 * MIB, block_bytes=512 * KIB)
    content = os.urandom(512 * KIB)
    with open_chain(path) as chain:
        for block in range(3):
            chain.pwrite(block * len(content), content)
    chain = open_chain(path)
    chain.pwrite(8 * MIB, content)  # a block that no entry points to yet, and the footer far behind it
    chain.abandon()
    if at_end == "missing":
        os.truncate(path, os.path.getsize(path) - 512)
    fill(small)
    before = os.path.getsize(path)
    with open_chain(path) as chain:
        assert any("given back" in text for text in chain.warnings)
        size_of_file = os.path.getsize(path)
        chain.pwrite(0, content[::-1])
    assert size_of_file < before
    report = inspect_chain(path).files[0]
    assert report.warnings == ()
    with open_chain(path, read_only=True) as chain:
        assert all_of(chain)[: 3 * len(content)] == content[::-1] + content * 2
        assert not any(all_of(chain)[3 * len(content) :])


@pytest.mark.parametrize("at_end", ["far", "missing"])
def test_the_end_stays_while_there_is_no_page_for_it(at_end: str, small: Path) -> None:
    path = str(small / "disk.vhd")
    create_dynamic(path, 16 * MIB, block_bytes=512 * KIB)
    content = os.urandom(512 * KIB)
    with open_chain(path) as chain:
        for block in range(3):
            chain.pwrite(block * len(content), content if block != 1 else bytes(len(content)))
    end = os.path.getsize(path)
    with open(path, "r+b") as file:  # as a kill before a new block was written leaves it
        footer = file.read(512)
        os.truncate(path, end - 4 * KIB)
        if at_end == "far":
            file.seek(end + 8 * MIB - 512)
            file.write(footer)
    fill(small)
    with open_chain(path) as chain:
        assert any("no room for the footer" in text for text in chain.warnings)
        chain.pwrite(0, content[::-1])
        assert is_refused(chain, 4 * MIB, content)
    with open_chain(path, read_only=True) as chain:
        assert all_of(chain)[: 3 * len(content)] == content[::-1] + bytes(len(content)) + content
    compacted = compact(path)  # the block of zeros makes room
    assert compacted.blocks_removed
    assert inspect_chain(path).files[0].warnings == ()
    with open_chain(path, read_only=True) as chain:
        assert all_of(chain)[: 3 * len(content)] == content[::-1] + bytes(len(content)) + content


def fill(folder: Path) -> None:
    """Leave not one page."""
    with open(folder / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4 * KIB))
