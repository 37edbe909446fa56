"""Sector bitmaps as big integers.

Spec: "Data Blocks": one bit a sector, sector 0 of the block is the most significant bit of byte 0, padded to 512 bytes.
A bitmap of n sectors is kept as an int of n bits, sector 0 the highest: what `int.from_bytes(raw, "big")` gives. Set
operations on thousands of sectors are then one machine-speed `&`, `|` or `~`.

Who owns each sector of a mapping granule is kept as an *owner map*: one byte for each unit (a sector, or eight sectors
where every bitmap agrees on whole bytes), holding the number of the layer, 0 for nobody.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from mullion.base.units import SECTOR_BYTES

MAX_OWNERS: Final = 255
"""An owner map has one byte a unit."""

_WHOLE_PLANES: Final = tuple(bytes(1 << bit if char == 0xFF else 0 for char in range(256)) for bit in range(8))
_HIGH: Final = bytes(char >> 4 for char in range(256))
_LOW: Final = bytes(char & 15 for char in range(256))
_SHIFTED: Final = bytes(char << 4 & 255 for char in range(256))
_RUNS: Final = re.compile(rb"(.)\1*", re.DOTALL)


def bitmap_bytes(block_bytes: int) -> int:
    """Room of a block's bitmap in the file."""
    sectors = block_bytes // SECTOR_BYTES
    return -(-sectors // (8 * SECTOR_BYTES)) * SECTOR_BYTES


def mask(first: int, count: int, sectors: int) -> int:
    """The bits of `count` sectors from `first` on, in a bitmap of `sectors`."""
    return ((1 << count) - 1) << (sectors - first - count)


def to_raw(bits: int, sectors: int, length: int) -> bytes:
    """The bytes of a bitmap in the file, padded with clear bits."""
    return (bits << (length * 8 - sectors)).to_bytes(length, "big")


def owner_map(masks: Sequence[int], sectors: int) -> tuple[bytes, int]:
    """Number each sector by the mask it is set in: (a byte for each unit, sectors in a unit).

    `masks` are disjoint bitmaps of `sectors` bits; a sector of `masks[i]` gets i + 1, one of no mask 0. At most
    `MAX_OWNERS` masks. The numbers are built in binary, a bit plane at a time, so 8 layers cost 4 conversions.
    """
    assert len(masks) <= MAX_OWNERS
    planes: list[int] = []
    for bit in range(len(masks).bit_length()):
        plane = 0
        for number, bits in enumerate(masks, 1):
            if number >> bit & 1:
                plane |= bits
        planes.append(plane)
    room = -(-sectors // 8)
    planes = [plane << room * 8 - sectors for plane in planes]
    if sectors % 8 == 0:
        raw_planes = [plane.to_bytes(room, "big") for plane in planes]
        if not any(raw.translate(None, b"\x00\xff") for raw in raw_planes):
            return _merge([raw.translate(_WHOLE_PLANES[bit]) for bit, raw in enumerate(raw_planes)]), 8
    halves = [_spread(planes[:4], room)]
    if planes[4:]:  # more than 15 owners
        halves.append(_spread(planes[4:], room).translate(_SHIFTED))
    return _merge(halves)[:sectors], 1


def _spread(planes: Sequence[int], room: int) -> bytes:
    """A byte for each sector, with its bits of at most four planes of `room` bytes, the first one's lowest.

    In each half of a byte the planes are a matrix of four rows and columns of bits, which is transposed for all halves
    at once (two rounds of exchanging blocks); then a row holds every fourth sector's number.
    """
    rows = [*reversed([*planes, 0, 0, 0][:4])]
    for shift, pattern, pairs in ((2, b"\xcc", ((0, 2), (1, 3))), (1, b"\xaa", ((0, 1), (2, 3)))):
        high = int.from_bytes(pattern * room, "big")
        for upper, lower in pairs:
            swapped = (rows[upper] << shift ^ rows[lower]) & high
            rows[lower] ^= swapped
            rows[upper] ^= swapped >> shift
    spread = bytearray(room * 8)
    for sector, row in enumerate(rows):
        raw = row.to_bytes(room, "big")
        spread[sector::8] = raw.translate(_HIGH)
        spread[sector + 4 :: 8] = raw.translate(_LOW)
    return bytes(spread)


def _merge(planes: Sequence[bytes]) -> bytes:
    if len(planes) == 1:
        return planes[0]
    merged = 0
    for plane in planes:
        merged |= int.from_bytes(plane, "big")
    return merged.to_bytes(len(planes[0]), "big")


def runs(owners: bytes) -> Iterator[tuple[int, int, int]]:
    """The runs of equal owners: (owner, first unit, units)."""
    for owner, start, end in spans(owners, 0, len(owners)):
        yield owner, start, end - start


def spans(owners: bytes, first: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The runs of equal owners among units `first` to `end`: (owner, first unit, unit behind the last)."""
    for match in _RUNS.finditer(owners, first, end):
        start, stop = match.span()
        yield owners[start], start, stop


def set_runs(bits: int, sectors: int) -> Iterator[tuple[int, int]]:
    """The runs of set bits of a bitmap: (first sector, sectors)."""
    owners, unit = owner_map((bits,), sectors)
    for owner, first, count in runs(owners):
        if owner:
            yield first * unit, count * unit
