"""Two ask for checkpoints at the same time: one is served after the other, and who comes too late is told so."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from tests.framework.controllers import Controllers

from mullion.base.errors import ConflictError, InvalidError, NotFoundError
from mullion.base.paths import HostPaths
from mullion.base.units import MIB
from mullion.model.definition import Accelerator, DiskAttachment, PartitionDefinition
from mullion.model.states import OperationState
from mullion.model.views import OperationView
from mullion.parent.store import MemoryStore
from mullion.services.checkpoint import keeper
from mullion.services.checkpoint.layers import Merge
from mullion.services.checkpoint.record import CheckpointRecord
from mullion.services.partition.partition import Partition
from mullion.services.partition.record import SavedState
from mullion.services.partition.run_file import Run
from mullion.vhd.layer_merge import LayerFiles, merge_layer

pytestmark = pytest.mark.unit


async def ended(made: Controllers, begun: OperationView) -> OperationView:
    view = await made.operations.wait(begun.id)
    assert view.state is OperationState.SUCCEEDED, view.error
    return view


def with_checkpoints(
    tmp_path: Path, names: tuple[str, ...], scenario: Callable[[Controllers], Awaitable[None]]
) -> None:
    """A stopped partition `web` with checkpoints of these names, each made on the one before."""

    async def main() -> None:
        made = await Controllers.open(MemoryStore(), HostPaths(str(tmp_path / "data"), str(tmp_path / "run")))
        try:
            await made.disks.create("web", size_bytes=4 * MIB)
            await made.partitions.create(
                PartitionDefinition(name="web", disks=(DiskAttachment(path="web", id="disk0"),))
            )
            await made.checkpoints.open()
            for name in names:
                await ended(made, await made.checkpoints.create("web", checkpoint=name))
            await scenario(made)
        finally:
            await made.close()

    asyncio.run(main())


async def removals(made: Controllers, *records: CheckpointRecord) -> list[BaseException | None]:
    """Each is asked for while somebody else has the partition: all of them are in when the first one begins."""
    async with made.partitions.find("web").lock:
        tasks = [asyncio.create_task(made.checkpoints.remove("web", [record])) for record in records]
        await asyncio.sleep(0)
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_who_deletes_a_checkpoint_that_another_has_deleted_is_told(tmp_path: Path) -> None:
    async def scenario(made: Controllers) -> None:
        record = made.checkpoints.find("web", "a")
        first, second = await removals(made, record, record)
        assert first is None
        assert isinstance(second, NotFoundError)
        assert "checkpoint a " in second.message
        assert made.checkpoints.records("web") == ()

    with_checkpoints(tmp_path, ("a",), scenario)


def test_a_checkpoint_and_what_it_was_made_on_are_deleted_at_once(tmp_path: Path) -> None:
    async def at_the_end(made: Controllers) -> None:
        find = made.checkpoints.find
        assert await removals(made, find("web", "b"), find("web", "c")) == [None, None]
        assert made.checkpoints.tree("web").present == find("web", "a").id

    with_checkpoints(tmp_path / "1", ("a", "b", "c"), at_the_end)

    async def with_one_above(made: Controllers) -> None:
        await ended(made, await made.checkpoints.create("web", checkpoint="d"))
        find = made.checkpoints.find
        assert await removals(made, find("web", "b"), find("web", "c")) == [None, None]
        assert find("web", "d").parent == find("web", "a").id

    with_checkpoints(tmp_path / "2", ("a", "b", "c"), with_one_above)


def test_a_checkpoint_that_is_being_applied_is_not_deleted(tmp_path: Path) -> None:
    async def scenario(made: Controllers) -> None:
        record = made.checkpoints.find("web", "a")
        async with made.partitions.find("web").lock:
            applying = await made.checkpoints.apply("web", "a")
            while record.id not in made.checkpoints._applied:
                await asyncio.sleep(0)
            with pytest.raises(ConflictError, match="being applied"):
                await made.checkpoints.remove("web", [record])
        await ended(made, applying)
        assert made.checkpoints.tree("web").present == record.id
        await made.checkpoints.remove("web", [record])

    with_checkpoints(tmp_path, ("a", "b"), scenario)


def test_a_checkpoint_whose_disks_a_merge_moves_while_the_guest_is_turned_off_is_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(made: Controllers) -> None:
        partition, checkpoints = made.partitions.find("web"), made.checkpoints
        before = checkpoints.find("web", "b").disks[0].path

        async def merge_here(_partition: Partition, _disk: str, act: Merge, *_: object) -> None:
            with LayerFiles.open(act.upper, act.lower) as files:
                merge_layer(files)

        async def stop(*_: object) -> None:
            off.undo()
            await ended(made, await checkpoints.delete("web", "a"))

        monkeypatch.setattr(keeper, "merge_layer", merge_here)
        off = pytest.MonkeyPatch()
        off.setattr(partition, "has_processes", lambda: True)
        off.setattr(partition, "stop", stop)
        await ended(made, await checkpoints.apply("web", "b"))
        record = checkpoints.find("web", "b")
        assert record.disks[0].path != before
        layers = partition.record.layers["disk0"]
        assert layers.parents[layers.head] == record.disks[0].path

    with_checkpoints(tmp_path, ("a", "b"), scenario)


def test_memory_and_frozen_filesystems_exclude_each_other(tmp_path: Path) -> None:
    async def scenario(made: Controllers) -> None:
        with pytest.raises(InvalidError, match="freezes no filesystems"):
            await made.checkpoints.create("web", memory=True, consistent=True)

    with_checkpoints(tmp_path, (), scenario)


def test_a_checkpoint_whose_memory_is_damaged_is_refused_before_the_guest_is_turned_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(made: Controllers) -> None:
        partition, record = made.partitions.find("web"), made.checkpoints.find("web", "a")
        os.makedirs(partition.runtime.paths.data, exist_ok=True)
        Path(partition.runtime.paths.data, "memory.state").write_bytes(b"no state")
        run = Run(Accelerator.TCG, "", (), partition.record.definition)
        saved = SavedState("memory.state", "", record.created_at, run, "pc", "", 8)
        made.checkpoints._keep(msgspec.structs.replace(record, saved=saved), made.checkpoints._revisions[record.key])
        before = partition.record
        monkeypatch.setattr(partition, "has_processes", lambda: True)
        monkeypatch.setattr(partition, "stop", lambda *_: pytest.fail("it was turned off"))
        view = await made.operations.wait((await made.checkpoints.apply("web", "a")).id)
        assert view.error is not None
        assert "memory.state is cut off" in view.error.message
        assert "The partition is as it was" in view.error.remedy
        assert partition.record == before
        monkeypatch.undo()

    with_checkpoints(tmp_path, ("a",), scenario)
