"""The service ends at any step of a change of passphrase: what it has kept opens the repository, and the change goes on."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.unit.repository.disks import PASSPHRASE, QUICK_SCRYPT, opens

from mullion.base.errors import ConflictError, MullionError, OperationFailedError
from mullion.base.paths import HostPaths
from mullion.model.states import OperationState
from mullion.model.views import OperationView
from mullion.parent.events import Events
from mullion.parent.operations import InterruptedError as OperationInterruptedError
from mullion.parent.operations import Operation, Operations
from mullion.parent.store import MemoryStore
from mullion.repository import Repository
from mullion.repository.errors import TargetDeniedError
from mullion.repository.local import FolderBackend
from mullion.services.backup import worker
from mullion.services.backup.passphrase import PassphraseChanges
from mullion.services.backup.repositories import Repositories

pytestmark = pytest.mark.unit

NEW = "another one"


@pytest.fixture(autouse=True)
def guesses_are_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scrypt as quick as it may be: what it costs is not the point here."""
    monkeypatch.setitem(Repository.add_passphrase.__kwdefaults__, "scrypt_log2_n", QUICK_SCRYPT)


class EndedError(BaseException):
    """The service is no more."""


class Steps(Repositories):
    """Repositories whose workers are functions of this process, and which end before a step or after it."""

    fuse = 1 << 30
    refused = ""
    """What the storage does not let workers do."""

    def step(self) -> None:
        if self.fuse == 0:
            raise EndedError
        self.fuse -= 1

    async def work(self, request: Mapping[str, object], operation: Operation | None = None) -> Mapping[str, Any]:
        self.step()
        if request["action"] == self.refused:
            raise TargetDeniedError("the storage says no", remedy="Ask it.")
        done = worker._ACTIONS[str(request["action"])](request, lambda *_: None)
        self.step()
        return done

    async def write_secret(self, name: str, secret: Mapping[str, object]) -> None:
        self.step()
        await super().write_secret(name, secret)
        self.step()


class Host:
    """What of the service a change needs; made again it is the service that was started again."""

    def __init__(self, store: MemoryStore, home: Path) -> None:
        self.place = str(home / "repository")
        self.store = store
        self.events = Events(store)
        self.operations = Operations(store, self.events)
        self.repositories = Steps(store, self.events, HostPaths(f"{home}/data", f"{home}/run"))
        self.changes = PassphraseChanges(self.operations, self.events, self.repositories)

    async def open(self) -> None:
        await self.events.open()
        await self.operations.open()
        await self.repositories.open()
        self.changes.open()

    async def ended(self, operation_id: str) -> Any:
        return await self.operations.wait(operation_id, 30.0)

    async def opens_with_what_is_kept(self) -> bool:
        await self.repositories.ask("near", "list", partition=None)
        return True

    def opens(self, passphrase: str) -> bool:
        return opens(FolderBackend(self.place), passphrase)


async def new_host(home: Path) -> Host:
    host = Host(MemoryStore(), home)
    await host.open()
    Repository.create(FolderBackend.create(host.place), PASSPHRASE, scrypt_log2_n=QUICK_SCRYPT)
    await host.repositories.add("near", host.place, PASSPHRASE, {}, create=False)
    return host


def test_an_end_at_any_step(tmp_path: Path) -> None:
    async def ended_at(fuse: int) -> bool:
        home = tmp_path / str(fuse)
        home.mkdir()
        host = await new_host(home)
        host.repositories.fuse = fuse
        operation = Operation(host.operations, view_of(host), cancellable=False, exclusive=True)
        try:
            await host.changes.change(operation, "near", NEW)
            is_over = True
        except EndedError:
            is_over = False
        again = Host(host.store, home)
        await again.open()
        assert await again.opens_with_what_is_kept()
        assert again.opens(NEW) or not is_over
        if fuse == 0:  # what had not begun is not gone on with
            with pytest.raises(OperationInterruptedError) as interrupted:
                await again.changes.resume(operation)
            assert "mullion backup repository passphrase near" in interrupted.value.remedy
            assert again.opens(PASSPHRASE)
            return False
        await again.changes.resume(operation)
        assert again.opens(NEW)
        assert not again.opens(PASSPHRASE)
        assert len(list(Path(again.place, "keys").iterdir())) == 1
        assert await again.opens_with_what_is_kept()
        return is_over

    fuse = 0
    while not asyncio.run(ended_at(fuse)):
        fuse += 1
    assert fuse > 8


def view_of(host: Host) -> Any:
    now = host.operations.clock()
    return OperationView(
        "op", "backup.passphrase", "repository/near", OperationState.RUNNING, created_at=now, updated_at=now
    )


def test_what_the_storage_refuses(tmp_path: Path) -> None:
    async def refusals() -> None:
        host = await new_host(tmp_path)
        secret = Path(tmp_path, "data/secrets/repository-near.json")
        host.repositories.refused = "add-passphrase"
        first = await host.ended((await host.changes.begin("near", NEW)).id)
        assert first.error.code == "target-denied"
        assert host.opens(PASSPHRASE)
        assert not host.opens(NEW)
        assert NEW not in secret.read_text()

        host.repositories.refused = "remove-slots"
        second = await host.ended((await host.changes.begin("near", NEW)).id)
        assert second.error.code == OperationFailedError.code
        assert "the old one opens it still" in second.error.message
        assert "mullion backup repository passphrase near" in second.error.remedy
        assert host.opens(PASSPHRASE)
        assert host.opens(NEW)

        host.repositories.refused = ""
        third = await host.ended((await host.changes.begin("near", NEW)).id)
        assert third.state is OperationState.SUCCEEDED, third.error
        assert not host.opens(PASSPHRASE)
        assert await host.opens_with_what_is_kept()
        assert PASSPHRASE not in secret.read_text()
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        for entry in await host.store.list(""):
            assert NEW.encode() not in entry.value
            assert PASSPHRASE.encode() not in entry.value

    asyncio.run(refusals())


def test_another_host_has_changed_it(tmp_path: Path) -> None:
    async def elsewhere() -> None:
        host = await new_host(tmp_path)
        theirs = Repository.open(FolderBackend(host.place), PASSPHRASE)
        theirs.remove_slots(theirs.add_passphrase("theirs", scrypt_log2_n=QUICK_SCRYPT), "theirs")
        with pytest.raises(MullionError, match="opens none") as refused:
            await host.opens_with_what_is_kept()
        assert "mullion backup repository set" in refused.value.remedy
        failed = await host.ended((await host.changes.begin("near", NEW)).id)
        assert failed.error.code == "repository-wrong-key"
        assert host.opens("theirs")
        await host.repositories.change_access("near", url=None, passphrase="theirs", credentials=None)
        assert await host.opens_with_what_is_kept()

    asyncio.run(elsewhere())


def test_who_began_before_the_change_asks_again(tmp_path: Path) -> None:
    async def late() -> None:
        host = await new_host(tmp_path)
        work = host.repositories.work

        async def change_first(request: Mapping[str, object], operation: Operation | None = None) -> Mapping[str, Any]:
            host.repositories.work = work  # type: ignore[method-assign]
            await host.ended((await host.changes.begin("near", NEW)).id)
            return await work(request, operation)

        host.repositories.work = change_first  # type: ignore[method-assign]
        assert await host.opens_with_what_is_kept()

    asyncio.run(late())


def test_one_change_at_a_time(tmp_path: Path) -> None:
    async def both() -> None:
        host = await new_host(tmp_path)
        begun = await host.changes.begin("near", NEW)
        with pytest.raises(ConflictError, match="passphrase"):
            await host.changes.begin("near", "a third")
        assert (await host.ended(begun.id)).state is OperationState.SUCCEEDED

    asyncio.run(both())
