"""The directories of packs: what is known of a repository when its index does not say it."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator
from typing import Final

from mullion.base.units import KIB
from mullion.repository.backend import Backend, ObjectMissingError
from mullion.repository.errors import RepositoryDamagedError
from mullion.repository.keys import Keys
from mullion.repository.pack import TRAILER, PackEntry, PackKey, directory_bytes, pack_id_of, pack_name, read_directory

log = logging.getLogger(__name__)

_GUESS_BYTES: Final = 64 * KIB
"""Fetched from the end of a pack, in the hope that its directory is in it."""


def unindexed_packs(backend: Backend, keys: Keys, indexed: Container[bytes]) -> Iterator[tuple[bytes, list[PackEntry]]]:
    """Durable packs that no index names, with their entries: an interrupted backup's, or those of a lost index.

    One that is damaged, or deleted since, is left out; `verify` tells of it. Raises: what the storage raises.
    """
    for listed in list(backend.list("packs")):
        pack_id = pack_id_of(listed.name)
        if pack_id is None or pack_id in indexed:
            continue
        try:
            yield pack_id, load_directory(backend, keys, pack_id, listed.size_bytes)
        except (RepositoryDamagedError, ObjectMissingError) as error:
            log.warning("%s", error)


def load_directory(backend: Backend, keys: Keys, pack_id: bytes, pack_bytes: int) -> list[PackEntry]:
    """The entries of a pack. Raises: RepositoryDamagedError; ObjectMissingError; what the storage raises."""
    name = pack_name(pack_id)
    begin = max(0, pack_bytes - _GUESS_BYTES)
    end = backend.get(name, begin, pack_bytes - begin)
    trailer = end[-TRAILER.size :]
    length = directory_bytes(trailer, pack_bytes, name, backend.location)
    stored = end[-TRAILER.size - length : -TRAILER.size]
    if len(stored) < length:
        stored = backend.get(name, pack_bytes - TRAILER.size - length, length)
    return read_directory(PackKey(pack_id, keys), stored, trailer, pack_bytes=pack_bytes, location=backend.location)
