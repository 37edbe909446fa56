"""The repository's secret, the keys made of it, and the objects `config` and `keys/…` that guard it.

One random secret of 32 bytes; each use has a key of its own, derived with BLAKE3 (`derive_key` mode). A key slot holds
the secret, encrypted with AES-256-GCM under a key that scrypt makes of a passphrase. Any number of slots may hold it.

`config`, 112 bytes, big-endian:

| offset | size | type | field |
|---|---|---|---|
| 0 | 8 | bytes | `MLNREPO` and a zero |
| 8 | 4 | u32 | version, 1 |
| 12 | 4 | u32 | bytes of a chunk, 65536 |
| 16 | 4 | u32 | ids in a node, 256 |
| 20 | 4 | | zeros |
| 24 | 16 | bytes | id of the repository |
| 40 | 8 | u64 | made at, nanoseconds since 1970 |
| 48 | 32 | bytes | keyed BLAKE3 of bytes 0 to 47 |
| 80 | 32 | bytes | BLAKE3 of bytes 0 to 79, so that damage is told from a wrong passphrase |

`keys/ID`, 156 bytes:

| offset | size | type | field |
|---|---|---|---|
| 0 | 8 | bytes | `MLNKEY`, a zero and the version, 1 |
| 8 | 16 | bytes | id of the repository |
| 24 | 3 | u8 | scrypt: log2 of N, r, p |
| 27 | 5 | | zeros |
| 32 | 32 | bytes | salt |
| 64 | 12 | bytes | nonce |
| 76 | 48 | bytes | the secret, encrypted, and its tag; bytes 0 to 63 are authenticated with it |
| 124 | 32 | bytes | BLAKE3 of bytes 0 to 123 |

Invariants: scrypt is never given more than 256 MiB, whatever a slot says.
Not handled: taking the secret away from somebody who has read it: a new repository is needed for that.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from typing import ClassVar, Final, Self

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from mullion.base.errors import InvalidError
from mullion.base.units import MIB
from mullion.repository.errors import RepositoryDamagedError

VERSION: Final = 1
CHUNK_BYTES: Final = 65536
NODE_IDS: Final = 256
ID_BYTES: Final = 32
SECRET_BYTES: Final = 32
SMALL_OBJECT_BYTES: Final = 4096
"""More than this is not read of `config` or a key slot."""
SCRYPT_LOG2_N: Final = 15
SCRYPT_R: Final = 8
SCRYPT_P: Final = 1
_SCRYPT_LIMIT_BYTES: Final = 256 * MIB
_CONTEXT: Final = "mullion 2026 backup repository v1: "


@dataclass(frozen=True, slots=True)
class Keys:
    """What the secret is used for; never shown."""

    secret: bytes = field(repr=False)
    chunk_id: bytes = field(repr=False)
    node_id: bytes = field(repr=False)
    pack: bytes = field(repr=False)
    seal: bytes = field(repr=False)
    config: bytes = field(repr=False)

    @classmethod
    def of(cls, secret: bytes) -> Self:
        uses = ("chunk id", "node id", "pack", "seal", "config")
        return cls(secret, *(blake3(secret, derive_key_context=_CONTEXT + use).digest() for use in uses))


@dataclass(frozen=True, slots=True)
class Config:
    """What is fixed when a repository is made."""

    NAME: ClassVar = "config"
    STRUCT: ClassVar = struct.Struct(">8s4I16sQ")
    MAGIC: ClassVar = b"MLNREPO\0"
    SIZE_BYTES: ClassVar = 112

    repository_id: bytes
    made_ns: int

    def pack(self, keys: Keys) -> bytes:
        body = self.STRUCT.pack(self.MAGIC, VERSION, CHUNK_BYTES, NODE_IDS, 0, self.repository_id, self.made_ns)
        body += blake3(body, key=keys.config).digest()
        return body + blake3(body).digest()

    @classmethod
    def unpack(cls, found: bytes, location: str) -> Self:
        """Read it before the secret is known. Raises: RepositoryDamagedError; InvalidError for a later version."""
        if len(found) != cls.SIZE_BYTES or found[:8] != cls.MAGIC or blake3(found[:80]).digest() != found[80:]:
            raise _damaged(location, cls.NAME, "it is not what was written")
        _, version, chunk_bytes, node_ids, _, repository_id, made_ns = cls.STRUCT.unpack_from(found)
        if (version, chunk_bytes, node_ids) != (VERSION, CHUNK_BYTES, NODE_IDS):
            raise InvalidError(
                f"{location} is a repository of version {version}, with chunks of {chunk_bytes} bytes",
                remedy=f"This version of Mullion knows version {VERSION}: use the one that made it.",
            )
        return cls(repository_id, made_ns)

    def check(self, found: bytes, keys: Keys, location: str) -> None:
        """Whether the secret's holder wrote it. Raises: RepositoryDamagedError."""
        if found != self.pack(keys):
            raise _damaged(location, self.NAME, "it was not written with this repository's secret")


@dataclass(frozen=True, slots=True)
class KeySlot:
    """The secret under one passphrase."""

    STRUCT: ClassVar = struct.Struct(">8s16s3B5x32s12s48s")
    MAGIC: ClassVar = b"MLNKEY\0\x01"
    SIZE_BYTES: ClassVar = 156

    repository_id: bytes
    log2_n: int
    r: int
    p: int
    salt: bytes
    nonce: bytes
    wrapped: bytes = field(repr=False)

    @classmethod
    def wrap(cls, secret: bytes, passphrase: bytes, repository_id: bytes, log2_n: int = SCRYPT_LOG2_N) -> Self:
        slot = cls(repository_id, log2_n, SCRYPT_R, SCRYPT_P, os.urandom(32), os.urandom(12), bytes(48))
        wrapped = AESGCM(slot._stretch(passphrase)).encrypt(slot.nonce, secret, slot._pack_body()[:64])
        return cls(repository_id, log2_n, slot.r, slot.p, slot.salt, slot.nonce, wrapped)

    def unwrap(self, passphrase: bytes) -> bytes | None:
        """The secret, or None when this is not its passphrase."""
        try:
            return AESGCM(self._stretch(passphrase)).decrypt(self.nonce, self.wrapped, self._pack_body()[:64])
        except InvalidTag:
            return None

    def pack(self) -> bytes:
        body = self._pack_body()
        return body + blake3(body).digest()

    @classmethod
    def unpack(cls, found: bytes, location: str, name: str) -> Self:
        """Raises: RepositoryDamagedError, also for parameters that would take more memory than the limit."""
        if len(found) != cls.SIZE_BYTES or found[:8] != cls.MAGIC or blake3(found[:124]).digest() != found[124:]:
            raise _damaged(location, name, "it is not what was written")
        slot = cls(*cls.STRUCT.unpack_from(found)[1:])
        if slot._pack_body() != found[:124]:
            raise _damaged(location, name, "reserved bytes are not zero")
        if not (10 <= slot.log2_n <= 20 and 1 <= slot.r <= 32 and 1 <= slot.p <= 4):
            raise _damaged(location, name, "its scrypt parameters are out of range")
        if 128 * slot.r << slot.log2_n > _SCRYPT_LIMIT_BYTES:
            raise _damaged(location, name, "its scrypt parameters ask for more than 256 MiB")
        return slot

    def _pack_body(self) -> bytes:
        return self.STRUCT.pack(
            self.MAGIC, self.repository_id, self.log2_n, self.r, self.p, self.salt, self.nonce, self.wrapped
        )

    def _stretch(self, passphrase: bytes) -> bytes:
        return Scrypt(salt=self.salt, length=32, n=1 << self.log2_n, r=self.r, p=self.p).derive(passphrase)


def _damaged(location: str, name: str, why: str) -> RepositoryDamagedError:
    return RepositoryDamagedError(f"{location}: {name} is damaged: {why}", repository=location, name=name)
