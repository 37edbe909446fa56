"""A journal is replayed in memory as e2fsck replays it on the disk: what debugfs wrote into it is what is read."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.interop.filesystem_images import call, device_of, make_ext

from mullion.media.filesystems.entries import FileEntry
from mullion.media.filesystems.reader import VolumeReader, open_volume
from mullion.media.filesystems.volumes import choose_volume, list_volumes

pytestmark = pytest.mark.interop

MAGIC = bytes.fromhex("c03b3998")
BLOCK = 1024


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An ext4 of 1 KiB blocks with some files."""
    tree = tmp_path / "tree"
    (tree / "folder").mkdir(parents=True)
    for number in range(40):
        (tree / f"folder/file{number:02}").write_bytes(random.Random(number).randbytes(3000))
    return make_ext(tmp_path / "old.img", tree, "ext4", "24M", "-b", str(BLOCK))


def changed(old: Path, new: Path) -> tuple[list[int], bytes]:
    """The blocks that differ, but for the superblock's, and their newer content."""
    before, after = old.read_bytes(), new.read_bytes()
    numbers = [
        block
        for block in range(2, len(before) // BLOCK)
        if before[block * BLOCK : (block + 1) * BLOCK] != after[block * BLOCK : (block + 1) * BLOCK]
    ]
    return numbers, b"".join(after[block * BLOCK : (block + 1) * BLOCK] for block in numbers)


def edited(old: Path, *commands: str) -> Path:
    """A copy in which debugfs has done something."""
    new = old.with_name("new.img")
    shutil.copyfile(old, new)
    for command in commands:
        call("debugfs", "-w", "-R", command, new)
    return new


def journaled(old: Path, *steps: tuple[str, bytes], opening: str = "jo") -> Path:
    """A copy whose journal holds transactions, each of options of `journal_write` and content, which were not applied."""
    dirty = old.with_name("dirty.img")
    shutil.copyfile(old, dirty)
    lines = [opening]
    for number, (options, blocks) in enumerate(steps):
        file = old.with_name(f"blocks{number}")
        file.write_bytes(blocks)
        lines.append(f"jw {options} {file if blocks else ''}")
    script = old.with_name("script")
    script.write_text("\n".join([*lines, "jc"]) + "\n")
    done = subprocess.run(["debugfs", "-w", "-f", script, dirty], capture_output=True, check=True, timeout=60)
    words = done.stderr.decode().splitlines()[1:]
    assert not words, words
    return dirty


def replayed(dirty: Path) -> Path:
    """What e2fsck makes of it."""
    copy = dirty.with_name("replayed.img")
    shutil.copyfile(dirty, copy)
    done = subprocess.run(["e2fsck", "-y", "-E", "journal_only", copy], capture_output=True, check=False, timeout=60)
    assert done.returncode in (0, 1), done.stdout
    return copy


def files_of(image: Path) -> dict[str, str]:
    """All files of an image with the SHA-256 of their content, and what people are told."""
    device = device_of(image)
    with open_volume(device, choose_volume(str(image), list_volumes(device)[0], None), str(image)) as files:
        found = _hashes(files)
        if files.notes:
            found["note"] = " ".join(files.notes)
    device.close()
    return found


def _hashes(files: VolumeReader) -> dict[str, str]:
    found: dict[str, str] = {}
    path, content = "", hashlib.sha256()
    for item in files.tree("/"):
        if isinstance(item, FileEntry):
            path, content = item.path, hashlib.sha256()
            found[path] = item.unreadable or ""
        else:
            content.update(item if isinstance(item, bytes) else bytes(item.length))
            found[path] = content.hexdigest()
    return found


def test_names_and_content_that_are_only_in_the_journal(old: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    fresh.write_bytes(random.Random(99).randbytes(50_000))
    new = edited(old, "rm /folder/file07", f"write {fresh} /folder/fresh", "mkdir /more")
    numbers, content = changed(old, new)
    dirty = journaled(old, (f"-b {','.join(map(str, numbers))}", content))
    assert files_of(dirty) == files_of(new) == files_of(replayed(dirty))
    assert files_of(old) != files_of(new)


@pytest.mark.parametrize("opening", ["jo", "jo -c", "jo -c -v 2", "jo -c -v 3"])
def test_later_transactions_revokes_and_what_was_not_committed(old: Path, opening: str) -> None:
    blocks = {}
    for name in ("file01", "file02", "file03", "file04"):
        said = subprocess.run(
            ["debugfs", "-R", f"blocks /folder/{name}", old], capture_output=True, check=True, timeout=60
        )
        blocks[name] = int(said.stdout.split()[0])
    one, two, escaped, four = blocks.values()
    dirty = journaled(
        old,
        (f"-b {one},{two}", b"a" * BLOCK + b"b" * BLOCK),
        (f"-b {one}", b"c" * BLOCK),
        (f"-b {escaped}", MAGIC + b"e" * (BLOCK - 4)),
        (f"-r {two}", b""),
        (f"-c -b {four}", b"d" * BLOCK),
        opening=opening,
    )
    found = files_of(dirty)
    assert found == files_of(replayed(dirty))
    before = files_of(old)
    told = {name: found[f"folder/{name}"] != before[f"folder/{name}"] for name in blocks}
    assert told == {"file01": True, "file02": False, "file03": True, "file04": False}


def test_a_journal_that_goes_around_its_end(old: Path) -> None:
    """What debugfs wrote from the first block on is turned around the ring, so that it goes on there."""
    said = subprocess.run(["debugfs", "-R", "blocks /folder/file01", old], capture_output=True, check=True, timeout=60)
    first_of_file, second_of_file = map(int, said.stdout.split()[:2])
    steps = [(f"-b {first_of_file},{second_of_file}", bytes([number]) * BLOCK * 2) for number in range(20)]
    dirty = journaled(old, *steps)
    raw = bytearray(dirty.read_bytes())
    at = raw.index(MAGIC + (4).to_bytes(4, "big"))
    blocks, first = (int.from_bytes(raw[at + offset : at + offset + 4], "big") for offset in (16, 20))
    ring = raw[at + first * BLOCK : at + blocks * BLOCK]
    for turn in (blocks - first - 1, blocks - first - 33):
        raw[at + first * BLOCK : at + blocks * BLOCK] = ring[-turn * BLOCK :] + ring[: -turn * BLOCK]
        raw[at + 28 : at + 32] = (first + turn).to_bytes(4, "big")
        dirty.write_bytes(raw)
        found = files_of(dirty)
        assert found == files_of(replayed(dirty))
        assert found["folder/file01"] != files_of(old)["folder/file01"]


def test_a_journal_that_says_what_cannot_be_is_told(old: Path) -> None:
    dirty = journaled(old, ("-b 5000", b"x" * BLOCK))
    raw = bytearray(dirty.read_bytes())
    at = raw.index(MAGIC + (4).to_bytes(4, "big"))
    for offset, value, word in (
        (40, 0x8000, "features"),
        (20, 0, "cannot be"),
        (28, 1 << 30, "cannot be"),
        (4, 9, "none"),
    ):
        broken = bytearray(raw)
        broken[at + offset : at + offset + 4] = value.to_bytes(4, "big")
        dirty.write_bytes(broken)
        found = files_of(dirty)
        assert word in found.pop("note")
        assert found == files_of(old)


def test_damage_in_a_journal_ends_in_an_error_or_in_files(old: Path) -> None:
    dirty = journaled(old, *[(f"-b {3000 + number}", bytes([number]) * BLOCK) for number in range(20)])
    whole = dirty.read_bytes()
    at = whole.index(MAGIC + (4).to_bytes(4, "big"))
    for seed in range(40):
        raw = bytearray(whole)
        chance = random.Random(seed)
        for _ in range(chance.randrange(1, 12)):
            raw[at + chance.randrange(60 * BLOCK)] = chance.randrange(256)
        dirty.write_bytes(raw)
        assert "folder/file01" in files_of(dirty), seed
