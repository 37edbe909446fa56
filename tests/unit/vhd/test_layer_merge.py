"""Merging a frozen layer while the chain is in use: who reads what at which instant, ends of every kind, refusals."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.vhd.craft import patch
from tests.unit.vhd.power_cut import KilledError, RecordingIO
from tests.unit.vhd.test_merge import SIZE, content, make, scribble

from mullion.base.block import LostDataError
from mullion.base.errors import ConflictError, InvalidError, MullionError, NoSpaceError
from mullion.base.units import KIB
from mullion.vhd import DiskBusyError, create_differencing, create_dynamic, inspect_chain, open_chain
from mullion.vhd.check import check_disk
from mullion.vhd.errors import HalfMergedError, ParentMismatchError, VhdDamagedError
from mullion.vhd.fileio import SYSTEM, FileIO
from mullion.vhd.findings import Verdict
from mullion.vhd.layer_journal import forget_layer_merge, layer_journal_path, read_mark
from mullion.vhd.layer_merge import LayerFiles, LayerMerged, check_only_child, merge_layer
from mullion.vhd.merge import merge
from mullion.vhd.pacing import Pace, StoppedError

pytestmark = pytest.mark.unit


def merge_files(
    upper: str,
    lower: str,
    *,
    file_io: FileIO = SYSTEM,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    pace: Pace | None = None,
    below_bytes: int | None = None,
    is_direct: bool = False,
) -> LayerMerged:
    with LayerFiles.open(upper, lower) as files:
        if not is_direct and files.direct_fd is not None:  # the recording needs every change at its own place
            os.close(files.direct_fd)
            files.direct_fd = None
        return merge_layer(
            files, file_io=file_io, progress=progress, pace=pace, below_bytes=below_bytes, note_bytes=24 * KIB
        )


@pytest.mark.parametrize("is_direct", [False, True])
@pytest.mark.parametrize("lower", [0, 1])
@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_readers_of_the_chain_see_nothing_of_it(kind: str, lower: int, is_direct: bool, tmp_path: Path) -> None:
    paths = make(tmp_path, kind, layers=3)
    before = {path: content(path) for path in paths}
    upper = lower + 1
    readers = [open_chain(path, read_only=True) for path in paths[upper:]]  # their structures are those of before
    looks: list[int] = []

    def look(_stage: str, done: int, total: int) -> None:
        looks.append(done)
        assert done <= total
        for path, reader in zip(paths[upper:], readers, strict=True):
            here = bytearray(reader.size_bytes)
            reader.pread(0, here)
            assert here == before[path]
            assert content(path) == before[path]
        with pytest.raises(DiskBusyError, match="by itself"):
            content(paths[lower])
        with pytest.raises(DiskBusyError):
            open_chain(paths[lower])

    report = merge_files(paths[upper], paths[lower], progress=look, is_direct=is_direct)
    assert report.copied_bytes
    assert len(looks) > 3
    assert looks == sorted(looks)
    for reader in readers:
        reader.close()
    for path in paths:
        assert content(path) == before[paths[upper] if path == paths[lower] else path]
    assert not inspect_chain(paths[lower]).files[0].warnings
    forget_layer_merge(paths[lower], SYSTEM)
    assert not [name for name in os.listdir(tmp_path) if "merging" in name]


@pytest.mark.parametrize("end", ["kill", "power 1", "power 2"])
def test_an_end_at_every_change(end: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    before = {Path(path).name: content(path) for path in make(source, layers=3)}
    fuse, resumed, marked = 0, 0, 0
    while True:
        folder = tmp_path / "try"
        shutil.copytree(source, folder)
        lower, upper, top = (str(folder / name) for name in ("1.vhd", "2.vhd", "3.vhd"))
        file_io = RecordingIO()
        file_io.fuse = fuse
        is_done = False
        try:
            merge_files(upper, lower, file_io=file_io)
            is_done = True
        except KilledError:
            if end != "kill":
                file_io.cut_power(random.Random(f"{fuse} {end}"))
        for path in (top, upper):
            assert content(path) == before[Path(path).name]
        if is_done:
            assert content(lower) == before["2.vhd"]
            break
        try:
            assert content(lower) in (before["1.vhd"], before["2.vhd"])
        except HalfMergedError as error:
            marked += 1
            remedy = error.remedy
            with pytest.raises(HalfMergedError):
                create_differencing(str(folder / "other.vhd"), lower)
            assert f"mullion vhd merge {upper} --into {lower}" in remedy
        resumed += bool(merge_files(upper, lower).resumed_bytes)
        assert content(lower) == before["2.vhd"]
        assert content(top) == before["3.vhd"]
        shutil.rmtree(folder)
        fuse += 1
    assert fuse > 30
    assert marked > 20
    assert resumed > 5


def interrupted(folder: Path, fuse: int = 25) -> tuple[str, str, str]:
    """Lower, upper and top of a chain whose merge was killed in its midst."""
    paths = make(folder, layers=3)
    file_io = RecordingIO()
    file_io.fuse = fuse
    with pytest.raises(KilledError):
        merge_files(paths[2], paths[1], file_io=file_io)
    assert read_mark(layer_journal_path(paths[1]))
    return paths[1], paths[2], paths[3]


def test_a_full_file_system_loses_nothing(tmp_path: Path) -> None:
    refused = 0
    for fuse in range(1, 60, 3):
        folder = tmp_path / str(fuse)
        folder.mkdir()
        paths = make(folder, layers=2)
        expected = content(paths[2])
        file_io = RecordingIO()
        file_io.fuse, file_io.fuse_kills = fuse, False
        try:
            merge_files(paths[2], paths[1], file_io=file_io)
        except NoSpaceError as error:
            refused += error.context["path"] == paths[1]
            assert content(paths[2]) == expected
            merge_files(paths[2], paths[1])
        assert content(paths[1]) == expected
    assert refused > 5


def test_a_sync_that_fails_may_have_lost_what_it_was_to_write(tmp_path: Path) -> None:
    """What counts as written and is not there: neither notes nor structures that are read back may be believed."""
    failed = 0
    for fuse in itertools.count(1):
        folder = tmp_path / str(fuse)
        folder.mkdir()
        paths = make(folder, layers=2)
        expected = content(paths[2])
        file_io = RecordingIO()
        file_io.fuse, file_io.fuse_kills, file_io.loses = fuse, False, random.Random(fuse)
        try:
            merge_files(paths[2], paths[1], file_io=file_io)
        except NoSpaceError as error:
            failed += isinstance(error.__cause__, LostDataError)
            assert content(paths[2]) == expected
            merge_files(paths[2], paths[1], file_io=file_io)
        else:
            assert failed > 5
            return
        file_io.cut_power(random.Random(fuse))
        assert content(paths[1]) == expected
        shutil.rmtree(folder)


def test_a_stop_is_heard_and_what_was_done_is_not_done_again(tmp_path: Path) -> None:
    paths = make(tmp_path, layers=2)
    expected = content(paths[2])
    pace = Pace(0)

    def stop_in_the_midst(_stage: str, done: int, total: int) -> None:
        if done > total // 2:
            pace.stop()

    with pytest.raises(StoppedError):
        merge_files(paths[2], paths[1], pace=pace, progress=stop_in_the_midst)
    mark = read_mark(layer_journal_path(paths[1]))
    assert mark is not None
    assert mark.done_bytes
    assert content(paths[2]) == expected
    assert merge_files(paths[2], paths[1]).resumed_bytes == mark.done_bytes
    assert content(paths[1]) == expected


def test_a_layer_that_changed_since_is_merged_from_the_start(tmp_path: Path) -> None:
    """A layer above was merged into it meanwhile, offline."""
    lower, upper, top = interrupted(tmp_path, 40)
    assert read_mark(layer_journal_path(lower)).done_bytes  # type: ignore[union-attr]
    expected = content(top)
    merge(top, into_path=upper)
    assert merge_files(upper, lower).resumed_bytes == 0
    assert content(lower) == expected


def test_the_offline_merge_finishes_it(tmp_path: Path) -> None:
    lower, upper, top = interrupted(tmp_path)
    expected, middle = content(top), content(upper)
    with pytest.raises(ConflictError) as caught:  # the command of the remedy, where other disks lie on the upper layer
        merge(upper, into_path=lower)
    assert f"mullion vhd merge {top} --from {upper} --into {lower}" in caught.value.remedy
    merge(top, from_path=upper, into_path=lower)
    assert content(top) == expected
    assert content(lower) == middle
    assert sorted(os.listdir(tmp_path)) == ["0.vhd", "1.vhd", "3.vhd"]


def test_a_mixture_is_merged_nowhere_else(tmp_path: Path) -> None:
    lower, upper, top = interrupted(tmp_path)
    base = str(tmp_path / "0.vhd")
    expected = content(top)
    with pytest.raises(HalfMergedError):
        merge_files(lower, base)
    with pytest.raises(HalfMergedError):
        merge(top, from_path=lower, into_path=base)
    with pytest.raises(HalfMergedError):
        merge(lower, into_path=base)
    with pytest.raises(HalfMergedError):
        inspect_chain(lower)
    with pytest.raises(HalfMergedError):
        open_chain(lower)
    merge(top, from_path=upper, into_path=base)
    assert content(top) == expected
    assert sorted(os.listdir(tmp_path)) == ["0.vhd", "3.vhd"]


def test_a_check_says_so(tmp_path: Path) -> None:
    lower, upper, top = interrupted(tmp_path)
    (found,) = [problem for problem in check_disk(lower).problems if problem.code == "half-merged"]
    assert f"mullion vhd merge {upper} --into {lower}" in found.remedy
    assert check_disk(lower).verdict is Verdict.REPAIRABLE
    assert "half-merged" not in [problem.code for problem in check_disk(top).problems]
    merge_files(upper, lower)
    assert "half-merged" not in [problem.code for problem in check_disk(lower).problems]


def test_another_layer_waits_for_the_one_that_was_begun(tmp_path: Path) -> None:
    lower, upper, _top = interrupted(tmp_path)
    other = str(tmp_path / "other.vhd")
    shutil.copy(upper, other)
    patch(other, 68, b"another id.......")
    with pytest.raises(MullionError):  # its checksum is not good any more
        merge_files(other, lower)
    sibling = str(tmp_path / "sibling.vhd")
    shutil.copy(layer_journal_path(lower), tmp_path / "kept")
    os.unlink(layer_journal_path(lower))
    create_differencing(sibling, lower)
    shutil.copy(tmp_path / "kept", layer_journal_path(lower))
    with pytest.raises(HalfMergedError):
        content(sibling)
    with pytest.raises(ConflictError, match="finished first") as caught:
        merge_files(sibling, lower)
    assert upper in caught.value.remedy
    with pytest.raises(ConflictError, match="parent of other disks"):
        check_only_child(upper, lower)
    os.unlink(sibling)
    os.unlink(other)
    check_only_child(upper, lower)
    with pytest.raises(ConflictError, match="not finished"):
        forget_layer_merge(lower, SYSTEM)
    merge_files(upper, lower)
    forget_layer_merge(lower, SYSTEM)


def test_who_else_has_it_open(tmp_path: Path) -> None:
    paths = make(tmp_path, layers=3)
    with open_chain(paths[1], read_only=True), pytest.raises(DiskBusyError, match="read by itself"):
        merge_files(paths[2], paths[1])
    with open_chain(paths[2]), pytest.raises(DiskBusyError):
        merge_files(paths[2], paths[1])
    with LayerFiles.open(paths[2], paths[1]), pytest.raises(DiskBusyError, match="another merge"):
        LayerFiles.open(paths[2], paths[1])
    with open_chain(paths[3]) as writer:
        merge_files(paths[2], paths[1])
        writer.pwrite(0, b"written")
    assert content(paths[3])[:7] == b"written"


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_the_lower_layer_grows(kind: str, tmp_path: Path) -> None:
    base = make(tmp_path, kind, layers=0)[0]
    upper, top = str(tmp_path / "upper.vhd"), str(tmp_path / "top.vhd")
    create_differencing(upper, base, size_bytes=SIZE + 40 * KIB)
    scribble(upper, 5)
    create_differencing(top, upper)
    expected = content(top)
    with open_chain(top, read_only=True) as reader:
        merge_files(upper, base, progress=lambda *_: assert_same(content(top), expected))
        here = bytearray(reader.size_bytes)
        reader.pread(0, here)
        assert here == expected
    assert content(base) == content(upper) == expected


def assert_same(one: bytes, other: bytes) -> None:
    assert one == other


def test_a_child_must_not_grow_over_what_lies_below(tmp_path: Path) -> None:
    base, lower, upper = (str(tmp_path / name) for name in ("base.vhd", "lower.vhd", "upper.vhd"))
    create_dynamic(base, SIZE)
    create_differencing(lower, base, size_bytes=SIZE // 2)
    create_differencing(upper, lower, size_bytes=SIZE)
    scribble(upper, 1)
    expected = content(upper)
    for below in (None, SIZE):
        with pytest.raises(InvalidError, match="what lies below"):
            merge_files(upper, lower, below_bytes=below)
    assert sorted(os.listdir(tmp_path)) == ["base.vhd", "lower.vhd", "upper.vhd"]
    merge_files(upper, lower, below_bytes=SIZE // 2)  # had the base that size
    assert content(upper) == expected


def test_refused_before_anything_is_written(tmp_path: Path) -> None:
    paths = make(tmp_path, layers=2)
    before = {path: Path(path).read_bytes() for path in paths}
    with pytest.raises(ParentMismatchError):
        merge_files(paths[2], paths[0])
    with pytest.raises(ParentMismatchError):
        merge_files(paths[0], paths[1])
    for path in paths:
        assert Path(path).read_bytes() == before[path]
    for damaged in (paths[1], paths[2]):
        patch(damaged, 0, bytes(512))
        with pytest.raises(VhdDamagedError, match="damaged") as caught:
            merge_files(paths[2], paths[1])
        assert "mullion vhd repair" in caught.value.remedy
        Path(damaged).write_bytes(before[damaged])
    assert sorted(os.listdir(tmp_path)) == ["0.vhd", "1.vhd", "2.vhd"]


@pytest.mark.parametrize("at", [*range(0, 80, 7), *range(512, 592, 7), *range(1024, 1100, 9)])
def test_a_journal_with_a_byte_changed_never_makes_a_mixture_a_disk(at: int, tmp_path: Path) -> None:
    lower, upper, top = interrupted(tmp_path)
    mixture, expected = content(upper), content(top)
    journal = Path(layer_journal_path(lower))
    raw = bytearray(journal.read_bytes())
    raw[at] ^= 0x55
    journal.write_bytes(raw)
    with pytest.raises((HalfMergedError, VhdDamagedError)):
        content(lower)
    if at < 1024:
        assert content(top) == expected
        merge_files(upper, lower)
        assert content(lower) == mixture
        return
    for refused in (lambda: content(top), lambda: merge_files(upper, lower)):  # the text has no second copy
        with pytest.raises(VhdDamagedError) as caught:
            refused()
        assert str(journal) in caught.value.remedy


@pytest.mark.parametrize("raw", [b"", b"\0" * 600, b"\0" * 1024 + b"{} of a merge that wrote no more than this"])
def test_a_merge_that_wrote_no_slot_marks_nothing(raw: bytes, tmp_path: Path) -> None:
    paths = make(tmp_path, layers=2)
    journal = Path(layer_journal_path(paths[1]))
    journal.write_bytes(raw)
    expected = content(paths[2])
    content(paths[1])
    merge_files(paths[2], paths[1])
    assert content(paths[1]) == expected


def test_a_journal_that_is_a_pipe_or_a_link_does_not_block(tmp_path: Path) -> None:
    paths = make(tmp_path, layers=2)
    for make_it in (os.mkfifo, lambda path: os.symlink(paths[0], path)):
        make_it(layer_journal_path(paths[1]))
        before = Path(paths[0]).read_bytes()
        with pytest.raises((MullionError, OSError)):
            merge_files(paths[2], paths[1])
        assert Path(paths[0]).read_bytes() == before
        os.unlink(layer_journal_path(paths[1]))
