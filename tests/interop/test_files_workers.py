"""The processes that read files, by themselves: the spare one ends when nobody comes, and with whoever keeps it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from mullion.base.units import MIB
from mullion.media.confined import channel
from mullion.media.files_worker import FilesCommand
from mullion.services.files.workers import FilesWorkers
from mullion.vhd import create_dynamic

pytestmark = pytest.mark.interop

PATIENCE_S = 60.0


def workers_of_ours() -> set[int]:
    """Readers of files that are children of this process, and not only waited for."""
    found = set()
    for task in os.listdir("/proc/self/task"):
        for child in Path(f"/proc/self/task/{task}/children").read_text().split():
            try:
                if b"files_worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.add(int(child))
            except OSError:
                continue
    return found


async def until(count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while len(workers_of_ours()) != count:
            await asyncio.sleep(0.02)


@pytest.fixture
def command(tmp_path: Path) -> FilesCommand:
    path = str(tmp_path / "empty.vhd")
    create_dynamic(path, 4 * MIB)
    return FilesCommand(label="web", chains={"disk0": (path,)}, operation="volumes")


async def answered(workers: FilesWorkers, command: FilesCommand) -> bytes:
    """The last frame of an answer."""
    async with asyncio.timeout(PATIENCE_S), workers.work(command) as frames:
        while True:
            kind, length = channel.HEAD.unpack(await frames.readexactly(channel.HEAD.size))
            payload = await frames.readexactly(length)
            if kind == channel.END:
                return payload


def test_a_spare_that_nobody_needs_ends(command: FilesCommand) -> None:
    async def scene() -> None:
        workers = FilesWorkers(spare_s=0.5)
        try:
            assert await answered(workers, command) == b"{}"
            await until(1)
            await until(0)
            assert await answered(workers, command) == b"{}"
        finally:
            await workers.close()
        assert workers_of_ours() == set()

    asyncio.run(scene())


def test_several_at_once_leave_one_spare(command: FilesCommand) -> None:
    async def scene() -> None:
        workers = FilesWorkers()
        try:
            for _ in range(2):
                assert await asyncio.gather(*(answered(workers, command) for _ in range(3))) == [b"{}"] * 3
            await until(1)
        finally:
            await workers.close()
        assert workers_of_ours() == set()

    asyncio.run(scene())


def test_whoever_closes_while_a_spare_starts_leaves_nothing(command: FilesCommand) -> None:
    async def scene() -> None:
        workers = FilesWorkers()
        assert await answered(workers, command) == b"{}"
        await asyncio.sleep(0)  # the spare's start has begun, and cannot have ended
        await workers.close()
        await until(0)
        assert await answered(workers, command) == b"{}"
        await until(0)  # and none is started any more

    asyncio.run(scene())
