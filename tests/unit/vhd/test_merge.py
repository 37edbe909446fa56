"""Merging: what is written where, what is refused, what a journal is believed."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from tests.unit.vhd.craft import patch
from tests.unit.vhd.power_cut import KilledError, RecordingIO

from mullion.base.errors import ConflictError, InvalidError, MullionError, NoSpaceError, NotFoundError
from mullion.base.units import KIB
from mullion.vhd import DiskBusyError, create_differencing, create_dynamic, create_fixed, inspect_chain, open_chain
from mullion.vhd.errors import VhdDamagedError
from mullion.vhd.merge import merge
from mullion.vhd.merge_journal import JOURNAL_LIMIT, journal_path, read_journal

pytestmark = pytest.mark.unit

SIZE = 256 * KIB


def content(path: str) -> bytes:
    with open_chain(path, read_only=True) as chain:
        buffer = bytearray(chain.size_bytes)
        chain.pread(0, buffer)
        return bytes(buffer)


def scribble(path: str, seed: int) -> None:
    choose = random.Random(seed)
    with open_chain(path) as chain:
        for _ in range(12):
            length = choose.choice([512, 700, 4096, 20_000])
            offset = choose.randrange(chain.size_bytes - length)
            chain.pwrite(offset, choose.randbytes(length))
            chain.write_zeroes(choose.randrange(chain.size_bytes - length) // 512 * 512, length)


def make(folder: Path, kind: str = "dynamic", layers: int = 2, size_bytes: int = SIZE) -> list[str]:
    """A chain with data in every layer, base first: `0.vhd`, `1.vhd`, ..."""
    paths = [str(folder / f"{number}.vhd") for number in range(layers + 1)]
    if kind == "fixed":
        create_fixed(paths[0], size_bytes, durable=False)
    else:
        create_dynamic(paths[0], size_bytes, block_bytes=16 * KIB, durable=False)
    scribble(paths[0], 0)
    for number in range(1, layers + 1):
        create_differencing(paths[number], paths[number - 1], block_bytes=8 * KIB << number, durable=False)
        scribble(paths[number], number)
    return paths


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_a_child_into_its_parent(kind: str, tmp_path: Path) -> None:
    base, child = make(tmp_path, kind, layers=1)
    expected = content(child)
    said: list[tuple[str, int, int]] = []
    report = merge(child, progress=lambda *args: said.append(args))
    assert (report.disk, report.into, report.merged, report.removed) == (base, base, [child], [child])
    assert not report.resumed
    assert content(base) == expected
    assert names(tmp_path) == ["0.vhd"]
    done = [done for stage, done, total in said if stage == "copying" and done <= total]
    assert done == sorted(done)
    assert not inspect_chain(base).files[0].warnings


@pytest.mark.parametrize(("first", "into"), [(2, 0), (2, 1), (1, 0), (3, 1), (4, 0), (4, 3)])
def test_any_range(first: int, into: int, tmp_path: Path) -> None:
    paths = make(tmp_path, layers=4)
    before = {path: content(path) for path in paths}
    report = merge(paths[4], from_path=paths[first], into_path=paths[into])
    gone = paths[into + 1 : first + 1]
    assert report.merged == report.removed[::-1] or set(report.merged) == set(report.removed) == set(gone)
    assert not [path for path in gone if os.path.exists(path)]
    left = [*paths[: into + 1], *paths[first + 1 :]]
    assert list(inspect_chain(left[-1]).paths) == left[::-1]
    for path in left:
        assert content(path) == before[paths[first] if path == paths[into] else path]
    assert report.disk == left[-1]


def test_zeros_hide_what_the_parent_has(tmp_path: Path) -> None:
    base, child = str(tmp_path / "base.vhd"), str(tmp_path / "child.vhd")
    create_fixed(base, SIZE)
    with open_chain(base) as chain:
        chain.pwrite(0, b"p" * SIZE)
    create_differencing(child, base)
    with open_chain(child) as chain:
        chain.write_zeroes(64 * KIB, 128 * KIB)
        chain.pwrite(512, bytes(512))
    merge(child)
    expected = bytearray(b"p" * SIZE)
    expected[64 * KIB : 192 * KIB] = bytes(128 * KIB)
    expected[512:1024] = bytes(512)
    assert content(base) == expected


def test_a_kept_child_reads_as_before(tmp_path: Path) -> None:
    base, middle, top = make(tmp_path)
    before = content(middle), content(top)
    report = merge(top, from_path=middle, keep=True)
    assert report.removed == []
    assert (content(middle), content(top)) == before
    assert inspect_chain(top).paths == (top, base)
    assert content(base) == before[0]


def test_the_ancestor_grows_with_a_larger_child(tmp_path: Path) -> None:
    for kind in ("fixed", "dynamic"):
        folder = tmp_path / kind
        folder.mkdir()
        base = make(folder, kind, layers=0)[0]
        child = str(folder / "child.vhd")
        create_differencing(child, base, size_bytes=SIZE + 40 * KIB)
        scribble(child, 5)
        expected = content(child)
        merge(child)
        assert content(base) == expected


def test_what_lies_past_the_end_of_a_merged_layer_stays_hidden(tmp_path: Path) -> None:
    base = make(tmp_path, layers=0)[0]
    small, top = str(tmp_path / "small.vhd"), str(tmp_path / "top.vhd")
    create_differencing(small, base, size_bytes=SIZE // 2)
    scribble(small, 3)
    create_differencing(top, small, size_bytes=SIZE)
    expected = content(top)
    assert not any(expected[SIZE // 2 :])
    with pytest.raises(InvalidError, match="larger than it is"):
        merge(small, into_path=base)
    merge(top, from_path=small)
    assert content(top) == expected


def test_refused(tmp_path: Path) -> None:
    base, middle, top = make(tmp_path)
    before = content(top)
    with pytest.raises(InvalidError, match="no parent"):
        merge(base)
    with pytest.raises(InvalidError, match="base of the chain"):
        merge(top, from_path=base)
    with pytest.raises(InvalidError, match="no layer"):
        merge(top, into_path=__file__)
    with pytest.raises(NotFoundError):
        merge(top, into_path=str(tmp_path / "nothing.vhd"))
    with pytest.raises(InvalidError, match="single layer"):
        merge(top, into_path=base, keep=True)
    with pytest.raises(ConflictError, match="parent of other disks") as caught:
        merge(middle)
    assert caught.value.remedy == f"Name the top of the chain: mullion vhd merge {top} --from {middle} --into {base}"
    sibling = str(tmp_path / "sibling.vhd")
    create_differencing(sibling, middle)
    with pytest.raises(ConflictError, match=r"sibling\.vhd"):
        merge(top)
    with pytest.raises(ConflictError, match=r"sibling\.vhd"):
        merge(top, into_path=base)
    os.unlink(sibling)
    for held in (base, middle, top):
        with open_chain(held, read_only=True), pytest.raises(DiskBusyError):
            merge(top, into_path=base)
    assert content(top) == before
    assert names(tmp_path) == ["0.vhd", "1.vhd", "2.vhd"]


def test_a_damaged_layer_is_not_merged(tmp_path: Path) -> None:
    base, child = make(tmp_path, layers=1)
    patch(child, 0, bytes(512))
    with pytest.raises(VhdDamagedError, match="damaged") as caught:
        merge(child)
    assert "repair" in caught.value.remedy
    assert names(tmp_path) == ["0.vhd", "1.vhd"]
    assert base


@pytest.mark.parametrize("into", [0, 1])
def test_a_kill_at_every_change_is_resumed(into: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    expected = content(make(source, layers=3)[3])
    for first in (3, 2):
        if first - into < 1:
            continue
        fuse = 0
        while True:
            folder = tmp_path / "try"
            shutil.copytree(source, folder)
            paths = [str(folder / f"{number}.vhd") for number in range(4)]
            file_io = RecordingIO()
            file_io.fuse = fuse
            try:
                merge(paths[3], from_path=paths[first], into_path=paths[into], file_io=file_io)
                break
            except KilledError:
                pass
            disk = paths[3] if os.path.exists(paths[3]) else paths[into]
            assert content(disk) == expected
            if os.path.exists(journal_path(paths[3])):
                report = merge(paths[3])
                assert report.resumed
            elif os.path.exists(paths[3]) and fuse < 5:
                report = merge(paths[3], from_path=paths[first], into_path=paths[into])
            assert content(report.disk) == expected
            assert names(folder) == [f"{number}.vhd" for number in range(4) if not into < number <= first]
            shutil.rmtree(folder)
            fuse += 1 if fuse < 4 else 7
        shutil.rmtree(folder)
        assert fuse > 30


def interrupted(folder: Path, fuse: int = 12, **ranges: str) -> list[str]:
    paths = make(folder, layers=3)
    file_io = RecordingIO()
    file_io.fuse = fuse
    with pytest.raises(KilledError):
        merge(paths[3], **ranges, file_io=file_io)
    assert os.path.exists(journal_path(paths[3]))
    return paths


def test_what_was_written_since_the_interruption_is_merged_too(tmp_path: Path) -> None:
    paths = interrupted(tmp_path)
    scribble(paths[3], 99)
    expected = content(paths[3])
    report = merge(paths[3])
    assert report.resumed
    assert content(paths[2]) == expected


def test_another_merge_waits_for_the_one_that_was_begun(tmp_path: Path) -> None:
    paths = interrupted(tmp_path)
    with pytest.raises(ConflictError, match="finished first"):
        merge(paths[3], into_path=paths[0])
    merge(paths[3], into_path=paths[2])


def test_a_left_over_file_that_was_changed_is_not_removed(tmp_path: Path) -> None:
    paths = make(tmp_path, layers=3)
    journal = Path(journal_path(paths[3]))
    file_io = RecordingIO()
    file_io.remove_file = lambda path: (_ for _ in ()).throw(KilledError())  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        merge(paths[3], from_path=paths[2], into_path=paths[1], file_io=file_io)
    assert journal.exists()
    assert inspect_chain(paths[3]).paths == (paths[3], paths[1], paths[0])
    scribble(paths[2], 7)
    report = merge(paths[3])
    assert report.removed == []
    assert "not removed" in report.notes[0]
    assert os.path.exists(paths[2])
    assert not journal.exists()


def test_a_journal_names_no_file_of_others(tmp_path: Path) -> None:
    """A journal that came with a disk must not have anything removed outside of the disk's folder."""
    folder, other = tmp_path / "disks", tmp_path / "others"
    folder.mkdir()
    other.mkdir()
    paths = make(folder, layers=3)
    victim = str(other / "victim.vhd")
    shutil.copy2(paths[2], victim)
    file_io = RecordingIO()
    file_io.remove_file = lambda path: (_ for _ in ()).throw(KilledError())  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        merge(paths[3], from_path=paths[2], into_path=paths[1], file_io=file_io)
    os.replace(paths[2], victim)
    rewrite(Path(journal_path(paths[3])), lambda fields: fields["layers"][0].update(path="../others/victim.vhd"))
    report = merge(paths[3])
    assert report.removed == []
    assert os.path.exists(victim)


def rewrite(journal: Path, change: object) -> None:
    """Change a journal's fields, with a good digest."""
    import hashlib

    fields = json.loads(journal.read_bytes().partition(b"\n")[2])
    change(fields)  # type: ignore[operator]
    body = json.dumps(fields).encode()
    journal.write_bytes(b"mullion-merge 1 " + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.pop("into"),
        lambda fields: fields.update(layers=[]),
        lambda fields: fields.update(layers=fields["layers"] * 1024),
        lambda fields: fields.update(top="zz" * 16),
        lambda fields: fields["layers"][0].update(inode="1"),
        lambda fields: fields["layers"][0].update(path="a\0b"),
    ],
)
def test_hostile_journals_are_refused(change: object, tmp_path: Path) -> None:
    paths = interrupted(tmp_path)
    journal = Path(journal_path(paths[3]))
    rewrite(journal, change)
    before = names(tmp_path)
    with pytest.raises(VhdDamagedError, match="journal") as caught:
        merge(paths[3])
    assert str(journal) in caught.value.remedy
    assert names(tmp_path) == before
    journal.unlink()
    merge(paths[3])


@pytest.mark.parametrize("raw", [b"", b"mullion-merge 1 00\n{}", b"x" * (JOURNAL_LIMIT + 9), b"\xff" * 100])
def test_what_is_no_journal(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / ".a.vhd.mullion-merge"
    path.write_bytes(raw)
    with pytest.raises(VhdDamagedError):
        read_journal(str(path))


def test_a_journal_that_is_a_pipe_or_a_link_does_not_block(tmp_path: Path) -> None:
    paths = make(tmp_path, layers=1)
    for make_it in (os.mkfifo, lambda path: os.symlink("/etc/passwd", path)):
        make_it(journal_path(paths[1]))  # type: ignore[operator]
        with pytest.raises(MullionError):
            merge(paths[1])
        os.unlink(journal_path(paths[1]))


def test_a_full_file_system_loses_nothing(tmp_path: Path) -> None:
    paths = make(tmp_path, layers=2)
    expected = content(paths[2])
    for fuse in range(1, 30, 4):
        file_io = RecordingIO()
        file_io.fuse, file_io.fuse_kills = fuse, False
        try:
            merge(paths[2], into_path=paths[0], file_io=file_io)
            break
        except NoSpaceError:
            pass
        assert content(paths[2]) == expected
    else:
        merge(paths[2])
    assert content(paths[0]) == expected
