"""Large files are read where they lie, past the library, and are what they are through it: never what is not theirs."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.interop.filesystem_images import call, make_exfat, make_ext, make_fat, make_iso
from tests.interop.test_ext_journal import journaled, replayed
from tests.interop.test_vhd_files import content_of, opened

from mullion.base.units import KIB, MIB
from mullion.media.filesystems.reader import VolumeReader

pytestmark = pytest.mark.interop


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes were read where they lie, an entry for each piece."""
    seen: list[int] = []
    extent = VolumeReader._extent

    def counted(self: VolumeReader, payload: bytes) -> Iterator[bytes]:
        for piece in extent(self, payload):
            seen.append(len(piece))
            yield piece

    monkeypatch.setattr(VolumeReader, "_extent", counted)
    return seen


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "large").write_bytes(noise(3 * MIB + 17))
    (root / "padded").write_bytes(noise(2 * MIB, 2) + bytes(20 * KIB))
    (root / "text").write_bytes(b"a line of text\n" * 150_000)
    (root / "small").write_bytes(noise(700_000, 3))
    with (root / "sparse").open("wb") as file:
        file.write(noise(MIB, 4))
        file.seek(3 * MIB)
        file.write(noise(2 * MIB, 5) + b"\1")
    return root


def make_ntfs(path: Path, size_bytes: int = 24 * MIB) -> Path:
    """An NTFS on a disk that was full of something else."""
    path.write_bytes(noise(size_bytes, 6))
    call("mkntfs", "-q", "-F", "-f", path)
    return path


@pytest.mark.parametrize("kind", ["ext2", "ext4", "fat16", "fat32", "iso", "ntfs"])
def test_large_files_are_what_was_written(tmp_path: Path, tree: Path, direct: list[int], kind: str) -> None:
    image = tmp_path / "disk.img"
    if kind.startswith("ext"):
        make_ext(image, tree, kind)
    elif kind == "iso":
        make_iso(image, tree)
    elif kind == "ntfs":
        make_ntfs(image)
        for path in tree.iterdir():
            call("ntfscp", "-q", image, path, path.name)
    else:
        make_fat(image, tree, int(kind[3:]), {"fat16": "40M", "fat32": "80M"}[kind])
    for files in opened(image):
        for path in tree.iterdir():
            assert content_of(files, path.name) == path.read_bytes(), path.name
    wanted = sum(path.stat().st_size for path in tree.iterdir() if path.name in ("large", "text"))
    assert sum(direct) > wanted, "large files went through the library"


def test_a_file_in_many_pieces(tmp_path: Path, direct: list[int]) -> None:
    folder = tmp_path / "tree"
    folder.mkdir()
    for number in range(32):
        (folder / f"f{number:02}").write_bytes(noise(64 * KIB, number))
    image = make_fat(tmp_path / "disk.img", folder, 12, "4M")
    call("mdel", "-i", image, *[f"::f{number:02}" for number in range(0, 32, 2)])
    large = tmp_path / "large"
    large.write_bytes(noise(2 * MIB, 99))
    call("mcopy", "-i", image, large, "::")
    for files in opened(image):
        assert content_of(files, "large") == large.read_bytes()
    assert len(direct) > 10


@pytest.mark.parametrize("written", [0, 300_000, MIB + 5, 2_500_000])
def test_what_was_never_written_is_zeros_whatever_lies_there(tmp_path: Path, written: int) -> None:
    """Of NTFS and exFAT files that were made longer than what was written to them."""
    length = 2_500_000
    content = noise(written)
    expected = content + bytes(length - written)
    stale = noise(length, 7)
    exfat = make_exfat(tmp_path / "exfat.img", "long.bin", content + stale[written:], valid_bytes=written)
    for files in opened(exfat):
        assert content_of(files, "long.bin") == expected
    ntfs = make_ntfs(tmp_path / "ntfs.img")
    (tmp_path / "long").write_bytes(content)
    call("ntfscp", "-q", ntfs, tmp_path / "long", "long.bin")
    if written < length:
        call("ntfsfallocate", "-q", "-f", "-l", str(length), ntfs, "long.bin")
    said = subprocess.run(["ntfscat", "-f", ntfs, "long.bin"], capture_output=True, check=True, timeout=60).stdout
    assert said == expected
    for files in opened(ntfs):
        assert content_of(files, "long.bin") == expected


def test_what_the_journal_has_newer_of_a_large_file(tmp_path: Path, direct: list[int]) -> None:
    folder = tmp_path / "tree"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / name).write_bytes(noise(2 * MIB, len(name)))
    old = make_ext(tmp_path / "old.img", folder, "ext4", "24M", "-b", "1024")
    said = subprocess.run(["debugfs", "-R", "blocks /one", old], capture_output=True, check=True, timeout=60)
    block = int(said.stdout.split()[1000])
    dirty = journaled(old, (f"-b {block}", b"n" * 1024))
    with_it, without = (dict[str, bytes](), dict[str, bytes]())
    for found, image in ((with_it, dirty), (without, replayed(dirty))):
        for files in opened(image):
            found.update({name: content_of(files, name) for name in ("one", "two")})
    assert with_it == without
    assert with_it["one"] != (folder / "one").read_bytes()
    assert with_it["two"] == (folder / "two").read_bytes()
    assert sum(direct) >= 6 * MIB - 3 * os.sysconf("SC_PAGE_SIZE")
