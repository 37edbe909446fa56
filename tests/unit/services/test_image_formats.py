"""The small formats that the image builder reads and writes: ELF, cpio, the master boot record."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mullion.base.errors import InvalidError
from mullion.services.image.cpio import pack_cpio
from mullion.services.image.elf import is_elf, module_info, needed_libraries
from mullion.services.image.partition_table import (
    TYPE_EFI_SYSTEM,
    TYPE_LINUX,
    PartitionRecord,
    pack_boot_record,
)
from mullion.services.image.tree import Entry, Kind, Tree

pytestmark = pytest.mark.unit


def elf_header(*, phoff: int = 0, phnum: int = 0, shoff: int = 0, shnum: int = 0, shstrndx: int = 0) -> bytes:
    return struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        *(3, 62, 1, 0, phoff, shoff, 0, 64, 56, phnum, 64, shnum, shstrndx),
    )


def program_header(kind: int, offset: int, address: int, size: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, 4, offset, address, address, size, size, 8)


def dynamic_program(*sonames: str) -> bytes:
    """A program that needs these libraries; its string table is at an address unlike its offset."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in sonames)
    entries = []
    at = 1
    for name in sonames:
        entries.append((1, at))
        at += len(name) + 1
    entries += [(5, 0x400000 + 64 + 2 * 56), (0, 0)]
    dynamic = b"".join(struct.pack("<qQ", *entry) for entry in entries)
    start = 64 + 2 * 56
    total = start + len(strings) + len(dynamic)
    return (
        elf_header(phoff=64, phnum=2)
        + program_header(1, 0, 0x400000, total)
        + program_header(2, start + len(strings), 0x400000 + start + len(strings), len(dynamic))
        + strings
        + dynamic
    )


def kernel_module(**fields: str | list[str]) -> bytes:
    info = b""
    for key, value in fields.items():
        for item in [value] if isinstance(value, str) else value:
            info += f"{key}={item}".encode() + b"\0"
    names = b"\0.modinfo\0.shstrtab\0"
    table = 64 + len(info) + len(names)
    sections = [(0, 0, 0), (1, 64, len(info)), (10, 64 + len(info), len(names))]
    headers = b"".join(struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, at, size, 0, 0, 1, 0) for name, at, size in sections)
    return elf_header(shoff=table, shnum=3, shstrndx=2) + info + names + headers


class TestElf:
    def test_needed_libraries_come_in_order(self) -> None:
        program = dynamic_program("libglib-2.0.so.0", "libc.so.6")
        assert is_elf(program)
        assert needed_libraries(program) == ("libglib-2.0.so.0", "libc.so.6")

    def test_static_program_needs_none(self) -> None:
        assert needed_libraries(elf_header()) == ()

    def test_module_info_keeps_all_values(self) -> None:
        module = kernel_module(depends="virtio,virtio_ring", alias=["virtio:d2v*", "virtio:d8v*"], license="GPL")
        assert module_info(module) == {
            "depends": ("virtio,virtio_ring",),
            "alias": ("virtio:d2v*", "virtio:d8v*"),
            "license": ("GPL",),
        }

    @pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", b"\x7fELF\x01\x01" + bytes(60)])
    def test_what_is_not_64_bit_elf_is_refused(self, data: bytes) -> None:
        with pytest.raises(InvalidError, match="ELF"):
            needed_libraries(data)

    def test_program_without_modinfo_is_no_module(self) -> None:
        with pytest.raises(InvalidError, match="not a kernel module"):
            module_info(kernel_module().replace(b".modinfo", b".another"))

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_damage_is_refused_or_read_but_never_another_error(self, data: st.DataObject) -> None:
        whole = bytearray(data.draw(st.sampled_from([dynamic_program("libc.so.6"), kernel_module(depends="a,b")])))
        for _ in range(data.draw(st.integers(1, 4))):
            whole[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.integers(0, 255))
        cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
        for read in (needed_libraries, module_info):
            try:
                read(cut)
            except InvalidError:
                pass


def read_cpio(archive: bytes) -> list[tuple[str, int, int, int, int, bytes]]:
    """(name, mode, links, device major, device minor, content) of each member: a reader of its own."""
    members = []
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name_end = at + 110 + fields[11]
        assert archive[name_end - 1] == 0
        name = archive[at + 110 : name_end - 1].decode()
        start = (name_end + 3) // 4 * 4
        content = archive[start : start + fields[6]]
        if name == "TRAILER!!!":
            assert start == len(archive)
            return members
        members.append((name, fields[1], fields[4], fields[9], fields[10], content))
        at = (start + fields[6] + 3) // 4 * 4


class TestCpio:
    def test_each_kind_of_file(self) -> None:
        tree = Tree()
        tree.file("usr/bin/tool", b"12345", 0o755)
        tree.link("bin", "usr/bin")
        tree.add("dev/console", Entry(Kind.CHARACTER, 0o600, device=(5, 1)))
        assert read_cpio(pack_cpio(tree)) == [
            ("bin", 0o120777, 1, 0, 0, b"usr/bin"),
            ("dev", 0o040755, 2, 0, 0, b""),
            ("dev/console", 0o020600, 1, 5, 1, b""),
            ("usr", 0o040755, 2, 0, 0, b""),
            ("usr/bin", 0o040755, 2, 0, 0, b""),
            ("usr/bin/tool", 0o100755, 1, 0, 0, b"12345"),
        ]

    @given(st.dictionaries(st.from_regex(r"[a-z0-9_.-]{1,20}x", fullmatch=True), st.binary(max_size=50), max_size=12))
    @settings(max_examples=50)
    def test_names_and_contents_of_any_length_come_back(self, files: dict[str, bytes]) -> None:
        tree = Tree()
        for name, content in files.items():
            tree.file(name, content)
        assert {member[0]: member[5] for member in read_cpio(pack_cpio(tree))} == files

    def test_same_tree_in_another_order_gives_the_same_bytes(self) -> None:
        one, two = Tree(), Tree()
        one.file("a", b"1")
        one.file("b", b"2")
        two.file("b", b"2")
        two.file("a", b"1")
        assert pack_cpio(one) == pack_cpio(two)


class TestTree:
    @pytest.mark.parametrize("path", ["/etc", "a/../b", "", "a//b", "./a"])
    def test_path_that_leaves_the_tree_is_refused(self, path: str) -> None:
        with pytest.raises(InvalidError, match="not a path within the guest"):
            Tree().file(path, b"")

    def test_path_through_a_link_is_refused(self) -> None:
        tree = Tree()
        tree.link("bin", "usr/bin")
        with pytest.raises(InvalidError, match="'bin' is not a folder"):
            tree.file("bin/tool", b"")

    def test_file_does_not_replace_a_folder(self) -> None:
        tree = Tree()
        tree.file("etc/issue", b"")
        with pytest.raises(InvalidError, match="only one of the two is a folder"):
            tree.file("etc", b"")

    def test_copy_is_independent(self) -> None:
        tree = Tree()
        tree.file("a", b"1")
        other = tree.copy()
        other.file("b", b"2")
        assert "b" not in tree
        assert "a" in other


class TestBootRecord:
    def test_bytes_as_the_specification_places_them(self) -> None:
        sector = pack_boot_record(
            b"\xfa" * 440,
            0x11223344,
            [PartitionRecord(TYPE_EFI_SYSTEM, 2048, 131072, is_active=True), PartitionRecord(TYPE_LINUX, 133120, 8192)],
        )
        assert len(sector) == 512
        assert sector[:440] == b"\xfa" * 440
        assert sector[440:444] == b"\x44\x33\x22\x11"
        assert sector[446:462] == bytes.fromhex("80 feffff ef feffff 00080000 00000200")
        assert sector[462:478] == bytes.fromhex("00 feffff 83 feffff 00080200 00200000")
        assert sector[478:510] == bytes(32)
        assert sector[510:] == b"\x55\xaa"

    @pytest.mark.parametrize(
        "partitions",
        [
            [PartitionRecord(TYPE_LINUX, 0, 10)],
            [PartitionRecord(TYPE_LINUX, 10, 10), PartitionRecord(TYPE_LINUX, 19, 10)],
            [PartitionRecord(TYPE_LINUX, 1, 1 << 32)],
            [PartitionRecord(TYPE_LINUX, 1, 0)],
        ],
    )
    def test_partitions_that_do_not_fit_are_refused(self, partitions: list[PartitionRecord]) -> None:
        with pytest.raises(InvalidError, match="do not fit"):
            pack_boot_record(b"", 0, partitions)

    def test_too_much_boot_code_is_refused(self) -> None:
        with pytest.raises(InvalidError, match="441 bytes"):
            pack_boot_record(bytes(441), 0, [])

    def test_fifth_partition_is_refused(self) -> None:
        with pytest.raises(InvalidError, match="5 partitions"):
            pack_boot_record(b"", 0, [PartitionRecord(TYPE_LINUX, 1 + n, 1) for n in range(5)])
