"""Where a repository's objects lie: the one small protocol that every storage speaks, and the names of objects.

An object is put once, whole, under a name, and never changed (leases are put again). Names are made of lower-case
letters, digits, `.`, `-` and `/`, at most 200 characters; nothing that a foreign storage lists may be anything else.

Durability: when `put` returns, the object survives a power cut of the storage, as far as the storage can promise that;
while it runs, the object is there whole or not at all. The suite of all: `tests/interop/test_repository_backends.py`.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple, Protocol, TypeVar

from mullion.base.block import Buffer
from mullion.base.errors import MullionError
from mullion.repository.errors import TargetTimeoutError, TargetUnreachableError

log = logging.getLogger(__name__)

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]*(?:/[a-z0-9][a-z0-9.-]*)*")
_NAME_LIMIT: Final = 200
_Result = TypeVar("_Result")


class Listed(NamedTuple):
    """An object as a listing shows it."""

    name: str
    size_bytes: int


class Backend(Protocol):
    """A storage. Its methods may be called from several threads.

    Raises: TargetUnreachableError, TargetTimeoutError, TargetDeniedError, TargetFullError, TargetFaultError.
    """

    @property
    def location(self) -> str:
        """The place as people write it, without any secret."""
        ...

    @property
    def pack_bytes(self) -> int:
        """The size of packs that suits this storage."""
        ...

    def put(self, name: str, buffers: Iterable[Buffer], *, durable: bool = True) -> None:
        """Make the object, or put it in the place of the one that is there; `durable=False` for what may be lost.

        The buffers may be made while they are iterated, and waited for; they can be iterated again. So a storage that
        does one thing at a time collects them first.
        """
        ...

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """A range of an object, less than asked for at its end. Raises: ObjectMissingError."""
        ...

    def size(self, name: str) -> int | None:
        """How many bytes an object has; None when there is none."""
        ...

    def list(self, prefix: str) -> Iterator[Listed]:
        """All objects whose names begin with a folder's name and a slash, or all for an empty text; in any order."""
        ...

    def delete(self, name: str) -> None:
        """Take an object away; one that is not there is no error. A power cut may bring it back, until `settle`."""
        ...

    def settle(self, folder: str) -> None:
        """Let a power cut leave the names in a folder as they are, where the storage can promise that.

        Whoever made them or took them away: one that died may not have come to it, and what is not there now must not
        come back when that is built on.
        """
        ...

    def close(self) -> None:
        """Give back connections; may be called again."""
        ...


class ObjectMissingError(MullionError):
    """An object of the repository is not there."""

    code = "repository-object-missing"
    exit_code = 8
    http_status = 422
    default_remedy = "`mullion backup verify` says what is missing and which backups are hurt by it."


def is_name(text: str) -> bool:
    """Whether a text can be an object's name at all: what a hostile storage lists must be."""
    return len(text) <= _NAME_LIMIT and _NAME.fullmatch(text) is not None


class Patience(NamedTuple):
    """How often and how long a remote storage is tried again."""

    tries: int = 5
    first_wait_s: float = 0.5
    longest_wait_s: float = 8.0

    def waits_s(self) -> Iterator[float]:
        """The pauses between the tries."""
        wait_s = self.first_wait_s
        for _ in range(self.tries - 1):
            yield wait_s
            wait_s = min(self.longest_wait_s, wait_s * 2)


_PATIENCE: Final = Patience()


class Persistent:
    """A storage over a network, tried again when the way to it failed: every operation may be repeated.

    What the storage refuses (denied, full, missing) is not tried again.
    """

    def __init__(
        self, inner: Backend, patience: Patience = _PATIENCE, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._inner = inner
        self._patience = patience
        self._sleep = sleep

    @property
    def location(self) -> str:
        return self._inner.location

    @property
    def pack_bytes(self) -> int:
        return self._inner.pack_bytes

    def put(self, name: str, buffers: Iterable[Buffer], *, durable: bool = True) -> None:
        self._try(lambda: self._inner.put(name, buffers, durable=durable))

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._try(lambda: self._inner.get(name, offset, length))

    def size(self, name: str) -> int | None:
        return self._try(lambda: self._inner.size(name))

    def list(self, prefix: str) -> Iterator[Listed]:
        return iter(self._try(lambda: list(self._inner.list(prefix))))

    def delete(self, name: str) -> None:
        self._try(lambda: self._inner.delete(name))

    def settle(self, folder: str) -> None:
        self._try(lambda: self._inner.settle(folder))

    def close(self) -> None:
        self._inner.close()

    def _try(self, act: Callable[[], _Result]) -> _Result:
        for wait_s in self._patience.waits_s():
            try:
                return act()
            except (TargetUnreachableError, TargetTimeoutError) as error:
                log.warning("%s: %s; again in %.1f s", self.location, error, wait_s)
                self._sleep(wait_s)
        return act()
