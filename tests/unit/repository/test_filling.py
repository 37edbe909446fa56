"""A pack that is put while it is filled: its bytes are those of a pack, whenever and however often they are asked for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.unit.repository.disks import CHUNK, new_repository

from mullion.base.block import Buffer
from mullion.base.units import MIB
from mullion.repository.chunks import ChunkReader
from mullion.repository.errors import TargetFullError
from mullion.repository.filling import WINDOW_BYTES, FillingPack, PackDroppedError
from mullion.repository.index import Index
from mullion.repository.keys import Keys
from mullion.repository.pack import STORED_LIMIT_BYTES
from mullion.repository.stream import ChunkWriter, Piece

pytestmark = pytest.mark.unit


def filling(size_bytes: int) -> FillingPack:
    return FillingPack(Keys.of(bytes(32)), memoryview(bytearray(size_bytes + STORED_LIMIT_BYTES)))


def fill(pack: FillingPack, size_bytes: int) -> None:
    for number in range(size_bytes // CHUNK):
        pack.add(number.to_bytes(32), os.urandom(CHUNK), CHUNK, 0)


def joined(pack: FillingPack) -> bytes:
    """The bytes as they were when each buffer came, as a storage writes them."""
    return b"".join([bytes(buffer) for buffer in pack])


@pytest.mark.parametrize("size_bytes", [CHUNK, WINDOW_BYTES, WINDOW_BYTES + MIB, 3 * WINDOW_BYTES])
def test_the_bytes_of_a_pack_do_not_depend_on_when_they_are_taken(size_bytes: int) -> None:
    pack = filling(size_bytes)
    with ThreadPoolExecutor() as threads:
        early = [threads.submit(joined, pack) for _ in range(2)]
        fill(pack, size_bytes)
        pack.close()
        assert early[0].result() == early[1].result() == joined(pack)
    assert len(joined(pack)) > size_bytes


def test_whole_windows_come_before_the_pack_is_closed() -> None:
    pack = filling(3 * WINDOW_BYTES)
    fill(pack, WINDOW_BYTES + CHUNK)
    buffers = iter(pack)
    assert len(memoryview(next(buffers))) == WINDOW_BYTES
    fill(pack, WINDOW_BYTES)
    assert len(memoryview(next(buffers))) == WINDOW_BYTES


def test_a_dropped_pack_ends_who_waits_for_it() -> None:
    pack = filling(WINDOW_BYTES)
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(joined, pack)
        pack.drop()
        with pytest.raises(PackDroppedError):
            waiting.result()


@pytest.mark.parametrize("end", [None, TargetFullError("full")])
def test_a_writer_that_is_closed_in_the_middle_of_a_pack_ends_its_threads(end: Exception | None) -> None:
    """Also when the storage has refused the pack while it was filled."""
    repository, backend = new_repository()
    has_begun = threading.Event()

    def put(name: str, buffers: Iterable[Buffer], *, durable: bool = True) -> None:
        has_begun.set()
        if end is not None:
            raise end
        b"".join(buffers)

    backend.put = put  # type: ignore[method-assign]
    writer = ChunkWriter(backend, repository.keys, Index())
    list(writer.store_all([Piece(0, 1, os.urandom(CHUNK))]))
    assert has_begun.wait(10)
    before = threading.active_count()
    writer.close()
    assert threading.active_count() < before
    assert not [name for name in backend.objects if name.startswith("packs/")]


def test_what_is_stored_can_be_read_when_the_writer_has_finished() -> None:
    repository, backend = new_repository(pack_bytes=WINDOW_BYTES + MIB)
    index = Index()
    writer = ChunkWriter(backend, repository.keys, index)
    content = os.urandom(2 * WINDOW_BYTES + 3 * MIB)
    pieces = [Piece(at // CHUNK, MIB // CHUNK, content[at : at + MIB]) for at in range(0, len(content), MIB)]
    ids = [chunk_id for _, some in writer.store_all(pieces) for chunk_id in some]
    writer.finish()
    writer.close()
    found = ChunkReader(backend, repository.keys, index, lambda: index).read(ids)
    assert b"".join(found[chunk_id] for chunk_id in ids) == content
