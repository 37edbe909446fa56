"""What the headers of foreign disks say, as far as it must be known before another program opens them.

Above all whether a disk names other files: backing file (QCOW, QED), data file (QCOW2), parent (VHDX, VDI, VMDK).
Such a name is never followed: a hostile file could name any file of the host. The program that reads the disk is
confined too (`jail`), so that a header which changes after this look leads nowhere either.

Spec: qemu docs/interop/qcow2.txt and qed_spec.txt; Microsoft [MS-VHDX] 2.2 and 2.6; VMware "Virtual Disk Format 5.0";
VirtualBox `VDICore.h`. Integers of QCOW are big-endian, all others little-endian.

Invariants: nothing is read beyond `_LIMIT_BYTES` in one piece, whatever a number in the file says.
"""

from __future__ import annotations

import os
import struct
import uuid
from dataclasses import dataclass
from typing import Final, NoReturn

from mullion.media.errors import ForeignDiskError, ForeignReferenceError, ForeignUnsupportedError

_LIMIT_BYTES: Final = 1 << 20
_SHOWN_CHARS: Final = 200

_QCOW2_INCOMPATIBLE: Final = {0: "dirty", 1: "corrupt", 2: "external data file", 3: "compression", 4: "extended L2"}
_QCOW2_DATA_FILE_BIT: Final = 2
_QCOW2_COMPRESSION_BIT: Final = 3

_VHDX_HEADERS: Final = (64 << 10, 128 << 10)
_VHDX_REGIONS: Final = (192 << 10, 256 << 10)
_VHDX_METADATA: Final = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
_VHDX_FILE_PARAMETERS: Final = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
_VHDX_PARENT_LOCATOR: Final = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
_VHDX_HAS_PARENT: Final = 2
_VHDX_MERGE: Final = (
    "QEMU cannot read a VHDX together with its parent. Merge the chain where it was made: `Merge-VHD`, or "
    "`Convert-VHD CHILD WHOLE.vhdx`, in PowerShell on Hyper-V."
)


@dataclass(frozen=True, slots=True)
class Source:
    """An open foreign disk: the part of the file that is the disk image, and what messages call it."""

    fd: int
    path: str
    offset: int
    length: int

    def read(self, at: int, count: int) -> bytes:
        """Bytes of the image, fewer where it ends. Offsets come from the file: nothing is believed."""
        count = min(count, _LIMIT_BYTES, self.length - at)
        return os.pread(self.fd, count, self.offset + at) if 0 <= at < self.length and count > 0 else b""

    def refuse(
        self,
        what: str,
        structure: str,
        at: int,
        kind: type[ForeignDiskError] = ForeignDiskError,
        remedy: str | None = None,
    ) -> NoReturn:
        """Raise the error that names file, structure and offset."""
        message = f"{self.path}: {structure} at byte {at}: {what}"
        raise kind(message, path=self.path, structure=structure, offset=at, remedy=remedy)

    def refuse_reference(self, what: str, name: str, structure: str, at: int, remedy: str | None = None) -> NoReturn:
        """Name what the disk names, harmless for a terminal."""
        shown = "".join(char if char.isprintable() else "?" for char in name[:_SHOWN_CHARS])
        self.refuse(f"{what} {shown!r}, which is not followed", structure, at, ForeignReferenceError, remedy)


def check_header(source: Source, kind: str) -> None:
    """Refuse a disk that names another file, or is encrypted.

    Raises: ForeignReferenceError, ForeignUnsupportedError, ForeignDiskError.
    """
    match kind:
        case "qcow":
            _check_qcow(source)
        case "qcow2":
            _check_qcow2(source)
        case "qed":
            _check_qed(source)
        case "vdi":
            _check_vdi(source)
        case "vhdx":
            _check_vhdx(source)


def _fields(source: Source, layout: str, at: int, structure: str) -> tuple[int, ...]:
    raw = source.read(at, struct.calcsize(layout))
    if len(raw) != struct.calcsize(layout):
        source.refuse("the file ends inside it", structure, at)
    return struct.unpack(layout, raw)


def _check_qcow(source: Source) -> None:
    backing_offset, backing_bytes = _fields(source, ">QI", 8, "QCOW header")
    (encryption,) = _fields(source, ">I", 36, "QCOW header")
    _refuse_backing(source, backing_offset, backing_bytes, "QCOW header", 8)
    if encryption:
        source.refuse("it is encrypted", "QCOW header", 36, ForeignUnsupportedError)


def _check_qcow2(source: Source) -> None:
    version, backing_offset, backing_bytes = _fields(source, ">IQI", 4, "QCOW2 header")
    (encryption,) = _fields(source, ">I", 32, "QCOW2 header")
    if version not in (2, 3):
        source.refuse(f"version {version} is unknown", "QCOW2 header", 4, ForeignUnsupportedError)
    if encryption:
        remedy = "Decrypt it with qemu-img, where the key is."
        source.refuse("it is encrypted", "QCOW2 header", 32, ForeignUnsupportedError, remedy)
    (incompatible,) = _fields(source, ">Q", 72, "QCOW2 header") if version == 3 else (0,)
    if incompatible >> _QCOW2_DATA_FILE_BIT & 1:
        source.refuse_reference("it keeps its data in another file,", _data_file(source), "QCOW2 header", 72)
    _refuse_backing(source, backing_offset, backing_bytes, "QCOW2 header", 8)
    unknown = incompatible & ~sum(1 << bit for bit in _QCOW2_INCOMPATIBLE)
    if unknown:
        source.refuse(f"unknown features {unknown:#x}", "QCOW2 header", 72, ForeignUnsupportedError)


def _data_file(source: Source) -> str:
    """The name in the header extension "external data file name", for the message."""
    (at,) = _fields(source, ">I", 100, "QCOW2 header")
    for _ in range(32):
        kind, length = _fields(source, ">II", at, "QCOW2 header extension")
        if kind == 0:
            break
        if kind == 0x44415441:
            return source.read(at + 8, min(length, 1024)).decode(errors="replace")
        at += 8 + -(-length // 8) * 8
    return "of an unknown name"


def _refuse_backing(source: Source, offset: int, length: int, structure: str, at: int) -> None:
    if offset or length:
        name = source.read(offset, min(length, 1024)).decode(errors="replace")
        remedy = "Make one file of it where its backing file is: `qemu-img convert -O qcow2 IMAGE WHOLE`."
        source.refuse_reference("it has a backing file,", name, structure, at, remedy)


def _check_qed(source: Source) -> None:
    (features,) = _fields(source, "<Q", 16, "QED header")
    if features & 1:
        offset, length = _fields(source, "<II", 56, "QED header")
        _refuse_backing(source, offset, max(length, 1), "QED header", 56)


def _check_vdi(source: Source) -> None:
    (kind,) = _fields(source, "<I", 0x4C, "VDI header")
    if kind not in (1, 2):
        what = {3: "an undo disk", 4: "a differencing disk"}.get(kind, f"of the unknown type {kind}")
        remedy = "Make one disk of the chain where it was made: `VBoxManage clonemedium CHILD WHOLE.vdi`."
        source.refuse(f"it is {what}, which needs its parent", "VDI header", 0x4C, ForeignReferenceError, remedy)


def vhdx_has_log(source: Source) -> bool:
    """Does either header, valid or not, name a log? Then it may hold what must be replayed."""
    for at in _VHDX_HEADERS:
        raw = source.read(at, 64)
        if raw[:4] == b"head" and any(raw[48:64]):
            return True
    return False


def _check_vhdx(source: Source) -> None:
    """Find the file parameters by way of region table and metadata table; both copies of the region table count."""
    for table_at in _VHDX_REGIONS:
        if source.read(table_at, 4) != b"regi":
            continue
        (count,) = _fields(source, "<I", table_at + 8, "VHDX region table")
        for index in range(min(count, 2047)):
            at = table_at + 16 + 32 * index
            raw = source.read(at, 28)
            if raw[:16] == _VHDX_METADATA:
                _check_vhdx_metadata(source, struct.unpack_from("<Q", raw, 16)[0])


def _check_vhdx_metadata(source: Source, start: int) -> None:
    raw = source.read(start, 64 << 10)
    if raw[:8] != b"metadata":
        source.refuse("it has no metadata table", "VHDX metadata", start)
    items: dict[bytes, tuple[int, int]] = {}
    for index in range(min(struct.unpack_from("<H", raw, 10)[0], 2047)):
        entry = raw[32 + 32 * index :][:32]
        if len(entry) == 32:
            offset, length = struct.unpack_from("<II", entry, 16)
            items[entry[:16]] = (start + offset, length)
    if _VHDX_FILE_PARAMETERS not in items:
        source.refuse("it has no file parameters", "VHDX metadata", start)
    at, _ = items[_VHDX_FILE_PARAMETERS]
    (flags,) = _fields(source, "<I", at + 4, "VHDX file parameters")
    if flags & _VHDX_HAS_PARENT:
        name = _vhdx_parent(source, *items.get(_VHDX_PARENT_LOCATOR, (0, 0)))
        source.refuse_reference(
            "it is a differencing disk, its parent is", name, "VHDX file parameters", at, _VHDX_MERGE
        )


def _vhdx_parent(source: Source, at: int, length: int) -> str:
    """The parent's name in a parent locator, for the message."""
    raw = source.read(at, min(length, 64 << 10))
    if len(raw) < 20:
        return "of an unknown name"
    names: dict[str, str] = {}
    for index in range(min(struct.unpack_from("<H", raw, 18)[0], 16)):
        entry = raw[20 + 12 * index :][:12]
        if len(entry) == 12:
            key_at, value_at, key_bytes, value_bytes = struct.unpack("<IIHH", entry)
            key = raw[key_at : key_at + key_bytes].decode("utf-16-le", "replace")
            names[key] = raw[value_at : value_at + value_bytes].decode("utf-16-le", "replace")
    for key in ("absolute_win32_path", "relative_path", "volume_path"):
        if names.get(key):
            return names[key]
    return "of an unknown name"
