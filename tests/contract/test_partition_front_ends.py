"""What the parent keeps of QEMU's connections, while providers end, are replaced, or lie."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from tests.framework.providers import DEADLINE_S, WANTED, make_spec

from mullion.base.errors import UnavailableError
from mullion.base.paths import PartitionPaths
from mullion.base.pidfd import wait_process
from mullion.base.process import ProcessIdentity
from mullion.base.units import MIB
from mullion.provider.front_end import FrontEnd, SetupMessage
from mullion.provider.keeping import Keeping
from mullion.services.partition.front_ends import KeptFrontEnds
from mullion.services.partition.provider_link import ProviderFleet, ProviderLink
from mullion.services.partition.runtime import Runtime
from mullion.vhd import create_dynamic
from mullion.wire.vhost_user.client import FrontEnd as Client
from mullion.wire.vhost_user.driver import attach

pytestmark = pytest.mark.contract

STATUS = {"disks": [{"id": "a", "vhost_user": {}}, {"id": "b", "vhost_user": {}}]}
RETRIES = 6


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not is_so():
            await asyncio.sleep(0.001)


def connection() -> tuple[FrontEnd, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return FrontEnd(theirs.detach(), [SetupMessage(1, b"x", (os.memfd_create("m"),))]), ours


class Provider:
    """The other end of a link, as a guest that has taken a provider over may have it be."""

    def __init__(self) -> None:
        self.keeping: Keeping | None = None
        self.adopted: list[str] = []
        self.is_gone = False

    async def request(self, command: str, *, fds: Sequence[int], disk: str = "", **_: object) -> Mapping[str, Any]:
        if self.is_gone:
            raise UnavailableError("the provider went away")
        if command == "keep":
            self.keeping = Keeping([os.dup(fd) for fd in fds], ["a", "b"])
            return {}
        self.adopted.append(disk)
        await self.adopt(disk, fds)
        return {}

    async def adopt(self, disk: str, fds: Sequence[int]) -> None:
        """What it does meanwhile."""

    async def link(self, kept: KeptFrontEnds) -> None:
        await kept.link(cast(ProviderLink, self), STATUS)

    def say(self, disk: str, front_end: FrontEnd | None) -> None:
        assert self.keeping is not None
        self.keeping.changes(disk)
        assert self.keeping.is_now(disk, front_end)

    def end(self, kept: KeptFrontEnds) -> None:
        assert self.keeping is not None
        kept.orphan()
        for disk in ("a", "b"):
            self.keeping.leave(disk)


def is_open(end: socket.socket) -> bool:
    try:
        return end.recv(1) != b""
    except BlockingIOError:
        return True


async def orphan_of(kept: KeptFrontEnds, disk: str) -> socket.socket:
    """A connection whose provider was killed."""
    provider = Provider()
    await provider.link(kept)
    front_end, end = connection()
    provider.say(disk, front_end)
    for fd in front_end.fds:
        os.close(fd)
    provider.end(kept)
    return end


def test_a_provider_that_dies_before_it_adopts_leaves_all_to_the_next() -> None:
    async def story() -> None:
        kept = KeptFrontEnds("test")
        end = await orphan_of(kept, "a")
        dying, next_one = Provider(), Provider()
        dying.is_gone = True
        with pytest.raises(UnavailableError):
            await dying.link(kept)
        kept.orphan()
        assert is_open(end)
        await next_one.link(kept)
        assert next_one.adopted == ["a"]
        assert is_open(end)
        kept.drop()
        next_one.end(kept)
        end.close()

    asyncio.run(story())


def test_a_connection_that_a_provider_has_by_itself_is_not_given_to_it() -> None:
    class HasBoth(Provider):
        async def adopt(self, disk: str, fds: Sequence[int]) -> None:
            self.say("b", live)
            await until(lambda: kept._keeper is not None and kept._keeper.copy_of("b") is not None)

    kept = KeptFrontEnds("test")
    live, live_end = connection()

    async def story() -> None:
        end = await orphan_of(kept, "a")
        provider = HasBoth()
        await provider.link(kept)
        assert provider.adopted == ["a"]
        assert is_open(live_end)
        kept.drop()
        provider.end(kept)
        end.close()

    asyncio.run(story())
    live_end.close()
    for fd in live.fds:
        os.close(fd)


def test_what_is_sent_to_a_provider_is_not_what_its_number_means_by_then() -> None:
    """It says that the connection has ended while it is sent to it: the parent must not send another one's memory."""
    found: list[tuple[int, ...]] = []

    class EndsIt(Provider):
        async def adopt(self, disk: str, fds: Sequence[int]) -> None:
            before = tuple(os.fstat(fd).st_ino for fd in fds)
            self.say(disk, None)
            await until(lambda: kept._keeper is not None and kept._keeper.copy_of(disk) is None)
            while kept._closer._is_running:
                await asyncio.sleep(0)
            others = [os.memfd_create("another guest's memory") for _ in range(8)]
            found.extend([before, tuple(os.fstat(fd).st_ino for fd in fds)])
            for fd in others:
                os.close(fd)

    kept = KeptFrontEnds("test")

    async def story() -> None:
        end = await orphan_of(kept, "a")
        provider = EndsIt()
        await provider.link(kept)
        kept.drop()
        provider.end(kept)
        end.close()

    asyncio.run(story())
    assert found[0] == found[1]


def test_a_provider_that_hangs_up_at_once_is_called_again_by_one_task(short_tmp: Path) -> None:
    paths = PartitionPaths(str(short_tmp), str(short_tmp))
    calls: list[int] = []

    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append(1)
        writer.close()

    async def story() -> None:
        runtime = Runtime("test", paths)
        server = await asyncio.start_unix_server(hang_up, paths.provider_control)
        identity = ProcessIdentity.of(os.getpid())
        assert identity is not None
        runtime._hold_provider(identity)
        await until(lambda: len(calls) >= RETRIES)
        assert len([task for task in asyncio.all_tasks() if "provider's link" in task.get_name()]) == 1
        await runtime.release()
        server.close()

    asyncio.run(story())


def test_a_hand_over_that_is_heard_of_late_costs_no_connection(short_tmp: Path) -> None:
    """The old provider's end is noticed before the start of the new one is."""
    paths = PartitionPaths(str(short_tmp), str(short_tmp))
    create_dynamic(str(short_tmp / "disk.vhd"), 16 * MIB)
    spec = {**make_spec(short_tmp, [short_tmp / "disk.vhd"]).to_wire(), "control": paths.provider_control}
    runtime = Runtime("test", paths)

    class SlowFleet(ProviderFleet):
        async def spawn(self, spec: Mapping[str, Any]) -> ProcessIdentity:
            old = runtime.provider
            identity = await super().spawn(spec)
            if old is not None:
                await wait_process(old)
                await until(lambda: runtime.provider is None)
            return identity

    async def story() -> None:
        fleet = SlowFleet(str(short_tmp / "zygote.log"))
        await runtime.start_provider(fleet, spec)
        try:
            await until(lambda: runtime.link is not None and runtime.front_ends._keeper is not None)
            with Client(str(short_tmp / "d0.vhost")) as client:
                driver = attach(client, wanted=WANTED)
                await until(lambda: runtime.front_ends._keeper.copy_of("d0") is not None)  # type: ignore[union-attr]
                await runtime.hand_over_provider(fleet, spec)
                assert int.from_bytes(client.config(60)[:8], "little") == 16 * MIB // 512
                driver.release()
        finally:
            await runtime.stop_provider()
            await runtime.release()
        assert fleet._writer is not None
        assert fleet._reader_task is not None
        fleet._writer.close()
        await fleet._reader_task  # until the zygote was waited for

    asyncio.run(story())
