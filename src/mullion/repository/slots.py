"""The key slots of a repository: which passphrases open it, and how one takes another's place.

    names that are there ─► a new slot is put, durable, and read back ─► the names from the beginning are deleted

Invariants: a slot is deleted only by who listed it before putting one of its own, so the slot that was put last is
always there: ended at any change, or done by several at once, some passphrase that was given opens the repository.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from typing import Final

from mullion.base.errors import InvalidError
from mullion.repository.backend import Backend, ObjectMissingError, is_name
from mullion.repository.errors import RepositoryDamagedError, WrongKeyError
from mullion.repository.keys import SMALL_OBJECT_BYTES, Config, KeySlot

KEYS_FOLDER: Final = "keys"
PASSPHRASE_LIMIT_BYTES: Final = 1024
_LIST_TRIES: Final = 5


def slot_names(backend: Backend) -> tuple[str, ...]:
    """The slots that are there. Raises: what the storage raises."""
    return tuple(sorted(listed.name for listed in backend.list(KEYS_FOLDER) if is_name(listed.name)))


def put_slot(backend: Backend, config: Config, secret: bytes, passphrase: str, scrypt_log2_n: int) -> str:
    """Let a passphrase open the repository, durably; the slot's name.

    Raises: InvalidError for a passphrase that is empty or too long; what the storage raises.
    """
    slot = KeySlot.wrap(secret, passphrase_bytes(passphrase), config.repository_id, scrypt_log2_n)
    name = f"{KEYS_FOLDER}/{uuid.uuid4().hex}"
    backend.put(name, [slot.pack()])
    return name


def unlock(backend: Backend, config: Config, passphrase: str, *, only: Collection[str] | None = None) -> bytes:
    """The secret, from any slot or from one of those named `only`. A damaged slot is told only when no other opens.

    Raises: WrongKeyError; RepositoryDamagedError; InvalidError; what the storage raises.
    """
    words = passphrase_bytes(passphrase)
    damage: RepositoryDamagedError | None = None
    refused: set[str] = set()
    for _ in range(_LIST_TRIES):
        has_vanished = False
        for name in slot_names(backend):
            if name in refused or (only is not None and name not in only):
                continue
            try:
                slot = KeySlot.unpack(backend.get(name, 0, SMALL_OBJECT_BYTES), backend.location, name)
            except ObjectMissingError:  # the passphrase is being changed: another slot took its place
                has_vanished = True
                continue
            except RepositoryDamagedError as error:
                damage = error
                continue
            if slot.repository_id == config.repository_id and (secret := slot.unwrap(words)) is not None:
                return secret
            refused.add(name)
        if not has_vanished:
            break
    if damage is not None:
        raise damage
    if not refused:
        raise RepositoryDamagedError(
            f"{backend.location}: all of its keys are missing",
            repository=backend.location,
            name=KEYS_FOLDER,
            remedy="Bring back the folder `keys` from a copy of the repository: nothing can be read without.",
        )
    raise WrongKeyError(
        f"{backend.location}: the passphrase opens none of the repository's keys ({len(refused)})",
        repository=backend.location,
    )


def passphrase_bytes(passphrase: str) -> bytes:
    """Raises: InvalidError for one that is empty or too long."""
    encoded = passphrase.encode()
    if not encoded or len(encoded) > PASSPHRASE_LIMIT_BYTES:
        raise InvalidError(
            f"the passphrase has {len(encoded)} bytes", remedy=f"Choose one of 1 to {PASSPHRASE_LIMIT_BYTES} bytes."
        )
    return encoded
