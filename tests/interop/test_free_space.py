"""What is called free is free: it is overwritten, and every file and the filesystem's own checker are content."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.interop.filesystem_images import call, make_exfat, make_ext, make_fat, make_iso, make_mbr
from tests.interop.test_vhd_files import content_of, needs_fixtures, opened
from tests.interop.test_vhd_fixtures import unpacked

from mullion.base.errors import MullionError
from mullion.media.filesystems.free_allocation import clear_bits
from mullion.media.filesystems.freespace import free_extents
from mullion.media.foreign import open_foreign
from mullion.vhd import create_dynamic, open_chain

pytestmark = pytest.mark.interop


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files that leave holes: some are taken away again by `punch`."""
    root = tmp_path / "tree"
    (root / "folder").mkdir(parents=True)
    choose = random.Random(5)
    for number in range(40):
        (root / f"folder/file{number:02}").write_bytes(choose.randbytes(choose.randrange(1, 60_000)))
    return root


def overwrite(path: Path, ranges: list[tuple[int, int]]) -> None:
    fd = os.open(path, os.O_WRONLY)
    for offset, length in ranges:
        os.pwrite(fd, b"\xa5" * length, offset)
    os.close(fd)


def checked_ranges(path: Path) -> list[tuple[int, int]]:
    """The free ranges: ascending, apart, on the disk."""
    doubts: list[str] = []
    ranges = list(free_extents(str(path), doubt=doubts.append))
    assert doubts == []
    end = -1
    for offset, length in ranges:
        assert offset > end
        assert length > 0
        end = offset + length
    assert end <= path.stat().st_size
    return ranges


def all_files(path: Path) -> dict[str, bytes]:
    for files in opened(path):
        names = [entry.path for entry in files.list("/", recursive=True) if entry.type == "file"]
        return {name: content_of(files, name) for name in names}
    raise AssertionError


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ext2", ()),
        ("ext3", ()),
        ("ext4", ()),
        ("ext4", ("-O", "^64bit,^metadata_csum", "-b", "1024")),
        ("ext4", ("-O", "^flex_bg,^uninit_bg", "-b", "2048")),
    ],
)
def test_ext(tmp_path: Path, tree: Path, kind: str, options: tuple[str, ...]) -> None:
    image = make_ext(tmp_path / "disk.img", tree, kind, "40M", *options)
    for number in range(0, 40, 3):
        call("debugfs", "-w", "-R", f"rm /folder/file{number:02}", image)
    before = all_files(image)
    ranges = checked_ranges(image)
    told = subprocess.run(["dumpe2fs", "-h", image], capture_output=True, text=True, check=True).stdout
    fields = {line.split(":")[0]: line.split(":")[1].strip() for line in told.splitlines() if ":" in line}
    free = int(fields["Free blocks"]) * int(fields["Block size"])
    found = sum(length for _, length in ranges)
    assert free * 0.5 < found <= free
    overwrite(image, ranges)
    call("e2fsck", "-f", "-n", image)
    assert all_files(image) == before


@pytest.mark.parametrize(("bits", "size"), [(12, "4M"), (16, "40M"), (32, "80M")])
def test_fat(tmp_path: Path, tree: Path, bits: int, size: str) -> None:
    image = make_fat(tmp_path / "disk.img", tree, bits, size)
    call("mdel", "-i", image, "::/folder/file03", "::/folder/file07", "::/folder/file20")
    before = all_files(image)
    ranges = checked_ranges(image)
    used = sum(map(len, before.values()))
    assert image.stat().st_size - sum(length for _, length in ranges) < used * 3 + (1 << 20)
    overwrite(image, ranges)
    call("fsck.vfat", "-n", image)
    assert all_files(image) == before


def test_exfat(tmp_path: Path) -> None:
    image = make_exfat(tmp_path / "disk.img", "name.bin", b"content" * 3000)
    ranges = checked_ranges(image)
    assert len(ranges) == 1
    overwrite(image, ranges)
    assert all_files(image) == {"name.bin": b"content" * 3000}


@needs_fixtures
def test_ntfs_of_windows(tmp_path: Path) -> None:
    path = Path(unpacked("ntfs-dynamic.vhd.gz", tmp_path))
    before = all_files(path)
    ranges = list(free_extents(str(path)))
    assert sum(length for _, length in ranges) > 200_000
    with open_chain(str(path)) as chain:
        for offset, length in ranges:
            chain.pwrite(offset, b"\xa5" * length)
    assert all_files(path) == before
    assert list(free_extents(str(path))) == ranges


@needs_fixtures
@pytest.mark.parametrize("name", ["win10-fat16-fixed.vhd.gz", "ext2.vhd.gz"])
def test_other_disks_of_others(tmp_path: Path, name: str) -> None:
    path = Path(unpacked(name, tmp_path))
    before = all_files(path)
    ranges = list(free_extents(str(path)))
    assert ranges
    with open_chain(str(path)) as chain:
        for offset, length in ranges:
            chain.pwrite(offset, b"\xa5" * length)
    assert all_files(path) == before


def test_partitions(tmp_path: Path, tree: Path) -> None:
    ext = make_ext(tmp_path / "ext.img", tree, "ext4", "16M").read_bytes()
    disk = make_mbr(tmp_path / "disk.img", [(0x83, ext), (0x07, b"\0" * (1 << 20)), (0x83, ext)])
    doubts: list[str] = []
    ranges = list(free_extents(str(disk), doubt=doubts.append))
    alone = list(free_extents(str(tmp_path / "ext.img")))
    assert ranges == [(offset + start, length) for start in (1 << 20, 18 << 20) for offset, length in alone]
    assert len(doubts) == 1
    assert "its free space is not known" in doubts[0]


def test_a_vhd(tmp_path: Path, tree: Path) -> None:
    image = make_ext(tmp_path / "ext.img", tree, "ext4", "16M")
    path = str(tmp_path / "disk.vhd")
    create_dynamic(path, 16 << 20)
    with open_chain(path) as chain:
        chain.pwrite(0, image.read_bytes())
    assert list(free_extents(path)) == list(free_extents(str(image)))


def _patch(path: Path, offset: int, layout: str, change: Callable[[int], int]) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, offset, change(struct.unpack_from(layout, data, offset)[0]))
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("what", "offset", "layout", "change"),
    [
        ("not unmounted", 1024 + 58, "<H", lambda state: state & ~1),
        ("errors", 1024 + 58, "<H", lambda state: state | 2),
        ("journal", 1024 + 96, "<I", lambda features: features | 4),
        ("bigalloc", 1024 + 100, "<I", lambda features: features | 0x200),
        ("unknown", 1024 + 100, "<I", lambda features: features | 1 << 30),
        ("too long", 1024 + 4, "<I", lambda blocks: blocks + 100_000),
        ("groups", 1024 + 32, "<I", lambda _: 0),
    ],
)
def test_a_doubtful_ext_counts_as_used(
    tmp_path: Path, tree: Path, what: str, offset: int, layout: str, change: Callable[[int], int]
) -> None:
    image = make_ext(tmp_path / "disk.img", tree, "ext4", "16M")
    assert list(free_extents(str(image)))
    _patch(image, offset, layout, change)
    doubts: list[str] = []
    assert list(free_extents(str(image), doubt=doubts.append)) == [], what
    assert len(doubts) == 1


def test_a_group_whose_counter_disagrees_counts_as_used(tmp_path: Path, tree: Path) -> None:
    image = make_ext(tmp_path / "disk.img", tree, "ext2", "16M", "-b", "4096")
    assert list(free_extents(str(image)))
    _patch(image, 4096 + 12, "<H", lambda free: free - 1)
    assert list(free_extents(str(image))) == []


def test_a_doubtful_fat_counts_as_used(tmp_path: Path, tree: Path) -> None:
    image = make_fat(tmp_path / "disk.img", tree, 16, "40M")
    good = image.read_bytes()
    reserved, table = struct.unpack_from("<H", good, 14)[0] * 512, struct.unpack_from("<H", good, 22)[0] * 512
    for offset, change in ((reserved + 3, 0x7F), (reserved + table + 500, 0x11)):
        bad = bytearray(good)
        bad[offset] = change
        image.write_bytes(bad)
        assert list(free_extents(str(image))) == []


@needs_fixtures
def test_a_doubtful_ntfs_counts_as_used(tmp_path: Path) -> None:
    with open_foreign(unpacked("ntfs-dynamic.vhd.gz", tmp_path)) as device:
        content = bytearray(device.size_bytes)
        device.pread(0, content)
    image = tmp_path / "disk.img"
    image.write_bytes(content)
    assert list(free_extents(str(image)))
    volume = 65536
    cluster = content[volume + 13] * 512
    table = volume + struct.unpack_from("<Q", content, volume + 48)[0] * cluster
    record = content[table + 3 * 1024 : table + 4 * 1024]
    at = struct.unpack_from("<H", record, 20)[0]
    while struct.unpack_from("<I", record, at)[0] != 0x70:
        at += struct.unpack_from("<I", record, at + 4)[0]
    flags_at = table + 3 * 1024 + at + struct.unpack_from("<H", record, at + 20)[0] + 10
    for offset, change in ((flags_at, 1), (table + 6 * 1024 + 510, 0x55), (table + 6 * 1024, 0)):
        bad = bytearray(content)
        bad[offset] ^= change or 0xFF
        image.write_bytes(bad)
        doubts: list[str] = []
        assert list(free_extents(str(image), doubt=doubts.append)) == []
        assert doubts


def test_an_iso_has_no_free_space(tmp_path: Path, tree: Path) -> None:
    assert list(free_extents(str(make_iso(tmp_path / "disk.iso", tree)))) == []


def test_random_damage_is_an_answer_or_an_error(tmp_path: Path, tree: Path) -> None:
    """Nothing but ranges on the disk, whatever the structures say."""
    choose = random.Random(11)
    small = tree / "folder/file01"
    good = [
        make_ext(tmp_path / "a.img", tree, "ext4", "8M").read_bytes(),
        make_fat(tmp_path / "b.img", tree, 12, "4M").read_bytes(),
        make_exfat(tmp_path / "c.img", "n", small.read_bytes()).read_bytes(),
    ]
    path = tmp_path / "disk.img"
    for number in range(150):
        bad = bytearray(good[number % len(good)])
        for _ in range(choose.choice([1, 5, 50])):
            bad[choose.randrange(choose.choice([512, 4096, 65536]))] = choose.randrange(256)
        path.write_bytes(bad)
        try:
            end = 0
            for offset, length in free_extents(str(path)):
                assert end <= offset < offset + length <= len(bad)
                end = offset + length
        except MullionError as error:
            assert error.remedy  # noqa: PT017 - ranges are as good an outcome


def test_clear_bits() -> None:
    choose = random.Random(2)
    for _ in range(200):
        bitmap = b"".join(choose.choice([bytes(3), b"\xff" * 3, choose.randbytes(2)]) for _ in range(6))
        count = choose.randrange(len(bitmap) * 8 + 1)
        wanted = [bit for bit in range(count) if not bitmap[bit // 8] >> bit % 8 & 1]
        pieces = [bitmap[:5], bitmap[5:]]
        found = [bit for first, length in clear_bits(pieces, count) for bit in range(first, first + length)]
        assert found == wanted
