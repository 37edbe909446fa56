"""Packs: many chunks in one object, with a directory at the end.

| offset | size | type | field |
|---|---|---|---|
| 0 | 8 | bytes | `MLNPACK1` |
| 8 | 16 | bytes | id of the pack, random: its name, and what its key is made of |
| 24 | … | | chunks, one behind the other, no gaps: AES-256-GCM of the payload, and its tag of 16 bytes |
| d | 44·n | | directory, encrypted as one more chunk; tag |
| d + 44·n + 16 | 8 | bytes | `MLNPKEND` |
| … + 8 | 4 | u32 | n, the number of entries |
| … + 12 | 4 | | zeros |

An entry of the directory: id (32), u32 bytes of the chunk in the pack with its tag, u32 bytes of its content, u32 flags
(1: compressed with zstd). Offsets are sums: entries lie behind each other from 24 to d exactly.

Invariants: each pack has a key of its own, keyed BLAKE3 of its id; a chunk's nonce is its offset, so none comes twice.
A chunk's id, content size and flags are authenticated with it; pack id, trailer and number of entries with the
directory. So every byte of a pack is covered by one tag or compared with what it must be.
Durability: a pack is put whole before any index names it.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mullion.base.block import Buffer
from mullion.base.units import MIB
from mullion.repository.errors import RepositoryDamagedError
from mullion.repository.keys import CHUNK_BYTES, ID_BYTES, Keys

MAGIC: Final = b"MLNPACK1"
END_MAGIC: Final = b"MLNPKEND"
HEADER_BYTES: Final = 24
TRAILER: Final = struct.Struct(">8sI4x")
ENTRY: Final = struct.Struct(">32sIII")
TAG_BYTES: Final = 16
PACK_ID_BYTES: Final = 16
ZSTD_FLAG: Final = 1
STORED_LIMIT_BYTES: Final = CHUNK_BYTES + TAG_BYTES
PACK_LIMIT_BYTES: Final = 256 * MIB
ENTRIES_LIMIT: Final = 1 << 20
_PACK_NAME: Final = re.compile(r"packs/([0-9a-f]{32})")


class PackEntry(NamedTuple):
    """A chunk in a pack; sizes and offset in bytes."""

    chunk_id: bytes
    offset: int
    stored_bytes: int
    raw_bytes: int
    flags: int


class PackKey:
    """The cipher of one pack."""

    def __init__(self, pack_id: bytes, keys: Keys) -> None:
        self.pack_id = pack_id
        self._cipher = AESGCM(blake3(pack_id, key=keys.pack).digest())

    def encrypt(self, offset: int, payload: Buffer, authenticated: bytes, into: memoryview) -> None:
        """Encrypt, with the tag behind, into a buffer that is exactly so long."""
        self._cipher.encrypt_into(offset.to_bytes(12), payload, authenticated, into)

    def decrypt(self, offset: int, stored: Buffer, authenticated: bytes) -> bytes:
        """Raises: InvalidTag."""
        return self._cipher.decrypt(offset.to_bytes(12), stored, authenticated)


class PackBuilder:
    """A pack being filled."""

    def __init__(self, keys: Keys, room: memoryview) -> None:
        """In memory that is the pack's until it was put; `is_full` says when no more is sure to fit."""
        self.pack_id = os.urandom(PACK_ID_BYTES)
        self._key = PackKey(self.pack_id, keys)
        self._view = room
        self._view[:HEADER_BYTES] = MAGIC + self.pack_id
        self.size_bytes = HEADER_BYTES
        self.entries: list[PackEntry] = []

    @property
    def is_full(self) -> bool:
        return self.size_bytes + STORED_LIMIT_BYTES > len(self._view)

    def add(self, chunk_id: bytes, payload: Buffer, raw_bytes: int, flags: int) -> PackEntry:
        """Encrypt a chunk into the pack, which must not be full."""
        entry = PackEntry(chunk_id, self.size_bytes, len(payload) + TAG_BYTES, raw_bytes, flags)
        end = self.size_bytes + entry.stored_bytes
        self._key.encrypt(
            self.size_bytes, payload, _authenticated(chunk_id, raw_bytes, flags), self._view[self.size_bytes : end]
        )
        self.entries.append(entry)
        self.size_bytes = end
        return entry

    def close(self) -> Sequence[Buffer]:
        """The whole pack, directory and trailer included."""
        directory = b"".join(
            ENTRY.pack(entry.chunk_id, entry.stored_bytes, entry.raw_bytes, entry.flags) for entry in self.entries
        )
        trailer = TRAILER.pack(END_MAGIC, len(self.entries))
        sealed = bytearray(len(directory) + TAG_BYTES)
        self._key.encrypt(self.size_bytes, directory, _directory_authenticated(trailer), memoryview(sealed))
        return [self._view[: self.size_bytes], sealed, trailer]


def pack_name(pack_id: bytes) -> str:
    return f"packs/{pack_id.hex()}"


def pack_id_of(name: str) -> bytes | None:
    """The id in a pack's name, or None when it is no pack's name."""
    match = _PACK_NAME.fullmatch(name)
    return None if match is None else bytes.fromhex(match[1])


def directory_bytes(trailer: bytes, pack_bytes: int, name: str, location: str) -> int:
    """How long the directory before a trailer is, with its tag. Raises: RepositoryDamagedError."""
    if len(trailer) != TRAILER.size or trailer[:8] != END_MAGIC or any(trailer[12:]):
        raise _damaged(
            location, name, max(0, pack_bytes - TRAILER.size), "its trailer is not there: it is cut or changed"
        )
    length = int.from_bytes(trailer[8:12]) * ENTRY.size + TAG_BYTES
    if length > ENTRIES_LIMIT * ENTRY.size or HEADER_BYTES + length + TRAILER.size > pack_bytes:
        raise _damaged(location, name, pack_bytes - TRAILER.size + 8, "its directory would be larger than the pack")
    return length


def read_directory(key: PackKey, stored: bytes, trailer: bytes, *, pack_bytes: int, location: str) -> list[PackEntry]:
    """The entries of a pack: authenticated, without gaps, and each within its limits.

    Raises: RepositoryDamagedError.
    """
    name = pack_name(key.pack_id)
    begin = pack_bytes - TRAILER.size - len(stored)
    try:
        directory = key.decrypt(begin, stored, _directory_authenticated(trailer))
    except InvalidTag as error:
        raise _damaged(location, name, begin, "its directory's bytes are not those that were written") from error
    entries, offset = [], HEADER_BYTES
    for chunk_id, stored_bytes, raw_bytes, flags in ENTRY.iter_unpack(directory):
        if not (TAG_BYTES < stored_bytes <= STORED_LIMIT_BYTES and 0 < raw_bytes <= CHUNK_BYTES and flags in (0, 1)):
            raise _damaged(location, name, begin, "its directory names a chunk that cannot be")
        entries.append(PackEntry(chunk_id, offset, stored_bytes, raw_bytes, flags))
        offset += stored_bytes
    if offset != begin:
        raise _damaged(location, name, begin, "its chunks do not fill it")
    return entries


def open_chunk(key: PackKey, entry: PackEntry, stored: Buffer, id_key: bytes, location: str) -> bytes:
    """The content of a chunk: authenticated, of the size that it must have, and its id computed again.

    Raises: RepositoryDamagedError.
    """
    name = pack_name(key.pack_id)
    try:
        payload = key.decrypt(entry.offset, stored, _authenticated(entry.chunk_id, entry.raw_bytes, entry.flags))
        if entry.flags & ZSTD_FLAG:
            if zstandard.frame_content_size(payload) != entry.raw_bytes:
                raise _damaged(location, name, entry.offset, "a chunk would become larger or smaller than it was")
            payload = zstandard.ZstdDecompressor().decompress(payload, allow_extra_data=False)
    except InvalidTag as error:
        raise _damaged(location, name, entry.offset, "a chunk's bytes are not those that were written") from error
    except zstandard.ZstdError as error:
        raise _damaged(location, name, entry.offset, f"a chunk does not decompress: {error}") from error
    if len(payload) != entry.raw_bytes or blake3(payload, key=id_key).digest() != entry.chunk_id:
        raise _damaged(location, name, entry.offset, "a chunk's content does not have its id")
    return payload


def _authenticated(chunk_id: bytes, raw_bytes: int, flags: int) -> bytes:
    assert len(chunk_id) == ID_BYTES
    return chunk_id + raw_bytes.to_bytes(4) + flags.to_bytes(4)


def _directory_authenticated(trailer: bytes) -> bytes:
    return b"directory" + trailer


def _damaged(location: str, name: str, offset: int, why: str) -> RepositoryDamagedError:
    return RepositoryDamagedError(
        f"{location}: {name} is damaged at byte {offset}: {why}", repository=location, name=name, offset=offset
    )
