"""Everything that is wrong with a disk, its parents included: a verdict, and each problem with its remedy.

A check reads what opening reads, with the same judgements (`structures`, `image`, `parents`), and goes on where opening
stops: for a file that cannot be opened it looks for what must have been there (`salvage`), names each bad entry of the
BAT, looks for room that belongs to nothing and goes down the chain through files that need repair.

Verdicts: sound, there are warnings at most; repairable, `repair` makes it sound and takes nothing away that is still in
the file; broken, anything else. A disk that opening refuses, for reading or for writing, is never sound.

Nothing is locked and nothing is written. Of a disk that somebody writes meanwhile the state is one of a moment, which a
warning says.

Not handled: the blocks' data and the sector bitmaps of a dynamic disk are not looked at; they have no checksums.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise, repeat
from operator import ge, sub
from typing import Final

from mullion.base.errors import MullionError
from mullion.base.units import GIB, MIB, SECTOR_BYTES, format_size
from mullion.vhd import bat as bat_table
from mullion.vhd.create import DATA_ALIGNMENT
from mullion.vhd.errors import (
    ChainCycleError,
    ChainTooDeepError,
    ParentMismatchError,
    ParentNotFoundError,
    ParentRefusedError,
    VhdError,
)
from mullion.vhd.facts import Facts, describe
from mullion.vhd.findings import Finding, Kind, Verdict, verdict_of
from mullion.vhd.image import Image, open_file
from mullion.vhd.layer_journal import check_whole
from mullion.vhd.layout import HEADER_BYTES, LOCATORS, DiskType
from mullion.vhd.locking import is_locked_for_writing, read_holder
from mullion.vhd.parents import CHAIN_LIMIT, has_changed, parent_names, real_path, walk_parents
from mullion.vhd.salvage import examine
from mullion.vhd.structures import bat_end

AZURE_MAX_BYTES: Final = 4095 * GIB
"""The largest disk of Azure."""

_WORST_FIRST: Final = (Verdict.BROKEN, Verdict.REPAIRABLE, Verdict.SOUND)
_SHOWN_ENTRIES: Final = 32
_SET_ENTRIES: Final = 1 << 17

_CHAIN_KINDS: Final[tuple[tuple[type[MullionError], Kind, int], ...]] = (
    (ParentNotFoundError, Kind.PARENT_MISSING, 576),
    (ParentRefusedError, Kind.PARENT_REFUSED, 576),
    (ParentMismatchError, Kind.PARENT_MISMATCH, 40),
    (ChainCycleError, Kind.CHAIN_CYCLE, 576),
    (ChainTooDeepError, Kind.CHAIN_TOO_DEEP, 576),
)
"""What keeps a chain from being followed: as what it is reported, and at which field of the child's header."""
_REBASE: Final = (
    "Put the parent back where the child looks for it, or name it: mullion vhd rebase {path} --parent PARENT"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: the same fields as in JSON."""

    path: str
    code: str
    severity: str
    structure: str
    offset: int
    what: str
    remedy: str
    cure: str
    """`repair`, `consent` (repair --allow-loss: what is lost is lost already), `loss` (the same, and what the file may
    still have is given up), `command` (the one in the remedy), `none`; `nothing` for a warning."""


@dataclass(frozen=True, slots=True)
class FileReport:
    """What was found in one file of the chain."""

    path: str
    verdict: Verdict
    problems: tuple[Problem, ...]
    type: str | None
    """None when the file could not be made out at all, as the size and the facts then."""
    size_bytes: int | None
    facts: Facts | None = None
    """What the file says about itself, where that was asked for."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in a disk, top first."""

    files: tuple[FileReport, ...]

    @property
    def path(self) -> str:
        return self.files[0].path

    @property
    def verdict(self) -> Verdict:
        """The worst of all files."""
        return min((file.verdict for file in self.files), key=_WORST_FIRST.index)

    @property
    def problems(self) -> tuple[Problem, ...]:
        return tuple(problem for file in self.files for problem in file.problems)


def check_disk(
    path: str,
    *,
    parents: bool = True,
    azure: bool = False,
    facts: bool = False,
    allowed_dirs: Sequence[str] | None = None,
    limit: int = CHAIN_LIMIT,
) -> Report:
    """Check a file, and its parents unless they are left out.

    `azure` adds what Azure would refuse, `facts` what the files say about themselves. `allowed_dirs` and `limit` are
    those of `open_chain`. Whatever the file holds is reported, not raised.

    Raises: NotFoundError, DeniedError; NotVhdError when it is not a regular file; OSError.
    """
    fd = open_file(path)
    try:
        top = examine(fd, path)
        if not isinstance(top, Image):
            return Report((_report(path, top, None),))
        if azure:
            top.findings += find_azure_obstacles(top)
        judge = _judge_and_describe if facts else _judge
        top.findings += merge_findings(top, None)
        files = _check_chain(top, judge, allowed_dirs, limit) if parents else [judge(top)]
        return Report(tuple(files))
    finally:
        os.close(fd)


def _check_chain(
    top: Image, judge: Callable[[Image], FileReport], allowed_dirs: Sequence[str] | None, limit: int
) -> list[FileReport]:
    """A report for each file of a chain, as far down as it can be followed."""
    images = [top]
    hopeless: dict[str, list[Finding]] = {}

    def load(fd: int, path: str) -> Image:
        found = examine(fd, path)
        if isinstance(found, Image):
            return found
        hopeless[path] = found
        raise found[-1].as_error(path)

    lost: list[FileReport] = []
    try:
        try:
            for parent in walk_parents(top, allowed_dirs=allowed_dirs, limit=limit, load=load):
                images.append(parent)
                compare_with_parent(images[-2], parent)
                parent.findings += merge_findings(parent, images[-2])
        except MullionError as error:
            images[-1].findings.append(chain_finding(images[-1], error))
            path = getattr(error, "path", None)
            if path in hopeless:
                lost.append(_report(path, hopeless[path], None))
        return [*map(judge, images), *lost]
    finally:
        for image in images[1:]:
            image.close()


def merge_findings(image: Image, child: Image | None) -> list[Finding]:
    """Is this file, read through `child` or as a top, a mixture because another layer is being merged into it?"""
    try:
        check_whole(image, child)
    except MullionError as error:
        return [Finding(Kind.HALF_MERGED, error.message, 0, error.remedy)]
    return []


def chain_finding(child: Image, error: MullionError) -> Finding:
    """Why a chain cannot be followed beyond this child."""
    at = child.footer.data_offset
    for error_class, kind, field_offset in _CHAIN_KINDS:
        if isinstance(error, error_class):
            remedy = _REBASE if kind is Kind.PARENT_MISSING else error.remedy
            return Finding(kind, error.message, at + field_offset, remedy)
    remedy = error.remedy
    if isinstance(error, VhdError) and error.path is not None and error.path != child.path:
        remedy = "Mend or restore the parent, whose own problems are listed."
    return Finding(Kind.PARENT_UNUSABLE, f"its parent cannot be used: {error.message}", at + 576, remedy)


def compare_with_parent(child: Image, parent: Image) -> None:
    if child.size_bytes != parent.size_bytes:
        what = f"it has {child.size_bytes} bytes, its parent {parent.size_bytes}: past the parent's end it reads zero"
        child.findings.append(Finding(Kind.SIZES_DIFFER, what, child.footer_offset + 48))
    if has_changed(child.fd, parent.fd):
        what = f"its parent {parent.path} was written after it was made: what it does not hold itself may have changed"
        restore = "If nobody meant to, restore the parent from a backup."
        child.findings.append(Finding(Kind.PARENT_CHANGED, what, child.footer.data_offset + 40, restore))


def check_open_file(examined: Image | list[Finding], path: str, *, facts: bool = False) -> FileReport:
    """The report on one file alone, of what `salvage.examine` made of it."""
    if not isinstance(examined, Image):
        return _report(path, examined, None)
    return _judge_and_describe(examined) if facts else _judge(examined)


def _judge(image: Image) -> FileReport:
    return _report(image.path, _judged(image), image)


def _judge_and_describe(image: Image) -> FileReport:
    return replace(_judge(image), facts=describe(image))


def _judged(image: Image) -> list[Finding]:
    """All findings of one file: those of opening it, its bad entries one by one, and what only a check looks for."""
    found = [finding for finding in image.findings if finding.kind is not Kind.ENTRIES_BAD]
    if image.header is not None:
        found += _bad_entries(image)
        found += _odd_padding(image)
        found += _orphans(image)
    if image.kind is DiskType.DIFFERENCING:
        known = {finding.what for finding in found}
        found += [finding for finding in _bad_locators(image) if finding.what not in known]
    if is_locked_for_writing(image.fd):
        who = read_holder(image.fd) or "another process"
        found.append(Finding(Kind.IN_USE, f"{who} has it open for writing: what was found is of one moment", 0))
    return found


def add_finding(report: FileReport, finding: Finding) -> FileReport:
    """The report with something that only the files beside it show."""
    verdicts = {report.verdict, finding.kind.cure.verdict}
    return replace(
        report,
        verdict=next(verdict for verdict in _WORST_FIRST if verdict in verdicts),
        problems=(*report.problems, _problem(report.path, finding)),
    )


def _problem(path: str, finding: Finding) -> Problem:
    return Problem(
        path,
        finding.kind.code,
        "warning" if finding.is_warning else "error",
        finding.kind.structure,
        finding.offset,
        finding.what,
        finding.remedy(path),
        finding.kind.cure.value,
    )


def _report(path: str, findings: Sequence[Finding], image: Image | None) -> FileReport:
    problems = tuple(_problem(path, finding) for finding in findings)
    kind, size = (image.kind.word, image.size_bytes) if image is not None else (None, None)
    return FileReport(path, verdict_of(findings), problems, kind, size)


# ---------------------------------------------------------------------- what only a check looks for


def _bad_entries(image: Image) -> list[Finding]:
    """The entries that cannot be believed, each with what is there instead; beyond a number of them, how many."""
    if not image.bad_starts:
        return []
    assert image.header is not None
    indexes = list(islice(bad_indexes(image), _SHOWN_ENTRIES + 1))
    found = [_bad_entry(image, index) for index in indexes[:_SHOWN_ENTRIES]]
    if len(indexes) > _SHOWN_ENTRIES:
        what = f"so do more entries, {len(image.bad_starts)} in all"
        at = image.header.bat_offset + indexes[-1] * bat_table.ENTRY_BYTES
        found.append(Finding(Kind.ENTRIES_BAD, what, at))
    return found


def bad_indexes(image: Image) -> Iterator[int]:
    """The blocks whose BAT entries cannot be believed, ascending."""
    if len(image.bad_starts) <= _SET_ENTRIES:
        bad = set(image.bad_starts)
        return (index for index, entry in enumerate(image.bat) if entry in bad)
    return (
        index for index, entry in enumerate(image.bat) if entry != bat_table.UNALLOCATED and image.is_bad_start(entry)
    )


def _bad_entry(image: Image, index: int) -> Finding:
    assert image.header is not None
    start = image.bat[index] * SECTOR_BYTES
    at = image.header.bat_offset + index * bat_table.ENTRY_BYTES
    says = f"BAT entry {index} points to byte {start}"
    if start + image.bitmap_bytes >= image.blocks_end + SECTOR_BYTES or start >= image.blocks_end:
        return Finding(Kind.ENTRY_PAST_END, f"{says}, past the end of the data at {image.blocks_end}", at)
    for begin, end in image.metadata:
        if start < end and begin < start + image.span_bytes:
            return Finding(Kind.ENTRY_IN_METADATA, f"{says}, into the structure at bytes {begin} to {end}", at)
    return Finding(Kind.ENTRY_OVERLAPS, f"{says}, over another block", at)


def _odd_padding(image: Image) -> list[Finding]:
    """Bytes between the last entry and the end of the BAT's last sector that are not ff."""
    header = image.header
    assert header is not None
    begin = header.bat_offset + header.max_bat_entries * bat_table.ENTRY_BYTES
    raw = os.pread(image.fd, bat_end(header) - begin, begin)
    if raw.count(0xFF) == len(raw):
        return []
    return [Finding(Kind.BAT_PADDING, "the BAT is not padded with ff", begin)]


def _orphans(image: Image) -> list[Finding]:
    """Room of whole blocks that belongs to nothing. Where entries are bad, whose it is cannot be told."""
    if image.bad_starts:
        return []
    stride = -(-image.span_bytes // DATA_ALIGNMENT) * DATA_ALIGNMENT
    starts = image.kept_starts
    assert starts is not None
    metadata = sorted(image.metadata)
    total, first, number = 0, 0, 0

    def see(begin: int, end: int) -> None:
        nonlocal total, first, number
        taken = sum(max(0, min(stop, end) - max(start, begin)) for start, stop in metadata)
        room = end - begin - taken
        if room >= stride:
            number += 1
            total += room
            first = first or begin

    structures_end = max([image.claimed_end, *(end for _, end in metadata)])
    if starts:
        see(min(end for _, end in metadata), starts[0] * SECTOR_BYTES)
        sectors = image.span_bytes // SECTOR_BYTES
        if any(map(ge, map(sub, islice(starts, 1, None), starts), repeat(sectors + stride // SECTOR_BYTES))):
            for start, follower in pairwise(starts):
                if follower - start >= sectors + stride // SECTOR_BYTES:
                    see((start + sectors) * SECTOR_BYTES, follower * SECTOR_BYTES)
        structures_end = max(structures_end, starts[-1] * SECTOR_BYTES + image.span_bytes)
    if image.has_tail and not any(finding.kind is Kind.FOOTER_BURIED for finding in image.findings):
        see(structures_end, image.footer_offset)
    if not total:
        return []
    pieces = f" in {number} pieces" if number > 1 else ""
    what = f"{format_size(total)}{pieces} belong to no block"
    return [Finding(Kind.ORPHAN_ROOM, what, first, "What lies at the end is given back by: mullion vhd repair {path}")]


def _bad_locators(image: Image) -> list[Finding]:
    """Locators that cannot be read."""
    folder = os.path.dirname(real_path(image.fd))
    at = image.footer.data_offset + HEADER_BYTES - 256 - LOCATORS * 24
    return [
        Finding(Kind.LOCATOR_BAD, f"parent {name.source} {name.complaint}", at)
        for name in parent_names(image, folder)
        if name.is_broken
    ]


def find_azure_obstacles(image: Image) -> list[Finding]:
    """What Azure would refuse of a disk that is sound. Its rules: fixed, whole MiB, a footer that ends the file."""
    found: list[Finding] = []
    at = image.footer_offset
    convert = "Convert it: mullion vhd convert {path} NEW.vhd --to fixed"
    if image.kind is not DiskType.FIXED:
        what = f"Azure takes fixed disks only, this one is {image.kind.word}"
        found.append(Finding(Kind.AZURE_TYPE, what, at + 60, convert))
    if image.size_bytes % MIB:
        what = f"Azure takes sizes in whole MiB only, this disk has {image.size_bytes} bytes"
        wanted = -(-image.size_bytes // MIB)
        grow = f"Grow it first: mullion vhd resize {{path}} --size {wanted}M"
        found.append(Finding(Kind.AZURE_SIZE, what, at + 48, grow))
    if image.size_bytes > AZURE_MAX_BYTES:
        what = f"Azure takes {format_size(AZURE_MAX_BYTES)} at most, this disk has {format_size(image.size_bytes)}"
        found.append(Finding(Kind.AZURE_LIMIT, what, at + 48, "Shrink the disk from inside the guest, then resize it."))
    odd = (Kind.FOOTER_SHORT, Kind.GAP_BEFORE_FOOTER, Kind.RESERVED_FEATURE, Kind.GEOMETRY_ZERO)
    found += [
        Finding(Kind.AZURE_FOOTER, f"Azure takes ordinary footers only: {finding.what}", finding.offset, convert)
        for finding in image.findings
        if finding.kind in odd
    ]
    found += [
        Finding(Kind.AZURE_BAT, f"Azure takes exact BATs only: {finding.what}", finding.offset, convert)
        for finding in image.findings
        if finding.kind is Kind.BAT_SPARE_ENTRIES
    ]
    return found
