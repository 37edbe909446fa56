"""The pipeline of a backup: read, digest in threads, encrypt into packs, put packs; in bounded memory.

The caller's thread reads pieces of 1 MiB and encrypts finished chunks into the pack being filled (AES-GCM runs at
GB/s); threads hash and compress, which is the work; one more puts packs, each while it is filled (`filling`). All of it
releases the interpreter's lock for nearly all of its time. At most two packs and some pieces are in memory.

Durability: an index segment is put after the packs that it names; nothing refers to a chunk before `finish` returns.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import zstandard
from blake3 import blake3

from mullion.base.block import Buffer
from mullion.base.units import MIB
from mullion.repository import sealing
from mullion.repository.backend import Backend
from mullion.repository.filling import FillingPack
from mullion.repository.index import Index, build_segment
from mullion.repository.index_cache import IndexCache
from mullion.repository.keys import CHUNK_BYTES, Keys
from mullion.repository.pack import STORED_LIMIT_BYTES, ZSTD_FLAG, PackEntry
from mullion.repository.rooms import Rooms
from mullion.repository.tree import ZERO_ID

PIECE_BYTES: Final = MIB
LEVEL: Final = 3
PACKS_PER_SEGMENT: Final = 32
"""After so many packs their index is put too, so that a backup that is interrupted is soon taken up again."""
_PACKS_IN_MEMORY: Final = 2
_ZEROS_AT_ONCE: Final = 4096
_ZERO_CHUNK: Final = bytes(CHUNK_BYTES)
_PEEK_BYTES: Final = 64
_ZERO_PEEK: Final = bytes(_PEEK_BYTES)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some chunks: the number of the first, how many, and their content; without one they are zeros, unread."""

    first: int
    count: int
    content: Buffer | None


_Digested = tuple[bytes, Buffer | None, int]
"""A chunk's id, its payload and flags; without a payload when it is stored already, or is all zeros."""


class ChunkWriter:
    """Stores chunks and nodes, each once."""

    def __init__(
        self,
        backend: Backend,
        keys: Keys,
        index: Index,
        *,
        threads: int | None = None,
        index_cache: IndexCache | None = None,
    ) -> None:
        self._backend = backend
        self._index_cache = index_cache
        self._keys = keys
        self._index = index
        self._threads = threads or max(1, min(8, os.cpu_count() or 1))
        self._workers = ThreadPoolExecutor(self._threads, "repository-digest")
        self._putter = ThreadPoolExecutor(1, "repository-put")
        self._local = threading.local()
        self._pack_rooms = Rooms(backend.pack_bytes + STORED_LIMIT_BYTES)
        self.piece_rooms = Rooms(PIECE_BYTES)
        self._pack: FillingPack | None = None
        self._pending: set[bytes] = set()
        self._puts: deque[tuple[FillingPack, Future[None]]] = deque()
        self._unindexed: dict[bytes, list[PackEntry]] = {}
        """Durable packs that no segment names yet."""
        self.new_bytes = 0

    def adopt(self, pack_id: bytes, entries: list[PackEntry]) -> None:
        """A durable pack that no index names: left by a backup that was interrupted. It gets into the next segment."""
        self._index.add(pack_id, entries)
        self._unindexed[pack_id] = entries

    def store_all(self, pieces: Iterable[Piece]) -> Iterator[tuple[int, list[bytes]]]:
        """Store pieces; gives some chunks' ids at a time and the number of the first; zeros have an id of their own."""
        waiting: deque[tuple[Piece, Future[list[_Digested]] | None]] = deque()
        window = self._threads * 2 + 1
        try:
            for piece in pieces:
                future = None if piece.content is None else self._workers.submit(self._digest, piece.content)
                waiting.append((piece, future))
                if len(waiting) >= window:
                    yield from self._collect(*waiting.popleft())
            while waiting:
                yield from self._collect(*waiting.popleft())
        finally:
            for _, future in waiting:
                if future is not None:
                    future.cancel()

    def store_node(self, node: bytes) -> bytes:
        """Store a node of a tree; its id."""
        node_id = blake3(node, key=self._keys.node_id).digest()
        if not self._is_stored(node_id):
            payload, flags = _smaller(self._compressor().compress(node), node)
            self._add(node_id, payload, len(node), flags)
        return node_id

    def add_chunk(self, chunk_id: bytes, content: bytes) -> None:
        """Store a chunk or node whose id is known, wherever else it is: for repacking."""
        payload, flags = _smaller(self._compressor().compress(content), content)
        self._add(chunk_id, payload, len(content), flags)

    def finish(self) -> None:
        """Return when everything that was stored is durable and in the index."""
        self._close_pack()
        while self._puts:
            self._await_put()
        self._put_segment()

    def close(self) -> None:
        """End the threads; what is not finished is dropped."""
        if self._pack is not None:
            self._pack.drop()
        self._workers.shutdown(cancel_futures=True)
        self._putter.shutdown(cancel_futures=True)

    # ------------------------------------------------------------------ in the worker threads

    def _digest(self, content: Buffer) -> list[_Digested]:
        view = memoryview(content)
        key, compress = self._keys.chunk_id, self._compressor().compress
        digested: list[_Digested] = []
        for begin in range(0, len(view), CHUNK_BYTES):
            chunk = view[begin : begin + CHUNK_BYTES]
            if _is_zero(chunk):
                digested.append((ZERO_ID, None, 0))
                continue
            chunk_id = blake3(chunk, key=key).digest()
            if self._is_stored(chunk_id):
                digested.append((chunk_id, None, 0))
            else:
                digested.append((chunk_id, *_smaller(compress(chunk), chunk)))
        return digested

    def _compressor(self) -> zstandard.ZstdCompressor:
        """This thread's own: they must not be shared."""
        compressor: zstandard.ZstdCompressor | None = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = self._local.compressor = zstandard.ZstdCompressor(level=LEVEL)
        return compressor

    def _is_stored(self, chunk_id: bytes) -> bool:
        return chunk_id in self._pending or chunk_id in self._index

    # ------------------------------------------------------------------ in the caller's thread

    def _collect(self, piece: Piece, future: Future[list[_Digested]] | None) -> Iterator[tuple[int, list[bytes]]]:
        if future is None:
            for first in range(piece.first, piece.first + piece.count, _ZEROS_AT_ONCE):
                yield first, [ZERO_ID] * min(_ZEROS_AT_ONCE, piece.first + piece.count - first)
            return
        digested = future.result()
        for chunk_id, payload, flags in digested:
            if payload is not None and not self._is_stored(chunk_id):
                self._add(chunk_id, payload, CHUNK_BYTES, flags)
        yield piece.first, [chunk_id for chunk_id, _, _ in digested]
        self.piece_rooms.give(piece.content)

    def _add(self, chunk_id: bytes, payload: Buffer, raw_bytes: int, flags: int) -> None:
        pack = self._pack or self._begin_pack()
        self._pending.add(chunk_id)
        self.new_bytes += pack.add(chunk_id, payload, raw_bytes, flags).stored_bytes
        if pack.is_full:
            self._close_pack()

    def _begin_pack(self) -> FillingPack:
        if len(self._puts) == _PACKS_IN_MEMORY:
            self._await_put()
        self._pack = pack = FillingPack(self._keys, self._pack_rooms.take())
        self._puts.append((pack, self._putter.submit(self._backend.put, pack.name, pack)))
        return pack

    def _close_pack(self) -> None:
        if self._pack is not None:
            self._pack.close()
            self._pack = None

    def _await_put(self) -> None:
        pack, future = self._puts.popleft()
        future.result()
        self._pack_rooms.give(pack.room)
        self._index.add(pack.pack_id, pack.entries)
        self._unindexed[pack.pack_id] = pack.entries
        self._pending.difference_update(entry.chunk_id for entry in pack.entries)
        if len(self._unindexed) >= PACKS_PER_SEGMENT:
            self._put_segment()

    def _put_segment(self) -> None:
        if self._unindexed:
            put_segment(self._backend, self._keys, build_segment(self._unindexed), self._index_cache)
            self._unindexed = {}


def _smaller(compressed: Buffer, content: Buffer) -> tuple[Buffer, int]:
    """What is stored of a chunk, and its flags: as it is when compressing gains nothing."""
    return (compressed, ZSTD_FLAG) if len(compressed) < len(content) else (content, 0)


def _is_zero(chunk: memoryview) -> bool:
    """Comparing views is slow, so most chunks are judged by their first bytes, and the others are copied (5 µs)."""
    return bytes(chunk[:_PEEK_BYTES]) == _ZERO_PEEK and bytes(chunk) == _ZERO_CHUNK


def put_segment(backend: Backend, keys: Keys, payload: bytes, cache: IndexCache | None = None) -> str:
    """Put an index segment, durably, and a copy of it into the cache; its name."""
    name = f"index/{uuid.uuid4().hex}"
    sealed = sealing.seal(sealing.Kind.INDEX, name, payload, keys)
    backend.put(name, [sealed])
    if cache is not None:
        cache.put(name, sealed)
    return name
