"""What is beside repositories and restores, and goes: copies of an index, and what leads to a backup's server."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.framework.controllers import Controllers

from mullion.base.paths import HostPaths
from mullion.base.units import MIB
from mullion.model.definition import DiskAttachment, PartitionDefinition
from mullion.parent.events import Events
from mullion.parent.operations import Operation
from mullion.parent.store import MemoryStore
from mullion.services.backup.instant import Homecomings
from mullion.services.backup.repositories import Repositories
from mullion.services.partition.record import BackupOrigin, DiskLayers
from mullion.vhd import create_differencing, create_dynamic

pytestmark = pytest.mark.unit


class Known(Repositories):
    """Repositories that are all there."""

    async def work(self, request: Mapping[str, object], operation: Operation | None = None) -> Mapping[str, Any]:
        return {"repository_id": "ab" * 16}


def test_a_repository_is_forgotten_while_a_worker_keeps_a_copy_of_its_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = HostPaths(str(tmp_path / "data"), str(tmp_path / "run"))
    copies = Path(paths.index_cache("far"))
    copies.mkdir(parents=True)
    (copies / ("0" * 32)).write_bytes(b"sealed")
    rmdir = os.rmdir

    def rmdir_too_late(path: str, **where: Any) -> None:
        (copies / ("1" * 32)).write_bytes(b"sealed meanwhile")
        rmdir(path, **where)

    async def forget() -> list[str]:
        store = MemoryStore()
        events = Events(store)
        await events.open()
        repositories = Known(store, events, paths)
        await repositories.add("far", "sftp://host/folder", "words", {}, create=False)
        monkeypatch.setattr(os, "rmdir", rmdir_too_late)
        await repositories.remove("far")
        assert repositories.views() == ()
        again = Known(store, events, paths)
        await again.open()
        assert again.views() == ()
        await events.flush()
        told = [event.kind for event in (await events.read()).events]
        await events.close()
        return told

    assert asyncio.run(forget())[-1] == "backup.repository-removed"
    assert [path.name for path in copies.iterdir()] == ["1" * 32]
    assert not os.path.exists(f"{paths.secrets}/repository-far.json")


def test_a_stopped_partition_has_its_backups_server_ended_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked at often, and may be stopped for long: there is nothing more to be removed then."""
    paths = HostPaths(str(tmp_path / "data"), str(tmp_path / "run"))
    base, head = (f"{paths.disks}/now-disk0{end}" for end in (".vhd", "-1.avhd"))
    os.makedirs(paths.disks)
    create_dynamic(base, MIB)
    create_differencing(head, base)
    removed: list[str] = []
    rmtree = shutil.rmtree

    def rmtree_told(path: str, **how: Any) -> None:
        removed.append(path)
        rmtree(path, **how)

    monkeypatch.setattr(shutil, "rmtree", rmtree_told)

    async def look_thrice() -> str:
        made = await Controllers.open(MemoryStore(), paths)
        homecomings = Homecomings(
            operations=made.operations,
            events=made.events,
            paths=paths,
            partitions=made.partitions,
            checkpoints=made.checkpoints,
            source=lambda _: pytest.fail("nothing is read here"),
        )
        await made.partitions.create(
            PartitionDefinition(name="now", disks=(DiskAttachment(path="now-disk0", id="disk0"),)),
            layers={"disk0": DiskLayers(head, {base: None, head: base}, is_coming_home=True)},
            origin=BackupOrigin("far", "ab" * 8, ("disk0",)),
        )
        partition = made.partitions.find("now")
        os.makedirs(partition.runtime.paths.backing_dir)

        async def look(operation: Operation) -> Mapping[str, object]:
            return {"home": [await homecomings._turn(operation, partition) for _ in range(3)]}

        ended = await made.operations.wait((await made.operations.start("look", "partition/now", look)).id)
        assert ended.result == {"home": [False] * 3}
        await made.close()
        return partition.runtime.paths.backing_dir

    backing_dir = asyncio.run(look_thrice())
    assert removed == [backing_dir]
    assert not os.path.exists(backing_dir)
