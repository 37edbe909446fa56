"""What both local stores share: watchers that are woken, leases that the event loop times, one caller at a time.

A `Table` does the work synchronously; `LocalStore` calls it through `_call`, in place or in a worker thread. A watcher
holds no queue: it remembers the next revision it wants, sleeps until the store is past it, and reads the changes
from the table's history. A slow watcher therefore costs nothing, and one that is too slow is told so.

Leases do not survive the process, because the process that would renew them does not either: a table that is opened
drops the leased keys that it finds.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Final, Protocol, TypeVar

from mullion.base.errors import NotFoundError, UnavailableError
from mullion.parent.store.protocol import Change, Condition, Entry, HistoryGoneError, Write

_T = TypeVar("_T")
_READ_CHANGES: Final = 500


class Table(Protocol):
    """The synchronous inside of a local store; only one caller at a time."""

    @property
    def revision(self) -> int: ...

    def get(self, key: str) -> Entry | None: ...

    def entries(self, prefix: str, after: str, limit: int, descending: bool) -> list[Entry]: ...

    def transact(self, conditions: Sequence[Condition], writes: Sequence[Write]) -> int: ...

    def changes(self, prefix: str, from_revision: int, limit: int) -> list[Change] | None:
        """Changes in order; None when some of that time are no longer kept. The last revision is never cut in two."""
        ...

    def drop_lease(self, lease_id: int) -> int:
        """Delete the keys under a lease; the present revision."""
        ...

    def close(self) -> None: ...


class LocalLease:
    """A lease timed by the event loop of this process."""

    def __init__(self, store: LocalStore, lease_id: int, ttl_s: float) -> None:
        self._store = store
        self._id = lease_id
        self._ttl_s = ttl_s
        self._timer = asyncio.get_running_loop().call_later(ttl_s, self._expire)

    @property
    def id(self) -> int:
        return self._id

    @property
    def ttl_s(self) -> float:
        return self._ttl_s

    async def renew(self) -> None:
        if not self._store.has_lease(self._id):
            raise NotFoundError(
                f"lease {self._id} has run out", remedy="Take a new lease and write its keys again.", lease=self._id
            )
        self.cancel_timer()
        self._timer = asyncio.get_running_loop().call_later(self._ttl_s, self._expire)

    async def revoke(self) -> None:
        self.cancel_timer()
        await self._store.end_lease(self._id)

    def cancel_timer(self) -> None:
        self._timer.cancel()

    def _expire(self) -> None:
        self._store.spawn_end_lease(self._id)


class LocalStore(abc.ABC):
    """A store of one process over a `Table`. Implements `mullion.parent.store.protocol.Store`."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._revision = table.revision
        self._moved = asyncio.Event()
        self._closed = False
        self._leases: dict[int, LocalLease] = {}
        self._next_lease_id = 1
        self._tasks: set[asyncio.Task[None]] = set()

    @abc.abstractmethod
    async def _call(self, work: Callable[[], _T]) -> _T:
        """Run a piece of work on the table; a caller that is cancelled does not take the work back."""

    async def get(self, key: str) -> Entry | None:
        self._check_open()
        return await self._call(lambda: self._table.get(key))

    async def list(self, prefix: str, *, after: str = "", limit: int = 0, descending: bool = False) -> Sequence[Entry]:
        self._check_open()
        return await self._call(lambda: self._table.entries(prefix, after, limit, descending))

    async def transact(self, conditions: Sequence[Condition], writes: Sequence[Write]) -> int:
        self._check_open()
        for write in writes:
            lease_id = getattr(write, "lease_id", 0)
            if lease_id and lease_id not in self._leases:
                raise NotFoundError(
                    f"lease {lease_id} has run out", remedy="Take a new lease and try again.", lease=lease_id
                )
        return await self._call(lambda: self._table.transact(conditions, writes))

    async def watch(self, prefix: str, from_revision: int = 0) -> AsyncIterator[Change]:
        self._check_open()
        wanted = from_revision or self._revision + 1
        while True:
            while self._revision < wanted:
                if self._closed:
                    return
                await self._moved.wait()
            if self._closed:
                return
            reached = self._revision
            changes = await self._call(partial(self._table.changes, prefix, wanted, _READ_CHANGES))
            if changes is None:
                raise HistoryGoneError(f"changes from revision {wanted} on are no longer kept", revision=wanted)
            wanted = changes[-1].revision + 1 if len(changes) >= _READ_CHANGES else max(reached + 1, wanted)
            if changes:
                wanted = max(wanted, changes[-1].revision + 1)
            for change in changes:
                yield change

    async def lease(self, ttl_s: float) -> LocalLease:
        self._check_open()
        lease_id = self._next_lease_id
        self._next_lease_id += 1
        self._leases[lease_id] = LocalLease(self, lease_id, ttl_s)
        return self._leases[lease_id]

    async def close(self) -> None:
        """End the watchers and give back the file; leased keys stay until the next opening."""
        if self._closed:
            return
        self._closed = True
        self._wake()
        for lease in self._leases.values():
            lease.cancel_timer()
        for task in list(self._tasks):
            await asyncio.wait([task])
        await self._call(self._table.close)

    def has_lease(self, lease_id: int) -> bool:
        return lease_id in self._leases

    async def end_lease(self, lease_id: int) -> None:
        """Forget a lease and delete its keys."""
        if self._leases.pop(lease_id, None) is not None:
            await self._call(lambda: self._table.drop_lease(lease_id))

    def spawn_end_lease(self, lease_id: int) -> None:
        """End a lease from a timer; the task is awaited by `close`."""
        task = asyncio.get_running_loop().create_task(self.end_lease(lease_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError("the store is closed", remedy="Wait until the service has ended, then start it.")

    def _moved_to(self, revision: int) -> None:
        """The table has reached a revision: wake the watchers."""
        if revision > self._revision:
            self._revision = revision
            self._wake()

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()
