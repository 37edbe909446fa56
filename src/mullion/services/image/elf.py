"""What the image builder must know of an ELF file: the libraries it needs, and what a kernel module says of itself.

Spec: System V ABI, gABI 4.1 chapters 4 and 5; x86-64 psABI. 64-bit little-endian files only, as on Debian's amd64.

File header (64 bytes):   0 16 e_ident · 16 u16 e_type · 18 u16 e_machine · 32 u64 e_phoff · 40 u64 e_shoff ·
                          54 u16 e_phentsize · 56 u16 e_phnum · 58 u16 e_shentsize · 60 u16 e_shnum · 62 u16 e_shstrndx
Program header (56):      0 u32 p_type · 8 u64 p_offset · 16 u64 p_vaddr · 32 u64 p_filesz
Section header (64):      0 u32 sh_name · 24 u64 sh_offset · 32 u64 sh_size
Dynamic entry (16):       0 i64 d_tag · 8 u64 d_val

Invariants: nothing outside the buffer is read; a file that says otherwise is refused with InvalidError.
Not handled: 32-bit and big-endian files, RPATH and RUNPATH, section counts beyond 65279.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from mullion.base.errors import InvalidError

_MAGIC: Final = b"\x7fELF\x02\x01"
_PT_LOAD: Final = 1
_PT_DYNAMIC: Final = 2
_DT_NULL: Final = 0
_DT_NEEDED: Final = 1
_DT_STRTAB: Final = 5


def is_elf(data: bytes) -> bool:
    return data.startswith(_MAGIC)


def needed_libraries(data: bytes) -> tuple[str, ...]:
    """The sonames in DT_NEEDED, in order; none for a static program.

    Raises: InvalidError when the file is not a sound 64-bit ELF file.
    """
    headers = tuple(_program_headers(data))
    dynamic = next(((offset, size) for kind, offset, _, size in headers if kind == _PT_DYNAMIC), None)
    if dynamic is None:
        return ()
    names: list[int] = []
    strings_address: int | None = None
    for position in range(dynamic[0], dynamic[0] + dynamic[1] - 15, 16):
        tag, value = _unpack("<qQ", data, position)
        if tag == _DT_NULL:
            break
        if tag == _DT_NEEDED:
            names.append(value)
        elif tag == _DT_STRTAB:
            strings_address = value
    if not names:
        return ()
    for kind, offset, address, size in headers:
        if kind == _PT_LOAD and strings_address is not None and address <= strings_address < address + size:
            strings = offset + strings_address - address
            return tuple(_string(data, strings + name) for name in names)
    raise InvalidError("an ELF file names libraries but has no string table for them")


def module_info(data: bytes) -> dict[str, tuple[str, ...]]:
    """The fields of a kernel module's `.modinfo` section (`depends`, `alias`, `vermagic` …), each with all its values.

    Raises: InvalidError when the file is not a kernel module.
    """
    for name, offset, size in _sections(data):
        if name == ".modinfo":
            found: dict[str, tuple[str, ...]] = {}
            for item in data[offset : offset + size].split(b"\0"):
                key, equals, value = item.decode("utf-8", "replace").partition("=")
                if equals:
                    found[key] = (*found.get(key, ()), value)
            return found
    raise InvalidError("an ELF file has no .modinfo section: it is not a kernel module")


def _program_headers(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(type, offset, address, size in the file) of each segment."""
    _check(data)
    (table,) = _unpack("<Q", data, 32)
    entry_bytes, count = _unpack("<HH", data, 54)
    for index in range(count):
        at = table + index * entry_bytes
        (kind,) = _unpack("<I", data, at)
        offset, address = _unpack("<QQ", data, at + 8)
        (size,) = _unpack("<Q", data, at + 32)
        yield kind, offset, address, size


def _sections(data: bytes) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each section."""
    _check(data)
    (table,) = _unpack("<Q", data, 40)
    entry_bytes, count, names_index = _unpack("<HHH", data, 58)
    (names,) = _unpack("<Q", data, table + names_index * entry_bytes + 24)
    for index in range(count):
        at = table + index * entry_bytes
        (name,) = _unpack("<I", data, at)
        offset, size = _unpack("<QQ", data, at + 24)
        yield _string(data, names + name), offset, size


def _check(data: bytes) -> None:
    if not is_elf(data):
        raise InvalidError("not a 64-bit little-endian ELF file")


def _unpack(layout: str, data: bytes, offset: int) -> tuple[int, ...]:
    if offset + struct.calcsize(layout) > len(data):
        raise InvalidError(f"an ELF file ends before the structure at offset {offset}")
    return struct.unpack_from(layout, data, offset)


def _string(data: bytes, offset: int) -> str:
    end = data.find(b"\0", offset) if offset < len(data) else -1
    if end < 0:
        raise InvalidError(f"an ELF file ends within the string at offset {offset}")
    return data[offset:end].decode("utf-8", "replace")
