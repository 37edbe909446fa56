"""OVA: a tar archive of an OVF description, perhaps a manifest of hashes, and disks, read where they lie.

Spec: DMTF DSP0243 (OVF 2.1), sections 5 "OVF package", 5.3 "Distribution as a single file", 7.1 "References", 9.1
"DiskSection"; POSIX.1 ustar, pax and GNU for the archive.

    Header (512 bytes): 0 100 name · 124 12 size (octal, or base 256 when the first bit is set) · 148 8 checksum
    · 156 1 type · 257 6 "ustar" · 345 155 prefix; the content follows, padded to 512.

Invariants: the OVF comes first; at most 1000 members, names and texts of bounded length, every member inside the file;
XML without entities (`defusedxml`); names are compared, never opened.
Not handled: OVFs whose disks are compressed or cut in chunks; certificates.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import InvalidError, NotFoundError
from mullion.base.units import MIB, format_size
from mullion.media.errors import ForeignDiskError, ForeignReferenceError, ForeignUnsupportedError
from mullion.media.headers import Source

MEMBER_LIMIT: Final = 1000
TEXT_LIMIT_BYTES: Final = 4 * MIB
"""How long an OVF or a manifest may be."""
_EXTENDED_LIMIT_BYTES: Final = 64 << 10
_HEADER_BYTES: Final = 512
_REGULAR: Final = (b"0", b"\0")
_MANIFEST_LINE: Final = re.compile(r"(SHA1|SHA256|SHA512) ?\((.+?)\) ?= ?([0-9a-fA-F]{40,128})")
_PIECE_BYTES: Final = 4 * MIB


@dataclass(frozen=True, slots=True)
class Member:
    """A file of the archive: where its content lies in the archive, in bytes."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class OvaDisk:
    """A disk of an OVA, numbered from 1 in the order of the OVF."""

    number: int
    name: str
    length: int
    """Bytes that it takes in the archive."""
    offset: int


@dataclass(frozen=True, slots=True)
class Package:
    """What an OVA consists of."""

    path: str
    ovf: Member
    disks: tuple[OvaDisk, ...]
    hashes: dict[str, tuple[str, str]]
    """Of each name in the manifest: algorithm and hexadecimal digest."""


def is_ova(fd: int) -> bool:
    """A tar archive whose first file is an OVF."""
    source = Source(fd, "", 0, os.fstat(fd).st_size)
    try:
        members = _members(source, limit=1)
    except ForeignDiskError:
        return False
    return bool(members) and members[0].name.lower().endswith(".ovf")


def list_ova(path: str) -> tuple[OvaDisk, ...]:
    """The disks of an OVA. Raises: ForeignDiskError, ForeignReferenceError; NotFoundError; OSError."""
    from mullion.vhd.image import open_file

    fd = open_file(path)
    try:
        return read_package(Source(fd, path, 0, os.fstat(fd).st_size)).disks
    finally:
        os.close(fd)


def choose(package: Package, disk: str | None) -> OvaDisk:
    """The disk of that number or name; without one, the only disk."""
    names = ", ".join(f"{found.number} {found.name} ({format_size(found.length)})" for found in package.disks)
    if disk is None:
        if len(package.disks) == 1:
            return package.disks[0]
        raise InvalidError(f"{package.path} holds several disks: {names}", remedy="Choose one: --disk 1, or the name.")
    for found in package.disks:
        if disk in (str(found.number), found.name):
            return found
    raise NotFoundError(f"{package.path} holds no disk {disk!r}, but {names}", remedy="Choose one of these.")


def read_package(source: Source) -> Package:
    """Read the table of an archive, its OVF and its manifest.

    Raises: ForeignDiskError, ForeignReferenceError, ForeignUnsupportedError.
    """
    members = _members(source, limit=MEMBER_LIMIT + 1)
    if not members or not members[0].name.lower().endswith(".ovf"):
        source.refuse("its first file is not an OVF", "tar header", 0)
    ovf = members[0]
    by_name = {member.name: member for member in members}
    if len(by_name) != len(members):
        source.refuse("two of its files have the same name", "tar header", 0)
    disks: list[OvaDisk] = []
    for href in _disk_files(source, ovf):
        member = by_name.get(href)
        if member is None:
            remedy = "A disk outside the archive is not read: convert that file itself."
            source.refuse_reference("its OVF names a disk that is not in the archive,", href, "OVF", ovf.offset, remedy)
        disks.append(OvaDisk(len(disks) + 1, member.name, member.length, member.offset))
    if not disks:
        source.refuse("it describes no disk", "OVF", ovf.offset)
    manifest = by_name.get(ovf.name[: -len("ovf")] + "mf")
    return Package(source.path, ovf, tuple(disks), _hashes(source, manifest) if manifest else {})


def _members(source: Source, limit: int) -> list[Member]:
    """The regular files of the archive, up to a number of them."""
    members: list[Member] = []
    at = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        if len(members) > MEMBER_LIMIT or at > source.length:
            source.refuse(f"more than {MEMBER_LIMIT} files, or past its end", "tar header", at, ForeignUnsupportedError)
        header = source.read(at, _HEADER_BYTES)
        if len(header) < _HEADER_BYTES or not any(header) or len(members) >= limit:
            return members
        _check_sum(source, header, at)
        kind = header[156:157]
        size = _number(source, header[124:136], at + 124)
        start = at + _HEADER_BYTES
        if kind in (b"x", b"L", b"g", b"K"):
            if size > _EXTENDED_LIMIT_BYTES:
                source.refuse(f"an extended header of {size} bytes", "tar header", at)
            content = source.read(start, size)
            if kind == b"L":
                long_name = content.rstrip(b"\0").decode(errors="replace")
            elif kind == b"x":
                name, length = _pax(content)
                long_name, long_size = name or long_name, length if length is not None else long_size
        else:
            size = long_size if long_size is not None else size
            if size > source.length - start:
                source.refuse(f"a file of {size} bytes reaches past the end of the archive", "tar header", at)
            if kind in _REGULAR:
                members.append(Member(long_name or _name(header), start, size))
            long_name = long_size = None
        at = start + -(-size // _HEADER_BYTES) * _HEADER_BYTES


def _check_sum(source: Source, header: bytes, at: int) -> None:
    blank = header[:148] + b" " * 8 + header[156:]
    if _number(source, header[148:156], at + 148) != sum(blank):
        source.refuse("the checksum is wrong", "tar header", at + 148)


def _number(source: Source, field: bytes, at: int) -> int:
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (len(field) * 8 - 1)) - 1)
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        source.refuse("a number is none", "tar header", at)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="replace").removeprefix("./")


def _pax(content: bytes) -> tuple[str | None, int | None]:
    """Name and size in a pax header: lines of `LENGTH KEY=VALUE\\n`."""
    name, size = None, None
    for line in content.split(b"\n"):
        key, _, value = line.partition(b" ")[2].partition(b"=")
        if key == b"path":
            name = value.decode(errors="replace")
        elif key == b"size" and value.isdigit() and len(value) < 20:
            size = int(value)
    return name, size


def _disk_files(source: Source, ovf: Member) -> list[str]:
    """The files of the disks that an OVF describes, in its order."""
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, fromstring

    if ovf.length > TEXT_LIMIT_BYTES:
        source.refuse(f"it has {ovf.length} bytes", "OVF", ovf.offset, ForeignUnsupportedError)
    try:
        root = fromstring(_text(source, ovf), forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError) as error:
        source.refuse(f"it is not XML that can be read: {error}", "OVF", ovf.offset)
    files: dict[str, dict[str, str]] = {}
    wanted: list[str] = []
    for element in root.iter():
        kind = str(element.tag).rpartition("}")[2]
        fields = {str(name).rpartition("}")[2]: str(value) for name, value in element.attrib.items()}
        if kind == "File":
            files[fields.get("id", "")] = fields
        elif kind == "Disk" and "fileRef" in fields:
            if fields.get("parentRef"):
                source.refuse("a disk has a parent in the package", "OVF", ovf.offset, ForeignReferenceError)
            wanted.append(fields["fileRef"])
    names: list[str] = []
    for reference in wanted:
        fields = files.get(reference, {})
        if fields.get("compression", "identity") not in ("", "identity") or "chunkSize" in fields:
            source.refuse("a disk is compressed or in chunks", "OVF", ovf.offset, ForeignUnsupportedError)
        if fields.get("href") and fields["href"] not in names:
            names.append(fields["href"])
    return names


def _text(source: Source, member: Member) -> bytes:
    return b"".join(
        source.read(member.offset + at, min(MIB, member.length - at)) for at in range(0, member.length, MIB)
    )


def _hashes(source: Source, manifest: Member) -> dict[str, tuple[str, str]]:
    if manifest.length > TEXT_LIMIT_BYTES:
        source.refuse(f"it has {manifest.length} bytes", "manifest", manifest.offset, ForeignUnsupportedError)
    found: dict[str, tuple[str, str]] = {}
    for line in _text(source, manifest).decode(errors="replace").splitlines():
        match = _MANIFEST_LINE.fullmatch(line.strip())
        if match is not None:
            found[match[2]] = (match[1].lower(), match[3].lower())
        elif line.strip():
            source.refuse("a line is none of a manifest", "manifest", manifest.offset)
    return found


def verify(source: Source, package: Package, disk: OvaDisk) -> None:
    """Compare OVF and disk with the hashes in the manifest, where there is one; the disk is read once for that.

    Raises: ForeignDiskError.
    """
    for name, offset, length in (
        (package.ovf.name, package.ovf.offset, package.ovf.length),
        (disk.name, disk.offset, disk.length),
    ):
        if not package.hashes:
            return
        if name not in package.hashes:
            source.refuse(f"it has no hash of {name}", "manifest", 0)
        algorithm, expected = package.hashes[name]
        digest = hashlib.new(algorithm)
        buffer = memoryview(bytearray(min(_PIECE_BYTES, max(length, 1))))
        at, end = source.offset + offset, source.offset + offset + length
        while at < end:
            count = os.preadv(source.fd, (buffer[: end - at],), at)
            if count == 0:
                source.refuse("the file ends inside it", name, offset)
            digest.update(buffer[:count])
            at += count
        if digest.hexdigest() != expected:
            remedy = "The package was damaged or changed on its way: fetch it again."
            source.refuse(f"{name} is not what the manifest says ({algorithm})", "manifest", offset, remedy=remedy)
