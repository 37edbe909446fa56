"""Which passphrases open a repository, and how one takes the place of the others (`slots`)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest
from tests.unit.repository.disks import CHUNK, PASSPHRASE, QUICK_SCRYPT, MemoryDisk, back_up, new_repository, opens

from mullion.base.errors import InvalidError
from mullion.repository import Repository
from mullion.repository.backend import Listed
from mullion.repository.errors import RepositoryDamagedError, WrongKeyError

pytestmark = pytest.mark.unit


def test_a_passphrase_takes_the_place_of_the_others() -> None:
    repository, backend = new_repository()
    manifest = back_up(repository, MemoryDisk(b"x" * CHUNK))
    replaced = repository.add_passphrase("the second", scrypt_log2_n=QUICK_SCRYPT)
    assert Repository.open(backend, PASSPHRASE).backup(manifest.id) == manifest
    assert Repository.open(backend, "the second").backup(manifest.id) == manifest
    repository.remove_slots(replaced, "the second")
    assert Repository.open(backend, "the second").backup(manifest.id) == manifest
    with pytest.raises(WrongKeyError, match=r"\(1\)") as refused:
        Repository.open(backend, PASSPHRASE)
    assert "mullion backup repository set" in refused.value.remedy
    for bad in ("", "x" * 1025):
        with pytest.raises(InvalidError, match="bytes"):
            repository.add_passphrase(bad)
    left = [name for name in backend.objects if name.startswith("keys/")]
    assert len(left) == 1
    with pytest.raises(RepositoryDamagedError, match="missing"):
        repository.remove_slots(left, "the second")
    assert left[0] in backend.objects, "the last one is never deleted"


def test_a_slot_that_the_storage_does_not_give_back_replaces_none() -> None:
    repository, backend = new_repository()

    def damage(_number: int) -> None:
        name = next(reversed(backend.objects))
        backend.objects[name] = backend.objects[name][:-1] + b"?"

    backend.after_change = damage
    with pytest.raises(RepositoryDamagedError):
        repository.add_passphrase("the second", scrypt_log2_n=QUICK_SCRYPT)
    assert Repository.open(backend, PASSPHRASE).keys == repository.keys


@pytest.mark.parametrize("order", sorted(set(itertools.permutations("aabb"))))
def test_two_who_change_the_passphrase_at_once_shut_nobody_out(order: tuple[str, ...]) -> None:
    repository, backend = new_repository()
    replaced: dict[str, tuple[str, ...]] = {}
    for who in order:
        if who not in replaced:
            replaced[who] = repository.add_passphrase(who, scrypt_log2_n=QUICK_SCRYPT)
        else:
            with contextlib.suppress(WrongKeyError):  # the other's is the one
                repository.remove_slots(replaced[who], who)
    opened = [who for who in "ab" if opens(backend, who)]
    assert opened
    assert not opens(backend, PASSPHRASE)


def test_two_who_have_listed_before_either_put_keep_both() -> None:
    repository, backend = new_repository()
    others: list[tuple[str, ...]] = []

    def other_first(_number: int) -> None:
        backend.before_change = lambda number: None
        backend._lock.release()
        others.append(repository.add_passphrase("b", scrypt_log2_n=QUICK_SCRYPT))
        backend._lock.acquire()

    backend.before_change = other_first
    mine = repository.add_passphrase("a", scrypt_log2_n=QUICK_SCRYPT)
    assert [mine] == others
    repository.remove_slots(mine, "a")
    repository.remove_slots(others[0], "b")
    assert opens(backend, "a")
    assert opens(backend, "b")
    assert not opens(backend, PASSPHRASE)


def test_it_opens_while_its_passphrase_is_being_changed() -> None:
    """The slot that was listed is gone when it is read; the one that took its place is found."""
    repository, backend = new_repository()
    (old,) = repository.add_passphrase(PASSPHRASE, scrypt_log2_n=QUICK_SCRYPT)
    listing, found = backend.list, backend.objects[old]

    def outdated(prefix: str) -> Iterator[Listed]:
        backend.list = listing  # type: ignore[method-assign]
        del backend.objects[old]
        return iter([Listed(old, len(found))] if prefix == "keys" else [])

    backend.list = outdated  # type: ignore[method-assign]
    assert Repository.open(backend, PASSPHRASE).keys == repository.keys
