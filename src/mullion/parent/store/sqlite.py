"""The store of a single host: one SQLite file, one connection, one worker thread.

Spec: SQLite file format 3; WAL (sqlite.org/wal.html). Tables: `entries` (what is), `changes` (what led there, for
watchers), `meta` (the revision, and the last revision that `changes` has forgotten).

Invariants:
- `application_id` and `user_version` tell whose file it is and in which layout; another layout is refused.
- `locking_mode=EXCLUSIVE`: a second service cannot open the file, and a killed one leaves no lock behind.

Durability: `journal_mode=WAL` with `synchronous=FULL`: each commit is fsynced in the log before `transact` returns. A
crash at any point leaves the transactions that were acknowledged, and at most one that was about to be.

Not handled: databases on network filesystems (WAL needs a local one).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from mullion.base.errors import ConflictError, MullionError, NoSpaceError, UnavailableError
from mullion.parent.store.local import LocalStore
from mullion.parent.store.memory import check_condition
from mullion.parent.store.protocol import (
    HISTORY_CHANGES,
    Change,
    Condition,
    Delete,
    Entry,
    StoreDamagedError,
    Write,
)

_T = TypeVar("_T")
APPLICATION_ID: Final = 0x4D554C31  # "MUL1"
SCHEMA_VERSION: Final = 1
_COMPACT_EVERY: Final = 1000

_SCHEMA: Final = f"""
BEGIN;
CREATE TABLE entries (key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL, lease INTEGER NOT NULL)
    WITHOUT ROWID;
CREATE INDEX entries_lease ON entries (lease) WHERE lease <> 0;
CREATE TABLE changes (number INTEGER PRIMARY KEY, revision INTEGER NOT NULL, key TEXT NOT NULL, value BLOB);
CREATE INDEX changes_revision ON changes (revision);
CREATE TABLE meta (name TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('revision', 0), ('forgotten', 0);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""  # noqa: S608 - two constants


class SqliteTable:
    """The database file, open; used by one thread. Raises: what `translated` makes of SQLite's errors."""

    def __init__(self, path: str, history_changes: int = HISTORY_CHANGES) -> None:
        self._path = path
        self._history_changes = history_changes
        with translated(path):
            created = _create_private(path)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0.0)
        try:
            with translated(path):
                self._prepare(created)
                self._revision = self._meta("revision")
                self._forgotten = self._meta("forgotten")
                leased = self._db.execute("SELECT key FROM entries WHERE lease <> 0").fetchall()
            if leased:
                self.transact((), [Delete(key) for (key,) in leased])
        except BaseException:
            self._db.close()
            raise

    @property
    def revision(self) -> int:
        return self._revision

    def get(self, key: str) -> Entry | None:
        with translated(self._path):
            row = self._db.execute("SELECT key, value, revision FROM entries WHERE key = ?", (key,)).fetchone()
        return Entry(*row) if row else None

    def entries(self, prefix: str, after: str, limit: int, descending: bool) -> list[Entry]:
        low, high = _range(prefix)
        bound = ("AND key < ?" if descending else "AND key > ?") if after else ""
        order = "DESC" if descending else "ASC"
        query = (
            "SELECT key, value, revision FROM entries WHERE key >= ? AND key < ?"  # noqa: S608 - constant parts only
            f" {bound} ORDER BY key {order} LIMIT ?"
        )
        with translated(self._path):
            rows = self._db.execute(query, (low, high, *([after] if after else []), limit or -1))
            return [Entry(*row) for row in rows]

    def transact(self, conditions: Sequence[Condition], writes: Sequence[Write]) -> int:
        revision = self._revision + 1
        with translated(self._path), self._transaction():
            for condition in conditions:
                row = self._db.execute("SELECT revision FROM entries WHERE key = ?", (condition.key,)).fetchone()
                check_condition(condition, row[0] if row else 0)
            for write in writes:
                self._write(write, revision)
            self._db.execute("UPDATE meta SET number = ? WHERE name = 'revision'", (revision,))
            forgotten = self._compact() if revision % _COMPACT_EVERY == 0 else self._forgotten
        self._revision, self._forgotten = revision, forgotten
        return revision

    def changes(self, prefix: str, from_revision: int, limit: int) -> list[Change] | None:
        if from_revision <= self._forgotten:
            return None
        low, high = _range(prefix)
        with translated(self._path):
            rows = self._db.execute(
                "SELECT key, value, revision FROM changes WHERE revision >= ? AND key >= ? AND key < ?"
                " ORDER BY number LIMIT ?",
                (from_revision, low, high, limit),
            ).fetchall()
            if len(rows) == limit:  # a transaction is never cut in two
                rows += self._db.execute(
                    "SELECT key, value, revision FROM changes WHERE revision = ? AND key >= ? AND key < ?"
                    " ORDER BY number LIMIT -1 OFFSET ?",
                    (rows[-1][2], low, high, sum(row[2] == rows[-1][2] for row in rows)),
                ).fetchall()
        return [Change(*row) for row in rows]

    def drop_lease(self, lease_id: int) -> int:
        with translated(self._path):
            rows = self._db.execute("SELECT key FROM entries WHERE lease = ?", (lease_id,)).fetchall()
        return self.transact((), [Delete(key) for (key,) in rows]) if rows else self._revision

    def close(self) -> None:
        with translated(self._path):
            self._db.close()

    def _prepare(self, created: bool) -> None:
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        application, version = (self._pragma(name) for name in ("application_id", "user_version"))
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if (application, tables) not in ((APPLICATION_ID, tables), (0, 0)):
            raise StoreDamagedError(f"{self._path} is another program's database", path=self._path)
        if application and version != SCHEMA_VERSION:
            raise StoreDamagedError(
                f"{self._path} has layout {version}, this version of Mullion knows {SCHEMA_VERSION}",
                remedy="Run the version of Mullion that wrote it, or a newer one.",
                path=self._path,
            )
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA cache_size = -1024")
        self._db.execute("PRAGMA journal_size_limit = 4194304")
        if not application:
            self._db.executescript(_SCHEMA)
        elif not created:
            verdict = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise StoreDamagedError(f"{self._path} is damaged: {verdict}", path=self._path)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # some errors, a full disk among them, have rolled back already
                self._db.execute("ROLLBACK")
            raise

    def _write(self, write: Write, revision: int) -> None:
        if isinstance(write, Delete):
            if self._db.execute("DELETE FROM entries WHERE key = ?", (write.key,)).rowcount == 0:
                return
            value = None
        else:
            value = write.value
            self._db.execute(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", (write.key, value, revision, write.lease_id)
            )
        self._db.execute("INSERT INTO changes (revision, key, value) VALUES (?, ?, ?)", (revision, write.key, value))

    def _compact(self) -> int:
        """Forget all but the last changes; the last forgotten revision."""
        row = self._db.execute(
            "SELECT revision FROM changes ORDER BY number DESC LIMIT 1 OFFSET ?", (self._history_changes,)
        ).fetchone()
        if row is None:
            return self._forgotten
        forgotten = int(row[0])
        self._db.execute("DELETE FROM changes WHERE revision <= ?", (forgotten,))
        self._db.execute("UPDATE meta SET number = ? WHERE name = 'forgotten'", (forgotten,))
        return forgotten

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    def _meta(self, name: str) -> int:
        row = self._db.execute("SELECT number FROM meta WHERE name = ?", (name,)).fetchone()
        return int(row[0])


class SqliteStore(LocalStore):
    """The store in a file. `open` it inside a running event loop."""

    def __init__(self, table: SqliteTable, worker: ThreadPoolExecutor) -> None:
        super().__init__(table)
        self._worker = worker
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, path: str, *, history_changes: int = HISTORY_CHANGES) -> SqliteStore:
        """Open the file, create it (mode 0600) if it is not there, and check that it is whole.

        Raises: StoreDamagedError; ConflictError when another process has it open; NoSpaceError.
        """
        worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        try:
            table = await asyncio.get_running_loop().run_in_executor(worker, SqliteTable, path, history_changes)
        except BaseException:
            worker.shutdown(wait=False)
            raise
        return cls(table, worker)

    async def close(self) -> None:
        await super().close()
        self._worker.shutdown(wait=False)

    async def _call(self, work: Callable[[], _T]) -> _T:
        running = self._worker.submit(work)
        running.add_done_callback(self._after_call)
        return await asyncio.shield(asyncio.wrap_future(running))

    def _after_call(self, _done: Future[_T]) -> None:
        """In the worker thread: the watchers learn of it even when the caller was cancelled meanwhile."""
        revision = self._table.revision
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody watches any more
            self._loop.call_soon_threadsafe(self._moved_to, revision)


@contextlib.contextmanager
def translated(path: str) -> Iterator[None]:
    """Turn SQLite's errors into ours.

    Raises: NoSpaceError, ConflictError (open elsewhere), StoreDamagedError, UnavailableError (any other I/O error).
    """
    try:
        yield
    except sqlite3.Error as error:
        raise _ours(error, path) from error
    except OSError as error:
        raise UnavailableError(
            f"{path} cannot be opened: {error.strerror}", remedy="Check the folder's existence and rights.", path=path
        ) from error


def _ours(error: sqlite3.Error, path: str) -> MullionError:
    kind = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if kind == sqlite3.SQLITE_FULL:
        return NoSpaceError(f"no space left for the store, {path}", path=path)
    if kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return ConflictError(
            f"{path} is open in another process",
            remedy="Another `mullion serve` is running on this folder, or a tool has the file open: end it first.",
            path=path,
        )
    if kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreDamagedError(f"{path} is damaged: {error}", path=path)
    return UnavailableError(
        f"the store {path} cannot be used: {error}",
        remedy="Check the disk below it (`dmesg`), then try again.",
        path=path,
    )


def _create_private(path: str) -> bool:
    """Create the file so that only its owner may read it; False when it was there."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return False
    return True


def _range(prefix: str) -> tuple[str, str]:
    """Keys with a prefix are those from it up to, not including, the second text."""
    return prefix, prefix + "\U0010ffff"
