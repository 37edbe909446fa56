"""A storage in memory, for tests of what lies above: it can die, fail and lie at any change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

from mullion.base.block import Buffer
from mullion.repository.backend import Listed, ObjectMissingError


class FakeBackend:
    """A `Backend` whose objects are in `objects`, as bytes by name.

    `before_change` is called before each put and delete with its number, from 0, and may raise: what ends a process
    ends it there, and so does what a storage refuses. `after_change` is the same for an answer that is lost.
    """

    location = "memory"

    def __init__(self, pack_bytes: int = 1 << 20) -> None:
        self.pack_bytes = pack_bytes
        self.objects: dict[str, bytes] = {}
        self.changes = 0
        self.gets = 0
        self.before_change: Callable[[int], None] = lambda number: None
        self.after_change: Callable[[int], None] = lambda number: None
        self._lock = threading.Lock()

    def copy(self) -> FakeBackend:
        """Another storage with the same objects, which works."""
        other = FakeBackend(self.pack_bytes)
        other.objects = dict(self.objects)
        return other

    def put(self, name: str, buffers: Iterable[Buffer], *, durable: bool = True) -> None:
        content = b"".join(buffers)
        with self._change():
            self.objects[name] = content

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self.gets += 1
        if (content := self.objects.get(name)) is None:
            raise ObjectMissingError(f"{self.location}: {name} is missing", repository=self.location, object=name)
        return content[offset:] if length is None else content[offset : offset + length]

    def size(self, name: str) -> int | None:
        content = self.objects.get(name)
        return None if content is None else len(content)

    def list(self, prefix: str) -> Iterator[Listed]:
        begin = f"{prefix}/" if prefix else ""
        with self._lock:
            found = [Listed(name, len(content)) for name, content in self.objects.items() if name.startswith(begin)]
        return iter(found)

    def delete(self, name: str) -> None:
        with self._change():
            self.objects.pop(name, None)

    def settle(self, folder: str) -> None:
        """A change as any other, so that an end may come before it."""
        with self._change():
            pass

    def close(self) -> None:
        pass

    def _change(self) -> _Change:
        return _Change(self, self._lock)


class _Change:
    """One change: counted, and ended where the test wants it."""

    def __init__(self, backend: FakeBackend, lock: threading.Lock) -> None:
        self._backend = backend
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._backend.before_change(self._backend.changes)
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            self._backend.after_change(self._backend.changes)
        finally:
            self._backend.changes += 1
            self._lock.release()
