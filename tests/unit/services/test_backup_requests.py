"""What is asked of backups that does not fit together, or at the same time as something else: told, and nothing lost."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.framework.controllers import Controllers
from tests.unit.repository.disks import PASSPHRASE, QUICK_SCRYPT

from mullion.base.errors import AlreadyExistsError, ConflictError, InvalidError
from mullion.base.paths import HostPaths
from mullion.base.units import MIB
from mullion.model.definition import DiskAttachment, PartitionDefinition
from mullion.model.parse import explain
from mullion.model.states import OperationState
from mullion.model.views import OperationView
from mullion.parent.operations import Operation
from mullion.parent.store import MemoryStore
from mullion.repository import Repository
from mullion.repository.errors import TargetUnreachableError
from mullion.repository.local import FolderBackend
from mullion.services.backup import worker
from mullion.services.backup.controller import BackupController
from mullion.services.backup.repositories import Repositories
from mullion.services.backup.routes import NewRepository

pytestmark = pytest.mark.unit


class Near(Repositories):
    """Repositories whose workers are functions of this process; one that is stopped waits."""

    gate: asyncio.Event | None = None

    async def work(self, request: Mapping[str, object], operation: Operation | None = None) -> Mapping[str, Any]:
        if self.gate is not None:
            await self.gate.wait()
        return worker._ACTIONS[str(request["action"])](request, lambda *_: None)


class Host:
    """A stopped partition `web`, and a repository in a folder that is known as `near`."""

    def __init__(self, home: Path) -> None:
        self.place = str(home / "repository")
        self.paths = HostPaths(f"{home}/data", f"{home}/run")
        self.store = MemoryStore()

    async def open(self) -> None:
        self.made = made = await Controllers.open(self.store, self.paths)
        self.backups = BackupController(
            store=self.store,
            events=made.events,
            operations=made.operations,
            paths=self.paths,
            partitions=made.partitions,
            checkpoints=made.checkpoints,
            disks=made.disks,
        )
        self.backups.repositories = self.repositories = Near(self.store, made.events, self.paths)
        Repository.create(FolderBackend.create(self.place), PASSPHRASE, scrypt_log2_n=QUICK_SCRYPT)
        await self.repositories.add("near", self.place, PASSPHRASE, {}, create=False)
        await made.disks.create("web", size_bytes=4 * MIB)
        await made.partitions.create(PartitionDefinition(name="web", disks=(DiskAttachment(path="web", id="disk0"),)))
        await made.checkpoints.open()

    async def ended(self, begun: OperationView) -> dict[str, Any]:
        view = await self.made.operations.wait(begun.id)
        assert view.state is OperationState.SUCCEEDED, view.error
        return dict(view.result or {})

    def names(self) -> list[str]:
        return [record.name for record in self.made.checkpoints.records("web")]


def run(home: Path, scenario: Callable[[Host], Awaitable[None]]) -> None:
    async def main() -> None:
        host = Host(home)
        await host.open()
        try:
            await scenario(host)
        finally:
            await host.made.close()

    asyncio.run(main())


def test_two_repositories_of_one_name_at_the_same_time_are_one_with_its_own_passphrase(tmp_path: Path) -> None:
    async def scenario(host: Host) -> None:
        Repository.create(FolderBackend.create(f"{tmp_path}/b"), "other words", scrypt_log2_n=QUICK_SCRYPT)
        host.repositories.gate = asyncio.Event()
        both = [
            asyncio.create_task(host.repositories.add("new", place, words, {}, create=False))
            for place, words in ((host.place, PASSPHRASE), (f"{tmp_path}/b", "other words"))
        ]
        await asyncio.sleep(0)
        host.repositories.gate.set()
        first, second = await asyncio.gather(*both, return_exceptions=True)
        assert not isinstance(first, BaseException)
        assert isinstance(second, AlreadyExistsError)
        assert first.url == host.place
        assert await host.backups.list("new", None) == ()

    run(tmp_path, scenario)


@pytest.mark.parametrize("url", ["backup", "./backup", "sftp:/host/folder", ""])
def test_a_folder_that_depends_on_where_the_service_was_started_is_no_place(tmp_path: Path, url: str) -> None:
    async def scenario(host: Host) -> None:
        with pytest.raises(InvalidError):
            await host.repositories.add("new", url, "words", {}, create=True)
        with pytest.raises(InvalidError):
            await host.repositories.change_access("near", url=url, passphrase=None, credentials=None)

    run(tmp_path, scenario)


def test_who_opens_a_repository_in_no_folder_is_told_how_to_make_one(tmp_path: Path) -> None:
    async def scenario(host: Host) -> None:
        with pytest.raises(TargetUnreachableError, match="there is no folder") as told:
            await host.repositories.add("new", f"{tmp_path}/none", "words", {}, create=False)
        assert "--create" in told.value.remedy

    run(tmp_path, scenario)


@pytest.mark.parametrize("name", ["../../../../escaped", "Web", "a b", "x" * 64, "", "\n"])
def test_a_restored_partitions_name_is_judged_before_a_file_is_made(tmp_path: Path, name: str) -> None:
    async def scenario(host: Host) -> None:
        made = await host.ended(await host.backups.create("web", None))
        before = sorted(os.walk(tmp_path))
        with pytest.raises(AlreadyExistsError if name == "" else InvalidError):
            await host.backups.restore(None, made["backup"], name=name, disk=None, path=None)
        assert sorted(os.walk(tmp_path)) == before

    run(tmp_path, scenario)


def test_a_restore_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    async def scenario(host: Host) -> None:
        made = await host.ended(await host.backups.create("web", None))
        Path(host.paths.disks, "other-disk0.vhd").write_bytes(b"somebody's")
        begun = await host.backups.restore(None, made["backup"], name="other", disk=None, path=None)
        view = await host.made.operations.wait(begun.id)
        assert view.error is not None
        assert view.error.code == "already-exists"
        assert not os.path.exists(host.paths.partition("other").data)

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    "wanted",
    [
        {"name": "other", "disk": "disk0", "path": "x"},
        {"name": None, "disk": "disk0", "path": "x", "instant": True},
        {"name": None, "disk": None, "path": "x"},
    ],
)
def test_a_disk_and_a_whole_partition_are_not_restored_by_one_request(tmp_path: Path, wanted: dict[str, Any]) -> None:
    async def scenario(host: Host) -> None:
        made = await host.ended(await host.backups.create("web", None))
        with pytest.raises(InvalidError, match="not both"):
            await host.backups.restore(None, made["backup"], **wanted)

    run(tmp_path, scenario)


def test_a_prune_takes_names_or_rules(tmp_path: Path) -> None:
    async def scenario(host: Host) -> None:
        made = await host.ended(await host.backups.create("web", None))
        for keep, forget in (({"last": 1}, [made["backup"]]), ({"last": 0}, [])):
            with pytest.raises(InvalidError):
                await host.backups.prune(None, partition=None, keep=keep, forget=forget, dry_run=False)
        assert len(await host.backups.list(None, None)) == 1

    run(tmp_path, scenario)


def test_a_backup_goes_on_while_the_checkpoint_of_an_earlier_one_is_read(tmp_path: Path) -> None:
    async def scenario(host: Host) -> None:
        await host.ended(await host.backups.create("web", None))
        (first,) = host.made.checkpoints.records("web")
        async with host.made.checkpoints.reading("web", first.id):
            await host.ended(await host.backups.create("web", None))
            assert len(host.names()) == 2
            await host.ended(await host.backups.create("web", None))
            assert len(host.names()) == 2
        await host.ended(await host.backups.create("web", None))
        assert len(host.names()) == 1

    run(tmp_path, scenario)


def test_a_repository_is_not_forgotten_while_the_first_backup_into_it_goes_on(tmp_path: Path) -> None:
    async def scenario(host: Host) -> None:
        host.repositories.gate = asyncio.Event()
        begun = await host.backups.create("web", None)
        while not (records := host.made.checkpoints.records("web")) or not host.made.checkpoints._readers:
            await asyncio.sleep(0)
        assert records
        with pytest.raises(ConflictError, match="is being read"):
            await host.backups.remove_repository("near")
        host.repositories.gate.set()
        await host.ended(begun)
        await host.backups.remove_repository("near")
        assert host.names() == []

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    "fields",
    [
        {"passphrase": 271828},
        {"passphrase": "271828" * 200},
        {"passphrase": ""},
        {"credentials": "271828"},
        {"credentials": {"s3_secret_key": 271828}},
        {"credentials": {"sftp_password": [271828]}},
    ],
)
def test_a_secret_that_is_refused_is_not_shown(fields: dict[str, Any]) -> None:
    body = {"name": "near", "url": "/srv/backup", "passphrase": "words", **fields}
    error = explain(json.dumps(body).encode(), NewRepository, source="the request")
    assert error is not None
    assert next(iter(fields)) in error.message
    assert "271828" not in error.message + error.remedy
