"""Footer, header and locators: round trips, checksums, what is refused; geometry; BAT and bitmaps."""

from __future__ import annotations

import struct
import tempfile
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullion.base.units import GIB, MIB
from mullion.vhd import bat, bitmap
from mullion.vhd.geometry import Geometry
from mullion.vhd.layout import DiskType, DynamicHeader, Footer, LayoutError, ParentLocator, checksum

pytestmark = pytest.mark.unit

U32 = st.integers(0, 2**32 - 1)
FOOTERS = st.builds(
    Footer,
    features=U32.map(lambda bits: bits | 2),
    data_offset=st.integers(0, 2**64 - 1),
    timestamp=U32,
    creator_application=st.binary(min_size=4, max_size=4),
    creator_version=U32,
    creator_host_os=st.binary(min_size=4, max_size=4),
    original_size_bytes=st.integers(0, 2**64 - 1),
    current_size_bytes=st.integers(1, 2**53).map(lambda n: n * 512),
    cylinders=st.integers(0, 65535),
    heads=st.integers(0, 255),
    sectors_per_track=st.integers(0, 255),
    disk_type=st.sampled_from(DiskType),
    unique_id=st.binary(min_size=16, max_size=16),
    saved_state=st.integers(0, 255),
)
LOCATORS = st.builds(ParentLocator, st.binary(min_size=4, max_size=4), U32, U32, st.integers(0, 2**64 - 1))
HEADERS = st.builds(
    DynamicHeader,
    bat_offset=st.integers(0, 2**50).map(lambda n: n * 512),
    max_bat_entries=st.integers(1, 2**32 - 1),
    block_bytes=st.integers(9, 28).map(lambda n: 1 << n),
    parent_unique_id=st.binary(min_size=16, max_size=16),
    parent_timestamp=U32,
    parent_name_raw=st.binary(min_size=512, max_size=512),
    locators=st.tuples(*[LOCATORS] * 8),
)


@given(FOOTERS)
def test_footer_round_trip(footer: Footer) -> None:
    raw = footer.pack()
    assert len(raw) == 512
    assert Footer.unpack(raw) == footer


@given(HEADERS)
def test_header_round_trip(header: DynamicHeader) -> None:
    raw = header.pack()
    assert len(raw) == 1024
    assert DynamicHeader.unpack(raw) == header


@given(FOOTERS, st.integers(0, 511), st.integers(1, 255))
def test_every_changed_byte_of_a_footer_is_noticed(footer: Footer, at: int, change: int) -> None:
    raw = bytearray(footer.pack())
    raw[at] ^= change
    with pytest.raises(LayoutError):
        Footer.unpack(bytes(raw))


@given(st.binary(max_size=1100))
def test_random_bytes_are_refused(raw: bytes) -> None:
    for structure in (Footer, DynamicHeader):
        with pytest.raises(LayoutError):
            structure.unpack(raw)


def test_the_checksum_is_the_specifications() -> None:
    raw = bytearray(512)
    raw[0], raw[64:68] = 200, b"\xff\xff\xff\xff"  # the field itself does not count
    assert checksum(bytes(raw), 64) == 0xFFFF_FFFF - 200


@pytest.mark.parametrize(
    ("space", "expected"),
    [(0, 0), (1, 512), (511, 511 * 512), (512, 512), (65536, 65536), (513, None), (1000, None)],
)
def test_locator_space_in_sectors_or_bytes(space: int, expected: int | None) -> None:
    assert ParentLocator(b"W2ku", space, 10, 2048).space_bytes == expected


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [
        (4 * MIB, (120, 4, 17)),
        (10 * MIB, (301, 4, 17)),
        (40 * MIB, (963, 5, 17)),
        (512 * MIB, (1040, 16, 63)),
        (1 * GIB, (2080, 16, 63)),
        (127 * GIB, (65278, 16, 255)),
        (2040 * GIB, (65535, 16, 255)),
    ],
)
def test_known_geometries(size_bytes: int, expected: tuple[int, int, int]) -> None:
    assert Geometry.for_size(size_bytes) == expected


@given(st.integers(1, 2040 * GIB // 512).map(lambda n: n * 512))
def test_geometry_never_exceeds_the_disk_or_the_fields(size_bytes: int) -> None:
    found = Geometry.for_size(size_bytes)
    assert found.size_bytes <= size_bytes
    assert found.cylinders <= 65535
    assert found.heads <= 16
    assert found.sectors_per_track <= 255


# ---------------------------------------------------------------------- BAT


def test_bat_sector_is_big_endian() -> None:
    table = bat.Bat([1, 0xFFFF_FFFF, 0x0102_0304])
    assert bat.raw_sector(table, 0) == struct.pack(">3I", *table)


@given(st.lists(st.integers(0, 9000), max_size=5), st.integers(0, 10_000))
def test_next_allocated(blocks: list[int], start: int) -> None:
    table = bat.Bat.blank(9001)
    for block in blocks:
        table[block] = 7
    expected = min((block for block in blocks if block >= start), default=9001)
    assert bat.next_allocated(table, start) == expected


@given(st.dictionaries(st.integers(0, 4999), st.integers(0, 50), max_size=40), st.integers(1, 3))
def test_starts_are_sorted_in_pieces(blocks: dict[int, int], pages: int) -> None:
    table = bat.Bat.blank(5000)
    for block, entry in blocks.items():
        table[block] = entry
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bat, "_SORT_PAGES", pages)
        found = list(bat.allocated_starts(table))
    assert found == sorted(blocks.values())
    assert bat.last_start(table) == (found[-1] if found else None)
    assert table.count_allocated() == len(blocks)


ENTRY = st.one_of(st.just(bat.UNALLOCATED), st.integers(0, bat.UNALLOCATED))


@given(
    st.integers(0, 1500),
    st.dictionaries(st.integers(0, 1499), ENTRY, max_size=8),
    st.dictionaries(st.integers(0, 1499), ENTRY, max_size=4),
    st.integers(0, 1600),
    st.slices(1500),
)
def test_a_table_is_as_the_list_of_its_entries(
    length: int, before: dict[int, int], after: dict[int, int], kept: int, part: slice
) -> None:
    entries = [before.get(index, bat.UNALLOCATED) for index in range(length)]
    with tempfile.TemporaryFile() as file:
        file.write(struct.pack(f">3I{length}I", 1, 2, 3, *entries))
        file.flush()
        loaded = bat.load(file.fileno(), 12, length)
        assert bat.load(file.fileno(), 16, length) is None or not length
    assert loaded is not None
    for table in (loaded, bat.Bat(entries)):
        expected = entries[:]
        for index in after.keys() & set(range(length)):
            table[index] = expected[index] = after[index]
        del expected[kept:]
        table.shorten(kept)
        assert list(table) == expected
        assert len(table) == len(expected)
        assert table[part.start : part.stop].tolist() == expected[part.start : part.stop]
        assert table.count_allocated() == sum(entry != bat.UNALLOCATED for entry in expected)
        with pytest.raises(IndexError):
            table[len(expected)] = 1
        with pytest.raises(IndexError):
            table[-1]
    assert list(bat.Bat.blank(length)) == [bat.UNALLOCATED] * length, "what tables share was changed"


@given(
    st.lists(st.integers(0, 300), max_size=12, unique=True),
    st.integers(2, 20),
    st.integers(0, 300),
    st.lists(st.tuples(st.integers(0, 150_000), st.integers(1, 9000)), max_size=3),
)
def test_bad_starts_are_those_that_collide(
    starts: list[int], span: int, end: int, ranges: list[tuple[int, int]]
) -> None:
    metadata = [(begin, begin + length) for begin, length in ranges]
    ordered = sorted(starts)
    alone = {
        start
        for start in ordered
        if start >= end or any(start * 512 < high and (start + span) * 512 > low for low, high in metadata)
    }
    rest = [start for start in ordered if start not in alone]
    collide = {one for one in rest for other in rest if one != other and abs(one - other) < span}
    found = set(bat.find_bad_starts(array("I", ordered), span, end, metadata))
    assert found >= alone
    assert collide <= found | alone
    # Where metadata ends inside a sector the whole sector counts, so a neighbour may be in as well.
    aligned = [(low // 512 * 512, -(-high // 512) * 512) for low, high in metadata]
    for start in found - alone - collide:
        assert any(start * 512 < high and (start + span) * 512 > low for low, high in aligned)


# ---------------------------------------------------------------------- bitmaps


def test_sector_zero_is_the_most_significant_bit() -> None:
    assert bitmap.to_raw(bitmap.mask(0, 1, 4096), 4096, 512) == b"\x80" + bytes(511)
    assert bitmap.to_raw(bitmap.mask(1, 2, 3), 3, 512) == b"\x60" + bytes(511)


@pytest.mark.parametrize(("block", "room"), [(512, 512), (1 << 21, 512), (1 << 22, 1024), (1 << 28, 65536)])
def test_room_of_a_bitmap(block: int, room: int) -> None:
    assert bitmap.bitmap_bytes(block) == room


@given(st.integers(1, 200), st.data())
def test_owner_map_is_what_the_masks_say(sectors: int, data: st.DataObject) -> None:
    owners = data.draw(st.lists(st.integers(0, 9), min_size=sectors, max_size=sectors))
    if data.draw(st.booleans()):
        owners = [owner for owner in owners for _ in range(8)]
    count = len(owners)
    masks = [
        sum(bitmap.mask(i, 1, count) for i, owner in enumerate(owners) if owner == number) for number in range(1, 10)
    ]
    found, unit = bitmap.owner_map(masks, count)
    assert [owner for owner in found for _ in range(unit)] == owners
    at = 0
    for owner, first, length in bitmap.runs(found):
        assert first == at
        assert set(found[first : first + length]) == {owner}
        at += length
    assert at == len(found)


def test_owner_map_of_255_masks() -> None:
    found, unit = bitmap.owner_map([bitmap.mask(i, 1, 256) for i in range(255)], 256)
    assert unit == 1
    assert list(found) == [*range(1, 256), 0]
