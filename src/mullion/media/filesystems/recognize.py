"""What a volume holds, by its magic numbers: what can be read here, and what can only be said by name.

Sources: each system's own headers, as in libblkid's list; offsets in bytes from the start of the volume. Integers are
little-endian. Nothing is read beyond the volume's first 256 KiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mullion.base.block import BlockDevice

_HEAD_BYTES: Final = 256 << 10
_MOUNT: Final = "Show the disk to the system with `mullion vhd mount` and mount it there"

_READABLE: Final = (
    (3, b"NTFS    ", "ntfs", "NTFS"),
    (3, b"EXFAT   ", "exfat", "exFAT"),
    (82, b"FAT32   ", "fat", "FAT32"),
    (54, b"FAT16   ", "fat", "FAT16"),
    (54, b"FAT12   ", "fat", "FAT12"),
    (54, b"FAT     ", "fat", "FAT"),
    (32769, b"CD001", "iso", "ISO 9660"),
)
_NAMED: Final = (
    (3, b"-FVE-FS-", "BitLocker", "Decrypt it in Windows, or with `cryptsetup open --type bitlk` and its key"),
    (3, b"ReFS\0\0\0\0", "ReFS", "Attach the disk to Windows, which alone reads ReFS"),
    (0, b"XFSB", "XFS", _MOUNT),
    (0x10040, b"_BHRfS_M", "btrfs", _MOUNT),
    (
        0,
        b"LUKS\xba\xbe",
        "LUKS",
        "Show the disk with `mullion vhd mount` and open it with `cryptsetup open` and its key",
    ),
    (4086, b"SWAPSPACE2", "swap space", "There are no files in it"),
    (65526, b"SWAPSPACE2", "swap space", "There are no files in it"),
    (1024, b"H+", "HFS+", _MOUNT),
    (1024, b"HX", "HFS+", _MOUNT),
    (32, b"NXSB", "APFS", "Attach the disk to macOS"),
    (0, b"hsqs", "squashfs", _MOUNT),
    (1024, b"\x10\x20\xf5\xf2", "F2FS", _MOUNT),
    (4096, b"\xfc\x4e\x2b\xa9", "Linux RAID", "Show the disk with `mullion vhd mount` and assemble it with `mdadm`"),
)
_LVM: Final = "Show the disk with `mullion vhd mount`, then activate the volume group with `vgchange -ay`"
_EXT_MAGIC_AT: Final = 1080
_EXT_READABLE: Final = 0x2 | 0x4 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000
"""filetype, recover, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed: the incompatible features that are read."""
_EXT_NAMES: Final = {
    0x1: "compression",
    0x8: "journal_dev",
    0x10: "meta_bg",
    0x4000: "large_dir",
    0x8000: "inline_data",
    0x10000: "encrypt",
    0x20000: "casefold",
}


@dataclass(frozen=True, slots=True)
class Recognised:
    """What a volume holds."""

    title: str
    """As people call it: `NTFS`, `ext4`, `LUKS`, `nothing that is known`."""
    kind: str | None = None
    """What reads it here: ntfs, exfat, fat, ext or iso; None when nothing does."""
    label: str = ""
    remedy: str = ""
    """What to do where it cannot be read."""


def recognize(device: BlockDevice, offset: int, length: int) -> Recognised:
    """What the volume at these bytes of a disk holds. Raises: what reading the device raises."""
    head = bytearray(max(0, min(length, _HEAD_BYTES, device.size_bytes - offset)))
    device.pread(offset, head)
    for at, magic, title, remedy in _NAMED:
        if head[at:].startswith(magic):
            return Recognised(title, remedy=f"{remedy}.")
    for sector in range(4):
        if head[512 * sector :].startswith(b"LABELONE") and head[512 * sector + 24 :].startswith(b"LVM2 001"):
            return Recognised("an LVM physical volume", remedy=f"{_LVM}.")
    if _is_zfs(head):
        return Recognised("ZFS", remedy="Show the disk with `mullion vhd mount`, then import the pool with `zpool`.")
    if head[_EXT_MAGIC_AT : _EXT_MAGIC_AT + 2] == b"\x53\xef":
        return _ext(head)
    for at, magic, kind, title in _READABLE:
        if head[at:].startswith(magic) and (kind == "iso" or head[510:512] == b"\x55\xaa"):
            return Recognised(title, kind, _label(head, kind, title))
    if not any(head):
        return Recognised("nothing (zeros)", remedy="There are no files in it.")
    return Recognised("nothing that is known", remedy=f"{_MOUNT}, if the system knows it.")


def _is_zfs(head: bytearray) -> bool:
    """An uberblock in the first label, in either byte order."""
    marks = (b"\x0c\xb1\xba\0\0\0\0\0", b"\0\0\0\0\0\xba\xb1\x0c")
    return any(head[at : at + 8] in marks for at in range(128 << 10, len(head), 1024))


def _ext(head: bytearray) -> Recognised:
    compatible = int.from_bytes(head[1024 + 92 : 1024 + 96], "little")
    incompatible = int.from_bytes(head[1024 + 96 : 1024 + 100], "little")
    title = "ext4" if incompatible & 0x2C0 else "ext3" if compatible & 0x4 else "ext2"
    label = _clean(head[1024 + 120 : 1024 + 136].partition(b"\0")[0].decode("utf-8", "replace"))
    unknown = incompatible & ~_EXT_READABLE
    if unknown:
        names = ", ".join(name for bit, name in _EXT_NAMES.items() if unknown & bit) or f"{unknown:#x}"
        return Recognised(f"{title} with {names}", label=label, remedy=f"{_MOUNT}.")
    return Recognised(title, "ext", label)


def _label(head: bytearray, kind: str, title: str) -> str:
    if kind == "fat":
        at = 71 if title == "FAT32" else 43
        text = head[at : at + 11].decode("latin-1")
        return "" if text.startswith("NO NAME") else _clean(text)
    return _clean(head[32768 + 40 : 32768 + 72].decode("latin-1")) if kind == "iso" else ""


def _clean(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text.rstrip("\0 "))
