"""Mending a VHD in place: footers, checksums, BAT entries, the end of the file. Data blocks are never touched.

Lossless unless the caller allows a loss: what is written follows from what the file still says. A loss has two kinds.
A file that was cut has lost its end already; mending makes that part read as zeros instead of an error. A BAT entry
that cannot be believed may still be half right; mending clears it.

Durability: first a backup of every byte that will change is made durable beside the disk (`undo`), then:

    1  footer copy at byte 0    3  BAT sectors                                    5  footer at the end
    2  header (its checksum)    4  the old footer inside a cut block, as zeros    6  the length of the file

each followed by fdatasync. Each step is one sector or a set of sectors that are right one by one, and what stood before
is not needed after it: at every instant the file is as it was, or mended in part and repairable again. Repairing again
ends in a disk of the same content.

A disk whose last writer was killed keeps the room behind its last block: what that writer acknowledged may lie there,
and the next opening with its pending log needs it. So does one whose BAT has entries to be cleared, lest they lead
nowhere when they are put back. The next opening for writing gives back what is left over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from mullion.base.units import SECTOR_BYTES, format_size
from mullion.vhd import bat as bat_table
from mullion.vhd.check import FileReport, bad_indexes, check_open_file
from mullion.vhd.create import DATA_ALIGNMENT, footer_place
from mullion.vhd.fileio import SYSTEM, FileIO
from mullion.vhd.findings import Kind
from mullion.vhd.image import Image, open_file
from mullion.vhd.layout import FOOTER_BYTES, DiskType, DynamicHeader
from mullion.vhd.locking import lock_file
from mullion.vhd.pending import has_session
from mullion.vhd.salvage import examine, with_checksum
from mullion.vhd.structures import read_header_bytes
from mullion.vhd.undo import Change, keep_backup

_WRITE_BYTES: Final = 1 << 16


@dataclass(slots=True)
class Plan:
    """What a repair will do. `groups` are written in this order, each synced; then the file gets its length."""

    actions: list[str] = field(default_factory=list)
    groups: list[list[Change]] = field(default_factory=list)
    file_bytes: int = 0

    @property
    def changes(self) -> list[Change]:
        return [change for group in self.groups for change in group]


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a repair did, or would do."""

    path: str
    before: FileReport
    after: FileReport
    """What a check says of the file now: after a dry run the same as before."""
    actions: tuple[str, ...]
    backup: str | None
    """Where the bytes that were changed are kept; None when nothing was changed."""


def repair_disk(
    path: str, *, allow_loss: bool = False, dry_run: bool = False, file_io: FileIO = SYSTEM, backup: str | None = None
) -> Repaired:
    """Mend one file; its parents are left as they are.

    `dry_run` says what would be done and changes nothing. `backup` is where the changed bytes are kept (default: beside
    the disk, named after it and the time). What cannot be mended is in the report afterwards, not an error.

    Raises: NotFoundError, DeniedError; NotVhdError when it is not a regular file; DiskBusyError; OSError.
    """
    fd = open_file(path, writable=not dry_run)
    try:
        if not dry_run:
            lock_file(fd, path, for_writing=True)
        image = examine(fd, path)
        before = check_open_file(image, path)
        plan = plan_repair(image, allow_loss=allow_loss) if isinstance(image, Image) else Plan()
        if dry_run or not plan.actions:
            return Repaired(path, before, before, tuple(plan.actions), None)
        kept = keep_backup(fd, path, plan.changes, plan.file_bytes, backup)
        _apply(fd, plan, file_io)
        return Repaired(path, before, check_open_file(examine(fd, path), path), tuple(plan.actions), kept)
    finally:
        os.close(fd)


def plan_repair(image: Image, *, allow_loss: bool) -> Plan:
    """What mends a file that `salvage.examine` made out; empty when nothing needs to be done, or may be done."""
    plan = Plan(file_bytes=image.file_bytes)
    kinds = {finding.kind for finding in image.findings}
    if image.kind is DiskType.FIXED:
        _plan_fixed(image, kinds, plan)
        return plan
    _plan_front(image, plan)
    _plan_header(image, kinds, plan)
    _plan_bat(image, kinds, plan, allow_loss=allow_loss)
    _plan_end(image, kinds, plan, allow_loss=allow_loss)
    return plan


def _apply(fd: int, plan: Plan, file_io: FileIO) -> None:
    for group in plan.groups:
        for change in group:
            file_io.write_all(fd, [change.after], change.offset)
        file_io.sync_file(fd)
    if os.fstat(fd).st_size != plan.file_bytes:
        file_io.ftruncate(fd, plan.file_bytes)
        file_io.sync_file(fd)


def _plan_fixed(image: Image, kinds: set[Kind], plan: Plan) -> None:
    if Kind.FOOTER_CHECKSUM in kinds:
        plan.actions.append(f"footer at byte {image.footer_offset}: its checksum is put right")
    if Kind.FOOTER_SHORT in kinds:
        plan.actions.append(f"footer at byte {image.footer_offset}: 512 bytes instead of 511")
    if Kind.FOOTER_BURIED in kinds:
        behind = image.file_bytes - image.footer_offset - FOOTER_BYTES
        plan.actions.append(f"{format_size(behind)} behind the footer are taken away")
    if plan.actions:
        plan.groups.append([Change.of(image.fd, "footer", image.footer_offset, image.footer_raw)])
        plan.file_bytes = image.footer_offset + FOOTER_BYTES


def _plan_front(image: Image, plan: Plan) -> None:
    change = Change.of(image.fd, "footer copy", 0, image.footer_raw)
    if change.before != change.after:
        plan.actions.append("footer copy at byte 0: written from the good footer")
        plan.groups.append([change])


def _plan_header(image: Image, kinds: set[Kind], plan: Plan) -> None:
    if Kind.HEADER_CHECKSUM not in kinds:
        return
    raw = read_header_bytes(image.fd, image.footer, image.blocks_end)
    assert raw is not None
    at = image.footer.data_offset
    sector = with_checksum(raw, DynamicHeader.CHECKSUM_OFFSET)[:SECTOR_BYTES]
    plan.actions.append(f"dynamic disk header at byte {at}: its checksum is put right")
    plan.groups.append([Change.of(image.fd, "dynamic disk header", at, sector)])


def _plan_bat(image: Image, kinds: set[Kind], plan: Plan, *, allow_loss: bool) -> None:
    """Clear entries past the end of the disk, and with consent those that cannot be believed."""
    header = image.header
    assert header is not None
    is_clearing = allow_loss and bool(image.bad_starts)
    if not is_clearing and Kind.BAT_BEYOND_DISK not in kinds:
        return
    table = bat_table.load(image.fd, header.bat_offset, header.max_bat_entries)
    assert table is not None
    touched: set[int] = set()
    if Kind.BAT_BEYOND_DISK in kinds:
        begin, count = len(image.bat), 0
        while (begin := bat_table.next_allocated(table, begin)) < len(table):
            table[begin] = bat_table.UNALLOCATED
            touched.add(begin // bat_table.ENTRIES_PER_SECTOR)
            count += 1
        plan.actions.append(f"BAT: {count} entries past the end of the disk are cleared")
    if is_clearing:
        count = 0
        for index in bad_indexes(image):
            table[index] = bat_table.UNALLOCATED
            touched.add(index // bat_table.ENTRIES_PER_SECTOR)
            count += 1
        reads = "what the parent has" if image.kind is DiskType.DIFFERENCING else "zeros"
        plan.actions.append(f"BAT: {count} entries that cannot be believed are cleared: their blocks read {reads} now")
    plan.groups.append(list(_bat_changes(image, table, sorted(touched), header.bat_offset)))


def _bat_changes(image: Image, table: bat_table.Bat, sectors: list[int], bat_offset: int) -> Iterator[Change]:
    """The sectors of the BAT that change, neighbours together."""
    limit = _WRITE_BYTES // SECTOR_BYTES
    while sectors:
        count = 1
        while count < min(limit, len(sectors)) and sectors[count] == sectors[0] + count:
            count += 1
        raw = b"".join(bat_table.raw_sector(table, index) for index in sectors[:count])
        yield Change.of(image.fd, "BAT", bat_offset + sectors[0] * SECTOR_BYTES, raw)
        sectors = sectors[count:]


def _plan_end(image: Image, kinds: set[Kind], plan: Plan, *, allow_loss: bool) -> None:
    """The footer, right behind the last block."""
    is_cut = Kind.BLOCK_CUT in kinds
    if is_cut and not allow_loss:
        return  # where the disk ends cannot be said yet; a footer that is missing is written at the end of the file
    end = _data_end(image)
    if is_cut:
        lost = end - image.blocks_end
        plan.actions.append(f"the last {format_size(lost)} of the last block were cut off: they read zeros now")
        if image.has_tail:
            zeros = bytes(min(image.file_bytes, end) - image.footer_offset)
            plan.groups.append([Change.of(image.fd, "old footer", image.footer_offset, zeros)])
    if has_session(image.fd) or image.bad_starts or Kind.BAT_BEYOND_DISK in kinds:
        end = max(end, image.blocks_end)  # what lies there may be somebody's yet, or wanted back
    is_spare = image.footer_offset - end >= -(-image.span_bytes // DATA_ALIGNMENT) * DATA_ALIGNMENT
    must_move = not image.has_tail or is_cut or Kind.FOOTER_BURIED in kinds
    if not must_move and not is_spare:
        _plan_tail_in_place(image, kinds, plan)
        return
    # Entries past the end must stay past it: no more room than a sector may be added where they are not cleared.
    place = -(-end // SECTOR_BYTES) * SECTOR_BYTES if image.bad_starts and not allow_loss else footer_place(end)
    if not must_move and place >= image.footer_offset:
        _plan_tail_in_place(image, kinds, plan)
        return
    plan.file_bytes = place + FOOTER_BYTES
    if must_move:
        plan.actions.append(f"footer at the end: written at byte {place}")
    if plan.file_bytes < image.file_bytes:
        plan.actions.append(f"{format_size(image.file_bytes - plan.file_bytes)} behind the last block are given back")
    plan.groups.append([Change.of(image.fd, "footer", place, image.footer_raw)])


def _plan_tail_in_place(image: Image, kinds: set[Kind], plan: Plan) -> None:
    """A footer at the end that is where it should be, and not what it should be."""
    change = Change.of(image.fd, "footer", image.footer_offset, image.footer_raw)
    if change.before == change.after:
        return
    is_short = Kind.FOOTER_SHORT in kinds
    says = "512 bytes instead of 511" if is_short else "written from the good copy at byte 0"
    plan.actions.append(f"footer at byte {image.footer_offset}: {says}")
    plan.groups.append([change])
    plan.file_bytes = max(plan.file_bytes, image.footer_offset + FOOTER_BYTES)


def _data_end(image: Image) -> int:
    """Where the last structure ends that can be believed."""
    ends = [image.claimed_end, *(end for _, end in image.metadata)]
    assert image.kept_starts is not None
    good = next((start for start in reversed(image.kept_starts) if not image.is_bad_start(start)), None)
    if good is not None:
        ends.append(good * SECTOR_BYTES + image.span_bytes)
    return max(ends)
