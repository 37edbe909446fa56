"""Real disks of Windows, VirtualBox, QEMU, Virtual PC and XenServer are read as their makers meant them."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.contract.block_device import all_of
from tests.unit.vhd import craft

from mullion.base.block import ExtentKind
from mullion.vhd import inspect_chain, open_chain
from mullion.vhd.check import check_disk
from mullion.vhd.facts import describe
from mullion.vhd.findings import Verdict
from mullion.vhd.geometry import SizeFrom
from mullion.vhd.layout import DiskType

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        not Path(os.environ.get("MULLION_FIXTURES", "../shared/fixtures")).is_dir(),
        reason="the folder of foreign disks is not there: set MULLION_FIXTURES",
    ),
]

FIXTURES = Path(os.environ.get("MULLION_FIXTURES", "../shared/fixtures"))
OPENERS = {".gz": gzip.open, ".bz2": bz2.open}


def unpacked(name: str, folder: Path) -> str:
    """A writable copy of a fixture."""
    source = FIXTURES / name
    target = folder / name.removesuffix(".gz").removesuffix(".bz2")
    opener = OPENERS.get(source.suffix, open)
    with opener(source, "rb") as packed, target.open("wb") as plain:
        shutil.copyfileobj(packed, plain)
    return str(target)


def content_hash(path: str) -> str:
    with open_chain(path, read_only=True) as chain:
        return hashlib.sha256(all_of(chain)).hexdigest()


def test_windows_dynamic(tmp_path: Path) -> None:
    path = unpacked("ntfs-dynamic.vhd.gz", tmp_path)
    assert content_hash(path) == "8b10b52e3d1e76075d05a5101a6536b9fa8376a5b8f7c22f502d0987d165c876"
    with open_chain(path, read_only=True) as chain:
        content = all_of(chain)
        assert content[510:512] == b"\x55\xaa"
        assert content[65536 + 3 : 65536 + 7] == b"NTFS"


def test_windows_chain_over_a_fixed_parent(tmp_path: Path) -> None:
    unpacked("ntfs-parent.vhd.gz", tmp_path)
    path = unpacked("ntfs-differential.vhd.gz", tmp_path)
    assert content_hash(path) == "b7922a46a6b08fa4f4fc0c51a25d5587d1d49f15cfade45ca740dd07110ae144"
    found = inspect_chain(path)
    assert [file.type for file in found.files] == [DiskType.DIFFERENCING, DiskType.FIXED]


@pytest.mark.parametrize(
    ("name", "kind", "size_bytes"),
    [
        ("win8.vhd", DiskType.DYNAMIC, 40 << 20),
        ("win8.1-1GB.vhd", DiskType.DYNAMIC, 1 << 30),
        ("vbox.vhd", DiskType.DYNAMIC, 40 << 20),
        ("qemu.vhd", DiskType.DYNAMIC, 41953280),
        ("xapi.vhd", DiskType.DYNAMIC, 40 << 20),
        ("virtualpc-dynamic.vhd.bz2", DiskType.DYNAMIC, 136365211648),
        ("hyperv2012r2-dynamic.vhd.bz2", DiskType.DYNAMIC, 136365211648),
        ("ext2.vhd.gz", DiskType.DYNAMIC, 4212736),
        ("win10-fat16-fixed.vhd.gz", DiskType.FIXED, 10 << 20),
    ],
)
def test_every_maker_is_read_without_a_complaint(name: str, kind: DiskType, size_bytes: int, tmp_path: Path) -> None:
    path = unpacked(name, tmp_path)
    found = inspect_chain(path).files[0]
    assert (found.type, found.size_bytes, found.warnings, found.damage) == (kind, size_bytes, (), ())
    with open_chain(path, read_only=True) as chain:
        if found.allocated_bytes == 0:
            assert [extent.kind for extent in chain.extents(0, size_bytes)] == [ExtentKind.HOLE]


@pytest.mark.parametrize("name", ["vbox.vhd", "xapi.vhd"])
def test_the_chs_size_is_what_qemu_reads(name: str, tmp_path: Path) -> None:
    path, raw = unpacked(name, tmp_path), tmp_path / "raw"
    craft.set_footer(path, 28, b"vbox")  # a creator whose current size QEMU 7.2 does not take
    subprocess.run(["qemu-img", "convert", "-f", "vpc", "-O", "raw", path, raw], check=True)
    with open_chain(path, read_only=True, size_from=SizeFrom.CHS) as chain:
        assert chain.size_bytes != describe(chain.images[0]).original_size_bytes
        assert all_of(chain) == raw.read_bytes()


def test_ext2_of_qemu_and_fat_of_windows(tmp_path: Path) -> None:
    with open_chain(unpacked("ext2.vhd.gz", tmp_path), read_only=True) as chain:
        magic = bytearray(2)
        chain.pread(1024 + 56, magic)
        assert magic == b"\x53\xef"
    with open_chain(unpacked("win10-fat16-fixed.vhd.gz", tmp_path), read_only=True) as chain:
        mark = bytearray(2)
        chain.pread(510, mark)
        assert mark == b"\x55\xaa"


@pytest.mark.parametrize("name", ["win8.vhd", "vbox.vhd", "qemu.vhd", "xapi.vhd"])
def test_foreign_disks_can_be_written(name: str, tmp_path: Path) -> None:
    path = unpacked(name, tmp_path)
    with open_chain(path) as chain:
        assert chain.warnings == []
        size = chain.size_bytes
        chain.pwrite(size - 5000, b"tail" * 1250)
        chain.pwrite(3 << 20, b"x" * 70_000)
        content = all_of(chain)
    found = inspect_chain(path).files[0]
    assert (found.warnings, found.damage) == ((), ())
    assert content_hash(path) == hashlib.sha256(content).hexdigest()


def test_the_windows_child_can_be_written(tmp_path: Path) -> None:
    unpacked("win8.vhd", tmp_path)
    path = unpacked("win8-child.vhd", tmp_path)
    with open_chain(path) as chain:
        assert not any(all_of(chain))
        chain.pwrite(100, b"hello")
    with open_chain(path, read_only=True) as chain:
        content = bytearray(8)
        chain.pread(99, content)
        assert content == b"\0hello\0\0"
    # Windows puts the first bitmap at 81408, behind the room that its locators claim.
    assert (tmp_path / "win8-child.vhd").stat().st_size == 81408 + 512 + (2 << 20) + 4096


def test_a_vhdx_is_named_as_one(tmp_path: Path) -> None:
    from mullion.vhd.errors import NotVhdError

    with pytest.raises(NotVhdError, match="VHDX"):
        open_chain(unpacked("ntfs-dynamic.vhdx.gz", tmp_path), read_only=True)


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.glob("*") if ".vhd" in path.name))
def test_every_real_disk_is_sound(name: str, tmp_path: Path) -> None:
    """VirtualBox and XenServer pad the BAT with zeros; a VHDX is none of ours, and is said to be one."""
    for parent in ("win8.vhd", "ntfs-parent.vhd.gz"):
        unpacked(parent, tmp_path)
    report = check_disk(unpacked(name, tmp_path))
    found = [(problem.code, problem.severity) for problem in report.problems]
    if ".vhdx" in name:
        assert (report.verdict, found) == (Verdict.BROKEN, [("not-a-vhd", "error")])
        assert "a VHDX" in report.problems[0].what
    elif name in ("vbox.vhd", "xapi.vhd"):
        assert (report.verdict, found) == (Verdict.SOUND, [("bat-padding", "warning")])
    else:
        assert (report.verdict, found) == (Verdict.SOUND, [])
