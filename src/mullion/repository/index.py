"""The index: which pack has a chunk, and where in it. Made of segments, sealed objects that are only added and merged.

The payload of a segment, big-endian:

| offset | size | type | field |
|---|---|---|---|
| 0 | 4 | u32 | p, number of packs |
| 4 | 4 | u32 | n, number of records |
| 8 | 16·p | bytes | ids of the packs |
| 8 + 16·p | 48·n | | records, sorted by id, ids may come twice |

A record: id (32), u32 number of the pack in this segment, u32 offset in the pack, u32 bytes there with the tag, u32:
bytes of the content, and in the top bit whether it is compressed.

Nothing here is the truth: packs have directories, and `rebuild_index` makes the index from them alone. Memory: 48 bytes
a chunk, 0.7 MB for each GiB that is stored; a record is found by its id's first bits and a search in some dozens.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from mullion.repository.errors import RepositoryDamagedError
from mullion.repository.keys import CHUNK_BYTES, ID_BYTES
from mullion.repository.pack import (
    HEADER_BYTES,
    PACK_ID_BYTES,
    PACK_LIMIT_BYTES,
    STORED_LIMIT_BYTES,
    TAG_BYTES,
    ZSTD_FLAG,
    PackEntry,
)

_COUNTS: Final = struct.Struct(">II")
RECORD: Final = struct.Struct(">32sIIII")
_ZSTD_BIT: Final = 1 << 31
_FAN_LIMIT_BITS: Final = 16


class Place(NamedTuple):
    """Where a chunk is."""

    pack_id: bytes
    entry: PackEntry


class Segment:
    """The records of one index object, searchable as they are."""

    def __init__(self, payload: bytes, name: str, location: str) -> None:
        """Raises: RepositoryDamagedError when counts and size do not fit."""
        self.name = name
        self._location = location
        packs: int
        count: int
        packs, count = _COUNTS.unpack_from(payload) if len(payload) >= _COUNTS.size else (0, -1)
        self._first = _COUNTS.size + packs * PACK_ID_BYTES
        if count < 0 or len(payload) != self._first + count * RECORD.size:
            raise RepositoryDamagedError(
                f"{location}: {name} is damaged: its size does not fit its counts", repository=location, name=name
            )
        self._payload = payload
        self.count = count
        self.pack_ids = [
            payload[offset : offset + PACK_ID_BYTES] for offset in range(_COUNTS.size, self._first, PACK_ID_BYTES)
        ]
        self._fan_bits = max(0, min(_FAN_LIMIT_BITS, count.bit_length() - 4))
        self._fan = self._make_fan()

    def find(self, chunk_id: bytes) -> int | None:
        """The number of the first record of an id."""
        bucket = int.from_bytes(chunk_id[:4]) >> (32 - self._fan_bits)
        begin, end = (self._first + number * RECORD.size for number in self._fan[bucket : bucket + 2])
        while (found := self._payload.find(chunk_id, begin, end)) >= 0:
            number, rest = divmod(found - self._first, RECORD.size)
            if not rest:
                return number
            begin = found + 1
        return None

    def place(self, number: int) -> Place:
        """Raises: RepositoryDamagedError for a record that cannot be."""
        chunk_id, pack, offset, stored_bytes, raw = RECORD.unpack_from(
            self._payload, self._first + number * RECORD.size
        )
        raw_bytes, flags = raw & ~_ZSTD_BIT, ZSTD_FLAG if raw & _ZSTD_BIT else 0
        if (
            pack >= len(self.pack_ids)
            or not HEADER_BYTES <= offset < PACK_LIMIT_BYTES
            or not TAG_BYTES < stored_bytes <= STORED_LIMIT_BYTES
            or not 0 < raw_bytes <= CHUNK_BYTES
        ):
            raise RepositoryDamagedError(
                f"{self._location}: {self.name} is damaged: record {number} names what cannot be",
                repository=self._location,
                name=self.name,
                offset=self._first + number * RECORD.size,
            )
        return Place(self.pack_ids[pack], PackEntry(chunk_id, offset, stored_bytes, raw_bytes, flags))

    def places(self) -> Iterator[Place]:
        return (self.place(number) for number in range(self.count))

    def check_order(self) -> None:
        """Whether a search can find every record. Raises: RepositoryDamagedError."""
        last = b""
        for number in range(self.count):
            chunk_id = self._id(number)
            if chunk_id < last:
                raise RepositoryDamagedError(
                    f"{self._location}: {self.name} is damaged: record {number} is out of order",
                    repository=self._location,
                    name=self.name,
                )
            last = chunk_id

    def _id(self, number: int) -> bytes:
        offset = self._first + number * RECORD.size
        return self._payload[offset : offset + ID_BYTES]

    def _make_fan(self) -> list[int]:
        """The number of the first record of each value of the first bits, and the number of all."""
        shift = 32 - self._fan_bits
        numbers = range(self.count)
        fan, low = [], 0
        for prefix in range(1 << self._fan_bits):
            low = bisect.bisect_left(
                numbers, prefix << shift, low, key=lambda number: int.from_bytes(self._id(number)[:4])
            )
            fan.append(low)
        return [*fan, self.count]


class Index:
    """All segments together, and what this process has stored or found since. Reading is safe from any thread."""

    def __init__(self, segments: Iterable[Segment] = ()) -> None:
        self.segments = list(segments)
        self._recent: dict[bytes, Place] = {}
        self.recent_packs: set[bytes] = set()

    def find(self, chunk_id: bytes) -> Place | None:
        """Raises: RepositoryDamagedError."""
        if (place := self._recent.get(chunk_id)) is not None:
            return place
        for segment in self.segments:
            if (number := segment.find(chunk_id)) is not None:
                return segment.place(number)
        return None

    def __contains__(self, chunk_id: bytes) -> bool:
        return chunk_id in self._recent or any(segment.find(chunk_id) is not None for segment in self.segments)

    def add(self, pack_id: bytes, entries: Iterable[PackEntry]) -> None:
        """Chunks of a pack that no segment has yet."""
        self.recent_packs.add(pack_id)
        for entry in entries:
            self._recent.setdefault(entry.chunk_id, Place(pack_id, entry))

    def recent_entries(self) -> dict[bytes, list[PackEntry]]:
        """What was added since, as `build_segment` takes it."""
        packs: dict[bytes, list[PackEntry]] = {pack_id: [] for pack_id in self.recent_packs}
        for place in self._recent.values():
            packs[place.pack_id].append(place.entry)
        return packs

    @property
    def indexed_packs(self) -> set[bytes]:
        """The packs that segments name."""
        return set().union(*(segment.pack_ids for segment in self.segments))

    @property
    def pack_ids(self) -> set[bytes]:
        """All packs that are known."""
        return self.recent_packs.union(*(segment.pack_ids for segment in self.segments))

    @property
    def count(self) -> int:
        """How many records there are; a chunk that is stored twice counts twice."""
        return len(self._recent) + sum(segment.count for segment in self.segments)


def build_segment(packs: Mapping[bytes, Iterable[PackEntry]]) -> bytes:
    """The payload of a segment of these packs."""
    records = []
    for number, entries in enumerate(packs.values()):
        for entry in entries:
            raw = entry.raw_bytes | (_ZSTD_BIT if entry.flags & ZSTD_FLAG else 0)
            records.append(RECORD.pack(entry.chunk_id, number, entry.offset, entry.stored_bytes, raw))
    records.sort()
    return _COUNTS.pack(len(packs), len(records)) + b"".join(packs) + b"".join(records)


def collect(segments: Iterable[Segment]) -> dict[bytes, list[PackEntry]]:
    """The packs of segments with their entries, each once, as `build_segment` takes them."""
    packs: dict[bytes, dict[int, PackEntry]] = {}
    for segment in segments:
        for pack_id in segment.pack_ids:
            packs.setdefault(pack_id, {})
        for place in segment.places():
            packs[place.pack_id][place.entry.offset] = place.entry
    return {pack_id: list(entries.values()) for pack_id, entries in packs.items()}
