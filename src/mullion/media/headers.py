"""What the headers of foreign disks say, as far as it must be known before another program opens them.

Above all whether a disk names other files: backing file (QCOW, QED), data file (QCOW2), parent (VDI; `vhdx` and `vmdk`
have theirs).
Such a name is never followed: a hostile file could name any file of the host. The program that reads the disk is
confined too (`jail`), so that a header which changes after this look leads nowhere either.

Spec: qemu docs/interop/qcow2.txt and qed_spec.txt; VirtualBox `VDICore.h`. Integers of QCOW are big-endian, all others
little-endian.

Invariants: nothing is read beyond `_LIMIT_BYTES` in one piece, whatever a number in the file says.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Final, NoReturn

from mullion.media.errors import ForeignDiskError, ForeignReferenceError, ForeignUnsupportedError

_LIMIT_BYTES: Final = 1 << 20
_SHOWN_CHARS: Final = 200

_QCOW2_INCOMPATIBLE: Final = {0: "dirty", 1: "corrupt", 2: "external data file", 3: "compression", 4: "extended L2"}
_QCOW2_DATA_FILE_BIT: Final = 2


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

    def fields(self, layout: str, at: int, structure: str) -> tuple[int, ...]:
        """The numbers at an offset. Raises: ForeignDiskError when they are not all in the file."""
        raw = self.read(at, struct.calcsize(layout))
        if len(raw) != struct.calcsize(layout):
            self.refuse("the file ends inside it", structure, at)
        return struct.unpack(layout, raw)

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


def _check_qcow(source: Source) -> None:
    backing_offset, backing_bytes = source.fields(">QI", 8, "QCOW header")
    (encryption,) = source.fields(">I", 36, "QCOW header")
    _refuse_backing(source, backing_offset, backing_bytes, "QCOW header", 8)
    if encryption:
        source.refuse("it is encrypted", "QCOW header", 36, ForeignUnsupportedError)


def _check_qcow2(source: Source) -> None:
    version, backing_offset, backing_bytes = source.fields(">IQI", 4, "QCOW2 header")
    (encryption,) = source.fields(">I", 32, "QCOW2 header")
    if version not in (2, 3):
        source.refuse(f"version {version} is unknown", "QCOW2 header", 4, ForeignUnsupportedError)
    if encryption:
        remedy = "Decrypt it with qemu-img, where the key is."
        source.refuse("it is encrypted", "QCOW2 header", 32, ForeignUnsupportedError, remedy)
    (incompatible,) = source.fields(">Q", 72, "QCOW2 header") if version == 3 else (0,)
    if incompatible >> _QCOW2_DATA_FILE_BIT & 1:
        source.refuse_reference("it keeps its data in another file,", _data_file(source), "QCOW2 header", 72)
    _refuse_backing(source, backing_offset, backing_bytes, "QCOW2 header", 8)
    unknown = incompatible & ~sum(1 << bit for bit in _QCOW2_INCOMPATIBLE)
    if unknown:
        source.refuse(f"unknown features {unknown:#x}", "QCOW2 header", 72, ForeignUnsupportedError)


def _data_file(source: Source) -> str:
    """The name in the header extension "external data file name", for the message."""
    (at,) = source.fields(">I", 100, "QCOW2 header")
    for _ in range(32):
        kind, length = source.fields(">II", at, "QCOW2 header extension")
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
    (features,) = source.fields("<Q", 16, "QED header")
    if features & 1:
        offset, length = source.fields("<II", 56, "QED header")
        _refuse_backing(source, offset, max(length, 1), "QED header", 56)


def _check_vdi(source: Source) -> None:
    (kind,) = source.fields("<I", 0x4C, "VDI header")
    if kind not in (1, 2):
        what = {3: "an undo disk", 4: "a differencing disk"}.get(kind, f"of the unknown type {kind}")
        remedy = "Make one disk of the chain where it was made: `VBoxManage clonemedium CHILD WHOLE.vdi`."
        source.refuse(f"it is {what}, which needs its parent", "VDI header", 0x4C, ForeignReferenceError, remedy)
