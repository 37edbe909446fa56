"""Partition tables: what is found, what is left out with a complaint, and that no table can make the reader hang."""

from __future__ import annotations

import struct
import uuid
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.framework.devices import MemoryDevice

from mullion.base.units import MIB, SECTOR_BYTES
from mullion.vhd.partitions import LOGICAL_LIMIT, GptHeader, PartitionTable, find_gpt, read_partitions

pytestmark = pytest.mark.unit

LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")


def put_mbr(device: MemoryDevice, sector: int, *entries: tuple[int, int, int]) -> None:
    """Entries of (type, first sector, sectors)."""
    raw = b"".join(struct.pack("<B3xB3xII", 0, *entry) for entry in entries)
    device.pwrite(sector * SECTOR_BYTES, bytes(446) + raw.ljust(64, b"\0") + b"\x55\xaa")


def put_gpt(device: MemoryDevice, *entries: tuple[int, int, str], count: int = 128) -> None:
    """Both copies; entries of (first sector, last sector, name)."""
    put_mbr(device, 0, (0xEE, 1, 0xFFFFFFFF))
    raw = b"".join(
        LINUX.bytes_le + uuid.uuid4().bytes_le + struct.pack("<QQQ", first, last, 0) + name.encode("utf-16-le").ljust(72, b"\0")
        for first, last, name in entries
    ).ljust(count * 128, b"\0")  # fmt: skip
    end = device.size_bytes // SECTOR_BYTES
    for mine, other, at in ((1, end - 1, 2), (end - 1, 1, end - 33)):
        header = GptHeader(0x10000, 92, mine, other, 34, end - 34, bytes(16), at, count, 128, zlib.crc32(raw))
        device.pwrite(mine * SECTOR_BYTES, header.pack().ljust(SECTOR_BYTES, b"\0"))
        device.pwrite(at * SECTOR_BYTES, raw)


def found(table: PartitionTable | None) -> list[tuple[int, int, int, str]]:
    assert table is not None
    return [
        (part.number, part.offset // SECTOR_BYTES, part.length // SECTOR_BYTES, part.kind) for part in table.partitions
    ]


@pytest.fixture
def device() -> MemoryDevice:
    return MemoryDevice(8 * MIB)


def test_an_empty_disk_and_boot_sectors_are_no_tables(device: MemoryDevice) -> None:
    assert read_partitions(device) is None
    for at, mark in ((3, b"NTFS    "), (3, b"EXFAT   "), (54, b"FAT16   "), (82, b"FAT32   ")):
        put_mbr(device, 0, (0x07, 64, 100))
        device.pwrite(at, mark)
        assert read_partitions(device) is None
        device.pwrite(at, bytes(len(mark)))
    device.pwrite(446, b"\x12")  # neither active nor not: text, or code
    assert read_partitions(device) is None


def test_primary_and_logical_partitions(device: MemoryDevice) -> None:
    put_mbr(device, 0, (0x07, 64, 100), (0, 0, 0), (0x05, 1000, 5000), (0x83, 8000, 64))
    put_mbr(device, 1000, (0x83, 8, 90), (0x05, 100, 100))
    put_mbr(device, 1100, (0x82, 8, 50))
    assert found(read_partitions(device)) == [
        (1, 64, 100, "07"), (4, 8000, 64, "83"), (5, 1008, 90, "83"), (6, 1108, 50, "82"),
    ]  # fmt: skip


def test_extended_records_in_a_circle_end(device: MemoryDevice) -> None:
    put_mbr(device, 0, (0x0F, 1000, 5000))
    put_mbr(device, 1000, (0x83, 8, 90), (0x05, 100, 100))
    put_mbr(device, 1100, (0x83, 8, 50), (0x05, 0, 100))
    table = read_partitions(device)
    assert [number for number, *_ in found(table)] == [5, 6]
    assert table is not None
    assert "do not end" in table.problems[0]


def test_extended_records_without_end_are_followed_to_a_limit(device: MemoryDevice) -> None:
    put_mbr(device, 0, (0x05, 1000, 9000))
    for number in range(200):
        put_mbr(device, 1000 + number * 10, (0x83, 1, 9), (0x05, (number + 1) * 10, 10))
    assert len(found(read_partitions(device))) == LOGICAL_LIMIT


def test_partitions_outside_the_disk_are_left_out(device: MemoryDevice) -> None:
    put_mbr(device, 0, (0x83, 64, 1 << 30), (0x83, 0, 100), (0x83, 64, 64))
    table = read_partitions(device)
    assert found(table) == [(3, 64, 64, "83")]
    assert table is not None
    assert [problem.partition(" (")[0] for problem in table.problems] == ["partition 1", "partition 2"]


def test_gpt(device: MemoryDevice) -> None:
    put_gpt(device, (64, 127, "root"), (200, 200, "Größe\x1b[2J"))
    table = read_partitions(device)
    assert found(table) == [(1, 64, 64, str(LINUX)), (2, 200, 1, str(LINUX))]
    assert table is not None
    assert (table.scheme, table.problems) == ("gpt", ())
    assert [part.name for part in table.partitions] == ["root", "Größe?[2J"]


def test_the_backup_serves_when_the_primary_is_damaged(device: MemoryDevice) -> None:
    put_gpt(device, (64, 127, "root"))
    device.pwrite(SECTOR_BYTES + 20, b"\1")
    table = read_partitions(device)
    assert found(table) == [(1, 64, 64, str(LINUX))]
    assert table is not None
    assert "primary GPT at byte 512" in table.problems[0]
    device.pwrite(device.size_bytes - SECTOR_BYTES, bytes(SECTOR_BYTES))
    assert find_gpt(device) is None
    assert found(read_partitions(device)) == []


def test_a_gpt_that_claims_gigabytes_of_entries_is_refused(device: MemoryDevice) -> None:
    put_gpt(device, (64, 127, "root"))
    for count, size in ((1 << 31, 128), (128, 1 << 31), (128, 100), (0x100000, 128)):
        header = GptHeader(0x10000, 92, 1, 2, 34, 99, bytes(16), 2, count, size, 0)
        for sector in (1, device.size_bytes // SECTOR_BYTES - 1):
            device.pwrite(sector * SECTOR_BYTES, header.pack().ljust(SECTOR_BYTES, b"\0"))
        assert find_gpt(device) is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8 * MIB - 1), st.binary(min_size=1, max_size=16)), max_size=30))
def test_any_bytes_give_partitions_on_the_disk_or_none(changes: list[tuple[int, bytes]]) -> None:
    device = MemoryDevice(8 * MIB)
    put_gpt(device, (64, 127, "root"))
    for offset, data in changes:
        place = offset % 2048 if offset % 3 else offset  # most of them where tables are
        device.pwrite(min(place, device.size_bytes - len(data)), data)
    table = read_partitions(device)
    for part in table.partitions if table is not None else ():
        assert SECTOR_BYTES <= part.offset < part.offset + part.length <= device.size_bytes
