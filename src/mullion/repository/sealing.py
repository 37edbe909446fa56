"""Sealed objects: manifests, index segments and leases, each encrypted and authenticated as one piece.

| offset | size | type | field |
|---|---|---|---|
| 0 | 8 | bytes | `MLNSEAL1` |
| 8 | 1 | u8 | kind, see `Kind` |
| 9 | 7 | | zeros |
| 16 | 16 | bytes | salt, random: the key is keyed BLAKE3 of it |
| 32 | n | bytes | AES-256-GCM of the payload, compressed with zstd unless the kind is INDEX; then the tag |

The header and the object's own name are authenticated with the payload: no byte can change, and no object can take
another's place. The key is used once, so the nonce is zeros.
"""

from __future__ import annotations

import os
import struct
from enum import IntEnum
from typing import Final

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mullion.base.block import Buffer
from mullion.base.units import GIB, MIB
from mullion.repository.backend import Backend
from mullion.repository.errors import RepositoryDamagedError
from mullion.repository.keys import Keys

HEADER: Final = struct.Struct(">8sB7x16s")
MAGIC: Final = b"MLNSEAL1"
PAYLOAD_LIMIT_BYTES: Final = 64 * MIB
"""Of a compressed payload: what a manifest may become."""
OBJECT_LIMIT_BYTES: Final = 8 * GIB
"""Of an index segment: more than that is no memory for; 11 TiB of chunks. Other kinds are far below."""
_NONCE: Final = bytes(12)
_TAG_BYTES: Final = 16


class Kind(IntEnum):
    """What a sealed object is."""

    MANIFEST = 1
    INDEX = 2
    LEASE = 3


def seal(kind: Kind, name: str, payload: Buffer, keys: Keys) -> bytes:
    """The object of a payload; different every time."""
    header = HEADER.pack(MAGIC, kind, os.urandom(16))
    content = payload if kind is Kind.INDEX else zstandard.ZstdCompressor(level=3).compress(payload)
    return header + AESGCM(_key(header, keys)).encrypt(_NONCE, content, header + name.encode())


def fetch(kind: Kind, name: str, backend: Backend, keys: Keys) -> bytes:
    """The payload of a stored object; one that is larger than its kind can be is not read to its end.

    Raises: ObjectMissingError; RepositoryDamagedError; what the storage raises.
    """
    limit = OBJECT_LIMIT_BYTES if kind is Kind.INDEX else PAYLOAD_LIMIT_BYTES
    return unseal(kind, name, backend.get(name, 0, limit), keys, backend.location)


def unseal(kind: Kind, name: str, found: bytes, keys: Keys, location: str) -> bytes:
    """The payload of an object. Raises: RepositoryDamagedError."""
    why = None
    if len(found) < HEADER.size + _TAG_BYTES:
        why = "it is cut"
    elif found[:8] != MAGIC or found[8] != kind or any(found[9:16]):
        why = "it is no object of this kind"
    else:
        header = found[: HEADER.size]
        try:
            content = AESGCM(_key(header, keys)).decrypt(_NONCE, found[HEADER.size :], header + name.encode())
            if kind is Kind.INDEX:
                return content
            if not 0 <= zstandard.frame_content_size(content) <= PAYLOAD_LIMIT_BYTES:
                raise zstandard.ZstdError("its size is not given, or beyond the limit")
            return zstandard.ZstdDecompressor().decompress(content, allow_extra_data=False)
        except InvalidTag:
            why = "its bytes are not those that were written"
        except zstandard.ZstdError as error:
            why = f"it does not decompress: {error}"
    raise RepositoryDamagedError(f"{location}: {name} is damaged: {why}", repository=location, name=name)


def _key(header: bytes, keys: Keys) -> bytes:
    return blake3(header, key=keys.seal).digest()
