"""Reading chunks: by id, checked, the last ones kept, and those that lie behind each other fetched at once.

Every chunk that is given out was authenticated and has the id that was asked for; if not, RepositoryDamagedError.
A pack that is missing is looked for once more with a fresh index: a prune may have moved its chunks.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeVar

from mullion.base.units import KIB, MIB
from mullion.repository.backend import Backend, ObjectMissingError
from mullion.repository.errors import RepositoryDamagedError
from mullion.repository.index import Index, Place
from mullion.repository.keys import CHUNK_BYTES, Keys
from mullion.repository.pack import PackEntry, PackKey, open_chunk, pack_name
from mullion.repository.tree import NODE_BYTES

CACHE_BYTES: Final = 64 * MIB
_NODES_CACHED: Final = 2048
_PACK_KEYS_CACHED: Final = 4096
_GAP_BYTES: Final = 64 * KIB
"""What is fetched for nothing rather than asking twice."""
_FETCH_BYTES: Final = 4 * MIB


class ChunkReader:
    """The chunks and nodes of a repository. Safe from any thread."""

    def __init__(
        self, backend: Backend, keys: Keys, index: Index, reload: Callable[[], Index], cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._backend = backend
        self._keys = keys
        self._index = index
        self._reload = reload
        self._lock = threading.Lock()
        self._chunks: OrderedDict[bytes, bytes] = OrderedDict()
        self._chunks_limit = max(1, cache_bytes // CHUNK_BYTES)
        self._nodes: OrderedDict[bytes, bytes] = OrderedDict()
        self._pack_keys: OrderedDict[bytes, PackKey] = OrderedDict()

    def load_node(self, node_id: bytes) -> bytes:
        """A node of a tree. Raises: RepositoryDamagedError."""
        with self._lock:
            if (node := self._nodes.get(node_id)) is not None:
                self._nodes.move_to_end(node_id)
                return node
        node = dict(self.read_any([node_id]))[node_id]
        if len(node) != NODE_BYTES:
            raise self._damaged(node_id, f"it has {len(node)} bytes, and a node has {NODE_BYTES}")
        with self._lock:
            _keep(self._nodes, node_id, node, _NODES_CACHED)
        return node

    def read(self, chunk_ids: Iterable[bytes]) -> dict[bytes, bytes]:
        """The content of chunks, 65536 bytes each. Raises: RepositoryDamagedError."""
        found: dict[bytes, bytes] = {}
        missing = []
        with self._lock:
            for chunk_id in dict.fromkeys(chunk_ids):
                if (content := self._chunks.get(chunk_id)) is not None:
                    self._chunks.move_to_end(chunk_id)
                    found[chunk_id] = content
                else:
                    missing.append(chunk_id)
        for chunk_id, content in self.read_any(missing):
            if len(content) != CHUNK_BYTES:
                raise self._damaged(chunk_id, f"it has {len(content)} bytes, and a chunk has {CHUNK_BYTES}")
            found[chunk_id] = content
            with self._lock:
                _keep(self._chunks, chunk_id, content, self._chunks_limit)
        return found

    def read_any(self, chunk_ids: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Chunks and nodes, in any order and not kept; those that lie close to each other are one request."""
        wanted = list(chunk_ids)
        for is_last_try in (False, True):
            moved: list[bytes] = []
            places = sorted(map(self._place, wanted), key=lambda place: (place.pack_id, place.entry.offset))
            for run in _runs(places):
                begin = run[0].entry.offset
                length = run[-1].entry.offset + run[-1].entry.stored_bytes - begin
                try:
                    stored = memoryview(self._backend.get(pack_name(run[0].pack_id), begin, length))
                except ObjectMissingError as error:
                    if is_last_try:
                        raise self._damaged(run[0].entry.chunk_id, f"{error}") from error
                    moved += [place.entry.chunk_id for place in run]
                    continue
                key = self._pack_key(run[0].pack_id)
                for place in run:
                    offset = place.entry.offset - begin
                    piece = stored[offset : offset + place.entry.stored_bytes]
                    id_key = id_key_of(place.entry, self._keys)
                    yield place.entry.chunk_id, open_chunk(key, place.entry, piece, id_key, self._backend.location)
            if not moved:
                return
            self._index = self._reload()
            wanted = moved

    def _place(self, chunk_id: bytes) -> Place:
        place = self._index.find(chunk_id)
        if place is None:
            self._index = self._reload()
            place = self._index.find(chunk_id)
        if place is None:
            raise self._damaged(chunk_id, "no pack has it")
        return place

    def _pack_key(self, pack_id: bytes) -> PackKey:
        with self._lock:
            if (key := self._pack_keys.get(pack_id)) is None:
                key = PackKey(pack_id, self._keys)
                _keep(self._pack_keys, pack_id, key, _PACK_KEYS_CACHED)
            return key

    def _damaged(self, chunk_id: bytes, why: str) -> RepositoryDamagedError:
        return RepositoryDamagedError(
            f"{self._backend.location}: chunk {chunk_id.hex()[:16]} is lost: {why}", repository=self._backend.location
        )


def id_key_of(entry: PackEntry, keys: Keys) -> bytes:
    """The key that an entry's id is made with: chunks and nodes have different ones, and different sizes."""
    return keys.chunk_id if entry.raw_bytes == CHUNK_BYTES else keys.node_id


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def _keep(cache: OrderedDict[_Key, _Value], key: _Key, value: _Value, limit: int) -> None:
    cache[key] = value
    cache.move_to_end(key)
    while len(cache) > limit:
        cache.popitem(last=False)


def _runs(places: Iterable[Place]) -> Iterator[list[Place]]:
    """Places in order, those together that one request should fetch."""
    run: list[Place] = []
    for place in places:
        if run:
            end = run[-1].entry.offset + run[-1].entry.stored_bytes
            length = place.entry.offset + place.entry.stored_bytes - run[0].entry.offset
            if place.pack_id != run[0].pack_id or place.entry.offset - end > _GAP_BYTES or length > _FETCH_BYTES:
                yield run
                run = []
        run.append(place)
    if run:
        yield run
