"""What a check says of each kind of damage, and that a repair brings about what it promised."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.contract.block_device import all_of
from tests.unit.vhd import craft
from tests.unit.vhd.power_cut import KilledError, RecordingIO
from tests.unit.vhd.test_hostile import REFUSED, cut, make_tail_disagree

from mullion.base.errors import InvalidError, MullionError
from mullion.base.units import MIB
from mullion.vhd import create_differencing, create_dynamic, create_fixed, open_chain
from mullion.vhd.check import Report, check_disk
from mullion.vhd.errors import DiskBusyError, NotVhdError
from mullion.vhd.findings import Kind, Verdict
from mullion.vhd.repair import repair_disk
from mullion.vhd.undo import undo_repair

pytestmark = pytest.mark.unit

Break = Callable[[str], object]


def codes(report: Report) -> list[str]:
    return [problem.code for problem in report.problems]


def append(path: str, raw: bytes) -> None:
    with open(path, "ab") as file:
        file.write(raw)


def spoil_both_checksums(path: str) -> None:
    craft.patch(path, 64, b"\1\2\3\4")
    craft.patch(path, -512 + 64, b"\1\2\3\4")


def insert_room(path: str) -> None:
    """Ten blocks' room before the footer at the end."""
    tail = craft.peek(path, -512, 512)
    os.truncate(path, os.path.getsize(path) - 512 + 10 * craft.BLOCK_BYTES)
    append(path, tail)


def shrink_to_nine_blocks(path: str) -> None:
    """Another program's resize that left an entry behind."""
    craft.set_footer(path, 48, struct.pack(">Q", 9 * craft.BLOCK_BYTES))


def old_footer(path: str) -> None:
    cut(path, -1)


REPAIRABLE: dict[str, tuple[str, Break, list[str]]] = {
    "footer missing": ("dynamic", lambda p: cut(p, -512), ["footer-missing"]),
    "footer zeroed": ("differencing", lambda p: craft.patch(p, -512, bytes(512)), ["footer-missing"]),
    "garbage behind": ("dynamic", lambda p: append(p, b"\xaa" * 700), ["footer-missing"]),
    "zeros behind": ("differencing", lambda p: append(p, bytes(3 * craft.BLOCK_BYTES)), ["footer-missing"]),
    "garbage behind a fixed disk": ("fixed", lambda p: append(p, b"\xaa" * 700), ["footer-buried"]),
    "sectors behind a fixed disk": ("fixed", lambda p: append(p, bytes(4096)), ["footer-buried"]),
    "copy damaged": ("dynamic", lambda p: craft.patch(p, 20, b"\7"), ["footer-copy-bad"]),
    "copy gone": ("differencing", lambda p: craft.patch(p, 0, bytes(512)), ["footer-copy-bad"]),
    "copy damaged, garbage behind": (
        "dynamic",
        lambda p: (craft.patch(p, 20, b"\7"), append(p, b"\xaa" * 700)),
        ["footer-buried", "footer-copy-bad"],
    ),
    "copies disagree": ("dynamic", make_tail_disagree, ["footers-disagree"]),
    "both checksums": ("dynamic", spoil_both_checksums, ["footer-checksum"]),
    "both checksums of a child": ("differencing", spoil_both_checksums, ["footer-checksum"]),
    "a fixed disk's checksum": ("fixed", lambda p: craft.patch(p, -512 + 64, b"\1\2\3\4"), ["footer-checksum"]),
    "header checksum": ("dynamic", lambda p: craft.patch(p, 512 + 36, b"\1\2\3\4"), ["header-checksum"]),
    "header checksum of a child": ("differencing", lambda p: craft.patch(p, 512 + 36, b"\1"), ["header-checksum"]),
    "entry beyond the disk": (
        "dynamic",
        shrink_to_nine_blocks,
        ["bat-beyond-disk", "bat-spare-entries", "orphan-room"],
    ),
    "footer and copy of a short file": (
        "dynamic",
        lambda p: (spoil_both_checksums(p), craft.patch(p, 512 + 36, b"\1")),
        ["footer-checksum", "header-checksum"],
    ),
}
SOUND_BUT_ODD: dict[str, tuple[str, Break, list[str]]] = {
    "511 bytes": ("dynamic", old_footer, ["footer-short"]),
    "511 bytes, fixed": ("fixed", old_footer, ["footer-short"]),
    "orphan room": ("dynamic", insert_room, ["orphan-room"]),
}
HARMLESS: dict[str, tuple[str, Break, list[str]]] = {
    "reserved feature": ("dynamic", lambda p: craft.set_footer(p, 8, bytes(4)), ["reserved-feature"]),
    "saved state": ("differencing", lambda p: craft.set_footer(p, 84, b"\1"), ["saved-state"]),
    "zero geometry": ("fixed", lambda p: craft.set_footer(p, 56, bytes(4)), ["geometry-zero"]),
    "padding": ("dynamic", lambda p: craft.patch(p, craft.BAT + 40, bytes(8)), ["bat-padding"]),
    "spare entries": ("dynamic", lambda p: craft.set_header(p, 28, struct.pack(">I", 12)), ["bat-spare-entries"]),
    "a bad locator": (
        "differencing",
        lambda p: craft.set_header(p, 576 + 24 + 8, struct.pack(">I", 1 << 20)),
        ["locator-bad"],
    ),
}
LOSSY: dict[str, tuple[Break, str]] = {
    "entry into the header": (lambda p: craft.set_entry(p, 4, 1), "entry-in-metadata"),
    "entry past the end": (lambda p: craft.set_entry(p, 4, 0x00FF_FFFF), "entry-past-end"),
    "overlap": (lambda p: craft.set_entry(p, 4, craft.entry(p, 9) - 1), "entry-overlaps"),
    "the same block twice": (lambda p: craft.set_entry(p, 4, craft.entry(p, 9)), "entry-overlaps"),
}


def content_of(path: str) -> bytes | None:
    try:
        with open_chain(path, read_only=True) as chain:
            return bytes(all_of(chain))
    except MullionError:
        return None


def checked(path: str) -> tuple[Verdict, list[str]]:
    """Verdict and codes, but for the geometry that such small disks cannot have."""
    report = check_disk(path)
    return report.verdict, [code for code in codes(report) if code != "geometry-zero"]


@pytest.mark.parametrize("name", REPAIRABLE)
def test_repairable(name: str, tmp_path: Path) -> None:
    kind, break_it, expected = REPAIRABLE[name]
    path = craft.make(tmp_path, kind)
    good = content_of(path)
    assert checked(path) == (Verdict.SOUND, [])
    break_it(path)
    before = Path(path).read_bytes()
    assert checked(path) == (Verdict.REPAIRABLE, expected)
    planned = repair_disk(path, dry_run=True)
    assert planned.actions
    assert Path(path).read_bytes() == before
    done = repair_disk(path)
    assert done.actions == planned.actions
    assert checked(path)[0] is Verdict.SOUND
    if name == "entry beyond the disk":
        assert good is not None
        good = good[: 9 * craft.BLOCK_BYTES]
    assert content_of(path) == good
    with open_chain(path) as chain:
        chain.pwrite(3 * craft.BLOCK_BYTES, b"goes on")
    assert checked(path)[0] is Verdict.SOUND


def test_the_footer_before_a_hole_of_any_length_is_found(tmp_path: Path) -> None:
    """A growth that a power cut ended leaves such a file."""
    path = craft.make(tmp_path, "fixed")
    good = content_of(path)
    os.truncate(path, os.path.getsize(path) + 64 * MIB)
    assert checked(path) == (Verdict.REPAIRABLE, ["footer-buried"])
    repair_disk(path)
    assert content_of(path) == good


@pytest.mark.parametrize("name", [*REPAIRABLE, *SOUND_BUT_ODD])
def test_a_repair_can_be_undone(name: str, tmp_path: Path) -> None:
    kind, break_it, _ = (REPAIRABLE | SOUND_BUT_ODD)[name]
    path = craft.make(tmp_path, kind)
    break_it(path)
    before = Path(path).read_bytes()
    done = repair_disk(path)
    assert done.backup is not None
    assert Path(path).read_bytes() != before
    undo_repair(done.backup, path)
    assert Path(path).read_bytes() == before
    undo_repair(done.backup, path)
    assert Path(path).read_bytes() == before


@pytest.mark.parametrize("name", SOUND_BUT_ODD)
def test_sound_and_mended_all_the_same(name: str, tmp_path: Path) -> None:
    kind, break_it, expected = SOUND_BUT_ODD[name]
    path = craft.make(tmp_path, kind)
    good = content_of(path)
    break_it(path)
    assert checked(path) == (Verdict.SOUND, expected)
    assert repair_disk(path).actions
    assert checked(path) == (Verdict.SOUND, [])
    assert content_of(path) == good


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless(name: str, tmp_path: Path) -> None:
    kind, break_it, expected = HARMLESS[name]
    path = craft.make(tmp_path, kind)
    break_it(path)
    assert checked(path) == (Verdict.SOUND, [code for code in expected if code != "geometry-zero"])
    done = repair_disk(path)
    assert (done.actions, done.backup) == ((), None)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
def test_an_entry_is_given_up_only_with_consent(name: str, kind: str, tmp_path: Path) -> None:
    break_it, code = LOSSY[name]
    path = craft.make(tmp_path, kind)
    good = content_of(path)
    assert good is not None
    break_it(path)
    before = Path(path).read_bytes()
    verdict, found = checked(path)
    assert verdict is Verdict.BROKEN
    assert set(found) == {code}
    assert repair_disk(path).actions == ()
    assert Path(path).read_bytes() == before
    done = repair_disk(path, allow_loss=True)
    assert done.after.verdict is Verdict.SOUND
    assert done.backup is not None
    lost = {4} if "entry" in name else {4, 9}
    below = (b"p" if kind == "differencing" else b"\0") * 4096
    now = content_of(path)
    assert now is not None
    for block in range(10):
        part = slice(block * craft.BLOCK_BYTES + 1024, block * craft.BLOCK_BYTES + 1024 + 4096)
        assert now[part] == (below if block in lost else good[part]), block
    undo_repair(done.backup, path)
    assert Path(path).read_bytes() == before


@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
@pytest.mark.parametrize("has_tail", [False, True])
def test_a_file_cut_inside_its_last_block(kind: str, has_tail: bool, tmp_path: Path) -> None:
    path = craft.make(tmp_path, kind)
    good = content_of(path)
    assert good is not None
    tail = craft.peek(path, -512, 512)
    last = max(craft.entry(path, block) for block in (0, 4, 9)) * 512
    keep = last + 512 + 2048  # of the block's data 1024 bytes of zeros, then 1024 of its 4096
    cut(path, keep)
    if has_tail:
        append(path, tail)
    before = Path(path).read_bytes()
    report = check_disk(path)
    assert report.verdict is Verdict.REPAIRABLE
    assert [problem.cure for problem in report.problems if problem.code == "block-cut"] == ["consent"]
    assert "--allow-loss" in report.problems[-1].remedy
    assert not any("cut off" in action for action in repair_disk(path, dry_run=True).actions)
    done = repair_disk(path, allow_loss=True)
    assert "read zeros" in done.actions[0]
    assert done.after.verdict is Verdict.SOUND
    now = content_of(path)
    block = next(number for number in (0, 4, 9) if craft.entry(path, number) * 512 == last)
    at = block * craft.BLOCK_BYTES + 2048
    assert now == good[:at] + bytes(3072) + good[at + 3072 :]
    assert done.backup is not None
    undo_repair(done.backup, path)
    assert Path(path).read_bytes() == before


def test_what_the_guest_wrote_last_is_not_taken_for_a_footer(tmp_path: Path) -> None:
    """The footer is missing, and the last block ends in what looks like one of another disk."""
    (tmp_path / "other").mkdir()
    foreign = craft.peek(craft.make(tmp_path / "other", "dynamic"), 0, 512)
    path = craft.make(tmp_path, "dynamic")
    last = max(craft.entry(path, block) for block in (0, 4, 9)) * 512
    block = next(number for number in (0, 4, 9) if craft.entry(path, number) * 512 == last)
    with open_chain(path) as chain:
        chain.pwrite((block + 1) * craft.BLOCK_BYTES - 512, foreign)
    good = content_of(path)
    cut(path, last + 512 + craft.BLOCK_BYTES)
    assert checked(path) == (Verdict.REPAIRABLE, ["footer-missing"])
    repair_disk(path)
    assert content_of(path) == good
    assert checked(path) == (Verdict.SOUND, [])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_never_sound(name: str, tmp_path: Path) -> None:
    kind, break_it, _, _ = REFUSED[name]
    path = craft.make(tmp_path, kind)
    break_it(path)
    before = os.stat(path)
    report = check_disk(path)
    assert report.verdict is not Verdict.SOUND
    for problem in report.problems:
        assert problem.path == path
        assert problem.structure
        assert problem.what
        assert problem.remedy
        assert problem.offset >= 0
    if report.verdict is Verdict.BROKEN:
        assert repair_disk(path, allow_loss=True).actions == ()
    assert (os.stat(path).st_mtime_ns, os.stat(path).st_size) == (before.st_mtime_ns, before.st_size)


def test_unprovable_checksums_are_not_believed(tmp_path: Path) -> None:
    """A header or footer of wrong checksum and of contents that do not fit is broken."""
    path = craft.make(tmp_path, "dynamic")
    craft.patch(path, 512 + 28, struct.pack(">I", 11))  # one entry more than the disk needs, old checksum
    assert checked(path) == (Verdict.BROKEN, ["header-invalid"])
    fixed = craft.make(tmp_path, "fixed")
    craft.patch(fixed, -512 + 48, struct.pack(">Q", craft.SIZE_BYTES - 512))
    assert checked(fixed) == (Verdict.BROKEN, ["footer-invalid"])


def test_many_bad_entries_are_counted_not_listed(tmp_path: Path) -> None:
    path = str(tmp_path / "many.vhd")
    create_dynamic(path, 1000 * 4096, block_bytes=4096)
    craft.patch(path, craft.BAT, struct.pack(">I", 1) * 1000)
    report = check_disk(path)
    assert report.verdict is Verdict.BROKEN
    assert len(report.problems) < 40
    assert "1000 in all" in report.problems[-1].what


def test_not_a_file_is_an_error(tmp_path: Path) -> None:
    for call in (check_disk, repair_disk):
        with pytest.raises(NotVhdError, match="not a regular file"):
            call(str(tmp_path))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(NotVhdError, match="not a regular file"):
        check_disk(str(tmp_path / "fifo"))


# ---------------------------------------------------------------------- chains


def chain_of_three(folder: Path) -> tuple[str, str, str]:
    base, middle, top = (str(folder / f"{name}.vhd") for name in ("base", "middle", "top"))
    create_dynamic(base, 10 * MIB)
    create_differencing(middle, base)
    create_differencing(top, middle)
    return base, middle, top


def test_a_sound_chain_has_a_report_for_each_file(tmp_path: Path) -> None:
    base, middle, top = chain_of_three(tmp_path)
    report = check_disk(top)
    assert [file.path for file in report.files] == [top, middle, base]
    assert (report.verdict, report.problems) == (Verdict.SOUND, ())
    assert [file.path for file in check_disk(top, parents=False).files] == [top]


def test_a_missing_parent(tmp_path: Path) -> None:
    base, middle, top = chain_of_three(tmp_path)
    os.unlink(base)
    report = check_disk(top)
    assert report.verdict is Verdict.BROKEN
    assert [file.verdict for file in report.files] == [Verdict.SOUND, Verdict.BROKEN]
    assert (report.problems[0].path, report.problems[0].code) == (middle, "parent-missing")
    assert "mullion vhd rebase" in report.problems[0].remedy
    assert check_disk(top, parents=False).verdict is Verdict.SOUND


def test_a_parent_of_another_id(tmp_path: Path) -> None:
    base, _, top = chain_of_three(tmp_path)
    os.unlink(base)
    create_dynamic(base, 10 * MIB)
    report = check_disk(top)
    assert (report.verdict, codes(report)) == (Verdict.BROKEN, ["parent-mismatch"])


def test_a_parent_that_needs_repair_is_followed(tmp_path: Path) -> None:
    base, middle, top = chain_of_three(tmp_path)
    craft.patch(middle, 512 + 36, b"\1")
    report = check_disk(top)
    assert [file.verdict.value for file in report.files] == ["sound", "repairable", "sound"]
    assert [file.path for file in report.files] == [top, middle, base]
    repair_disk(middle)
    assert check_disk(top).verdict is Verdict.SOUND


def test_a_broken_parent_is_reported_with_its_own_problems(tmp_path: Path) -> None:
    base, middle, top = chain_of_three(tmp_path)
    craft.patch(base, 512, b"cxsparsE")
    report = check_disk(top)
    assert [file.path for file in report.files] == [top, middle, base]
    assert codes(report) == ["parent-unusable", "header-invalid"]


def test_a_cycle(tmp_path: Path) -> None:
    path = str(tmp_path / "self.vhd")
    parent = str(tmp_path / "parent.vhd")
    create_dynamic(parent, 10 * MIB)
    create_differencing(path, parent)
    unique_id = craft.peek(path, 68, 16)
    craft.set_header(path, 40, unique_id)
    os.unlink(parent)
    os.link(path, parent)
    assert codes(check_disk(path)) == ["chain-cycle"]


def test_sizes_that_differ_are_noted(tmp_path: Path) -> None:
    base, child = str(tmp_path / "base.vhd"), str(tmp_path / "child.vhd")
    create_dynamic(base, 10 * MIB)
    create_differencing(child, base, size_bytes=12 * MIB)
    report = check_disk(child)
    assert (report.verdict, codes(report)) == (Verdict.SOUND, ["sizes-differ"])


def test_a_parent_that_was_written_under_its_child(tmp_path: Path) -> None:
    base, middle, top = chain_of_three(tmp_path)
    os.utime(base, ns=(1, 1))  # however coarse the clock of the file system is
    report = check_disk(top)
    assert (report.verdict, codes(report)) == (Verdict.SOUND, ["parent-changed"])
    assert report.problems[0].path == middle
    Path(base).rename(tmp_path / "old")
    Path(base).write_bytes((tmp_path / "old").read_bytes())
    assert check_disk(top).problems == ()


def test_a_chain_too_deep(tmp_path: Path) -> None:
    _, _, top = chain_of_three(tmp_path)
    assert codes(check_disk(top, limit=2)) == ["chain-too-deep"]


def test_a_disk_in_use_is_checked_and_not_repaired(tmp_path: Path) -> None:
    path = craft.make(tmp_path, "dynamic")
    with open_chain(path, holder="partition web") as chain:
        chain.pwrite(2 * craft.BLOCK_BYTES, b"new")
        report = check_disk(path)
        assert any("partition web" in problem.what for problem in report.problems if problem.code == "in-use")
        with pytest.raises(DiskBusyError, match="partition web"):
            repair_disk(path)


# ---------------------------------------------------------------------- Azure


def test_what_azure_would_refuse(tmp_path: Path) -> None:
    good, odd, dynamic = (str(tmp_path / f"{name}.vhd") for name in ("good", "odd", "dynamic"))
    create_fixed(good, 10 * MIB)
    create_fixed(odd, 10 * MIB + 512)
    create_dynamic(dynamic, 10 * MIB)
    assert check_disk(good, azure=True).problems == ()
    report = check_disk(odd, azure=True)
    assert (report.verdict, codes(report)) == (Verdict.REPAIRABLE, ["azure-size"])
    assert "mullion vhd resize" in report.problems[0].remedy
    report = check_disk(dynamic, azure=True)
    assert codes(report) == ["azure-type"]
    assert "mullion vhd convert" in report.problems[0].remedy
    craft.set_header(dynamic, 28, struct.pack(">I", 6))
    assert codes(check_disk(dynamic, azure=True)) == ["bat-spare-entries", "azure-type", "azure-bat"]
    old_footer(good)
    assert codes(check_disk(good, azure=True)) == ["footer-short", "azure-footer"]


# ---------------------------------------------------------------------- backups


def test_undo_refuses_a_disk_that_was_used_since(tmp_path: Path) -> None:
    path = craft.make(tmp_path, "dynamic")
    cut(path, -512)
    done = repair_disk(path)
    assert done.backup is not None
    with open_chain(path) as chain:
        chain.pwrite(2 * craft.BLOCK_BYTES, b"new")
    before = Path(path).read_bytes()
    with pytest.raises(MullionError, match="was changed since"):
        undo_repair(done.backup, path)
    assert Path(path).read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b"nonsense", b'{"format": "mullion-vhd-repair", "version": 2}', b"\xff\xfe", b"[" * 100_000],
)
def test_undo_refuses_what_is_no_backup(text: bytes, tmp_path: Path) -> None:
    path = craft.make(tmp_path, "dynamic")
    (tmp_path / "backup").write_bytes(text)
    with pytest.raises(InvalidError, match="not the backup of a repair"):
        undo_repair(str(tmp_path / "backup"), path)


def test_a_killed_writers_room_is_kept(tmp_path: Path) -> None:
    """What it acknowledged may wait in its pending log, which the next opening replays."""
    path, log = craft.make(tmp_path, "dynamic"), str(tmp_path / "pending")
    chain = open_chain(path, pending_path=log)
    chain.pwrite(2 * craft.BLOCK_BYTES, b"acknowledged")
    chain.abandon()
    craft.patch(path, 20, b"\7")  # and its footer copy is damaged
    repair_disk(path)
    with open_chain(path, pending_path=log) as again:
        assert "carried out" in " ".join(again.warnings)
        assert bytes(all_of(again))[2 * craft.BLOCK_BYTES :].startswith(b"acknowledged")


def test_every_kind_has_a_code_of_its_own() -> None:
    assert len({kind.code for kind in Kind}) == len(Kind)


# ---------------------------------------------------------------------- ends at any instant


def run_with_fuse(path: str, fuse: int, *, cut: random.Random | None, allow_loss: bool) -> bool:
    """A repair that ends before its change number `fuse`; says whether it came to its end."""
    recording = RecordingIO()
    recording.fuse = fuse
    try:
        repair_disk(path, allow_loss=allow_loss, file_io=recording, backup=f"{path}.backup-{fuse}-{cut is None}")
    except KilledError:
        if cut is not None:
            recording.cut_power(cut)
        return False
    return True


def cut_in_a_block(path: str) -> None:
    tail = craft.peek(path, -512, 512)
    cut(path, max(craft.entry(path, block) for block in (0, 4, 9)) * 512 + 4096)
    append(path, tail)
    craft.patch(path, 20, b"\7")


ENDED: dict[str, tuple[str, Break]] = {
    **{name: (kind, break_it) for name, (kind, break_it, _) in (REPAIRABLE | SOUND_BUT_ODD).items()},
    **{name: ("differencing", break_it) for name, (break_it, _) in LOSSY.items()},
    "cut, with a footer, and the copy damaged": ("differencing", cut_in_a_block),
}


@pytest.mark.parametrize("power", [False, True], ids=["killed", "power cut"])
@pytest.mark.parametrize("name", ENDED)
def test_a_repair_may_end_at_any_instant_and_be_repeated(name: str, power: bool, tmp_path: Path) -> None:
    """After each end the disk is no worse, undoing brings back the bytes, repeating ends as it should."""
    kind, break_it = ENDED[name]
    path = craft.make(tmp_path, kind)
    break_it(path)
    broken = Path(path).read_bytes()
    repair_disk(path, allow_loss=True)
    wanted = content_of(path)
    assert wanted is not None
    for fuse in range(20):
        Path(path).write_bytes(broken)
        if run_with_fuse(path, fuse, cut=random.Random(fuse) if power else None, allow_loss=True):
            assert fuse > 1
            return
        half_way = Path(path).read_bytes()
        undo_repair(f"{path}.backup-{fuse}-{not power}", path)
        assert Path(path).read_bytes() == broken
        Path(path).write_bytes(half_way)
        repair_disk(path, allow_loss=True)
        assert check_disk(path).verdict is Verdict.SOUND
        assert content_of(path) == wanted, fuse
    raise AssertionError("a repair makes more changes than this test expects")
