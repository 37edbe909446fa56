"""By which bytes the kinds of disk files are told apart.

One table for everybody: the engine names what a file is that is no VHD, `mullion.media` chooses what reads it. Names of
files mean nothing here. The marks are those of each format's own specification; offsets in bytes.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Mark(NamedTuple):
    """Bytes at an offset, the format that has them there, and what a person calls such a file."""

    magic: bytes
    offset: int
    format: str
    title: str


MARKS: Final = (
    Mark(b"vhdxfile", 0, "vhdx", "a VHDX"),
    Mark(b"QFI\xfb\0\0\0\x01", 0, "qcow", "a QCOW image of version 1"),
    Mark(b"QFI\xfb", 0, "qcow2", "a QCOW2 image"),
    Mark(b"QED\0", 0, "qed", "a QED image"),
    Mark(b"KDMV", 0, "vmdk", "a VMDK"),
    Mark(b"COWD", 0, "vmdk", "a VMDK of ESX"),
    Mark(b"# Disk DescriptorFile", 0, "vmdk", "a VMDK descriptor"),
    Mark(b"\x7f\x10\xda\xbe", 0x40, "vdi", "a VDI"),
    Mark(b"WithoutFreeSpace", 0, "parallels", "a Parallels disk"),
    Mark(b"WithouFreSpacExt", 0, "parallels", "a Parallels disk"),
    Mark(b"\x1f\x8b\x08", 0, "gzip", "compressed with gzip"),
    Mark(b"BZh", 0, "bzip2", "compressed with bzip2"),
    Mark(b"\xfd7zXZ\0", 0, "xz", "compressed with xz"),
    Mark(b"\x28\xb5\x2f\xfd", 0, "zstd", "compressed with zstd"),
    Mark(b"PK\x03\x04", 0, "zip", "a ZIP archive"),
    Mark(b"7z\xbc\xaf\x27\x1c", 0, "7z", "a 7-Zip archive"),
    Mark(b"MSWIM\0\0\0", 0, "wim", "a WIM archive"),
    Mark(b"\x7fELF", 0, "program", "a program"),
    Mark(b"ustar", 257, "tar", "a tar archive"),
)

HEAD_BYTES: Final = 512
"""As much of a file's start as `identify` looks at."""


def identify(head: bytes) -> Mark | None:
    """The first mark that the start of a file bears; None means a VHD, a raw disk or something unknown."""
    return next((mark for mark in MARKS if head[mark.offset :].startswith(mark.magic)), None)
