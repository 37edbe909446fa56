"""Checkpoints of a stopped partition, with the power cut before any step: every promise is kept afterwards.

The service's own code runs on a real store and real files; the steps are its transactions and the changes it makes to
files. What a cut does inside a file is the engine's test (`tests/unit/vhd`), what one does to a running partition is
`tests/vm/test_checkpoints.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tests.framework.controllers import Controllers

from mullion.base.paths import HostPaths
from mullion.base.units import MIB
from mullion.model.definition import DiskAttachment, PartitionDefinition
from mullion.parent.store import Condition, MemoryStore
from mullion.parent.store.protocol import Write
from mullion.services.checkpoint import branching, keeper
from mullion.services.checkpoint.controller import CheckpointController
from mullion.services.checkpoint.layers import Merge
from mullion.services.checkpoint.merging import MergeStatus
from mullion.services.partition.partition import Partition
from mullion.services.partition.record import BackupOrigin, DiskLayers
from mullion.vhd import create_differencing, create_dynamic, open_chain
from mullion.vhd.layer_merge import LayerFiles, merge_layer

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(300)]

DISKS = ("disk0", "disk1")
SIZE_BYTES = 1 * MIB


class PowerCut(BaseException):
    """Nothing is done any more."""


@dataclass
class Power:
    """Counts steps, and is cut before one of them."""

    cut_before: int
    steps: int = 0
    names: list[str] = field(default_factory=list)

    @property
    def is_cut(self) -> bool:
        return self.steps > self.cut_before

    def step(self, name: str) -> None:
        self.steps += 1
        self.names.append(name)
        if self.is_cut:
            raise PowerCut(name)


class CutStore(MemoryStore):
    """A store whose transactions are steps."""

    power: Power | None = None

    async def transact(self, conditions: Sequence[Condition], writes: Sequence[Write]) -> int:
        if self.power is not None and not all(write.key.startswith(("events/", "operations/")) for write in writes):
            self.power.step(f"transact {' '.join(write.key for write in writes)}")
        return await super().transact(conditions, writes)


@dataclass
class World:
    """A host that is started and cut off as often as a test likes; `contents` is what it has promised."""

    home: Path
    store: CutStore
    monkeypatch: pytest.MonkeyPatch
    promised: dict[str, dict[str, str]] = field(default_factory=dict)
    """By checkpoint and disk."""
    present: list[dict[str, str]] = field(default_factory=list)
    """What may be there now: one state, or two while an act goes on that changes it."""

    @property
    def paths(self) -> HostPaths:
        return HostPaths(str(self.home / "data"), str(self.home / "run"))

    @contextlib.asynccontextmanager
    async def running(self, power: Power | None = None) -> AsyncIterator[CheckpointController]:
        self.store.power = power
        self._patch(power)
        made = await Controllers.open(self.store, self.paths)
        try:
            await made.checkpoints.open()
            self.partitions, self.operations = made.partitions, made.operations
            yield made.checkpoints
        finally:
            await made.close(PowerCut)

    def _patch(self, power: Power | None) -> None:
        """The changes to files are steps as well."""

        def stepping(act: Callable[..., Any], name: str) -> Callable[..., Any]:
            def step(*arguments: Any, **named: Any) -> Any:
                if power is not None:
                    power.step(f"{name} {' '.join(os.path.basename(str(one)) for one in arguments)}")
                return act(*arguments, **named)

            return step

        async def merge_at_once(
            _partition: Partition, _disk: str, act: Merge, _status: MergeStatus, _rate: Callable[[], int]
        ) -> None:
            """What the worker does, in this process."""
            with LayerFiles.open(act.upper, act.lower) as files:
                merge_layer(files)

        self.monkeypatch.undo()
        for module, name in (
            (branching, "create_differencing"),
            (keeper, "_remove_file"),
            (keeper, "relink"),
            (keeper, "merge_now"),
            (keeper, "forget_merge"),
        ):
            self.monkeypatch.setattr(module, name, stepping(getattr(module, name), name))
        merge: Callable[..., Awaitable[None]] = merge_at_once
        self.monkeypatch.setattr(keeper, "merge_layer", stepping(merge, "merge_layer"))

    # -- what an administrator does ------------------------------------------------------------------------------------

    def write(self, number: int) -> None:
        """The guest's writes while it ran: to both disks."""
        before = self._heads()
        for disk, path in before.items():
            with open_chain(path) as chain:
                chain.pwrite(number * 64 * 1024, f"{disk} write {number}".encode().ljust(4096, b"."))
        self.present = [self.contents(self._heads())]

    def _heads(self) -> dict[str, str]:
        partition = self.partitions.find("web")
        return {disk: branching.layers_of(partition, disk).head for disk in DISKS}

    @staticmethod
    def contents(tops: dict[str, str]) -> dict[str, str]:
        found = {}
        for disk, top in tops.items():
            with open_chain(top, read_only=True) as chain:
                buffer = bytearray(chain.size_bytes)
                chain.pread(0, buffer)
            found[disk] = hashlib.sha256(buffer).hexdigest()
        return found

    async def create(self, checkpoints: CheckpointController, name: str) -> None:
        now = self.present[0]
        view = await checkpoints.create("web", checkpoint=name)
        ended = await self.operations.wait(view.id)
        assert ended.state.value == "succeeded", ended.error
        self.promised[name] = now

    async def apply(self, checkpoints: CheckpointController, name: str, keep_as: str | None) -> None:
        before = self.present[0]
        self.present = [before, self.promised[name]]
        view = await checkpoints.apply("web", name, keep_present=keep_as)
        ended = await self.operations.wait(view.id)
        assert ended.state.value == "succeeded", ended.error
        self.present = [self.promised[name]]
        if keep_as is not None:
            self.promised[keep_as] = before

    async def delete(self, checkpoints: CheckpointController, name: str) -> None:
        del self.promised[name]
        view = await checkpoints.delete("web", name)
        ended = await self.operations.wait(view.id)
        assert ended.state.value == "succeeded", ended.error

    async def check(self, checkpoints: CheckpointController) -> None:
        """Everything that was promised is there."""
        keeper_of = checkpoints._keeper(self.partitions.find("web"))
        async with asyncio.timeout(60):
            await keeper_of._idle.wait()
        known = {record.name: record for record in checkpoints.records("web")}
        for name, expected in self.promised.items():
            assert self.contents({disk.id: disk.path for disk in known[name].disks}) == expected, name
        assert self.contents(self._heads()) in self.present
        for path in Path(self.paths.disks).iterdir():
            partition = self.partitions.find("web")
            ours = {path for layers in partition.record.layers.values() for path in layers.parents}
            assert str(path) in ours or path.suffix == ".vhd", f"{path} belongs to nobody"


async def _scenario(world: World, checkpoints: CheckpointController) -> None:
    world.write(1)
    await world.create(checkpoints, "one")
    world.write(2)
    await world.create(checkpoints, "two")
    world.write(3)
    await world.apply(checkpoints, "one", "kept")
    world.write(4)
    await world.create(checkpoints, "three")
    world.write(5)
    await world.delete(checkpoints, "one")
    await world.apply(checkpoints, "two", None)
    world.write(6)
    for name in ("kept", "three", "two"):
        await world.delete(checkpoints, name)


async def _prepared(home: Path, monkeypatch: pytest.MonkeyPatch, *, is_coming_home: bool) -> World:
    world = World(home, CutStore(), monkeypatch)
    os.makedirs(world.paths.disks)
    for disk in DISKS:
        create_dynamic(f"{world.paths.disks}/{disk}.vhd", SIZE_BYTES, block_bytes=64 * 1024)
    async with world.running():
        disks = tuple(DiskAttachment(path=disk, id=disk) for disk in DISKS)
        layers = {disk: _restored(f"{world.paths.disks}/{disk}") for disk in DISKS} if is_coming_home else {}
        origin = BackupOrigin("near", "0", DISKS) if is_coming_home else None
        await world.partitions.create(PartitionDefinition(name="web", disks=disks), layers=layers, origin=origin)
    return world


def _restored(path: str) -> DiskLayers:
    """A disk that was restored instantly: nothing of it is home."""
    base, head = f"{path}.vhd", f"{path}-0.avhd"
    create_differencing(head, base)
    return DiskLayers(head, {base: None, head: base}, is_coming_home=True)


async def _come_home(world: World, checkpoints: CheckpointController) -> None:
    """Until then one layer is left above each definition's file, which gets what comes home."""
    partition = world.partitions.find("web")
    assert [len(layers.parents) for layers in partition.record.layers.values()] == [2] * len(DISKS)
    assert len(os.listdir(world.paths.disks)) == 2 * len(DISKS)
    async with partition.lock:
        layers = partition.record.layers.items()
        await partition.save(layers={disk: replace(known, is_coming_home=False) for disk, known in layers})
    checkpoints.wake(partition)


async def _run(home: Path, monkeypatch: pytest.MonkeyPatch, cut_before: int, *, is_coming_home: bool) -> Power:
    world = await _prepared(home, monkeypatch, is_coming_home=is_coming_home)
    power = Power(cut_before)
    async with world.running(power) as checkpoints:
        doing = asyncio.create_task(_scenario(world, checkpoints))
        while not doing.done() and not power.is_cut:
            await asyncio.sleep(0)
        if power.is_cut:
            doing.cancel()
            await asyncio.gather(doing, return_exceptions=True)
        else:
            await doing
            await world.check(checkpoints)
    async with world.running() as checkpoints:
        await world.check(checkpoints)
        for record in checkpoints.records("web"):
            world.promised.setdefault(record.name, {})
            await world.delete(checkpoints, record.name)
        await world.check(checkpoints)
        if is_coming_home:
            await _come_home(world, checkpoints)
            await world.check(checkpoints)
        assert sorted(os.listdir(world.paths.disks)) == [f"{disk}.vhd" for disk in DISKS]
    return power


@pytest.mark.parametrize("is_coming_home", [False, True])
def test_the_power_is_cut_before_any_step(monkeypatch: pytest.MonkeyPatch, is_coming_home: bool) -> None:
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # each run syncs some hundred times
    with tempfile.TemporaryDirectory(prefix="mullion-test-", dir=memory) as folder:
        whole = asyncio.run(_run(Path(folder, "whole"), monkeypatch, 10_000, is_coming_home=is_coming_home))
        assert whole.steps > 50
        for step in range(whole.steps):
            asyncio.run(_run(Path(folder, str(step)), monkeypatch, step, is_coming_home=is_coming_home))
            shutil.rmtree(Path(folder, str(step)))
