"""VMDK as far as we read it ourselves: the descriptor, which names the files that hold the data.

Spec: VMware "Virtual Disk Format 5.0", sections "The Descriptor File" and "Hosted Sparse Extents".

    # Disk DescriptorFile
    parentCID=ffffffff                       anything else: a differencing disk
    createType="monolithicFlat"
    RW 2097152 FLAT "disk-flat.vmdk" 0       access, sectors, type, file and the first sector in it
    RW 2048 ZERO

    Sparse extent: 0 4 "KDMV" · 4 4 version · 8 4 flags · 12 8 capacity · 20 8 grain · 28 8 descriptor at, 36 8 its
    length (sectors) · 44 4 entries · 48 8, 56 8 directories (all ones: a footer at the end has them) · 64 8 overhead

Invariants: an extent is a file in the descriptor's own folder, a regular one and no symbolic link, or the disk is
refused; descriptors are at most 1 MiB, extents at most 1024. What is given to another program is one sparse extent,
which it reads by itself: no descriptor.
Not handled: descriptors of sparse extents (split disks that grow): QEMU reads none without its descriptor.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

from mullion.base.units import SECTOR_BYTES
from mullion.media.errors import ForeignReferenceError, ForeignUnsupportedError
from mullion.media.headers import Source

DESCRIPTOR_LIMIT_BYTES: Final = 1 << 20
EXTENT_LIMIT: Final = 1024
FLAT_TYPES: Final = ("FLAT", "VMFS")

_EXTENT: Final = re.compile(r'\s*(RW|RDONLY|NOACCESS)\s+(\d{1,15})\s+([A-Z]+)(?:\s+"([^"]*)"(?:\s+(\d{1,15}))?)?\s*')
_SETTING: Final = re.compile(r'\s*(\w+)\s*=\s*"?([^"]*?)"?\s*')
_DESCRIPTOR_MAGIC: Final = b"# Disk DescriptorFile"
_AT_END: Final = (1 << 64) - 1
_NO_PARENT: Final = "ffffffff"
_MERGE: Final = "Make one disk of the chain where it was made: `vmware-vdiskmanager -r CHILD.vmdk -t 0 WHOLE.vmdk`."


@dataclass(frozen=True, slots=True)
class VmdkExtent:
    """So many bytes of the disk: of a file from an offset on, or zeros when there is no file."""

    length: int
    kind: str
    file_name: str | None
    offset: int


def is_descriptor(source: Source) -> bool:
    """Is this the text that names the files of a disk, not one of them?"""
    return source.read(0, len(_DESCRIPTOR_MAGIC)) == _DESCRIPTOR_MAGIC


def read_descriptor(source: Source) -> list[VmdkExtent]:
    """The extents that a descriptor file names. Raises: ForeignReferenceError, ForeignUnsupportedError."""
    if source.length > DESCRIPTOR_LIMIT_BYTES:
        source.refuse(f"it has {source.length} bytes", "VMDK descriptor", 0, ForeignUnsupportedError)
    text = source.read(0, DESCRIPTOR_LIMIT_BYTES).decode("utf-8", "replace")
    _refuse_parent(source, text, 0)
    extents: list[VmdkExtent] = []
    at = 0
    for line in text.splitlines(keepends=True):
        match = _EXTENT.fullmatch(line)
        if match is not None:
            extents.append(_extent(source, match, at))
        at += len(line.encode())
        if len(extents) > EXTENT_LIMIT:
            source.refuse(f"it names more than {EXTENT_LIMIT} extents", "VMDK descriptor", at, ForeignUnsupportedError)
    if not extents:
        source.refuse("it names no extents", "VMDK descriptor", 0)
    return extents


def _extent(source: Source, match: re.Match[str], at: int) -> VmdkExtent:
    access, sectors, kind, name, start = match.groups()
    length = int(sectors) * SECTOR_BYTES
    if kind == "ZERO":
        return VmdkExtent(length, kind, None, 0)
    if access == "NOACCESS" or kind not in FLAT_TYPES or name is None:
        remedy = "If you trust the descriptor: `qemu-img convert -f vmdk -O raw DESCRIPTOR WHOLE.img`."
        source.refuse(f"an extent of type {kind} ({access})", "VMDK descriptor", at, ForeignUnsupportedError, remedy)
    if "/" in name or "\\" in name or name in ("", ".", "..") or not name.isprintable():
        remedy = "Put the extents beside the descriptor and correct their names in it, if you trust it."
        source.refuse_reference("an extent lies in another folder,", name, "VMDK descriptor", at, remedy)
    return VmdkExtent(length, kind, name, int(start or 0) * SECTOR_BYTES)


def _refuse_parent(source: Source, text: str, at: int) -> None:
    settings = {match[1].lower(): match[2] for line in text.splitlines() if (match := _SETTING.fullmatch(line))}
    if settings.get("parentcid", _NO_PARENT).lower() != _NO_PARENT or settings.get("parentfilenamehint"):
        name = settings.get("parentfilenamehint") or "of an unknown name"
        source.refuse_reference("it is a differencing disk, its parent is", name, "VMDK descriptor", at, _MERGE)


def check_sparse(source: Source) -> None:
    """Refuse a sparse extent that is really a descriptor in disguise, or has a parent.

    Raises: ForeignReferenceError, ForeignUnsupportedError, ForeignDiskError.
    """
    if source.read(0, 4) == b"COWD":
        return
    heads = [0]
    (directory_sector,) = struct.unpack("<Q", source.read(56, 8).ljust(8, b"\0"))
    if directory_sector == _AT_END:
        heads.append(source.length - 2 * SECTOR_BYTES)
    for at in heads:
        raw = source.read(at, SECTOR_BYTES)
        if raw[:4] != b"KDMV" or len(raw) != SECTOR_BYTES:
            source.refuse("there is no header", "VMDK header", at)
        capacity, _, descriptor_sector, descriptor_sectors = struct.unpack_from("<QQQQ", raw, 12)
        if capacity == 0:
            # QEMU takes the embedded descriptor for one with extents in other files.
            source.refuse("its capacity is zero", "VMDK header", at + 12, ForeignReferenceError)
        if descriptor_sector:
            start, length = descriptor_sector * SECTOR_BYTES, descriptor_sectors * SECTOR_BYTES
            if length > DESCRIPTOR_LIMIT_BYTES or start + length > source.length:
                source.refuse("its descriptor is too long or outside the file", "VMDK header", at + 28)
            text = source.read(start, length).partition(b"\0")[0].decode("utf-8", "replace")
            _refuse_parent(source, text, start)
