"""Files that say they are saved states, made by somebody hostile: refused, or read within their bounds."""

from __future__ import annotations

import os
import struct
import threading
from hashlib import blake2b

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.hypervisor.test_state_file import ABOUT

from mullion.hypervisor.state_file import FRAME_LIMIT_BYTES, StateDamagedError, StateReader

pytestmark = pytest.mark.fuzz

words = st.one_of(
    st.integers(0, 1 << 21), st.sampled_from([0, 1, FRAME_LIMIT_BYTES, FRAME_LIMIT_BYTES + 1, (1 << 32) - 1])
)
plain = st.one_of(
    st.binary(max_size=300), st.builds(bytes, st.sampled_from([0, 1, 5_000, FRAME_LIMIT_BYTES, 40 << 20]))
)
contents = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda data: zstandard.ZstdCompressor().compress(data), plain),
    st.builds(lambda data: zstandard.ZstdCompressor(write_content_size=False).compress(data), plain),
)
frames = st.tuples(contents, st.one_of(st.none(), words), st.one_of(st.none(), words))
"""What a frame holds, and the lengths that it claims; None for the right ones, as far as that can be."""


def craft(description: bytes, made: list[tuple[bytes, int | None, int | None]], tail: bytes, counts: int) -> bytes:
    """A file whose checksums are all right, whatever its lengths are."""
    start = struct.pack("<8sII", b"MULSTATE", 1, len(description))
    head = start + blake2b(start + description, digest_size=32).digest()
    seal = blake2b(head, digest_size=32)
    whole, total = head + description, 0
    for number, (stored, stored_bytes, plain_bytes) in enumerate(made):
        lengths = struct.pack(
            "<II", len(stored) if stored_bytes is None else stored_bytes, 1000 if plain_bytes is None else plain_bytes
        )
        digest = blake2b(struct.pack("<Q", number) + lengths + stored, digest_size=16).digest()
        seal.update(lengths + digest)
        whole += lengths + digest + stored
        total += 1000 if plain_bytes is None else plain_bytes
    trailer = struct.pack("<I4sQQQ", 0, b"END1", len(made) + counts, total, len(whole) + 64)
    seal.update(trailer)
    return whole + trailer + seal.digest() + tail


@settings(deadline=None)
@given(
    st.one_of(st.just(msgspec.json.encode(ABOUT)), st.binary(max_size=200)),
    st.lists(frames, max_size=4),
    st.sampled_from([b"", b"x"]),
    st.sampled_from([0, 0, 0, 1]),
)
def test_a_hostile_state_is_refused_or_read_within_its_bounds(
    tmp_path_factory: pytest.TempPathFactory,
    description: bytes,
    made: list[tuple[bytes, int | None, int | None]],
    tail: bytes,
    counts: int,
) -> None:
    path = tmp_path_factory.mktemp("state") / "x.state"
    path.write_bytes(craft(description, made, tail, counts))
    try:
        with StateReader(str(path)) as reader:
            info = reader.check()
            assert sent(reader, info.seal) == info.plain_bytes <= FRAME_LIMIT_BYTES * len(made)
    except StateDamagedError as error:
        offset = error.context["offset"]
        assert isinstance(offset, int)
        assert 0 <= offset <= path.stat().st_size


def sent(reader: StateReader, seal: str) -> int:
    """How many bytes come out of a file that is whole."""
    reading, writing = os.pipe()
    counts: list[int] = []
    taker = threading.Thread(target=lambda: counts.extend(iter(lambda: len(os.read(reading, 1 << 20)), 0)))
    taker.start()
    try:
        reader.copy_to(writing, seal=seal)
    finally:
        os.close(writing)
        taker.join()
        os.close(reading)
    return sum(counts)
