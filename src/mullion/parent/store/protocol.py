"""The store: where definitions, operations and events live, whatever keeps them (SQLite, memory, later etcd).

Keys are texts with `/` between their parts, values are bytes. One counter, the *revision*, grows by one with every
transaction; an entry carries the revision of the transaction that wrote it last. Revision 0 means "is not there".

Invariants:
- A transaction happens whole or not at all, and after all transactions with a lower revision.
- When `transact` has returned, the transaction survives a crash of the service and a power cut (memory: neither).
- A watcher sees every change of its prefix once, in order; one that asks for changes already forgotten is told so.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Final, NamedTuple, Protocol, runtime_checkable

from mullion.base.errors import MullionError

HISTORY_CHANGES: Final = 10_000
"""How many changes a store keeps at least for watchers that come late."""


class HistoryGoneError(MullionError):
    """A reader wants to resume at a point that is no longer kept."""

    code = "history-gone"
    exit_code = 4
    http_status = 410
    default_remedy = "Read the present state afresh, then follow from there."


class StoreDamagedError(MullionError):
    """The store's file is not what was written to it."""

    code = "store-damaged"
    exit_code = 8
    http_status = 500
    default_remedy = (
        "Stop the service and keep a copy of the file. Try `sqlite3 FILE .recover | sqlite3 NEW`, or move the file "
        "away to begin with an empty store: disks and running guests are not touched by either."
    )


class Entry(NamedTuple):
    """A key as it is now. `revision` is that of its last write."""

    key: str
    value: bytes
    revision: int


class Change(NamedTuple):
    """One write of one key; `value` is None when the key was deleted."""

    key: str
    value: bytes | None
    revision: int


class Condition(NamedTuple):
    """The key's revision must be exactly this; 0 means that the key must not exist."""

    key: str
    revision: int


class Put(NamedTuple):
    """Write a key. With a lease, the key vanishes with it; without one it is freed of an earlier lease."""

    key: str
    value: bytes
    lease_id: int = 0


class Delete(NamedTuple):
    """Remove a key; no error when it is not there."""

    key: str


Write = Put | Delete


class Lease(Protocol):
    """A promise of life: keys put under it are deleted when it is neither renewed in time nor kept."""

    @property
    def id(self) -> int: ...

    @property
    def ttl_s(self) -> float: ...

    async def renew(self) -> None:
        """Live for another `ttl_s`. Raises: NotFoundError when it has run out."""
        ...

    async def revoke(self) -> None:
        """End it now and delete its keys; may be called again."""
        ...


@runtime_checkable
class Store(Protocol):
    """The contract; `tests/contract/test_store.py` is its suite. Raises everywhere: UnavailableError once closed."""

    async def get(self, key: str) -> Entry | None: ...

    async def list(self, prefix: str, *, after: str = "", limit: int = 0, descending: bool = False) -> Sequence[Entry]:
        """Entries whose key begins with the prefix, in the order of their keys (code points).

        `after` leaves out all keys up to and including it (from it on, when descending); limit 0 means all.
        """
        ...

    async def transact(self, conditions: Sequence[Condition], writes: Sequence[Write]) -> int:
        """Do all writes if all conditions hold, and answer with the transaction's revision.

        Raises: PreconditionError that names the first key whose revision is another one; NoSpaceError;
        NotFoundError for a lease that has run out. In each case nothing was written.
        """
        ...

    def watch(self, prefix: str, from_revision: int = 0) -> AsyncIterator[Change]:
        """Changes of a prefix from a revision on (inclusive); 0 means from now on. Ends when the store is closed.

        Raises: HistoryGoneError when changes from that revision on are no longer kept.
        """
        ...

    async def lease(self, ttl_s: float) -> Lease: ...

    async def close(self) -> None: ...
