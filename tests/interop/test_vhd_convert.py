"""Converted disks read by others and theirs by us; killed, interrupted and full in the middle; the commands as typed."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.framework.small_filesystem import small_filesystem

from mullion.base.units import KIB, MIB
from mullion.vhd import create_differencing, create_dynamic, open_chain

pytestmark = pytest.mark.interop

FIXTURES = Path(os.environ.get("MULLION_FIXTURES", "../shared/fixtures")).resolve()
OPENERS = {".gz": gzip.open, ".bz2": bz2.open}
SEVEN_ZIP = shutil.which("7zz") or shutil.which("7z") or "7z"
needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="the folder of foreign disks is not there: set MULLION_FIXTURES"
)
HASHES = {
    "ntfs-dynamic.vhd.gz": "8b10b52e3d1e76075d05a5101a6536b9fa8376a5b8f7c22f502d0987d165c876",
    "ntfs-differential.vhd.gz": "b7922a46a6b08fa4f4fc0c51a25d5587d1d49f15cfade45ca740dd07110ae144",
    "ntfs-dynamic.vhdx.gz": None,
    "win8-child.vhd": hashlib.sha256(bytes(40 * MIB)).hexdigest(),
    "vbox.vhd": hashlib.sha256(bytes(40 * MIB)).hexdigest(),
    "win10-fat16-fixed.vhd.gz": None,
    "ext2.vhd.gz": None,
    "xapi.vhd": None,
    "qemu.vhd": None,
}
PARENTS = {"ntfs-differential.vhd.gz": "ntfs-parent.vhd.gz", "win8-child.vhd": "win8.vhd"}


def mullion(*words: str, cwd: Path, stdin: bytes = b"", check: bool = True) -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-m", "mullion.cli", "vhd", *words]
    done = subprocess.run(argv, cwd=cwd, input=stdin, capture_output=True, timeout=120, check=False)
    assert not check or done.returncode == 0, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done


def unpacked(name: str, folder: Path) -> str:
    source = FIXTURES / name
    target = folder / name.removesuffix(".gz").removesuffix(".bz2")
    with OPENERS.get(source.suffix, open)(source, "rb") as packed, target.open("wb") as plain:
        shutil.copyfileobj(packed, plain)
    return target.name


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def qemu_raw(path: Path) -> bytes:
    target = path.with_suffix(".qemu.img")
    subprocess.run(["qemu-img", "convert", "-f", "vpc", "-O", "raw", path, target], check=True, timeout=120)
    return target.read_bytes()


def random_disk(folder: Path, size_bytes: int = 24 * MIB) -> bytes:
    """`source.img` with data, zeros and a hole."""
    choose = random.Random(size_bytes)
    content = bytearray(size_bytes)
    for _ in range(30):
        offset = choose.randrange(size_bytes - 100_000)
        content[offset : offset + 99_999] = choose.randbytes(99_999)
    (folder / "source.img").write_bytes(content)
    return bytes(content)


@needs_fixtures
@pytest.mark.parametrize("name", HASHES)
def test_every_real_disk_converts(name: str, tmp_path: Path) -> None:
    source = unpacked(name, tmp_path)
    if name in PARENTS:
        unpacked(PARENTS[name], tmp_path)
    expected = mullion("hash", source, cwd=tmp_path).stdout.split()[0].decode()
    assert HASHES[name] in (None, expected)
    mullion("convert", source, "raw.img", "--verify", cwd=tmp_path)
    assert sha256((tmp_path / "raw.img").read_bytes()) == expected
    for kind in ("dynamic", "fixed"):
        target = tmp_path / f"{kind}.vhd"
        mullion("convert", source, target.name, "--to", kind, "--verify", cwd=tmp_path)
        assert sha256(qemu_raw(target)) == expected
        read = subprocess.run([SEVEN_ZIP, "x", "-tVHD", "-so", target], capture_output=True, check=True, timeout=60)
        assert sha256(read.stdout) == expected


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
@pytest.mark.parametrize("size_bytes", [24 * MIB, 5 * MIB + 512])
def test_what_qemu_writes_is_read(subformat: str, size_bytes: int, tmp_path: Path) -> None:
    content = random_disk(tmp_path, size_bytes)
    options = f"subformat={subformat},force_size=on"
    argv = ["qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", options, "source.img", "theirs.vhd"]
    subprocess.run(argv, cwd=tmp_path, check=True, timeout=60)
    for target in ("ours.vhd", "ours.img"):
        mullion("convert", "theirs.vhd", target, "--verify", cwd=tmp_path)
    assert (tmp_path / "ours.img").read_bytes() == content
    assert qemu_raw(tmp_path / "ours.vhd") == content


@pytest.mark.parametrize("source_format", ["qcow2", "vmdk", "vdi", "vhdx"])
def test_foreign_disks_convert(source_format: str, tmp_path: Path) -> None:
    content = random_disk(tmp_path)
    argv = ["qemu-img", "convert", "-f", "raw", "-O", source_format, "source.img", "disk.bin"]
    subprocess.run(argv, cwd=tmp_path, check=True, timeout=60)
    done = mullion("convert", "disk.bin", "ours.vhd", "--verify", "--format", "json", cwd=tmp_path)
    assert json.loads(done.stdout)["source_format"] == source_format
    assert qemu_raw(tmp_path / "ours.vhd") == content


ENDINGS = {"SIGKILL": -signal.SIGKILL, "SIGINT": 130}
END_ITSELF = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have had it ignored
from mullion.cli import main
from mullion.cli.vhd import meter

class Ending(meter.Meter):
    def __call__(self, stage, done_bytes, total_bytes):
        if done_bytes >= total_bytes // 2:
            os.kill(os.getpid(), signal.{ending})
        super().__call__(stage, done_bytes, total_bytes)

meter.Meter = Ending
sys.argv = ["mullion", "vhd", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    "command", [("convert", "source.img", "new.vhd"), ("convert", "source.img", "old.vhd", "--force")]
)
def test_a_copy_that_is_ended_in_the_middle_leaves_nothing(
    ending: str, command: tuple[str, ...], tmp_path: Path
) -> None:
    """The command ends itself half-way: the old file stays, or there is none."""
    (tmp_path / "source.img").write_bytes(os.urandom(32 * MIB))
    create_dynamic(str(tmp_path / "old.vhd"), MIB)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    argv = [sys.executable, "-c", END_ITSELF.format(ending=ending), *command]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert done.returncode == ENDINGS[ending], done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    if ending == "SIGINT":
        assert b"convert was interrupted" in done.stderr
        assert b"Nothing was left behind" in done.stderr


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_filesystem(tmp_path / "small", 8 * MIB) as folder:
        yield folder


@pytest.mark.parametrize("words", [("convert",), ("convert", "--to", "fixed"), ("convert", "--to", "raw"), ("clone",)])
def test_a_full_filesystem_is_said(words: tuple[str, ...], small: Path, tmp_path: Path) -> None:
    create_dynamic(str(tmp_path / "source.vhd"), 32 * MIB)
    with open_chain(str(tmp_path / "source.vhd")) as chain:
        chain.pwrite(0, os.urandom(24 * MIB))
    done = mullion(words[0], "source.vhd", "small/new.vhd", *words[1:], cwd=tmp_path, check=False)
    assert done.returncode == 9, done.stderr
    assert b"small/new.vhd cannot be written: No space left" in done.stderr
    assert list(small.iterdir()) == []
    status = os.statvfs(small)
    assert status.f_bfree == status.f_blocks


def test_into_a_pipe_that_somebody_reads(tmp_path: Path) -> None:
    content = random_disk(tmp_path)
    mullion("convert", "source.img", "disk.vhd", cwd=tmp_path)
    assert mullion("convert", "disk.vhd", "-", cwd=tmp_path).stdout == content
    fixed = mullion("convert", "disk.vhd", "-", "--to", "fixed", cwd=tmp_path).stdout
    (tmp_path / "fixed.vhd").write_bytes(fixed)
    assert qemu_raw(tmp_path / "fixed.vhd") == content
    line = f"{sys.executable} -m mullion.cli vhd convert disk.vhd - | head -c 5 > part; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, timeout=60, check=True)
    assert (tmp_path / "part").read_bytes() == content[:5]
    assert b"Traceback" not in done.stderr
    for words in (("--to", "dynamic"), ("--verify",), ("--block-size", "2M")):
        assert mullion("convert", "disk.vhd", "-", *words, cwd=tmp_path, check=False).returncode == 5


def test_names_with_spaces_and_any_letters(tmp_path: Path) -> None:
    content = random_disk(tmp_path)
    (tmp_path / "mein Ordner 雪").mkdir()
    name = "mein Ordner 雪/die Plätte, nº 1.vhd"
    mullion("convert", "source.img", name, cwd=tmp_path)
    create_differencing(str(tmp_path / "das Kind.vhd"), str(tmp_path / name))
    done = mullion("hash", "das Kind.vhd", name, "source.img", cwd=tmp_path)
    assert done.stdout.decode().splitlines() == [
        f"{sha256(content)}  {path}" for path in ("das Kind.vhd", name, "source.img")
    ]
    mullion("flatten", "das Kind.vhd", "ganz & gar.vhd", "--verify", cwd=tmp_path)
    assert qemu_raw(tmp_path / "ganz & gar.vhd") == content


def test_reading_and_writing_parts(tmp_path: Path) -> None:
    content = bytearray(random_disk(tmp_path))
    mullion("convert", "source.img", "disk.vhd", cwd=tmp_path)
    part = mullion("read", "disk.vhd", "--offset", "1M", "--length", "70001", cwd=tmp_path).stdout
    assert part == content[MIB : MIB + 70001]
    mullion("write", "disk.vhd", "--offset", "12345", cwd=tmp_path, stdin=part)
    content[12345 : 12345 + 70001] = part
    assert mullion("read", "disk.vhd", cwd=tmp_path).stdout == content
    assert qemu_raw(tmp_path / "disk.vhd") == content
    # A pipe is poured in until the disk ends, a file is refused before.
    done = mullion("write", "disk.vhd", "--offset", f"{24 * MIB - 10}", cwd=tmp_path, stdin=b"x" * 11, check=False)
    assert done.returncode == 5
    assert b"10 bytes from" in done.stderr
    content[-10:] = b"x" * 10
    (tmp_path / "long").write_bytes(b"y" * 11)
    with (tmp_path / "long").open("rb") as file:
        argv = [sys.executable, "-m", "mullion.cli", "vhd", "write", "disk.vhd", "--offset", f"{24 * MIB - 10}"]
        done = subprocess.run(argv, cwd=tmp_path, stdin=file, capture_output=True, timeout=60, check=False)
    assert done.returncode == 5
    assert b"nothing was done" in done.stderr
    assert mullion("read", "disk.vhd", cwd=tmp_path).stdout == content
    assert mullion("read", "disk.vhd", "--offset", "25M", cwd=tmp_path, check=False).returncode == 5


def test_a_name_that_the_content_contradicts(tmp_path: Path) -> None:
    """A VHD that lost its footer is no raw disk; a raw disk may have any name but that of another format."""
    (tmp_path / "lost.vhd").write_bytes(b"x" * 64 * KIB)
    done = mullion("convert", "lost.vhd", "new.vhd", cwd=tmp_path, check=False)
    assert done.returncode == 5
    assert b"--from raw" in done.stderr
    mullion("convert", "lost.vhd", "new.vhd", "--from", "raw", cwd=tmp_path)
    assert mullion("read", "new.vhd", cwd=tmp_path).stdout == b"x" * 64 * KIB
    done = mullion("hash", "new.vhd", "missing.vhd", "lost.vhd", cwd=tmp_path, check=False)
    assert done.stdout.decode() == f"{sha256(b'x' * 64 * KIB)}  new.vhd\n"
    assert done.returncode == 3
