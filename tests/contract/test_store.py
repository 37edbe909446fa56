"""The suite of every store: SQLite and memory today, etcd later."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mullion.base.errors import ConflictError, NotFoundError, PreconditionError, UnavailableError
from mullion.parent.store import Change, Condition, Delete, HistoryGoneError, MemoryStore, Put, SqliteStore, Store
from mullion.parent.store.protocol import StoreDamagedError

pytestmark = pytest.mark.contract

Scenario = Callable[[Store], Awaitable[None]]
Runner = Callable[[Scenario], None]


@asynccontextmanager
async def opened(kind: str, folder: Path, history_changes: int) -> AsyncIterator[Store]:
    store: Store = (
        MemoryStore(history_changes)
        if kind == "memory"
        else await SqliteStore.open(str(folder / "store.db"), history_changes=history_changes)
    )
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture(params=["memory", "sqlite"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    """Run a scenario on a fresh store of each kind. A store keeps 50 changes here."""

    def runner(scenario: Scenario) -> None:
        async def main() -> None:
            async with opened(request.param, tmp_path, 50) as store:
                async with asyncio.timeout(60):
                    await scenario(store)

        asyncio.run(main())

    return runner


async def take(changes: AsyncIterator[Change], count: int) -> list[Change]:
    return [await anext(changes) for _ in range(count)]


def test_is_a_store(run: Runner) -> None:
    async def scenario(store: Store) -> None:
        assert isinstance(store, Store)

    run(scenario)


def test_reads_back_what_was_put(run: Runner) -> None:
    async def scenario(store: Store) -> None:
        assert await store.get("a") is None
        first = await store.transact([], [Put("a", b"1"), Put("b", b"")])
        second = await store.transact([], [Put("a", b"\x002")])
        assert second == first + 1
        assert await store.get("a") == ("a", b"\x002", second)
        assert await store.get("b") == ("b", b"", first)
        await store.transact([], [Delete("a"), Delete("never there")])
        assert await store.get("a") is None

    run(scenario)


def test_lists_by_prefix_in_order_of_keys(run: Runner) -> None:
    async def scenario(store: Store) -> None:
        keys = ["p/b", "p/a", "p/", "p", "q/a", "p/é", "p/a/x", "o/z"]
        await store.transact([], [Put(key, key.encode()) for key in keys])
        everything = sorted(key for key in keys if key.startswith("p/"))
        assert [entry.key for entry in await store.list("p/")] == everything
        assert [entry.key for entry in await store.list("p/", limit=2)] == everything[:2]
        assert [entry.key for entry in await store.list("p/", after="p/a")] == everything[2:]
        assert [entry.key for entry in await store.list("p/", descending=True)] == everything[::-1]
        assert [entry.key for entry in await store.list("p/", after="p/b", limit=1, descending=True)] == ["p/a/x"]
        assert [entry.key for entry in await store.list("")] == sorted(keys)
        assert not await store.list("nothing/")

    run(scenario)


def test_a_failed_condition_leaves_everything_as_it_was(run: Runner) -> None:
    async def scenario(store: Store) -> None:
        revision = await store.transact([Condition("a", 0)], [Put("a", b"1")])
        for condition in (Condition("a", 0), Condition("a", revision + 1), Condition("gone", revision)):
            with pytest.raises(PreconditionError) as caught:
                await store.transact([Condition("a", revision), condition], [Put("b", b"1"), Delete("a")])
            assert caught.value.context["key"] == condition.key
        assert await store.get("a") == ("a", b"1", revision)
        assert await store.get("b") is None
        assert await store.transact([Condition("a", revision)], [Put("a", b"2")]) == revision + 1

    run(scenario)


def test_of_concurrent_writers_each_increments_exactly_once(run: Runner) -> None:
    async def scenario(store: Store) -> None:
        await store.transact([], [Put("count", b"0")])
        lost = 0

        async def increment() -> None:
            nonlocal lost
            for _ in range(5):
                while True:
                    entry = await store.get("count")
                    assert entry is not None
                    await asyncio.sleep(0)
                    try:
                        await store.transact(
                            [Condition("count", entry.revision)], [Put("count", b"%d" % (int(entry.value) + 1))]
                        )
                        break
                    except PreconditionError:
                        lost += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(increment())
        entry = await store.get("count")
        assert entry is not None
        assert entry.value == b"40"
        assert lost > 0, "the writers never met: the test shows nothing"

    run(scenario)


def test_watch_sees_each_change_of_its_prefix_once_in_order(run: Runner) -> None:
    async def scenario(store: Store) -> None:
        start = await store.transact([], [Put("w/old", b"0")])
        watched = store.watch("w/", start)
        assert await take(watched, 1) == [Change("w/old", b"0", start)]
        pending = asyncio.ensure_future(take(watched, 4))
        await store.transact([], [Put("other", b"x")])
        one = await store.transact([], [Put("w/a", b"1"), Put("w/b", b"2")])
        two = await store.transact([], [Delete("w/a")])
        three = await store.transact([], [Put("w/a", b"3")])
        assert await pending == [
            Change("w/a", b"1", one),
            Change("w/b", b"2", one),
            Change("w/a", None, two),
            Change("w/a", b"3", three),
        ]

    run(scenario)


def test_watch_from_now_on_leaves_out_the_past(run: Runner) -> None:
    async def scenario(store: Store) -> None:
        await store.transact([], [Put("w/old", b"0")])
        watched = store.watch("w/")
        pending = asyncio.ensure_future(take(watched, 1))
        await asyncio.sleep(0)
        revision = await store.transact([], [Put("w/new", b"1")])
        assert await pending == [Change("w/new", b"1", revision)]

    run(scenario)


def test_watch_of_forgotten_changes_says_so(run: Runner) -> None:
    async def scenario(store: Store) -> None:
        first = await store.transact([], [Put("w", b"0")])
        for number in range(1000):
            await store.transact([], [Put("w", b"%d" % number)])
        with pytest.raises(HistoryGoneError):
            await anext(store.watch("w", first))
        entry = await store.get("w")
        assert entry is not None
        assert await take(store.watch("w", entry.revision), 1) == [Change("w", b"999", entry.revision)]

    run(scenario)


def test_a_large_backlog_is_watched_whole(run: Runner) -> None:
    async def scenario(store: Store) -> None:
        revision = await store.transact([], [Put(f"w/{number:04}", b"") for number in range(40)])
        changes = await take(store.watch("w/", revision), 40)
        assert [change.key for change in changes] == [f"w/{number:04}" for number in range(40)]

    run(scenario)


def test_a_lease_takes_its_keys_with_it(run: Runner) -> None:
    async def scenario(store: Store) -> None:
        lease = await store.lease(3600)
        other = await store.lease(3600)
        revision = await store.transact(
            [], [Put("l/a", b"1", lease.id), Put("l/b", b"1", lease.id), Put("l/c", b"1", other.id)]
        )
        await store.transact([], [Put("l/b", b"kept")])
        await lease.renew()
        await lease.revoke()
        await lease.revoke()
        assert [entry.key for entry in await store.list("l/")] == ["l/b", "l/c"]
        assert (await take(store.watch("l/a", revision + 1), 1))[0].value is None
        with pytest.raises(NotFoundError):
            await lease.renew()
        with pytest.raises(NotFoundError):
            await store.transact([], [Put("l/d", b"1", lease.id)])
        assert await store.get("l/d") is None

    run(scenario)


def test_a_lease_that_nobody_renews_runs_out(run: Runner) -> None:
    async def scenario(store: Store) -> None:
        lease = await store.lease(0.02)
        revision = await store.transact([], [Put("l/a", b"1", lease.id)])
        changes = await take(store.watch("l/", revision), 2)
        assert changes[-1].value is None

    run(scenario)


def test_a_closed_store_refuses_and_ends_its_watchers(run: Runner) -> None:
    async def scenario(store: Store) -> None:
        async def follow() -> list[Change]:
            return [change async for change in store.watch("w/")]

        following = asyncio.ensure_future(follow())
        await asyncio.sleep(0)
        await store.close()
        assert await following == []
        with pytest.raises(UnavailableError):
            await store.get("a")
        with pytest.raises(UnavailableError):
            await store.transact([], [Put("a", b"")])
        await store.close()

    run(scenario)


# What only a file can show.


def test_sqlite_keeps_all_but_leased_keys_over_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened("sqlite", tmp_path, 50) as store:
            lease = await store.lease(3600)
            revision = await store.transact([], [Put("kept", b"1"), Put("leased", b"1", lease.id)])
        async with opened("sqlite", tmp_path, 50) as store:
            assert [entry.key for entry in await store.list("")] == ["kept"]
            changes = await take(store.watch("", revision), 3)
            assert changes[-1] == Change("leased", None, revision + 1)
            assert await store.transact([], [Put("kept", b"2")]) == revision + 2

    asyncio.run(main())


def test_sqlite_file_is_private(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened("sqlite", tmp_path, 50) as store:
            await store.transact([], [Put("a", b"1")])
            for file in tmp_path.iterdir():
                assert file.stat().st_mode & 0o077 == 0, file

    asyncio.run(main())


def test_sqlite_is_open_for_one_service_only(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened("sqlite", tmp_path, 50):
            with pytest.raises(ConflictError, match="open in another process"):
                await SqliteStore.open(str(tmp_path / "store.db"))

    asyncio.run(main())


@pytest.mark.parametrize("damage", ["header", "page", "text"])
def test_sqlite_damage_is_said_plainly(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "store.db"

    async def fill() -> None:
        async with opened("sqlite", tmp_path, 50) as store:
            for number in range(50):
                await store.transact([], [Put(f"k/{number}", os.urandom(2000))])

    asyncio.run(fill())
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[0:16] = bytes(16)
    elif damage == "page":
        for page in range(4096, len(content), 4096):
            content[page : page + 512] = os.urandom(512)
    else:
        content = bytearray(b"not a database at all\n" * 300)
    path.write_bytes(content)
    with pytest.raises(StoreDamagedError) as caught:
        asyncio.run(SqliteStore.open(str(path)))  # type: ignore[arg-type]
    assert str(path) in caught.value.message
    assert "recover" in caught.value.remedy
    assert path.read_bytes() == content, "the damaged file was changed"


def test_sqlite_refuses_a_foreign_database_and_a_newer_layout(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    with pytest.raises(StoreDamagedError, match="another program's"):
        asyncio.run(SqliteStore.open(str(foreign)))  # type: ignore[arg-type]

    async def create() -> None:
        await (await SqliteStore.open(str(tmp_path / "newer.db"))).close()

    asyncio.run(create())
    with sqlite3.connect(tmp_path / "newer.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreDamagedError, match="layout 99") as caught:
        asyncio.run(SqliteStore.open(str(tmp_path / "newer.db")))  # type: ignore[arg-type]
    assert "newer" in caught.value.remedy


def test_sqlite_in_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot be opened"):
        asyncio.run(SqliteStore.open(str(tmp_path / "no" / "store.db")))  # type: ignore[arg-type]


WRITER = """
    import asyncio, sys
    from mullion.parent.store import Put, SqliteStore

    async def main():
        store = await SqliteStore.open(sys.argv[1])
        number = int(sys.argv[2])
        while True:
            number += 1
            await store.transact([], [Put("left", b"%d" % number), Put("right", b"%d" % number)])
            sys.stdout.write(f"{number}\\n")
            sys.stdout.flush()

    asyncio.run(main())
"""


def test_sqlite_writer_killed_in_mid_transaction_loses_nothing_acknowledged(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")
    acknowledged = 0
    for _round in range(4):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), path, str(acknowledged)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(40):
                acknowledged = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            for line in writer.stdout:  # acknowledged before the signal arrived
                acknowledged = int(line) if line.endswith("\n") else acknowledged

        async def read() -> int:
            store = await SqliteStore.open(path)
            left, right = await store.get("left"), await store.get("right")
            await store.close()
            assert left is not None
            assert right is not None
            assert left.value == right.value, "half a transaction"
            assert left.revision == right.revision
            return int(left.value)

        found = asyncio.run(read())
        assert acknowledged <= found <= acknowledged + 1
        acknowledged = found


FULL_DISK = """
    import asyncio, os, sys
    from mullion.base.errors import NoSpaceError
    from mullion.parent.store import Put, SqliteStore

    async def main(folder):
        store = await SqliteStore.open(f"{folder}/store.db")
        kept = 0
        with open(f"{folder}/ballast", "wb") as ballast:
            ballast.write(bytes(512 * 1024))
        try:
            while True:
                await store.transact([], [Put(f"k/{kept}", os.urandom(8192))])
                kept += 1
        except NoSpaceError as error:
            assert "store.db" in error.message, error.message
        assert len(await store.list("k/")) == kept > 0
        os.unlink(f"{folder}/ballast")
        await store.transact([], [Put("after", b"1")])
        await store.close()
        store = await SqliteStore.open(f"{folder}/store.db")
        assert len(await store.list("k/")) == kept
        assert await store.get("after") is not None
        await store.close()

    asyncio.run(main(sys.argv[1]))
"""


def test_sqlite_on_a_full_disk_says_so_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    shell = f'mount -t tmpfs -o size=2M none "{tmp_path}" && exec "$0" -c "$1" "{tmp_path}"'
    done = subprocess.run(  # noqa: PLW1510 - the status is asserted below
        [
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            shell,
            sys.executable,
            textwrap.dedent(FULL_DISK),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
