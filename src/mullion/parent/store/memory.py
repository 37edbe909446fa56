"""The store in memory: for tests, and the plainest statement of what a store does. It ends with its process."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from mullion.base.errors import PreconditionError
from mullion.parent.store.local import LocalStore
from mullion.parent.store.protocol import HISTORY_CHANGES, Change, Condition, Delete, Entry, Put, Write

_T = TypeVar("_T")


class MemoryTable:
    """A dictionary, its keys in order, and the last changes."""

    def __init__(self, history_changes: int = HISTORY_CHANGES) -> None:
        self._entries: dict[str, Entry] = {}
        self._keys: list[str] = []
        self._lease_of: dict[str, int] = {}
        self._history: deque[Change] = deque()
        self._history_changes = history_changes
        self._forgotten = 0
        self._revision = 0

    @property
    def revision(self) -> int:
        return self._revision

    def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def entries(self, prefix: str, after: str, limit: int, descending: bool) -> list[Entry]:
        start = bisect.bisect_left(self._keys, prefix)
        end = bisect.bisect_left(self._keys, True, lo=start, key=lambda key: not key.startswith(prefix))
        if after and descending:
            end = min(end, bisect.bisect_left(self._keys, after))
        elif after:
            start = max(start, bisect.bisect_right(self._keys, after))
        keys = self._keys[start:end]
        if descending:
            keys.reverse()
        return [self._entries[key] for key in (keys[:limit] if limit else keys)]

    def transact(self, conditions: Sequence[Condition], writes: Sequence[Write]) -> int:
        for condition in conditions:
            found = self._entries.get(condition.key)
            check_condition(condition, found.revision if found else 0)
        self._revision += 1
        for write in writes:
            if isinstance(write, Delete):
                self._delete(write.key)
            else:
                self._put(write)
        while len(self._history) > self._history_changes:
            self._forgotten = self._history.popleft().revision
        return self._revision

    def changes(self, prefix: str, from_revision: int, limit: int) -> list[Change] | None:
        if from_revision <= self._forgotten:
            return None
        found: list[Change] = []
        for change in self._history:
            if change.revision < from_revision or not change.key.startswith(prefix):
                continue
            if len(found) >= limit and change.revision != found[-1].revision:
                break
            found.append(change)
        return found

    def drop_lease(self, lease_id: int) -> int:
        keys = [key for key, owner in self._lease_of.items() if owner == lease_id]
        return self.transact((), [Delete(key) for key in keys]) if keys else self._revision

    def close(self) -> None:
        self._entries.clear()

    def _put(self, write: Put) -> None:
        if write.key not in self._entries:
            bisect.insort(self._keys, write.key)
        self._entries[write.key] = Entry(write.key, write.value, self._revision)
        self._history.append(Change(write.key, write.value, self._revision))
        self._lease_of.pop(write.key, None)
        if write.lease_id:
            self._lease_of[write.key] = write.lease_id

    def _delete(self, key: str) -> None:
        if self._entries.pop(key, None) is None:
            return
        del self._keys[bisect.bisect_left(self._keys, key)]
        self._lease_of.pop(key, None)
        self._history.append(Change(key, None, self._revision))


class MemoryStore(LocalStore):
    """A store that lives as long as its object. Made inside a running event loop."""

    def __init__(self, history_changes: int = HISTORY_CHANGES) -> None:
        super().__init__(MemoryTable(history_changes))

    async def _call(self, work: Callable[[], _T]) -> _T:
        try:
            return work()
        finally:
            self._moved_to(self._table.revision)


def check_condition(condition: Condition, present: int) -> None:
    """Raises: PreconditionError when the key's present revision is not the wanted one."""
    if present == condition.revision:
        return
    if condition.revision == 0:
        what = "exists already"
    elif present == 0:
        what = "does not exist any more"
    else:
        what = f"was changed meanwhile (revision {present}, expected {condition.revision})"
    raise PreconditionError(f"{condition.key} {what}", key=condition.key, expected=condition.revision, revision=present)
