"""One VHD file: opened safely, its structures read and judged, its blocks located.

What is wrong with a file falls into three classes (docs/formats/vhd.md lists them all): it is refused with an error; it
can be read but not written (`Image.damage` says why); it is a harmless deviation, or one that the next writer mends
(`Image.warnings`). `structures` judges each structure, `findings` has the table of what can be found.

Invariants: nothing here writes; memory is bounded by `bat.MAX_BAT_BYTES`, never by a number in the file; only a regular
file is ever opened for I/O.
"""

from __future__ import annotations

import errno
import os
import stat
from array import array
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from typing import Final

from mullion.base.errors import DeniedError, NotFoundError
from mullion.base.units import SECTOR_BYTES
from mullion.vhd import bat as bat_table
from mullion.vhd import bitmap
from mullion.vhd.bat import Bat
from mullion.vhd.errors import NotVhdError, VhdDamagedError, VhdUnsupportedError
from mullion.vhd.findings import Finding, Kind
from mullion.vhd.geometry import Geometry, SizeFrom
from mullion.vhd.layout import FOOTER_BYTES, HEADER_BYTES, DiskType, DynamicHeader, Footer
from mullion.vhd.storage import explained
from mullion.vhd.structures import (
    FooterPair,
    FooterRead,
    bat_end,
    batmap_ranges,
    choose_footer,
    footer_oddities,
    judge_fixed,
    locator_ranges,
    read_bat,
    read_footers,
    read_header,
)

FIXED_GRANULE_BYTES: Final = 1 << 21


@dataclass(slots=True)
class Image:
    """A VHD file that is open."""

    fd: int
    path: str
    footer: Footer
    footer_raw: bytes
    header: DynamicHeader | None
    bat: Bat
    file_bytes: int
    footer_offset: int
    """Where the tail footer lies; where it ought to begin when it is missing."""
    has_tail: bool
    metadata: list[tuple[int, int]]
    """Ranges of the file that no block may touch: (start, end) in bytes."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong or odd, in the order in which it was met."""
    bad_starts: array[int] = field(default_factory=lambda: array("I"))
    claimed_end: int = 0
    """Where the room ends that locators claim beyond their text."""
    kept_starts: array[int] | None = None
    """The entries of all allocated blocks, ascending: only an image that was asked to keeps them, by an empty array."""

    @property
    def warnings(self) -> list[str]:
        """What does not keep the disk from being written."""
        return [finding.what for finding in self.findings if not finding.kind.keeps_from_writing]

    @property
    def damage(self) -> list[str]:
        """Why the disk can only be read."""
        return [finding.what for finding in self.findings if finding.kind.keeps_from_writing]

    @property
    def has_front(self) -> bool:
        """Is the copy of the footer at byte 0 good?"""
        return not any(finding.kind is Kind.FOOTER_COPY_BAD for finding in self.findings)

    @property
    def kind(self) -> DiskType:
        return self.footer.disk_type

    @property
    def size_bytes(self) -> int:
        return self.footer.current_size_bytes

    @property
    def block_bytes(self) -> int:
        return self.header.block_bytes if self.header else FIXED_GRANULE_BYTES

    @property
    def bitmap_bytes(self) -> int:
        return bitmap.bitmap_bytes(self.block_bytes) if self.header else 0

    @property
    def span_bytes(self) -> int:
        """A block with its bitmap."""
        return self.bitmap_bytes + self.block_bytes

    @property
    def allocated_bytes(self) -> int:
        """Room that the file has for data."""
        if self.header is None:
            return self.size_bytes
        return self.bat.count_allocated() * self.block_bytes

    def block_start(self, index: int) -> int | None:
        """Where the block's bitmap begins in the file; None when the block is not allocated.

        Raises: VhdDamagedError when the entry is one that cannot be believed.
        """
        entry = self.bat[index]
        if entry == bat_table.UNALLOCATED:
            return None
        if self.bad_starts and self.is_bad_start(entry):
            assert self.header is not None
            raise VhdDamagedError(
                f"{self.path}: BAT entry {index} points to byte {entry * SECTOR_BYTES}, into another structure "
                f"or past the end: what it holds cannot be read",
                path=self.path,
                structure="BAT",
                offset=self.header.bat_offset + index * bat_table.ENTRY_BYTES,
            )
        return entry * SECTOR_BYTES

    def read_bits(self, start: int, first: int, count: int) -> int:
        """Part of the sector bitmap at byte `start` of the file, as an int of `count` bits.

        Raises: VhdDamagedError when the file ends inside it.
        """
        byte = first >> 3
        length = ((first + count + 7) >> 3) - byte
        raw = os.pread(self.fd, length, start + byte)
        if len(raw) != length:
            raise VhdDamagedError(
                f"{self.path}: the file ends inside the sector bitmap at byte {start}",
                path=self.path,
                structure="sector bitmap",
                offset=start,
            )
        if length * 8 == count:
            return int.from_bytes(raw, "big")
        return (int.from_bytes(raw, "big") >> (length * 8 - (first & 7) - count)) & ((1 << count) - 1)

    def check_entries(self) -> None:
        """Find the BAT entries that cannot be believed, and the file that ends too early."""
        starts = bat_table.allocated_starts(self.bat)
        if self.kept_starts is not None:
            self.kept_starts = starts
        self.bad_starts = array("I")
        if not starts:
            return
        assert self.header is not None
        end = self.blocks_end
        past = end // SECTOR_BYTES - self.bitmap_bytes // SECTOR_BYTES
        self.bad_starts = bat_table.find_bad_starts(starts, self.span_bytes // SECTOR_BYTES, past, self.metadata)
        if self.bad_starts:
            what = (
                f"{len(self.bad_starts)} BAT entries point into other structures or past the end, the first to byte "
                f"{self.bad_starts[0] * SECTOR_BYTES}"
            )
            self.findings.append(Finding(Kind.ENTRIES_BAD, what, self.header.bat_offset))
        last = bisect_left(starts, max(0, past)) - 1
        if last >= 0 and not self.is_bad_start(starts[last]):
            good_end = starts[last] * SECTOR_BYTES + self.span_bytes
            if good_end > end:
                what = f"the file was cut: its last block should end at byte {good_end}, but {end} is the end"
                self.findings.append(Finding(Kind.BLOCK_CUT, what, end))

    @property
    def blocks_end(self) -> int:
        """Where blocks must have ended: the tail footer, or the end of the file when it is missing."""
        return self.footer_offset if self.has_tail else self.file_bytes

    def is_bad_start(self, entry: int) -> bool:
        """Is this BAT entry one that cannot be believed?"""
        place = bisect_left(self.bad_starts, entry)
        return place < len(self.bad_starts) and self.bad_starts[place] == entry

    def data_end(self) -> int:
        """Where the last structure that is in use ends."""
        ends = [self.claimed_end, *(end for _, end in self.metadata)]
        last = bat_table.last_start(self.bat)
        if last is not None:
            ends.append(last * SECTOR_BYTES + self.span_bytes)
        return max(ends)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_file(path: str, *, writable: bool = False, follow: bool = True) -> int:
    """Open a regular file; a FIFO or a device is told apart before it is opened, so neither can block or react.

    Raises: NotFoundError, DeniedError, NotVhdError when it is not a regular file; OSError.
    """
    flags = os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        probe = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError) as error:
        says = f"there is no file {path}" if path else "an empty path names no file"
        raise NotFoundError(says, remedy="Check the path of the disk.", path=path) from error
    except PermissionError as error:
        raise DeniedError(f"{path} may not be opened", path=path) from error
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise NotFoundError(f"there can be no file {path}", remedy="Check the path of the disk.", path=path) from error
    try:
        mode = os.fstat(probe).st_mode
        if not stat.S_ISREG(mode):
            raise NotVhdError(f"{path} is not a regular file", path=path, remedy="Choose a VHD file.")
        access = os.O_RDWR if writable else os.O_RDONLY
        return os.open(f"/proc/self/fd/{probe}", access | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        verb = "written" if writable else "read"
        raise DeniedError(f"{path} may not be {verb}", path=path) from error
    except OSError as error:  # whose file name is the one below /proc
        raise explained(error, path) from error
    finally:
        os.close(probe)


def load_image(fd: int, path: str, *, size_from: SizeFrom = SizeFrom.FOOTER) -> Image:
    """Read and judge the structures of an open file. The descriptor stays the caller's when this raises.

    With a size that is not the footer's own the image is for reading only.

    Raises: NotVhdError, VhdDamagedError, VhdUnsupportedError.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise NotVhdError(f"{path} is not a regular file", path=path, remedy="Choose a VHD file.")
    pair = read_footers(fd, status.st_size)
    chosen = choose_footer(pair)
    if isinstance(chosen, Finding):
        raise chosen.as_error(path)
    image = begin_image(fd, path, pair, *chosen)
    if size_from is SizeFrom.CHS:
        _take_chs_size(image)
    problem = load_structures(image)
    if problem is not None:
        if size_from is SizeFrom.CHS:
            raise _no_chs_size(path, f"it would be {image.size_bytes} bytes: {problem.what}") from problem.as_error(
                path
            )
        raise problem.as_error(path)
    return image


def _take_chs_size(image: Image) -> None:
    """Let the geometry say how large the disk is. Everything is judged by that size then."""
    footer = image.footer
    geometry = Geometry(footer.cylinders, footer.heads, footer.sectors_per_track)
    if geometry.size_bytes == 0:
        raise _no_chs_size(image.path, "its geometry is zero")
    if not geometry.is_largest:
        image.footer = replace(footer, current_size_bytes=geometry.size_bytes)


def _no_chs_size(path: str, why: str) -> VhdUnsupportedError:
    return VhdUnsupportedError(
        f"{path} cannot be read by its CHS size: {why}",
        path=path,
        structure="footer",
        offset=56,
        remedy="Read it by its current size, which is the rule: leave --size-from out.",
    )


def begin_image(fd: int, path: str, pair: FooterPair, read: FooterRead, findings: list[Finding]) -> Image:
    """An image of which only the footer is known; `read` is the one of the pair that is believed."""
    footer = read.footer
    assert footer is not None
    has_tail = pair.tail.footer is not None
    return Image(
        fd,
        path,
        footer,
        read.raw.ljust(FOOTER_BYTES, b"\0"),
        None,
        Bat(),
        pair.file_bytes,
        pair.tail.offset if has_tail else pair.file_bytes,
        has_tail,
        [] if footer.disk_type is DiskType.FIXED else [(0, FOOTER_BYTES)],
        list(findings),
    )


def load_structures(image: Image, header: DynamicHeader | None = None) -> Finding | None:
    """Read what lies behind the footer: nothing when all is there, or the finding with which it ends.

    `header` is used instead of the one in the file, for a file whose own does not hold.
    """
    footer = image.footer
    if image.kind is DiskType.FIXED:
        found = judge_fixed(footer, image.footer_offset)
        if found is not None:
            if not found.is_warning:
                return found
            image.findings.append(found)
    else:
        at = 0 if image.has_front else image.footer_offset
        found_header = header or read_header(image.fd, footer, at, image.blocks_end)
        if isinstance(found_header, Finding):
            return found_header
        table = read_bat(image.fd, found_header, footer, image.blocks_end)
        if isinstance(table, Finding):
            return table
        _take_bat(image, found_header, table)
    length = image.file_bytes - image.footer_offset if image.has_tail else FOOTER_BYTES
    image.findings += footer_oddities(footer, image.footer_offset if image.has_tail else 0, length)
    if image.header and image.header.max_bat_entries > len(image.bat):
        spare = image.header.max_bat_entries - len(image.bat)
        what = f"the BAT has {spare} entries too many"
        image.findings.append(Finding(Kind.BAT_SPARE_ENTRIES, what, footer.data_offset + 28))
    return None


def _take_bat(image: Image, header: DynamicHeader, table: Bat) -> None:
    image.header = header
    image.metadata.append((image.footer.data_offset, image.footer.data_offset + HEADER_BYTES))
    needed = -(-image.size_bytes // header.block_bytes)
    beyond = bat_table.next_allocated(table, needed)
    if beyond < len(table):
        what = "the BAT holds blocks past the end of the disk"
        at = header.bat_offset + beyond * bat_table.ENTRY_BYTES
        image.findings.append(Finding(Kind.BAT_BEYOND_DISK, what, at))
    table.shorten(needed)
    image.bat = table
    end = bat_end(header)
    image.metadata.append((header.bat_offset, end))
    ranges, image.claimed_end = locator_ranges(header, image.file_bytes)
    image.metadata += ranges
    image.metadata += batmap_ranges(image.fd, end, image.file_bytes)
    image.check_entries()
