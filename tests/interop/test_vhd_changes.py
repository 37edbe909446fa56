"""Disks of every maker that were resized, compacted and rebased: other programs still read them right."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.contract.block_device import all_of
from tests.interop.test_vhd_fixtures import FIXTURES, unpacked
from tests.interop.test_vhd_readers import SEVEN_ZIP, seven_zip_hash

from mullion.base.units import GIB, KIB, MIB
from mullion.vhd import create_differencing, create_dynamic, create_fixed, inspect_chain, open_chain
from mullion.vhd.batmap import Batmap
from mullion.vhd.compact import compact
from mullion.vhd.diff import differences
from mullion.vhd.image import load_image, open_file
from mullion.vhd.rebase import rebase
from mullion.vhd.resize import resize

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not FIXTURES.is_dir(), reason="the folder of foreign disks is not there: set MULLION_FIXTURES"),
]

SINGLE = [
    "win8.vhd",
    "vbox.vhd",
    "qemu.vhd",
    "xapi.vhd",
    "ntfs-dynamic.vhd.gz",
    "ext2.vhd.gz",
    "win10-fat16-fixed.vhd.gz",
]


def run(*line: str) -> str:
    return subprocess.run(line, check=True, capture_output=True, text=True, timeout=120).stdout


def scribble(path: str, seed: int) -> None:
    choose = random.Random(seed)
    with open_chain(path) as chain:
        for _ in range(12):
            offset = choose.randrange(chain.size_bytes - 70_000)
            chain.pwrite(offset, choose.randbytes(choose.choice([512, 4096, 70_000])))


def our_hash(path: str) -> bytes:
    with open_chain(path, read_only=True) as chain:
        return hashlib.sha256(all_of(chain)).digest()


def assert_read_alike(path: str, *, by_qemu: bool = True) -> None:
    """7-Zip and, a single file, QEMU read what we read, in the same length; nothing is odd."""
    expected = our_hash(path)
    assert seven_zip_hash(path) == expected
    found = inspect_chain(path).files[0]
    assert (found.warnings, found.damage) == ((), ())
    if by_qemu:
        raw = f"{path}.raw"
        run("qemu-img", "convert", "-f", "vpc", "-O", "raw", path, raw)
        content = Path(raw).read_bytes()
        if len(content) != found.size_bytes:  # a creator for whom it takes the size from the geometry, unchanged by us
            assert found.size_bytes - 16 * 63 * 512 < len(content) < found.size_bytes
            return
        assert hashlib.sha256(content).digest() == expected


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("size_bytes", [50 * MIB + 512, 260 * MIB])
def test_every_maker_s_disk_grows(name: str, size_bytes: int, tmp_path: Path) -> None:
    path = unpacked(name, tmp_path)
    scribble(path, 1)
    with open_chain(path, read_only=True) as chain:
        before = all_of(chain)
    resize(path, size_bytes)
    with open_chain(path, read_only=True) as chain:
        assert all_of(chain)[: len(before)] == before
    info = json.loads(run("qemu-img", "info", "-f", "vpc", "--output=json", path))
    assert info["virtual-size"] == size_bytes
    with open_chain(path) as chain:
        chain.pwrite(size_bytes - 5000, b"tail" * 1250)
    assert_read_alike(path)


@pytest.mark.parametrize("name", SINGLE)
def test_every_maker_s_disk_grows_compacts_and_shrinks(name: str, tmp_path: Path) -> None:
    path = unpacked(name, tmp_path)
    size = inspect_chain(path).size_bytes
    resize(path, 64 * MIB)
    with open_chain(path) as chain:
        for block in range(24, 4, -1):
            chain.pwrite(block * 2 * MIB + 8192, random.Random(block).randbytes(9000))
        chain.pwrite(20 * MIB, bytes(44 * MIB))
    before = our_hash(path)
    done = compact(path)
    assert our_hash(path) == before
    if done.blocks_removed:
        assert done.file_bytes < done.old_file_bytes
    assert_read_alike(path)
    resize(path, max(size, 24 * MIB))
    assert_read_alike(path)


@pytest.mark.parametrize("name", ["virtualpc-dynamic.vhd.bz2", "hyperv2012r2-dynamic.vhd.bz2"])
def test_large_disks_grow_to_the_limit(name: str, tmp_path: Path) -> None:
    path = unpacked(name, tmp_path)
    resize(path, 2040 * GIB)
    info = json.loads(run("qemu-img", "info", "-f", "vpc", "--output=json", path))
    assert info["virtual-size"] == 2040 * GIB
    with open_chain(path) as chain:
        chain.pwrite(2039 * GIB, b"far.away")
    printed = run("qemu-io", "-f", "vpc", "-r", "-c", f"read -v {2039 * GIB} 512", path)
    assert "far.away" in printed


def test_qemu_writes_into_a_disk_whose_table_was_moved(tmp_path: Path) -> None:
    path = str(tmp_path / "d.vhd")
    create_dynamic(path, 40 * MIB, block_bytes=512 * KIB)
    scribble(path, 3)
    resize(path, 3 * GIB)
    run("qemu-io", "-f", "vpc", "-c", f"write -P 0x61 {2 * GIB} 4096", "-c", "write -P 0x62 1M 4096", path)
    with open_chain(path) as chain:
        for offset, letter in ((2 * GIB, b"a"), (MIB, b"b")):
            buffer = bytearray(4096)
            chain.pread(offset, buffer)
            assert buffer == letter * 4096
    compact(path)
    assert inspect_chain(path).files[0].damage == ()


def test_xenserver_s_batmap_follows_the_table_and_forgets_removed_blocks(tmp_path: Path) -> None:
    path = unpacked("xapi.vhd", tmp_path)
    scribble(path, 4)
    resize(path, 10 * GIB)
    batmap = batmap_of(path)
    assert batmap.covers(5120)
    with open(path, "r+b") as file:  # as XenServer would say of full blocks
        full = Batmap(batmap.header_offset, batmap.offset, batmap.version, batmap.rest, b"\xff" * len(batmap.bits))
        for offset, raw in full.pieces():
            file.seek(offset)
            file.write(raw)
    with open_chain(path) as chain:
        chain.pwrite(2 * MIB, bytes(2 * MIB))
    done = compact(path)
    assert done.blocks_removed >= 1
    found = batmap_of(path)
    assert found.bits[0] & 0x40 == 0
    assert found.bits[1:] == b"\xff" * (len(found.bits) - 1)
    with open(path, "rb") as file:
        file.seek(found.header_offset + 24)
        assert int.from_bytes(file.read(4), "big") == ~sum(found.bits) & 0xFFFF_FFFF


def batmap_of(path: str) -> Batmap:
    image = load_image(open_file(path), path)
    try:
        found = Batmap.load(image)
        assert found is not None
        return found
    finally:
        image.close()


def test_the_chain_of_windows_is_changed_and_read_by_7zip(tmp_path: Path) -> None:
    unpacked("win8.vhd", tmp_path)
    path = unpacked("win8-child.vhd", tmp_path)
    scribble(path, 5)
    before = our_hash(path)
    for size_bytes in (64 * MIB, 260 * MIB, 64 * MIB):
        resize(path, size_bytes)
        # It ends with an error where its parent ends, when that is shorter; what it reads until then is right.
        done = subprocess.run([SEVEN_ZIP, "x", "-tVHD", "-so", path], capture_output=True, check=False, timeout=120)
        assert hashlib.sha256(done.stdout[: 40 * MIB]).digest() == before
    resize(path, 40 * MIB)
    assert_read_alike(path, by_qemu=False)
    compact(path)
    assert_read_alike(path, by_qemu=False)
    before = our_hash(path)
    other = str(tmp_path / "other parent.vhd")
    create_fixed(other, 40 * MIB)
    scribble(other, 6)
    rebase(path, other)
    assert our_hash(path) == before
    assert_read_alike(path, by_qemu=False)
    shutil.move(other, tmp_path / "renamed.vhd")
    rebase(path, str(tmp_path / "renamed.vhd"))
    assert our_hash(path) == before
    assert_read_alike(path, by_qemu=False)


def test_the_ntfs_child_of_windows_leaves_its_fixed_parent_and_comes_back(tmp_path: Path) -> None:
    parent = unpacked("ntfs-parent.vhd.gz", tmp_path)
    path = unpacked("ntfs-differential.vhd.gz", tmp_path)
    before = our_hash(path)
    assert before.hex() == "b7922a46a6b08fa4f4fc0c51a25d5587d1d49f15cfade45ca740dd07110ae144"
    base = str(tmp_path / "empty.vhd")
    create_dynamic(base, 4 * MIB)
    middle = str(tmp_path / "middle.vhd")
    create_differencing(middle, base)
    scribble(middle, 7)
    for target in (middle, base, parent):
        rebase(path, target)
        assert our_hash(path) == before
        assert seven_zip_hash(path) == before
    assert not list(differences(path, path))


@pytest.mark.skipif(shutil.which("sfdisk") is None, reason="needs sfdisk (Debian: fdisk)")
@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_sfdisk_finds_no_error_in_a_gpt_that_was_moved(kind: str, tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.touch()
    os.truncate(raw, 40 * MIB)
    script = "label: gpt\nstart=2048, size=20000, name=one\nstart=24576, size=30000, name=two\n"
    subprocess.run(["sfdisk", "-q", str(raw)], input=script, text=True, check=True, capture_output=True, timeout=60)
    path = str(tmp_path / "d.vhd")
    (create_fixed if kind == "fixed" else create_dynamic)(path, 40 * MIB)
    with open_chain(path) as chain:
        chain.pwrite(0, raw.read_bytes())
    partitions = partitions_of(raw)
    for size_bytes in (80 * MIB, 80 * MIB + 512, 300 * MIB, 30 * MIB):
        assert resize(path, size_bytes).table == "gpt"
        with open_chain(path, read_only=True) as chain:
            raw.write_bytes(all_of(chain))
        assert "No errors detected" in run("sfdisk", "--verify", str(raw))
        assert partitions_of(raw) == partitions


def partitions_of(raw: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(run("sfdisk", "--json", str(raw)))["partitiontable"]["partitions"]
    return found
