"""Finding the parent: where it may be, where it must not be, and what is said when it is not."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from tests.contract.block_device import read
from tests.unit.vhd import craft

from mullion.base.errors import AlreadyExistsError, InvalidError, NotFoundError
from mullion.base.units import GIB, MIB
from mullion.vhd import create_differencing, create_dynamic, create_fixed, inspect_chain, open_chain, parents
from mullion.vhd.errors import (
    ChainCycleError,
    ChainTooDeepError,
    NotVhdError,
    ParentMismatchError,
    ParentNotFoundError,
    ParentRefusedError,
)
from mullion.vhd.image import open_file
from mullion.vhd.layout import DynamicHeader

pytestmark = pytest.mark.unit


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """A child that was sent to us, and the parent in a folder beside it."""
    for folder in ("images", "disks", "elsewhere"):
        (tmp_path / folder).mkdir()
    parent, child = str(tmp_path / "images/base.vhd"), str(tmp_path / "disks/child.vhd")
    create_dynamic(parent, 8 * MIB)
    with open_chain(parent) as chain:
        chain.pwrite(0, b"parent")
    create_differencing(child, parent)
    if parents.FOLDER_ATTRIBUTE in os.listxattr(child):
        os.removexattr(child, parents.FOLDER_ATTRIBUTE)
    return child, parent


def dirs(tmp_path: Path) -> list[str]:
    return [str(tmp_path / "images"), str(tmp_path / "disks")]


def set_locator(path: str, number: int, platform: bytes, text: bytes, *, length: int | None = None) -> None:
    """Replace one locator and its text, in the place of the relative one."""
    header = DynamicHeader.unpack(craft.peek(path, 512, 1024))
    place = header.locators[number].data_offset
    craft.patch(path, place, text)
    place = place if len(text) <= 512 else os.path.getsize(path) // 512 * 512 - 512
    if len(text) > 512:  # behind everything else, with a new footer behind it
        footer = craft.peek(path, -512, 512)
        craft.patch(path, place, text + bytes(-len(text) % 512) + footer)
    row = struct.pack(">4sIIIQ", platform, 65536, len(text) if length is None else length, 0, place)
    craft.set_header(path, 576 + 24 * number, row)


def only_locator(path: str, platform: bytes, text: bytes, *, length: int | None = None) -> None:
    craft.set_header(path, 64, bytes(512))
    craft.set_header(path, 600, bytes(24))
    set_locator(path, 0, platform, text, length=length)


def test_parent_in_another_allowed_folder(pair: tuple[str, str], tmp_path: Path) -> None:
    child, parent = pair
    with open_chain(child, allowed_dirs=dirs(tmp_path)) as chain:
        assert read(chain, 0, 6) == b"parent"
        assert [os.path.realpath(path) for path in chain.paths] == [child, parent]
        assert chain.warnings == []


def test_parent_outside_the_childs_folder_is_refused_by_default(pair: tuple[str, str]) -> None:
    with pytest.raises(ParentRefusedError, match="outside the allowed folders"):
        open_chain(pair[0])


def test_whoever_makes_a_child_here_vouches_for_the_parents_folder(pair: tuple[str, str], tmp_path: Path) -> None:
    child, grandchild = str(tmp_path / "elsewhere/child.vhd"), str(tmp_path / "grandchild.vhd")
    create_differencing(child, pair[1])
    create_differencing(grandchild, child)
    for path in (child, grandchild):
        with open_chain(path) as chain:
            assert read(chain, 0, 6) == b"parent"
    with pytest.raises(ParentRefusedError, match="outside the allowed folders"):
        open_chain(child, allowed_dirs=[str(tmp_path / "elsewhere")])


def test_chain_that_was_moved_as_a_whole(pair: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "elsewhere/new").mkdir()
    os.rename(tmp_path / "images", tmp_path / "elsewhere/new/images")
    os.rename(tmp_path / "disks", tmp_path / "elsewhere/new/disks")
    with open_chain(str(tmp_path / "elsewhere/new/disks/child.vhd"), allowed_dirs=[str(tmp_path)]) as chain:
        assert read(chain, 0, 6) == b"parent"


def test_child_that_was_moved_alone_finds_the_parent_by_its_absolute_path(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere/deep").mkdir()
    moved = str(tmp_path / "elsewhere/deep/child.vhd")
    os.rename(pair[0], moved)
    with open_chain(moved, allowed_dirs=[str(tmp_path)]) as chain:
        assert read(chain, 0, 6) == b"parent"
        assert "locator W2ru" in " ".join(chain.warnings)


def test_parent_beside_the_child_is_found_by_its_name(pair: tuple[str, str], tmp_path: Path) -> None:
    os.rename(pair[1], tmp_path / "disks/base.vhd")
    with open_chain(pair[0]) as chain:
        assert read(chain, 0, 6) == b"parent"


def test_missing_parent_is_named(pair: tuple[str, str], tmp_path: Path) -> None:
    os.unlink(pair[1])
    with pytest.raises(ParentNotFoundError, match=r"base\.vhd") as caught:
        open_chain(pair[0], allowed_dirs=dirs(tmp_path))
    assert pair[0] in caught.value.message


def test_another_disk_in_the_parents_place(pair: tuple[str, str], tmp_path: Path) -> None:
    os.unlink(pair[1])
    create_dynamic(pair[1], 8 * MIB)
    with pytest.raises(ParentMismatchError, match="is not the parent"):
        open_chain(pair[0], allowed_dirs=dirs(tmp_path))


def test_the_right_disk_behind_a_wrong_one(pair: tuple[str, str], tmp_path: Path) -> None:
    os.rename(pair[1], tmp_path / "disks/base.vhd")
    create_dynamic(pair[1], 8 * MIB)
    with open_chain(pair[0], allowed_dirs=dirs(tmp_path)) as chain:
        assert read(chain, 0, 6) == b"parent"
        assert "is not the parent" in " ".join(chain.warnings)


def utf16(text: str) -> bytes:
    return text.encode("utf-16-le")


@pytest.mark.parametrize(
    ("platform", "text"),
    [
        (b"W2ku", utf16("C:\\disks\\base.vhd")),
        (b"W2ru", utf16("c:base.vhd")),
        (b"W2ku", utf16("\\\\server\\share\\base.vhd")),
        (b"W2ku", utf16("\\\\?\\C:\\base.vhd")),
        (b"MacX", b"file://server/base.vhd"),
        (b"MacX", b"http://server/base.vhd"),
        (b"W2ku", utf16("/etc/passwd")),
        (b"W2ru", utf16("..\\..\\..\\..\\..\\..\\..\\..\\etc\\passwd")),
        (b"MacX", b"file:///etc/passwd"),
        (b"W2ku", utf16("/dev/zero")),
    ],
)
def test_hostile_names_are_refused(pair: tuple[str, str], tmp_path: Path, platform: bytes, text: bytes) -> None:
    only_locator(pair[0], platform, text)
    with pytest.raises(ParentRefusedError):
        open_chain(pair[0], allowed_dirs=dirs(tmp_path))
    with pytest.raises(ParentRefusedError):
        inspect_chain(pair[0], allowed_dirs=dirs(tmp_path))


def test_a_null_parent_id_does_not_stand_for_a_raw_file(pair: tuple[str, str], tmp_path: Path) -> None:
    secret = tmp_path / "disks/secret"
    secret.write_bytes(b"root:x:" * 10_000)
    craft.set_header(pair[0], 40, bytes(16))
    only_locator(pair[0], b"W2ru", utf16(".\\secret"))
    with pytest.raises(NotVhdError):
        open_chain(pair[0], allowed_dirs=dirs(tmp_path))


def test_a_link_out_of_the_allowed_folder_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    os.symlink(pair[1], tmp_path / "disks/link.vhd")
    only_locator(pair[0], b"W2ru", utf16(".\\link.vhd"))
    with pytest.raises(ParentRefusedError):
        open_chain(pair[0])
    with open_chain(pair[0], allowed_dirs=dirs(tmp_path)) as chain:
        assert read(chain, 0, 6) == b"parent"


def test_a_link_that_is_swapped_in_while_opening_is_refused(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "disks/base.vhd"
    inside.write_bytes(b"soon a link")

    def swap_then_open(path: str) -> int:
        inside.unlink()
        inside.symlink_to(pair[1])
        return open_file(path)

    only_locator(pair[0], b"W2ru", utf16(".\\base.vhd"))
    monkeypatch.setattr(parents, "open_file", swap_then_open)
    with pytest.raises(ParentRefusedError):
        open_chain(pair[0])


def test_a_folder_whose_name_begins_alike_is_outside(pair: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "disks2").mkdir()
    os.rename(pair[1], tmp_path / "disks2/base.vhd")
    only_locator(pair[0], b"W2ru", utf16("..\\disks2\\base.vhd"))
    with pytest.raises(ParentRefusedError):
        open_chain(pair[0])


@pytest.mark.parametrize(
    ("text", "length"),
    [(b"", 0), (b"x", 1 << 17), (b"x" * 10, 0xFFFF_FFFF), (b"\x00\xd8\x00\x00", None), (b"abc", 3), (bytes(20), None)],
)
def test_impossible_locators(pair: tuple[str, str], tmp_path: Path, text: bytes, length: int | None) -> None:
    only_locator(pair[0], b"W2ru", text, length=length)
    with pytest.raises(ParentNotFoundError):
        open_chain(pair[0], allowed_dirs=dirs(tmp_path))


def test_a_bad_locator_beside_a_good_one(pair: tuple[str, str], tmp_path: Path) -> None:
    set_locator(pair[0], 0, b"W2ru", b"\x00\xd8\x00\x00")
    with open_chain(pair[0], allowed_dirs=dirs(tmp_path)) as chain:
        assert "is not text" in " ".join(chain.warnings)


@pytest.mark.parametrize("name", ["n" * 5000, "\x1b[31mred\n", "loop"])
def test_names_that_no_file_can_have(pair: tuple[str, str], tmp_path: Path, name: str) -> None:
    os.symlink("loop", tmp_path / "disks/loop")
    only_locator(pair[0], b"W2ru", utf16(f".\\{name}"))
    with pytest.raises(ParentNotFoundError) as caught:
        open_chain(pair[0], allowed_dirs=dirs(tmp_path))
    assert len(caught.value.message) < 1000
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("space", [1, 8, 512, 4096])
def test_data_space_in_sectors_or_bytes(pair: tuple[str, str], tmp_path: Path, space: int) -> None:
    craft.set_header(pair[0], 580, struct.pack(">I", space))
    with open_chain(pair[0], allowed_dirs=dirs(tmp_path)) as chain:
        assert chain.warnings == []


def test_a_disk_that_is_its_own_parent(tmp_path: Path) -> None:
    parent, child = str(tmp_path / "p.vhd"), str(tmp_path / "c.vhd")
    create_dynamic(parent, MIB)
    create_differencing(child, parent)
    craft.set_header(child, 40, craft.peek(child, 68, 16))
    only_locator(child, b"W2ru", utf16(".\\c.vhd"))
    with pytest.raises(ChainCycleError):
        open_chain(child, read_only=True)


def test_a_longer_cycle(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.vhd") for number in range(4)]
    create_dynamic(paths[0], MIB)
    for child, parent in zip(paths[1:], paths, strict=False):
        create_differencing(child, parent)
    craft.set_header(paths[1], 40, craft.peek(paths[3], 68, 16))
    only_locator(paths[1], b"W2ru", utf16(".\\3.vhd"))
    for path in paths[1:]:
        for read_only in (True, False):  # a writer's own lock must not be taken for another's
            with pytest.raises(ChainCycleError):
                open_chain(path, read_only=read_only)


def test_limit_of_depth(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.vhd") for number in range(5)]
    create_dynamic(paths[0], MIB)
    for child, parent in zip(paths[1:], paths, strict=False):
        create_differencing(child, parent)
    with pytest.raises(ChainTooDeepError):
        open_chain(paths[4], limit=4)
    with open_chain(paths[4], limit=5) as chain:
        assert len(chain.paths) == 5


def test_nothing_stays_open_after_a_refusal(pair: tuple[str, str]) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(ParentRefusedError):
            open_chain(pair[0])
    assert len(os.listdir("/proc/self/fd")) == len(before)


# ---------------------------------------------------------------------- creating


@pytest.mark.parametrize("size_bytes", [0, -512, 513, 2040 * GIB + 512])
def test_impossible_sizes(size_bytes: int, tmp_path: Path) -> None:
    for create in (create_fixed, create_dynamic):
        with pytest.raises(InvalidError, match="bytes"):
            create(str(tmp_path / "x.vhd"), size_bytes)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("block_bytes", [0, 256, 3 << 20, 512 << 20])
def test_impossible_block_sizes(block_bytes: int, tmp_path: Path) -> None:
    with pytest.raises(InvalidError):
        create_dynamic(str(tmp_path / "x.vhd"), MIB, block_bytes=block_bytes)
    assert os.listdir(tmp_path) == []


def test_too_many_blocks(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="blocks"):
        create_dynamic(str(tmp_path / "x.vhd"), 2040 * GIB, block_bytes=512)


def test_an_existing_path_is_not_touched(pair: tuple[str, str], tmp_path: Path) -> None:
    target = tmp_path / "disks/taken.vhd"
    target.write_bytes(b"mine")
    for create in (
        lambda: create_fixed(str(target), MIB),
        lambda: create_dynamic(str(target), MIB),
        lambda: create_differencing(str(target), pair[1]),
    ):
        with pytest.raises(AlreadyExistsError):
            create()
    assert target.read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path / "disks")) == ["child.vhd", "taken.vhd"]


def test_missing_folder_and_missing_parent(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        create_fixed(str(tmp_path / "no/x.vhd"), MIB)
    with pytest.raises(NotFoundError):
        create_differencing(str(tmp_path / "x.vhd"), str(tmp_path / "no.vhd"))


def test_layout_is_that_of_windows(tmp_path: Path) -> None:
    path = str(tmp_path / "x.vhd")
    create_dynamic(path, 40 * MIB)
    assert os.path.getsize(path) == 8192 - 4096  # footer in the last sector of a 4 KiB page
    with open_chain(path) as chain:
        chain.pwrite(0, b"x")
        fd, offset = chain.direct_read[0]
        assert offset % 4096 == 0
        assert os.pread(fd, 1, offset) == b"x"
    assert os.path.getsize(path) % 4096 == 0
    assert craft.peek(path, -512, 512) == craft.peek(path, 0, 512)


def test_fixed_disks_are_sparse_or_allocated(tmp_path: Path) -> None:
    create_fixed(str(tmp_path / "s.vhd"), 8 * MIB)
    create_fixed(str(tmp_path / "a.vhd"), 8 * MIB, preallocate=True)
    assert os.stat(tmp_path / "s.vhd").st_blocks * 512 < MIB
    assert os.stat(tmp_path / "a.vhd").st_blocks * 512 >= 8 * MIB
    assert os.path.getsize(tmp_path / "a.vhd") == os.path.getsize(tmp_path / "s.vhd") == 8 * MIB + 512


def test_a_parent_whose_path_cannot_be_written_down(tmp_path: Path) -> None:
    for name in ("back\\slash.vhd", os.fsdecode(b"not-\xff-utf8.vhd"), "n" * 251 + ".vhd"):
        parent = str(tmp_path / name)
        create_dynamic(parent, MIB)
        if len(name) < 200:
            with pytest.raises(InvalidError):
                create_differencing(str(tmp_path / "child.vhd"), parent)
        else:
            create_differencing(str(tmp_path / "child.vhd"), parent)
            open_chain(str(tmp_path / "child.vhd")).close()


def test_child_of_another_size(tmp_path: Path) -> None:
    parent = str(tmp_path / "p.vhd")
    create_dynamic(parent, MIB)
    with open_chain(parent) as chain:
        chain.pwrite(0, b"p" * MIB)
    for size_bytes in (MIB // 2, 3 * MIB):
        child = str(tmp_path / f"{size_bytes}.vhd")
        create_differencing(child, parent, size_bytes=size_bytes, block_bytes=64 << 10)
        with open_chain(child) as chain:
            assert read(chain, 0, size_bytes) == (b"p" * MIB + bytes(2 * MIB))[:size_bytes]
            chain.pwrite(size_bytes - 100, b"c" * 100)
            assert read(chain, 0, size_bytes - 100) == (b"p" * MIB + bytes(2 * MIB))[: size_bytes - 100]


def test_past_the_end_of_a_fixed_parent_is_not_its_footer(tmp_path: Path) -> None:
    parent, child = str(tmp_path / "p.vhd"), str(tmp_path / "c.vhd")
    create_fixed(parent, MIB + 512)
    with open_chain(parent) as chain:
        chain.pwrite(0, b"p" * (MIB + 512))
    create_differencing(child, parent, size_bytes=2 * MIB)
    with open_chain(child) as chain:
        assert read(chain, 0, 2 * MIB) == b"p" * (MIB + 512) + bytes(MIB - 512)
