"""Another size for a disk: larger, or smaller where what is cut off is empty.

What a guest finds: a GPT has its backup at the disk's end, so it moves along (`gpt`); an MBR has nothing there. Content
below the smaller of the two sizes stays as it is; new room reads as zeros, or, in a differencing disk, as what a larger
parent has there. The footer's current size and geometry change, its original size stays.

Fixed: the footer is the file's last sector and has no copy, so it is never taken away before another is there. To grow:
a footer that says the old size at the new end (a gap between data and footer is allowed) · the old one zeroed · the
new size, one sector. To shrink: the new size, one sector · a footer behind the data · the file cut there.

Dynamic and differencing: `header_switch`, one sector decides. A BAT that has to grow beyond the room it has goes to the
end of the file, where every reader finds it, rather than having blocks moved out of its way: that costs the same for
any block size, and the old table is valid until the one write that names the new one.

Durability: a crash leaves the old size or the new one, and running it again finishes it. While a fixed disk grows the
file's length can be durable before the footer at its new end is: then the file ends in zeros, and `repair` finds the
footer before them. The GPT is moved after a growth and before a shrink, and is valid by one copy at every instant.
"""

from __future__ import annotations

import contextlib
import shlex
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from mullion.base.block import ExtentKind
from mullion.base.errors import ConflictError, InvalidError
from mullion.base.progress import Progress, no_progress
from mullion.base.units import MIB, SECTOR_BYTES, format_size
from mullion.vhd import bat as bat_table
from mullion.vhd import bitmap
from mullion.vhd.batmap import Batmap
from mullion.vhd.chain import Chain
from mullion.vhd.children import find_children
from mullion.vhd.create import DATA_ALIGNMENT, MAX_SIZE_BYTES
from mullion.vhd.fileio import SYSTEM, FileIO
from mullion.vhd.geometry import Geometry
from mullion.vhd.gpt import Gpt, GptError, leftover_range, load_gpt, move_backup
from mullion.vhd.header_switch import Piece, is_away, switch_header
from mullion.vhd.image import Image
from mullion.vhd.layout import FOOTER_BYTES, DiskType, Footer
from mullion.vhd.offline import open_for_change, reload
from mullion.vhd.partitions import read_partitions
from mullion.vhd.structures import bat_end

_EXACT_CREATORS: Final = (b"win ", b"qem2", b"d2v\0", b"CTXS", b"tap\0")
"""Whose current size QEMU before 10.0 believes; of all others it takes the geometry."""
_WINDOW_BYTES: Final = 64 * MIB
_PIECE_BYTES: Final = MIB


@dataclass(frozen=True, slots=True)
class Resized:
    """What a resize did. `table` is "none", "mbr", "gpt" (its backup is at the end) or "gpt-left" (left alone)."""

    path: str
    old_bytes: int
    size_bytes: int
    table: str
    table_problem: str | None = None


def resize(
    path: str,
    size_bytes: int,
    *,
    force: bool = False,
    allowed_dirs: Sequence[str] | None = None,
    progress: Progress = no_progress,
    file_io: FileIO = SYSTEM,
) -> Resized:
    """Give a disk exactly this size in bytes. The same size again only moves a GPT's backup to the end.

    `force` lets a disk grow on which others were made (its GPT is then left alone, since their content must not
    change). Raises: InvalidError for a size that cannot be, or that would cut off data; ConflictError for a parent;
    what opening for writing raises; OSError.
    """
    with open_for_change(path, holder="mullion vhd resize", file_io=file_io, allowed_dirs=allowed_dirs) as chain:
        image = chain.images[0]
        old_bytes = chain.size_bytes
        _check_size(image, size_bytes)
        children = list(find_children(path, chain.unique_id))
        _check_children(path, children, force=force, is_growth=size_bytes >= old_bytes)
        if size_bytes < old_bytes:
            _prepare_shrink(chain, size_bytes, progress)
        chain.settle()
        if size_bytes != old_bytes or _is_half_done(image):
            _change(image, size_bytes, file_io)
            chain.renew()
        table, problem = _finish_table(chain, may_write=not children)
        return Resized(path, old_bytes, size_bytes, table, problem)


def _is_half_done(image: Image) -> bool:
    """Did a change of the file end before its last step?"""
    return is_away(image) if image.header is not None else image.size_bytes != image.footer_offset


def _check_size(image: Image, size_bytes: int) -> None:
    if size_bytes <= 0 or size_bytes % SECTOR_BYTES or size_bytes > MAX_SIZE_BYTES:
        raise InvalidError(
            f"a VHD cannot have {size_bytes} bytes",
            remedy=f"Give a multiple of 512 bytes, at most {format_size(MAX_SIZE_BYTES)}.",
            size_bytes=size_bytes,
        )
    if image.header is not None and size_bytes > bat_table.MAX_BAT_ENTRIES * image.block_bytes:
        most = bat_table.MAX_BAT_ENTRIES * image.block_bytes
        raise InvalidError(
            f"{image.path} has blocks of {format_size(image.block_bytes)} and can have {format_size(most)} at most",
            remedy=f"Copy it to a disk of larger blocks first: mullion vhd convert {shlex.quote(image.path)} NEW.vhd",
            size_bytes=size_bytes,
        )


def _check_children(path: str, children: list[str], *, force: bool, is_growth: bool) -> None:
    if not children or (is_growth and force):
        return
    says = f"{path} is the parent of {children[0]}" + (f" and {len(children) - 1} more" if children[1:] else "")
    if is_growth:
        remedy = (
            "Resize the child instead. If that is no child any more, or you know that it may see other room: --force"
        )
    else:
        remedy = "Resize the child instead; or merge or delete its children first."
    raise ConflictError(f"{says}: its size must not change", remedy=remedy, path=path, children=", ".join(children))


# ---------------------------------------------------------------------- partition tables


def _finish_table(chain: Chain, *, may_write: bool) -> tuple[str, str | None]:
    """Move a GPT's backup to the end: (what table there is, why it was left alone)."""
    try:
        gpt = load_gpt(chain)
        if gpt is not None:
            if not may_write:
                return "gpt-left", "other disks were made on this one, so its content was not changed"
            move_backup(chain, gpt, chain.size_bytes)
            return "gpt", None
    except GptError as error:
        return "gpt-left", str(error)
    table = read_partitions(chain)
    return (table.scheme, None) if table is not None else ("none", None)


def _prepare_shrink(chain: Chain, size_bytes: int, progress: Progress) -> None:
    """Refuse when anything would be cut off; move a GPT's backup to below the new end.

    Raises: InvalidError that says how far the disk can shrink.
    """
    try:
        gpt = load_gpt(chain)
    except GptError as error:
        raise InvalidError(
            f"{chain.paths[0]} cannot be made smaller: its GPT is not sound: {error}",
            remedy="Mend the partition table in the guest first, for instance with `gdisk`.",
        ) from error
    skipped = [] if gpt is None else [found for found in (gpt.backup_range(), leftover_range(chain, gpt)) if found]
    least = max(_table_end(chain, gpt), _last_used(chain, size_bytes, skipped, progress))
    if least > size_bytes:
        rounded = min(-(-least // MIB) * MIB, chain.size_bytes)
        raise InvalidError(
            f"{chain.paths[0]} cannot have {size_bytes} bytes: it is in use up to byte {least}",
            remedy=_how_far(chain, rounded),
            least_bytes=least,
        )
    if gpt is not None:
        move_backup(chain, gpt, size_bytes)


def _how_far(chain: Chain, least: int) -> str:
    if least >= chain.size_bytes:
        return "It cannot be made smaller. Make its last partition smaller in the guest first."
    size = f"{least // MIB}M" if least % MIB == 0 else str(least)
    return f"The least it can have is {least} bytes: --size {size}. For less, shrink partitions in the guest first."


def _table_end(chain: Chain, gpt: Gpt | None) -> int:
    """Where the last partition ends, with the room for a GPT's backup behind it."""
    if gpt is not None:
        return gpt.least_sectors * SECTOR_BYTES
    table = read_partitions(chain)
    return max((part.offset + part.length for part in table.partitions), default=0) if table is not None else 0


def _last_used(chain: Chain, start: int, skipped: list[tuple[int, int]], progress: Progress) -> int:
    """Where the last byte other than zero ends, from `start` on; `start` when there is none. Looks from the end."""
    windows: dict[int, None] = {}  # those with anything in them, in order; at most 32640
    for extent in chain.extents(start, chain.size_bytes - start):
        if extent.kind is ExtentKind.DATA:
            first, last = extent.offset // _WINDOW_BYTES, (extent.offset + extent.length - 1) // _WINDOW_BYTES
            windows.update(dict.fromkeys(range(first, last + 1)))
    for number, window in enumerate(reversed(windows)):
        progress("looking at what is cut off", number * _WINDOW_BYTES, len(windows) * _WINDOW_BYTES)
        begin = max(start, window * _WINDOW_BYTES)
        length = min((window + 1) * _WINDOW_BYTES, chain.size_bytes) - begin
        extents = [extent for extent in chain.extents(begin, length) if extent.kind is ExtentKind.DATA]
        for extent in reversed(extents):
            for at in reversed(range(extent.offset, extent.offset + extent.length, _PIECE_BYTES)):
                piece = bytearray(min(_PIECE_BYTES, extent.offset + extent.length - at))
                chain.pread(at, piece)
                for gap_start, gap_end in skipped:
                    low, high = max(gap_start, at), min(gap_end, at + len(piece))
                    if low < high:
                        piece[low - at : high - at] = bytes(high - low)
                if used := len(piece.rstrip(b"\0")):
                    return at + used
    return start


# ---------------------------------------------------------------------- the file


def grow_file(image: Image, size_bytes: int, file_io: FileIO) -> None:
    """Make a disk larger that is open for writing, mended, and has nothing pending; `image` describes it afterwards.

    Blocks stay where they are, so whoever has the old structures in memory reads the old disk as before.
    Raises: InvalidError for a size that cannot be; OSError.
    """
    _check_size(image, size_bytes)
    assert size_bytes >= image.size_bytes
    _change(image, size_bytes, file_io)


def _change(image: Image, size_bytes: int, file_io: FileIO) -> None:
    if image.header is None:
        if size_bytes >= image.size_bytes:
            _grow_fixed(image, size_bytes, file_io)
        if size_bytes < image.footer_offset:
            _shrink_fixed(image, size_bytes, file_io)
    else:
        _change_blocks(image, size_bytes, file_io)


def _footer_for(image: Image, size_bytes: int) -> Footer:
    """The footer for a new size, which every reader must take for the size."""
    geometry = Geometry.for_size(size_bytes)
    footer = replace(
        image.footer,
        current_size_bytes=size_bytes,
        cylinders=geometry.cylinders,
        heads=geometry.heads,
        sectors_per_track=geometry.sectors_per_track,
    )
    if footer.creator_application not in _EXACT_CREATORS and geometry.size_bytes != size_bytes:
        footer = replace(footer, creator_application=b"win ", creator_version=0x000A_0000, creator_host_os=b"Wi2k")
    return footer


def _grow_fixed(image: Image, size_bytes: int, file_io: FileIO) -> None:
    if size_bytes > image.footer_offset:
        try:
            file_io.write_all(image.fd, [image.footer_raw], size_bytes)
            file_io.sync_file(image.fd)
        except OSError:
            with contextlib.suppress(OSError):  # the old end is the good one still; the first error is the one to tell
                file_io.ftruncate(image.fd, image.file_bytes)
            raise
    file_io.write_zeros(image.fd, image.size_bytes, size_bytes - image.size_bytes)
    file_io.sync_file(image.fd)
    reload(image)
    _write_fixed_footer(image, image.footer_offset, size_bytes, file_io)
    reload(image)


def _shrink_fixed(image: Image, size_bytes: int, file_io: FileIO) -> None:
    if size_bytes != image.size_bytes:
        _write_fixed_footer(image, image.footer_offset, size_bytes, file_io)
    _write_fixed_footer(image, size_bytes, size_bytes, file_io)
    file_io.ftruncate(image.fd, size_bytes + FOOTER_BYTES)
    file_io.sync_file(image.fd)
    reload(image)


def _write_fixed_footer(image: Image, offset: int, size_bytes: int, file_io: FileIO) -> None:
    file_io.write_all(image.fd, [_footer_for(image, size_bytes).pack()], offset)
    file_io.sync_file(image.fd)


def _change_blocks(image: Image, size_bytes: int, file_io: FileIO) -> None:
    header = image.header
    assert header is not None
    entries = -(-size_bytes // header.block_bytes)
    dropped = [entry for entry in image.bat[entries:] if entry != bat_table.UNALLOCATED]
    if size_bytes > image.size_bytes:
        _clear_beyond(image, file_io)
    bat_offset, pieces = _place_table(image, entries)
    new_header = replace(header, bat_offset=bat_offset, max_bat_entries=entries)
    switch_header(image, _footer_for(image, size_bytes), new_header, file_io, pieces=pieces)
    padding = bat_end(new_header) - bat_offset - entries * bat_table.ENTRY_BYTES
    if dropped:  # what the table does not have any more; in the file only the sector that it shares is written
        file_io.write_all(image.fd, [b"\xff" * padding], bat_offset + entries * bat_table.ENTRY_BYTES)
        for entry in dropped:
            start = entry * SECTOR_BYTES
            file_io.discard(image.fd, start, max(0, min(image.span_bytes, image.footer_offset - start)))
        file_io.sync_file(image.fd)


def _clear_beyond(image: Image, file_io: FileIO) -> None:
    """Zeros, and clear bits in a differencing disk, behind the present end in the last block: a growth shows them."""
    within = image.size_bytes % image.block_bytes
    start = image.block_start(len(image.bat) - 1)
    if within == 0 or start is None:
        return
    sectors = image.block_bytes // SECTOR_BYTES
    kept = within // SECTOR_BYTES
    if image.kind is DiskType.DIFFERENCING:
        bits = image.read_bits(start, 0, sectors) & bitmap.mask(0, kept, sectors)
        file_io.write_all(image.fd, [bitmap.to_raw(bits, sectors, image.bitmap_bytes)], start)
    data = start + image.bitmap_bytes
    file_io.write_zeros(image.fd, data + within, image.block_bytes - within)


def _place_table(image: Image, entries: int) -> tuple[int, list[Piece]]:
    """Where a BAT of that many entries goes, and what is to be written into free room for it."""
    header = image.header
    assert header is not None
    end = header.bat_offset + -(-entries * bat_table.ENTRY_BYTES // SECTOR_BYTES) * SECTOR_BYTES
    batmap = Batmap.load(image)
    has_room = end <= _room_end(image, bat_end(header))
    if has_room and (batmap is None or (end == bat_end(header) and batmap.covers(entries))):
        at = header.bat_offset + len(image.bat) * bat_table.ENTRY_BYTES
        return header.bat_offset, [(at, b"\xff" * (end - at))] if at < end and entries > len(image.bat) else []
    place = -(-image.footer_offset // DATA_ALIGNMENT) * DATA_ALIGNMENT
    kept = min(entries, len(image.bat))
    table = b"".join(_sectors(image, kept))
    length = end - header.bat_offset
    pieces: list[Piece] = [(place, table[: kept * bat_table.ENTRY_BYTES].ljust(length, b"\xff"))]
    if batmap is not None:
        pieces += batmap.moved(place + length, entries).pieces()
    return place, pieces


def _sectors(image: Image, entries: int) -> Iterator[bytes]:
    for index in range(-(-entries // bat_table.ENTRIES_PER_SECTOR)):
        yield bat_table.raw_sector(image.bat, index)


def _room_end(image: Image, table_end: int) -> int:
    """Where the next structure or block behind the BAT begins."""
    starts = [start for start, _ in image.metadata if start >= table_end]
    blocks = bat_table.allocated_starts(image.bat)
    behind = bisect_left(blocks, table_end // SECTOR_BYTES)
    starts += [entry * SECTOR_BYTES for entry in blocks[behind : behind + 1]]
    return min([image.footer_offset, *starts])
