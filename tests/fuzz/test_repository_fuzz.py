"""Hostile bytes where a repository's objects should be, sealed with the right key and not: refused by name, in bounds."""

from __future__ import annotations

import contextlib
import struct

import msgspec
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.unit.repository.disks import MemoryDisk, back_up, content_of, new_repository, scattered

from mullion.base.errors import InvalidError, MullionError
from mullion.base.units import KIB, MIB
from mullion.repository import Repository, manifest, pack, sealing
from mullion.repository.errors import RepositoryDamagedError
from mullion.repository.fake import FakeBackend
from mullion.repository.index import Segment
from mullion.repository.keys import Config, Keys, KeySlot
from mullion.repository.location import open_backend
from mullion.repository.prune import prune
from mullion.repository.verify import verify

pytestmark = pytest.mark.fuzz

KEYS = Keys.of(bytes(32))
REPOSITORY, BACKEND = new_repository()
MANIFEST = back_up(REPOSITORY, MemoryDisk(scattered(512 * KIB, 1)))
EXAMPLES = settings(max_examples=150, deadline=None)


@EXAMPLES
@given(st.binary(max_size=200))
def test_any_bytes_as_config_key_and_sealed_object(content: bytes) -> None:
    for parse in (
        lambda: Config.unpack(content, "here"),
        lambda: KeySlot.unpack(content, "here", "keys/x"),
        lambda: sealing.unseal(sealing.Kind.MANIFEST, "backups/x", content, KEYS, "here"),
        lambda: sealing.unseal(sealing.Kind.INDEX, "index/x", sealing.MAGIC + b"\2" + bytes(7) + content, KEYS, "here"),
    ):
        with pytest.raises(RepositoryDamagedError):
            parse()


@EXAMPLES
@given(st.binary(max_size=400))
@example(b"\x81\xa2id\xa1\x80")
def test_any_payload_as_manifest(payload: bytes) -> None:
    with contextlib.suppress(RepositoryDamagedError):
        found = manifest.decode(payload, "backups/0123456789abcdef", "here")
        assert found.id == "0123456789abcdef"


_stored = st.builds(
    manifest.Stored,
    root=st.binary(max_size=40),
    size_bytes=st.integers(-5, 1 << 70).filter(lambda size: size < 1 << 63),
    data_bytes=st.integers(0, 1 << 40),
    read_bytes=st.integers(0, 1 << 40),
    new_bytes=st.integers(0, 1 << 40),
)


@EXAMPLES
@given(_stored, st.booleans())
def test_a_sealed_manifest_that_lies(stored: manifest.Stored, is_known: bool) -> None:
    """Its writer has the key: sizes and roots may be anything, and reading ends in an error or in zeros."""
    if is_known:
        stored = msgspec.structs.replace(stored, root=MANIFEST.disks["disk0"].root)
    backend = BACKEND.copy()
    repository = Repository(backend, REPOSITORY.config, REPOSITORY.keys)
    lying = msgspec.structs.replace(MANIFEST, id="0123456789abcdef", disks={"d": stored})
    name = manifest.manifest_name(lying.id)
    backend.objects[name] = sealing.seal(sealing.Kind.MANIFEST, name, manifest.encode(lying), REPOSITORY.keys)
    with contextlib.suppress(MullionError):
        disk = repository.open_disk(repository.backup(lying.id), "d")
        disk.pread(0, bytearray(min(disk.size_bytes, 64 * KIB)))
        disk.pread(max(0, disk.size_bytes - 512), bytearray(min(disk.size_bytes, 512)))
    report = verify(repository, read_data=False)
    assert report.backups == 2
    assert MANIFEST.id not in report.damaged


@EXAMPLES
@given(st.binary(max_size=400), st.integers(0, 1 << 32 - 1), st.integers(0, 1 << 32 - 1))
def test_any_payload_as_index(body: bytes, packs: int, records: int) -> None:
    for payload in (body, struct.pack(">II", packs, records) + body, struct.pack(">II", 0, len(body) // 48) + body):
        try:
            segment = Segment(payload, "index/x", "here")
        except RepositoryDamagedError:
            continue
        with contextlib.suppress(RepositoryDamagedError):
            segment.check_order()
            for place in segment.places():
                assert place.entry.raw_bytes <= 64 * KIB
        with contextlib.suppress(RepositoryDamagedError):
            number = segment.find(body[:32].ljust(32, b"\0"))
            assert number is None or 0 <= number < segment.count


@EXAMPLES
@given(st.lists(st.tuples(st.binary(min_size=32, max_size=32), *[st.integers(0, 1 << 20)] * 3), max_size=5), st.data())
def test_a_sealed_directory_that_lies(entries: list[tuple[bytes, int, int, int]], data: st.DataObject) -> None:
    key = pack.PackKey(bytes(16), KEYS)
    directory = b"".join(pack.ENTRY.pack(*entry) for entry in entries)
    trailer = pack.TRAILER.pack(pack.END_MAGIC, len(entries))
    begin = data.draw(st.integers(24, 100_000))
    sealed = bytearray(len(directory) + pack.TAG_BYTES)
    key.encrypt(begin, directory, b"directory" + trailer, memoryview(sealed))
    size = begin + len(sealed) + len(trailer)
    with contextlib.suppress(RepositoryDamagedError):
        found = pack.read_directory(key, bytes(sealed), trailer, pack_bytes=size, location="here")
        assert sum(entry.stored_bytes for entry in found) == begin - 24


@pytest.mark.parametrize("raw_bytes", [1, 65535, 65536])
def test_a_chunk_that_would_become_large_is_not_decompressed(raw_bytes: int) -> None:
    """A frame that says 64 MiB, sealed with the right key."""
    key = pack.PackKey(bytes(16), KEYS)
    bomb = zstandard.ZstdCompressor().compress(bytes(64 * MIB))
    entry = pack.PackEntry(bytes(32), 24, len(bomb) + 16, raw_bytes, pack.ZSTD_FLAG)
    sealed = bytearray(entry.stored_bytes)
    key.encrypt(24, bomb, entry.chunk_id + raw_bytes.to_bytes(4) + pack.ZSTD_FLAG.to_bytes(4), memoryview(sealed))
    with pytest.raises(RepositoryDamagedError, match="larger or smaller"):
        pack.open_chunk(key, entry, sealed, KEYS.chunk_id, "here")


@EXAMPLES
@given(st.data())
def test_a_storage_that_lies(data: st.DataObject) -> None:
    """It gives back objects that are cut, changed, gone or in each other's place; never is wrong content given out."""
    backend = FakeBackend()
    backend.objects = dict(BACKEND.objects)
    expected = content_of(REPOSITORY.open_disk(MANIFEST, "disk0"))
    names = sorted(name for name in backend.objects if name != "config" and not name.startswith("keys/"))
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(names))
        content = backend.objects.get(name, b"")
        match data.draw(st.sampled_from(["cut", "flip", "gone", "swap", "grow"])):
            case "cut":
                backend.objects[name] = content[: data.draw(st.integers(0, len(content)))]
            case "flip" if content:
                place = data.draw(st.integers(0, len(content) - 1))
                backend.objects[name] = content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]
            case "gone":
                backend.objects.pop(name, None)
            case "swap":
                backend.objects[name] = backend.objects.get(data.draw(st.sampled_from(names)), b"")
            case _:
                backend.objects[name] = content + data.draw(st.binary(max_size=100))
    repository = Repository(backend, REPOSITORY.config, REPOSITORY.keys)
    with contextlib.suppress(MullionError):
        assert content_of(repository.open_disk(repository.backup(MANIFEST.id), "disk0")) == expected
    verify(repository)
    before = dict(backend.objects)
    with contextlib.suppress(RepositoryDamagedError):
        prune(repository)
    assert {name for name in before if name.startswith("backups/")} <= set(backend.objects)


@EXAMPLES
@given(st.text(max_size=40), st.sampled_from(["", "s3://", "sftp://", "s3+http://", "file://", "s3+https://a/"]))
def test_any_text_as_a_place(text: str, scheme: str) -> None:
    with contextlib.suppress(InvalidError, MullionError):
        open_backend(scheme + text if scheme else f"nowhere/{text}")
