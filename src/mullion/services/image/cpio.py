"""Writes a cpio archive as the Linux kernel reads it for its initramfs.

Spec: Linux Documentation/driver-api/early-userspace/buffer-format.rst ("newc").

Member: header of 110 ASCII characters, name with a terminating zero, zeros up to a multiple of 4, content, zeros up to
a multiple of 4. The header is the magic `070701` and 13 fields of 8 hexadecimal digits:
  ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
The archive ends with a member named `TRAILER!!!`.

Invariants: the same tree gives the same bytes (members in path order, times 0, inode numbers counted); a folder comes
before what is in it; everything belongs to root.
Not handled: hard links, names or files beyond 4 GiB.
"""

from __future__ import annotations

from mullion.services.image.tree import Entry, Kind, Tree

_MAGIC = "070701"
_MODES = {Kind.FOLDER: 0o040000, Kind.FILE: 0o100000, Kind.LINK: 0o120000, Kind.CHARACTER: 0o020000}


def pack_cpio(tree: Tree) -> bytes:
    """The archive of a tree."""
    archive = bytearray()
    number = 0
    for number, (path, entry) in enumerate(sorted(tree.items()), start=1):
        _add(archive, number, path, entry)
    _add(archive, number + 1, "TRAILER!!!", None)
    return bytes(archive)


def _add(archive: bytearray, number: int, path: str, entry: Entry | None) -> None:
    name = path.encode() + b"\0"
    mode = 0 if entry is None else _MODES[entry.kind] | entry.mode
    content = b"" if entry is None else entry.content
    links = 2 if entry is not None and entry.kind is Kind.FOLDER else 1
    major, minor = (0, 0) if entry is None else entry.device
    fields = (number, mode, 0, 0, links, 0, len(content), 0, 0, major, minor, len(name), 0)
    archive += (_MAGIC + "".join(f"{value:08X}" for value in fields)).encode()
    archive += name
    archive += bytes(-len(archive) % 4)
    archive += content
    archive += bytes(-len(archive) % 4)
