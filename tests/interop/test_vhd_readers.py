"""Other people's programs read what we write: 7-Zip files and chains, qemu-img single files."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.contract.block_device import all_of

from mullion.base.units import GIB, KIB, MIB
from mullion.vhd import create_differencing, create_dynamic, create_fixed, open_chain

pytestmark = pytest.mark.interop

SEVEN_ZIP = shutil.which("7zz") or shutil.which("7z") or "7z"


def scribble(path: str, seed: int, *, rounds: int = 60) -> bytes:
    """Write here and there, some of it unaligned; returns the content's hash."""
    choose = random.Random(seed)
    with open_chain(path) as chain:
        for number in range(rounds):
            length = choose.choice([512, 777, 4096, 70_000])
            offset = choose.randrange(chain.size_bytes - length)
            chain.pwrite(offset, choose.randbytes(length))
            if number % 20 == 19:
                chain.write_zeroes(offset, length)
        return hashlib.sha256(all_of(chain)).digest()


def seven_zip_hash(path: str) -> bytes:
    done = subprocess.run([SEVEN_ZIP, "x", "-tVHD", "-so", path], capture_output=True, check=True, timeout=120)
    return hashlib.sha256(done.stdout).digest()


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
@pytest.mark.parametrize("size_bytes", [5 * MIB + 512, 16 * MIB])
def test_7zip_reads_chains(kind: str, size_bytes: int, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"disk{number}.vhd") for number in range(4)]
    if kind == "fixed":
        create_fixed(paths[0], size_bytes)
    else:
        create_dynamic(paths[0], size_bytes, block_bytes=512 * KIB)
    scribble(paths[0], 0)
    for number in range(1, 4):
        create_differencing(paths[number], paths[number - 1])
        expected = scribble(paths[number], number)
        assert seven_zip_hash(paths[number]) == expected


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
@pytest.mark.parametrize("size_bytes", [512 * 1024 * 3 + 512, 40 * MIB, 100 * MIB + 1024])
def test_qemu_reads_the_same_size_and_content(kind: str, size_bytes: int, tmp_path: Path) -> None:
    path = str(tmp_path / "disk.vhd")
    (create_fixed if kind == "fixed" else create_dynamic)(path, size_bytes)
    expected = scribble(path, 9)
    raw = tmp_path / "disk.raw"
    line = ["qemu-img", "convert", "-f", "vpc", "-O", "raw", path, str(raw)]
    subprocess.run(line, check=True, capture_output=True, timeout=120)
    assert raw.stat().st_size == size_bytes
    assert hashlib.sha256(raw.read_bytes()).digest() == expected


@pytest.mark.parametrize("size_bytes", [1 * GIB, 127 * GIB, 2040 * GIB])
def test_qemu_sees_large_sizes_exactly(size_bytes: int, tmp_path: Path) -> None:
    path = str(tmp_path / "disk.vhd")
    create_dynamic(path, size_bytes)
    line = ["qemu-img", "info", "-f", "vpc", "--output=json", path]
    done = subprocess.run(line, check=True, capture_output=True, timeout=60)
    assert json.loads(done.stdout)["virtual-size"] == size_bytes


def test_we_read_what_qemu_writes(tmp_path: Path) -> None:
    raw, path = tmp_path / "disk.raw", str(tmp_path / "disk.vhd")
    content = bytearray(20 * MIB)
    content[3 * MIB : 3 * MIB + 9000] = random.Random(4).randbytes(9000)
    content[-512:] = b"z" * 512
    raw.write_bytes(content)
    line = ["qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "subformat=dynamic,force_size=on", str(raw), path]
    subprocess.run(line, check=True, capture_output=True, timeout=120)
    with open_chain(path, read_only=True) as chain:
        assert chain.size_bytes == 20 * MIB
        assert all_of(chain) == content
