"""One VHD file: opened safely, its structures read and judged, its blocks located.

What is wrong with a file falls into three classes (docs/formats/vhd.md lists them all): it is refused with an error; it
can be read but not written (`Image.damage` says why); it is a harmless deviation (`Image.warnings`).

Invariants: nothing here writes; memory is bounded by `bat.MAX_BAT_BYTES`, never by a number in the file; only a regular
file is ever opened for I/O.
"""

from __future__ import annotations

import errno
import os
import stat
from array import array
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final

from mullion.base.errors import DeniedError, NotFoundError
from mullion.base.units import SECTOR_BYTES
from mullion.vhd import bat as bat_table
from mullion.vhd import bitmap
from mullion.vhd.errors import NotVhdError, VhdDamagedError, VhdUnsupportedError
from mullion.vhd.geometry import Geometry
from mullion.vhd.layout import (
    FOOTER_BYTES,
    HEADER_BYTES,
    MAX_LOCATOR_BYTES,
    OLD_FOOTER_BYTES,
    DiskType,
    DynamicHeader,
    Footer,
    LayoutError,
)

FIXED_GRANULE_BYTES: Final = 1 << 21
TAIL_WARNING: Final = "the footer at the end is missing or damaged"

_FOREIGN: Final = (
    (b"vhdxfile", 0, "a VHDX"),
    (b"QFI\xfb", 0, "a QCOW image"),
    (b"KDMV", 0, "a VMDK"),
    (b"\x7fELF", 0, "a program"),
    (b"# Disk DescriptorFile", 0, "a VMDK descriptor"),
)
_BATMAP_COOKIE: Final = b"tdbatmap"


@dataclass(slots=True)
class Image:
    """A VHD file that is open."""

    fd: int
    path: str
    footer: Footer
    footer_raw: bytes
    header: DynamicHeader | None
    bat: array[int]
    file_bytes: int
    footer_offset: int
    """Where the tail footer lies; where it ought to begin when it is missing."""
    has_tail: bool
    metadata: list[tuple[int, int]]
    """Ranges of the file that no block may touch: (start, end) in bytes."""
    warnings: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    bad_starts: array[int] = field(default_factory=lambda: array("I"))
    claimed_end: int = 0
    """Where the room ends that locators claim beyond their text."""

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
        return (len(self.bat) - self.bat.count(bat_table.UNALLOCATED)) * self.block_bytes

    def block_start(self, index: int) -> int | None:
        """Where the block's bitmap begins in the file; None when the block is not allocated.

        Raises: VhdDamagedError when the entry is one that cannot be believed.
        """
        entry = self.bat[index]
        if entry == bat_table.UNALLOCATED:
            return None
        if self.bad_starts:
            place = bisect_left(self.bad_starts, entry)
            if place < len(self.bad_starts) and self.bad_starts[place] == entry:
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
        self.bad_starts = array("I")
        if not starts:
            return
        end = self.footer_offset if self.has_tail else self.file_bytes
        bitmap_sectors = self.bitmap_bytes // SECTOR_BYTES
        self.bad_starts = bat_table.find_bad_starts(
            starts, self.span_bytes // SECTOR_BYTES, end // SECTOR_BYTES - bitmap_sectors, self.metadata
        )
        if self.bad_starts:
            self.damage.append(
                f"{len(self.bad_starts)} BAT entries point into other structures or past the end, the first to byte "
                f"{self.bad_starts[0] * SECTOR_BYTES}"
            )
        good_end = (starts[-1] * SECTOR_BYTES) + self.span_bytes
        if not self.bad_starts and good_end > end:
            self.damage.append(f"the file was cut: its last block should end at byte {good_end}, but {end} is the end")

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
        raise NotFoundError(f"there is no file {path}", remedy="Check the path of the disk.", path=path) from error
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
    finally:
        os.close(probe)


def load_image(fd: int, path: str) -> Image:
    """Read and judge the structures of an open file. The descriptor stays the caller's when this raises.

    Raises: NotVhdError, VhdDamagedError, VhdUnsupportedError.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise NotVhdError(f"{path} is not a regular file", path=path, remedy="Choose a VHD file.")
    image = _find_footer(fd, path, status.st_size)
    if image.kind is DiskType.FIXED:
        _check_fixed(image)
    else:
        _load_header(image)
        _load_bat(image)
    _note_oddities(image)
    return image


def _find_footer(fd: int, path: str, file_bytes: int) -> Image:
    """Choose between the footer at the end and its copy at byte 0.

    The copy wins where two valid ones of a dynamic disk disagree: what stands at the end of a damaged file may be the
    guest's data, the first sector of a dynamic disk never is. In a fixed disk it is the other way round.
    """
    front_raw = os.pread(fd, FOOTER_BYTES, 0)
    tail, tail_error, tail_offset, tail_raw = None, None, 0, b""
    for length in (FOOTER_BYTES, OLD_FOOTER_BYTES):
        if tail is None and file_bytes >= length:
            offset = file_bytes - length
            raw = os.pread(fd, length, offset)
            try:
                tail, tail_raw, tail_offset = Footer.unpack(raw), raw.ljust(FOOTER_BYTES, b"\0"), offset
            except LayoutError as error:
                if tail_error is None or not error.is_absent:
                    tail_error = (error, offset)
    front, front_error = None, None
    try:
        front = Footer.unpack(front_raw)
    except LayoutError as error:
        front_error = error
    empty: array[int] = array("I")
    if tail is not None and tail.disk_type is DiskType.FIXED:
        return Image(fd, path, tail, tail_raw, None, empty, file_bytes, tail_offset, True, [])
    if front is not None and front.disk_type is not DiskType.FIXED:
        if tail is None:
            image = Image(fd, path, front, front_raw, None, empty, file_bytes, file_bytes, False, [(0, FOOTER_BYTES)])
            assert tail_error is not None
            image.warnings.append(f"{TAIL_WARNING}: {tail_error[0]}")
            return image
        image = Image(fd, path, front, front_raw, None, empty, file_bytes, tail_offset, True, [(0, FOOTER_BYTES)])
        if tail_raw != front_raw:
            image.damage.append(f"the footer at byte {tail_offset} and its copy at byte 0 disagree")
        return image
    if tail is not None:
        image = Image(fd, path, tail, tail_raw, None, empty, file_bytes, tail_offset, True, [(0, FOOTER_BYTES)])
        image.damage.append(f"the copy of the footer at byte 0 is damaged: {front_error or 'it says fixed'}")
        return image
    _refuse_footers(path, front_raw, front_error, tail_error)
    what = next((name for magic, at, name in _FOREIGN if front_raw[at : at + len(magic)] == magic), None)
    raise NotVhdError(
        f"{path} is {what}, not a VHD" if what else f"{path} is not a VHD: it has no footer at its end nor at byte 0",
        path=path,
        structure="footer",
        offset=max(0, file_bytes - FOOTER_BYTES),
    )


def _refuse_footers(
    path: str, front_raw: bytes, front_error: LayoutError | None, tail_error: tuple[LayoutError, int] | None
) -> None:
    """Tell what is wrong with a file that has the marks of a VHD, but no footer that holds."""
    at, why = 0, "the one at byte 0 says fixed, and none is at the end"
    if tail_error is not None and not tail_error[0].is_absent:
        at, why = tail_error[1] + tail_error[0].field_offset, str(tail_error[0])
    elif front_raw[:8] != Footer.COOKIE:
        return
    elif front_error is not None:
        at, why = front_error.field_offset, str(front_error)
    raise VhdDamagedError(f"{path}: no valid footer: {why} (byte {at})", path=path, structure="footer", offset=at)


def _check_fixed(image: Image) -> None:
    if image.size_bytes > image.footer_offset:
        raise VhdDamagedError(
            f"{image.path}: the footer says {image.size_bytes} bytes, but only {image.footer_offset} are in the file",
            path=image.path,
            structure="footer",
            offset=image.footer_offset + 48,
        )
    if image.size_bytes < image.footer_offset:
        image.warnings.append(f"{image.footer_offset - image.size_bytes} bytes between the data and the footer")


def _load_header(image: Image) -> None:
    at = image.footer.data_offset
    raw = os.pread(image.fd, HEADER_BYTES, at) if at <= image.file_bytes else b""
    if len(raw) != HEADER_BYTES or at % SECTOR_BYTES or at < FOOTER_BYTES:
        raise VhdDamagedError(
            f"{image.path}: the dynamic disk header should be at byte {at}, which is outside the file or misplaced",
            path=image.path,
            structure="footer",
            offset=16,
            remedy="Restore the file from a backup: without its header the blocks cannot be found.",
        )
    try:
        image.header = DynamicHeader.unpack(raw)
    except LayoutError as error:
        raise VhdDamagedError(
            f"{image.path}: dynamic disk header at byte {at}: {error}",
            path=image.path,
            structure="dynamic disk header",
            offset=at + error.field_offset,
            remedy="Restore the file from a backup: without its header the blocks cannot be found.",
        ) from error
    image.metadata.append((at, at + HEADER_BYTES))


def _load_bat(image: Image) -> None:
    header = image.header
    assert header is not None
    needed = -(-image.size_bytes // header.block_bytes)

    def refuse(kind: type[VhdDamagedError] | type[VhdUnsupportedError], what: str) -> None:
        raise kind(f"{image.path}: BAT at byte {header.bat_offset}: {what}", path=image.path, structure="BAT",
                   offset=header.bat_offset)  # fmt: skip

    if header.max_bat_entries < needed:
        refuse(
            VhdDamagedError,
            f"{header.max_bat_entries} entries of {header.block_bytes} bytes do not cover the disk's "
            f"{image.size_bytes} bytes",
        )
    if header.bat_offset < FOOTER_BYTES or header.bat_offset + header.max_bat_entries * 4 > image.file_bytes:
        refuse(
            VhdDamagedError,
            f"its {header.max_bat_entries} entries reach outside the file of {image.file_bytes} bytes",
        )
    if header.max_bat_entries > bat_table.MAX_BAT_ENTRIES:
        refuse(
            VhdUnsupportedError,
            f"{header.max_bat_entries} entries are more than the supported {bat_table.MAX_BAT_ENTRIES}",
        )
    table = bat_table.load(image.fd, header.bat_offset, header.max_bat_entries)
    if table is None:
        refuse(VhdDamagedError, "it could not be read whole")
        return
    image.bat = table[:needed]
    if bat_table.next_allocated(table, needed) < len(table):
        image.damage.append("the BAT holds blocks past the end of the disk")
    bat_end = header.bat_offset + -(-header.max_bat_entries * 4 // SECTOR_BYTES) * SECTOR_BYTES
    image.metadata.append((header.bat_offset, bat_end))
    for locator in header.locators:
        space = locator.space_bytes
        # Windows claims 64 KiB for a path of 34 bytes and keeps the room free; others put blocks behind the text.
        used = -(-min(space or 0, locator.data_length) // SECTOR_BYTES) * SECTOR_BYTES
        inside = locator.data_offset + used <= image.file_bytes
        if locator.platform != bytes(4) and 0 < used <= MAX_LOCATOR_BYTES and inside:
            image.metadata.append((locator.data_offset, locator.data_offset + used))
            claimed_end = locator.data_offset + min(space or 0, MAX_LOCATOR_BYTES)
            if claimed_end <= image.file_bytes:
                image.claimed_end = max(image.claimed_end, claimed_end)
    _find_batmap(image, bat_end)
    image.check_entries()


def _find_batmap(image: Image, bat_end: int) -> None:
    """XenServer keeps a batmap behind the BAT; we never use it, but must not put a block over it.

    Observed: cookie `tdbatmap`, then u64 offset, u32 size in sectors.
    """
    raw = os.pread(image.fd, 24, bat_end)
    if raw[:8] == _BATMAP_COOKIE and len(raw) == 24:
        offset, sectors = int.from_bytes(raw[8:16], "big"), int.from_bytes(raw[16:20], "big")
        image.metadata.append((bat_end, bat_end + SECTOR_BYTES))
        if offset + sectors * SECTOR_BYTES <= image.file_bytes:
            image.metadata.append((offset, offset + sectors * SECTOR_BYTES))


def _note_oddities(image: Image) -> None:
    footer = image.footer
    if not footer.has_reserved_feature:
        image.warnings.append("the reserved feature bit is clear")
    if footer.saved_state:
        image.warnings.append("the footer says that a saved state belongs to the disk")
    geometry = Geometry(footer.cylinders, footer.heads, footer.sectors_per_track)
    if geometry.size_bytes == 0:
        image.warnings.append("the geometry is zero")
    if image.has_tail and image.file_bytes - image.footer_offset == OLD_FOOTER_BYTES:
        image.warnings.append("the footer has 511 bytes, as Virtual PC wrote it before 2004")
    if image.header and image.header.max_bat_entries > len(image.bat):
        image.warnings.append(f"the BAT has {image.header.max_bat_entries - len(image.bat)} entries too many")
