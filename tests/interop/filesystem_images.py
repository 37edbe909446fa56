"""Filesystems with files in them, made on the spot without mounting anything."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from mullion.base.block import BlockDevice
from mullion.media.windows import FileWindow
from mullion.vhd.image import open_file

SECTOR = 512


def call(*argv: str | Path, **options: object) -> None:
    subprocess.run([str(word) for word in argv], check=True, capture_output=True, timeout=60, **options)  # type: ignore[call-overload]


def device_of(path: Path) -> BlockDevice:
    return FileWindow(open_file(str(path)), str(path))


def make_ext(path: Path, tree: Path, kind: str = "ext4", size: str = "40M", *options: str) -> Path:
    call("mke2fs", "-q", "-F", "-t", kind, *options, "-d", tree, path, size)
    return path


def make_fat(path: Path, tree: Path, bits: int = 16, size: str = "40M") -> Path:
    with path.open("wb") as file:
        file.truncate({"4M": 4, "40M": 40, "80M": 80}[size] << 20)
    call("mkfs.vfat", "-F", str(bits), "-n", "VOLUMEX", path)
    call("mcopy", "-s", "-m", "-i", path, *sorted(tree.iterdir()), "::")
    return path


def make_iso(path: Path, tree: Path) -> Path:
    call("genisoimage", "-quiet", "-R", "-J", "-V", "CDLABEL", "-o", path, tree)
    return path


def make_exfat(path: Path, name: str, content: bytes, *, valid_bytes: int | None = None) -> Path:
    """One file in an exFAT of 4 MiB: clusters of 4 KiB; 2 bitmap, 3 up-case table, 4 root, 5 and on the file.

    With `valid_bytes` only so many of them were ever written: what lies behind is not the file's content.
    Spec: Microsoft, exFAT file system specification.
    """
    cluster, heap_sector, fat_sector, size = 4096, 64, 24, 4 << 20
    clusters = (size - heap_sector * SECTOR) // cluster
    valid = len(content) if valid_bytes is None else valid_bytes
    used = 3 + -(-len(content) // cluster)
    image = bytearray(size)
    boot = struct.pack(
        "<3s8s53xQQIIIIIIHHBBBBB7x", b"\xeb\x76\x90", b"EXFAT   ", 0, size // SECTOR, fat_sector, 32, heap_sector,
        clusters, 4, 0x12345678, 0x100, 0, 9, 3, 1, 0x80, 0,
    )  # fmt: skip
    image[: len(boot)] = boot
    image[510:512] = b"\x55\xaa"
    fat = [0xFFFFFFF8, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF]
    fat += [*range(6, 2 + used), 0xFFFFFFFF]
    struct.pack_into(f"<{len(fat)}I", image, fat_sector * SECTOR, *fat)

    def at(number: int) -> int:
        return heap_sector * SECTOR + (number - 2) * cluster

    bitmap = ((1 << used) - 1).to_bytes(-(-clusters // 8), "little")
    image[at(2) : at(2) + len(bitmap)] = bitmap
    upcase = b"".join(struct.pack("<H", ord(chr(code).upper()) if code < 128 else code) for code in range(128))
    image[at(3) : at(3) + len(upcase)] = upcase
    checksum = 0
    for byte in upcase:
        checksum = ((checksum << 31 | checksum >> 1) + byte) & 0xFFFFFFFF
    root = struct.pack("<BB22s8x", 0x83, 6, "DISK01".encode("utf-16-le"))
    root += struct.pack("<BB18xIQ", 0x81, 0, 2, -(-clusters // 8))
    root += struct.pack("<B3xI12xIQ", 0x82, checksum, 3, len(upcase))
    names = name.encode("utf-16-le")
    parts = [names[index : index + 30].ljust(30, b"\0") for index in range(0, len(names), 30)]
    stamp = (2020 - 1980) << 25 | 5 << 21 | 17 << 16 | 12 << 11
    entries = struct.pack("<BBHHHIII12x", 0x85, 1 + len(parts), 0, 0x20, 0, stamp, stamp, stamp)
    entries += struct.pack("<BBBBHHQIIQ", 0xC0, 1, 0, len(name), 0, 0, valid, 0, 5, len(content))
    entries += b"".join(b"\xc1\x00" + part for part in parts)
    total = 0
    for index, byte in enumerate(entries):
        if index not in (2, 3):
            total = ((total << 15 | total >> 1) + byte) & 0xFFFF
    entries = entries[:2] + struct.pack("<H", total) + entries[4:]
    image[at(4) : at(4) + len(root + entries)] = root + entries
    image[at(5) : at(5) + len(content)] = content
    path.write_bytes(image)
    return path


def make_mbr(path: Path, parts: list[tuple[int, bytes]]) -> Path:
    """A disk with an MBR and these partitions (type, content), each on a MiB."""
    image = bytearray(1 << 20)
    for index, (kind, content) in enumerate(parts):
        first = len(image) // SECTOR
        entry = struct.pack("<B3xB3xII", 0, kind, first, len(content) // SECTOR)
        image[446 + 16 * index : 462 + 16 * index] = entry
        image += content + bytes(-len(content) % (1 << 20))
    image[510:512] = b"\x55\xaa"
    path.write_bytes(image)
    return path
